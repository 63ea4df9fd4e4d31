"""noise_projection: each kernel."""

from __future__ import annotations

import functools

from ...lib.common import cdiv
from ...lib.config import Config, pick
from ...noise_projection import noise_projection_draw, noise_projection_grad_sigma
from ..catalog import SIZES, Entry, Work, argument_types

POINTERS = {
    **dict.fromkeys(("z", "sigma", "x", "grad_z", "grad_sigma"), "*{}"),
    "sigma_partials": "*fp32",
    "rng": "*i64",
}
ALIGNED = ("stride_b", "stride_n", "width", "rows", "tokens")
OPERATIONS = 45
"""Operations per random number: a quarter of those for a block of four."""


def draw_work(rows: int, width: int, need_x: bool, need_sigma: bool, dtype: str, config: Config) -> Work:
    tiles = cdiv(width, config.blocks["BLOCK_N"])
    moved = rows * width * SIZES[dtype] * (2 * need_x + need_sigma) + (4 * rows * tiles if need_sigma else 0)
    return Work(OPERATIONS * rows * width, moved, tiles * cdiv(rows, config.blocks["BLOCK_M"]))


def grad_sigma_work(batch: int, rows: int, width: int, dtype: str, _: Config) -> Work:
    tiles = cdiv(width, pick("noise_projection_draw", dtype).blocks["BLOCK_N"])
    return Work(rows * tiles, rows * tiles * 4 + batch * SIZES[dtype], batch, trips=(tiles,))


def entries() -> list[Entry]:
    batch, tokens, width = 64, 256, 768
    rows = batch * tokens

    def types(kernel, absent: tuple[str, ...]):
        given = argument_types(kernel, **POINTERS)
        return lambda dtype: {name: kind for name, kind in given(dtype).items() if name not in absent}

    def draw(variant: str, need_x: bool, need_sigma: bool) -> Entry:
        absent = (() if need_x else ("x",)) + (() if need_sigma else ("grad_z", "sigma_partials"))
        return Entry(
            noise_projection_draw, "noise_projection", types(noise_projection_draw, absent), f"{batch} x {tokens} x {width}",
            functools.partial(draw_work, rows, width, need_x, need_sigma), {"IN_ORDER": True, **dict.fromkeys(absent)},
            variant=variant, aligned=ALIGNED, streaming=True,
            exceptions={"wide": "sigma and partial sums are 4 bytes each"},
        )  # fmt: skip

    return [
        draw("forward", True, False),
        draw("gradients of weight and sigma", True, True),
        Entry(
            noise_projection_grad_sigma, "noise_projection", types(noise_projection_grad_sigma, ()),
            f"{batch} x {tokens} x {width}", functools.partial(grad_sigma_work, batch, rows, width), aligned=ALIGNED,
        ),
    ]  # fmt: skip
