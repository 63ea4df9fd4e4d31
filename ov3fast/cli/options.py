"""Arguments -> a dataclass, by tyro: help that fits the terminal, and paths with ~ expanded."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import textwrap
import warnings
from typing import Any

import tyro

from ov3fast.cli import PROGRAM

NARROW = 60
"""Below so many columns tyro's two-column help would leave a word per line."""
COMMON = "-v, --verbose: tracebacks and logs. -q, --quiet: nothing on standard output but a command's result, no warnings."


def parse(kind: Any, arguments: list[str], command: str, default: Any = None) -> Any:
    """An instance of the dataclass `kind`. SystemExit after --help (0) and for options that it doesn't have (2)."""
    options = {} if default is None else {"default": default}
    program = f"{PROGRAM} {command}"
    width = shutil.get_terminal_size().columns
    if {"-h", "--help"} & set(arguments) and width < NARROW:
        print(_narrow_help(kind, program, width, options))
        raise SystemExit(0)
    try:
        return tyro.cli(kind, args=[expand_home(argument) for argument in arguments], prog=program, **options)
    except SystemExit as end:
        if end.code == 0:
            print(textwrap.fill(COMMON, width))
        raise


def expand_home(argument: str) -> str:
    """ "~/x" and "--flag=~/x", which no shell expands, with the home folder's path."""
    flag, value = re.fullmatch(r"(--[\w.-]+=)?(.*)", argument, re.DOTALL).groups()
    return (flag or "") + os.path.expanduser(value)


def take(arguments: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """The value of `flag` (as "--flag value" or "--flag=value") and the other arguments."""
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
    """argparse's own layout, which puts an option's text below its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(kind, prog=program, **options)
    parser.usage = "%(prog)s [options] ..."
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=4, width=max(width - 1, 24))
    return f"{argparse.ArgumentParser.format_help(parser)}\n{textwrap.fill(COMMON, width)}"
