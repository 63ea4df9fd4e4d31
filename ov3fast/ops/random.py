"""The random numbers of every operator: one Philox4x32-10 stream, a pure function of (seed, offset, logical element).

State. `rng` is an int64 tensor (seed, offset); both are read as unsigned 64-bit numbers. It goes into an operator as an input and is
never changed; `advance` gives the state behind n elements.

Words. Element i of the contiguous tensor takes word i % 4 of the block at counter p = offset + i // 4 (modulo 2^64):

    (w_0, w_1, w_2, w_3) = philox4x32_10(counter = (lo32(p), hi32(p), 0, 0), key = (lo32(seed), hi32(seed)))

    10 rounds of   c_0' = hi32(B c_2) ^ c_1 ^ k_0    c_1' = lo32(B c_2)      A = 0xD2511F53, B = 0xCD9E8D57
                   c_2' = hi32(A c_0) ^ c_3 ^ k_1    c_3' = lo32(A c_0)
                   then k_0 += 0x9E3779B9, k_1 += 0xBB67AE85 (modulo 2^32)

Uniforms. A word x, read as int32, becomes u = float32(x < 0 ? ~x : x) * 4.6566127342e-10 in float32, in [0, 1).
Normals. Box-Muller in float32 on the pairs (w_0, w_1) and (w_2, w_3), each giving two neighbouring elements:

    r = sqrt(-2 ln(max(1e-7, u_first)))    theta = 6.283185307179586 u_second    (r cos theta, r sin theta)

These are Triton's own formulas, so element i is `tl.randn4x(seed, offset + i // 4)[i % 4]` with an int64 offset. Backends have the same
words bit for bit; their normals differ by a few ulps of log, cos and sin. Other dtypes are the float32 value rounded.

Since the index is that of the logical element, the numbers do not depend on tiles, threads, backends or ranks: a rank whose samples
start at global sample g uses `advance(rng, g * elements_per_sample)`, where elements_per_sample is a multiple of 4.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123); triton/language/random.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check, _dispatch, _operator, cpu
from ._calls import Call

_MASK = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85


def make_rng(seed: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """(seed, offset) as the int64[2] tensor that operators take. Both are in -2^63 .. 2^64 - 1; negative ones wrap around."""
    return torch.tensor([_to_int64("seed", seed), _to_int64("offset", offset)], dtype=torch.int64, device=device)


def advance(rng: Tensor, n: int) -> Tensor:
    """The state behind n elements: the offset moved by ceil(n / 4) counters, so that nothing drawn before comes again."""
    _check.rng("advance", rng)
    return torch.stack((rng[0], rng[1] + (n + 3) // 4))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four counter words that broadcast, and two scalar key words, int64 in 0 .. 2^32 - 1, to four such words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of 32 x 32; high bits left in c1, c3, k0, k1 are masked later.
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0 = (product_b >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (product_a >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = product_b, product_a
        k0, k1 = k0 + _KEY_STEP_0, k1 + _KEY_STEP_1
    return c0, c1 & _MASK, c2, c3 & _MASK


def words(n: int, rng: Tensor) -> Tensor:
    """The first n words of the stream, int64 [n] in 0 .. 2^32 - 1."""
    _check.rng("words", rng)
    return torch.stack(_blocks(n, rng), dim=-1).reshape(-1)[:n]


def uniform(shape: Sequence[int], rng: Tensor) -> Tensor:
    """Uniform float32 numbers in [0, 1) of the given shape, on rng's device."""
    _check_shape("uniform", shape)
    return _to_uniform(words(math.prod(shape), rng)).reshape(shape)


def reference(shape: Sequence[int], rng: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Plain PyTorch, the specification of `normal`."""
    n = math.prod(shape)
    w0, w1, w2, w3 = (block.to(torch.int32) for block in _blocks(n, rng))
    u1, u2 = _to_uniform(torch.stack((w0, w2), dim=-1)), _to_uniform(torch.stack((w1, w3), dim=-1))
    radius = u1.clamp_(min=1e-7).log_().mul_(-2.0).sqrt_()
    theta = u2.mul_(6.283185307179586)
    normals = torch.stack((theta.cos().mul_(radius), theta.sin().mul_(radius)), dim=-1)
    return normals.reshape(-1)[:n].reshape(shape).to(dtype)


def normal(shape: Sequence[int], rng: Tensor, dtype: torch.dtype = torch.float32, *, impl: str | None = None) -> Tensor:
    """Standard normal numbers of the given shape and dtype, on rng's device: the stream that noise_projection adds.

    Raises TypeError or ValueError that name the argument.
    """
    op = "random_normal"
    _check_shape(op, shape)
    _check.rng(op, rng)
    if dtype not in _check.FLOATS:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    normals: Tensor = _random_normal(impl, list(shape), rng, dtype)
    return normals


def _blocks(n: int, rng: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ceil(n / 4) blocks of four words that n elements take."""
    seed, offset = rng.unbind()
    position = torch.arange((n + 3) // 4, device=rng.device) + offset
    zero = torch.zeros_like(seed)
    return philox((position & _MASK, (position >> 32) & _MASK, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))


def _to_uniform(words: Tensor) -> Tensor:
    words = words.to(torch.int32)
    return (words >> 31).bitwise_xor_(words).to(torch.float32).mul_(4.6566127342e-10)


def _to_int64(name: str, value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"make_rng: {name} must be in -2^63 .. 2^64 - 1, got {value}")
    return (value + 2**63) % 2**64 - 2**63


def _check_shape(op: str, shape: Sequence[int]) -> None:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{op}: shape must be a tuple of sizes, got {type(shape).__name__}")
    if any(size < 0 for size in shape):
        raise ValueError(f"{op}: shape must have no negative size, got {tuple(shape)}")


def _fake(shape: Sequence[int], rng: Tensor, dtype: torch.dtype) -> Tensor:
    return rng.new_empty(shape, dtype=dtype)


_dispatch.register("random_normal", "eager", reference)
_random_normal = _operator.define("random_normal", "(SymInt[] shape, Tensor rng, ScalarType dtype) -> Tensor", fake=_fake)


# ---- the CPU kernels, csrc/cpu/random_normal.cpp

_NORMAL = cpu.Kernel(
    "random_normal",
    "int64_t* rng, T* out, int64_t n",
)
_WORDS = cpu.Kernel(
    "random_words",
    "int64_t* rng, uint32_t* out, int64_t n",
    dtypes=(torch.float32,),
)


def _forward_cpu(shape: Sequence[int], rng: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    _NORMAL(dtype, rng.contiguous(), out, out.numel())
    return out


cpu.register("random_normal", _forward_cpu, operands=("rng", "dtype"))


# ---- how it is called

CALLS = [
    Call(
        "random_normal", normal, reference, lambda draw, *shape: [make_rng(5, 3, device=torch.get_default_device()), draw(*shape)],
        apply=lambda f, rng, like: f(like.shape, rng, like.dtype), least=(3,), tiny=(3, 7, 1001), real=(64, 256, 768), differentiable=False,
    )
]  # fmt: skip
