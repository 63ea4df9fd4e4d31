"""Lays out patch_embed's arguments for csrc/cpu/patch_embed.cpp."""

import torch

from .. import _dispatch
from . import dense, empty, missing, pointer, refuses, rows, run, unit_stride


def _sizes(latents, weight, patch_size, moments):
    """B, C, p, h, w, D."""
    batch, channels, height, width = latents.shape
    return batch, channels // 2 if moments else channels, patch_size, height // patch_size, width // patch_size, weight.shape[0]


def _forward(latents, weight, bias, pos_embed, cls_token, rng, patch_size, scale, shift, moments):
    latents, weight = unit_stride(latents), rows(weight)
    batch, _, _, h, w, width = sizes = _sizes(latents, weight, patch_size, moments)
    y = empty(weight, (batch, h * w + (cls_token is not None), width))
    run(
        "patch_embed_forward", weight.dtype, latents, *latents.stride()[:3], latents.dtype == torch.float32, weight, weight.stride(0),
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
    shapes = latents.shape, weight.shape, width, grad_y.shape[1:], width
    grads = tuple(empty(like, shape, need) for like, shape, need in zip(likes, shapes, needs, strict=True))
    run(
        "patch_embed_backward", weight.dtype, grad_y, *grad_y.stride()[:2], grad_y.shape[1] > h * w,
        latents, *latents.stride()[:3], latents.dtype == torch.float32, weight, weight.stride(0), dense(rng),
        float(scale), float(shift), moments, *map(pointer, grads, needs), *sizes,
    )  # fmt: skip
    return grads


def _refuses(latents, weight, *_):
    return refuses(latents, weight)


_dispatch.register(
    "patch_embed", "cpu", _forward, _backward, missing=missing,
    refuses=_refuses, refuses_backward=lambda grad_y, *forward: _refuses(*forward),
)  # fmt: skip
