"""contrastive_loss: schedules, and the launches of the kernels in tiles.py and rows.py, with the signatures of the operator's `_forward_rows` and, for all pairs, of `over_views`.

Cost by schedule, in units of 2 n N D FLOPs (U) and of n N bytes of traffic (V):

    schedule   forward                backward                                                          used for widths D
    chunked    1 U                    tiles of gradients 1 U, cuBLAS products 2 U: 3 U, 6 V in bf16     up to 2048, and float32
    cublas     1 U (cuBLAS), 8 V      3 U (cuBLAS), 14 V in bf16                                        beyond

For N = 32768 pairs on an H100 (2 D TFLOP/1000 and 1.1 GB per V; assuming 550 TFLOP/s for Triton's products, 700 for cuBLAS's, and 3.3 TB/s; estimates,
not measurements): D = 768: chunked 11 ms, cublas 14; D = 4096: cublas 57 ms, chunked 59. A third schedule, keeping the gradient [64, D] of one
side in registers at 2 U per side, was dropped: it would recompute every logit's exponential, which at D = 256 takes longer than the traffic it saves.
On ROCm "cuBLAS" is hipBLASLt.

chunked never writes a logit. Both schedules work on chunks of rows: of the N x N matrix only the gradients of a chunk exist, in the features' dtype, and
with cublas its logits (float32, overwritten by the gradients if those are float32 too), at most CHUNK_PAIRS numbers.
In both, the columns' (shift, sum) come from a single sweep over tiles, one pair per strip of rows, merged in order.

The rounding errors of 16-bit gradients are summed in float32 per row and column and added back along the mean of the unit rows that they are
multiplied by: if features are alike, the products nearly cancel but the rounding errors would not. Up to FEW columns errors do not average out, so 16-bit
features are converted to float32. float16 lacks the range for gradients with respect to logits: rows are scaled to norms in [1/2, 1) by powers of two,
and the gradients by GAIN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..lib.common import TYPES, cdiv
from ..lib.config import Config, pick
from ..lib.products import add_product, room_for_rows
from ..lib.rows import as_dtype, empty, rows
from .config import FEW, GAIN, SCHEDULES
from .rows import (
    contrastive_errors,
    contrastive_features,
    contrastive_merge,
    contrastive_project,
    contrastive_terms,
    contrastive_total,
)
from .tiles import contrastive_gradients, contrastive_statistics

CHUNK_PAIRS = 2**26
STRIPS = 256
"""Most row tiles in one launch of the forward, which stores this many (max, sum) pairs per column."""
PROGRAMS = 512
"""A launch of the forward with fewer row tiles splits the columns."""


def schedule(rows: int, width: int, dtype: str) -> str:
    """Name of the schedule, from the table."""
    size = "huge" if width > 2048 else "wide"
    return SCHEDULES.get((dtype, size)) or SCHEDULES["any", size]


@dataclass
class Features:
    """One side's rows as the kernels multiply them, with the factors that turn products into cosines, and gradients into those of the original rows."""

    original: Tensor
    values: Tensor
    norms: Tensor
    """[2, rows]: the norms and their inverses, or ones for unit rows."""
    post: Tensor | None
    """Factors of the rows' gradients, for fixed norms; None: 1."""
    parts: Tensor | None
    """[blocks, D]: sums of the unit rows, if gradients are rounded."""
    mean: Tensor | None
    """[D], of the unit rows: from parts, by contrastive_terms."""

    @property
    def norm(self) -> Tensor:
        return self.norms[0]

    @property
    def inverse(self) -> Tensor:
        return self.norms[1]


def _features(image: Tensor, text: Tensor, for_gradients: bool = False) -> tuple[Features, Features]:
    """Both sides' rows: of norm 1 in float32 where as_units; else themselves or, for float16 gradients, times powers of two."""
    units, config = _as_units(image, text), pick("contrastive_features", TYPES[image.dtype])
    sides = [_side(x, units, for_gradients, config.blocks["BLOCK_R"]) for x in (image, text)]
    blocks = sum(cdiv(len(x), config.blocks["BLOCK_R"]) for x in (image, text))
    if blocks:
        described = []
        for features, x in sides:
            described += [x, features.values if units else None, features.norms, features.parts, x.stride(0), len(x)]
        contrastive_features[(blocks,)](*described, image.shape[1], UNITS=units, **config.options)
    (x, _), (y, _) = sides
    return x, y


def _side(x: Tensor, units: bool, for_gradients: bool, block: int) -> tuple[Features, Tensor]:
    """Room for one side's features, and the rows that they are made of."""
    count, width = x.shape
    original = x = rows(x).tensor
    post = parts = mean = None
    if for_gradients and x.dtype == torch.float16 and not units:
        wide = x.float()
        post = torch.exp2(-torch.frexp(torch.linalg.vector_norm(wide, dim=1)).exponent.float())
        x = (wide * post[:, None]).half()
    if for_gradients and not units:
        parts, mean = (empty(x, shape, dtype=torch.float32) for shape in ((cdiv(count, block), width), width))
    values, norms = x, empty(x, (3 if units else 2, count), dtype=torch.float32)
    if units:
        values, post = empty(x, (count, width), dtype=torch.float32), norms[2]
    return Features(original, values, norms, post, parts, mean), x


def _as_units(image: Tensor, text: Tensor) -> bool:
    return image.dtype == torch.float32 or len(text) <= FEW


def forward(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """image, text [N, D], all pairs, with N > 0 -> loss, and with softmax the rows' and columns' (max, log-sum) [2, N]."""
    softmax, loss = kind == "softmax", empty(image, (), dtype=torch.float32)
    scale, bias = as_dtype(scale, torch.float32), None if bias is None else as_dtype(bias, torch.float32)
    by_row, columns, own = _statistics(image, text, scale, bias, kind, 0)
    count = len(text) if softmax else by_row.numel()
    config = pick("contrastive_total", "fp32")
    contrastive_total[(1,)](by_row, columns, own, loss, count, len(text), SIGMOID=not softmax, **config.options)
    return (loss, by_row, columns) if softmax else (loss, empty(loss, (2, 0)), empty(loss, (2, 0)))


def forward_rows(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, offset: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """image [n,D], text [N,D] -> rows [2,n] (shift, log-sum), columns [2,N] (shift, sum), own [n]; sigmoid: rows [n], None, None."""
    by_row, columns, own = _statistics(image, text, scale, bias, kind, offset)
    return (by_row, columns, own) if kind == "softmax" else (by_row.sum(0), None, None)


def _statistics(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, offset: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`forward_rows`, with the sigmoid's rows in parts [segments, n]."""
    (n, width), N = image.shape, len(text)
    sigmoid = kind == "sigmoid"
    x, y = _features(image, text)
    dtype = TYPES[x.values.dtype]
    cublas = schedule(n, width, dtype) == "cublas"
    shared = not (sigmoid or _as_units(image, text) or cublas)
    config = pick("contrastive_statistics", dtype, "cublas" if cublas else "any" if shared or sigmoid else "maxima")
    careful = _on_the_same_places(pick("contrastive_statistics", dtype, "maxima"), config) if shared else config
    column_tiles = cdiv(N, config.blocks["BLOCK_N"])
    size = min(STRIPS * config.blocks["BLOCK_M"], _chunk_rows(N) if cublas else n) or 1
    segment = cdiv(max(column_tiles, 1), max(1, PROGRAMS // cdiv(size, config.blocks["BLOCK_M"])))
    segments = cdiv(column_tiles, segment)
    row_parts = empty(scale, (segments, n) if sigmoid else (segments, 2, n))
    columns = own = None
    if not sigmoid:
        columns, own = empty(scale, (2, N)), empty(scale, n)
        if n == 0:  # which no launch would tell
            columns[0], columns[1] = -torch.inf, 0
    products = room_for_rows(scale, min(size, n), N, torch.float32) if cublas else None
    for start in range(0, n, size):
        chunk = slice(start, min(start + size, n))
        strips = cdiv(chunk.stop - start, config.blocks["BLOCK_M"])
        column_parts = None if sigmoid else empty(scale, (strips, 2, N))
        if products is not None:
            add_product(products[: chunk.stop - start], x.values[chunk], y.values.T, first=True)
        far = empty(scale, (segments, strips), dtype=torch.int32) if shared else None
        # A program of the second launch exits at once unless the first launch lost precision in its tile.
        for how, c in ((True, config), (False, careful)) if shared else ((False, config),):
            contrastive_statistics[(strips, segments)](
                x.values[chunk], y.values, products, x.inverse[chunk], y.inverse, scale, bias,
                row_parts[..., chunk], column_parts, None if own is None else own[chunk], far, x.values.stride(0), y.values.stride(0),
                0 if products is None else products.stride(0), n, chunk.stop - start, N, width, offset + start,
                segment * config.blocks["BLOCK_N"] // c.blocks["BLOCK_N"],
                SIGMOID=sigmoid, CUBLAS=cublas, SHARED=how, **c.options,
            )  # fmt: skip
        if column_parts is not None:
            _merge(column_parts, columns, first=start == 0, split=shared and chunk.stop == n, log=False)
    if sigmoid:
        return row_parts, None, None
    by_row = empty(scale, (2, n))
    _merge(row_parts, by_row, first=True, split=shared, log=True)
    return by_row, columns, own


def _on_the_same_places(config: Config, other: Config) -> Config:
    """`config` if its programs can cover the same tiles as those of `other`, else `other`."""
    same_rows = config.blocks["BLOCK_M"] == other.blocks["BLOCK_M"]
    return config if same_rows and other.blocks["BLOCK_N"] % config.blocks["BLOCK_N"] == 0 else other


def _merge(parts, state, *, first, split, log):
    size = parts.shape[2]
    if size:
        config = pick("contrastive_merge", "fp32")
        grid = (cdiv(size, config.blocks["BLOCK"]),)
        contrastive_merge[grid](parts, state, len(parts), size, FIRST=first, SPLIT=split, LOG=log, **config.options)


def backward(
    grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, r: Tensor, c: Tensor, kind: str,
    need_image: bool, need_text: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of all pairs' image, text, scale and bias; empty or 0 for what is not there or not needed."""
    weight, sides = as_dtype(grad_loss, torch.float32), c.unbind() if kind == "softmax" else None
    problem = _Backward(
        image, text, as_dtype(scale, torch.float32), None if bias is None else as_dtype(bias, torch.float32), kind == "sigmoid", 0,
        r, sides, weight, weight, need_image, need_text, share=1 / len(text), total=kind == "sigmoid",
    )  # fmt: skip
    grad_scale, grad_bias = empty(scale, ()), empty(scale if bias is None else bias, ())
    grad_image, grad_text = problem.gradients(grad_scale, grad_bias, text.dtype, True)
    return grad_image, grad_text, grad_scale, grad_bias


def backward_rows(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kind: str,
    offset: int,
    r: Tensor,
    c: list[Tensor] | None,
    row_weight: Tensor,
    column_weight: Tensor | None,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of image [n,D]; of text over these rows, for fixed norms, [N,D] float32; of scale and bias."""
    grad_scale, grad_bias = (empty(scale, (), dtype=torch.float64) for _ in range(2))
    if len(image) == 0:
        by_text = torch.zeros(text.shape, dtype=torch.float32, device=text.device) if need_text else None
        return torch.zeros_like(image) if need_image else None, by_text, grad_scale.zero_(), grad_bias.zero_()
    weights = row_weight if column_weight is None else column_weight
    problem = _Backward(
        image,
        text,
        scale,
        bias,
        kind == "sigmoid",
        offset,
        r,
        c,
        row_weight,
        weights,
        need_image,
        need_text,
        share=1.0,
        total=True,
    )
    grad_image, grad_text = problem.gradients(grad_scale, grad_bias, torch.float32, False)
    return grad_image if need_image else None, grad_text if need_text else None, grad_scale, grad_bias


def project(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x for fixed norms, [N,D] float32 -> the gradient of x."""
    grad = grad.contiguous()
    out = _result(grad, x, x.dtype)
    if out.numel():
        finish(Side(rows(x).tensor, grad, out), None, False)
    return out


class Side(NamedTuple):
    """What the last step needs of one side; see contrastive_project."""

    original: Tensor
    by: Tensor | None
    """The gradient of the original for fixed norms, before `error` and the factors."""
    out: Tensor | None
    """Where the gradient goes; None: not needed."""
    error: Tensor | None = None
    post: Tensor | None = None
    mean: Tensor | None = None


def finish(
    x: Side, y: Side | None, through: bool, *, scale: Tensor | None = None, facts: Tensor | None = None,
    sums: Tensor | None = None, scalars: tuple[Tensor | None, Tensor | None] = (None, None), GAIN: float = 1.0,
    TOTAL: bool = False, BIAS: bool = False,
) -> None:  # fmt: skip
    """Launches contrastive_project: both sides' gradients, of y through its norms or not, and from sums those of the scalars, scale and bias."""
    config = pick("contrastive_project", TYPES[x.original.dtype])
    described, programs = [], int(sums is not None)
    for side in (x, y):
        if side is None:
            described += [None, None, None, None, None, None, 0, 0]
            continue
        count = len(side.original)
        programs += 0 if side.out is None else cdiv(count, config.blocks["BLOCK_R"])
        described += [side.by, side.original, side.error, side.post, side.mean, side.out, side.original.stride(0), count]
    contrastive_project[(programs,)](
        *described, x.original.shape[1], scale, facts, sums, 0 if sums is None else sums.shape[1], *scalars,
        GAIN=GAIN, TOTAL=TOTAL, BIAS=BIAS, PROJECT_Y=through, **config.options,
    )  # fmt: skip


def _result(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the gradient of x goes: in grad's place, but a view of a larger sum would keep all of it alive."""
    in_place = dtype == grad.dtype and grad.untyped_storage().nbytes() == grad.nbytes
    return grad if in_place else empty(x, grad.shape, dtype=dtype)


@dataclass
class _Backward:
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    sigmoid: bool
    offset: int
    r: Tensor
    c: Sequence[Tensor] | None
    row_weight: Tensor
    column_weights: Tensor
    need_image: bool
    need_text: bool
    share: float
    """Factor of all weights."""
    total: bool
    """Whether the sum of the gradients by logits is wanted: that of all pairs' softmax is 0."""

    def __post_init__(self):
        self.x, self.y = _features(self.image, self.text, True)
        self.rounds = self.dtype != torch.float32
        self.gain = GAIN if self.dtype == torch.float16 else 1.0
        self._find_terms()

    @property
    def dtype(self):
        return self.x.values.dtype

    def _find_terms(self):
        """row_terms, column_terms and facts, and the means of both sides: see contrastive_terms."""
        n, N, config = len(self.image), len(self.text), pick("contrastive_terms", "fp32")
        self.facts, self.row_terms, self.column_terms = empty(self.scale, 6), None, None
        programs, c = 1, (None, None, 0)
        r = None if self.sigmoid else self.r if self.r.stride(1) == 1 else self.r.contiguous()
        if not self.sigmoid:
            self.row_terms, self.column_terms = empty(self.scale, (2, 2, n)), empty(self.scale, (2, 2, N))
            programs = cdiv(n, config.blocks["BLOCK"]) + cdiv(N, config.blocks["BLOCK"])
            c = *self.c, self.c[0].stride(0)
        if self.rounds:
            programs += 2 * cdiv(self.image.shape[1], config.blocks["BLOCK_D"])
        means = [
            part for side in (self.x, self.y) for part in (side.parts, side.mean, 0 if side.parts is None else len(side.parts))
        ]
        contrastive_terms[(programs,)](
            self.scale, self.row_weight, self.column_weights, self.column_weights.stride(0) if self.column_weights.ndim else 0,
            self.share, r, 0 if r is None else r.stride(0), *c, self.row_terms, self.column_terms, self.facts, *means,
            n, N, self.image.shape[1], SIGMOID=self.sigmoid, NEAR=self.rounds, **config.options,
        )  # fmt: skip

    def gradients(self, grad_scale, grad_bias, dtype, through):
        """The gradients of image and, in dtype and through its norms or not, of text; those of scale and bias are written."""
        cublas = schedule(len(self.image), self.image.shape[1], TYPES[self.dtype]) == "cublas"
        by_x, x_error, by_y, y_error, sums = self.chunked(cublas)
        grad_image = _result(by_x, self.image, self.image.dtype) if self.need_image else empty(self.image, 0)
        grad_text = _result(by_y, self.text, dtype) if self.need_text else empty(self.text, 0)
        sides = (
            Side(side.original, by, out if need else None, error, side.post, side.mean)
            for side, by, out, need, error in (
                (self.x, by_x, grad_image, self.need_image, x_error), (self.y, by_y, grad_text, self.need_text, y_error),
            )
        )  # fmt: skip
        finish(
            *sides, through, scale=self.scale, facts=self.facts, sums=sums, scalars=(grad_scale, grad_bias),
            GAIN=self.gain, TOTAL=self.total, BIAS=self.sigmoid,
        )  # fmt: skip
        return grad_image, grad_text

    def chunked(self, cublas):
        """(grad of x's rows, its rounding error, grad of y's rows, its rounding error, sums), with two cuBLAS products per chunk of gradients."""
        (n, width), N = self.x.values.shape, len(self.y.values)
        config = pick("contrastive_gradients", TYPES[self.dtype], "cublas" if cublas else "any")
        block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        size = min(cdiv(_chunk_rows(N), block_m) * block_m, n)
        tiles = cdiv(N, block_n)
        store = self.need_image or self.need_text
        products = room_for_rows(self.scale, size, N, torch.float32) if cublas else None
        room = products if cublas and not self.rounds else room_for_rows(self.scale, size if store else 0, N, self.dtype)
        by_x = empty(self.scale, (n, width)) if self.need_image else None
        by_y = empty(self.scale, (N, width)) if self.need_text else None
        x_error, y_error = (empty(self.scale, (n,)), empty(self.scale, (N,))) if self.rounds else (None, None)
        sums = empty(self.scale, (2 if self.total else 1, cdiv(n, block_m) * tiles), dtype=torch.float64)
        for start in range(0, n, size):
            chunk = slice(start, min(start + size, n))
            count = chunk.stop - start
            strips = cdiv(count, block_m)
            if products is not None:
                add_product(products[:count], self.x.values[chunk], self.y.values.T, first=True)
            row_part, column_part = (
                (empty(self.scale, (tiles, count)), empty(self.scale, (strips, N))) if self.rounds else (None, None)
            )
            row_terms = None if self.sigmoid else self.row_terms[..., chunk]
            contrastive_gradients[(strips, tiles)](
                self.x.values[chunk], self.y.values, products, self.x.inverse[chunk], self.y.inverse, self.x.norm[chunk], self.y.norm,
                self.bias, row_terms, self.column_terms, self.facts,
                room, row_part, column_part, sums[:, start // block_m * tiles :], sums.shape[1],
                self.x.values.stride(0), self.y.values.stride(0), 0 if products is None else products.stride(0), room.stride(0),
                0 if row_terms is None else row_terms.stride(1), count, N, width, self.offset + start,
                GAIN=self.gain, SIGMOID=self.sigmoid, TOTAL=self.total, CUBLAS=cublas, STORE=store, **config.options,
            )  # fmt: skip
            if self.rounds and store:
                _add_errors(row_part, x_error[chunk], column_part, y_error, start == 0)
            if self.need_image:
                add_product(by_x[chunk], room[:count], self.y.values, first=True)
            if self.need_text:
                add_product(by_y, room[:count].T, self.x.values[chunk], first=start == 0)
        return by_x, x_error, by_y, y_error, sums


def _add_errors(row_parts, row_error, column_parts, column_error, first):
    config = pick("contrastive_errors", "fp32")
    blocks = sum(cdiv(parts.shape[1], config.blocks["BLOCK"]) for parts in (row_parts, column_parts))
    contrastive_errors[(blocks,)](
        row_parts, row_error, *row_parts.shape, column_parts, column_error, *column_parts.shape, FIRST=first, **config.options
    )


def _chunk_rows(columns: int) -> int:
    return max(1, CHUNK_PAIRS // max(columns, 1))
