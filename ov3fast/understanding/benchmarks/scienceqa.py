"""ScienceQA (Lu et al., 2022), the test questions with an image: one of several choices, by its letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ov3fast.understanding.benchmarks.item import LETTER, LETTERS, Item, check, field, image_in, read_json, share

SPLIT = "test"


def read(folder: Path) -> list[Item]:
    """problems.json, pid_splits.json and test/ID/image.png (in the folder or in images/)."""
    problems, splits = (read_json(folder / name, "scienceqa") for name in ("problems.json", "pid_splits.json"))
    items = []
    for id in field(splits, SPLIT, "scienceqa", "of pid_splits.json"):
        problem = field(problems, str(id), "scienceqa", "of problems.json")
        if not problem.get("image"):
            continue
        choices = field(problem, "choices", "scienceqa", id)
        context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        image = image_in(
            (folder / SPLIT / str(id), folder / "images" / SPLIT / str(id)), problem["image"], "scienceqa"
        )  # fmt: skip
        prompt = context + field(problem, "question", "scienceqa", id) + options + LETTER
        items.append(Item(str(id), image, prompt, LETTERS[problem["answer"]], problem.get("subject", ""), len(choices)))
    if not items:
        raise ValueError(f"scienceqa: no question of {folder} has an image")
    return items


def parsed(reply: str) -> str:
    """The letter of a reply: alone, before a full stop and a space, or after "The answer is "; "" where there is none."""
    text = reply.replace("\n", ". ")
    if text.strip() in tuple(LETTERS):
        return text.strip()
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.search(r"The answer is ([A-E])", text)
    return found[1] if found else ""


def score(items: Sequence[Item], replies: Sequence[str]) -> dict[str, float]:
    """accuracy over the questions with an image, and by subject."""
    check(items, replies, "scienceqa")
    right = [
        parsed(reply) == item.answer and parsed(reply) in LETTERS[: item.about]
        for item, reply in zip(items, replies, strict=True)
    ]
    subjects = dict.fromkeys(item.group for item in items if item.group)
    return {"accuracy": share(right)} | {
        subject: share([r for r, item in zip(right, items, strict=True) if item.group == subject]) for subject in subjects
    }
