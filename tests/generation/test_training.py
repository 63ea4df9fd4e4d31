"""A generator's run: exact resume, what is refused, and the commands that sample it."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast import cli
from ov3fast.data.shards import write_shards
from ov3fast.data.skips import DataError
from ov3fast.generation import report, training
from ov3fast.generation.saved import SavedGenerator
from ov3fast.recipes.generate import GENERATE_RECIPES, GenerateRecipe


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
    """Two classes, a dozen pictures, four steps."""
    shards = tmp_path_factory.mktemp("shards")
    samples = []
    for i in range(12):
        about = {"captions": {"name": f"picture {i % 2}"}, "meta": {"group": ("dark", "light")[i % 2]}}
        samples.append((f"{i:02d}", {"png": png(40 + 170 * (i % 2)), "json": json.dumps(about).encode()}))
    write_shards(samples, shards / "set")
    return GenerateRecipe(
        model=str(folder), data=(str(shards / "set"),), widths=(32, 48), depths=(2, 1), heads=(2, 2), batch_size=6, steps=4, warmup_steps=2,
        checkpoint_every=2, log_every=1, precision="fp32", run_dir=tmp_path_factory.mktemp("runs") / "run",
    )  # fmt: skip


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return SavedGenerator.load(run_dir).generator.state_dict()


@pytest.fixture(scope="module")
def trained(recipe) -> Path:
    return training.train_generator(recipe)


@pytest.mark.parametrize("changes", [{}, {"condition": "text"}, {"in_context": True}])
def test_a_stopped_run_goes_on_to_the_same_bits(recipe, tmp_path, changes):
    whole = dataclasses.replace(recipe, run_dir=tmp_path / "whole", **changes)
    training.train_generator(whole)
    half = dataclasses.replace(whole, run_dir=tmp_path / "half", steps=2)
    # The schedule is a function of all steps, so the first half is run as the whole one, and stopped.
    tokens = training.encode_tokens(whole, training.load_model(whole.model))
    trainer = training.Trainer(whole, tokens)
    trainer.step(), trainer.step()
    half.run_dir.mkdir()
    trainer.save(half.run_dir / training.CHECKPOINT)
    (half.run_dir / training.RECIPE).write_text(json.dumps(dataclasses.asdict(half), default=str))
    (half.run_dir / training.LOG).write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    training.train_generator(dataclasses.replace(half, steps=4), resume=True)
    one, other = weights(whole.run_dir), weights(half.run_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [json.loads(line)["step"] for line in (half.run_dir / training.LOG).read_text().splitlines()] == [1, 2, 3, 4]


def test_a_sample_does_not_depend_on_its_batch(trained):
    saved = SavedGenerator.load(trained)
    together = saved.sample(torch.tensor([0, 1, 1]), [0, 1, 2], steps=3, weight=1.5)
    alone = saved.sample(torch.tensor([1]), [1], steps=3, weight=1.5)
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)
    assert together.shape[1:] == saved.statistics.mean.shape


def test_commands(capsys, trained, tmp_path):
    assert run(capsys, "generate", trained)[1].split() == ["dark", "light"]
    arguments = ("generate", trained, "--class", "light", "--count", "3", "--steps", "2")
    code, out, _ = run(capsys, *arguments, "--out", tmp_path / "pictures")
    assert code == 0 and "3 pictures" in out
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert run(capsys, *arguments, "--out", tmp_path / "grid.png")[0] == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (66, 66)  # 2 x 2 pictures of 32 pixels
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
    with pytest.raises(FileExistsError, match="--resume goes on"):
        training.train_generator(recipe)
    with pytest.raises(ValueError, match="batch_size is 7 and was 6"):
        training.train_generator(dataclasses.replace(recipe, batch_size=7), resume=True)
    with pytest.raises(DataError, match="class_field"):
        training.train_generator(dataclasses.replace(recipe, class_field="none", run_dir=recipe.run_dir / "other"))
    with pytest.raises(ValueError, match="dropout"):
        dataclasses.replace(recipe, dropout=1.0)
    code, _, error = run(capsys, "train", "--recipe", "generate-all")
    assert code == 2 and "generate-demo, generate-base" in error
    assert "--class-field" in run(capsys, "train", "--recipe", "generate-demo", "--help")[1]


def test_report(monkeypatch, recipe, trained):
    """With features that need no download."""
    monkeypatch.setattr(report, "fetch", lambda name: None)
    features = lambda images: (images.float().flatten(1)[:, ::97] + torch.rand(len(images), 32), None)  # noqa: E731
    monkeypatch.setattr(report.fid, "build_extractor", lambda *_: features)
    figures = report.write_generation_report(recipe, samples=12, steps=2)
    assert figures["training_pictures"] == 12 and 0 <= figures["copies"] <= 1
    assert figures["class_of_nearest_by_chance"] == pytest.approx(0.5)
    page = (trained / "generate.html").read_text()
    assert page.count("data:image/png") >= 24 and "not comparable with FID" in page and "light" in page


def test_the_papers_recipe():
    base = GENERATE_RECIPES["generate-base"]
    assert (base.widths, base.depths, base.heads) == ((1152, 2048), (28, 2), (16, 16))
    assert base.steps * base.batch_size / 1_281_167 == pytest.approx(80, abs=0.01)
    assert base.lr_at(base.steps // 2) == base.lr and base.lr_at(base.steps) == pytest.approx(0.1 * base.lr)
