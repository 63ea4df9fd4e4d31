"""ov3fast train --recipe understand-demo|understand-base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ov3fast.cli.options import check_resume_or_overwrite, parse, recipe_to_train
from ov3fast.recipes.understand import UNDERSTAND_RECIPES, UnderstandRecipe


def run(name: str, arguments: list[str], resume: str | None) -> int:
    """Train a language model on a tower's tokens. resume: the value of --resume ("" for the recipe's run_dir), None without it."""
    base = recipe_to_train(UNDERSTAND_RECIPES, "recipes for language models", name, resume)

    @dataclass
    class Train:
        __doc__ = f"Train a language model on a frozen tower's tokens. The defaults below are those of --recipe {name}."

        recipe: Annotated[UnderstandRecipe, tyro.conf.arg(name="")]
        overwrite: bool = False
        """Start over in a run_dir that already has a run."""
        device: str | None = None
        """cpu, cuda or cuda:N; default: cpu."""

    given = parse(Train, arguments, "train", default=Train(base))
    check_resume_or_overwrite(resume, given.overwrite)
    recipe, options = given.recipe, {"resume": resume is not None, "overwrite": given.overwrite, "device": given.device}
    from ov3fast.training import EXIT_INTERRUPTED

    if all(stage.data.startswith("demo:") for stage in recipe.stages):
        from ov3fast.understanding.demo import lines, run_demo

        figures = run_demo(recipe, **options)
        if figures is None:
            return EXIT_INTERRUPTED
        print("\n".join(lines(figures)))
        print(f"report: {recipe.run_dir / 'understand.html'}")
    else:
        from ov3fast.understanding.training import train_understanding

        if not train_understanding(recipe, **options):
            return EXIT_INTERRUPTED
    print(f"{recipe.run_dir / 'model'}: ask it with `ov3fast answer {recipe.run_dir} IMAGE --question ...`")
    return 0
