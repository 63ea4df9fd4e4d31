"""The demo: a small language model is trained on the demo set's pictures through a frozen tower and asked about held-out ones.

A control is trained alongside: same texts, steps and size, but no image tokens. Its accuracy is what the questions alone
reveal.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ov3fast.data.store import resolve
from ov3fast.evaluation.pictures import Pictures, read_pictures
from ov3fast.io import atomic_write
from ov3fast.recipes.understand import UnderstandRecipe
from ov3fast.understanding.conversations import read_conversations, write_conversations
from ov3fast.understanding.questions import Fact, Question, facts_of, held_out_questions, training_conversations
from ov3fast.understanding.saved import Answerer
from ov3fast.understanding.towers import Tower, load_tower
from ov3fast.understanding.training import Source, train_understanding

TRAINED_ON = ("demo:pairs-train", "demo:photos-train")
HELD_OUT = {"demo:pairs-style": "known things in a style that was held out", "demo:pairs-unseen": "things that were held out"}
CONTROL, DATA = "control", "data"
RESAMPLES = 2000
MAX_NEW_TOKENS = 8


class HeldOut(NamedTuple):
    """A set of held-out pictures: its facts, its questions, and the two models' answers."""

    title: str
    images: Tensor
    facts: list[Fact]
    questions: list[Question]
    answers: dict[str, list[str]]


def run_demo(
    recipe: UnderstandRecipe, *, resume: bool = False, overwrite: bool = False, device: torch.device | str | None = None
) -> dict[str, Any] | None:
    """Trains and evaluates both models, writes understand.json and .html; returns the results, or None if a signal stopped it.

    device: defaults to the CPU.
    """
    from ov3fast.understanding.report import write_page

    tower = load_tower(recipe.tower, layer=recipe.feature_layer, aspect=recipe.image_aspect, vae=recipe.vae, device=device)
    sources = demo_sources(recipe, tower)
    control = dataclasses.replace(recipe, sighted=False, run_dir=recipe.run_dir / CONTROL)
    for one in (recipe, control):
        if not train_understanding(one, resume=resume, overwrite=overwrite, device=device, tower=tower, sources=sources):
            return None
    answerers = {name: Answerer.load(one.run_dir, device=device) for name, one in (("tower", recipe), (CONTROL, control))}
    sets = [ask(path, title, answerers, tower) for path, title in HELD_OUT.items()]
    figures = measure(sets, recipe.seed)
    with atomic_write(recipe.run_dir / "understand.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=1))
    write_page(recipe.run_dir / "understand.html", recipe, figures, sets)
    return figures


def demo_sources(recipe: UnderstandRecipe, tower: Tower) -> list[Source]:
    """The stages' sources. The demo's conversations are written to run_dir/data in LLaVA's format and read back from there."""
    views: dict[str, Tensor] = {}
    facts: list[Fact] = []
    for path in TRAINED_ON:
        pictures, found = _read(path, tower)
        views |= zip((fact.key for fact in found), pictures.images, strict=True)
        facts += found
    made = training_conversations(facts, recipe.seed)
    for name, conversations in made.items():
        write_conversations(recipe.run_dir / DATA / f"{name}.json", conversations)
    sources = []
    for stage in recipe.stages:
        name = stage.data.removeprefix("demo:")
        if name not in made:
            raise ValueError(f"stage {stage.name!r}: the demo has {', '.join(f'demo:{n}' for n in made)}; got {stage.data!r}")
        sources.append(Source(read_conversations(recipe.run_dir / DATA / f"{name}.json"), views.__getitem__))
    return sources


def ask(path: str, title: str, answerers: dict[str, Answerer], tower: Tower, batch_size: int = 128) -> HeldOut:
    """Asks every question about a held-out set."""
    pictures, facts = _read(path, tower)
    questions = held_out_questions(facts)
    features = torch.cat([tower.features(part) for part in pictures.images.split(64)])
    answers: dict[str, list[str]] = {name: [] for name in answerers}
    for name, answerer in answerers.items():
        sees = answerer.about["image_tokens"] > 0
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            seen = features[[one.picture for one in part]] if sees else None
            answers[name] += answerer.answer_features(seen, [sees] * len(part), [one.text for one in part], MAX_NEW_TOKENS)
    return HeldOut(title, pictures.images, facts, questions, answers)


def _read(path: str, tower: Tower) -> tuple[Pictures, list[Fact]]:
    pictures = read_pictures(resolve(path), tower.image_size)
    return pictures, facts_of(pictures, path.removeprefix("demo:"))


def measure(sets: Sequence[HeldOut], seed: int = 0) -> dict[str, Any]:
    """Accuracies with 95 % intervals, bootstrapped over concepts: a concept's pictures and questions are resampled together.

    rows: one per set and kind; yes_no: all yes/no questions, the headline result.
    """
    rows, right, concepts = [], {"tower": [], CONTROL: []}, []
    for one in sets:
        correct = {
            name: np.array([a.lower() == q.answer for a, q in zip(given, one.questions, strict=True)], float)
            for name, given in one.answers.items()
        }
        owner = np.array([one.facts[q.picture].concept for q in one.questions])
        kinds = np.array([q.kind for q in one.questions])
        for kind in dict.fromkeys(kinds):
            here = kinds == kind
            open_kind = not kind.endswith("yes or no")
            answers = {q.answer for q, asked in zip(one.questions, here, strict=True) if asked}
            compared = compare({name: values[here] for name, values in correct.items()}, owner[here], seed)
            rows.append({"set": one.title, "kind": kind, "chance": 1 / len(answers) if open_kind else 0.5, **compared})
        asked = np.array([kind.endswith("yes or no") for kind in kinds])
        concepts.append(owner[asked])
        for name, values in correct.items():
            right[name].append(values[asked])
    headline = compare({name: np.concatenate(parts) for name, parts in right.items()}, np.concatenate(concepts), seed)
    return {"yes_no": {"chance": 0.5, **headline}, "rows": rows}


def compare(correct: dict[str, np.ndarray], owner: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Both accuracies and their difference, each as [value, low, high]. correct: 0 or 1 per question; owner: its concept."""
    names, place = np.unique(owner, return_inverse=True)
    sums = {name: np.bincount(place, values, len(names)) for name, values in correct.items()}
    counts = np.bincount(place, minlength=len(names)).astype(float)
    drawn = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    total = counts[drawn].sum(1)
    draws = {name: values[drawn].sum(1) / total for name, values in sums.items()}
    found: dict[str, Any] = {"questions": len(owner), "concepts": len(names)}
    for name, values in correct.items():
        found[name] = [float(values.mean()), *np.quantile(draws[name], (0.025, 0.975)).tolist()]
    difference = float(correct["tower"].mean() - correct[CONTROL].mean())
    found["difference"] = [difference, *np.quantile(draws["tower"] - draws[CONTROL], (0.025, 0.975)).tolist()]
    return found


def lines(figures: dict[str, Any]) -> list[str]:
    """The results as a plain-text table."""
    shown = [("all yes/no questions", figures["yes_no"])]
    shown += [(f"{row['kind']} ({row['set']})", row) for row in figures["rows"]]
    head = f"{'':<66}{'asked':>6}{'chance':>8}{'control':>9}{'tower':>8}  95 % interval"
    return [head] + [
        f"{name:<66}{row['questions']:>6}{row['chance']:>8.1%}{row[CONTROL][0]:>9.1%}{row['tower'][0]:>8.1%}  "
        f"{row['tower'][1]:.1%} to {row['tower'][2]:.1%}"
        for name, row in shown
    ]


def figures_of(run_dir: str | Path) -> dict[str, Any]:
    return json.loads((Path(run_dir) / "understand.json").read_text(encoding="utf-8"))
