"""POPE (Li et al., "Evaluating object hallucination in large vision-language models", 2023): is an object there, yes or no?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ov3fast.understanding.benchmarks.item import SHORT, Item, check, field, image_in, read_json


def read(folder: Path) -> list[Item]:
    """coco_pope_random.json, _popular and _adversarial, of which at least one is there, and COCO's images beside them or in val2014/."""
    files = sorted([*folder.glob("coco_pope_*.json"), *folder.glob("*/coco_pope_*.json")])
    if not files:
        raise FileNotFoundError(f"pope: no coco_pope_*.json in {folder}")
    items = []
    for file in files:
        split = file.stem.removeprefix("coco_pope_")
        for number, record in enumerate(read_json(file, "pope")):
            label = field(record, "label", "pope", number)
            if label not in ("yes", "no"):
                raise ValueError(f"pope: {file}, record {number}: label must be yes or no, got {label!r}")
            name = field(record, "image", "pope", number)
            image = image_in((folder / "val2014", folder / "images", folder), name, "pope")
            items.append(Item(f"{split}-{record.get('question_id', number)}", image, record["text"] + SHORT, label, split))
    return items


def says_yes(reply: str) -> bool:
    """The published rule: in the first sentence, without commas, "No", "no" or "not" as a word is no; everything else is yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score(items: Sequence[Item], replies: Sequence[str]) -> dict[str, float]:
    """Of each split and, without a split's name, their means: accuracy, precision, recall, f1 and yes (the share of that answer)."""
    check(items, replies, "pope")
    found: dict[str, float] = {}
    splits = list(dict.fromkeys(item.group for item in items))
    for split in splits:
        pairs = [
            (says_yes(reply), item.answer == "yes") for item, reply in zip(items, replies, strict=True) if item.group == split
        ]
        both, said, true = (sum(values) for values in zip(*((s and t, s, t) for s, t in pairs), strict=True))
        precision, recall = both / said if said else 0.0, both / true if true else 0.0
        of_split = {
            "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
            "accuracy": sum(s == t for s, t in pairs) / len(pairs),
            "precision": precision,
            "recall": recall,
            "yes": said / len(pairs),
        }
        found |= {f"{split}/{name}": value for name, value in of_split.items()}
    means = {name: sum(found[f"{split}/{name}"] for split in splits) / len(splits) for name in of_split}
    return means | found
