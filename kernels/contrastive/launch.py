"""contrastive_loss: schedules, and the launches of the kernels in tiles.py and rows.py, with the signatures of the operator's `_forward_rows`.

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

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lib.common import TYPES, cdiv
from ..lib.config import Config, pick
from ..lib.products import add_product, room_for_rows
from .config import FEW, GAIN, SCHEDULES
from .rows import contrastive_features, contrastive_merge, contrastive_project
from .tiles import REACH, contrastive_gradients, contrastive_statistics

CHUNK_PAIRS = 2**26
LN_2 = math.log(2)
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
    """Rows as the kernels multiply them, with the factors that turn products into cosines, and gradients into those of the original rows."""

    values: Tensor
    norm: Tensor
    inverse: Tensor
    """1 / norm, or ones for unit rows."""
    post: Tensor
    """Factor of the rows' gradients, for fixed norms."""
    mean: Tensor | None
    """Mean of the unit rows, if gradients are rounded."""


def _features(x: Tensor, units: bool, for_gradients: bool = False) -> Features:
    """x [rows, D] as float32 rows of norm 1 if `units`; else x itself or, for float16 gradients, x times powers of two."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 or width <= 1 else x.contiguous()
    post = None
    if for_gradients and x.dtype == torch.float16 and not units:
        wide = x.float()
        post = torch.exp2(-torch.frexp(torch.linalg.vector_norm(wide, dim=1)).exponent.float())
        x = (wide * post[:, None]).half()
    config = pick("contrastive_features", TYPES[x.dtype])
    programs = cdiv(rows, config.blocks["BLOCK_R"])
    norm, inverse = x.new_empty((2, rows), dtype=torch.float32)
    values = x.new_empty((rows, width), dtype=torch.float32) if units else x
    parts = norm if units else norm.new_empty((programs, width))
    if rows:
        contrastive_features[(programs,)](
            x, values, norm, inverse, parts, x.stride(0), rows, width, UNITS=units, **config.options
        )
    if units:
        ones = torch.ones_like(norm)
        return Features(values, ones, ones, inverse, None)
    # PyTorch sums along an axis in an order that depends on the shape alone.
    mean = parts.sum(0) / max(rows, 1) if for_gradients else None
    return Features(values, norm, inverse, torch.ones_like(norm) if post is None else post, mean)


def _as_units(image: Tensor, text: Tensor) -> bool:
    return image.dtype == torch.float32 or len(text) <= FEW


def _shift(scale: Tensor) -> Tensor:
    """Bitwise equal to `shift_of` in the kernels."""
    return (scale.abs() - REACH.value).clamp_min(0)


def _split_off_powers(state: Tensor) -> Tensor:
    """(shift, sum) [2, size] -> (shift + k log 2, sum / 2^k) with sums in [1/2, 1), whose logarithm loses no precision.

    `_powers` recovers k. Sums relative to a maximum are unchanged: they are at least 1, and their shift is exactly a logit.
    """
    mantissa, exponent = torch.frexp(state[1])
    return torch.stack([state[0] + exponent * LN_2, mantissa])


def _powers(shift: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """2^-k of the powers split off, and whether all `shifts` derive from this shift."""
    exponent = torch.round((shifts - shift) / LN_2)
    return torch.exp2(-exponent), ((shift + exponent * LN_2 == shifts) & (exponent.abs() < 122)).all()


def forward_rows(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, offset: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """image [n,D], text [N,D] -> rows [2,n] (shift, log-sum), columns [2,N] (shift, sum), own [n]; sigmoid: rows [n], None, None."""
    (n, width), N = image.shape, len(text)
    sigmoid, units = kind == "sigmoid", _as_units(image, text)
    x, y = _features(image, units), _features(text, units)
    dtype = TYPES[x.values.dtype]
    cublas = schedule(n, width, dtype) == "cublas"
    shared = not (sigmoid or units or cublas)
    config = pick("contrastive_statistics", dtype, "cublas" if cublas else "any" if shared or sigmoid else "maxima")
    careful = _on_the_same_places(pick("contrastive_statistics", dtype, "maxima"), config) if shared else config
    column_tiles = cdiv(N, config.blocks["BLOCK_N"])
    size = min(STRIPS * config.blocks["BLOCK_M"], _chunk_rows(N) if cublas else n) or 1
    segment = cdiv(max(column_tiles, 1), max(1, PROGRAMS // cdiv(size, config.blocks["BLOCK_M"])))
    segments = cdiv(column_tiles, segment)
    row_parts = scale.new_empty((segments, n) if sigmoid else (segments, 2, n))
    columns = torch.stack([scale.new_full((N,), -torch.inf), scale.new_zeros(N)])
    own = scale.new_empty(n)
    bias = torch.zeros_like(scale) if bias is None else bias
    products = room_for_rows(scale, min(size, n), N, torch.float32) if cublas else scale
    for start in range(0, n, size):
        chunk = slice(start, min(start + size, n))
        strips = cdiv(chunk.stop - start, config.blocks["BLOCK_M"])
        column_parts = scale.new_empty(0 if sigmoid else (strips, 2, N))
        if cublas:
            add_product(products[: chunk.stop - start], x.values[chunk], y.values.T, first=True)
        far = torch.empty(segments, strips, dtype=torch.int32, device=scale.device) if shared else None
        # A program of the second launch exits at once unless the first launch lost precision in its tile.
        for how, c in ((True, config), (False, careful)) if shared else ((False, config),):
            contrastive_statistics[(strips, segments)](
                x.values[chunk], y.values, products, x.inverse[chunk], y.inverse, scale, bias,
                row_parts[..., chunk], column_parts, own[chunk], far, x.values.stride(0), y.values.stride(0),
                products.stride(0) if cublas else 0, n, chunk.stop - start, N, width, offset + start,
                segment * config.blocks["BLOCK_N"] // c.blocks["BLOCK_N"],
                SIGMOID=sigmoid, CUBLAS=cublas, SHARED=how, **c.options,
            )  # fmt: skip
        if not sigmoid:
            _merge(column_parts, columns, first=start == 0, log=False)
    if sigmoid:
        return row_parts.sum(0), None, None
    rows = scale.new_empty((2, n))
    _merge(row_parts, rows, first=True, log=not shared)
    if shared:
        rows, columns = _split_off_powers(rows), _split_off_powers(columns)
        rows[1].log_()
    return rows, columns, own


def _on_the_same_places(config: Config, other: Config) -> Config:
    """`config` if its programs can cover the same tiles as those of `other`, else `other`."""
    same_rows = config.blocks["BLOCK_M"] == other.blocks["BLOCK_M"]
    return config if same_rows and other.blocks["BLOCK_N"] % config.blocks["BLOCK_N"] == 0 else other


def _merge(parts, state, *, first, log):
    size = parts.shape[2]
    if size:
        config = pick("contrastive_merge", "fp32")
        grid = (cdiv(size, config.blocks["BLOCK"]),)
        contrastive_merge[grid](parts, state, len(parts), size, FIRST=first, LOG=log, **config.options)


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
    n, width = image.shape
    if n == 0:
        zero = torch.zeros((), dtype=torch.float64, device=image.device)
        by_text = torch.zeros(text.shape, dtype=torch.float32, device=text.device) if need_text else None
        return torch.zeros_like(image) if need_image else None, by_text, zero, zero.clone()
    units = _as_units(image, text)
    problem = _Backward(
        x=_features(image, units, True), y=_features(text, units, True), scale=scale,
        bias=torch.zeros_like(scale) if bias is None else bias, sigmoid=kind == "sigmoid", offset=offset,
        r=r, c=c, weights=_Weights.of(row_weight, column_weight), need_image=need_image, need_text=need_text,
    )  # fmt: skip
    name = schedule(n, width, TYPES[problem.dtype])
    by_x, x_error, by_y, y_error, sums = problem.chunked(name == "cublas")
    # PyTorch sums along an axis in an order that depends on the shape alone.
    sums = sums.sum(1) * problem.weights.unit
    by_scale = sums[0] + problem.center * sums[1] if problem.total else sums[0]
    factor = (scale * problem.weights.unit / problem.gain).reshape(1)
    grad_image = _project(by_x, image, problem.x, x_error, problem.y.mean, factor, True, image.dtype) if need_image else None
    grad_text = _project(by_y, text, problem.y, y_error, problem.x.mean, factor, False, torch.float32) if need_text else None
    return grad_image, grad_text, by_scale, sums[1] if problem.sigmoid else torch.zeros_like(by_scale)


def project(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x for fixed norms, [N,D] float32 -> the gradient of x."""
    return _project(grad.contiguous(), x, None, None, None, None, True, x.dtype)


def _project(grad, original, features, error, mean, factor, through_norm, dtype):
    rows, width = original.shape
    original = original if original.stride(1) == 1 or width <= 1 else original.contiguous()
    # A view of a larger sum would keep all of it alive.
    in_place = dtype == grad.dtype and grad.untyped_storage().nbytes() == grad.nbytes
    out = grad if in_place else torch.empty_like(grad, dtype=dtype)
    config = pick("contrastive_project", TYPES[original.dtype])
    if out.numel():
        contrastive_project[(cdiv(rows, config.blocks["BLOCK_R"]),)](
            grad, original, error, mean, factor, None if features is None else features.post, out, original.stride(0),
            rows, width, COMPLETE=features is not None, ROUNDED=error is not None, PROJECT=through_norm, **config.options,
        )  # fmt: skip
    return out


@dataclass
class _Weights:
    """The loss's weights of the rows (a scalar) and columns, as multiples of `unit`."""

    unit: Tensor
    row: Tensor
    column: Tensor

    @staticmethod
    def of(row: Tensor, column: Tensor | None) -> _Weights:
        column = row.reshape(1) if column is None else column
        unit = torch.maximum(row.abs(), column.abs().amax())
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))
        return _Weights(unit, row.reshape(1) / unit, (column / unit).contiguous())


def _terms(r: Tensor, c: list[Tensor], weights: _Weights, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Row terms [2, 2, n], column terms [2, 2, N] and the number of terms, for `contrastive_gradients`.

    One term if the forward took all exponentials relative to this shift, else one for the rows and one for the columns.
    """
    row, column = (torch.exp(-x[1]) * (0.5 * weight) for x, weight in ((r, weights.row), (c, weights.column)))
    no_row, no_column = torch.zeros_like(row), torch.zeros_like(column)
    rows, columns = [r[0], row, no_row, no_row], [no_column, no_column, c[0], column]
    count = row.new_full((), 2, dtype=torch.int32)
    if shift is not None:
        (row_powers, rows_near), (column_powers, columns_near) = (_powers(shift, x[0]) for x in (r, c))
        near = rows_near & columns_near
        rows[:2] = torch.where(near, shift, r[0]), torch.where(near, row * row_powers, row)
        columns[1] = torch.where(near, column * column_powers, no_column)
        count = torch.where(near, 1, 2).int()
    return torch.stack(rows).view(2, 2, -1), torch.stack(columns).view(2, 2, -1), count


@dataclass
class _Backward:
    x: Features
    y: Features
    scale: Tensor
    bias: Tensor
    sigmoid: bool
    offset: int
    r: Tensor
    c: list[Tensor] | None
    weights: _Weights
    need_image: bool
    need_text: bool

    def __post_init__(self):
        self.rounds = self.dtype != torch.float32
        self.gain = GAIN if self.dtype == torch.float16 else 1.0
        # The softmax's gradients cancel, over all rows to 0. Rounding leaves a residue, which would be weighted by a cosine, mostly that of a
        # row's best column; so the mean of those cosines is subtracted first.
        self.total = self.sigmoid or len(self.x.values) < len(self.y.values)
        self.center = torch.zeros_like(self.scale)
        if not self.sigmoid:
            self.center = torch.where(self.scale == 0, self.center, self.r[0].mean() / self.scale)
        unused = self.scale.reshape(1, 1, 1)
        shift = _shift(self.scale) if self.rounds else None
        self.rows, self.columns, self.terms = (
            (unused, unused, unused) if self.sigmoid else _terms(self.r, self.c, self.weights, shift)
        )

    @property
    def dtype(self):
        return self.x.values.dtype

    def chunked(self, cublas):
        """(grad of x's rows, its rounding error, grad of y's rows, its rounding error, sums), with two cuBLAS products per chunk of gradients."""
        (n, width), N = self.x.values.shape, len(self.y.values)
        config = pick("contrastive_gradients", TYPES[self.dtype], "cublas" if cublas else "any")
        block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        size = min(cdiv(_chunk_rows(N), block_m) * block_m, n)
        tiles = cdiv(N, block_n)
        new = self.scale.new_empty
        store = self.need_image or self.need_text
        products = room_for_rows(self.scale, size, N, torch.float32) if cublas else self.scale.reshape(1, 1)
        room = products if cublas and not self.rounds else room_for_rows(self.scale, size if store else 0, N, self.dtype)
        by_x = new((n, width)) if self.need_image else None
        by_y = new((N, width)) if self.need_text else None
        row_error = new(n) if self.rounds else None
        column_error = self.scale.new_zeros(N) if self.rounds else None
        sums = self.scale.new_zeros((2 if self.total else 1, 1), dtype=torch.float64)
        for start in range(0, n, size):
            chunk = slice(start, min(start + size, n))
            rows = chunk.stop - start
            strips = cdiv(rows, block_m)
            if cublas:
                add_product(products[:rows], self.x.values[chunk], self.y.values.T, first=True)
            part_sums = sums.new_empty((len(sums), strips * tiles))
            row_part, column_part = (new((tiles, rows)), new((strips, N))) if self.rounds else (self.scale, self.scale)
            row_terms = self.rows if self.sigmoid else self.rows[..., chunk]
            contrastive_gradients[(strips, tiles)](
                self.x.values[chunk], self.y.values, products, self.x.inverse[chunk], self.y.inverse, self.x.norm[chunk], self.y.norm,
                self.scale, self.bias, row_terms, self.columns, self.terms, self.weights.row, self.center,
                room, row_part, column_part, part_sums,
                self.x.values.stride(0), self.y.values.stride(0), products.stride(0), room.stride(0), row_terms.stride(1), rows, N, width,
                self.offset + start,
                GAIN=self.gain, SIGMOID=self.sigmoid, TOTAL=self.total, CUBLAS=cublas, STORE=store, **config.options,
            )  # fmt: skip
            sums += part_sums.sum(1, keepdim=True)
            if self.rounds and store:
                row_error[chunk] = row_part.sum(0)
                column_error += column_part.sum(0)
            if self.need_image:
                add_product(by_x[chunk], room[:rows], self.y.values, first=True)
            if self.need_text:
                add_product(by_y, room[:rows].T, self.x.values[chunk], first=start == 0)
        return by_x, row_error, by_y, column_error, sums


def _chunk_rows(columns: int) -> int:
    return max(1, CHUNK_PAIRS // max(columns, 1))
