"""Lays out noise_projection's arguments for csrc/cpu/noise_projection.cpp."""

from .. import _choice, _dispatch
from . import Kernel, dense, empty, empty_like, pointer, rows, unavailable_reason, unit_stride, unsupported_reason, wide

FORWARD = Kernel(
    "noise_projection_forward",
    "T* z, int64_t batch_stride, int64_t row_stride, float* sigma, T* w, int64_t w_stride, T* bias, int64_t* rng, T* y, "
    "int64_t B, int64_t N, int64_t K, int64_t D",
)
BACKWARD = Kernel(
    "noise_projection_backward",
    "T* grad_y, int64_t grad_stride, T* z, int64_t batch_stride, int64_t row_stride, float* sigma, T* w, int64_t w_stride, "
    "int64_t* rng, T* grad_z, float* grad_sigma, T* grad_w, T* grad_bias, int64_t B, int64_t N, int64_t K, int64_t D",
)


def _instances(z):
    """[B, ..., K] -> [B, N, K] whose last axis is contiguous."""
    return unit_stride(z.reshape(z.shape[0], z.shape[1:-1].numel(), z.shape[-1]))


def _forward(z, sigma, weight, bias, rng):
    z_BNK, weight = _instances(z), rows(weight)
    y = empty(z, (*z.shape[:-1], weight.shape[0]))
    FORWARD(
        z.dtype, z_BNK, z_BNK.stride(0), z_BNK.stride(1), wide(sigma), weight, weight.stride(0),
        dense(bias), rng.contiguous(), y, *z_BNK.shape, weight.shape[0],
    )  # fmt: skip
    return y


def _backward(grad_y, z, sigma, weight, rng, need_z, need_sigma, need_weight, need_bias):
    z_BNK, grad_RD, weight = _instances(z), rows(grad_y), rows(weight)
    grad_z, grad_weight = empty(z, z.shape, need_z), empty(z, weight.shape, need_weight)
    grad_bias = empty(z, weight.shape[:1], need_bias)
    wide_sigma = wide(sigma)
    grad_sigma = empty_like(wide_sigma, need_sigma)
    BACKWARD(
        z.dtype, grad_RD, grad_RD.stride(0), z_BNK, z_BNK.stride(0), z_BNK.stride(1), wide_sigma,
        weight, weight.stride(0), rng.contiguous(), pointer(grad_z, need_z), pointer(grad_sigma, need_sigma),
        pointer(grad_weight, need_weight), pointer(grad_bias, need_bias), *z_BNK.shape, weight.shape[0],
    )  # fmt: skip
    return grad_z, grad_sigma.to(sigma.dtype if need_sigma else z.dtype), grad_weight, grad_bias


_dispatch.register(
    "noise_projection", "cpu", _forward, _backward, operands=("z",),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence("noise_projection"),
)  # fmt: skip
