"""Standard normal numbers: ov3fast/ops/random.py."""

from __future__ import annotations

import torch
import triton.language as tl

from .lib import philox
from .lib.common import TYPES, cdiv, rounded
from .lib.config import ANY, TABLE, Config, pick
from .lib.launch import kernel

# Size classes: none.
TABLE["random_normal"] = {(ANY, ANY, ANY): Config({"BLOCK": 1024}, warps=4, stages=1)}
TABLE["random_words"] = {(ANY, ANY, ANY): Config({"BLOCK": 1024}, warps=4, stages=1)}


@kernel
def random_normal(rng, out, n, BLOCK: tl.constexpr):
    seed, offset = tl.load(rng), tl.load(rng + 1)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    position = start // 4 + tl.arange(0, BLOCK // 4)[None, :] + offset
    values = rounded(tl.reshape(philox.normals_in_order(seed, position), (BLOCK,)), out.dtype.element_ty)
    element = tl.arange(0, BLOCK)
    # With a mask, every store would be narrow.
    if start + BLOCK <= n:
        tl.store(out + start + element, values)
    else:
        tl.store(out + start + element, values, mask=start + element < n)


@kernel
def random_words(rng, out, n, BLOCK: tl.constexpr):
    """The first n raw words, int32, for tests."""
    seed, offset = tl.load(rng), tl.load(rng + 1)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    w0, w1, w2, w3 = philox.words(seed, start // 4 + tl.arange(0, BLOCK // 4) + offset)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape((BLOCK,)).to(tl.int32, bitcast=True)
    element = start + tl.arange(0, BLOCK)
    tl.store(out + element, words, mask=element < n)


def forward(shape, rng, dtype):
    """Normals of shape `shape` in `dtype` on rng's device."""
    out = torch.empty(shape, dtype=dtype, device=rng.device)
    if n := out.numel():
        config = pick("random_normal", TYPES[dtype])
        random_normal[(cdiv(n, config.blocks["BLOCK"]),)](rng.contiguous(), out, n, **config.options)
    return out


def words(n, rng):
    """int32 [n], bitwise equal to ops.random.words."""
    out = torch.empty(n, dtype=torch.int32, device=rng.device)
    if n:
        config = pick("random_words", "any")
        random_words[(cdiv(n, config.blocks["BLOCK"]),)](rng.contiguous(), out, n, **config.options)
    return out
