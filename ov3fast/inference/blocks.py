"""The supported pre-LN blocks of five libraries, under one set of names.

y = x + s1 * proj(attention(norm1(x)));   y + s2 * fc2(activation(fc1(norm2(y))))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python": "gelu", "quick_gelu": "quick_gelu"}
"""transformers' names for the activations of ops.mlp, and for x sigmoid(1.702 x)."""

Pair = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""


@dataclass(frozen=True)
class Block:
    """A block's parameters, shared with the block."""

    norm1: Any
    """weight, bias and eps, as norm2."""
    norm2: Any
    qkv: tuple[Pair, ...]
    """The stacked projection, or separate q, k and v."""
    proj: Pair
    fc1: Pair | None
    """None, like fc2, for another kind of MLP; `mlp` is then called as it is."""
    fc2: Pair | None
    heads: int
    activation: str | None
    """ops.mlp's name, or "quick_gelu"; None for another activation, which is then `act`."""
    act: Any
    mlp: Any
    scale1: Tensor | None = None
    scale2: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """All of them, in a fixed order."""
        pairs = (*self.qkv, self.proj, self.fc1 or (), self.fc2 or ())
        norms = (self.norm1.weight, self.norm1.bias, self.norm2.weight, self.norm2.bias)
        return [*(tensor for pair in pairs for tensor in pair), *norms, self.scale1, self.scale2]


def describe(module: nn.Module) -> Block | None:
    """None for anything but a supported block, or for one with parts that the operators lack (such as q/k norms)."""
    for base in type(module).__mro__:
        found = _KNOWN.get((base.__module__.split(".")[0], base.__name__))
        if found is not None:
            return found(module)
    return None


def _pair(linear: Any) -> Pair:
    return linear.weight, linear.bias


def _plain(*linears: Any) -> bool:
    return all(isinstance(linear, nn.Linear) for linear in linears)


def _of_transformers(layer: Any) -> Block | None:
    """CLIP, SigLIP and SigLIP 2."""
    attention, mlp = layer.self_attn, layer.mlp
    return _apart(layer, attention, mlp, layer.layer_norm1, layer.layer_norm2)


def _of_dinov2(layer: Any) -> Block | None:
    scales = {f"scale{i}": getattr(getattr(layer, f"layer_scale{i}"), "lambda1", None) for i in (1, 2)}
    return _apart(layer, layer.attention, layer.mlp, layer.norm1, layer.norm2, **scales)


def _apart(layer: Any, attention: Any, mlp: Any, norm1: Any, norm2: Any, **scales: Any) -> Block | None:
    parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    proj = getattr(attention, "out_proj", None) or getattr(attention, "o_proj", None)
    if not _plain(*parts, proj):
        return None
    heads = attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads
    pairs = tuple(_pair(part) for part in parts)
    act = getattr(mlp, "activation_fn", None) or getattr(mlp, "activation", None)
    if act is None or not _plain(getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)):
        return Block(norm1, norm2, pairs, _pair(proj), None, None, heads, None, None, mlp, **scales)
    activation = ACTIVATIONS.get(str(mlp.config.hidden_act)) if hasattr(mlp, "config") else None
    return Block(norm1, norm2, pairs, _pair(proj), _pair(mlp.fc1), _pair(mlp.fc2), heads, activation, act, mlp, **scales)


def _of_timm(block: Any) -> Block | None:
    attention, mlp = block.attn, block.mlp
    linears = (
        getattr(attention, "qkv", None),
        getattr(attention, "proj", None),
        getattr(mlp, "fc1", None),
        getattr(mlp, "fc2", None),
    )
    norms_within = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm")] + [getattr(mlp, "norm", None)]
    norms = (block.norm1, block.norm2)
    if not _plain(*linears) or any(norm is not None and not isinstance(norm, nn.Identity) for norm in norms_within):
        return None
    if not all(isinstance(norm, nn.LayerNorm) and norm.weight is not None for norm in norms):
        return None
    scales = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls2")]
    qkv, proj, fc1, fc2 = map(_pair, linears)
    return Block(*norms, (qkv,), proj, fc1, fc2, attention.num_heads, _gelu(mlp.act), mlp.act, mlp, *scales)


def _of_open_clip(block: Any) -> Block | None:
    attention, mlp = block.attn, block.mlp
    known = isinstance(attention, nn.MultiheadAttention) and attention.batch_first and attention.in_proj_weight is not None
    fc1, fc2 = getattr(mlp, "c_fc", None), getattr(mlp, "c_proj", None)
    if not known or not _plain(fc1, fc2) or getattr(block, "ln_1_kv", None) is not None:
        return None
    if not all(isinstance(norm, nn.LayerNorm) for norm in (block.ln_1, block.ln_2)):
        return None
    scales = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls_1", "ls_2")]
    qkv = (attention.in_proj_weight, attention.in_proj_bias)
    return Block(
        block.ln_1, block.ln_2, (qkv,), _pair(attention.out_proj), _pair(fc1), _pair(fc2), attention.num_heads,
        _gelu(mlp.gelu), mlp.gelu, mlp, *scales,
    )  # fmt: skip


def _of_ov3fast(block: Any) -> Block | None:
    mlp = block.mlp
    qkv, proj, fc1, fc2 = map(_pair, (block.attn.qkv, block.attn.proj, mlp.fc1, mlp.fc2))
    return Block(block.norm1, block.norm2, (qkv,), proj, fc1, fc2, block.attn.heads, mlp.activation, None, mlp)


def _gelu(act: Any) -> str | None:
    if type(act).__name__ == "QuickGELU":
        return "quick_gelu"
    if type(act) is nn.GELU or type(act).__name__ == "GELU":
        return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu"
    return "gelu_tanh" if type(act).__name__ == "GELUTanh" else None


_KNOWN: dict[tuple[str, str], Callable[[Any], Block | None]] = {
    ("transformers", "CLIPEncoderLayer"): _of_transformers,
    ("transformers", "SiglipEncoderLayer"): _of_transformers,
    ("transformers", "Siglip2EncoderLayer"): _of_transformers,
    ("transformers", "Dinov2Layer"): _of_dinov2,
    ("transformers", "Dinov2WithRegistersLayer"): _of_dinov2,
    ("timm", "Block"): _of_timm,
    ("open_clip", "ResidualAttentionBlock"): _of_open_clip,
    ("ov3fast", "Block"): _of_ov3fast,
}
"""(package, class) -> the function that names its parts."""
