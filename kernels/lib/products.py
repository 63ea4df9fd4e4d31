"""cuBLAS products through PyTorch, with float32 results."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b if `first`, else total += a b; a [M,K] and b [K,N] of one dtype, total [M,N] float32 or of that dtype."""
    if a.dtype != total.dtype:
        if a.is_cuda and torch.version.hip is None:
            if first:
                torch.mm(a, b, out_dtype=total.dtype, out=total)
            else:
                torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
            return
        # Other backends of PyTorch round every product of 16-bit operands to 16 bits.
        a, b = a.to(total.dtype), b.to(total.dtype)
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def room_for_rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised [rows, columns] matrix whose rows start at multiples of 16 elements; the padding is zeroed where products read it."""
    padded = (rows, -(-columns // 16) * 16)
    room = like.new_zeros(padded, dtype=dtype) if _padding_is_read(like) else like.new_empty(padded, dtype=dtype)
    return room[:, :columns]


def _padding_is_read(x: Tensor) -> bool:
    """On a CPU with AMX, PyTorch's 16-bit products multiply the padding by 0, and a NaN there would propagate."""
    return x.device.type == "cpu"
