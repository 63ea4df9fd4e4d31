"""Captions and questions about the demo's pictures, generated from each one's name, group, style and dominant colour.

Half of the yes/no questions have the answer yes. In the held-out set each question text occurs equally often with either
answer, so answering without the picture gets exactly half of them right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ov3fast.data import hash_rng
from ov3fast.evaluation.pictures import Pictures
from ov3fast.understanding.conversations import Conversation, Turn

STYLES = {"fluent": "3d render", "noto": "shaded drawing", "twitter": "flat drawing", "photo": "photo", "stamp": "cut-out"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray")
BACKGROUND = 236
"""Pixels with all channels at or above this count as white background."""
DOMINANT = 0.5
"""Minimum share of a picture's non-background pixels for its colour to be asked about."""
CONVERSATIONS_OF_PICTURE = 6
"""Training conversations per picture."""


class Fact(NamedTuple):
    """Facts about one picture. group, colour: "" if it has no clear one. concept: shared by pictures of the same thing."""

    key: str
    concept: str
    name: str
    group: str
    style: str
    colour: str


class Question(NamedTuple):
    """kind: one of KINDS. picture: index into the facts."""

    kind: str
    picture: int
    text: str
    answer: str


def facts_of(pictures: Pictures, prefix: str) -> list[Fact]:
    """Facts of every picture, with prefix/key as key."""
    columns = zip(
        pictures.keys, pictures.column("concept"), pictures.texts("name"), pictures.column("group"), pictures.column("style"),
        colours_of(pictures.images), strict=True,
    )  # fmt: skip
    return [
        Fact(f"{prefix}/{key}", concept, name.lower(), group.replace("-", " "), style, colour)
        for key, concept, name, group, style, colour in columns
    ]


def colours_of(images: Tensor) -> list[str]:
    """Dominant colour of each picture's non-background pixels, "" if none reaches DOMINANT; images: uint8 [N, 3, S, S]."""
    found = []
    for image in images:
        own = image.flatten(1)[:, (image.flatten(1) < BACKGROUND).any(0)].float() / 255
        shares = torch.bincount(_colour(own), minlength=len(COLOURS) + 1) / max(own.shape[1], 1)
        best = int(shares[1:].argmax())
        enough = own.shape[1] >= 0.04 * image[0].numel() and float(shares[best + 1]) >= DOMINANT
        found.append(COLOURS[best] if enough else "")
    return found


def _colour(rgb: Tensor) -> Tensor:
    """RGB [3, P] in 0..1 -> index into COLOURS + 1; 0 for colours not listed there."""
    value, least = rgb.amax(0), rgb.amin(0)
    chroma = value - least
    saturation = chroma / value.clamp(min=1e-6)
    r, g, b = rgb
    hue = torch.where(
        value == r, (g - b) / chroma.clamp(min=1e-6) % 6, torch.where(value == g, (b - r) / chroma.clamp(min=1e-6) + 2, (r - g) / chroma.clamp(min=1e-6) + 4)
    ) * 60  # fmt: skip
    place = torch.zeros_like(hue, dtype=torch.int64)
    bounds = ((345, 361, "red"), (0, 15, "red"), (15, 42, "orange"), (42, 68, "yellow"), (68, 170, "green"), (170, 255, "blue"), (255, 292, "purple"),
              (292, 345, "pink"))  # fmt: skip
    for low, high, name in bounds:
        place[(hue >= low) & (hue < high)] = COLOURS.index(name) + 1
    reddish = (hue < 42) | (hue >= 345)
    place[reddish & (value < 0.62)] = COLOURS.index("brown") + 1
    place[((hue < 15) | (hue >= 330)) & (saturation < 0.5) & (value > 0.8)] = COLOURS.index("pink") + 1
    place[saturation < 0.16] = COLOURS.index("gray") + 1
    place[(saturation < 0.16) & (value > 0.88)] = 0  # white, or a light shadow
    place[value < 0.24] = COLOURS.index("black") + 1
    return place


def caption(fact: Fact) -> str:
    """All facts in one sentence."""
    of = f" of {article(fact.name)}" if fact.name else ""
    parts = [f"{article(STYLES.get(fact.style, fact.style))}{of}", fact.group, f"mostly {fact.colour}" if fact.colour else ""]
    return ", ".join(part for part in parts if part)


def article(words: str) -> str:
    return f"{'an' if words[:1] in 'aeiou' else 'a'} {words}"


YES_NO = {
    "name": lambda name: f"is there {article(name)}?",
    "group": lambda group: f"does it belong to {group}?",
    "colour": lambda colour: f"is it mostly {colour}?",
}
OPEN = {"group": "which group?", "colour": "which colour?", "style": "which style?"}
KINDS = (*(f"{name}, yes or no" for name in YES_NO), *(f"which {name}" for name in OPEN))


def value(fact: Fact, about: str) -> str:
    """The answer to the open question about this attribute."""
    return STYLES.get(fact.style, "") if about == "style" else getattr(fact, about)


def training_conversations(facts: Sequence[Fact], seed: int = 0) -> dict[str, list[Conversation]]:
    """captions: one per picture. questions: CONVERSATIONS_OF_PICTURE per picture, each with all applicable questions in random
    order, such that no open answer gives away a yes/no answer. Every second conversation starts with an open question."""
    captions = [Conversation((Turn("what is in the picture?", caption(fact), True),), fact.key) for fact in facts]
    values = {about: [value(fact, about) for fact in facts] for about in ("name", "group", "colour", "style")}
    known = {about: sorted({v for v in found if v}) for about, found in values.items()}
    questions = []
    for place, fact in enumerate(facts):
        for number in range(CONVERSATIONS_OF_PICTURE):
            draws = iter(
                hash_rng.uniform(seed, hash_rng.CAPTION, place, number, np.arange(3 * len(YES_NO) + len(OPEN))).tolist()
            )
            own = {about: found[place] for about, found in values.items() if found[place]}
            open_kinds = sorted(filter(own.get, OPEN), key=lambda _: next(draws))
            first = open_kinds[: number % 2]
            asked = [(OPEN[about], own[about]) for about in first]
            for about in sorted((about for about in YES_NO if about in own and about not in first), key=lambda _: next(draws)):
                true, other = next(draws) < 0.5, _other(values[about], known[about], own[about], next(draws))
                asked.append((YES_NO[about](own[about] if true else other), "yes" if true else "no"))
            asked += [(OPEN[about], own[about]) for about in open_kinds if about not in first]
            turns = tuple(Turn(text, answer, turn == 0) for turn, (text, answer) in enumerate(asked))
            if turns:
                questions.append(Conversation(turns, fact.key))
    return {"captions": captions, "questions": questions}


def _other(values: Sequence[str], known: Sequence[str], own: str, draw: float) -> str:
    """A different value, drawn by its frequency among the pictures, or uniformly if that draw is empty or `own`."""
    found = values[int(draw * len(values))]
    if found and found != own:
        return found
    rest = [v for v in known if v != own]
    return rest[int(draw * 7919 % 1 * len(rest))]


def held_out_questions(facts: Sequence[Fact], seed: int = 0) -> list[Question]:
    """For each picture, every applicable kind; yes/no questions come in pairs, one per answer."""
    found = []
    for about in YES_NO:
        values = [value(fact, about) for fact in facts]
        for place, (own, wrong) in enumerate(zip(values, swapped(values, seed), strict=True)):
            if own and wrong:
                found += [Question(f"{about}, yes or no", place, YES_NO[about](own), "yes")]
                found += [Question(f"{about}, yes or no", place, YES_NO[about](wrong), "no")]
    for about, text in OPEN.items():
        own = [value(fact, about) for fact in facts]
        if len(set(filter(None, own))) > 1:
            found += [Question(f"which {about}", place, text, answer) for place, answer in enumerate(own) if answer]
    return found


def swapped(values: Sequence[str], seed: int = 0) -> list[str]:
    """A different value for each, every value used as often as it is replaced; "" for "" or if no other value is left."""
    places = [place for place, v in enumerate(values) if v]
    order = [places[i] for i in hash_rng.permutation(len(places), seed, hash_rng.SPLIT)]
    given = dict(zip(places, order, strict=True))
    for a in places:
        if values[given[a]] == values[a]:
            for b in order:
                if values[given[b]] != values[a] and values[given[a]] != values[b]:
                    given[a], given[b] = given[b], given[a]
                    break
    # A value left with only itself is dropped on both sides, so the rest stays balanced.
    bad = {place for place in places if values[given[place]] == values[place]}
    return [values[given[place]] if v and place not in bad else "" for place, v in enumerate(values)]
