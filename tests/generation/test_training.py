"""Generator training: exact resume, multiple processes, errors, sampling commands, and the report."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast import cli
from ov3fast.data.shards import write_shards
from ov3fast.data.skips import DataError
from ov3fast.generation import report, training
from ov3fast.generation import tokens as tokens_module
from ov3fast.generation.saved import SavedGenerator
from ov3fast.recipes.generate import GENERATE_RECIPES, GenerateRecipe
from ov3fast.training.logs import LOG
from ov3fast.training.run_folder import RECIPE


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), color, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory) -> GenerateRecipe:
    """Two classes, twelve images, four steps."""
    shards = tmp_path_factory.mktemp("shards")
    for name, offset in (("set", 40), ("heldout", 45)):
        samples = []
        for i in range(12):
            about = {"captions": {"name": f"picture {i % 2}"}, "meta": {"group": ("dark", "light")[i % 2]}}
            samples.append((f"{i:02d}", {"png": png(offset + i + 160 * (i % 2)), "json": json.dumps(about).encode()}))
        write_shards(samples, shards / name)
    return GenerateRecipe(
        model=str(folder), data=(str(shards / "set"),), heldout=(str(shards / "heldout"),), widths=(32, 48), depths=(2, 1), heads=(2, 2), batch_size=6, steps=4, warmup_steps=2,
        checkpoint_every=2, log_every=1, precision="fp32", run_dir=tmp_path_factory.mktemp("runs") / "run",
    )  # fmt: skip


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return SavedGenerator.load(run_dir).generator.state_dict()


@pytest.fixture(scope="module")
def trained(recipe) -> Path:
    return training.train_generator(recipe)


@pytest.mark.parametrize("changes", [{}, {"condition": "text"}, {"in_context": True}, {"optimizer": "muon", "predicts": "x"}])
def test_a_stopped_run_goes_on_to_the_same_bits(recipe, tmp_path, changes):
    whole = dataclasses.replace(recipe, run_dir=tmp_path / "whole", **changes)
    training.train_generator(whole)
    half = dataclasses.replace(whole, run_dir=tmp_path / "half", steps=2)
    # The schedule depends on the total number of steps, so the first half comes from a full run that is stopped.
    tokens = training.encode_tokens(whole, training.load_model(whole.model))
    trainer = training.Trainer(whole, tokens)
    trainer.step(), trainer.step()
    half.run_dir.mkdir()
    trainer.save(half.run_dir / training.CHECKPOINT)
    (half.run_dir / RECIPE).write_text(json.dumps(dataclasses.asdict(half), default=str))
    (half.run_dir / LOG).write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    training.train_generator(dataclasses.replace(half, steps=4), resume=True)
    one, other = weights(whole.run_dir), weights(half.run_dir)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [json.loads(line)["step"] for line in (half.run_dir / LOG).read_text().splitlines()] == [1, 2, 3, 4]


def test_a_signal_saves(monkeypatch, recipe, tmp_path):
    """SIGTERM during step 3 of 4: the run saves, without a generator; resumed, it is bit-identical to an uninterrupted one."""
    whole = dataclasses.replace(recipe, run_dir=tmp_path / "whole", checkpoint_every=100)
    training.train_generator(whole)
    step = training.Trainer.step

    def interrupted(trainer):
        if trainer.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    half = dataclasses.replace(whole, run_dir=tmp_path / "half")
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", interrupted)
        assert training.train_generator(half) is None
    assert not (half.run_dir / "generator").exists()
    assert training.train_generator(half, resume=True) == half.run_dir
    one, other = weights(whole.run_dir), weights(half.run_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_sample_does_not_depend_on_its_batch(trained):
    saved = SavedGenerator.load(trained)
    together = saved.sample(torch.tensor([0, 1, 1]), [0, 1, 2], steps=3, weight=1.5)
    alone = saved.sample(torch.tensor([1]), [1], steps=3, weight=1.5)
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)
    assert together.shape[1:] == saved.statistics.mean.shape


def test_autoguidance_extrapolates_from_the_worse_generator(trained):
    """One step from noise with v_worse + w (v - v_worse): the latents lie on the line through the two unguided ones."""
    saved, worse = SavedGenerator.load(trained), SavedGenerator.load(trained)
    with torch.no_grad():
        for parameter in worse.generator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    labels, options = torch.tensor([0, 1]), {"steps": 1, "interval": (0.0, 1.0)}
    better, bad = saved.sample(labels, [0, 1], **options), worse.sample(labels, [0, 1], **options)
    guided = saved.sample(labels, [0, 1], weight=1.5, worse=worse, **options)
    torch.testing.assert_close(guided, bad + 1.5 * (better - bad), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided, better)
    with pytest.raises(ValueError, match="same classes"):
        saved.sample(labels, [0, 1], weight=1.5, worse=dataclasses.replace(worse, classes=["a", "b"]))


def test_commands(capsys, trained, tmp_path):
    assert run(capsys, "generate", trained)[1].split() == ["dark", "light"]
    arguments = ("generate", trained, "--class", "light", "--count", "3", "--steps", "2")
    code, out, _ = run(capsys, *arguments, "--out", tmp_path / "pictures")
    assert code == 0 and "3 pictures" in out
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert run(capsys, *arguments, "--out", tmp_path / "grid.png")[0] == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (66, 66)  # 2 x 2 images of 32 pixels, gap 2
    every = ("generate", trained, "--class", "all", "--count", "3", "--steps", "2")
    assert "6 pictures" in run(capsys, *every, "--out", tmp_path / "all")[1]
    assert sorted(path.name for path in (tmp_path / "all").iterdir())[2:4] == ["dark-00002.png", "light-00000.png"]
    with Image.open(tmp_path / "all" / "light-00001.png") as own, Image.open(tmp_path / "pictures" / "00001.png") as alone:
        assert np.abs(np.asarray(own, int) - np.asarray(alone, int)).max() <= 1  # the same sample in another batch
    assert run(capsys, *every, "--out", tmp_path / "rows.png")[0] == 0
    with Image.open(tmp_path / "rows.png") as rows:
        assert rows.size == (3 * 34 - 2, 2 * 34 - 2)
    for rest, words in (
        (("--class", "green", "--out", "x"), "class must be one of dark, light; got 'green'"),
        (("--text", "a tree", "--out", "x"), "takes --class"),
        (("--class", "dark"), "--out is needed"),
        (("--class", "dark", "--text", "x", "--out", "x"), "either --class or"),
        (("--class", "dark", "--out", "x", "--count", "0"), "--count must be at least 1"),
    ):
        code, _, error = run(capsys, "generate", trained, *rest)
        assert code == 2 and words in error, error
    code, _, error = run(capsys, "generate", tmp_path)
    assert code == 2 and "holds no generator" in error


def test_what_is_refused(capsys, recipe, trained):
    with pytest.raises(FileExistsError, match="--resume continues it"):
        training.train_generator(recipe)
    with pytest.raises(ValueError, match="batch_size is 7, but .* was started with 6"):
        training.train_generator(dataclasses.replace(recipe, batch_size=7), resume=True)
    with pytest.raises(DataError, match="class_field"):
        training.train_generator(dataclasses.replace(recipe, class_field="none", run_dir=recipe.run_dir / "other"))
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        dataclasses.replace(recipe, optimizer="muon", parallel="fsdp")
    with pytest.raises(ValueError, match="dropout"):
        dataclasses.replace(recipe, dropout=1.0)
    code, _, error = run(capsys, "train", "--recipe", "generate-all")
    assert code == 2 and "generate-demo, generate-base" in error
    assert "--class-field" in run(capsys, "train", "--recipe", "generate-demo", "--help")[1]


@pytest.fixture
def plain_features(monkeypatch):
    """Features that need no download: mean colours of a 4 x 4 grid."""
    monkeypatch.setattr(report, "fetch", lambda name: None)
    features = lambda images: (torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1), None)  # noqa: E731
    monkeypatch.setattr(report.fid, "build_extractor", lambda *_: features)


def test_report(plain_features, capsys, recipe, trained):
    figures = report.write_generation_report(recipe, samples=10, steps=2)
    assert figures["training_pictures"] == 12 and figures["pictures_per_set"] == 10
    assert figures["class_by_chance"] == pytest.approx(0.5)
    sets = figures["sets"]
    assert list(sets) == ["generated", "held out", "reconstructed", "noise"]
    assert sets["held out"]["class_of_nearest"] == 1 and sets["held out"]["fid_style"] < sets["noise"]["fid_style"]
    assert sets["held out"]["copies_in_pixels"] <= 0.1
    report.print_figures(figures)
    out = capsys.readouterr().out
    assert "held out" in out and "class of nearest" in out and "sigma 0.8" in out
    page = (trained / "generate.html").read_text()
    assert page.count("data:image/png") == 2 * report.SHOWN * 3 + 5 * report.SHOWN and "light" in page


def test_copies_are_found(plain_features, recipe):
    """Training images in place of samples: all count as copies, and the nearest image is of their own class."""
    pictures = torch.arange(0, 240, 20, dtype=torch.uint8)[:, None, None, None].expand(12, 3, 32, 32)
    real = report._looks(pictures, report.fid.build_extractor())
    near = report._nearest(real, real)
    assert near.by_pixels.tolist() == near.by_features.tolist() == list(range(12))
    found = report._measured(
        real, near, torch.arange(12) % 2, real, torch.arange(12) % 2, report.FeatureMoments.of(real.features), [1.0, 1e-3]
    )
    assert found["copies_in_features"] == found["copies_in_pixels"] == found["class_of_nearest"] == 1
    assert abs(found["fid_style"]) < 1e-3 * float(real.features.var(0).sum())


def test_robustness(folder):
    model = training.load_model(str(folder))
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    features = lambda pictures: pictures.float().mean((2, 3))  # noqa: E731
    reference = report.FeatureMoments.of(features(images))
    rows = report.robustness(model, images, features, reference)
    assert [row.sigma for row in rows] == [0.0, 0.2, 0.4, 0.8]
    assert torch.equal(rows[0].pictures, report._reconstructed(model, images))
    differ = [float((row.pictures.float() - rows[0].pictures.float()).abs().mean()) for row in rows]
    assert 0 == differ[0] < differ[1] < differ[3]
    assert rows[1].psnr == report.robustness(model, images, features, reference)[1].psnr


def test_muon_updates_the_blocks_matrices_by_orthogonal_ones(recipe):
    tokens = training.encode_tokens(recipe, training.load_model(recipe.model))
    trainer = training.Trainer(dataclasses.replace(recipe, optimizer="muon", warmup_steps=0), tokens)
    with torch.no_grad():  # zero-initialised gates would leave most gradients zero
        for parameter in trainer.generator.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    before = {name: p.detach().clone() for name, p in trainer.generator.named_parameters()}
    row = trainer.step()
    for name, p in trainer.optimizer.matrices.items():
        update = (p.detach() - before[name]) / (row["lr"] * 0.2 * max(p.shape) ** 0.5)
        values, of_gradient = torch.linalg.svdvals(update), torch.linalg.svdvals(p.grad)
        assert 0.6 < float(values.max()) < 1.5, name
        assert float(values.median() / values.max()) > 2 * float(of_gradient.median() / of_gradient.max()), name
    rest = [name for name in before if name not in trainer.optimizer.matrices]
    assert "embed.weight" in rest and "final.linear.weight" in rest and "trunk.0.norm1.weight" in rest
    parameters = dict(trainer.generator.named_parameters())
    assert any(not torch.equal(parameters[name], before[name]) for name in rest)
    trainer.tokens = dataclasses.replace(tokens, latents=torch.full_like(tokens.latents, float("nan")))
    with pytest.raises(RuntimeError, match="not finite"):
        trainer.step()
    assert all(p.isfinite().all() for p in parameters.values())


@pytest.mark.parametrize("condition", ["class", "text"])
def test_tokens_in_a_folder(monkeypatch, recipe, tmp_path, condition):
    """Same samples, conditions and statistics as in memory, rounded to bfloat16; encoded only once; rejected for other data."""
    cached = dataclasses.replace(recipe, condition=condition, token_cache=tmp_path / "tokens")
    model = training.load_model(recipe.model)
    memory = training.encode_tokens(dataclasses.replace(cached, token_cache=None), model)
    first = training.encode_tokens(cached, model)
    monkeypatch.setattr(tokens_module, "_encode_part", None)  # from here on, encoding fails
    again = training.encode_tokens(cached, model)
    every = torch.arange(24)
    for tokens in (first, again):
        assert len(tokens) == len(memory) == 24 and tokens.classes == memory.classes and tokens.latents.dtype == torch.bfloat16
        assert (
            torch.equal(tokens.statistics.mean, memory.statistics.mean) and tokens.statistics.about == memory.statistics.about
        )
        (latents, conditions), (expected, expected_conditions) = tokens.take(every), memory.take(every)
        rounded = memory.statistics.normalize(memory.latents.bfloat16().float())
        assert torch.equal(latents, rounded) and expected.dtype == latents.dtype
        assert torch.equal(conditions, expected_conditions if condition == "class" else expected_conditions.bfloat16().float())
    with pytest.raises(ValueError, match="token_cache .* holds tokens of another model or other data"):
        training.encode_tokens(dataclasses.replace(cached, data=recipe.heldout), model)
    with torch.inference_mode():  # in which it was loaded
        next(model.get_vae().parameters()).add_(1)
    with pytest.raises(ValueError, match="holds tokens of another model"):
        training.encode_tokens(cached, model)


@pytest.mark.full
@pytest.mark.parametrize("optimizer, parallel", [("adamw", "ddp"), ("muon", "ddp"), ("adamw", "fsdp")])
def test_two_processes_equal_one(recipe, tmp_path, optimizer, parallel):
    demo = GENERATE_RECIPES["generate-demo"]
    sizes = {
        name: getattr(recipe, name)
        for name in ("model", "data", "heldout", "widths", "depths", "heads", "batch_size", "precision")
    }
    one = dataclasses.replace(
        demo, **sizes, optimizer=optimizer, steps=4, warmup_steps=2, checkpoint_every=2, log_every=1, run_dir=tmp_path / "one",
        token_cache=tmp_path / "tokens" if parallel == "fsdp" else None,
    )  # fmt: skip
    training.train_generator(one)
    arguments = ["--recipe", "generate-demo", "--no-report", "--run-dir", str(tmp_path / "two")]
    for name in ("model", "precision", "optimizer", "batch_size", "steps", "warmup_steps", "checkpoint_every", "log_every"):
        arguments += ["--" + name.replace("_", "-"), str(getattr(one, name))]
    for name in ("data", "heldout", "widths", "depths", "heads"):
        arguments += ["--" + name, *map(str, getattr(one, name))]
    arguments += ["--parallel", parallel]
    if parallel == "fsdp":
        arguments += ["--token-cache", str(tmp_path / "tokens of two")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "ov3fast",
        "train",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    first, second = weights(one.run_dir), weights(tmp_path / "two")
    for name, value in first.items():
        # Muon orthogonalises in bfloat16, where a last-bit difference in a gradient can change the rounding.
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5 if optimizer == "adamw" else 1e-3)
    logged = (tmp_path / "two" / LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4]
    assert json.loads(logged[-1])["loss"] == pytest.approx(
        json.loads((one.run_dir / LOG).read_text().splitlines()[-1])["loss"], rel=1e-3
    )
    # A sharded run's checkpoint holds the whole generator, so a single process can resume from it.
    trainer = training.Trainer(one, training.encode_tokens(one, training.load_model(one.model)))
    trainer.load(tmp_path / "two" / training.CHECKPOINT)
    assert trainer.done == 4 and all(
        torch.equal(value, second[name]) for name, value in trainer.saved().generator.state_dict().items()
    )


@pytest.mark.full
def test_the_commands_of_make_demo_generate(plain_features, capsys, recipe, tmp_path):
    """Shortened, with two classes: training from scratch and on a finished run, report, grid; samples match their class."""
    run_dir = tmp_path / "run"
    fields = ["--data", *recipe.data, "--heldout", *recipe.heldout, "--steps", "400", "--batch-size", "16", "--samples", "12"]
    sizes = ["--widths", "32", "48", "--depths", "2", "1", "--heads", "2", "2"]
    arguments = [
        "train",
        "--recipe",
        "generate-demo",
        "--model",
        recipe.model,
        "--run-dir",
        run_dir,
        *fields,
        *sizes,
        "--resume",
    ]
    for _ in range(2):
        code, out, error = run(capsys, *arguments)
        assert code == 0, error
        assert "class of nearest" in out and (run_dir / "generate.html").is_file()
    assert "from step 400" in out
    code, out, error = run(
        capsys, "generate", run_dir, "--class", "all", "--count", "4", "--precision", "bf16", "--out", run_dir / "grid.png"
    )
    assert code == 0 and (run_dir / "grid.png").is_file(), error
    saved = SavedGenerator.load(run_dir)
    tokens = training.encode_tokens(recipe, training.load_model(recipe.model))
    labels = torch.arange(2).repeat(8)
    found = saved.statistics.normalize(saved.sample(labels, range(16), weight=2.0))
    nearest = torch.cdist(found.flatten(1), tokens.take(torch.arange(len(tokens)))[0].flatten(1)).argmin(1)
    assert (tokens.condition[nearest] == labels).float().mean() > 0.8


def test_the_papers_recipe():
    base = GENERATE_RECIPES["generate-base"]
    assert (base.widths, base.depths, base.heads) == ((1152, 2048), (28, 2), (16, 16))
    assert base.steps * base.batch_size / 1_281_167 == pytest.approx(80, abs=0.01)
    assert base.lr_at(base.steps // 2) == base.lr and base.lr_at(base.steps) == pytest.approx(0.1 * base.lr)
