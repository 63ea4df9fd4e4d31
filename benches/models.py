"""Full models as cases: the ViT encoder, the VAE, a training step of the demo, against the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ov3fast import ops

from .case import DTYPES, OURS, Case, compiled, forward, randn


class PlainEncoder(nn.Module):
    """The ViT encoder, written in plain PyTorch."""

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


def encoder(
    dtype: str,
    targets: tuple[float | None, float | None],
    batch: int = 8,
    depth: int = 12,
    sizes: tuple[int, int, int, int] = (768, 12, 3072, 256),
) -> Iterator[Case]:
    """`sizes`: width, heads, hidden width, image size in pixels."""
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
    """Encoding and decoding with FLUX's VAE, against the same layers unfused, as in diffusers: separate GroupNorm, SiLU and upsampling, NCHW."""
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
    """A full optimizer step of the demo's recipe on a synthetic batch; `eager` is the same step on the eager backend."""

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
