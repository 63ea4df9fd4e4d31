"""The linear layer: cuBLAS (hipBLASLt) where it is best, or a tiled product with the bias in its epilogue where cuBLAS would need a copy.

dW sums over all rows into a small matrix, for which cuBLAS splits K; y and dx are plain products of large matrices. cuBLAS is deterministic on a single
stream. db comes from column_sums; as a product with ones it would take another pass over dy. A small call's products are ours: one launch each way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .lib import gemm
from .lib.common import TYPES, cdiv, rounded
from .lib.config import TABLE, pick
from .lib.gemm import gradient_rows, input_tile, multiply, product_rows, square, tile_position, weight_tile
from .lib.launch import kernel
from .lib.reduce import column_sums
from .lib.rows import Rows, as_dtype, empty, row_offsets, rows

# Size classes: those of mlp.
TABLE["linear"] = product_rows(square(32), square(64), square(64))
TABLE["linear_gradients"] = gradient_rows()


@kernel
def _linear(
    x, x_inner, x_outer_stride, x_inner_stride, weight, weight_stride, bias, y, rows, columns, depth,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x weight^T + bias if TRANSPOSED (weight [columns, depth]), else x weight + bias."""
    m, n = tile_position(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row, column = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = row_offsets(tl.minimum(row, rows - 1), x_inner, x_outer_stride, x_inner_stride)
    existing = tl.minimum(column, columns - 1) if TRANSPOSED else column
    total = multiply(x, x_at, weight, weight_stride, existing, columns, depth, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K)
    if bias is not None:
        total += tl.load(bias + column, mask=column < columns, other=0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y + at, rounded(total, y.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@kernel
def _linear_gradients(
    grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, x, x_inner, x_outer_stride, x_inner_stride, weight, weight_stride,
    grad_x, grad_weight, grad_bias, rows, features, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dx or dW per program; None for what is not needed."""
    tile = tl.program_id(0)
    of_x = tl.cdiv(rows, BLOCK_M) * tl.cdiv(width, BLOCK_N) if grad_x is not None else 0
    if grad_x is not None and tile < of_x:
        input_tile(
            grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, weight, weight_stride, grad_x, tile, rows, features, width,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif grad_weight is not None or grad_bias is not None:
        weight_tile(
            grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, x, x_inner, x_outer_stride, x_inner_stride,
            grad_weight, grad_bias, tile - of_x, rows, features, width, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def is_small(x: Rows, features: int) -> bool:
    """Whether the products of forward and backward are ours."""
    return gemm.is_small(x.tensor.dtype, 6 * x.count * x.width * features, x.count, x.width, features)


def forward(x, weight, bias):
    """x [..., K], weight [N, K], bias [N] or None -> [..., N]; parameters of x's dtype or float32."""
    return (tiled if is_small(rows(x), weight.shape[0]) else large)(x, weight, bias)


def large(x, weight, bias):
    """`forward` by cuBLAS, or by our product where cuBLAS would need a copy."""
    x_rows, shape = rows(x), (*x.shape[:-1], weight.shape[0])
    if not gemm.cublas_is_better(x_rows, weight):
        return tiled(x, weight, bias)
    # PyTorch flattens three contiguous axes itself, without the host time of two views.
    x_2d_or_3d = x if x.ndim == 3 and x.is_contiguous() else x_rows.matrix
    return F.linear(x_2d_or_3d, as_dtype(weight, x.dtype), None if bias is None else as_dtype(bias, x.dtype)).view(shape)


def tiled(x, weight, bias):
    """`forward` by our product."""
    return _product(rows(x), weight, bias, weight.shape[0], True).view(*x.shape[:-1], weight.shape[0])


def input_gradient(grad_y: Rows, weight: Tensor) -> Tensor:
    """dy W, [R, K]."""
    if gemm.cublas_is_better(grad_y, weight):
        return torch.mm(grad_y.matrix, as_dtype(weight, grad_y.tensor.dtype))
    return _product(grad_y, weight, None, weight.shape[1], False)


def weight_gradient(grad_y: Rows, x: Rows, dtype: torch.dtype) -> Tensor:
    """dy^T x, [N, K], in `dtype`: directly from the float32 accumulators if cuBLAS supports it."""
    left, right = grad_y.matrix.t(), x.matrix
    if dtype == right.dtype or not right.is_cuda or torch.version.hip or left.numel() == 0 or right.numel() == 0:
        return as_dtype(torch.mm(left, right), dtype)
    return torch.mm(left, right, out_dtype=dtype)


def backward(grad_y, x, weight, need_x, need_weight, need_bias):
    """Gradients of x, weight and bias (in weight's dtype); empty tensors for those not needed."""
    grad_rows = rows(grad_y)
    if is_small(x_rows := rows(x), grad_rows.width):
        return small_gradients(grad_rows, x_rows, weight, need_x, need_weight, need_bias)
    return (
        input_gradient(grad_rows, weight).view(x.shape) if need_x else empty(x, 0),
        weight_gradient(grad_rows, x_rows, weight.dtype) if need_weight else empty(weight, 0),
        column_sums(grad_rows, weight.dtype) if need_bias else empty(weight, 0),
    )


def small_gradients(
    grad: Rows, x: Rows, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """`backward` in one launch, the gradients in `dtype` if given. x is only read for the weight's gradient."""
    grads = (
        empty(x.tensor, x.tensor.shape, need_x, dtype), empty(weight, weight.shape, need_weight, dtype),
        empty(weight, grad.width, need_bias, dtype),
    )  # fmt: skip
    operand, config = gemm.operand(weight, grad), pick("linear_gradients", TYPES[grad.tensor.dtype])
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    tall = need_x * cdiv(grad.count, block_m) + (need_weight or need_bias) * cdiv(grad.width, block_m)
    if tall:
        _linear_gradients[(tall * cdiv(x.width, block_n),)](
            *grad.arguments, *x.arguments, operand, operand.stride(0),
            *(made if need else None for made, need in zip(grads, (need_x, need_weight, need_bias), strict=True)),
            grad.count, grad.width, x.width, **config.options,
        )  # fmt: skip
    return grads


def _product(x: Rows, weight: Tensor, bias: Tensor | None, columns: int, transposed: bool) -> Tensor:
    y = empty(x.tensor, (x.count, columns))
    if y.numel():
        weight = gemm.operand(weight, x)
        bias = None if bias is None else bias.contiguous()
        config, grid = gemm.configure("linear", x.tensor.dtype, x.count, columns)
        _linear[grid](
            *x.arguments, weight, weight.stride(0), bias, y, x.count, columns, x.width, TRANSPOSED=transposed, **config.options
        )
    return y
