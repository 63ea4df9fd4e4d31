"""Lays out noise_projection's arguments for csrc/cpu/noise_projection.cpp."""

from .. import _dispatch
from . import dense, empty, missing, pointer, refuses, rows, run, unit_stride, wide


def _instances(z):
    """[B, ..., K] -> [B, N, K] whose last axis is contiguous."""
    return unit_stride(z.reshape(z.shape[0], z.shape[1:-1].numel(), z.shape[-1]))


def _forward(z, sigma, weight, bias, rng):
    z_BNK, weight = _instances(z), rows(weight)
    y = empty(z, (*z.shape[:-1], weight.shape[0]))
    run(
        "noise_projection_forward", z.dtype, z_BNK, z_BNK.stride(0), z_BNK.stride(1), wide(sigma), weight, weight.stride(0),
        dense(bias), rng.contiguous(), y, *z_BNK.shape, weight.shape[0],
    )  # fmt: skip
    return y


def _backward(grad_y, z, sigma, weight, rng, need_z, need_sigma, need_weight, need_bias):
    z_BNK, grad_RD, weight = _instances(z), rows(grad_y), rows(weight)
    grad_z, grad_weight = empty(z, z.shape, need_z), empty(z, weight.shape, need_weight)
    grad_bias = empty(z, weight.shape[0], need_bias)
    wide_sigma = wide(sigma)
    grad_sigma = empty(wide_sigma, sigma.shape, need_sigma)
    run(
        "noise_projection_backward", z.dtype, grad_RD, grad_RD.stride(0), z_BNK, z_BNK.stride(0), z_BNK.stride(1), wide_sigma,
        weight, weight.stride(0), rng.contiguous(), pointer(grad_z, need_z), pointer(grad_sigma, need_sigma),
        pointer(grad_weight, need_weight), pointer(grad_bias, need_bias), *z_BNK.shape, weight.shape[0],
    )  # fmt: skip
    return grad_z, grad_sigma.to(sigma.dtype if need_sigma else z.dtype), grad_weight, grad_bias


_dispatch.register(
    "noise_projection", "cpu", _forward, _backward, missing=missing,
    refuses=lambda z, *_: refuses(z),
    refuses_backward=lambda grad_y, z, *_: refuses(z),
)  # fmt: skip
