"""ov3fast tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ov3fast.cli.bench import from_checkout
from ov3fast.cli.options import parse


@dataclass
class TuneOptions:
    """Tune the operators for this machine and keep what beats the shipped tables.

    On a GPU: block sizes, warps and stages of the Triton kernels. On a CPU: the backend of each operator, in a few minutes.
    """

    only: str = ""
    """Only operators whose name contains this; earlier results for the others are kept."""
    dtype: str = ""
    """Only fp32, bf16 or mixed (bf16 with fp32 parameters, on a CPU)."""
    device: Literal["cpu", "cuda"] = "cuda"
    budget: float = 0.3
    """Seconds of timing per candidate."""


def run(arguments: list[str]) -> int:
    options = parse(TuneOptions, arguments, "tune")
    if options.device == "cuda":
        from_checkout("benches.tune").main(options)
    else:
        tune_cpu(options)
    return 0


def tune_cpu(options: TuneOptions) -> None:
    """Measures every trial on every backend and saves the choices for this chip, thread count, PyTorch version and kernel build."""
    from ov3fast import terminal
    from ov3fast.ops import _choice, _trials

    if _choice.tuned_path() is None:
        raise RuntimeError("OV3FAST_TUNED=0 disables tuned measurements: unset it to save new ones")
    console = terminal.console()
    planned = list(_trials.trials(options.only, options.dtype))
    if not planned:
        known = ", ".join(dict.fromkeys(trial.operator for trial in _trials.trials()))
        raise ValueError(f"--only {options.only!r} --dtype {options.dtype!r} matches no operator; the operators are {known}")
    kept = {_key(choice): choice for choice in _choice.load_tuned()}
    for number, trial in enumerate(planned, 1):
        found = _trials.measure(trial, options.budget / 2)
        kept |= {_key(choice): choice for choice in found}
        size = "x".join(map(str, trial.size))
        chosen = ", ".join(f"{choice.direction} {choice.backend} {choice.why()}".strip() for choice in found)
        console.print(
            f"{number}/{len(planned)} {trial.operator} {size} {trial.dtype}: {chosen}", highlight=False, soft_wrap=True
        )
    console.print(f"written: {_choice.save_tuned(list(kept.values()))}", highlight=False, soft_wrap=True)


def _key(choice) -> tuple:
    return choice.operator, choice.direction, choice.dtype, choice.size
