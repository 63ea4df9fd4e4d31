"""AdamW with an EMA of the weights on ops.adamw_ema_, as a torch.optim.Optimizer: torch's schedulers and state dicts fit.

Weight decay is on the weights of linear layers only (big_vision's rule `.*/kernel`): not on norms, biases, embeddings, positions,
queries and scalars. State of a parameter: step, exp_avg and exp_avg_sq, as torch.optim.AdamW's, and ema.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.recipes.config import OptimizerConfig
from ov3fast.training.parallel import own, place

MOMENTS = ("exp_avg", "exp_avg_sq")


def decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on."""
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.requires_grad
    }


class AdamW(torch.optim.Optimizer):
    """step() updates the parameters from their .grad, all in one call of the operator; one without a gradient is left as it is.

    param_groups: the parameters with weight decay, and those without. They share lr, betas and eps: the operator takes one each.
    Parameters that FSDP2 sharded are updated share by share, clipped by the norm over all ranks; their state is sharded alike.
    leave: names of parameters that another optimizer updates.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, lr: float = 1e-3, leave: Container[str] = frozenset()
    ) -> None:
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in leave}
        self.grad_norm = torch.zeros(())
        """Global norm of the gradients of the last step, before clipping: a scalar on the parameters' device. Where it is not finite,
        that step changed nothing."""
        self._schedule: Tensor | None = None
        self._sharded = any(hasattr(p, "to_local") for p in self.parameters.values())
        with_decay = decayed(model)
        groups = [
            {"params": [p for name, p in self.parameters.items() if (name in with_decay) == decays], "weight_decay": decay}
            for decays, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        super().__init__(groups, {"lr": lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0})
        step = torch.zeros(())
        for p in self.parameters.values():
            self.state[p] = {"step": step, **{moment: torch.zeros_like(p) for moment in MOMENTS}}
            if config.ema_decay is not None:
                self.state[p]["ema"] = p.detach().clone()

    @property
    def steps(self) -> int:
        """Steps done."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """The weights' average by name; None where none is kept."""
        return None if self.config.ema_decay is None else {name: self.state[p]["ema"] for name, p in self.parameters.items()}

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update: clips, steps, averages. Returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.advance()
        self.update()
        return loss

    def read_schedule_from(self, device: torch.device) -> None:
        """From now on `update` reads the step's number, the rate and the average's decay from this device's memory, as a CUDA graph has to."""
        self._schedule = torch.zeros(3, dtype=torch.float64, device=device)

    def advance(self) -> None:
        """The host's part of a step: counts it, and writes its number to where `update` reads it."""
        steps, decay = self.steps + 1, self.config.ema_decay
        self.set_steps(steps)
        self._numbers = steps, self._shared("lr"), None if decay is None else min(decay, (1 + steps) / (10 + steps))
        if self._schedule is not None:
            self._schedule.copy_(torch.tensor([value or 0.0 for value in self._numbers], dtype=torch.float64))

    @torch.no_grad()
    def update(self) -> None:
        """The device's part: changes the weights, their moments and average."""
        config = self.config
        step, lr, ema_decay = self._numbers if self._schedule is None else self._schedule.unbind()
        decays = {id(p): group["weight_decay"] for group in self.param_groups for p in group["params"]}
        # In the model's order, in which the norm is summed.
        updated = [p for p in self.parameters.values() if p.grad is not None]
        states = [self.state[p] for p in updated]
        average = config.ema_decay is not None
        lists = [
            updated,
            [p.grad for p in updated],
            *([state[key] for state in states] for key in (*MOMENTS, "ema")[: 2 + average]),
        ]
        norm = None
        if self._sharded:
            norm = norm_over_ranks(lists[1])
            lists = [[own(t) for t in tensors] for tensors in lists]
        self.grad_norm = ops.adamw_ema_(
            *lists,
            step=step,
            lr=lr,
            betas=tuple(self._shared("betas")),
            eps=self._shared("eps"),
            weight_decay=[decays[id(p)] for p in updated],
            # With a bound, even an infinite one, the operator changes nothing where the norm is not finite.
            max_norm=math.inf if config.clip_norm is None else config.clip_norm,
            ema_decay=ema_decay if average else None,
            norm=norm,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """A state_dict of this class, or of a torch.optim.AdamW over the same groups; an average it lacks starts at the weights."""
        super().load_state_dict(dict(state_dict))
        if self.config.ema_decay is not None:
            for p in self.parameters.values():
                self.state[p].setdefault("ema", p.detach().clone())
        self.set_steps(self.steps)

    def moments(self) -> dict[str, Tensor]:
        """The moments by name, as checkpoints hold them; `steps` and `ema` are kept apart."""
        return {f"{moment}.{name}": self.state[p][moment] for moment in MOMENTS for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, moments: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None, steps: int) -> None:
        """The inverse of `moments`. ValueError names what is missing."""
        self.set_steps(steps)
        copy(self.moments(), moments, "optimizer")
        if self.ema is not None:
            copy(self.ema, ema or {}, "ema")

    def set_steps(self, steps: int) -> None:
        """Steps done."""
        step = torch.tensor(float(steps))
        for state in self.state.values():
            state["step"] = step

    def _shared(self, name: str) -> Any:
        values: Iterable[Any] = [group[name] for group in self.param_groups]
        if any(value != self.param_groups[0][name] for value in values):
            raise ValueError(f"optimizer: {name} must be the same in all param_groups, got {', '.join(map(str, values))}")
        return self.param_groups[0][name]


def norm_over_ranks(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of gradients of which some are sharded over all ranks; it has the same bits on every rank."""
    shares = [g.to_local() for g in gradients if hasattr(g, "to_local")]
    wide = torch.float64 if shares[0].dtype == torch.float64 else torch.float32
    mesh = next(g.device_mesh for g in gradients if hasattr(g, "to_local"))
    copies = mesh.size() // mesh.size(mesh.ndim - 1)
    # A copy's ranks alone would do, but might add up in another order than another copy's.
    squares = _squares(shares, wide) / copies
    dist.all_reduce(squares)
    wholes = [g for g in gradients if not hasattr(g, "to_local")]
    return (squares + _squares(wholes, wide) if wholes else squares).sqrt().to(wide)


def _squares(tensors: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide)).double().square().sum()


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
        place(into[name], given[name])
