"""AdamW with an EMA of the weights, over named parameters, on ops.adamw_ema_.

Weight decay is on the weights of linear layers only (big_vision's rule `.*/kernel`): not on norms, biases, embeddings, positions,
queries and scalars. State: two moments in float32, the step count, and the EMA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.recipes.config import OptimizerConfig


def decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on."""
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.requires_grad
    }


class AdamW:
    """step(lr) updates the parameters from their .grad; a parameter without one is left as it is."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.ema = None
        if config.ema_decay is not None:
            self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        with_decay = decayed(model)
        self._weight_decay = {name: config.weight_decay if name in with_decay else 0.0 for name in self.parameters}

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def grad_norm(self) -> Tensor:
        """Global norm of the gradients, a scalar: for the check that comes before the update, which does not check."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def step(self, lr: float) -> None:
        """One update: clips, steps, averages."""
        self.steps += 1
        config, decay = self.config, None
        if config.ema_decay is not None:
            decay = min(config.ema_decay, (1 + self.steps) / (10 + self.steps))
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        ops.adamw_ema_(
            [self.parameters[name] for name in names],
            [self.parameters[name].grad for name in names],
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            None if self.ema is None else [self.ema[name] for name in names],
            step=self.steps,
            lr=lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=[self._weight_decay[name] for name in names],
            max_norm=config.clip_norm,
            ema_decay=decay,
        )

    def state(self) -> dict[str, Tensor]:
        """The moments by name; `steps` and `ema` are kept apart."""
        return {f"{kind}.{name}": value for kind in ("exp_avg", "exp_avg_sq") for name, value in getattr(self, kind).items()}

    @torch.no_grad()
    def load(self, moments: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None, steps: int) -> None:
        """The inverse of `state`. ValueError names what is missing."""
        self.steps = steps
        copy(self.state(), moments, "optimizer")
        if self.ema is not None:
            copy(self.ema, ema or {}, "ema")


@torch.no_grad()
def copy(into: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Copies tensors of the same names and shapes. ValueError names the first that does not fit."""
    for name in [*into, *(name for name in given if name not in into)]:
        if name not in given or name not in into:
            raise ValueError(
                f"{what}: {name} is {'missing from' if name in into else 'unknown to this model, but in'} the checkpoint"
            )
        if into[name].shape != given[name].shape:
            raise ValueError(
                f"{what}: {name} has shape {tuple(given[name].shape)} in the checkpoint, {tuple(into[name].shape)} here"
            )
        into[name].copy_(given[name])
