"""Low-rank updates of linear layers (Hu et al., "LoRA", 2021): y = W x + (alpha / rank) B A x; A, B trained, W frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankLinear(nn.Module):
    """A frozen linear layer plus a low-rank update, which starts at 0."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer with the update merged into its weight."""
        self.base.weight += (self.up @ self.down * self.scale).to(self.base.weight.dtype)
        return self.base


def add_lora(model: nn.Module, rank: int, alpha: float, skip: tuple[str, ...] = ("lm_head",)) -> list[str]:
    """Adds a low-rank update to every linear layer of `model` except those named in `skip`; returns the layers' names."""
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.split(".")[-1] not in skip
    ]
    for name in found:
        parent, child = _parent(model, name)
        setattr(parent, child, LowRankLinear(getattr(parent, child), rank, alpha))
    return found


def merge_lora(model: nn.Module) -> None:
    """Inverse of `add_lora`: merges every update into its weight and restores plain linear layers."""
    for name in [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]:
        parent, child = _parent(model, name)
        setattr(parent, child, getattr(parent, child).merged())


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    above, _, child = name.rpartition(".")
    return model.get_submodule(above), child
