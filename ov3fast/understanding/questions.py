"""Captions and questions about the demo's pictures, made from what is known of each: its name, group and style, and its colours.

Half of the yes/no questions have the answer yes. Among those that are held out, each text is asked as often with the answer yes as with no, so that
whoever sees no picture is right in exactly half of them.
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
"""Pixels whose every channel is above are taken for the white background."""
DOMINANT = 0.5
"""Least share of a picture's pixels for its colour to be asked for."""
CONVERSATIONS_OF_PICTURE = 6
"""Training conversations for each picture."""


class Fact(NamedTuple):
    """What is true of one picture. group, colour: "" where it has none to speak of. concept: pictures of one belong together."""

    key: str
    concept: str
    name: str
    group: str
    style: str
    colour: str


class Question(NamedTuple):
    """kind: one of KINDS. picture: its place among the facts."""

    kind: str
    picture: int
    text: str
    answer: str


def facts_of(pictures: Pictures, prefix: str) -> list[Fact]:
    """Facts of every picture; its key is prefix/key."""
    columns = zip(
        pictures.keys, pictures.column("concept"), pictures.texts("name"), pictures.column("group"), pictures.column("style"),
        colours_of(pictures.images), strict=True,
    )  # fmt: skip
    return [
        Fact(f"{prefix}/{key}", concept, name.lower(), group.replace("-", " "), style, colour)
        for key, concept, name, group, style, colour in columns
    ]


def colours_of(images: Tensor) -> list[str]:
    """The colour that most of each picture's own pixels have, "" where none has DOMINANT of them; uint8 [N, 3, S, S]."""
    found = []
    for image in images:
        own = image.flatten(1)[:, (image.flatten(1) < BACKGROUND).any(0)].float() / 255
        shares = torch.bincount(_colour(own), minlength=len(COLOURS) + 1) / max(own.shape[1], 1)
        best = int(shares[1:].argmax())
        enough = own.shape[1] >= 0.04 * image[0].numel() and float(shares[best + 1]) >= DOMINANT
        found.append(COLOURS[best] if enough else "")
    return found


def _colour(rgb: Tensor) -> Tensor:
    """[3, P] in 0..1 -> place in COLOURS + 1, 0 for what has no name here."""
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
    """One sentence of all that is known."""
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
    """The answer to an open question about it."""
    return STYLES.get(fact.style, "") if about == "style" else getattr(fact, about)


def training_conversations(facts: Sequence[Fact], seed: int = 0) -> dict[str, list[Conversation]]:
    """captions: one for each picture. questions: CONVERSATIONS_OF_PICTURE for each, with every question that applies, in any order, but that no
    open answer gives a yes or no away. Every second one begins with an open question.
    """
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
    """Another value, as frequent as it is among the pictures; of names, any."""
    found = values[int(draw * len(values))]
    if found and found != own:
        return found
    rest = [v for v in known if v != own]
    return rest[int(draw * 7919 % 1 * len(rest))]


def held_out_questions(facts: Sequence[Fact], seed: int = 0) -> list[Question]:
    """Of each picture every kind that applies: of yes/no questions one with either answer."""
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
    """For each value another's, so that each is given away as often as it is taken. "" stays "", and so do what no other is left for."""
    places = [place for place, v in enumerate(values) if v]
    order = [places[i] for i in hash_rng.permutation(len(places), seed, hash_rng.SPLIT)]
    given = dict(zip(places, order, strict=True))
    for a in places:
        if values[given[a]] == values[a]:
            for b in order:
                if values[given[b]] != values[a] and values[given[a]] != values[b]:
                    given[a], given[b] = given[b], given[a]
                    break
    # A value that only itself is left for drops out on either side, so the rest stays balanced.
    bad = {place for place in places if values[given[place]] == values[place]}
    return [values[given[place]] if v and place not in bad else "" for place, v in enumerate(values)]
