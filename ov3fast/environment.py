"""All environment variables that ov3fast reads. `ov3fast doctor` prints them; a test checks that the code reads no others."""

from __future__ import annotations

import os
from typing import NamedTuple


class Word(NamedTuple):
    meaning: str
    default: str


WORDS = {
    "OV3FAST_IMPL": Word("the backend of every operator, like ops.use", "each operator picks its first available backend"),
    "OV3FAST_CPU_ISA": Word(
        "instruction set of the CPU kernels: portable, avx2, avx512, avx512_bf16, amx_bf16, or amx_emulated for tests",
        "the widest that this CPU supports",
    ),
    "OV3FAST_CACHE": Word("folder for the demo set, packages and the results of `ov3fast tune`", "~/.cache/ov3fast"),
    "OV3FAST_TUNED": Word(
        "0: ignore what `ov3fast tune --device cpu` measured on this machine", "it overrides the shipped table"
    ),
    "OV3FAST_EXCHANGE_TIMEOUT": Word("seconds that ranks wait for each other before the contrastive loss's exchange", "600"),
    "OV3FAST_TRACEBACK": Word("any value: errors of the command line show a traceback", "one line, exit code 2"),
    "OV3FAST_NATIVE": Word(
        "folder of another build of the CPU and CUDA kernels, as `make sanitize` uses", "the installed build"
    ),
    "OV3FAST_CUDA": Word("at install time: 1 builds the CUDA kernels, 0 does not", "built if there is an NVIDIA driver"),
    "OV3FAST_AOT_CACHE": Word("folder for results of `python -m ov3fast.kernels.aot`", "in the temporary directory"),
    "OV3FAST_LAUNCHER": Word(
        "`triton`: launch Triton kernels with Triton's own launcher instead of ours, which takes less host time",
        "ours",
    ),
    "OV3FAST_API_KEY": Word("the key that `ov3fast serve` requires in requests", "no key is required"),
    "OV3FAST_OTHER_TRITON": Word("tests only: folder of another Triton version, whose compiled code is executed too", "none"),
    "OV3FAST_INTERPRETER_EXAMPLES": Word("tests only: number of hypothesis examples under Triton's interpreter", "4"),
    "OV3FAST_KILLS": Word("tests only: number of times that the kill tests kill a training run", "3"),
    "OV3FAST_KILL_SEED": Word("tests only: seed for when they do", "0"),
    "OV3FAST_SCREENSHOTS": Word("tests only: folder for screenshots of the server's page", "none are taken"),
}

SECRET = ("OV3FAST_API_KEY",)


def exchange_timeout() -> float:
    """OV3FAST_EXCHANGE_TIMEOUT in seconds. Raises ValueError unless it is a positive number."""
    text = os.environ.get("OV3FAST_EXCHANGE_TIMEOUT") or "600"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"OV3FAST_EXCHANGE_TIMEOUT must be a positive number of seconds, got {text!r}")
    return seconds


def report() -> dict[str, str]:
    """Variable -> its value, or "not set: " and the default. The API key's value is hidden, since reports get shared."""
    values = {name: os.environ.get(name) or f"not set: {word.default}" for name, word in WORDS.items()}
    return {**values, **{name: "set" for name in SECRET if os.environ.get(name)}}
