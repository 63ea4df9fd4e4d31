"""SEED-Bench (Li et al., 2023), its image part: one of four choices, by its letter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ov3fast.understanding.benchmarks.item import LETTER, Item, check, field, image_in, read_json, share


def read(folder: Path) -> list[Item]:
    """SEED-Bench.json and SEED-Bench-image/; questions about videos are left out."""
    given = read_json(folder / "SEED-Bench.json", "seed")
    names = {number: name for name, number in given.get("question_type", {}).items()}
    items = []
    for number, record in enumerate(field(given, "questions", "seed", "of the file")):
        if field(record, "data_type", "seed", number) != "image":
            continue
        choices = "".join(f"\n{letter}. {field(record, f'choice_{letter.lower()}', 'seed', number)}" for letter in "ABCD")
        image = image_in((folder / "SEED-Bench-image", folder), str(field(record, "data_id", "seed", number)), "seed")
        kind = names.get(record.get("question_type_id"), str(record.get("question_type_id")))
        id = str(record.get("question_id", number))
        items.append(Item(id, image, field(record, "question", "seed", number) + choices + LETTER, record["answer"], kind))
    if not items:
        raise ValueError(f"seed: {folder / 'SEED-Bench.json'} has no question about an image")
    return items


def score(items: Sequence[Item], replies: Sequence[str]) -> dict[str, float]:
    """accuracy, and that of each type of question. A reply counts by its first character."""
    check(items, replies, "seed")
    right = [reply.strip()[:1] == item.answer for item, reply in zip(items, replies, strict=True)]
    kinds = dict.fromkeys(item.group for item in items)
    return {"accuracy": share(right)} | {
        kind: share([r for r, item in zip(right, items, strict=True) if item.group == kind]) for kind in kinds
    }
