"""The command line: one file per command, each a typed call of the library.

    ov3fast train --recipe demo --run-dir runs/demo
    ov3fast evaluate runs/demo --data demo
    ov3fast encode runs/demo photos/ --out photos.safetensors

User errors end with one line that says what to do and exit code 2; -v or OV3FAST_TRACEBACK=1 adds the traceback.
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
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple

from ov3fast import cpus, terminal

PROGRAM = "ov3fast"
USER_ERROR, INTERRUPTED = 2, 130


class Command(NamedTuple):
    """module: the file in this folder whose function `run(arguments) -> exit code` implements the command.

    prints: the result goes to standard output, so --quiet does not suppress it.
    """

    module: str
    summary: str
    prints: bool = False


COMMANDS = {
    "train": Command(
        "train",
        "Train a recipe (demo, base, large, generate-demo, understand-demo, ...) or on your own shards; every recipe field is a flag.",
    ),
    "watch": Command("watch", "Follow a run in the terminal and on a page that refreshes itself.", prints=True),
    "compare": Command("compare", "Compare the curves and metrics of several runs.", prints=True),
    "checkpoint": Command("checkpoint", "Verify, compare or export the checkpoints of a training run.", prints=True),
    "replay": Command("replay", "Recompute a training step's losses from the checkpoint before it.", prints=True),
    "ablate": Command(
        "ablate", "Train a recipe with one change at a time, over several seeds, and write one report.", prints=True
    ),
    "plan": Command(
        "plan", "Estimate memory, time, cost and bottleneck of a recipe on a number of GPUs; needs no GPU.", prints=True
    ),
    "evaluate": Command("evaluate", "Evaluate a model on held-out data and write a report."),
    "encode": Command("encode", "Encode images or shards into pooled vectors and tokens."),
    "search": Command("search", "Find the images in the output of `encode` nearest to a text or an image.", prints=True),
    "caption": Command("caption", "Caption images or folders.", prints=True),
    "reconstruct": Command("reconstruct", "Reconstruct an image, or a folder of images."),
    "export": Command(
        "export", "Export a model for other libraries and runtimes: transformers, open_clip, torch, onnx, openvino."
    ),
    "serve": Command("serve", "Serve a model over HTTP, with a page to try it; needs the extra `serve`."),
    "generate": Command("generate", "Generate pictures of a class or a text with a generator over the tokens.", prints=True),
    "answer": Command(
        "answer",
        "Answer questions about an image, or those of a benchmark, with a model trained by understand-demo or -base.",
        prints=True,
    ),
    "statistics": Command("statistics", "Compute the per-element mean and variance of image tokens, for a generator."),
    "fid": Command(
        "fid", "Compute FID and related metrics of images against a reference, under a named protocol.", prints=True
    ),
    "data": Command(
        "data",
        "demo: build the demo set; check: count broken samples; index: index shards; encode: cache the VAE's moments.",
        prints=True,
    ),
    "doctor": Command("doctor", "Show what this machine can run: packages, tools, and every operator's backends.", prints=True),
    "bench": Command("bench", "Benchmark the operators on this machine; needs a checkout of the repository."),
    "tune": Command(
        "tune", "Measure what is fastest here, block sizes on a GPU (needs a checkout) or backends on a CPU, and keep it."
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 for success; 1 if `data check` or `checkpoint verify` found something broken, or `checkpoint diff` a difference; 2 for a user error;
    75 for a training run that saved a checkpoint and stopped; 130 for Ctrl-C; 141 if the reader of the output closed it.
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
            message += f"; pip install '{PROGRAM}[all]' installs what the commands need"
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
        begun = [command for command in COMMANDS if command.startswith(name)]
        meant = "".join(f"; perhaps {close}" for close in (begun or get_close_matches(name, COMMANDS))[:1])
        raise ValueError(f"no command {name!r}{meant}; the commands are {', '.join(COMMANDS)}")
    for before, argument in zip([name, *rest], rest, strict=False):
        if not argument or re.fullmatch(r"--[\w.-]+=", argument):
            raise ValueError(f"{name}: the argument after {before} is empty; is a shell variable unset?")
    if name == "train":  # it saves on SIGTERM by itself
        return import_module("ov3fast.cli.train").run(rest)
    with _sigterm_unwinds():
        return import_module(f"ov3fast.cli.{COMMANDS[name].module}").run(rest)


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Makes SIGTERM unwind like Ctrl-C, so that temporary files are removed and partial results kept; exit code 143."""

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
    warnings.formatwarning = lambda message, *_: f"{PROGRAM}: warning: {message}\n"  # without the source line
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
