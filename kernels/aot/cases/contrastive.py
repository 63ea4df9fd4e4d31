"""contrastive_loss: each kernel, by loss kind and schedule."""

from __future__ import annotations

import functools

from ...contrastive.config import FEW, GAIN
from ...contrastive.few import contrastive_few_gradients, contrastive_few_loss, contrastive_few_statistics
from ...contrastive.launch import PROGRAMS
from ...contrastive.rows import (
    contrastive_errors,
    contrastive_features,
    contrastive_merge,
    contrastive_project,
    contrastive_terms,
    contrastive_total,
)
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
    moved = 2 * features_bytes(PAIRS, WIDTH, SIZES[dtype], config.blocks["BLOCK_R"], units)
    return Work(0, moved, 2 * cdiv(PAIRS, config.blocks["BLOCK_R"]), moved - 2 * PAIRS * WIDTH * SIZES[dtype])


def _project_work(dtype: str, config: Config, sides: list[tuple[int, bool]], complete: bool, rounded: bool) -> Work:
    """sides: of each the size of its result's elements, and whether the norms are differentiated."""
    block, size = config.blocks["BLOCK_R"], SIZES[dtype]
    moved = sum(project_bytes(PAIRS, WIDTH, size, out, block, complete, rounded, through) for out, through in sides)
    again = PAIRS * WIDTH * (4 + 2 * size) * sum(through for _, through in sides)
    return Work(0, moved, len(sides) * cdiv(PAIRS, block), moved - again)


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
                        "x y", "products x_inverse y_inverse x_norm y_norm bias row_terms column_terms facts",
                        "sums_stride x_stride y_stride products_stride gradients_stride row_terms_stride n N width offset",
                        "gradients", "row_error column_error", "sums",
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
    sizes = ("x_stride", "y_stride", "n", "N", "width")
    for units in (False, True):
        sides = ("x", "y")
        yield Entry(
            kernel=contrastive_features,
            op="contrastive_loss",
            arguments=_arguments(
                "x y", " ".join(f"{side}_{'units' if units else 'parts'} {side}_norms" for side in sides), " ".join(sizes)
            ),
            problem=f"2 x {PAIRS} x {WIDTH}",
            work=functools.partial(_features_work, units=units),
            constexprs={"UNITS": units} | {f"{side}_{'parts' if units else 'units'}": None for side in sides},
            variant="units" if units else "norms",
            dtypes=("fp32", "bf16", "fp16") if units else ("bf16", "fp16"),
            aligned=sizes,
            streaming=True,
        )
    yield Entry(
        kernel=contrastive_merge,
        op="contrastive_loss",
        arguments=_arguments("", "parts state", "count size"),
        problem=f"256 x {PAIRS}",
        work=lambda dtype, config: Work(0, merge_bytes(256, PAIRS, True), cdiv(PAIRS, config.blocks["BLOCK"])),
        constexprs={"FIRST": True, "SPLIT": True, "LOG": False},
        dtypes=("fp32",),
        aligned=("count", "size"),
        streaming=True,
    )
    yield Entry(
        kernel=contrastive_total,
        op="contrastive_loss",
        arguments=_arguments("", "rows columns own loss", "count pairs"),
        problem=f"{PAIRS} pairs",
        work=lambda dtype, config: Work(0, 24 * PAIRS, 1, trips=(cdiv(PAIRS, config.blocks["BLOCK"]),)),
        constexprs={"SIGMOID": False},
        dtypes=("fp32",),
        aligned=("count", "pairs"),
    )
    yield Entry(
        kernel=contrastive_terms,
        op="contrastive_loss",
        arguments=lambda dtype: {
            **_pointers("", "", "scale row_weight column_weights r c_max c_log row_terms column_terms facts x_parts x_mean y_parts y_mean"),
            "share": "fp32", **dict.fromkeys(("column_weights_stride", "r_stride", "c_stride", "x_blocks", "y_blocks", "n", "N", "width"), "i32"),
        },
        problem=f"{PAIRS} x {PAIRS}, width {WIDTH}",
        work=_terms_work,
        constexprs={"SIGMOID": False, "NEAR": True, "c_stride": 1},
        dtypes=("fp32",),
        aligned=("column_weights_stride", "r_stride", "x_blocks", "y_blocks", "n", "N", "width"),
    )  # fmt: skip
    tiles, strips = PAIRS // 64, CHUNK // 128
    yield Entry(
        kernel=contrastive_errors,
        op="contrastive_loss",
        arguments=_arguments("", "row_parts row_error column_parts column_error", "tiles n strips N"),
        problem=f"{tiles} x {CHUNK}, {strips} x {PAIRS}",
        work=lambda dtype, config: Work(
            0, 4 * (tiles * CHUNK + CHUNK + strips * PAIRS + PAIRS), cdiv(CHUNK + PAIRS, config.blocks["BLOCK"])
        ),
        constexprs={"FIRST": True},
        dtypes=("fp32",),
        aligned=("tiles", "n", "strips", "N"),
        streaming=True,
    )
    for variant, complete, of_text in (("", True, True), ("rank's", True, False), ("text's norms", False, None)):
        for dtype in ("fp32", "bf16", "fp16"):
            rounded = complete and dtype != "fp32"
            sides = [(SIZES[dtype], True)] + ([(SIZES[dtype] if of_text else 4, of_text)] if complete else [])
            yield Entry(
                kernel=contrastive_project,
                op="contrastive_loss",
                arguments=functools.partial(_project_arguments, complete=complete, rounded=rounded, of_text=of_text),
                problem=f"{len(sides)} x {PAIRS} x {WIDTH}",
                work=functools.partial(_project_work, sides=sides, complete=complete, rounded=rounded),
                constexprs={"GAIN": GAIN if dtype == "fp16" and complete else 1.0, "TOTAL": variant == "rank's", "BIAS": False, "PROJECT_Y": bool(of_text)}
                | dict.fromkeys(_missing(complete, rounded)),
                variant=variant,
                dtypes=(dtype,),
                aligned=sizes,
                streaming=True,
                exceptions={"wide": "rows' factors are 4 bytes each, and tiles' sums 8"},
            )  # fmt: skip


def _missing(complete: bool, rounded: bool) -> list[str]:
    """The arguments of contrastive_project that are None."""
    y = [] if complete else ["by_y", "y", "y_post", "grad_y", "scale", "facts", "sums", "grad_scale", "grad_bias", "x_post"]
    return y + ([] if rounded else ["x_error", "y_error", "x_mean", "y_mean"])


def _project_arguments(dtype: str, complete: bool, rounded: bool, of_text: bool | None) -> dict[str, str]:
    pointers = _pointers(
        dtype, "x grad_x y grad_y", "by_x x_error x_post x_mean by_y y_error y_post y_mean scale facts grad_scale grad_bias"
    )
    if not of_text:
        pointers["grad_y"] = pointers["grad_scale"] = pointers["grad_bias"] = "*fp32"
    integers = dict.fromkeys(("x_stride", "n", "y_stride", "N", "width", "sums_stride"), "i32")
    missing = _missing(complete, rounded)
    return {name: kind for name, kind in {**pointers, "sums": "*fp64", **integers}.items() if name not in missing}


def _terms_work(dtype: str, config: Config) -> Work:
    """Every program of a block reads all maxima and weights; the means' programs the features' sums over blocks of 16 rows."""
    blocks = 2 * cdiv(PAIRS, config.blocks["BLOCK"])
    means, written = 2 * (PAIRS // 16 + 1) * WIDTH * 4, 2 * PAIRS * 16
    distinct = 2 * PAIRS * 12 + written + means
    return Work(
        0, blocks * PAIRS * 12 + distinct, blocks + 2 * cdiv(WIDTH, config.blocks["BLOCK_D"]), distinct,
        trips=(cdiv(PAIRS, config.blocks["BLOCK"]),),
    )  # fmt: skip


def few_tile_bytes(pairs: int, width: int, size: int, block: int, gradients: bool, sigmoid: bool) -> int:
    """Each tile's rows of both sides; the statistics, or the gradients and their sums."""
    tiles = cdiv(pairs, block)
    if gradients:
        beside = 4 * pairs * pairs + 8 * (1 + sigmoid) * tiles**2 + (0 if sigmoid else 16 * pairs)
    else:
        beside = 4 * tiles * pairs * (1 if sigmoid else 4) + (0 if sigmoid else 4 * pairs)
    return 2 * tiles * pairs * width * size + beside


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
