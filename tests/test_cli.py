"""The command line: output, exit codes, and a one-line error for every user mistake."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast import cli
from ov3fast.data.skips import SkipWarning
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
        "eager",
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


HEAVY = ("diffusers", "transformers", "torch._dynamo", "sympy", "scipy", "matplotlib", "pyarrow", "tensorboard", "triton")


@pytest.mark.parametrize("command", ["--help", "doctor --json", "encode", "reconstruct", "caption"])
def test_a_command_imports_what_it_needs(command, model, photo, tmp_path):
    """Start-up of one image: diffusers alone took 4 s."""
    rest = {"encode": [model, photo, "--out", tmp_path / "e.npz"], "reconstruct": [model, photo, "--out", tmp_path / "r.png"]}
    argv = [*command.split(), *map(str, rest.get(command, [model, photo] if command == "caption" else []))]
    code = f"""
import sys
from ov3fast.cli import main
code = main({argv!r})
heavy = {{*{HEAVY}, *({{"torch", "numpy"}} if {command!r} == "--help" else ())}}
print("imported:", sorted(heavy & set(sys.modules)), code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("imported: [] 0\n"), done.stdout + done.stderr


def test_caption_prints_or_writes(capsys, model, photo, tmp_path):
    (photo.parent / "broken.png").write_bytes(b"no image")
    code, printed, _ = run(capsys, "caption", model, photo.parent, "--beams", "1")
    lines = printed.splitlines()
    assert code == 0 and lines[0].startswith("broken.png\t(skipped: broken_image") and lines[1].startswith("photo.png\t")
    out = tmp_path / "new" / "captions.jsonl"
    code, text, _ = run(capsys, "caption", model, photo.parent, "--beams", "1", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and "2 images" in text and rows[1] == {"image": "photo.png", "caption": lines[1].split("\t")[1]}
    assert rows[0]["caption"] is None and rows[0]["skipped"].startswith("broken_image")
    assert ".jsonl or .txt" in one_line(run(capsys, "caption", model, photo, "--out", tmp_path / "x.csv")[2])


def test_captions_of_nothing_are_an_error(capsys, model, tmp_path):
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "a.png").write_bytes(b"")
    code, out, err = run(capsys, "caption", model, tmp_path / "zero")
    assert code == 2 and out.startswith("a.png\t(skipped: broken_image")
    assert "caption: none of the 1 images could be read" in one_line(err)


def test_captions_that_were_done_are_kept(capsys, model, photo, tmp_path, monkeypatch):
    for name in ("b.png", "c.png"):
        (photo.parent / name).write_bytes(photo.read_bytes())
    caption, calls = OpenVision3.caption, []

    def interrupted(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return caption(*arguments, **options)

    monkeypatch.setattr(OpenVision3, "caption", interrupted)
    with pytest.warns(UserWarning, match=r"stopped after 2 images; they are in .*c.partial.txt"):
        code, _, err = run(capsys, "caption", model, photo.parent, "--batch-size", "1", "--out", tmp_path / "c.txt")
    assert code == 130 and err.endswith("ov3fast: interrupted\n")
    assert [line.split("\t")[0] for line in (tmp_path / "c.partial.txt").read_text().splitlines()] == ["b.png", "c.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.partial.txt", "photos"]


def test_reports_on_a_full_disk(capsys, model, shards, small_disk):
    for kilobytes in (4, 60):  # the tables, then the page
        disk = small_disk(kilobytes)
        code, _, err = run(
            capsys, "evaluate", model, "--data", shards, "--out", disk / "out", "--pictures", "2", "--beams", "1", "-q"
        )
        assert code == 2 and "the disk is full" in one_line(err) and str(disk / "out") in err
        assert not list(disk.rglob(".*"))


def test_a_model_on_a_full_disk(model, small_disk):
    disk = small_disk(100)
    whole = OpenVision3.from_pretrained(model)
    with pytest.raises(OSError, match="the disk is full; nothing was changed.*/disk/model"):
        whole.save_pretrained(disk / "model")
    assert list(disk.iterdir()) == []


def test_a_folder_is_reconstructed(capsys, model, photo, tmp_path):
    (photo.parent / "in").mkdir()
    Image.open(photo).save(photo.parent / "in" / "photo.jpg")
    Image.open(photo).save(photo.parent / "photo.bmp")
    (photo.parent / "broken.png").write_bytes(b"no image")
    with pytest.warns(SkipWarning, match="skipped broken.png"):
        code, text, _ = run(capsys, "reconstruct", model, photo.parent, "--out", tmp_path / "out")
    assert code == 0 and "3 images" in text
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert files == ["in/photo.png", "photo.bmp.png", "photo.png.png"]
    run(capsys, "reconstruct", model, photo, "--out", tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "out" / "photo.png.png").read_bytes()


def test_originals_are_not_overwritten(capsys, model, photo, tmp_path):
    before = photo.read_bytes()
    assert "out is the image itself" in one_line(run(capsys, "reconstruct", model, photo, "--out", photo)[2])
    (tmp_path / "link").symlink_to(photo.parent)
    for out in (photo.parent, tmp_path / "link"):
        assert "is one of the originals; name another folder" in one_line(
            run(capsys, "reconstruct", model, photo.parent, "--out", out)[2]
        )
    assert photo.read_bytes() == before


def test_names_do_not_break_the_lines(capsys, model, photo):
    photo.rename(photo.parent / "a\nb\tc.png")
    lines = run(capsys, "caption", model, photo.parent, "--beams", "1")[1].splitlines()
    assert len(lines) == 1 and lines[0].startswith("a\\nb\\tc.png\t")


def test_what_a_link_leads_to_is_written(capsys, model, photo, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "e.npz").symlink_to(tmp_path / "disk" / "e.npz")
    assert run(capsys, "encode", model, photo, "--out", tmp_path / "e.npz")[0] == 0
    assert (tmp_path / "e.npz").is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["e.npz"]


def test_files_have_the_umasks_mode(capsys, model, photo, tmp_path):
    before = os.umask(0o027)
    try:
        run(capsys, "encode", model, photo, "--out", tmp_path / "e.safetensors")
        run(capsys, "reconstruct", model, photo, "--out", tmp_path / "r.png")
    finally:
        os.umask(before)
    assert {oct((tmp_path / name).stat().st_mode & 0o777) for name in ("e.safetensors", "r.png")} == {"0o640"}


def test_a_runs_folder_stands_for_its_model(capsys, model, photo, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="the run has no model yet"):
        OpenVision3.from_pretrained(tmp_path / "run")
    (tmp_path / "run" / "model").symlink_to(model)
    expected = OpenVision3.from_pretrained(model).state_dict()
    found = OpenVision3.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert run(capsys, "encode", tmp_path / "run", photo, "--out", tmp_path / "x.npz")[0] == 0


def test_the_home_folder_in_every_form(capsys, model, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(photo.parent)
    assert run(capsys, "encode", model, "~/photos", "--out=~/x.npz")[0] == 0
    assert run(capsys, "encode", model, "~/photos/photo.png", "--out", "~/y.npz")[0] == 0
    OpenVision3.from_pretrained(model).save_pretrained("~/model")
    assert OpenVision3.from_pretrained("~/model").config.vision.width == 48
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "x.npz", "y.npz", "model"} and os.listdir(photo.parent) == [
        "photo.png"
    ]


# ---- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, photo):
    from ov3fast.data import write_shards

    write_shards([(f"{i}", {"png": photo.read_bytes(), "txt": f"picture {i}".encode()}) for i in range(3)], tmp_path / "shards")
    return tmp_path / "shards"


def test_evaluate_shards(capsys, model, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("OV3FAST_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "report"
    with pytest.warns(UserWarning, match="LPIPS-style is not computed"):
        code, text, _ = run(capsys, "evaluate", model, "--data", shards, "--out", out, "--pictures", "2", "--beams", "1")
    assert code == 0 and "report: " in text
    assert not (tmp_path / "cache").exists()  # nothing was downloaded
    tables = json.loads((out / "evaluation.json").read_text())
    assert [row["reference"] for row in tables["captions"]] == ["picture 0", "picture 1", "picture 2"]
    assert sorted(p.name for p in out.iterdir()) == ["evaluation.json", "report.html"]


def test_evaluate_takes_a_skip_budget(capsys, model, photo, tmp_path):
    from ov3fast.data import write_shards

    write_shards([("a", {"png": photo.read_bytes(), "txt": b"a"}), ("b", {"png": b"", "txt": b"b"})], tmp_path / "half")
    arguments = (
        "evaluate",
        model,
        "--data",
        tmp_path / "half",
        "--out",
        tmp_path / "out",
        "--pictures",
        "1",
        "--beams",
        "1",
        "-q",
    )
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "1 of 2 samples were skipped (1 broken_image), more than skip_budget = 0.1" in one_line(err)
    assert run(capsys, *arguments, "--skip-budget", "0.5")[0] == 0
    skipped = json.loads((tmp_path / "out" / "evaluation.json").read_text())["data"]["skipped"]
    assert skipped == {"data": {"broken_image": 1}}


def test_evaluate_in_the_home_folder(capsys, model, shards, tmp_path, monkeypatch):
    """The model is read and the report written there, not in a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OV3FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    OpenVision3.from_pretrained(model).save_pretrained(tmp_path / "model")
    assert run(capsys, "evaluate", "~/model", "--data=~/shards", "--pictures", "2", "--beams", "1", "-q")[0] == 0
    assert (tmp_path / "model" / "report.html").is_file() and not list((tmp_path / "here").iterdir())


def test_evaluate_refuses_before_the_work(capsys, model, shards, tmp_path, monkeypatch):
    from ov3fast.data import demo

    monkeypatch.setattr(demo, "build_demo", lambda *_: pytest.fail("packages were downloaded"))
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        assert "needs jinja2 and matplotlib: pip install 'ov3fast[eval]'" in one_line(
            run(capsys, "evaluate", model, "--data", shards)[2]
        )
    assert "give --data, a folder" in one_line(run(capsys, "evaluate", model, "--out", tmp_path / "out")[2])
    import ov3fast.inference

    monkeypatch.setattr(ov3fast.inference, "load_model", lambda *_, **__: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (("--out", "/proc/out"), "nothing can be written in /proc"),
        (("--out", tmp_path / "file"), "file is no folder"),
        (("--image-size", "0"), "--image-size must be at least 1, got 0"),
        (("--beams", "0"), "--beams must be at least 1, got 0"),
        (("--skip-budget", "-1"), "--skip-budget takes a share from 0 to 1, got -1"),
    ):
        assert words in one_line(run(capsys, "evaluate", model, "--data", shards, *arguments)[2])


def one_line(err: str) -> str:
    [line] = err.strip().splitlines()
    assert line.startswith("ov3fast: error: ") and "Traceback" not in line
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "no command 'nonsense'; the commands are train, watch, compare"),
        (("trian", "--recipe", "demo"), "no command 'trian'; perhaps train; the commands are"),
        (("enc", "m", "a.jpg"), "no command 'enc'; perhaps encode; the commands are"),
        (("encode",), ", --out PATH (see ov3fast encode --help)"),
        (
            ("encode", "MODEL", "PHOTO", "--out", "x.npz", "--dtype", "fp8"),
            "--dtype must be one of float32, bfloat16, auto; got 'fp8'",
        ),
        (("encode", "MODEL", "PHOTO", "--out", "x.npz", "--batch-size", "x"), "--batch-size takes a number; got 'x'"),
        (("bench", "--only"), "--only takes a value"),
        (
            ("train", "--recipe", "huge"),
            "--recipe must be one of demo, base, large, custom, generate-demo, generate-base, understand-demo, understand-base, or a .json",
        ),
        (("train", "--recipe"), "--recipe takes a value"),
        (("train", "--recipe", "demo", "--stages.0.image-size", "65"), "image_size"),
        (("train", "--recipe", "demo", "--data.sources.0.path", "/nowhere/at/all", "--vae", "small"), "/nowhere/at/all"),
        (("evaluate", "/nowhere/at/all"), "/nowhere/at/all"),
        (("encode", "/nowhere/at/all", "x.png", "--out", "x.npz"), "/nowhere/at/all"),
        (("encode", "MODEL", "PHOTO", "--out", "x.npz", "--image-size", "0"), "image_size must be at least 1, got 0"),
        (("encode", "MODEL", "PHOTO", "--out", "x.npz", "--device", "cuda"), "device 'cuda' can't be used here"),
        (("encode", "MODEL", "PHOTO", "--out", "x.npz", "--device", "gpu"), "device 'gpu' can't be used here"),
        (
            ("encode", "MODEL", "PHOTO", "--out", "x.npz", "--image-size", "abc"),
            "--image-size takes a whole number or None; got 'abc'",
        ),
        (("encode", "MODEL", "PHOTO"), "missing --out PATH (see ov3fast encode --help)"),
        (("encode", "MODEL", "PHOTO", "--out", "x.npz", "--nonsense", "3"), "Unrecognized options: --nonsense, 3"),
        (("encode", "MODEL", "PHOTO", "--out", "x.npz", "--device", "meta"), "device 'meta' can't be used here"),
        (("encode", "MODEL", "", "--out", "x.npz"), "the argument after MODEL is empty; is a shell variable unset?"),
        (("encode", "MODEL", "PHOTO", "--out="), "encode: the argument after PHOTO is empty"),
        (
            ("encode", "MODEL", "PHOTO", "--out", "x.txt"),
            "--out must end in .safetensors, .npz, .npy, .parquet, or have no ending, for a folder of parts; got x.txt",
        ),
        (("reconstruct", "MODEL", "PHOTO", "--out", "x.jpg"), "--out must end in .png, got x.jpg"),
        (("train", "--recipe", "demo", "--stages.0.stepz", "3"), "perhaps --stages.0.steps or --stages.1.steps"),
        (("train", "--recipe", "demo", "--data.skip-budget", "-1", "--dry-run"), "skip_budget: got -1.0; it takes a share"),
        (("train", "--recipe", "demo", "--device", "foo"), "train: device 'foo' can't be used here"),
        (("data", "demo", "--workers", "0"), "workers: got 0; it takes 1 or more"),
        (("data", "demo", "--cache-dir", "/proc/x"), "cache_dir: nothing can be written in /proc"),
        (("data", "nonsense"), "data takes demo, check, index or encode; got 'nonsense'"),
        (("data", "check", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_mistakes(capsys, model, tmp_path_factory, tmp_path, monkeypatch, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    photo = tmp_path_factory.mktemp("mistakes") / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)
    arguments = [{"MODEL": model, "PHOTO": photo}.get(word, word) for word in arguments]
    monkeypatch.setenv("OV3FAST_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    for word, value in {"MODEL": model, "PHOTO": photo}.items():
        words = words.replace(word, str(value))
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
    """torch.compile on a CPU needs a C++ compiler; without one the run fails before reading any data."""
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
