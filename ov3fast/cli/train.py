"""ov3fast train.

ov3fast train --recipe demo                        a built-in recipe, or a .json or .yaml file
ov3fast train --data shards/                       your own tars, with defaults fitted to them
ov3fast train --resume runs/demo                   resume an interrupted run
ov3fast train --resume runs/demo --extend --stages.1.steps 5000
"""

import re
import shutil
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ov3fast.cli import PROGRAM
from ov3fast.cli.options import COMMON, check_resume_or_overwrite, expand_home, parse, take

if TYPE_CHECKING:
    from ov3fast.recipes import Recipe

HELP = """usage: {program} train [--recipe NAME|FILE] [options] [--FIELD VALUE ...]

What to train
  --recipe NAME|FILE      {names}, or a .json or .yaml file (default: demo);
                          generate-demo|-base, understand-demo|-base: what is built on a tower, with fields of their own
  --data PATH             your own shards: a folder of tars, a tar or a glob pattern; defaults are fitted to them
  --run-dir DIR           folder for checkpoints, logs and the model
  --init-from MODEL       start from the weights of a model: a folder, a run or a hub id

Resuming
  --resume [RUN]          continue from the newest complete checkpoint of RUN (default: --run-dir), with its recipe
  --extend                with --resume: stages may be longer than before, and stages may be added
  --overwrite             start over in a --run-dir that already has a run

Editing the recipe
  --remove-stage NAME|N   --add-stage FIELD=VALUE,...    a new stage copies unspecified fields from the last one
  --remove-source PATH|N  --add-source path=...,...      captions=key:p+key:p
  --FIELD VALUE           any field, by its dotted name: --stages.0.steps 1000  --optimizer.weight-decay 0.1

Other options
  --device DEVICE         cpu, cuda or cuda:N; default: the GPU if there is one
  --dry-run               print the resolved recipe and stop; needs no data

Field groups: {program} train --help GROUP lists a group with the recipe's values, --help all every flag
  {groups}

{common}"""


def run(arguments: list[str]) -> int:
    """Train a recipe (demo, base, large, custom); every field of it is a flag."""
    from ov3fast.recipes import NAMES, Recipe, edit

    arguments, help_about = _take_optional(arguments, "--help", "-h")
    name, rest = take(arguments, "--recipe", "")
    if name.startswith("generate-"):
        from ov3fast.cli.train_generator import run as run_generator

        rest, resume = _take_optional(rest, "--resume")
        return run_generator(name, rest if help_about is None else [*rest, "--help"], resume)
    if name.startswith("understand-"):
        from ov3fast.cli.train_understanding import run as run_understanding

        rest, resume = _take_optional(rest, "--resume")
        return run_understanding(name, rest if help_about is None else [*rest, "--help"], resume)
    if help_about == "":
        groups = ", ".join(name.replace("_", "-") for name in _groups(Recipe))
        text = HELP.format(program=PROGRAM, names=", ".join(NAMES), groups=groups, common=COMMON)
        print(_reflowed(text, shutil.get_terminal_size().columns))
        return 0
    arguments, resume = _take_optional(arguments, "--resume")
    if resume is not None and resume.lower() in ("true", "false"):
        resume = "" if resume.lower() == "true" else None
    arguments = [argument for argument in arguments if argument != "--no-resume"]
    name, arguments = take(arguments, "--recipe", "")
    data, arguments = take(arguments, "--data", "")
    changes = {}
    for key in ("remove_stage", "add_stage", "remove_source", "add_source"):
        arguments, changes[key + "s"] = _take_all(arguments, "--" + key.replace("_", "-"))
    base = edit(_recipe(expand_home(name), expand_home(data), expand_home(resume or "")), **changes)
    if help_about not in (None, "all"):
        print(_help_of_group(base, help_about))
        return 0

    name = base.name

    @dataclass
    class Train:
        __doc__ = f"Train OpenVision 3. The defaults below are those of --recipe {name}."

        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        init_from: str | None = None
        """Start from the weights of a model: a folder, a training run or a hub id."""
        extend: bool = False
        """With --resume: stages may be longer than before, and stages may be added."""
        overwrite: bool = False
        """Start over in a run_dir that already has a run."""
        dry_run: bool = False
        """Print the resolved recipe (stages, samples, steps, rates, parameters, FLOPs) and stop; needs no data."""
        device: str | None = None
        """cpu, cuda or cuda:N; default: the GPU if there is one."""

    if help_about == "all":
        arguments = [*arguments, "--help"]
    given = parse(Train, arguments, "train", default=Train(base))
    if given.extend and resume is None:
        raise ValueError("--extend needs --resume RUN: it lengthens an existing run")
    check_resume_or_overwrite(resume, given.overwrite)
    if given.dry_run:
        from ov3fast.training import dry_run

        dry_run(given.recipe)
        return 0
    from ov3fast.training import EXIT_INTERRUPTED, train

    metrics = train(
        given.recipe, resume=resume is not None, overwrite=given.overwrite, device=given.device, init_from=given.init_from,
        extend=given.extend,
    )  # fmt: skip
    return EXIT_INTERRUPTED if metrics.get("interrupted") else 0


def _recipe(name: str, data: str, resume: str) -> "Recipe":
    """The recipe selected by --recipe, --data and --resume RUN."""
    import dataclasses

    from ov3fast.recipes import NAMES, SUFFIXES, custom, get_recipe, read_recipe

    if resume:
        saved = Path(resume, "recipe.json")
        if not saved.is_file():
            raise FileNotFoundError(f"--resume: {resume} is not a run (there is no {saved}); give a run's folder")
        if name or data:
            raise ValueError(f"--resume {resume} has its own recipe; leave out {'--recipe' if name else '--data'}")
        return dataclasses.replace(read_recipe(saved), run_dir=Path(resume))
    if data:
        if name not in ("", "custom"):
            raise ValueError(
                f"--data is for --recipe custom, got --recipe {name}; for others see --data.sources.0.path and --add-source"
            )
        return custom.fit(data)
    if Path(name).suffix in SUFFIXES:
        return read_recipe(name)
    if name == "custom":
        raise ValueError("--recipe custom needs --data PATH: a folder of tars, a tar or a glob pattern")
    if name and name not in NAMES:
        from ov3fast.recipes.generate import GENERATE_RECIPES
        from ov3fast.recipes.understand import UNDERSTAND_RECIPES

        names = ", ".join((*NAMES, *GENERATE_RECIPES, *UNDERSTAND_RECIPES))
        raise ValueError(f"--recipe must be one of {names}, or a .json or .yaml file; got {name!r}")
    return get_recipe(name or "demo")


def _take_optional(arguments: list[str], *flags: str) -> tuple[list[str], str | None]:
    """(the remaining arguments, the flag's value: "" for the bare flag, None if it is absent)."""
    for flag in flags:
        for i, argument in enumerate(arguments):
            if argument.startswith(flag + "="):
                return arguments[:i] + arguments[i + 1 :], argument.removeprefix(flag + "=")
            if argument == flag:
                valued = i + 1 < len(arguments) and not arguments[i + 1].startswith("-")
                return arguments[:i] + arguments[i + 1 + valued :], arguments[i + 1] if valued else ""
    return arguments, None


def _take_all(arguments: list[str], flag: str) -> tuple[list[str], tuple[str, ...]]:
    """(the remaining arguments, the values of all occurrences of the flag)."""
    values = []
    while any(argument == flag or argument.startswith(flag + "=") for argument in arguments):
        value, arguments = _take_first(arguments, flag)
        values.append(value)
    return arguments, tuple(values)


def _take_first(arguments: list[str], flag: str) -> tuple[str, list[str]]:
    i = next(i for i, argument in enumerate(arguments) if argument == flag or argument.startswith(flag + "="))
    if "=" in arguments[i]:
        return arguments[i].partition("=")[2], arguments[:i] + arguments[i + 1 :]
    if i + 1 == len(arguments):
        raise ValueError(f"{flag} takes a value")
    return arguments[i + 1], arguments[:i] + arguments[i + 2 :]


def _groups(kind: Any) -> list[str]:
    names = [f.name for f in fields(kind)]
    return [*(name for name in names if name in ("model", "objective", "lpips", "data", "stages", "optimizer")), "run"]


def _reflowed(text: str, width: int) -> str:
    """Splits lines that are too wide for the terminal: each flag on its own line, its help indented below."""
    lines: list[str] = []
    for line in text.splitlines():
        if len(line) <= width:
            lines.append(line)
            continue
        for part in re.split(r" {2,}", line.strip()):
            if part.startswith("-"):
                lines.append(f"  {part}")
            else:
                indent = "    " if line.startswith(" ") else ""
                lines += textwrap.wrap(
                    part, width, initial_indent=indent, subsequent_indent=indent or "  ", break_long_words=False
                )
    return "\n".join(lines)


def _help_of_group(recipe: "Recipe", group: str) -> str:
    """Lists every field of a group with the recipe's value."""
    from ov3fast.recipes.plain import leaves

    name = group.replace("-", "_")
    if name not in _groups(type(recipe)):
        raise ValueError(f"--help takes {', '.join(_groups(type(recipe)))} or all; got {group!r}")
    values = recipe.to_dict()
    if name == "run":
        shown = {f.name: values[f.name] for f in fields(recipe) if f.name not in _groups(type(recipe))}
    else:
        shown = {name: values[name]}
    lines = [f"  --{field.replace('_', '-'):<44} {value}" for field, value in leaves(shown)]
    return "\n".join([f"Fields of {group} in recipe {recipe.name}", *lines])
