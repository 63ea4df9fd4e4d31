"""Parses arguments into a dataclass with tyro; help fits the terminal, and ~ in paths is expanded."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shutil
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ov3fast.cli import PROGRAM

NARROW = 60
"""Below this width tyro's two-column help would fit one word per line."""
COMMON = "-v, --verbose: show tracebacks and logs. -q, --quiet: print only a command's result, and no warnings."


@dataclass(kw_only=True)
class ModelOptions:
    """Options of every command that runs a model."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, training run or hub id."""
    vae: str | None = None
    """VAE to use instead of the model's: a folder, a hub id, or "small"."""
    device: str | None = None
    """cpu, cuda or cuda:N; default: cpu."""


@dataclass(kw_only=True)
class ImagesOptions(ModelOptions):
    """Options of every command that runs a model on many images, in batches."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Image files or folders."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    batch_size: int = 32
    workers: int = 2
    """Threads for decoding images."""


def parse(kind: Any, arguments: list[str], command: str, default: Any = None) -> Any:
    """Returns an instance of the dataclass `kind`. Raises SystemExit after --help, and a one-line ValueError for invalid options."""
    options = {} if default is None else {"default": default}
    program = f"{PROGRAM} {command}"
    width = shutil.get_terminal_size().columns
    if {"-h", "--help"} & set(arguments) and width < NARROW:
        print(_narrow_help(kind, program, width, options))
        raise SystemExit(0)
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return tyro.cli(kind, args=[expand_home(argument) for argument in arguments], prog=program, **options)
    except SystemExit as end:
        if end.code == 0:
            print(textwrap.fill(COMMON, width))
            raise
        raise ValueError(f"{_one_line(refusal.getvalue())} (see {program} --help)") from None


def _one_line(box: str) -> str:
    """Condenses tyro's boxed error message to its first paragraph and the similar options it suggests."""
    lines = [line.strip(" │┃|") for line in box.splitlines()]
    lines = [line for line in lines if line]
    if len(lines) > 1 and not lines[1].strip("-"):  # a heading, if the box is drawn without sides
        del lines[0]
    text = " ".join(line for line in lines if not re.fullmatch(r"[-─╭╮╰╯+ ]*|[╭+][-─].*", line))
    text = re.split(r" Got errors:| Argument helptext:| For full helptext", text)[0]
    flags = re.findall(r"--[\w.-]+", text.partition("Perhaps you meant:")[2])
    text = _reworded(text.partition(" Perhaps you meant:")[0])
    return text + (f"; perhaps {' or '.join(dict.fromkeys(flags))}" if flags else "")


def _reworded(text: str) -> str:
    """tyro's messages as "ARGUMENT takes ...; got ...", where they have another form."""
    if text.startswith("Missing from "):
        return f"missing {', '.join(re.findall(r'(?:^[^:]*: |[(]required[)] )(.*?) [A-Z][a-z]', text))}"
    if found := re.fullmatch(r"invalid choice (.*?) for argument '(\S+)'\. Expected one of \((.*?),?\)\.", text):
        return f"{found[2]} must be one of {found[3].replace(chr(39), '')}; got {found[1]}"
    if found := re.fullmatch(
        r"Error parsing (\S+): (?:no type matching (\S+) could be instantiated from \[(.*)\]\.?|.*: ('.*'))", text
    ):
        kinds = re.findall(r"None|INT|FLOAT", found[2] or "") or ["number"]
        words = {"None": "None", "INT": "a whole number", "FLOAT": "a number", "number": "a number"}
        return f"{found[1]} takes {' or '.join(words[kind] for kind in reversed(kinds))}; got {found[3] or found[4]}"
    if found := re.fullmatch(r"Missing value for argument '(\S+)'\. Expected (.*)\.", text):
        return f"{found[1]} takes {found[2].replace('1 values', 'a value')}"
    return text


def expand_home(argument: str) -> str:
    """Expands ~ in "~/x" and in "--flag=~/x", which shells leave alone."""
    flag, value = re.fullmatch(r"(--[\w.-]+=)?(.*)", argument, re.DOTALL).groups()
    return (flag or "") + os.path.expanduser(value)


def take(arguments: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """Returns the value of `flag` ("--flag value" or "--flag=value") and the remaining arguments."""
    rest, value = [], default
    remaining = iter(arguments)
    for argument in remaining:
        if argument == flag:
            value = next(remaining, None)
            if value is None:
                raise ValueError(f"{flag} takes a value")
        elif argument.startswith(flag + "="):
            value = argument.removeprefix(flag + "=")
        else:
            rest.append(argument)
    return value, rest


def _narrow_help(kind: Any, program: str, width: int, options: dict[str, Any]) -> str:
    """argparse's own layout, which puts an option's help below its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(kind, prog=program, **options)
    parser.usage = "%(prog)s [options] ..."
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=4, width=max(width - 1, 24))
    return f"{argparse.ArgumentParser.format_help(parser)}\n{textwrap.fill(COMMON, width)}"


def recipe_to_train(recipes: Mapping[str, Any], what: str, name: str, resume: str | None) -> Any:
    """The recipe of that name; in the run_dir that --resume names, if it names one. ValueError for an unknown name, which `what` explains."""
    if name not in recipes:
        raise ValueError(f"--recipe: {what} are {', '.join(recipes)}; got {name!r}")
    return dataclasses.replace(recipes[name], run_dir=Path(resume)) if resume else recipes[name]


def check_resume_or_overwrite(resume: str | None, overwrite: bool) -> None:
    """ValueError if both are given. resume: the value of --resume, None without it."""
    if overwrite and resume is not None:
        raise ValueError("--resume continues a run, --overwrite starts it over; give one of them")
