"""What `optimize` puts in the places of others' modules: the same parameters under the same names, with the operators' forward.

A module keeps its class as a base, so that `isinstance` and everything but `forward` stay; where a call asks for what the operators don't
do (a mask, dropout in training), the base's forward answers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.models.group_norm_silu import fuse_group_norm_silu

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python": "gelu"}
"""transformers' names of what ops.mlp computes."""

LAYERS = {
    "CLIPEncoderLayer": ("layer_norm1", "self_attn", "layer_norm2"),
    "SiglipEncoderLayer": ("layer_norm1", "self_attn", "layer_norm2"),
    "Siglip2EncoderLayer": ("layer_norm1", "self_attn", "layer_norm2"),
    "Dinov2Layer": ("norm1", "attention", "norm2"),
    "Dinov2WithRegistersLayer": ("norm1", "attention", "norm2"),
}
"""Class of a pre-LN block in transformers -> the names of its first norm, its attention and its second norm; the MLP is `mlp`."""


def units(model: nn.Module) -> dict[str, str]:
    """Path within the model -> what would be fused there; no unit lies in another."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        name = type(module).__name__
        if name in LAYERS:
            found[path] = "layer norms with their sums, attention, MLP" if _activation(module.mlp) else "layer norms, attention"
        elif name == "ResnetBlock2D" and getattr(module, "time_emb_proj", None) is None:
            if isinstance(module.norm1, nn.GroupNorm) and isinstance(module.nonlinearity, nn.SiLU):
                found[path] = "GroupNorm + SiLU"
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.weight is not None:
            found[path] = "layer norm"
    return found


def fuse(module: Any) -> None:
    """Fuses one unit, in place."""
    name = type(module).__name__
    if name in LAYERS:
        norm1, attention, norm2 = LAYERS[name]
        _take_forward(getattr(module, attention), _attention_forward)
        _take_forward(getattr(module, norm1), _layer_norm_forward)
        if _activation(module.mlp):
            _take_forward(module.mlp, _mlp_forward)
        _take_forward(module, _layer_forward(norm1, attention, norm2))
    elif name == "ResnetBlock2D":
        fuse_group_norm_silu(module)
    else:
        _take_forward(module, _layer_norm_forward)


def _take_forward(module: nn.Module, make: Callable[[type], Callable[..., Any]]) -> None:
    base = type(module)
    module.__class__ = type(f"Fused{base.__name__}", (base,), {"forward": make(base), "__module__": base.__module__})


def _layer_norm_forward(base: Any) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Any:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    return forward


def _mlp_forward(base: Any) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[str(self.config.hidden_act)]
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, activation=activation)

    return forward


def _activation(mlp: Any) -> str | None:
    linears = all(isinstance(getattr(mlp, name, None), nn.Linear) for name in ("fc1", "fc2"))
    return ACTIVATIONS.get(str(mlp.config.hidden_act)) if linears and hasattr(mlp, "config") else None


def _attention_forward(base: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None or self.training or kwargs.get("is_causal") or kwargs.get("output_attentions"):
            return base.forward(self, hidden_states, attention_mask=attention_mask, **kwargs)
        heads = self.num_heads if hasattr(self, "num_heads") else self.num_attention_heads
        batch, length, _ = hidden_states.shape
        weight, bias = _packed(self)
        qkv = ops.linear(hidden_states, weight, bias).view(batch, length, 3, heads, -1)
        out = ops.flash_attention_qkvpacked(qkv).reshape(batch, length, -1)
        project = self.out_proj if hasattr(self, "out_proj") else self.o_proj
        return ops.linear(out, project.weight, project.bias), None

    return forward


def _packed(attention: Any) -> tuple[Tensor, Tensor | None]:
    """q, k and v as one projection: kept, and packed again once a weight has changed."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    trained = torch.is_grad_enabled() and parts[0].weight.requires_grad
    if trained or torch.compiler.is_compiling():
        return _cat(parts)
    tensors = [tensor for part in parts for tensor in (part.weight, part.bias) if tensor is not None]
    now = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    kept = attention.__dict__.get("_ov3fast_packed")
    if kept is None or kept[0] != now:
        with torch.no_grad():
            kept = (now, _cat(parts))
        attention.__dict__["_ov3fast_packed"] = kept
    return kept[1]


def _cat(parts: list[Any]) -> tuple[Tensor, Tensor | None]:
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return torch.cat([part.weight for part in parts]), bias


def _layer_forward(norm1: str, attention: str, norm2: str) -> Callable[[type], Callable[..., Any]]:
    def make(base: Any) -> Callable[..., Tensor]:
        def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            if self.training:  # stochastic depth
                return base.forward(self, hidden_states, attention_mask=attention_mask, **kwargs)
            second = getattr(self, norm2)
            normed = getattr(self, norm1)(hidden_states)
            branch = getattr(self, attention)(hidden_states=normed, attention_mask=attention_mask, **kwargs)[0]
            if hasattr(self, "layer_scale1"):
                branch = self.layer_scale1(branch)
            normed, x = ops.layer_norm(branch, second.weight, second.bias, second.eps, residual=hidden_states)
            branch = self.mlp(normed)
            return x + (self.layer_scale2(branch) if hasattr(self, "layer_scale2") else branch)

        return forward

    return make
