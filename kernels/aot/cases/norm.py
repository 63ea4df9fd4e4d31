"""layer_norm and rms_norm: both kernels of each, with and without a residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...layer_norm import _layer_norm_backward, _layer_norm_forward
from ...lib.common import cdiv
from ...lib.config import Config
from ...lib.reduce import strips_of
from ...rms_norm import _rms_norm_backward, _rms_norm_forward
from ..catalog import SIZES, Entry, Work, argument_types, row_alignment, row_constants

TYPES_OF_ARGUMENTS = {
    **dict.fromkeys(("x", "residual", "weight", "bias", "y", "h", "grad_y", "grad_h", "grad_x"), "*{}"),
    **dict.fromkeys(("mean", "rstd", "weight_partials", "bias_partials"), "*fp32"),
    "eps": "fp32",
}
COUNT = 16384
"""Rows."""


class Norm(NamedTuple):
    """What the work of an operator's kernels depends on."""

    flops: tuple[int, int]
    """Per element, forward and backward."""
    parameters: int
    """Vectors of parameters."""
    statistics: int
    """Bytes per row that the forward saves for the backward."""


LAYER_NORM, RMS_NORM = Norm((8, 14), 2, 8), Norm((5, 12), 1, 0)


def forward_work(norm: Norm, count: int, width: int, size: int, residual: bool, programs: int) -> Work:
    """Every program reads the parameters, in the storage dtype."""
    moved, parameters = count * (width * size * (4 if residual else 2) + norm.statistics), norm.parameters * width * size
    return Work(norm.flops[0] * count * width, moved + programs * parameters, programs, distinct=moved + parameters)


def backward_work(norm: Norm, count: int, width: int, size: int, residual: bool, strips: int) -> Work:
    """Every program reads the weight and writes a partial sum of each parameter's gradient."""
    moved = count * (width * size * (4 if residual else 3) + norm.statistics)
    return Work(norm.flops[1] * count * width, moved + strips * width * (size + 4 * norm.parameters), programs=strips)


def entries() -> list[Entry]:
    return [
        entry
        for op, norm, forward, backward, width in (
            ("layer_norm", LAYER_NORM, _layer_norm_forward, _layer_norm_backward, 768),
            ("rms_norm", RMS_NORM, _rms_norm_forward, _rms_norm_backward, 1152),
        )
        for fused in (False, True)
        for entry in (_forward(op, norm, forward, width, fused), _backward(op, norm, backward, width, fused))
    ]


def _forward(op: str, norm: Norm, kernel: Any, width: int, fused: bool) -> Entry:
    def work(dtype: str, config: Config) -> Work:
        return forward_work(norm, COUNT, width, SIZES[dtype], fused, cdiv(COUNT, config.blocks["BLOCK_ROWS"]))

    return _entry(op, norm, kernel, width, () if fused else ("residual", "h"), work)


def _backward(op: str, norm: Norm, kernel: Any, width: int, fused: bool) -> Entry:
    def work(dtype: str, config: Config) -> Work:
        return backward_work(norm, COUNT, width, SIZES[dtype], fused, strips_of(COUNT)[0])

    return _entry(op, norm, kernel, width, () if fused else ("grad_h",), work)


def _entry(op: str, norm: Norm, kernel: Any, width: int, absent: tuple[str, ...], work: Callable[[str, Config], Work]) -> Entry:
    strided = [p.name.removesuffix("_inner") for p in kernel.params if p.name.endswith("_inner")]
    constants = row_constants(*strided) | dict.fromkeys(absent)
    types = argument_types(kernel, **TYPES_OF_ARGUMENTS)
    return Entry(
        kernel,
        op,
        lambda dtype: {name: kind for name, kind in types(dtype).items() if name not in constants},
        f"{COUNT} x {width}",
        work,
        constants,
        variant="" if absent else "with a residual",
        aligned=(*row_alignment(*strided), "rows", "width", "rows_per_strip"),
        streaming=True,
        exceptions={"wide": "mean and rstd of many narrow rows are read 4 bytes at a time"} if norm.statistics else {},
    )
