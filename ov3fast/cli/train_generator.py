"""ov3fast train --recipe generate-demo|generate-base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ov3fast.cli.options import check_resume_or_overwrite, parse, recipe_to_train
from ov3fast.recipes.generate import GENERATE_RECIPES, GenerateRecipe


def run(name: str, arguments: list[str], resume: str | None) -> int:
    """Train a generator over a model's tokens. resume: the value of --resume ("" for the recipe's run_dir), None without it."""
    base = recipe_to_train(GENERATE_RECIPES, "recipes for generators", name, resume)

    @dataclass
    class Train:
        __doc__ = f"Train a generator over a model's tokens. The defaults below are those of --recipe {name}."

        recipe: Annotated[GenerateRecipe, tyro.conf.arg(name="")]
        overwrite: bool = False
        """Start over in a run_dir that already has a run."""
        report: bool = True
        """Sample and evaluate after training: generate.html and generate.json in run_dir (class-conditional recipes with held-out data)."""
        samples: int = 600
        """Largest number of pictures in each set that the report compares."""

    given = parse(Train, arguments, "train", default=Train(base))
    check_resume_or_overwrite(resume, given.overwrite)
    from ov3fast.generation.training import train_generator
    from ov3fast.training import EXIT_INTERRUPTED

    run_dir = train_generator(given.recipe, resume=resume is not None, overwrite=given.overwrite)
    if run_dir is None:
        return EXIT_INTERRUPTED
    print(f"{run_dir / 'generator'}: `ov3fast generate {run_dir}` lists its classes")
    if given.report and given.recipe.condition == "class" and given.recipe.heldout:
        from ov3fast.generation.report import print_figures, write_generation_report

        print_figures(write_generation_report(given.recipe, samples=given.samples))
        print(f"report: {run_dir / 'generate.html'}")
    return 0
