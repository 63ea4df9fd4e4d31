"""group_norm_silu: each kernel, in both memory formats."""

from __future__ import annotations

import functools

from ...group_norm_silu import (
    group_norm_silu_backward,
    group_norm_silu_backward_channels,
    group_norm_silu_backward_groups,
    group_norm_silu_backward_partials,
    group_norm_silu_forward,
    group_norm_silu_forward_partials,
    group_norm_silu_statistics,
    strips,
)
from ...lib.common import cdiv
from ...lib.config import pick
from ..catalog import SIZES, Entry, Work, argument_types

TYPES_OF_ARGUMENTS = {
    **dict.fromkeys(("x", "y", "grad_y", "grad_x", "weight", "bias", "grad_weight", "grad_bias"), "*{}"),
    **dict.fromkeys(("mean", "rstd", "partials", "means"), "*fp32"),
    "eps": "fp32",
}
ALIGNED = ("grad_stride_b", "grad_stride_row", "stride_b", "stride_row", "channels", "spatial", "strip_spatial")


def partials_work(b, c, s, layout, backward, dtype, config):
    """Reads x (and grad_y) once; per-channel parameters come from the cache."""
    found = strips(b, c, s, config.blocks)[0]
    reads = b * c * s * SIZES[dtype] * (2 if backward else 1)
    programs = b * found * cdiv(c, config.blocks["BLOCK_C"])
    return Work(b * c * s * (16 if backward else 6), reads + b * found * c * 8, programs)


def elementwise_work(b, c, s, layout, backward, dtype, config):
    """Reads x (and grad_y), writes y or dx; per-channel parameters come from the cache."""
    programs = b * cdiv(c, config.blocks["BLOCK_C"]) * cdiv(s, config.blocks["BLOCK_S"])
    return Work(b * c * s * (20 if backward else 8), b * c * s * SIZES[dtype] * (3 if backward else 2), programs)


def merge_work(kernel, b, c, s, groups, layout, dtype, config):
    """For the small kernels that merge partial sums; `layout` determines the number of strips."""
    forward_pass = kernel is group_norm_silu_statistics
    blocks = pick(f"group_norm_silu_{'forward' if forward_pass else 'backward'}_partials", dtype, layout).blocks
    n = b * strips(b, c, s, blocks)[0] * c
    if forward_pass:
        return Work(8 * n, 12 * n + 8 * b * groups, b * groups, 8 * n + 8 * b * groups)
    if kernel is group_norm_silu_backward_groups:
        return Work(4 * n, (8 + SIZES[dtype]) * n + 8 * b * groups, b * groups)
    return Work(2 * n, 8 * n + 2 * c * SIZES[dtype], cdiv(c, config.blocks["BLOCK_C"]))


def entries() -> list[Entry]:
    b, c, s, groups = 8, 256, 64 * 64, 32
    problem, found = f"{b} x {c} x {s}, {groups} groups", []
    for layout in ("channels_last", "plain"):
        for kernel, work, backward_pass in (
            (group_norm_silu_forward_partials, partials_work, False),
            (group_norm_silu_forward, elementwise_work, False),
            (group_norm_silu_backward_partials, partials_work, True),
            (group_norm_silu_backward, elementwise_work, True),
        ):
            found.append(
                Entry(
                    kernel, "group_norm_silu", argument_types(kernel, **TYPES_OF_ARGUMENTS), problem,
                    functools.partial(work, b, c, s, layout, backward_pass),
                    constexprs={"CHANNELS_LAST": layout == "channels_last"}, variant=layout, aligned=ALIGNED, streaming=True,
                    exceptions={"wide": "statistics are 4 bytes each; where a pixel's channels are no multiple of 16 bytes, rows are not aligned"},
                )
            )  # fmt: skip
    for kernel in (group_norm_silu_statistics, group_norm_silu_backward_groups, group_norm_silu_backward_channels):
        work = functools.partial(merge_work, kernel, b, c, s, groups, "channels_last")
        arguments = argument_types(kernel, **TYPES_OF_ARGUMENTS)
        found.append(Entry(kernel, "group_norm_silu", arguments, problem, work, aligned=ALIGNED))
    return found
