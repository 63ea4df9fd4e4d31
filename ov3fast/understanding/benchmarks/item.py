"""What the benchmarks share: a question with its answer, and reading their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"


class Item(NamedTuple):
    """prompt: what the model is asked. group: what figures are broken down by. about: further facts that scoring needs."""

    id: str
    image: Path
    prompt: str
    answer: str
    group: str = ""
    about: Any = None


def read_json(path: Path, benchmark: str) -> Any:
    """A file of JSON, or of a JSON object a line. FileNotFoundError and ValueError name it."""
    if not path.is_file():
        raise FileNotFoundError(f"{benchmark}: no file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{benchmark}: {path} is neither JSON nor a JSON object a line: {error}") from None


def image_in(folders: Iterable[Path], name: str, benchmark: str) -> Path:
    """The first of folder/name that is there; FileNotFoundError names where it was looked for."""
    tried = [folder / name for folder in folders]
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{benchmark}: no image {name} (looked for {', '.join(map(str, tried))})")


def field(record: Any, name: str, benchmark: str, number: object) -> Any:
    """record[name]; ValueError names the record that lacks it."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{benchmark}: record {number} has no {name!r}")
    return record[name]


def check(items: Sequence[Item], replies: Sequence[str], benchmark: str) -> None:
    if len(items) != len(replies) or not items:
        raise ValueError(f"{benchmark}: one reply for each of the {len(items)} questions is needed, got {len(replies)}")


def share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
