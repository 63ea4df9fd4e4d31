"""The environment's words that ov3fast reads: the one list of them. `ov3fast doctor` prints it, a test holds the code to it."""

from __future__ import annotations

import os
from typing import NamedTuple


class Word(NamedTuple):
    meaning: str
    default: str


WORDS = {
    "OV3FAST_IMPL": Word("the backend of every operator, as ops.use", "each operator picks its first backend that is ready"),
    "OV3FAST_CPU_ISA": Word(
        "instruction set of the CPU kernels: portable, avx2, avx512, avx512_bf16, amx_bf16, or amx_emulated for tests",
        "the widest that runs here",
    ),
    "OV3FAST_CACHE": Word("folder for the demo set, packages and what `ov3fast tune` finds", "~/.cache/ov3fast"),
    "OV3FAST_TUNED": Word(
        "0: what `ov3fast tune --device cpu` found on this machine is ignored", "it wins over the shipped table"
    ),
    "OV3FAST_EXCHANGE_TIMEOUT": Word("seconds that ranks wait for each other before the contrastive loss's exchange", "600"),
    "OV3FAST_TRACEBACK": Word("any text: errors of the command line show where they came from", "one line, exit code 2"),
    "OV3FAST_NATIVE": Word(
        "folder of another build of the CPU and CUDA kernels, as `make sanitize` uses", "the installed build"
    ),
    "OV3FAST_CUDA": Word(
        "when installing: 1 builds the CUDA kernels, 0 leaves them out", "built where there is an NVIDIA driver"
    ),
    "OV3FAST_AOT_CACHE": Word("folder for results of `python -m ov3fast.kernels.aot`", "in the temporary directory"),
    "OV3FAST_LAUNCHER": Word(
        "`triton`: every Triton kernel is launched by Triton itself, and not by our launcher, which takes the host less time",
        "ours",
    ),
    "OV3FAST_API_KEY": Word("the key that `ov3fast serve` asks of requests", "none is asked for"),
    "OV3FAST_OTHER_TRITON": Word("tests only: folder with another Triton, whose compiled code is executed too", "none"),
    "OV3FAST_INTERPRETER_EXAMPLES": Word("tests only: hypothesis' examples under Triton's interpreter", "4"),
    "OV3FAST_KILLS": Word("tests only: how many times the drills kill a training run", "3"),
    "OV3FAST_KILL_SEED": Word("tests only: seed of the moments at which they do", "0"),
    "OV3FAST_SCREENSHOTS": Word("tests only: folder for pictures of the server's page", "none are taken"),
}

SECRET = ("OV3FAST_API_KEY",)


def exchange_timeout() -> float:
    """OV3FAST_EXCHANGE_TIMEOUT in seconds. ValueError for what is no positive number."""
    text = os.environ.get("OV3FAST_EXCHANGE_TIMEOUT") or "600"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"OV3FAST_EXCHANGE_TIMEOUT must be a positive number of seconds, got {text!r}")
    return seconds


def report() -> dict[str, str]:
    """Word -> its value here, or "not set: " and what then holds. A key is not shown: reports are passed on."""
    values = {name: os.environ.get(name) or f"not set: {word.default}" for name, word in WORDS.items()}
    return {**values, **{name: "set" for name in SECRET if os.environ.get(name)}}
