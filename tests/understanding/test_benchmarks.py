"""Each benchmark on files in its published layout, with replies whose scores can be computed by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from ov3fast.understanding.benchmarks import NAMES, benchmark, gqa, mme, pope, scienceqa, seed
from ov3fast.understanding.benchmarks.item import LETTER, SHORT


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


def write(path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in value) if lines else json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def test_pope(folder):
    for split, labels in (("random", ["yes", "no", "yes", "no"]), ("popular", ["yes", "no"])):
        rows = [
            {"question_id": i + 1, "image": "COCO_val2014_000000000001.jpg", "text": f"Is there a thing {i} in the image?", "label": label}
            for i, label in enumerate(labels)
        ]  # fmt: skip
        write(folder / f"coco_pope_{split}.json", rows, lines=True)
    picture(folder / "val2014" / "COCO_val2014_000000000001.jpg")
    items = pope.read(folder)
    assert [item.group for item in items] == ["popular"] * 2 + ["random"] * 4
    assert items[0].prompt == "Is there a thing 0 in the image?" + SHORT
    # popular: 1 TP, 1 FP; random: 1 TP, 1 FN, 1 FP, 1 TN.
    found = pope.score(items, ["Yes", "Yes, there is.", "Yes.", "No, there is not.", "No", "maybe"])
    assert found["popular/accuracy"] == 0.5 and found["popular/yes"] == 1.0 and found["popular/f1"] == pytest.approx(2 / 3)
    assert found["random/precision"] == found["random/recall"] == found["random/f1"] == 0.5
    assert found["f1"] == pytest.approx((2 / 3 + 0.5) / 2) and found["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("reply", "yes"),
    [
        ("Yes", True), ("No", False), ("no", False), ("There is not a dog", False), ("Nothing", True), ("Yes. No dog", True),
        ("No, it is absent", False), ("NO", True), ("", True),
    ],
)  # fmt: skip
def test_popes_rule_as_published(reply, yes):
    assert pope.says_yes(reply) is yes


def test_gqa(folder):
    questions = {
        "1": {"imageId": "n1", "question": "Is it sunny?", "answer": "yes", "types": {"structural": "verify"}},
        "2": {"imageId": "n1", "question": "What is it?", "answer": "car", "types": {"structural": "query"}},
        "3": {"imageId": "n1", "question": "What colour?", "answer": "red", "types": {"structural": "query"}},
    }
    write(folder / "questions" / "testdev_balanced_questions.json", questions)
    picture(folder / "images" / "n1.jpg")
    items = gqa.read(folder)
    assert items[1].prompt == "What is it?" + SHORT and items[1].image.name == "n1.jpg"
    assert gqa.score(items, ["Yes.", "a car", "Red"]) == {"accuracy": pytest.approx(2 / 3), "binary": 1.0, "open": 0.5}


def test_seed_leaves_videos_out(folder):
    about = {"choice_a": "w", "choice_b": "x", "choice_c": "y", "choice_d": "z", "question": "Which?"}
    rows = [
        {**about, "answer": "A", "data_id": "1", "data_type": "image", "question_id": "7", "question_type_id": 1},
        {**about, "answer": "C", "data_id": "1", "data_type": "image", "question_id": "8", "question_type_id": 2},
        {**about, "answer": "C", "data_id": "v.mp4", "data_type": "video", "question_id": "9", "question_type_id": 10},
    ]
    write(folder / "SEED-Bench.json", {"questions": rows, "question_type": {"Scene": 1, "Count": 2}})
    picture(folder / "SEED-Bench-image" / "1.png")
    (folder / "SEED-Bench-image" / "1.png").rename(folder / "SEED-Bench-image" / "1")
    items = seed.read(folder)
    assert [item.id for item in items] == ["7", "8"]
    assert items[0].prompt == "Which?\nA. w\nB. x\nC. y\nD. z" + LETTER
    assert seed.score(items, ["A. w", " c"]) == {"accuracy": 0.5, "Scene": 1.0, "Count": 0.0}


@pytest.mark.parametrize("split", [False, True])
def test_mme(folder, split):
    root = folder / "MME_Benchmark_release_version"
    for category, count in (("existence", 2), ("code_reasoning", 1)):
        for i in range(count):
            place = root / category
            text = place / ("questions_answers_YN" if split else "") / f"{i}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n")
            picture(place / ("images" if split else "") / f"{i}.jpg")
    items = mme.read(folder)
    assert items[0].prompt == "Is there a dog?" + SHORT and len(items) == 6
    found = mme.score(items, ["Yes", "No", "yes, it is", "Yes", "n", "no"])
    # existence: both right for image 0, one for image 1; code_reasoning: the first is wrong.
    assert (found["existence/acc"], found["existence/acc_plus"], found["existence"]) == (75, 50, 125)
    assert (found["code_reasoning"], found["perception"], found["cognition"]) == (50, 125, 50)
    with pytest.raises(ValueError, match="two questions for every image; was the benchmark cut"):
        mme.score(items[:3], ["Yes"] * 3)


def test_mmes_rule_as_published():
    replies = ("Yes.", "y", "N", "no way", "It is not", "other", "maybe")
    assert [mme.parsed(reply) for reply in replies] == ["yes", "yes", "no", "no", "other", "other", "other"]


def test_scienceqa_takes_questions_with_an_image(folder):
    problems = {
        "1": {
            "question": "Which?",
            "choices": ["a", "b"],
            "answer": 1,
            "hint": "Look.",
            "image": "image.png",
            "subject": "natural",
        },
        "2": {"question": "Text?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "subject": "social"},
        "3": {
            "question": "What?",
            "choices": ["a", "b", "c"],
            "answer": 2,
            "hint": "",
            "image": "image.png",
            "subject": "social",
        },
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": [], "test": ["1", "2", "3"]})
    for id in ("1", "3"):
        picture(folder / "test" / id / "image.png")
    items = scienceqa.read(folder)
    assert [item.id for item in items] == ["1", "3"] and items[0].prompt == "Context: Look.\nWhich?\nA. a\nB. b" + LETTER
    assert scienceqa.score(items, ["B", "The answer is C."])["accuracy"] == 1
    assert scienceqa.score(items, ["B. b", "D"]) == {"accuracy": 0.5, "natural": 1.0, "social": 0.0}
    assert [scienceqa.parsed(reply) for reply in ("A", " B ", "C\nbecause", "I think A", "")] == ["A", "B", "C", "", ""]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named(folder, name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no"):
        benchmark(name).read(folder)
    with pytest.raises(ValueError, match="one reply for each"):
        benchmark(name).score([], [])


def test_names():
    with pytest.raises(ValueError, match="benchmark must be one of pope, gqa, seed, mme, scienceqa; got 'x'"):
        benchmark("x")
