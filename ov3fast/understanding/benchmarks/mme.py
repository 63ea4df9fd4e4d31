"""MME (Fu et al., 2023): two yes/no questions about every image, fourteen categories.

A category's score is accuracy plus the share of images with both questions right, in percent: 200 at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ov3fast.understanding.benchmarks.item import SHORT, Item, check

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ASKS = " Please answer yes or no."
SUFFIXES = (".jpg", ".png", ".jpeg")


def read(folder: Path) -> list[Item]:
    """A folder for each category: images with a .txt each beside them, or images/ and questions_answers_YN/. A line is question, tab, Yes or No."""
    root = folder / "MME_Benchmark_release_version"
    root = root if root.is_dir() else folder
    items = []
    for category in (*PERCEPTION, *COGNITION):
        place = root / category
        if not place.is_dir():
            continue
        split = (place / "questions_answers_YN").is_dir()
        for file in sorted((place / "questions_answers_YN" if split else place).glob("*.txt")):
            image = next((path for suffix in SUFFIXES if (path := _image(place, file, split, suffix)).is_file()), None)
            if image is None:
                raise FileNotFoundError(f"mme: no image beside {file}")
            lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            if len(lines) != 2 or any(len(line) != 2 or line[1].strip() not in ("Yes", "No") for line in lines):
                raise ValueError(f"mme: {file} must have two lines, each a question, a tab and Yes or No")
            for number, (question, answer) in enumerate(lines):
                prompt = question.strip().replace(ASKS, "") + SHORT
                items.append(
                    Item(f"{category}/{file.stem}/{number}", image, prompt, answer.strip().lower(), category, file.stem)
                )
    if not items:
        raise FileNotFoundError(f"mme: no category's folder ({', '.join(PERCEPTION[:3])}, ...) in {folder}")
    return items


def _image(place: Path, file: Path, split: bool, suffix: str) -> Path:
    return (place / "images" if split else place) / (file.stem + suffix)


def parsed(reply: str) -> str:
    """yes, no or other: a bare word, or the first four characters."""
    text = reply.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def score(items: Sequence[Item], replies: Sequence[str]) -> dict[str, float]:
    """perception (of 2000) and cognition (of 800) with all their categories, and each category's score, acc and acc_plus."""
    check(items, replies, "mme")
    images: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for item, reply in zip(items, replies, strict=True):
        images[item.group, item.about].append(parsed(reply) == item.answer)
    found: dict[str, float] = {}
    for category in dict.fromkeys(item.group for item in items):
        pairs = [right for (group, _), right in images.items() if group == category]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"mme: {category} must have two questions for every image; was the benchmark cut?")
        acc = 100 * sum(map(sum, pairs)) / (2 * len(pairs))
        acc_plus = 100 * sum(map(all, pairs)) / len(pairs)
        found |= {category: acc + acc_plus, f"{category}/acc": acc, f"{category}/acc_plus": acc_plus}
    totals = {
        name: sum(found.get(category, 0.0) for category in part)
        for name, part in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return totals | found
