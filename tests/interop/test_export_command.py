"""ov3fast export."""

import pytest

from ov3fast import cli


def test_transformers(model_folder, tmp_path, capsys):
    assert cli.main(["export", "transformers", str(model_folder), "--out", str(tmp_path / "hf")]) == 0
    import transformers

    import ov3fast.interop.transformers  # noqa: F401

    assert transformers.AutoModel.from_pretrained(tmp_path / "hf").config.model_type == "openvision3"


@pytest.mark.parametrize(
    "arguments", [["export", "gguf", "x", "--out", "y"], ["export", "transformers", "/nowhere", "--out", "y"]]
)
def test_errors(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2 and not list(tmp_path.iterdir())
