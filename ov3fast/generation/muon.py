"""Muon for the matrices of a generator's blocks, AdamW for the rest (Jordan et al. 2024), as in RAEv2.

    M <- 0.95 M + 0.05 G;   U = orthogonalised(0.05 G + 0.95 M);   W <- W (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) U

The RMS of its update is about that of AdamW's (Liu et al. 2025, arXiv 2502.16982), so both share one learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ov3fast.recipes.config import OptimizerConfig
from ov3fast.training.optimizer import AdamW, copy

MOMENTUM = 0.95


def block_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of the linear layers in trunk and head, by name; excludes embeddings and final layers."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and name.split(".")[0] in ("trunk", "head")
    }


class MuonAdamW:
    """Both optimizers behind the part of training.optimizer.AdamW's interface that the generator trainer uses.

    clip_norm applies only to AdamW's parameters, since Muon's update doesn't depend on the gradient's scale. If a gradient is
    not finite, step() changes nothing and grad_norm is not finite.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.matrices = block_matrices(model)
        self.adamw = AdamW(model, config, leave=self.matrices)
        self.muon = torch.optim.Muon(
            self.matrices.values(), weight_decay=config.weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
        )
        for p in self.matrices.values():
            self.muon.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.averages = {name: p.detach().clone() for name, p in self.matrices.items()} if config.ema_decay is not None else {}
        self.grad_norm = torch.zeros(())
        """Global gradient norm of the last step, before clipping."""

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """EMA of the weights, by name; None without EMA."""
        return None if self.adamw.ema is None else self.adamw.ema | self.averages

    def set_lr(self, lr: float) -> None:
        self.adamw.set_lr(lr)
        for group in self.muon.param_groups:
            group["lr"] = lr

    def zero_grad(self) -> None:
        self.adamw.zero_grad()
        self.muon.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        matrices = list(self.matrices.values())
        norm = torch.stack(torch._foreach_norm([p.grad for p in matrices])).norm()
        self.grad_norm = norm
        if not norm.isfinite():
            return
        self.adamw.step()
        self.grad_norm = (norm.square() + self.adamw.grad_norm.square()).sqrt()
        if not self.grad_norm.isfinite():
            return
        self.muon.step()
        if self.config.ema_decay is not None:
            steps = self.adamw.steps
            decay = min(self.config.ema_decay, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(list(self.averages.values()), matrices, 1 - decay)

    def moments(self) -> dict[str, Tensor]:
        """Optimizer state to checkpoint, besides the weights and their EMA."""
        return self.adamw.moments() | self._momenta()

    def load(self, moments: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None, steps: int) -> None:
        """Restore the state from `moments` and the EMA. ValueError naming what is missing."""
        own, average = self._momenta(), ema or {}
        self.adamw.load(
            {name: value for name, value in moments.items() if name not in own},
            {name: value for name, value in average.items() if name not in self.averages},
            steps,
        )
        copy(own, {name: value for name, value in moments.items() if name in own}, "optimizer")
        copy(self.averages, {name: value for name, value in average.items() if name in self.averages}, "ema")

    def _momenta(self) -> dict[str, Tensor]:
        return {f"momentum.{name}": self.muon.state[p]["momentum_buffer"] for name, p in self.matrices.items()}
