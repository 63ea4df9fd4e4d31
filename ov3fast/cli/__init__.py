"""The command line: one file per command, each a typed call of the library.

    ov3fast train --recipe demo --run-dir runs/demo
    ov3fast evaluate runs/demo --data demo
    ov3fast encode runs/demo photos/ --out photos.safetensors

Whatever a user can cause ends in one line that says what to do and exit code 2; -v or OV3FAST_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NamedTuple

from ov3fast import cpus, terminal

PROGRAM = "ov3fast"
USER_ERROR, INTERRUPTED = 2, 130


class Command(NamedTuple):
    """module: the file in this folder whose function `run(arguments) -> exit code` is the command.

    prints: its result goes to standard output, so --quiet leaves it there.
    """

    module: str
    summary: str
    prints: bool = False


COMMANDS = {
    "train": Command(
        "train", "Train a recipe (demo, base, large, generate-demo, ...) or your own shards; every field of it is a flag."
    ),
    "watch": Command("watch", "A run in the terminal while it trains, and as a page that refreshes.", prints=True),
    "compare": Command("compare", "Curves and metrics of several runs side by side.", prints=True),
    "checkpoint": Command("checkpoint", "Verify, compare or export what a training run saved.", prints=True),
    "replay": Command("replay", "A training step's losses, computed again from the checkpoint before it.", prints=True),
    "ablate": Command("ablate", "A recipe with one thing changed at a time, over several seeds, in one report.", prints=True),
    "plan": Command("plan", "Memory, time, cost and bound of a recipe on a number of GPUs; needs none.", prints=True),
    "evaluate": Command("evaluate", "Measure a model on held-out data and write the report."),
    "encode": Command("encode", "Images or shards -> a file or folder of pooled vectors and tokens."),
    "search": Command("search", "The images of an `encode` file that are nearest to a text or an image.", prints=True),
    "caption": Command("caption", "Images or folders -> a caption each.", prints=True),
    "reconstruct": Command("reconstruct", "Image in, image out; a folder in, a folder out."),
    "export": Command("export", "A model for other libraries and runtimes: transformers, open_clip, torch, onnx, openvino."),
    "serve": Command("serve", "A model behind HTTP, with a page to try it; needs the extra `serve`."),
    "generate": Command("generate", "Pictures of a class or a text, by a generator over the tokens.", prints=True),
    "statistics": Command("statistics", "Mean and variance of each element of the tokens of images, for a generator."),
    "fid": Command("fid", "FID and its kin of images against a reference, under a named protocol.", prints=True),
    "data": Command(
        "data",
        "demo: build the demo set; check: count what is broken; index: index shards; encode: keep the VAE's moments.",
        prints=True,
    ),
    "doctor": Command("doctor", "What this machine can run: packages, tools, and every operator's backends.", prints=True),
    "bench": Command("bench", "The operator table on this machine; needs a checkout of the repository."),
    "tune": Command("tune", "Measure block sizes of the Triton kernels on this GPU and keep the best; needs a checkout."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0; 1 where `data check` or `checkpoint verify` found something broken, or `checkpoint diff` a difference; 2 for a user's error; 75 for
    a training run that saved and stopped; 130 for Ctrl-C; 141 where the reader of the output went away.
    """
    terminal.tolerate_encoding()
    cpus.limit_threads()
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments, verbose = _without(arguments, "-v", "--verbose")
    arguments, quiet = _without(arguments, "-q", "--quiet")
    try:
        with _verbosity(arguments, verbose, quiet):
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, RuntimeError, KeyError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and terminal.output_is_closed():
            terminal.silence_output()
            return terminal.BROKEN_PIPE
        if verbose or os.environ.get("OV3FAST_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("ov3fast"):
            message += f"; pip install '{PROGRAM}[all]' brings what the commands need"
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
        return USER_ERROR


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name == "--version":
        from ov3fast import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}; it takes {', '.join(COMMANDS)}")
    for before, argument in zip([name, *rest], rest, strict=False):
        if not argument or re.fullmatch(r"--[\w.-]+=", argument):
            raise ValueError(f"{name}: the argument after {before} is empty; is a variable of the shell unset?")
    if name == "train":  # it saves on SIGTERM by itself
        return import_module("ov3fast.cli.train").run(rest)
    with _sigterm_unwinds():
        return import_module(f"ov3fast.cli.{COMMANDS[name].module}").run(rest)


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that what was written aside goes and partial results stay; exit code 143."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _verbosity(arguments: list[str], verbose: bool, quiet: bool) -> Iterator[None]:
    warnings.formatwarning = lambda message, *_: f"{PROGRAM}: warning: {message}\n"  # without a line of our source
    if verbose:
        logging.basicConfig(level=logging.INFO)
    with contextlib.ExitStack() as stack:
        command = COMMANDS.get(arguments[0]) if arguments else None
        if quiet and command is not None:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if not command.prints and not {"-h", "--help"} & set(arguments):
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def _without(arguments: list[str], *flags: str) -> tuple[list[str], bool]:
    rest = [argument for argument in arguments if argument not in flags]
    return rest, len(rest) < len(arguments)


def _help() -> str:
    width = max(shutil.get_terminal_size().columns - 1, 30)
    about = textwrap.wrap("OpenVision 3: training, inference and evaluation.", width)
    lines = [f"usage: {PROGRAM} COMMAND ...", "", *about, ""]
    for name, command in COMMANDS.items():
        lines += textwrap.wrap(f"{name:<12} {command.summary}", width, initial_indent="  ", subsequent_indent=" " * 15)
    return "\n".join(
        [*lines, "", *textwrap.wrap(f"{PROGRAM} COMMAND --help shows a command's options. {PROGRAM} --version", width)]
    )
