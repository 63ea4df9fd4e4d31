"""GQA (Hudson and Manning, 2019), testdev_balanced: exact match of a word or phrase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ov3fast.understanding.benchmarks.item import SHORT, Item, check, field, image_in, read_json, share

FILE = "testdev_balanced_questions.json"


def read(folder: Path) -> list[Item]:
    """testdev_balanced_questions.json, in the folder or in questions/, and images/ID.jpg."""
    file = next((path for path in (folder / FILE, folder / "questions" / FILE) if path.is_file()), folder / FILE)
    records = read_json(file, "gqa")
    if not isinstance(records, dict):
        raise ValueError(f"gqa: {file} must be an object of questions by id")
    items = []
    for id, record in records.items():
        image = image_in((folder / "images", folder), f"{field(record, 'imageId', 'gqa', id)}.jpg", "gqa")
        kind = "open" if record.get("types", {}).get("structural") == "query" else "binary"
        items.append(Item(id, image, field(record, "question", "gqa", id) + SHORT, field(record, "answer", "gqa", id), kind))
    return items


def normalized(reply: str) -> str:
    """As LLaVA hands replies to GQA's own script: lower case, without a full stop at the end."""
    return reply.strip().rstrip(".").lower()


def score(items: Sequence[Item], replies: Sequence[str]) -> dict[str, float]:
    """accuracy, and that of binary and open questions."""
    check(items, replies, "gqa")
    right = [normalized(reply) == item.answer for item, reply in zip(items, replies, strict=True)]
    kinds = {
        kind: share([r for r, item in zip(right, items, strict=True) if item.group == kind])
        for kind in dict.fromkeys(i.group for i in items)
    }
    return {"accuracy": share(right)} | kinds
