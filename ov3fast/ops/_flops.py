"""Floating-point operations of the operators, for torch.utils.flop_counter.FlopCounterMode: 2 for each multiply-add of the matrix products.

As PyTorch counts its own: elementwise work, normalisation and softmax are not counted, nor is what a causal mask saves. A backward counts
the products of the gradients that are asked for, and those that are computed again.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

Shape = tuple[int, ...]


def _product(x: Shape, weight: Shape) -> int:
    """x [..., K] by weight [N, K]."""
    return 2 * math.prod(x) * weight[0]


def linear(x: Shape, weight: Shape, *_: Any) -> int:
    return _product(x, weight)


def linear_backward(grad_y: Shape, x: Shape, weight: Shape, need_x: bool, need_weight: bool, *_: Any) -> int:
    return (need_x + need_weight) * _product(x, weight)


def mlp(x: Shape, w1: Shape, b1: Shape | None, w2: Shape, *_: Any) -> int:
    rows = math.prod(x[:-1])
    return 2 * rows * (math.prod(w1) + math.prod(w2))


def mlp_backward(
    grad_y: Shape, x: Shape, h: Shape, w1: Shape, b1: Shape | None, w2: Shape, activation: str,
    need_x: bool, need_w1: bool, need_b1: bool, need_w2: bool, *_: Any,
) -> int:  # fmt: skip
    first, second = (2 * math.prod(x[:-1]) * math.prod(w) for w in (w1, w2))
    return (need_x + need_w1) * first + ((need_x or need_w1 or need_b1) + need_w2) * second


def flash_attention(q: Shape, k: Shape, *_: Any) -> int:
    """q k^T and p v."""
    batch, queries, heads, width = q
    return 4 * batch * heads * queries * k[1] * width


def flash_attention_backward(grad_out: Shape, q: Shape, k: Shape, *_: Any) -> int:
    """q k^T again, and the products for dv, dp, dq and dk."""
    return 5 * flash_attention(q, k) // 2


def _unpacked(qkv: Shape) -> tuple[Shape, Shape]:
    one = (*qkv[:2], *qkv[3:])
    return one, one


def flash_attention_qkvpacked(qkv: Shape, *_: Any) -> int:
    return flash_attention(*_unpacked(qkv))


def flash_attention_qkvpacked_backward(grad_out: Shape, qkv: Shape, *_: Any) -> int:
    return flash_attention_backward(grad_out, *_unpacked(qkv))


def contrastive_loss(image: Shape, text: Shape, *_: Any) -> int:
    return _product(image, text)


def contrastive_loss_backward(
    grad_loss: Shape, image: Shape, text: Shape, scale: Shape, bias: Shape | None, r: Shape, c: Shape, sizes: Shape, kind: str, group: str,
    exchange: str, need_image: bool, need_text: bool, *_: Any,
) -> int:  # fmt: skip
    return (1 + need_image + need_text) * _product(image, text)


def linear_cross_entropy(hidden: Shape, weight: Shape, *_: Any) -> int:
    return _product(hidden, weight)


def linear_cross_entropy_backward(
    grad_nll: Shape, hidden: Shape, weight: Shape, labels: Shape, lse: Shape, ignore_index: int, need_hidden: bool, need_weight: bool, *_: Any
) -> int:  # fmt: skip
    return (1 + need_hidden + need_weight) * _product(hidden, weight)


def linear_cross_entropy_total(
    hidden: Shape, weight: Shape, labels: Shape, ignore_index: int, mean: bool, need_hidden: bool, need_weight: bool, *_: Any
) -> int:
    return (1 + need_hidden + need_weight) * _product(hidden, weight)


def latent_projection(tokens: Shape, weight: Shape, *_: Any) -> int:
    return _product(tokens, weight)


def latent_projection_backward(
    grad_x: Shape, tokens: Shape, weight: Shape, patch_size: int, need_tokens: bool, need_weight: bool, *_: Any
) -> int:
    return (need_tokens + need_weight) * _product(tokens, weight)


def noise_projection(z: Shape, sigma: Shape, weight: Shape, *_: Any) -> int:
    return _product(z, weight)


def noise_projection_backward(
    grad_y: Shape, z: Shape, sigma: Shape, weight: Shape, rng: Shape, need_z: bool, need_sigma: bool, need_weight: bool, *_: Any
) -> int:
    return ((need_z or need_sigma) + need_weight) * _product(z, weight)


def _patch_product(latents: Shape, weight: Shape, patch_size: int) -> int:
    return 2 * latents[0] * (latents[2] // patch_size) * (latents[3] // patch_size) * math.prod(weight)


def patch_embed(
    latents: Shape, weight: Shape, bias: Shape | None, pos_embed: Shape | None, cls_token: Shape | None, rng: Shape | None,
    patch_size: int, *_: Any,
) -> int:  # fmt: skip
    return _patch_product(latents, weight, patch_size)


def patch_embed_backward(
    grad_y: Shape, latents: Shape, weight: Shape, rng: Shape | None, patch_size: int, scale: float, shift: float, moments: bool,
    need_latents: bool, need_weight: bool, *_: Any,
) -> int:  # fmt: skip
    return (need_latents + need_weight) * _patch_product(latents, weight, patch_size)


def nothing(*_: Any) -> int:
    """No matrix product."""
    return 0


def _counted(count: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_shape=None, **_: count(*args)


FORMULAS = (
    linear, linear_backward, mlp, mlp_backward, flash_attention, flash_attention_backward, flash_attention_qkvpacked,
    flash_attention_qkvpacked_backward, contrastive_loss, contrastive_loss_backward, linear_cross_entropy, linear_cross_entropy_backward,
    linear_cross_entropy_total, latent_projection, latent_projection_backward, noise_projection, noise_projection_backward, patch_embed,
    patch_embed_backward,
)  # fmt: skip
WITHOUT_PRODUCTS = (
    "layer_norm", "layer_norm_backward", "group_norm_silu", "group_norm_silu_backward", "linear_cross_entropy_total_backward",
    "random_normal", "adamw_ema_",
)  # fmt: skip

COUNTER = "torch.utils.flop_counter"


def register(counter: ModuleType) -> None:
    """Adds the formulas to the counter's."""
    for formula in FORMULAS:
        counter.register_flop_formula(getattr(torch.ops.ov3fast, formula.__name__))(_counted(formula))
    for name in WITHOUT_PRODUCTS:
        counter.register_flop_formula(getattr(torch.ops.ov3fast, name))(_counted(nothing))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas once the counter is imported: it imports Triton, which most who import ov3fast don't need."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
