"""Which backend an automatic choice takes on a CPU, and why.

In turn: what `ov3fast tune --device cpu` measured on this machine; the table choices.csv, made from the measurements of this chip that
benches/results/operators-cpu-CHIP.csv holds; and for chips without either PyTorch's own matrix products and our kernels for the rest, which
memory bounds anywhere.

A call takes the row of its operator, direction and dtype whose size is nearest: the sum over SIZES' dimensions of |log2(here / there)|.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..io import atomic_write
from . import _chip

OURS = "cpu"
DIRECTIONS = ("forward", "backward")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MIXED = "mixed"
"""bfloat16 with float32 parameters, as in training under autocast."""

Measure = Callable[..., tuple[Any, Tensor | None, tuple[int, ...]]]
"""The operands that an operator's CPU backend names -> what tells the dtype, the parameter that may be wider, and the size."""

SIZES: dict[str, Measure] = {}
DIMENSIONS: dict[str, str] = {}
"""Operator -> what its sizes count."""
SHARED: dict[str, str] = {}
"""Operators that take another's rows: they are the same sums."""
PRODUCTS: dict[str, str] = {}
"""Operators that are mostly matrix products, and the backend that has PyTorch compute them. contrastive_loss is not among them: its
eager backend takes five times our kernels' memory, and on the chip measured four times their time."""

RELATIVES = {"zen5": "zen4"}
"""Chips that take another's table until they have one: the same instructions, in wider units."""

WITHOUT_EVIDENCE = "no measurements of this chip: PyTorch's products, our kernels for the rest"
NARROWER = "a narrower instruction set than the chip's is asked for: PyTorch's products, our kernels for the rest"
TABLE = Path(__file__).with_name("choices.csv")
COLUMNS = ("chip", "operator", "direction", "dtype", "size", "backend", "ratio", "over")


def rows(x: Tensor) -> int:
    """Of a tensor [..., K]."""
    return x.shape[:-1].numel()


@dataclass(frozen=True)
class Choice:
    operator: str
    direction: str
    """One of DIRECTIONS."""
    dtype: str
    """"fp32", "bf16" or "mixed"."""
    size: tuple[int, ...]
    backend: str
    ratio: float
    """The time of `over`, the fastest of the other backends, divided by this one's; nan where it wasn't measured."""
    over: str

    def why(self) -> str:
        return "" if math.isnan(self.ratio) else f"{self.ratio:.2f}x {self.over}"


Table = dict[tuple[str, str, str], list[Choice]]
"""(operator, direction, dtype) -> the sizes measured."""


class Given(TypedDict):
    slower_than: Callable[..., tuple[str, ...]]
    slower_than_backward: Callable[..., tuple[str, ...]]


def by_evidence(op: str, dimensions: str, size: Measure, *, products: str | None = None) -> Given:
    """The arguments of `_dispatch.register` that have the CPU kernels of `op` give way to what is faster.

    dimensions: what the sizes count ("rows, width"), or the operator whose rows count for this one too. products: the backend that has PyTorch
    compute it, for operators that are mostly matrix products.
    """
    SIZES[op] = size
    if dimensions in DIMENSIONS:
        SHARED[op] = dimensions
    else:
        DIMENSIONS[op] = dimensions
    if products is not None:
        PRODUCTS[op] = products
    forward, backward = (functools.partial(_faster, op, direction) for direction in DIRECTIONS)
    return {"slower_than": forward, "slower_than_backward": backward}


def _faster(op: str, direction: str, *operands: Any) -> tuple[str, ...]:
    backend = backend_for(op, direction, *classify(op, *operands))
    return () if backend == OURS else (backend,)


def classify(op: str, *operands: Any) -> tuple[str, tuple[int, ...]]:
    """(dtype, size) of a call."""
    x, parameter, size = SIZES[op](*operands)
    mixed = parameter is not None and parameter.dtype != x.dtype
    return MIXED if mixed else DTYPES.get(x.dtype, "other"), size


def backend_for(op: str, direction: str, dtype: str, size: tuple[int, ...]) -> str:
    """The fastest backend that can be called, by what is known of this machine."""
    return by_table(rule()[0], SHARED.get(op, op), direction, dtype, size)


def by_table(table: Table, op: str, direction: str, dtype: str, size: tuple[int, ...]) -> str:
    """The backend that a table gives a call, or where it has no row for it, what a chip without measurements takes."""
    choice = nearest(table, op, direction, dtype, size)
    return PRODUCTS.get(op, OURS) if choice is None else choice.backend


def nearest(table: Table, op: str, direction: str, dtype: str, size: tuple[int, ...]) -> Choice | None:
    """The row for a call. Where none was measured: mixed takes bfloat16's, and a backward its forward's."""
    for way in dict.fromkeys((direction, "forward")):
        for kind in dict.fromkeys((dtype, "bf16" if dtype == MIXED else dtype)):
            if rows := table.get((op, way, kind)):
                return min(rows, key=lambda row: _distance(row.size, size))
    return None


def _distance(there: tuple[int, ...], here: tuple[int, ...]) -> float:
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(there, here, strict=True))


def rule() -> tuple[Table, str]:
    """The rows in force, and where they are from."""
    from . import cpu

    if cpu.available_isas() and cpu.isa() != cpu.best_isa():
        return {}, NARROWER
    if (path := tuned_path()) is not None and (found := _tuned(path)) is not None:
        return found, str(path)
    chip = _chip.current().name
    relative = RELATIVES.get(chip, chip)
    if table := committed().get(chip) or committed().get(relative):
        return table, f"benches/results/operators-cpu-{chip if chip in committed() else relative}.csv"
    return {}, WITHOUT_EVIDENCE


@functools.cache
def committed() -> dict[str, Table]:
    """chip -> its rows in choices.csv."""
    return {chip: index(choices) for chip, choices in parse(TABLE.read_text(encoding="utf-8")).items()}


def index(choices: Iterable[Choice]) -> Table:
    table: Table = {}
    for choice in choices:
        table.setdefault((choice.operator, choice.direction, choice.dtype), []).append(choice)
    return table


def render(choices: dict[str, list[Choice]]) -> str:
    """chip -> its choices, as the text of a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for chip, rows in choices.items():
        for c in rows:
            size = " ".join(map(str, c.size))
            ratio = "" if math.isnan(c.ratio) else f"{c.ratio:.2f}"
            writer.writerow((chip, c.operator, c.direction, c.dtype, size, c.backend, ratio, c.over))
    return text.getvalue()


def parse(text: str) -> dict[str, list[Choice]]:
    """What `render` wrote. ValueError that says what is wrong with it."""
    from ._dispatch import PREFERENCE

    lines = list(csv.reader(text.splitlines()))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ValueError(f"its first line must be {','.join(COLUMNS)}")
    choices: dict[str, list[Choice]] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            chip, operator, direction, dtype, size, backend, ratio, over = line
            choice = Choice(
                operator, direction, dtype, tuple(map(int, size.split())), backend, float(ratio or "nan"), over
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        dimensions = len(DIMENSIONS[operator].split(",")) if operator in DIMENSIONS else -1
        if len(choice.size) != dimensions or direction not in DIRECTIONS or backend not in PREFERENCE:
            raise ValueError(f"line {number}: no such operator, direction, backend or number of dimensions")
        choices.setdefault(chip, []).append(choice)
    return choices


# What `ov3fast tune --device cpu` keeps.


def tuned_path() -> Path | None:
    """Where this machine's measurements lie: for its chip, threads, PyTorch and build of the kernels. None where OV3FAST_TUNED is 0."""
    if os.environ.get("OV3FAST_TUNED") == "0":
        return None
    folder = Path(os.environ.get("OV3FAST_CACHE") or "~/.cache/ov3fast").expanduser() / "tuned"
    return folder / f"cpu-{_chip.current().name}-{torch.get_num_threads()}threads-torch{torch.__version__}-{_build()}.csv"


@functools.cache
def _build() -> str:
    """The kernels that are in use, in twelve digits."""
    from . import cpu

    if not cpu.available_isas():
        return "eager"
    return hashlib.sha256((cpu.FOLDER / f"ov3_{cpu.isa()}.so").read_bytes()).hexdigest()[:12]


@functools.cache
def _tuned(path: Path) -> Table | None:
    """None, with a warning where the file is damaged, and without where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _warn(path, error)
        return None
    try:
        return index(choice for rows in parse(text).values() for choice in rows)
    except ValueError as error:
        _warn(path, error)
        return None


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(
        f"{path} is damaged and ignored ({error}); write it anew with `ov3fast tune --device cpu`, or delete it", stacklevel=2
    )


def load_tuned() -> list[Choice]:
    """This machine's measurements so far; none where there are none or they are damaged."""
    path = tuned_path()
    found = _tuned(path) if path is not None else None
    return [choice for rows in (found or {}).values() for choice in rows]


def save_tuned(choices: list[Choice]) -> Path:
    """Keep them in place of what was there, and choose by them from now on."""
    from ._dispatch import forget_choices

    path = tuned_path()
    if path is None:
        raise RuntimeError("OV3FAST_TUNED=0 has measurements ignored: unset it to keep new ones")
    with atomic_write(path) as temporary:
        temporary.write_text(render({_chip.current().name: choices}), encoding="utf-8")
    _tuned.cache_clear()
    forget_choices()
    return path
