"""The operators' cases, at sizes from training, each with plain PyTorch as a peer.

Each operator defines its call's arguments (ov3fast/ops/_calls.py). Tensors are created on the default device; on a GPU the libraries of
peers.py are included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ov3fast import ops
from ov3fast.ops import _calls, _choice, _dispatch
from ov3fast.ops.rope import angles

from . import peers
from .case import DTYPES, OURS, Case, both, compiled, forward, randn, storage

CALLS = {call.name: call for call in _calls.every()}


def bound(call: _calls.Call, dtype: str, size: tuple[int, ...]) -> _calls.Bound:
    """The call with random values; its leaves are the arguments that training differentiates."""
    return _calls.Bound(call, call.make(lambda *shape, scale=1.0: torch.randn(shape) * scale, size, *storage(dtype)))


def row_of(dtype: str, call: _calls.Call) -> Iterator[Case]:
    """The default case for operators without one of their own: at the call's real size, against the reference."""
    at = bound(call, dtype, call.real)
    size = call.counted(*call.real) if call.op in _choice.DIMENSIONS else None
    functions = {OURS: at(call.function), "eager": at(call.reference)}
    for direction, wrap in (("forward", forward), ("both", both)):
        if direction == "forward" or at.leaves:
            yield Case(
                call.name, direction, size, f"[{','.join(map(str, call.real))}]", dtype,
                {name: wrap(function, *at.leaves) for name, function in functions.items()},
                bytes=float(sum(value.nbytes for value in at.arguments)),
            )  # fmt: skip


def attention(dtype: str, shape: tuple[int, ...], targets: tuple[float | None, float | None]) -> Iterator[Case]:
    b, n, h, d = shape
    at = bound(CALLS["flash_attention"], dtype, (b, n, n, h, d))

    def peer(q, k, v):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    flops = 4 * b * h * n * n * d
    name = f"[{b},{n},{h},{d}]"
    for direction, make, units, target in (("forward", forward, 1.0, targets[0]), ("both", both, 3.5, targets[1])):
        functions = {OURS: ops.flash_attention, "sdpa": peer, **peers.attention(dtype)}
        variants = {n: make(f, *at.leaves) for n, f in functions.items()}
        yield Case("flash_attention", direction, (b * h, n, d), name, dtype, variants, units * flops, target=target)


def contrastive(dtype: str, n: int, d: int, target: float | None, peers: bool = True) -> Iterator[Case]:
    leaves = bound(CALLS["contrastive_loss-softmax"], dtype, (n, d)).leaves

    def peer(image, text, scale):
        logits = scale * (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T)
        labels = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2

    variants = {OURS: both(ops.contrastive_loss, *leaves)}
    if peers:
        variants |= {"eager": both(peer, *leaves), "compile": both(compiled(peer), *leaves)}
    results = 2 * leaves[0].nbytes
    yield Case(
        "contrastive_loss",
        "both",
        (n, d) if peers else None,
        f"[{n},{d}]",
        dtype,
        variants,
        6.0 * n * n * d,
        target=target,
        note_memory=True,
        result_bytes=results,
    )


def sigmoid_loss(dtype: str, n: int, d: int) -> Iterator[Case]:
    """contrastive_loss with SigLIP's sigmoid. For large N eager PyTorch's N x N matrix does not fit in memory and is left out."""
    call = CALLS["contrastive_loss-sigmoid"]
    at = bound(call, dtype, (n, d))

    def peer(image, text, scale, bias):
        logits = scale * (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T) + bias
        signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=image.device) - 1
        return -F.logsigmoid(signs * logits).sum() / len(image)

    functions = (
        {OURS: at(call.function)} | ({"eager": peer, "compile": compiled(peer)} if n <= 16384 else {}) | peers.sigmoid_loss()
    )
    variants = {name: both(function, *at.leaves) for name, function in functions.items()}
    yield Case(
        "contrastive_loss", "both", None, f"sigmoid [{n},{d}]", dtype, variants, 6.0 * n * n * d,
        note_memory=True, result_bytes=2 * at.leaves[0].nbytes,
    )  # fmt: skip


def cross_entropy(dtype: str, target: float | None, shape: tuple[int, int, int] = (2048, 768, 32000)) -> Iterator[Case]:
    t, d, v = shape
    call = CALLS["linear_cross_entropy_total-all labelled"]
    at = bound(call, dtype, shape)

    def plain(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def narrow(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight), labels)

    functions = {OURS: at(call.function), "eager": at.plain(plain), "eager, logits in the dtype": at.plain(narrow)}
    yield Case(
        "linear_cross_entropy", "forward", shape, f"[{t},{d}] x [{v},{d}]", dtype,
        {n: forward(f, *at.leaves) for n, f in functions.items()}, 2.0 * t * d * v, note_memory=True,
    )  # fmt: skip
    others = {"compile": compiled(plain), **peers.linear_cross_entropy()}
    if hasattr(F, "linear_cross_entropy"):
        others["F.linear_cross_entropy"] = F.linear_cross_entropy
    functions |= {n: at.plain(f) for n, f in others.items()}
    yield Case(
        "linear_cross_entropy", "both", shape, f"[{t},{d}] x [{v},{d}]", dtype, {n: both(f, *at.leaves) for n, f in functions.items()},
        6.0 * t * d * v, target=target, note_memory=True, result_bytes=sum(leaf.nbytes for leaf in at.leaves),
    )  # fmt: skip


def patch_embed(dtype: str, shape: tuple[int, int, int, int] = (64, 16, 32, 768)) -> Iterator[Case]:
    b, c, side, width = shape
    call = replace(CALLS["patch_embed"], single=(0,))  # the VAE's moments are float32
    at = bound(call, dtype, shape)

    def peer(moments, weight, bias, position, cls, rng):
        mean, logvar = moments.chunk(2, 1)
        z = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
        tokens = F.conv2d(z.to(weight.dtype), weight.view(width, c, 2, 2), bias, stride=2).flatten(2).transpose(1, 2)
        return torch.cat([cls.expand(b, 1, -1), tokens], 1) + position

    functions = {OURS: at(call.function), "eager": at.plain(peer), "compile": at.plain(compiled(peer))}
    moments, weight = at.arguments[:2]
    tokens = b * (1 + side * side // 4)
    yield Case(
        "patch_embed", "forward", (b, side * side, width), f"moments [{b},{2 * c},{side},{side}] -> {width}", dtype,
        {n: forward(f, *at.leaves) for n, f in functions.items()}, flops=2.0 * b * side * side * c * width,
        bytes=moments.nbytes + tokens * width * weight.element_size(), target=4.0,
    )  # fmt: skip


def latents_to_tokens(dtype: str, shape: tuple[int, int, int, int] = (144, 16, 8, 192)) -> Iterator[Case]:
    """patch_embed on latents, as in training with cached latents."""
    b, c, side, width = shape
    call = CALLS["patch_embed-latents"]
    at = bound(call, dtype, shape)

    def peer(latents, weight, bias, position, cls):
        tokens = F.conv2d(latents.to(weight.dtype), weight.view(width, c, 2, 2), bias, stride=2).flatten(2).transpose(1, 2)
        return torch.cat([cls.expand(b, 1, -1), tokens], 1) + position

    functions = {OURS: at(call.function), "eager": at.plain(peer)}
    latents, weight = at.arguments[:2]
    traffic = latents.nbytes + b * (1 + side * side // 4) * width * weight.element_size()
    for direction, wrap, units in (("forward", forward, 1), ("both", both, 2)):
        yield Case(
            "patch_embed", direction, (b, side * side, width), f"latents [{b},{c},{side},{side}] -> {width}", dtype,
            {n: wrap(f, *at.leaves) for n, f in functions.items()},
            flops=units * 2.0 * b * side * side * c * width, bytes=units * traffic,
        )  # fmt: skip


def moments_to_tokens(dtype: str, shape: tuple[int, int, int, int] = (64, 16, 32, 768)) -> Iterator[Case]:
    """The inference path from the VAE's moments (posterior mean) to the tower's tokens: fused, and by way of latents."""
    (b, c, side, width), scale, shift = shape, 0.3611, 0.1159
    moments = randn(b, 2 * c, side, side, dtype=torch.float32)
    weight, cls = randn(width, 4 * c, dtype=DTYPES[dtype], scale=0.1), randn(width, dtype=DTYPES[dtype])
    position = randn(1 + side * side // 4, width, dtype=DTYPES[dtype])

    def ours(moments, weight, position, cls):
        return ops.patch_embed(moments, weight, None, position, cls, moments=True, scale=scale, shift=shift)

    def latents_first(moments, weight, position, cls):
        latents = (moments.chunk(2, 1)[0] - shift) * scale
        return ops.patch_embed(latents, weight, None, position, cls)

    def eager(moments, weight, position, cls):
        latents = ((moments.chunk(2, 1)[0] - shift) * scale).to(weight.dtype)
        tokens = F.conv2d(latents, weight.view(width, c, 2, 2), stride=2).flatten(2).transpose(1, 2)
        return torch.cat([cls.expand(b, 1, -1), tokens], 1) + position

    arguments = (moments, weight, position, cls)
    functions = {OURS: ours, "latents first": latents_first, "eager": eager, "compile": compiled(eager)}
    traffic = moments.nbytes / 2 + b * (1 + side * side // 4) * width * weight.element_size()
    yield Case(
        "moments to tokens", "forward", None, f"moments [{b},{2 * c},{side},{side}] -> {width}", dtype,
        {n: forward(f, *arguments) for n, f in functions.items()}, flops=2.0 * b * side * side * c * width, bytes=traffic,
    )  # fmt: skip


def noise_projection(
    dtype: str, target: float | None, shape: tuple[int, int, int, int] = (64, 256, 768, 768)
) -> Iterator[Case]:
    b, n, k, d = shape
    call = CALLS["noise_projection"]
    at = bound(call, dtype, shape)

    def peer(z, sigma, weight, bias, rng):
        return F.linear(z + sigma.to(z.dtype)[:, None, None] * torch.randn_like(z), weight, bias)

    functions = {OURS: at(call.function), "eager": at.plain(peer), "compile": at.plain(compiled(peer))}
    for direction, wrap, units in (("forward", forward, 1), ("both", both, 2)):
        yield Case(
            "noise_projection", direction, (b * n, k), f"[{b},{n},{k}] -> {d}", dtype,
            {name: wrap(f, *at.leaves) for name, f in functions.items()}, units * 2.0 * b * n * k * d, target=target,
        )  # fmt: skip


def group_norm(dtype: str, target: float | None, shape: tuple[int, int, int, int] = (1, 128, 256, 256)) -> Iterator[Case]:
    call = CALLS["group_norm_silu-channels_last"]
    at = bound(call, dtype, shape)
    x, *_ = arguments = at.leaves

    def peer(x, weight, bias):
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

    functions = {OURS: at(call.function), "eager": peer, "compile": compiled(peer)}
    name, size = f"[{','.join(map(str, shape))}] channels_last", (shape[0], shape[1], shape[2] * shape[3])
    yield Case(
        "group_norm_silu", "forward", size, name, dtype, {n: forward(f, *arguments) for n, f in functions.items()},
        bytes=2.0 * x.nbytes, target=target,
    )  # fmt: skip
    yield Case(
        "group_norm_silu", "backward", size, name, dtype, {n: _backward(f, *arguments) for n, f in functions.items()},
        bytes=3.0 * x.nbytes, target=2.0,
    )  # fmt: skip


def _backward(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], object]:
    graphs: dict[str | None, tuple[Tensor, Tensor]] = {}

    def run() -> object:
        backend = _dispatch._override  # a graph's backward runs on the backend of its forward
        if backend not in graphs:
            out = function(*leaves)
            graphs[backend] = out, torch.randn_like(out)
        out, upstream = graphs[backend]
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    return run


def mlp(dtype: str, target: float | None, shape: tuple[int, int, int] = (2048, 768, 3072)) -> Iterator[Case]:
    rows, width, hidden = shape
    leaves = bound(CALLS["mlp-gelu"], dtype, shape).leaves

    def peer(x, *parameters):
        w1, b1, w2, b2 = (p.to(x.dtype) for p in parameters)
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    functions = {OURS: ops.mlp, "eager": peer, "compile": compiled(peer)}
    flops, name = 4.0 * rows * width * hidden, f"{rows} x {width}-{hidden}-{width}"
    for direction, make, units in (("forward", forward, 1), ("both", both, 3)):
        variants = {n: make(f, *leaves) for n, f in functions.items()}
        yield Case("mlp", direction, shape, name, dtype, variants, units * flops, target=target)


def layer_norm(dtype: str, shape: tuple[int, int] = (2048, 768), target: float | None = None) -> Iterator[Case]:
    rows, width = shape
    call = CALLS["layer_norm-residual"]
    at = bound(call, dtype, shape)

    def peer(x, weight, bias, residual):
        h = x + residual
        return F.layer_norm(h, (width,), weight, bias, 1e-6), h

    functions = {OURS: at(call.function), "eager": peer, "compile": compiled(peer), **peers.layer_norm_after_addition(width)}
    for direction, wrap, units in (("forward", forward, 4.0), ("both", both, 8.0)):
        yield Case(
            "layer_norm + residual", direction, shape, f"[{rows},{width}]", dtype,
            {n: wrap(f, *at.leaves) for n, f in functions.items()}, bytes=units * at.leaves[0].nbytes, target=target,
        )  # fmt: skip


def rms_norm(dtype: str, shape: tuple[int, int] = (2048, 2048), target: float | None = None) -> Iterator[Case]:
    rows, width = shape
    call = CALLS["rms_norm-residual"]
    at = bound(call, dtype, shape)

    def peer(x, weight, residual):
        h = x + residual
        return F.rms_norm(h, (width,), weight, 1e-6), h

    functions = {OURS: at(call.function), "eager": peer, "compile": compiled(peer)}
    for direction, wrap, units in (("forward", forward, 4.0), ("both", both, 8.0)):
        yield Case(
            "rms_norm + residual", direction, shape, f"[{rows},{width}]", dtype,
            {n: wrap(f, *at.leaves) for n, f in functions.items()}, bytes=units * at.leaves[0].nbytes, target=target,
        )  # fmt: skip


def swiglu(dtype: str, shape: tuple[int, int] = (2048, 1024), target: float | None = None) -> Iterator[Case]:
    rows, hidden = shape
    at = bound(CALLS["swiglu"], dtype, shape)

    def peer(x):
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value

    functions = {OURS: ops.swiglu, "eager": peer, "compile": compiled(peer)}
    for direction, wrap, units in (("forward", forward, 1.5), ("both", both, 4.0)):
        yield Case(
            "swiglu", direction, shape, f"[{rows},2 x {hidden}]", dtype,
            {n: wrap(f, *at.leaves) for n, f in functions.items()}, bytes=units * at.leaves[0].nbytes, target=target,
        )  # fmt: skip


def rope(
    dtype: str, shape: tuple[int, int, int, int] = (8, 256, 6, 64), norm: bool = True, target: float | None = None
) -> Iterator[Case]:
    """The peers leave v where it is, as they may: only q and k are new tensors."""
    batch, tokens, heads, width = shape
    call = CALLS["rope-norm" if norm else "rope"]
    leaves = bound(call, dtype, shape).leaves
    cos, sin = angles(tokens, width, leaves[0].device, torch.float32)

    def turned(x, cos, sin):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def peer(qkv, *weights):
        q, k, v = qkv.unbind(2)
        if weights:
            q, k = (F.rms_norm(x, (width,), weight, 1e-6) for x, weight in zip((q, k), weights, strict=True))
        c, s = cos[:, None].to(qkv.dtype), sin[:, None].to(qkv.dtype)
        return turned(q, c, s), turned(k, c, s), v

    functions = {OURS: lambda qkv, *weights: ops.rope(qkv, cos, sin, *weights), "eager": peer, "compile": compiled(peer)}
    name = f"[{batch},{tokens},3,{heads},{width}]" + (" normalised" if norm else "")
    for direction, wrap, units in (("forward", forward, 2.0), ("both", both, (4.0 + 2 / 3) if norm else 4.0)):
        yield Case(
            "rope", direction, (batch * tokens, heads, width) if norm else None, name, dtype,
            {n: wrap(f, *leaves) for n, f in functions.items()}, bytes=units * leaves[0].nbytes, target=target,
        )  # fmt: skip


def linear(dtype: str, shape: tuple[int, int, int] = (2048, 768, 2304), target: float | None = None) -> Iterator[Case]:
    rows, k, n = shape
    leaves = bound(CALLS["linear"], dtype, shape).leaves

    def peer(x, weight, bias):
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    functions = {OURS: ops.linear, "eager": peer, "compile": compiled(peer)}
    for direction, wrap, units in (("forward", forward, 2), ("both", both, 6)):
        variants = {name: wrap(function, *leaves) for name, function in functions.items()}
        yield Case(
            "linear", direction, shape, f"[{rows},{k}] -> {n}", dtype, variants, units * float(rows) * k * n, target=target
        )


def latent_projection(dtype: str, shape: tuple[int, int, int] = (64, 16, 768)) -> Iterator[Case]:
    (b, side, width), channels = shape, 16
    call = CALLS["latent_projection"]
    at = bound(call, dtype, (b, side, width, channels))
    tokens, weight, _ = at.leaves

    def peer(tokens, weight, bias):
        patches = F.linear(tokens, weight, bias).view(b, side, side, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, channels, 2 * side, 2 * side)

    functions = {OURS: at(call.function), "eager": peer, "compile": compiled(peer)}
    size = tokens.nbytes + weight.nbytes + tokens.nbytes * 4 * channels / width
    for direction, wrap, units in (("forward", forward, 1), ("both", both, 3)):
        variants = {name: wrap(function, *at.leaves) for name, function in functions.items()}
        yield Case(
            "latent_projection", direction, (b * side * side, width, 4 * channels), f"[{b},{side * side},{width}]", dtype,
            variants, bytes=units * size,
        )  # fmt: skip


def random_normal(dtype: str, shape: tuple[int, int, int] = (64, 256, 768)) -> Iterator[Case]:
    rng, kind = ops.random.make_rng(1, device=torch.get_default_device()), DTYPES[dtype]
    variants = {OURS: lambda: ops.random.normal(shape, rng, kind), "eager": lambda: torch.randn(shape, dtype=kind)}
    name, elements = f"[{','.join(map(str, shape))}]", float(math.prod(shape))
    yield Case("random_normal", "forward", (), name, dtype, variants, bytes=elements * kind.itemsize)


def adamw_ema(dtype: str, width: int = 768, blocks: int = 4) -> Iterator[Case]:
    """An optimizer step for a tower's blocks, against torch's fused AdamW with clipping and an EMA."""
    hidden = 4 * width
    sizes = [(hidden, width), (width, hidden), (3 * width, width), (width, width), (hidden,), (width,)] * blocks
    numbers = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    def state():
        params, grads = ([randn(*size, dtype=DTYPES[dtype]) for size in sizes] for _ in range(2))
        return params, grads, *([torch.zeros(*size) for size in sizes] for _ in range(3))

    params, grads, m, v, ema = state()
    theirs, their_grads, *_, their_ema = state()
    for p, g in zip(theirs, their_grads, strict=True):
        p.requires_grad_().grad = g
    optimizer = torch.optim.AdamW(theirs, fused=True, **numbers)

    def peer():
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        torch._foreach_lerp_(their_ema, [p.detach().float() for p in theirs], 0.01)

    def ours():
        return ops.adamw_ema_(params, grads, m, v, ema, step=2, max_norm=1.0, ema_decay=0.99, **numbers)

    elements = float(sum(p.numel() for p in params))
    # Parameters, moments and EMA are read and written, gradients read twice.
    moved = elements * (4 * params[0].itemsize + 6 * 4)
    yield Case(
        "adamw_ema_", "forward", (), f"{elements / 1e6:.0f} M parameters", dtype, {OURS: ours, "eager": peer}, bytes=moved
    )
