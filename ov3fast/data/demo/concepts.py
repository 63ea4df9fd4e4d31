"""What the demo set is about: concepts, their styles, the split by concept, and the captions.

A concept is one emoji (or symbol). It has pictures in several styles with the same name, so the split goes by concept:
  unseen   concepts that are never trained on, in all their styles;
  style    concepts that are held out in one style, and trained on in the others;
  train    everything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ov3fast.data import hash_rng

STYLE_WORDS = {
    "fluent": "a 3d render of",
    "noto": "a shaded drawing of",
    "twitter": "a flat drawing of",
}
HELD_OUT_CONCEPTS = 200


@dataclass(frozen=True)
class Concept:
    """An emoji or symbol: its text, English name, category ("" if unknown), and the styles that have a picture of it."""

    text: str
    name: str
    category: str
    styles: tuple[str, ...]

    @property
    def code(self) -> str:
        """Hexadecimal code points, such as "1f468-200d-1f373"."""
        return "-".join(f"{ord(char):x}" for char in self.text)

    def captions(self, style: str) -> dict[str, str]:
        """name: the bare name. sentence: with the category, true of every style. caption: with the style as well."""
        sentence = f"{self.name}, {self.category}" if self.category else self.name
        words = STYLE_WORDS.get(style, f"{'an' if style[0] in 'aeiou' else 'a'} {style} symbol of")
        return {"name": self.name, "sentence": sentence, "caption": f"{words} {sentence}"}


def emoji_concepts(names: Mapping[str, str], categories: Mapping[str, str], pictures: Mapping[str, set[str]]) -> list[Concept]:
    """Concepts from names, categories and {style: emoji that have a picture}.

    With Fluent pictures, a concept is an emoji that has one; else any that has a picture. Ordered by code points.
    """
    base = pictures.get("fluent") or set().union(*pictures.values())
    concepts = []
    for text in sorted(base & set(names)):
        category = categories.get(text, "").replace("&", "and")
        name = names[text]
        if category == "flags" and "flag" not in name.lower():
            name = f"flag of {name}"
        styles = tuple(style for style, texts in pictures.items() if text in texts)
        concepts.append(Concept(text, name, category, styles))
    return concepts


@dataclass(frozen=True)
class Split:
    """The concepts held out entirely, those held out in `style` only, and the name of that style (None: there is one style)."""

    unseen: tuple[Concept, ...]
    style_shift: tuple[Concept, ...]
    style: str | None

    def pictures(self, concepts: list[Concept], split: str) -> set[tuple[str, str]]:
        """(text, style) of the pictures that belong to split "train", "style" or "unseen"."""
        if split == "unseen":
            return {(c.text, style) for c in self.unseen for style in c.styles}
        held_out = {(c.text, self.style) for c in self.style_shift}
        if split == "style":
            return held_out
        unseen = {c.text for c in self.unseen}
        everything = {(c.text, style) for c in concepts if c.text not in unseen for style in c.styles}
        return everything - held_out


def split_concepts(concepts: list[Concept], seed: int = 0, held_out: int = HELD_OUT_CONCEPTS) -> Split:
    """Choose the held-out concepts by hashes of (seed, code points): the same on every machine with the same pictures.

    The style held out is Noto, else the last one that at least `held_out` concepts share with another style. Each held-out
    set has `held_out` concepts (a fifth of them at most), no two with the same name.
    """
    held_out = min(held_out, len(concepts) // 5)
    ranks = [hash_rng.bits(seed, hash_rng.SPLIT, *(ord(char) for char in c.text)) for c in concepts]
    ranked = [concepts[i] for i in np.argsort(np.asarray(ranks, np.uint64), kind="stable")]
    unseen = _distinct(ranked, held_out)
    taken = {c.text for c in unseen}
    several = [c for c in ranked if c.text not in taken and len(c.styles) > 1]
    styles = list(dict.fromkeys(style for c in concepts for style in c.styles))
    styles.sort(key=lambda style: style == "noto")  # stable: Noto last
    style = next((s for s in reversed(styles) if sum(s in c.styles for c in several) >= held_out), None)
    shifted = _distinct([c for c in several if style in c.styles], held_out)
    return Split(tuple(unseen), tuple(shifted), style)


def _distinct(concepts: list[Concept], count: int) -> list[Concept]:
    found: dict[str, Concept] = {}
    for concept in concepts:
        if len(found) < count:
            found.setdefault(concept.name.lower(), concept)
    return list(found.values())


def stamp_captions(stem: str, text: str) -> dict[str, str]:
    """Captions of a Tux Paint stamp, from its path below the stamps folder and its own caption such as "A frog."."""
    folder = stem.split("/")[0]
    plain = text.strip().rstrip(".")
    name = re.sub(r"^(an?|the|some)\s+", "", plain, flags=re.IGNORECASE)
    return {"name": name, "sentence": f"{name}, {folder}", "caption": f"a picture of {plain[:1].lower()}{plain[1:]}, {folder}"}


def photo_captions(path: str) -> dict[str, str]:
    """Captions from a photo's file name: "explore_monuments/usa/fort_sumter2" gives the name "fort sumter".

    foolbox's names ("imagenet_06_609") have only a class number: no captions.
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[_\-\d]+", " ", path.rsplit("/", 1)[-1])
    name = " ".join(words.lower().split())
    return {} if name == "imagenet" else {"name": name, "sentence": name, "caption": f"a photo of {name}"}
