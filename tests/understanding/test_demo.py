"""The demo: questions that only the pictures can answer, results with intervals, the page, and the commands."""

import dataclasses
import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast import cli
from ov3fast.data.shards import write_shards
from ov3fast.recipes.understand import UNDERSTAND_RECIPES
from ov3fast.understanding import demo
from ov3fast.understanding.questions import (
    COLOURS,
    Fact,
    caption,
    colours_of,
    held_out_questions,
    swapped,
    training_conversations,
)

pytest.importorskip("transformers")

RGB = {
    "red": (215, 30, 40), "orange": (240, 140, 20), "yellow": (250, 220, 40), "green": (50, 160, 60), "blue": (40, 90, 220),
    "purple": (130, 50, 190), "pink": (250, 150, 190), "brown": (120, 70, 30), "black": (20, 20, 25), "gray": (130, 130, 132),
}  # fmt: skip


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def facts(count: int = 60) -> list[Fact]:
    groups, styles = ("food and drink", "animals nature", "objects"), ("fluent", "twitter")
    return [
        Fact(
            f"set/{i}", f"c{i // 2}", f"thing {i // 2}", groups[i // 2 % 3], styles[i % 2], COLOURS[i // 2 % 4] if i % 7 else ""
        )
        for i in range(count)
    ]


def test_the_colours_of_pictures():
    images = torch.full((len(COLOURS) + 2, 3, 16, 16), 255, dtype=torch.uint8)
    for place, name in enumerate(COLOURS):
        images[place, :, 4:12, 4:12] = torch.tensor(RGB[name], dtype=torch.uint8)[:, None, None]
    images[-1, :, :4], images[-1, :, 8:12] = 90, 250  # several colours, none covers half
    images[-1, 0, :2] = 255
    assert colours_of(images)[: len(COLOURS)] == list(COLOURS)
    assert colours_of(images)[-2] == ""  # background only


def test_held_out_questions_tell_nothing_by_themselves():
    asked = held_out_questions(facts())
    counts = Counter((question.text, question.answer) for question in asked if question.kind.endswith("yes or no"))
    texts = {text for text, _ in counts}
    assert len(texts) > 30 and all(counts[text, "yes"] == counts[text, "no"] for text in texts)
    for question in asked:
        fact = facts()[question.picture]
        if question.kind == "name, yes or no":
            assert (question.text == f"is there a {fact.name}?") == (question.answer == "yes")
    assert {question.kind for question in asked} == set(demo_kinds())


def demo_kinds():
    from ov3fast.understanding.questions import KINDS

    return KINDS


def test_values_are_exchanged():
    values = ["a"] * 5 + ["b"] * 3 + ["", "c", "c"]
    found = swapped(values)
    assert all(new != old for new, old in zip(found, values, strict=True) if new)
    kept = [old for old, new in zip(values, found, strict=True) if new]
    assert Counter(kept) == Counter(filter(None, found)) and found[8] == ""
    assert swapped(["a", "a", "a"]) == ["", "", ""]


def test_training_conversations_are_true_and_balanced():
    given = facts()
    by_key = {fact.key: fact for fact in given}
    made = training_conversations(given)
    assert [one.turns[0].answer for one in made["captions"]] == [caption(fact) for fact in given]
    answers = Counter()
    for one in made["questions"]:
        fact = by_key[one.image]
        assert [turn.sees for turn in one.turns] == [True] + [False] * (len(one.turns) - 1)
        told = ""  # revealed by an open answer
        for turn in one.turns:
            if turn.answer in ("yes", "no"):
                assert not told or told not in turn.question
            else:
                told = turn.answer
        for turn in one.turns:
            answers[turn.answer] += 1
            if turn.question.startswith("is there"):
                assert turn.question.endswith(f"a {fact.name}?") == (turn.answer == "yes")
            if turn.question == "which group?":
                assert turn.answer == fact.group
    assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6
    assert training_conversations(given) == made


def test_intervals():
    """Concepts are resampled, not questions: duplicating questions doesn't narrow the interval."""
    generator = np.random.default_rng(0)
    right = (generator.random(200) < 0.7).astype(float)
    owner = np.arange(200).astype(str)
    one = demo.compare({"tower": right, "control": 1 - right}, owner)
    assert one["tower"][0] == right.mean() and one["tower"][1] < right.mean() < one["tower"][2]
    width = 1.96 * (right.var() / 200) ** 0.5
    assert one["tower"][2] - one["tower"][0] == pytest.approx(width, rel=0.15)
    four = demo.compare({"tower": right.repeat(4), "control": (1 - right).repeat(4)}, owner.repeat(4))
    assert four["tower"] == pytest.approx(one["tower"]) and four["questions"] == 800 and four["concepts"] == 200
    assert one["difference"][0] == pytest.approx(2 * right.mean() - 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A demo set of two dozen pictures: objects with name and group, in two colours."""
    root = tmp_path_factory.mktemp("cache")
    for name, count in (("pairs-train", 24), ("photos-train", 4), ("pairs-style", 12), ("pairs-unseen", 12)):
        samples = []
        for i in range(count):
            colour, group = ("red", "blue")[i % 2], ("food-drink", "animals-nature")[i % 2]
            thing = f"{colour} {('apple', 'fish', 'box')[i // 2 % 3]}"
            pixels = np.full((32, 32, 3), 255, np.uint8)
            pixels[4:28, 4:28] = RGB[colour]
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            meta = {"concept": f"{thing}", "group": group, "style": ("fluent", "twitter")[i // 6 % 2]}
            about = {"captions": {"name": thing}, "meta": meta}
            samples.append((f"{i:02d}", {"png": file.getvalue(), "json": json.dumps(about).encode()}))
        write_shards(samples, root / "demo" / name)
    return root


def demo_arguments(tower_folder, run_dir, steps=2):
    stages = [argument for i in (0, 1) for argument in (f"--stages.{i}.steps", str(steps), f"--stages.{i}.batch-size", "16")]
    small = ("--small.width", "16", "--small.depth", "1", "--small.heads", "2", "--small.mlp-dim", "24")
    return ("train", "--recipe", "understand-demo", "--tower", tower_folder, "--run-dir", run_dir, *stages, *small)


def test_the_demos_commands(capsys, monkeypatch, cache, tower_folder, tmp_path):
    monkeypatch.setenv("OV3FAST_CACHE", str(cache))
    run_dir = tmp_path / "run"
    code, out, error = run(capsys, *demo_arguments(tower_folder, run_dir))
    assert code == 0, error
    assert "all yes/no questions" in out and "95 % interval" in out
    figures = json.loads((run_dir / "understand.json").read_text())
    assert figures["yes_no"]["control"][0] <= 0.5 == figures["yes_no"]["chance"]
    assert {row["kind"] for row in figures["rows"]} <= set(demo_kinds())
    page = (run_dir / "understand.html").read_text()
    assert page.count("data:image/png") == 24 and "is there a red apple?" in page and "http" not in page
    assert (run_dir / "control" / "model").is_dir() and (run_dir / "data" / "questions.json").is_file()
    # A finished run is not trained again.
    before = (run_dir / "model" / "projector.safetensors").stat().st_mtime_ns
    assert run(capsys, *demo_arguments(tower_folder, run_dir), "--resume")[0] == 0
    assert (run_dir / "model" / "projector.safetensors").stat().st_mtime_ns == before
    picture = tmp_path / "x.png"
    Image.new("RGB", (40, 30), RGB["red"]).save(picture)
    code, out, error = run(capsys, "answer", run_dir, picture, "--question", "which group?", "is there a red fish?")
    assert code == 0 and len(out.splitlines()) == 2, error
    for rest, words in (
        ((picture,), "give --question or --benchmark"),
        ((picture, "--question", "x", "--limit", "3"), "are for --benchmark"),
        ((tmp_path / "y.png", "--question", "x"), "there is no file"),
        (("--benchmark", "pope"), "takes --data FOLDER"),
        (("--benchmark", "dogs", "--data", tmp_path), "benchmark must be one of pope"),
        ((picture, "--question", "x", "--max-new-tokens", "0"), "at least 1"),
    ):
        code, _, error = run(capsys, "answer", run_dir, *rest)
        assert code == 2 and words in error, error
    rows = [{"image": "x.png", "text": "Is there a fish in the image?", "label": label} for label in ("yes", "no")]
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out_file = tmp_path / "replies.jsonl"
    code, out, error = run(capsys, "answer", run_dir, "--benchmark", "pope", "--data", tmp_path, "--out", out_file)
    assert code == 0 and "accuracy" in out, error
    assert [json.loads(line)["answer"] for line in out_file.read_text().splitlines()] == ["yes", "no"]


@pytest.mark.full
def test_the_demo_learns_to_see(monkeypatch, cache, tower_folder, tmp_path):
    """Shortened: on held-out pictures, group and yes/no accuracy are far above the control's."""
    monkeypatch.setenv("OV3FAST_CACHE", str(cache))
    recipe = UNDERSTAND_RECIPES["understand-demo"]
    stages = tuple(
        dataclasses.replace(stage, steps=steps, batch_size=48, lr=4e-3)
        for stage, steps in zip(recipe.stages, (20, 300), strict=True)
    )
    small = dataclasses.replace(recipe.small, width=48, depth=2, heads=2, mlp_dim=96)
    recipe = dataclasses.replace(
        recipe, tower=str(tower_folder), stages=stages, small=small, precision="fp32", run_dir=tmp_path / "run", log_every=50
    )
    figures = demo.run_demo(recipe)
    groups = [row for row in figures["rows"] if row["kind"] == "which group"]
    assert len(groups) == 2
    for row in groups:
        assert row["tower"][0] > 0.8 and row["difference"][1] > 0.1, row
    assert figures["yes_no"]["tower"][1] > 0.6 and figures["yes_no"]["control"][0] <= 0.5, figures["yes_no"]


def test_what_is_refused(capsys):
    code, _, error = run(capsys, "train", "--recipe", "understand-all")
    assert code == 2 and "understand-demo, understand-base" in error
    assert "--tower" in run(capsys, "train", "--recipe", "understand-demo", "--help")[1]


def test_the_device_is_looked_at(capsys, monkeypatch, cache, tower_folder, tmp_path):
    """A nonexistent device is rejected before any training starts, in the demo as in other runs."""
    monkeypatch.setenv("OV3FAST_CACHE", str(cache))
    base = ("train", "--recipe", "understand-base", "--tower", tower_folder, "--run-dir", tmp_path / "run")
    for arguments in (demo_arguments(tower_folder, tmp_path / "run"), base):
        code, _, error = run(capsys, *arguments, "--device", "cuda:99")
        assert code == 2 and "device 'cuda:99' can't be used here" in error and not (tmp_path / "run").exists()
