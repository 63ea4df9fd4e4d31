"""ov3fast train."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ov3fast.cli.options import parse, take


def run(arguments: list[str]) -> int:
    """Train a recipe (demo, base, large); every field of it is a flag."""
    from ov3fast.recipes import NAMES, Recipe, get_recipe

    name, arguments = take(arguments, "--recipe", "demo")
    if name not in NAMES:
        raise ValueError(f"--recipe must be one of {', '.join(NAMES)}; got {name!r}")

    @dataclass
    class Train:
        __doc__ = f"Train OpenVision 3. The defaults below are those of --recipe {name} (of {', '.join(NAMES)})."

        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        resume: bool = False
        """Go on from the newest whole checkpoint in run_dir."""
        overwrite: bool = False
        """Begin again in a run_dir that holds a run."""
        dry_run: bool = False
        """Print what the recipe comes to (stages, samples, steps, rates, parameters, FLOPs) and stop; needs no data."""
        device: str | None = None
        """cpu, cuda or cuda:N; the default is a GPU where there is one."""

    given = parse(Train, arguments, "train", default=Train(get_recipe(name)))
    if given.dry_run:
        from ov3fast.training import dry_run

        dry_run(given.recipe)
        return 0
    from ov3fast.training import EXIT_INTERRUPTED, train

    metrics = train(given.recipe, resume=given.resume, overwrite=given.overwrite, device=given.device)
    return EXIT_INTERRUPTED if metrics.get("interrupted") else 0
