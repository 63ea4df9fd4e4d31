"""Lays out contrastive_loss's arguments for csrc/cpu/contrastive_loss.cpp; the ranks are the operator's own."""

import torch

from ...kernels.contrastive.config import FEW
from .. import _choice, _dispatch
from ..contrastive_loss import over_ranks
from . import Kernel, pointer, rows, unavailable_reason, unsupported_reason, wide

FORWARD = Kernel(
    "contrastive_loss_forward",
    "T* x, int64_t x_stride, T* y, int64_t y_stride, float* scale, float* bias, int64_t sigmoid, int64_t offset, "
    "float* rows, float* columns, float* own, int64_t n, int64_t N, int64_t D",
)
BACKWARD = Kernel(
    "contrastive_loss_backward",
    "T* x, int64_t x_stride, T* y, int64_t y_stride, float* scale, float* bias, int64_t sigmoid, int64_t offset, float* r, "
    "float* c_max, float* c_log, float* row_weight, float* column_weight, T* grad_x, float* grad_y, double* grad_scale, "
    "double* grad_bias, int64_t n, int64_t N, int64_t D",
)
PROJECT = Kernel(
    "contrastive_loss_project",
    "float* grad, T* x, int64_t x_stride, T* out, int64_t R, int64_t D",
)


def _operands(image, text):
    """image and text as the kernels take them."""
    if image.dtype == torch.bfloat16 and len(text) <= FEW:
        image, text = image.float(), text.float()
    return rows(image), rows(text)


def _forward_rows(image, text, scale, bias, kind, offset):
    image, text = _operands(image, text)
    softmax = kind == "softmax"
    lse = scale.new_empty((2, len(image)) if softmax else len(image))
    columns, own = (scale.new_empty(2, len(text)), scale.new_empty(len(image))) if softmax else (None, None)
    FORWARD(
        image.dtype, image, image.stride(0), text, text.stride(0), scale, bias,
        not softmax, offset, lse, columns, own, len(image), *text.shape,
    )  # fmt: skip
    return lse, columns, own


def _backward_rows(image, text, scale, bias, kind, offset, r, c, row_weight, column_weight, need_image, need_text):
    dtype = image.dtype
    image, text = _operands(image, text)
    c_max, c_log = (None, None) if c is None else map(wide, c)
    grad_image = torch.empty_like(image, memory_format=torch.contiguous_format) if need_image else None
    grad_text = None
    if need_text:
        # The first rows write it, so there have to be some.
        grad_text = (torch.empty if len(image) else torch.zeros)(text.shape, dtype=torch.float32)
    grad_scale, grad_bias = (torch.empty((), dtype=torch.float64) for _ in range(2))
    BACKWARD(
        image.dtype, image, image.stride(0), text, text.stride(0), scale, bias,
        kind == "sigmoid", offset, wide(r), c_max, c_log, row_weight, wide(column_weight),
        pointer(grad_image, need_image), pointer(grad_text, need_text), grad_scale, grad_bias, len(image), *text.shape,
    )  # fmt: skip
    return None if grad_image is None else grad_image.to(dtype), grad_text, grad_scale, grad_bias


def _project(grad, x):
    x_ND = rows(x)
    # A rank's part of a larger sum would keep all of it alive.
    in_place = x.dtype == grad.dtype and grad.untyped_storage().nbytes() == grad.nbytes
    out = grad if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
    PROJECT(x.dtype, grad, x_ND, x_ND.stride(0), out, *x.shape)
    return out


_dispatch.register(
    "contrastive_loss", "cpu", *over_ranks(_forward_rows, _backward_rows, _project), operands=("image", "text"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence("contrastive_loss"),
)  # fmt: skip
