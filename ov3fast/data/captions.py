"""Captions of a sample: checking the configured choices, and picking one by probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

Choices = Sequence[tuple[str, float]]  # (caption key, probability), such as (("re_caption", 0.8), ("org_caption", 0.2))


def check_choices(choices: Choices, argument: str) -> None:
    """Raise ValueError unless there is a key and all probabilities are >= 0 and not all zero."""
    if not choices or any(p < 0 for _, p in choices) or not sum(p for _, p in choices):
        raise ValueError(f"{argument}: got {choices!r}; it takes (key, probability) pairs, not all of probability 0")


def pick_caption(captions: Mapping[str, str], choices: Choices, u: float) -> str | None:
    """The caption under one of the keys, by probability; u in [0, 1) decides. None if the sample has none of the keys.

    Keys that this sample lacks (or has blank) are left out and the rest renormalised.
    """
    present = [(captions[key], p) for key, p in choices if p > 0 and captions.get(key, "").strip()]
    if not present:
        return None
    mark = u * sum(p for _, p in present)
    for caption, p in present:
        mark -= p
        if mark < 0:
            return caption
    return present[-1][0]


def sidecar(shard: str | Path) -> Path:
    """Where the joined captions of a shard lie: 00000.tar -> 00000.captions.json."""
    return Path(shard).with_suffix(".captions.json")


def __getattr__(name: str):
    if name == "join_captions":  # its home up to 0.1.0; imported when asked for, so that this file stays a leaf
        return import_module("ov3fast.data.recap").join_captions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
