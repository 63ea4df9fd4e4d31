"""Exports: the files reproduce the model at every batch size and image size without ov3fast, as their certificates state."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ov3fast import cli
from ov3fast.inference import VisionTower
from ov3fast.interop import _certificate, _folder
from ov3fast.interop._programs import parts_of, program
from ov3fast.interop.torch import export
from ov3fast.models.vit import ViTEncoder

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
sys.modules["ov3fast"] = None
import torch
kind, file, io = sys.argv[1:]
given = torch.load(io)["given"]
if kind == "torch":
    found = torch.export.load(file).module()(given)
elif kind == "aotinductor":
    found = torch._inductor.aoti_load_package(file)(given)
elif kind == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(x) for x in session.run(None, {session.get_inputs()[0].name: given.numpy()})]
else:
    import openvino
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [torch.from_numpy(x).clone() for x in compiled(given.numpy()).values()]
torch.save({"found": [found] if isinstance(found, torch.Tensor) else list(found)}, io)
"""


def elsewhere(kind, file, given, folder):
    """The output of the exported file in a process where importing ov3fast fails."""
    torch.save({"given": given}, folder / "io.pt")
    command = [sys.executable, "-c", RUN, kind, str(file), str(folder / "io.pt")]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "io.pt")["found"]


def close(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_program_is_plain_pytorch_and_of_any_size(model):
    image = parts_of(model)[0]
    exported = program(image)
    assert not [node for node in exported.graph.nodes if "ov3fast" in str(node.target)]
    assert image.free_names == ["batch", "height", "width"]
    module = exported.module()
    for shape in ((1, 3, 32, 32), (4, 3, 64, 48)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            close(module(images), model.encode(images))
    with pytest.raises(Exception, match="(?i)guard|constraint|16"):
        module(torch.zeros(1, 3, 40, 32))


def test_positions_from_the_weights_fix_the_size(model):
    encoder = ViTEncoder(model.config.vision).eval()
    encoder.set_position_embedding(torch.randn(5, 32))
    encoder.set_vae(model.get_vae())
    [part] = parts_of(encoder)
    assert part.name == "image" and part.free_names == ["batch"] and part.example.shape[2:] == (32, 32)


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    """The folder of each format, exported once with the command."""
    made = {}

    def folder(format):
        if format not in made:
            made[format] = tmp_path_factory.mktemp(format) / "out"
            assert cli.main(["export", format, str(model_folder), "--out", str(made[format])]) == 0
        return made[format]

    return folder


FORMATS = {
    "torch": ".pt2",
    "onnx": ".onnx",
    "openvino": ".xml",
}
"""Format -> suffix."""
NEEDS = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("openvino",)}


@pytest.mark.full
@pytest.mark.parametrize("format", FORMATS)
def test_runs_without_ov3fast(exported, model, model_folder, tmp_path, format):
    suffix = FORMATS[format]
    for name in NEEDS.get(format, ()):
        pytest.importorskip(name)
    folder = exported(format)
    images = torch.rand(3, 3, 48, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    ids = model.text_ids(["a red square", "red"])
    with torch.no_grad():
        close(elsewhere(format, folder / f"image{suffix}", images, tmp_path), model.encode(images))
        close(elsewhere(format, folder / f"reconstruct{suffix}", images, tmp_path), [model.reconstruct(images)])
        close(elsewhere(format, folder / f"text{suffix}", ids, tmp_path), [model.encode_text(ids)])
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["format"] == format and "astronaut.png" in certificate["images"]
    entry = certificate["parts"][f"image{suffix}"]
    assert entry["inputs"] == {"images": ["float32", "batch", 3, "height", "width"]} and entry["outputs"] == [
        "pooled",
        "tokens",
    ]
    assert {case["batch"] for case in entry["cases"]} == {1, 2, 5} and {case["height"] for case in entry["cases"]} == {32, 64}
    for case in entry["cases"]:
        assert all(0 < case["budget"][name] < 1e-3 and case["error"][name] <= 1e-3 for name in ("pooled", "tokens"))
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_size"] == 32
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.full
def test_a_compiled_package_runs_without_ov3fast(model, tmp_path):
    """Only the vision tower, since compilation takes minutes."""
    folder = export(VisionTower(model.encoder, model.get_vae()), tmp_path / "out", aotinductor=True)
    images = torch.rand(3, 3, 48, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        close(elsewhere("aotinductor", folder / "image.aotinductor.pt2", images, tmp_path), model.encode(images))


def test_a_file_that_is_off_is_not_written(model, tmp_path, monkeypatch):
    def off(given):
        with torch.no_grad():
            pooled, tokens = model.encode(given)
        return pooled, tokens + 1e-2 * tokens.abs().max()

    tower = VisionTower(model.encoder, model.get_vae())
    with (
        pytest.raises(ValueError, match="export: image: tokens of the exported file is off by .* at batch 1"),
        _folder.writing(tower, tmp_path / "out", "torch", "here", None) as (folder, parts, certificate),
    ):
        certificate.check(parts[0], folder / "image.pt2", off)
    assert not list(tmp_path.iterdir())


def test_the_budget_is_that_of_the_operators(model, tmp_path):
    """Another order of summation passes, and the model compared with itself has no error."""
    certificate = _certificate.Certificate(model, "torch", "here")

    def run(given):
        with torch.no_grad():
            return model.encode(given)

    certificate.check(parts_of(model)[0], tmp_path / "image.pt2", run)
    assert set(certificate.values["parts"]["image.pt2"]["max_error"]) == {"pooled", "tokens"}


def test_own_images(model, folder_of_photos, tmp_path):
    certificate = _certificate.Certificate(model, "torch", "here", [folder_of_photos])
    certificate.check(parts_of(model)[0], tmp_path / "image.pt2", lambda given: model.encode(given))
    assert certificate.values["images"] == ["a.png", "b.png"]


@pytest.fixture
def folder_of_photos(photo, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        photo.save(tmp_path / "photos" / f"{name}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["transformers", "m", "--out", "o", "--images", "x"], "--images is for torch, onnx, openvino"),
        (["onnx", "m", "--out", "o", "--aotinductor"], "--aotinductor is for torch, got onnx"),
        (["torch", "/nowhere", "--out", "o"], "nowhere"),
    ],
)
def test_refusals(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *arguments]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_missing_runtime_names_the_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    from ov3fast.interop import onnx

    with pytest.raises(ImportError, match=r"export onnx: needs onnxruntime: pip install 'ov3fast\[onnx\]'"):
        onnx.export(model, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "openvino", None)
    from ov3fast.interop import openvino

    with pytest.raises(ImportError, match=r"pip install 'ov3fast\[openvino\]'"):
        openvino.export(model, tmp_path / "out")


def test_every_format_has_a_committed_certificate():
    """`make certificates` writes them. Eager's own error is at most half of the budget, so the two are at most 1.5 budgets apart."""
    committed = json.loads((ROOT / "benches" / "results" / "certificates.json").read_text())
    assert set(committed) == set(FORMATS)
    for format, suffix in FORMATS.items():
        parts = committed[format]["parts"]
        assert {f"{part}{suffix}" for part in ("image", "reconstruct", "text")} <= set(parts)
        for part in parts.values():
            assert {case["batch"] for case in part["cases"]} == {1, 2, 5}
            for name in part["outputs"]:
                budget = max(case["budget"][name] for case in part["cases"])
                assert all(0 < case["error"][name] <= 1.5 * budget for case in part["cases"])
