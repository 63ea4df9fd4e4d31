"""`ov3fast checkpoint` and `ov3fast replay` on a finished run."""

import json
import shutil

import pytest

from ov3fast import cli
from ov3fast.training import train
from ov3fast.training.replay import replay


@pytest.fixture(scope="module")
def finished(tiny, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    train(tiny.recipe(data, run, ((5, 32),), gradient_norms_every=None))
    return run


def test_a_flipped_byte_names_its_tensor(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    folder = run / "checkpoints" / "step-00000005"
    [chunk] = json.loads((folder / "manifest.json").read_text())["tensors"]["ema/encoder.norm.weight"]["chunks"]
    content = bytearray((folder / chunk["file"]).read_bytes())
    content[chunk["offset"] + chunk["bytes"] // 2] ^= 1
    (folder / chunk["file"]).write_bytes(content)
    capsys.readouterr()
    assert cli.main(["checkpoint", "verify", str(run)]) == 1
    assert "tensor ema/encoder.norm.weight is not what was written" in capsys.readouterr().out


def test_an_exported_checkpoint_is_the_runs_model(finished, tmp_path):
    assert cli.main(["checkpoint", "export", str(finished), "--out", str(tmp_path / "model")]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (finished / "model" / name).read_bytes()
    assert cli.main(["checkpoint", "diff", str(finished), str(finished)]) == 0


def test_a_steps_losses_again(finished):
    row, logged, begun = replay(finished, 5, "cpu")
    assert begun == 3 and logged is not None
    for name in ("loss", "pixel", "latent", "caption", "contrastive", "grad_norm"):
        assert row[name] == logged[name], name
    with pytest.raises(ValueError, match="ends at step 5, got step 9"):
        replay(finished, 9, "cpu")
