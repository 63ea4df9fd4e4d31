"""contrastive_loss: each kernel, by loss kind and schedule."""

from __future__ import annotations

import functools

from ...contrastive.config import FEW, GAIN
from ...contrastive.few import (
    contrastive_few_gradients,
    contrastive_few_loss,
    contrastive_few_project,
    contrastive_few_statistics,
)
from ...contrastive.launch import PROGRAMS
from ...contrastive.rows import contrastive_features, contrastive_merge, contrastive_project
from ...contrastive.tiles import contrastive_gradients, contrastive_statistics
from ...lib.common import cdiv
from ...lib.config import Config
from ..catalog import SIZES, Entry, Work

PAIRS, WIDTH, CHUNK = 32768, 768, 2048


def statistics_launch(n: int, N: int, config: Config) -> tuple[int, int, int]:
    """Row tiles, column segments, column tiles per segment."""
    strips, tiles = cdiv(n, config.blocks["BLOCK_M"]), cdiv(N, config.blocks["BLOCK_N"])
    segment = cdiv(tiles, max(1, PROGRAMS // strips))
    return strips, cdiv(tiles, segment), segment


def _statistics_work(dtype: str, config: Config, n: int, sigmoid: bool, cublas: bool) -> Work:
    strips, segments, segment = statistics_launch(n, PAIRS, config)
    moved = statistics_bytes(n, PAIRS, WIDTH, SIZES[dtype], config.blocks["BLOCK_M"], segments, sigmoid, cublas)
    return Work(
        0 if cublas else 2.0 * n * PAIRS * WIDTH, moved, strips * segments,
        streamed=0 if cublas else PAIRS * WIDTH * SIZES[dtype], trips=() if cublas else (segment, cdiv(WIDTH, config.blocks["BLOCK_K"])),
    )  # fmt: skip


def _gradients_work(dtype: str, config: Config, cublas: bool, terms: int) -> Work:
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    moved = gradients_bytes(CHUNK, PAIRS, WIDTH, SIZES[dtype], block_m, block_n, cublas, True)
    return Work(
        0 if cublas else 2.0 * CHUNK * PAIRS * WIDTH,
        moved,
        cdiv(CHUNK, block_m) * cdiv(PAIRS, block_n),
        trips=(terms,),
    )


def statistics_bytes(n: int, N: int, width: int, size: int, block_m: int, segments: int, sigmoid: bool, cublas: bool) -> int:
    """Distinct bytes: every row once (cublas: every product once), plus the partial sums."""
    read = 4 * n * N if cublas else (n + N) * width * size
    parts = 4 * n * segments if sigmoid else 8 * (n * segments + cdiv(n, block_m) * N) + 4 * n
    return read + 4 * (n + N) + parts


def gradients_bytes(n: int, N: int, width: int, size: int, block_m: int, block_n: int, cublas: bool, store: bool) -> int:
    """Distinct bytes: every row once (cublas: every product once), plus the gradients and their rounding errors."""
    read = 4 * n * N if cublas else (n + N) * width * size
    statistics = 12 * (n + N)
    lost = 4 * (cdiv(N, block_n) * n + cdiv(n, block_m) * N) + 4 * (n + N) if store and size == 2 else 0
    return read + statistics + (size * n * N if store else 0) + lost


def features_bytes(rows: int, width: int, size: int, block_r: int, units: bool) -> int:
    """x twice (the second time from cache), plus the unit rows or partial means."""
    return 2 * rows * width * size + 8 * rows + 4 * width * (rows if units else cdiv(rows, block_r))


def project_bytes(
    rows: int, width: int, size: int, out_size: int, block_r: int, complete: bool, rounded: bool, through: bool
) -> int:
    """The gradient twice and x three times if the norms are differentiated (all but the first time from cache), else the gradient once."""
    reads = (2 * 4 + 3 * size) if through else 4
    means = (2 if through else 1) * cdiv(rows, block_r) * width * 4 if rounded else 0
    return rows * width * (reads + out_size) + means + 4 * rows * (complete + rounded)


def _features_work(dtype: str, config: Config, units: bool) -> Work:
    moved = features_bytes(PAIRS, WIDTH, SIZES[dtype], config.blocks["BLOCK_R"], units)
    return Work(0, moved, cdiv(PAIRS, config.blocks["BLOCK_R"]), moved - PAIRS * WIDTH * SIZES[dtype])


def _project_work(dtype: str, config: Config, out_size: int, complete: bool, rounded: bool, through: bool) -> Work:
    moved = project_bytes(PAIRS, WIDTH, SIZES[dtype], out_size, config.blocks["BLOCK_R"], complete, rounded, through)
    again = PAIRS * WIDTH * (4 + 2 * SIZES[dtype]) if through else 0
    return Work(0, moved, cdiv(PAIRS, config.blocks["BLOCK_R"]), moved - again)


def merge_bytes(count: int, size: int, first: bool) -> int:
    return 8 * size * (count + (1 if first else 2))


def entries() -> list[Entry]:
    return [*_tile_entries(), *_row_entries(), *_few_entries()]


def _pointers(dtype: str, narrow: str, wide: str) -> dict[str, str]:
    return {**dict.fromkeys(narrow.split(), f"*{dtype}"), **dict.fromkeys(wide.split(), "*fp32")}


def _tile_entries():
    chunk = f"{CHUNK} x {PAIRS}, width {WIDTH}"
    for kind in ("softmax", "sigmoid"):
        sigmoid = kind == "sigmoid"
        for cublas in (False, True):
            variant = kind + (" of products" if cublas else "")
            dtypes = ("bf16", "fp16") if cublas else ("fp32", "bf16", "fp16")
            if sigmoid or cublas:
                yield _statistics(variant, sigmoid, cublas, False, dtypes)
            else:
                yield _statistics(variant, sigmoid, cublas, True, ("bf16", "fp16"))
                yield _statistics(f"{variant}, own maxima", sigmoid, cublas, False, dtypes, "maxima")
            for dtype in dtypes:
                yield Entry(
                    kernel=contrastive_gradients,
                    op="contrastive_loss",
                    arguments=_arguments(
                        "x y", "products x_inverse y_inverse x_norm y_norm scale bias row_terms column_terms own_weight center",
                        "x_stride y_stride products_stride gradients_stride row_terms_stride n N width offset",
                        "gradients", "row_error column_error", "sums", "terms",
                    ),
                    problem=chunk,
                    work=functools.partial(_gradients_work, cublas=cublas, terms=2 if dtype == "fp32" or cublas else 1),
                    constexprs={"SIGMOID": sigmoid, "TOTAL": sigmoid, "CUBLAS": cublas, "STORE": True, "GAIN": GAIN if dtype == "fp16" else 1.0},
                    variant=variant,
                    dtypes=(dtype,),
                    aligned=("x_stride", "y_stride", "products_stride", "gradients_stride", "row_terms_stride", "n", "N", "width"),
                    matrix=not cublas,
                    streaming=cublas,
                    sizes=("cublas" if cublas else "any",),
                )  # fmt: skip


def _statistics(variant: str, sigmoid: bool, cublas: bool, shared: bool, dtypes: tuple[str, ...], size: str = "any") -> Entry:
    return Entry(
        kernel=contrastive_statistics,
        op="contrastive_loss",
        arguments=_arguments(
            "x y", "products x_inverse y_inverse scale bias row_parts column_parts own",
            "x_stride y_stride products_stride row_parts_stride n N width offset segment", flags="far" if shared else "",
        ),
        problem=f"{CHUNK if cublas else PAIRS} x {PAIRS}, width {WIDTH}",
        work=functools.partial(_statistics_work, n=CHUNK if cublas else PAIRS, sigmoid=sigmoid, cublas=cublas),
        constexprs={"SIGMOID": sigmoid, "CUBLAS": cublas, "SHARED": shared, **({} if shared else {"far": None})},
        variant=variant,
        dtypes=dtypes,
        aligned=("x_stride", "y_stride", "products_stride", "row_parts_stride", "n", "N", "width"),
        matrix=not cublas,
        streaming=cublas,
        exceptions={"wide": "inverse norms and partial statistics are 4 bytes each"} if cublas else {},
        sizes=("cublas" if cublas else size,),
    )  # fmt: skip


def _arguments(
    narrow: str, wide: str, integers: str, more_narrow: str = "", more_wide: str = "", widest: str = "", flags: str = ""
):
    """dtype -> argument types: pointers to the features' dtype and to float32 (twice), to float64 and to int32, then integers."""

    def arguments(dtype: str) -> dict[str, str]:
        first, second = _pointers(dtype, narrow, wide), _pointers(dtype, more_narrow, more_wide)
        others = {"*fp64": widest, "*i32": flags, "i32": integers}
        return {**first, **second, **{name: kind for kind, names in others.items() for name in names.split()}}

    return arguments


def _row_entries():
    for units in (False, True):
        yield Entry(
            kernel=contrastive_features,
            op="contrastive_loss",
            arguments=_arguments("x", "units norms inverses mean_parts" if units else "", "row_stride rows width")
            if units
            else _arguments("x units", "norms inverses mean_parts", "row_stride rows width"),
            problem=f"{PAIRS} x {WIDTH}",
            work=functools.partial(_features_work, units=units),
            constexprs={"UNITS": units},
            variant="units" if units else "norms",
            dtypes=("fp32", "bf16", "fp16") if units else ("bf16", "fp16"),
            aligned=("row_stride", "rows", "width"),
            streaming=True,
        )
    yield Entry(
        kernel=contrastive_merge,
        op="contrastive_loss",
        arguments=lambda dtype: {"parts": "*fp32", "state": "*fp32", "count": "i32", "size": "i32"},
        problem=f"256 x {PAIRS}",
        work=lambda dtype, config: Work(0, merge_bytes(256, PAIRS, True), cdiv(PAIRS, config.blocks["BLOCK"])),
        constexprs={"FIRST": True, "LOG": False},
        dtypes=("fp32",),
        aligned=("count", "size"),
        streaming=True,
    )
    for variant, complete, through in (("image", True, True), ("text", True, False), ("text, norms", False, True)):
        for dtype in ("fp32", "bf16", "fp16"):
            rounded = complete and dtype != "fp32"
            out = "*fp32" if variant == "text" else f"*{dtype}"
            yield Entry(
                kernel=contrastive_project,
                op="contrastive_loss",
                arguments=lambda dtype, out=out: {
                    "grad": "*fp32", "x": f"*{dtype}", "error": "*fp32", "mean": "*fp32", "factor": "*fp32", "row_factor": "*fp32",
                    "out": out, "row_stride": "i32", "rows": "i32", "width": "i32",
                },
                problem=f"{PAIRS} x {WIDTH}",
                work=functools.partial(
                    _project_work, out_size=SIZES[out[1:]], complete=complete, rounded=rounded, through=through
                ),
                constexprs={"COMPLETE": complete, "ROUNDED": rounded, "PROJECT": through},
                variant=variant,
                dtypes=(dtype,),
                aligned=("row_stride", "rows", "width"),
                streaming=True,
                exceptions={"wide": "rows' factors are 4 bytes each"},
            )  # fmt: skip


def few_tile_bytes(pairs: int, width: int, size: int, block: int, gradients: bool, sigmoid: bool) -> int:
    """Each tile's rows of both sides; the statistics, or the gradients and their sums."""
    tiles = cdiv(pairs, block)
    if gradients:
        beside = 4 * pairs * pairs + 8 * (1 + sigmoid) * tiles**2 + (0 if sigmoid else 16 * pairs)
    else:
        beside = 4 * tiles * pairs * (1 if sigmoid else 4) + (0 if sigmoid else 4 * pairs)
    return 2 * tiles * pairs * width * size + beside


def few_project_bytes(pairs: int, width: int, size: int) -> int:
    """Of both sides the gradient twice and the features three times, all but the first time from cache, and the result."""
    return 2 * pairs * width * (2 * 4 + 4 * size)


def _few_tile_work(dtype: str, config: Config, gradients: bool, sigmoid: bool) -> Work:
    tiles = cdiv(FEW, config.blocks["BLOCK"])
    moved = few_tile_bytes(FEW, WIDTH, SIZES[dtype], config.blocks["BLOCK"], gradients, sigmoid)
    again = 2 * (tiles - 1) * FEW * WIDTH * SIZES[dtype]
    return Work(2.0 * FEW * FEW * WIDTH, moved, tiles**2, moved - again, trips=(cdiv(WIDTH, config.blocks["BLOCK_K"]),))


def _few_entries():
    tile = ("x_stride", "y_stride", "pairs", "width")
    for kind in ("softmax", "sigmoid"):
        sigmoid = kind == "sigmoid"
        bias, scalars = ({}, "scale bias") if sigmoid else ({"bias": None}, "scale")
        # Of 16-bit features the products are float32's too.
        for kernel, gradients, pointers, integers in (
            (contrastive_few_statistics, False, "parts own", "x_stride y_stride pairs width"),
            (contrastive_few_gradients, True, "grad_loss row_lse column_lse gradients", "x_stride y_stride gradients_stride pairs width"),
        ):  # fmt: skip
            for dtype in ("fp32", "bf16", "fp16"):
                yield Entry(
                    kernel=kernel,
                    op="contrastive_loss",
                    arguments=_arguments("x y", f"{scalars} {pointers}", integers, widest="sums" if gradients else ""),
                    problem=f"{FEW} x {FEW}, width {WIDTH}",
                    work=functools.partial(_few_tile_work, gradients=gradients, sigmoid=sigmoid),
                    constexprs={"SIGMOID": sigmoid, **bias, **({"MOST": FEW} if gradients else {})},
                    variant=kind,
                    dtypes=(dtype,),
                    aligned=(*tile, "gradients_stride") if gradients else tile,
                    matrix=dtype == "fp32",
                )
        yield Entry(
            kernel=contrastive_few_loss,
            op="contrastive_loss",
            arguments=_arguments("", "parts own loss row_lse column_lse", "tiles pairs"),
            problem=f"{FEW} pairs",
            work=lambda dtype, config, sigmoid=sigmoid: Work(0, 4 * FEW * (16 if sigmoid else 64 + 5), 1),
            constexprs={"SIGMOID": sigmoid, "PARTS": 16},
            variant=kind,
            dtypes=("fp32",),
            aligned=("tiles", "pairs"),
        )
        yield Entry(
            kernel=contrastive_few_project,
            op="contrastive_loss",
            arguments=lambda dtype: {
                "by_x": "*fp32", "x": f"*{dtype}", "grad_x": f"*{dtype}", "x_stride": "i32",
                "by_y": "*fp32", "y": f"*{dtype}", "grad_y": f"*{dtype}", "y_stride": "i32",
                "sums": "*fp64", "grad_scale": "*fp32", "grad_bias": "*fp32", "tiles": "i32", "pairs": "i32", "width": "i32",
            },
            problem=f"2 x {FEW} x {WIDTH}",
            work=lambda dtype, config: Work(
                0, few_project_bytes(FEW, WIDTH, SIZES[dtype]), 2 * cdiv(FEW, config.blocks["BLOCK_R"]),
                2 * FEW * WIDTH * (4 + 2 * SIZES[dtype]),
            ),
            constexprs={"SIGMOID": sigmoid, "MOST": 256},
            variant=kind,
            aligned=("x_stride", "y_stride", "tiles", "pairs", "width"),
            streaming=True,
            exceptions={"wide": "each tile's sum is 8 bytes"},
        )  # fmt: skip
