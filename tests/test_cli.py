"""The command line: what it prints, what it returns, and one clear line for every mistake a user can make."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast import cli
from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import get_tokenizer


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:  # --help, and options that tyro itself refuses
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model folder with the shipped VAE."""
    tokenizer = get_tokenizer("wordpiece").restrict(["a red apple"])
    config = OpenVision3Config(
        vision=VisionConfig(width=48, depth=1, heads=2, mlp_dim=64, image_size=64, embed_dim=32),
        decoder=DecoderConfig(width=48, depth=1, heads=2, mlp_dim=64),
        text=TextConfig(width=32, depth=1, heads=2, mlp_dim=64, context_length=8),
        caption=CaptionConfig(width=32, depth=1, heads=2, mlp_dim=64, length=8, style="autoregressive"),
        vae="small",
    ).for_tokenizer(tokenizer)
    folder = tmp_path_factory.mktemp("model") / "model"
    OpenVision3(config, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photos" / "photo.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(path)
    return path


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in cli.COMMANDS)
    for command in cli.COMMANDS:
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and "usage" in out, command
    assert run(capsys, "--version")[1].strip() == "0.1.0"


def test_doctor(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in (
        "CPU kernels",
        "on the CPU",
        "contrastive_loss",
        "flash_attention",
        "adamw_ema_",
        "reference",
        "ready",
        "C++ compiler",
        "small VAE",
    ):
        assert word in out, word


def test_dry_run_prints_the_papers_recipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys, "train", "--recipe", "base", "--dry-run")
    assert code == 0
    for word in (
        "5,124,668,000",
        "625,570",
        "0.000256",
        "125,114",
        "6.4e-06",
        "6,256",
        "85,695,744",
        "GFLOPs",
        "objective.latent_weight",
    ):
        assert word in out, word


def test_every_field_can_be_overridden(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(
        capsys, "train", "--recipe", "base", "--dry-run", "--stages.1.image-size", "224", "--objective.latent-weight", "0.3"
    )
    assert code == 0 and "224" in out and "0.3" in out


def test_encode_and_reconstruct(capsys, model, photo, tmp_path):
    out = tmp_path / "vectors.safetensors"
    code, text, _ = run(capsys, "encode", model, photo.parent, "--out", out)
    assert code == 0 and "1 images" in text
    from safetensors.torch import load_file

    tensors = load_file(out)
    assert tensors["pooled"].shape == (1, 32) and tensors["tokens"].shape == (1, 16, 48)
    picture = tmp_path / "picture.png"
    code, text, _ = run(capsys, "reconstruct", model, photo, "--out", picture)
    assert code == 0 and "dB" in text
    assert Image.open(picture).size == (64, 64)


def one_line(err: str) -> str:
    [line] = err.strip().splitlines()
    assert line.startswith("ov3fast: error: ") and "Traceback" not in line
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "no command 'nonsense'; it takes train, evaluate"),
        (("train", "--recipe", "huge"), "--recipe must be one of demo, base, large; got 'huge'"),
        (("train", "--recipe"), "--recipe takes a value"),
        (("train", "--recipe", "demo", "--stages.0.image-size", "65"), "image_size"),
        (("train", "--recipe", "demo", "--data.sources.0.path", "/nowhere/at/all", "--vae", "small"), "/nowhere/at/all"),
        (("evaluate", "/nowhere/at/all"), "/nowhere/at/all"),
        (("encode", "/nowhere/at/all", "x.png", "--out", "x.npz"), "/nowhere/at/all"),
        (("data", "nonsense"), "data takes demo or check; got 'nonsense'"),
        (("data", "check", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("OV3FAST_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2 and words in one_line(err)
    assert os.listdir(tmp_path) == []  # nothing half written


def test_mistakes_with_a_model(capsys, model, photo, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no image" in one_line(run(capsys, "encode", model, empty, "--out", tmp_path / "x.npz")[2])
    assert ".safetensors" in one_line(run(capsys, "encode", model, photo, "--out", tmp_path / "x.txt")[2])
    assert "photo.txt" in one_line(run(capsys, "reconstruct", model, tmp_path / "photo.txt", "--out", tmp_path / "x.png")[2])
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"vision": {}}))
    assert "has no model.safetensors" in one_line(run(capsys, "evaluate", broken)[2])


def test_missing_key_is_named(capsys, model, photo, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    del tensors["logit_scale"]
    save_file(tensors, broken / "model.safetensors")
    assert "logit_scale" in one_line(run(capsys, "encode", broken, photo, "--out", tmp_path / "x.npz")[2])


def test_no_compiler(capsys, monkeypatch, tmp_path):
    """torch.compile on a CPU needs a C++ compiler; without one the run says so before it reads any data."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    code, _, err = run(capsys, "train", "--recipe", "demo", "--compile", "--device", "cpu", "--run-dir", str(tmp_path / "run"))
    assert code == 2 and "compile" in one_line(err) and "C++ compiler" in err
    assert not (tmp_path / "run").exists()


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("OV3FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no command"):
        cli.main(["nonsense"])


def test_threads_are_left_alone():
    before = torch.get_num_threads()
    cli.main(["--version"])
    assert torch.get_num_threads() == before
