"""The rows of the operator table: which cases, at which sizes and dtypes.

Cases are created lazily and dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ov3fast.models.vae import FLUX_VAE

from .case import DTYPES as DTYPES
from .case import MIXED as MIXED
from .case import OURS as OURS
from .case import Case as Case
from .models import demo_step, encoder, vae
from .operator_cases import (
    CALLS,
    adamw_ema,
    attention,
    contrastive,
    cross_entropy,
    group_norm,
    latent_projection,
    latents_to_tokens,
    layer_norm,
    linear,
    mlp,
    moments_to_tokens,
    noise_projection,
    patch_embed,
    random_normal,
    rms_norm,
    rope,
    row_of,
    sigmoid_loss,
    swiglu,
)  # fmt: skip

TINY_VAE = {"block_out_channels": [16, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
            "layers_per_block": 1, "norm_num_groups": 4}  # fmt: skip
"""Changes to FLUX's VAE config that make it small enough for Triton's interpreter."""

Makers = list[tuple[str, str, Callable[..., Iterator[Case]], tuple]]


def tiny() -> Makers:
    """Every case at a size for Triton's interpreter, for rehearsals."""
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
        ("rms_norm + residual", "bf16", rms_norm, ((20, 24),)),
        ("swiglu", "bf16", swiglu, ((20, 24),)),
        ("rope", "bf16", rope, ((2, 10, 2, 16),)),
        ("linear", "bf16", linear, ((20, 24, 40),)),
        ("latent_projection", "bf16", latent_projection, ((2, 2, 24),)),
        ("random_normal", "bf16", random_normal, ((2, 3, 40),)),
        ("adamw_ema_", "bf16", adamw_ema, (8, 1)),
        ("ViT-B/2 encoder", "bf16", encoder, (none, 2, 1, (32, 2, 64, 32))),
        ("contrastive_loss", "bf16", sigmoid_loss, (30, 24)),
        ("VAE", "bf16", vae, ({**FLUX_VAE, **TINY_VAE}, 16)),
    ]


def small() -> Makers:
    """Further sizes, those of the demo first, so that the choice of backends can distinguish size classes."""
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
        ("rms_norm + residual", rms_norm, ((512, 192),)),
        ("rms_norm + residual", rms_norm, ((16384, 1152),)),
        ("swiglu", swiglu, ((512, 512),)),
        ("swiglu", swiglu, ((2048, 5461),)),
        ("rope", rope, ((32, 16, 3, 64),)),
        ("rope", rope, ((8, 256, 16, 128),)),
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
        *(("rms_norm + residual", kind, rms_norm, ((2048, 2048), 1.2)) for kind in DTYPES),
        *(("swiglu", kind, swiglu, ((2048, 1024), 1.2)) for kind in DTYPES),
        *(("rope", kind, rope, ((8, 256, 6, 64), norm, 1.2)) for kind in DTYPES for norm in (True, False)),
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
        # On either side of what the Triton kernels call few and small.
        makers += [("contrastive_loss", "bf16", contrastive, (rows, 768, None)) for rows in (256, 1024, 4096)]
        makers += [("mlp", "bf16", mlp, (None, shape)) for shape in ((512, 384, 1536), (256, 768, 3072))]
    return makers


SHARED = {"flash_attention_qkvpacked": "flash_attention", "linear_cross_entropy_total": "linear_cross_entropy"}
"""Operators that share another operator's rows."""


def rest(makers: Makers) -> Makers:
    """A row for each operator that the given cases don't cover, such as a newly added one."""
    covered = {operator.split()[0] for operator, *_ in makers}
    first = {call.op: call for call in reversed(CALLS.values())}
    left_out = [call for op, call in first.items() if SHARED.get(op, op) not in covered]
    return [(call.op, kind, row_of, (call,)) for call in left_out for kind in DTYPES]


def table(only: str = "", dtype: str = "", makers: Makers | None = None) -> Iterator[Case]:
    """The cases whose operator contains `only`, in `dtype` or in both dtypes; created lazily."""
    if makers is None:
        makers = full(torch.get_default_device().type == "cuda")
        makers = makers + rest(makers)
    for operator, kind, make, arguments in makers:
        if only in operator and dtype in kind:
            yield from make(kind, *arguments)
