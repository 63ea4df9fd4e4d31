"""Lays out patch_embed's arguments for csrc/cpu/patch_embed.cpp."""

import torch

from .. import _choice, _dispatch
from . import Kernel, dense, empty, pointer, rows, unavailable_reason, unit_stride, unsupported_reason

FORWARD = Kernel(
    "patch_embed_forward",
    "void* latents, int64_t batch_stride, int64_t channel_stride, int64_t line_stride, int64_t is_wide, T* w, "
    "int64_t w_stride, T* bias, T* pos, T* cls, int64_t* rng, double scale, double shift, int64_t moments, T* y, int64_t B, "
    "int64_t C, int64_t p, int64_t h, int64_t wide, int64_t D",
)
BACKWARD = Kernel(
    "patch_embed_backward",
    "T* grad_y, int64_t grad_batch_stride, int64_t grad_row_stride, int64_t has_cls, void* latents, int64_t batch_stride, "
    "int64_t channel_stride, int64_t line_stride, int64_t is_wide, T* w, int64_t w_stride, int64_t* rng, double scale, "
    "double shift, int64_t moments, void* grad_latents, T* grad_w, T* grad_bias, T* grad_pos, T* grad_cls, int64_t B, "
    "int64_t C, int64_t p, int64_t h, int64_t wide, int64_t D",
)


def _sizes(latents, weight, patch_size, moments):
    """B, C, p, h, w, D."""
    batch, channels, height, width = latents.shape
    return batch, channels // 2 if moments else channels, patch_size, height // patch_size, width // patch_size, weight.shape[0]


def _forward(latents, weight, bias, pos_embed, cls_token, rng, patch_size, scale, shift, moments):
    latents, weight = unit_stride(latents), rows(weight)
    batch, _, _, h, w, width = sizes = _sizes(latents, weight, patch_size, moments)
    y = empty(weight, (batch, h * w + (cls_token is not None), width))
    FORWARD(
        weight.dtype, latents, *latents.stride()[:3], latents.dtype == torch.float32, weight, weight.stride(0),
        dense(bias), dense(pos_embed), dense(cls_token), dense(rng), float(scale), float(shift), moments, y, *sizes,
    )  # fmt: skip
    return y


def _backward(
    grad_y, latents, weight, rng, patch_size, scale, shift, moments, need_latents, need_weight, need_bias, need_pos, need_cls
):
    grad_y, latents, weight = unit_stride(grad_y), unit_stride(latents), rows(weight)
    _, _, _, h, w, width = sizes = _sizes(latents, weight, patch_size, moments)
    needs = need_latents, need_weight, need_bias, need_pos, need_cls
    likes = latents if need_latents else grad_y, grad_y, grad_y, grad_y, grad_y
    shapes = latents.shape, weight.shape, (width,), grad_y.shape[1:], (width,)
    grads = tuple(empty(like, shape, need) for like, shape, need in zip(likes, shapes, needs, strict=True))
    BACKWARD(
        weight.dtype, grad_y, *grad_y.stride()[:2], grad_y.shape[1] > h * w,
        latents, *latents.stride()[:3], latents.dtype == torch.float32, weight, weight.stride(0), dense(rng),
        float(scale), float(shift), moments, *map(pointer, grads, needs), *sizes,
    )  # fmt: skip
    return grads


_dispatch.register(
    "patch_embed", "cpu", _forward, _backward, operands=("latents", "weight"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence("patch_embed"),
)  # fmt: skip
