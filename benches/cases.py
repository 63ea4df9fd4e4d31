"""The cases of the operator table: each operator at a size that training meets, with the plain PyTorch it has to beat.

A case is made when its turn comes and dropped afterwards. Its variants take no arguments: "ov3fast" is ours, the others are peers.
Tensors are made on the default device; on a GPU the libraries of peers.py take part. Forward-and-backward cases keep the leaves' gradients out of the way with torch.autograd.grad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.models.vae import FLUX_VAE
from ov3fast.ops import _calls, _choice, _dispatch

from . import peers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIXED = "mixed"
"""bf16 with fp32 parameters, as in training under autocast."""
OURS = "ov3fast"
TINY_VAE = {"block_out_channels": [16, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
            "layers_per_block": 1, "norm_num_groups": 4}  # fmt: skip
"""What a VAE for Triton's interpreter changes of FLUX's."""


@dataclass
class Case:
    operator: str
    direction: str
    """"forward", "backward" or "both"."""
    size: tuple[int, ...] | None
    """As the choice of backends counts it; None for what is no single operator."""
    shape: str
    dtype: str
    variants: dict[str, Callable[[], object]]
    flops: float = 0.0
    """Of matrix products in the whole call."""
    bytes: float = 0.0
    """Read and written at least once."""
    target: float | None = None
    """The ratio to the best peer that this project set itself."""
    note_memory: bool = False
    result_bytes: float = 0.0
    """Of outputs and gradients: not counted as extra memory."""


def randn(*shape: int, dtype: torch.dtype, grad: bool = False, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_(grad)


def both(function: Callable[..., object], *leaves: Tensor) -> Callable[[], object]:
    """Forward and backward of `function`, for gradients of all leaves and random upstream gradients (1 for a scalar)."""

    def run() -> object:
        out = function(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        if run.upstream is None:
            run.upstream = [torch.randn_like(value) if value.ndim else None for value in outputs]
        return torch.autograd.grad(outputs, leaves, run.upstream)

    run.upstream = None
    return run


def storage(dtype: str) -> tuple[torch.dtype, torch.dtype]:
    """Of activations, and of parameters."""
    return (torch.bfloat16, torch.float32) if dtype == MIXED else (DTYPES[dtype], DTYPES[dtype])


def forward(function: Callable[..., object], *arguments: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*arguments)

    return run


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# ---- the operators --------------------------------------------------------------------------------------------------

CALLS = {call.name: call for call in _calls.every()}


def bound(call: _calls.Call, dtype: str, size: tuple[int, ...]) -> _calls.Bound:
    """The call with random values; its leaves are what training takes gradients of."""
    return _calls.Bound(call, call.make(lambda *shape, scale=1.0: torch.randn(shape) * scale, size, *storage(dtype)))


def row_of(dtype: str, call: _calls.Call) -> Iterator[Case]:
    """For an operator that has no case of its own: at the call's real size, against the reference."""
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
        labels = torch.arange(len(image))
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
    """contrastive_loss of SigLIP's kind. The whole N x N matrix of eager PyTorch does not fit beyond some rows, and is left out there."""
    call = CALLS["contrastive_loss-sigmoid"]
    at = bound(call, dtype, (n, d))

    def peer(image, text, scale, bias):
        logits = scale * (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T) + bias
        signs = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * logits).sum() / len(image)

    functions = {OURS: at(call.function)} | ({"eager": peer, "compile": compiled(peer)} if n <= 16384 else {}) | peers.sigmoid_loss()
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
    """patch_embed as training meets it once the latents are cached."""
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
    """The inference path from the VAE's moments to the tower's tokens, posterior mean: at once, and by way of latents."""
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
        backend = _dispatch._override  # a graph goes back on the backend that it was made on
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


# ---- a whole encoder ------------------------------------------------------------------------------------------------


class PlainEncoder(nn.Module):
    """The ViT encoder as one would write it in plain PyTorch."""

    def __init__(self, width: int, depth: int, heads: int, mlp_dim: int, tokens: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(16, width, 2, stride=2)
        self.cls, self.position = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(1 + tokens, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width, eps=1e-6), "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width, eps=1e-6), "fc1": nn.Linear(width, mlp_dim), "fc2": nn.Linear(mlp_dim, width),
                }
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, embed_dim, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.position
        for block in self.blocks:
            b, n, d = x.shape
            q, k, v = block["qkv"](block["norm1"](x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            x = x + block["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
            x = x + block["fc2"](F.gelu(block["fc1"](block["norm2"](x))))
        return self.head(self.norm(x[:, 1:].mean(1)))


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
    """A step of a tower's blocks against torch's fused AdamW, clipping and averaging."""
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
    # Parameters and moments and the average are read and written, gradients read twice.
    moved = elements * (4 * params[0].itemsize + 6 * 4)
    yield Case(
        "adamw_ema_", "forward", (), f"{elements / 1e6:.0f} M parameters", dtype, {OURS: ours, "eager": peer}, bytes=moved
    )


def encoder(
    dtype: str,
    targets: tuple[float | None, float | None],
    batch: int = 8,
    depth: int = 12,
    sizes: tuple[int, int, int, int] = (768, 12, 3072, 256),
) -> Iterator[Case]:
    """`sizes`: width, heads, hidden width, pixels of an image's side."""
    from ov3fast.models.config import VisionConfig
    from ov3fast.models.flops import encoder_flops
    from ov3fast.models.vit import ViTEncoder

    width, heads, hidden, pixels = sizes
    side = pixels // 8
    config = VisionConfig(width=width, depth=depth, heads=heads, mlp_dim=hidden, image_size=pixels, embed_dim=width)
    ours = ViTEncoder(config).to(DTYPES[dtype])
    ours.output_tokens = False
    peer = PlainEncoder(width, depth, heads, hidden, side * side // 4, width).to(DTYPES[dtype])
    latents = randn(batch, 16, side, side, dtype=DTYPES[dtype])
    modules = {OURS: ours, "eager": peer, "compile": torch.compile(peer, dynamic=False)}
    flops = batch * encoder_flops(config, side * side // 4)

    def step(module: nn.Module) -> Callable[[], object]:
        parameters = [p for p in (module._orig_mod if hasattr(module, "_orig_mod") else module).parameters()]
        upstream = torch.randn(batch, width).to(DTYPES[dtype])
        return lambda: torch.autograd.grad(module(latents), parameters, upstream)

    for direction, make, units, target in (
        ("forward", lambda module: forward(module, latents), 1, targets[0]),
        ("both", step, 3, targets[1]),
    ):
        variants = {n: make(m) for n, m in modules.items()}
        name = f"{batch} x [16,{side},{side}]"
        yield Case("ViT-B/2 encoder", direction, None, name, dtype, variants, units * flops, target=target)


# ---- the VAE --------------------------------------------------------------------------------------------------------


def vae(dtype: str, config: dict, pixels: int, batch: int = 1) -> Iterator[Case]:
    """Encoding and decoding of FLUX's VAE, against the same layers one by one, as diffusers runs them: GroupNorm, SiLU and upsampling by themselves, NCHW."""
    from ov3fast.models.vae import FrozenVAE

    ours = FrozenVAE.from_config(config).to(DTYPES[dtype])
    peer = _plain_vae(config).to(DTYPES[dtype])
    images = randn(batch, 3, pixels, pixels, dtype=DTYPES[dtype])
    latents = randn(batch, ours.channels, pixels // ours.stride, pixels // ours.stride, dtype=DTYPES[dtype])

    def encode(images):
        return peer.encode(images).latent_dist.parameters

    def decode(latents):
        return peer.decode(latents).sample

    for name, function, plain, x in (
        ("VAE encode", ours.moments, encode, images),
        ("VAE decode", ours.decode, decode, latents),
    ):
        functions = {OURS: function, "eager": plain, "compile": compiled(plain)}
        channels = 3 if x is images else ours.channels
        yield Case(
            name, "forward", None, f"{batch} x {channels} x {x.shape[2]} x {x.shape[3]}", dtype,
            {n: forward(f, x) for n, f in functions.items()}, target=2.0,
        )  # fmt: skip


def _plain_vae(config: dict) -> nn.Module:
    from ov3fast.models.autoencoder import Autoencoder, AutoencoderConfig
    from ov3fast.models.group_norm_silu import GroupNormSiLU

    module = Autoencoder(AutoencoderConfig.from_json(config)).requires_grad_(False).eval()
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, GroupNormSiLU):
                setattr(parent, name, nn.Sequential(nn.GroupNorm(child.num_groups, len(child.weight), child.eps), nn.SiLU()))
    return module


def demo_step(dtype: str, images: int = 144, classes: int = 600, target: float | None = None) -> Iterator[Case]:
    """A whole optimizer step of the demo's recipe on a made-up batch; `eager` is the same step on PyTorch's products."""
    from dataclasses import replace

    from ov3fast.losses import Objective
    from ov3fast.models.openvision3 import OpenVision3
    from ov3fast.models.vae import SMALL, FrozenVAE
    from ov3fast.recipes import get_recipe
    from ov3fast.training.distributed import ALONE
    from ov3fast.training.footprint import blank_micro_batch
    from ov3fast.training.optimizer import AdamW
    from ov3fast.training.parallel import Parallel
    from ov3fast.training.plan import make_plan
    from ov3fast.training.step import Step
    from ov3fast.training.timing import Timer

    recipe = get_recipe("demo")
    text, caption = (replace(part, vocab_size=classes) for part in (recipe.model.text, recipe.model.caption))
    recipe = replace(recipe, model=replace(recipe.model, text=text, caption=caption), precision=dtype)
    stage, device = recipe.stages[0], torch.device("cpu")
    model = OpenVision3(recipe.model)
    vae = FrozenVAE.from_pretrained(SMALL, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    model.set_vae(vae)
    model.train()
    batch = blank_micro_batch(recipe, stage, images, vae)
    batch.latents.normal_()
    batch.text_ids.random_(5, classes)
    batch.caption_ids.random_(5, classes)
    batch.pairs = torch.arange(batch.pairs.numel()).view_as(batch.pairs)
    for rows in (batch.caption_rows, batch.latent_rows, batch.pixel_rows):
        rows.copy_(torch.arange(len(rows)))
    step = Step(
        Parallel(model, recipe, ALONE), Objective(recipe.stage_objective(stage), None), Timer(device),
        bf16=dtype == "bf16", exact_contrastive=False,
    )  # fmt: skip
    optimizer = AdamW(model, recipe.optimizer)

    def update() -> None:
        step([batch])
        step.update(optimizer)
        optimizer.zero_grad()

    def eager() -> None:
        with ops.use("eager"):
            update()

    flops = make_plan(recipe).stages[0].flops_per_sample * images
    yield Case("demo step", "both", None, f"{images} images", dtype, {OURS: update, "eager": eager}, flops, target=target)


Makers = list[tuple[str, str, Callable[..., Iterator[Case]], tuple]]


def tiny() -> Makers:
    """Every case at a size for Triton's interpreter, to rehearse with."""
    none = (None, None)
    return [
        ("flash_attention", "bf16", attention, ((2, 20, 2, 16), none)),
        ("contrastive_loss", "bf16", contrastive, (30, 24, None)),
        ("linear_cross_entropy", "bf16", cross_entropy, (None, (20, 24, 100))),
        ("patch_embed", "bf16", patch_embed, ((2, 4, 8, 32),)),
        ("moments to tokens", "bf16", moments_to_tokens, ((2, 4, 8, 32),)),
        ("noise_projection", "bf16", noise_projection, (None, (2, 10, 24, 32))),
        ("group_norm_silu", "bf16", group_norm, (None, (1, 32, 8, 8))),
        ("mlp", "bf16", mlp, (None, (20, 24, 40))),
        ("layer_norm + residual", "bf16", layer_norm, ((20, 24),)),
        ("linear", "bf16", linear, ((20, 24, 40),)),
        ("latent_projection", "bf16", latent_projection, ((2, 2, 24),)),
        ("random_normal", "bf16", random_normal, ((2, 3, 40),)),
        ("adamw_ema_", "bf16", adamw_ema, (8, 1)),
        ("ViT-B/2 encoder", "bf16", encoder, (none, 2, 1, (32, 2, 64, 32))),
        ("contrastive_loss", "bf16", sigmoid_loss, (30, 24)),
        ("VAE", "bf16", vae, ({**FLUX_VAE, **TINY_VAE}, 16)),
    ]


def small() -> Makers:
    """Other sizes, those of the demo first, by which the choice of backends tells size classes apart."""
    none = (None, None)
    both_dtypes = [
        ("flash_attention", attention, ((144, 17, 3, 64), none)),
        ("contrastive_loss", contrastive, (144, 192, None)),
        ("linear_cross_entropy", cross_entropy, (None, (240, 192, 600))),
        ("patch_embed", latents_to_tokens, ()),
        ("noise_projection", noise_projection, (None, (48, 16, 192, 192))),
        ("group_norm_silu", group_norm, (None, (8, 64, 64, 64))),
        ("layer_norm + residual", layer_norm, ((2448, 192),)),
        ("layer_norm + residual", layer_norm, ((16384, 768),)),
        ("latent_projection", latent_projection, ((48, 4, 192),)),
    ]
    products = [
        ("linear", linear, ((2448, 192, 576),)),
        ("linear", linear, ((256, 768, 768),)),
        ("mlp", mlp, (None, (2448, 192, 768))),
        ("mlp", mlp, (None, (256, 768, 3072))),
    ]
    return [
        *((operator, kind, make, arguments) for operator, make, arguments in both_dtypes for kind in DTYPES),
        *((operator, kind, make, arguments) for operator, make, arguments in products for kind in (*DTYPES, MIXED)),
        ("linear", MIXED, linear, ()),
        ("mlp", MIXED, mlp, (None,)),
    ]


def full(on_gpu: bool) -> Makers:
    attention_bf16, attention_fp32 = (2.3, 1.9), (1.0, 1.0)
    makers: Makers = [
        ("flash_attention", "bf16", attention, ((8, 256, 12, 64), attention_bf16)),
        ("flash_attention", "bf16", attention, ((2, 1024, 16, 64), attention_bf16)),
        ("flash_attention", "fp32", attention, ((8, 256, 12, 64), attention_fp32)),
        ("flash_attention", "fp32", attention, ((2, 1024, 16, 64), attention_fp32)),
        ("contrastive_loss", "bf16", contrastive, (8192, 768, 1.25)),
        ("contrastive_loss", "fp32", contrastive, (8192, 768, 1.0)),
        ("linear_cross_entropy", "bf16", cross_entropy, (1.0,)),
        ("linear_cross_entropy", "fp32", cross_entropy, (1.0,)),
        ("patch_embed", "bf16", patch_embed, ()),
        ("patch_embed", "fp32", patch_embed, ()),
        ("moments to tokens", "bf16", moments_to_tokens, ()),
        ("moments to tokens", "fp32", moments_to_tokens, ()),
        ("noise_projection", "bf16", noise_projection, (2.0,)),
        ("noise_projection", "fp32", noise_projection, (2.0,)),
        ("group_norm_silu", "bf16", group_norm, (1.6,)),
        ("group_norm_silu", "fp32", group_norm, (4.0,)),
        ("mlp", "bf16", mlp, (1.0,)),
        ("mlp", "fp32", mlp, (1.0,)),
        ("layer_norm + residual", "bf16", layer_norm, ((2048, 768), 1.2)),
        ("layer_norm + residual", "fp32", layer_norm, ((2048, 768), 1.1)),
        ("linear", "bf16", linear, ((2048, 768, 2304), 1.0)),
        ("linear", "fp32", linear, ((2048, 768, 2304), 1.0)),
        *((maker.__name__, kind, maker, ()) for maker in (latent_projection, random_normal) for kind in DTYPES),
        *(("adamw_ema_", kind, adamw_ema, ()) for kind in DTYPES),
        ("ViT-B/2 encoder", "bf16", encoder, ((1.15, 1.15),)),
        ("ViT-B/2 encoder", "fp32", encoder, ((1.1, 1.1),)),
        *([] if on_gpu else [("demo step", "bf16", demo_step, (144, 600, 1.55)), *small()]),
        ("contrastive_loss", "bf16", contrastive, (65536, 512, None, False)),
    ]
    if on_gpu:
        large = ((64, 257, 12, 64), (16, 1024, 16, 64), (4, 4096, 16, 128), (32, 729, 16, 72))
        makers += [("flash_attention", "bf16", attention, (shape, (None, None))) for shape in large]
        makers += [("ViT-B/2 encoder", "bf16", encoder, ((None, None), batch)) for batch in (64, 256)]
        makers += [("contrastive_loss", "bf16", contrastive, (rows, 768, None, False)) for rows in (32768, 65536)]
        makers += [("contrastive_loss", "bf16", sigmoid_loss, (rows, 768)) for rows in (8192, 32768, 65536)]
        makers += [("VAE", "bf16", vae, (FLUX_VAE, pixels)) for pixels in (256, 1024)]
        makers += [("linear_cross_entropy", "bf16", cross_entropy, (None, (16384, 768, 32000)))]
    return makers


SHARED = {"flash_attention_qkvpacked": "flash_attention", "linear_cross_entropy_total": "linear_cross_entropy"}
"""Operators whose rows are another's."""


def rest(makers: Makers) -> Makers:
    """A row for each operator that these leave out: one that was just added, say."""
    covered = {operator.split()[0] for operator, *_ in makers}
    first = {call.op: call for call in reversed(CALLS.values())}
    left_out = [call for op, call in first.items() if SHARED.get(op, op) not in covered]
    return [(call.op, kind, row_of, (call,)) for call in left_out for kind in DTYPES]


def table(only: str = "", dtype: str = "", makers: Makers | None = None) -> Iterator[Case]:
    """The cases whose operator contains `only`, in `dtype` or both; each is made when it is asked for."""
    if makers is None:
        makers = full(torch.get_default_device().type == "cuda")
        makers = makers + rest(makers)
    for operator, kind, make, arguments in makers:
        if only in operator and dtype in kind:
            yield from make(kind, *arguments)
