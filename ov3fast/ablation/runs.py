"""Trains and evaluates every variant with every seed, one run at a time; finished runs are not repeated.

    OUT/ablation.json                        variants, seeds, and each run's metrics
    OUT/ablation.html                        the comparison
    OUT/VARIANT/seed-N/                      a training run's folder, plus evaluation.json

A seed sets the weight initialization, the noise and the sample order. Runs with the same seed see the same samples, so
differences are paired by seed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from ov3fast.evaluation.evaluate import evaluate
from ov3fast.inference.load import load_model
from ov3fast.io import atomic_write, check_writable_folder
from ov3fast.recipes.config import Recipe
from ov3fast.training import EXIT_INTERRUPTED, train

from .variants import FULL, Variant, variants_named

RESULT, EVALUATION = "ablation.json", "evaluation.json"


class Interrupted(Exception):
    """A run was asked to stop and has saved its state; the same call resumes it."""

    code = EXIT_INTERRUPTED


def ablate(
    recipe: Recipe,
    names: Sequence[str],
    *,
    seeds: int,
    out: str | Path,
    data: Any,
    steps: int | None = None,
    lpips: nn.Module | None = None,
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the set and returns the contents of ablation.json.

    recipe: the full one; only its first stage is trained, for `steps` steps (None: its own length). data: what `evaluate`
    measures on. seeds: how many, at least 2, since uncertainty is estimated over them. lpips: for the evaluation. note: called
    with progress messages.
    Raises Interrupted if a run was asked to stop; ValueError for unknown names or if `out` holds a different set.
    """
    if seeds < 2:
        raise ValueError(f"ablate: seeds must be at least 2, since differences are held against their spread, got {seeds}")
    variants = variants_named(names)
    out = check_writable_folder(Path(out).expanduser(), "out")
    base = shortened(recipe, steps)
    runs = [(variant, seed, run_recipe(base, variant, seed, out)) for seed in range(seeds) for variant in variants]
    _check_same_set(out, base)
    began = time.monotonic()
    results = []
    for number, (variant, seed, of_run) in enumerate(runs):
        like = next(
            (r for _, s, r in runs[:number] if s == seed and _without_folder(r) == _without_folder(of_run)), None
        )  # a variant equal to the full recipe's own setting is not trained twice
        finished = (of_run.run_dir / EVALUATION).is_file()
        if not finished and like is None:
            note(
                f"run {number + 1} of {len(runs)}: {variant.name}, seed {seed}, {(time.monotonic() - began) / 60:.0f} min so far"
            )
            _borrow_latents(of_run, [r for _, _, r in runs[:number]])
            if train(of_run, resume=True).get("interrupted"):
                raise Interrupted(f"{out} is complete up to run {number}; the same command goes on")
            _evaluate(of_run.run_dir, data, lpips)
        results.append(_result(variant, seed, (like or of_run).run_dir, out))
    facts = {
        "recipe": {**base.to_dict(), "run_dir": "", "checkpoint_dir": None},
        "variants": [{"name": v.name, "group": v.group, "what": v.what + _own_setting(base, v)} for v in variants],
        "seeds": seeds,
        "runs": results,
    }
    with atomic_write(out / RESULT) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def shortened(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe with its first stage only, `steps` long."""
    stage = recipe.stages[0]
    if steps is not None:
        if steps < 1:
            raise ValueError(f"ablate: steps must be at least 1, got {steps}")
        stage = dataclasses.replace(stage, steps=steps, minutes=None, epochs=None)
    if stage.minutes is not None:
        raise ValueError(f"ablate: stage {stage.name!r} follows the clock, so its runs would not be alike; give steps")
    length = steps or 100
    return dataclasses.replace(
        recipe,
        stages=(stage,),
        compare_impl=None,
        checkpoint_minutes=5.0,
        keep=1,
        log_every=max(1, min(recipe.log_every, length // 20)),
        gradient_norms_every=max(1, min(recipe.gradient_norms_every or 10, length // 20)),
    )


def run_recipe(base: Recipe, variant: Variant, seed: int, out: Path) -> Recipe:
    """The recipe of one run."""
    data = dataclasses.replace(base.data, seed=base.data.seed + seed)
    seeded = dataclasses.replace(base, seed=base.seed + seed, data=data, run_dir=out / variant.name / f"seed-{seed}")
    return variant.apply(seeded)


def _own_setting(base: Recipe, variant: Variant) -> str:
    same = variant.name != FULL and variant.apply(base) == base
    return f" (the recipe's own setting: the runs are those of {FULL})" if same else ""


def _without_folder(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, run_dir=Path())


def _check_same_set(out: Path, base: Recipe) -> None:
    """ValueError if a run in `out` was made from a different recipe."""
    saved = out / FULL / "seed-0" / "recipe.json"
    if saved.is_file():
        former = json.loads(saved.read_text(encoding="utf-8"))
        if difference := dataclasses.replace(base, run_dir=Path()).difference(former):
            raise ValueError(f"ablate: {out} holds another set ({difference}); give another --out")


def _borrow_latents(recipe: Recipe, others: Sequence[Recipe]) -> None:
    """Hard-links latents cached by earlier runs of this seed; a run that needs different ones detects that by their key and
    computes its own."""
    own = recipe.run_dir / "latents"
    for other in others:
        for file in (other.run_dir / "latents").glob("*.safetensors"):
            same = other.data == recipe.data and other.model.vae == recipe.model.vae and other.vae_dtype == recipe.vae_dtype
            if same and other.model.posterior == recipe.model.posterior and not (own / file.name).exists():
                own.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):  # file system without hard links
                    os.link(file, own / file.name)


def _evaluate(run_dir: Path, data: Any, lpips: nn.Module | None) -> None:
    result = evaluate(load_model(run_dir), data, lpips=lpips, captions=0, probe_train=1000, probe_test=1000)
    with atomic_write(run_dir / EVALUATION) as temporary:
        temporary.write_text(json.dumps(result.tables, indent=1) + "\n", encoding="utf-8")


def _result(variant: Variant, seed: int, run_dir: Path, out: Path) -> dict[str, Any]:
    tables = json.loads((run_dir / EVALUATION).read_text(encoding="utf-8"))
    metrics = {metric["id"]: metric["value"] for metric in tables["metrics"]}
    return {"variant": variant.name, "seed": seed, "run": str(run_dir.relative_to(out)), "metrics": metrics}
