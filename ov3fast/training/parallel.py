"""How the processes of a run hold the model and average its gradients.

    parallel = Parallel(model, recipe, ranks)       before the optimizer: sharding replaces the parameters
    outputs = parallel.runner(latents, ...)

ddp    DistributedDataParallel: a whole copy each; gradients are all-reduced in the backward pass.
fsdp   FSDP2 (fully_shard): W processes hold 1/W of every parameter, gradient, moment and average. A block's weights are gathered before it
       runs and freed behind it; its gradients are reduce-scattered. What is in no block (embeddings, heads, norms) is one more group,
       which stays gathered from the forward pass to the end of the backward pass.
hsdp   shares within groups of `shard_size` processes, copies beyond them: the reduce-scatter stays within a node, the all-reduce
       between nodes carries 1 / shard_size.

With precision "bf16" weights are gathered in bfloat16 and gradients reduced in float32; the shares stay float32. Scalars (the logit scale
and bias) can't be sharded: every process keeps them, and `finish` averages their gradients.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ov3fast.models.openvision3 import PARTS, OpenVision3
from ov3fast.recipes.config import Recipe
from ov3fast.training.distributed import Ranks


class Parallel:
    """The model as this process runs it. runner: what a step calls. mesh: the processes of fsdp and hsdp."""

    def __init__(self, model: OpenVision3, recipe: Recipe, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.kind = "alone" if ranks.group is None else recipe.parallel
        self.mesh: Any = None
        self.runner: nn.Module = model
        self._scalars: list[nn.Parameter] = []
        if self.kind == "ddp":
            self.runner = self._replicate(recipe)
        elif self.sharded:
            self._shard(recipe)

        self.reshards = recipe.reshard
        self.bytes_gathered = 2 if recipe.precision == "bf16" else 4
        """Of a gathered weight's value."""

    @property
    def sharded(self) -> bool:
        return self.kind in ("fsdp", "hsdp")

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's passes. Copies exchange gradients in a step's last one alone; shares are reduced in each, which keeps
        them small, and all-reduced between copies in the last."""
        if self.kind == "ddp" and not last:
            with self.runner.no_sync():
                yield
            return
        if self.kind == "hsdp":
            self.model.set_requires_all_reduce(last)
        yield

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around passes through a graph that is used again: no gradient is reduced and no weight freed."""
        if self.sharded:
            self.model.set_is_last_backward(False)
            self.model.set_reshard_after_backward(False)
            self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            if self.sharded:
                self.model.set_is_last_backward(True)
                self.model.set_reshard_after_backward(True)
                self.model.set_requires_gradient_sync(True)

    def finish(self) -> None:
        """Ends a step's backward passes: averages the gradients that the wrapper left alone."""
        gradients = [p.grad for p in self._scalars if p.grad is not None]
        if gradients:
            flat = torch.stack(gradients)
            dist.all_reduce(flat, group=self.ranks.group)
            for gradient, value in zip(gradients, flat / self.ranks.world, strict=True):
                gradient.copy_(value)

    def describe(self) -> str:
        """The mesh in words."""
        world = self.ranks.world
        if self.kind == "alone":
            return "1 process"
        if self.kind == "ddp":
            return f"{world} processes, a copy of the model each (ddp)"
        if self.kind == "fsdp":
            return f"{world} processes, 1/{world} of the model each (fsdp)"
        copies, share = self.mesh.shape
        return f"{world} processes, {copies} copies of the model over {share} each (hsdp)"

    def _replicate(self, recipe: Recipe) -> nn.Module:
        objective = recipe.objective
        all_used = min(objective.rec_weight, objective.und_weight, objective.caption_weight, objective.contrastive_weight) > 0
        return nn.parallel.DistributedDataParallel(
            self.model,
            device_ids=[self.ranks.device.index] if self.ranks.device.type == "cuda" else None,
            process_group=self.ranks.group,
            gradient_as_bucket_view=True,
            find_unused_parameters=not all_used,
        )

    def _shard(self, recipe: Recipe) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        world, device = self.ranks.world, self.ranks.device.type
        share = shard_size(recipe, world)
        if self.kind == "hsdp":
            self.mesh = init_device_mesh(device, (world // share, share), mesh_dim_names=("replicate", "shard"))
        else:
            self.mesh = init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        narrow = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if recipe.precision == "bf16" else {}
        options = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(**narrow, cast_forward_inputs=False),
            "reshard_after_forward": recipe.reshard,
        }
        self._scalars = [p for p in self.model.parameters() if p.ndim == 0]
        for part in PARTS:
            for block in getattr(self.model, part).transformer.blocks:
                fully_shard(block, **options)
        fully_shard(self.model, **{**options, "reshard_after_forward": False}, ignored_params=set(self._scalars))
        register_fsdp_forward_method(self.model, "contrastive_features")
        # The tokens that the model returns are never written to.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard_size(recipe: Recipe, world: int) -> int:
    """Processes that share one copy of the model. ValueError where they don't divide the run's."""
    if recipe.parallel == "ddp":
        return 1
    if recipe.parallel == "fsdp":
        return world
    size = recipe.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % size:
        raise ValueError(f"shard_size must divide the {world} processes of the run, got {size}")
    return size


def whole(tensor: Tensor) -> Tensor:
    """A parameter or a tensor like one, put together from its shares. Every rank has to take part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's share of a parameter or a tensor like one; the tensor itself where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def place(into: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into a parameter or a tensor like one, of which each process may hold a share."""
    if hasattr(into, "to_local") and not hasattr(value, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank=None: every rank has the whole value and takes its own share.
        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(value)
