"""Lays out latent_projection's arguments for csrc/cpu/latent_projection.cpp."""

from .. import _choice, _dispatch
from . import Kernel, dense, empty, pointer, rows, unavailable_reason, unit_stride, unsupported_reason

FORWARD = Kernel(
    "latent_projection_forward",
    "T* tokens, int64_t batch_stride, int64_t row_stride, T* w, int64_t w_stride, T* bias, T* x, int64_t B, int64_t C, "
    "int64_t p, int64_t h, int64_t wide, int64_t D",
)
BACKWARD = Kernel(
    "latent_projection_backward",
    "T* grad_x, int64_t x_batch_stride, int64_t channel_stride, int64_t line_stride, T* tokens, int64_t batch_stride, "
    "int64_t row_stride, T* w, int64_t w_stride, T* grad_tokens, T* grad_w, T* grad_bias, int64_t B, int64_t C, int64_t p, "
    "int64_t h, int64_t wide, int64_t D",
)


def _forward(tokens, weight, bias, patch_size, grid_h, grid_w):
    tokens, weight = unit_stride(tokens), rows(weight)
    channels = weight.shape[0] // patch_size**2
    x = empty(tokens, (tokens.shape[0], channels, grid_h * patch_size, grid_w * patch_size))
    FORWARD(
        tokens.dtype, tokens, *tokens.stride()[:2], weight, weight.stride(0),
        dense(bias), x, tokens.shape[0], channels, patch_size, grid_h, grid_w, tokens.shape[2],
    )  # fmt: skip
    return x


def _backward(grad_x, tokens, weight, patch_size, need_tokens, need_weight, need_bias):
    grad_x, tokens, weight = unit_stride(grad_x), unit_stride(tokens), rows(weight)
    batch, channels, height, width = grad_x.shape
    needs = need_tokens, need_weight, need_bias
    shapes = tokens.shape, weight.shape, weight.shape[:1]
    grads = tuple(empty(grad_x, shape, need) for shape, need in zip(shapes, needs, strict=True))
    BACKWARD(
        grad_x.dtype, grad_x, *grad_x.stride()[:3], tokens, *tokens.stride()[:2],
        weight, weight.stride(0), *map(pointer, grads, needs),
        batch, channels, patch_size, height // patch_size, width // patch_size, tokens.shape[2],
    )  # fmt: skip
    return grads


_dispatch.register(
    "latent_projection", "cpu", _forward, _backward, operands=("tokens", "weight"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence("latent_projection"),
)  # fmt: skip
