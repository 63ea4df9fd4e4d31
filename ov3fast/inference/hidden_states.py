"""A tower's residual stream after each block, for users of other layers than the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vit import ViTEncoder

if TYPE_CHECKING:
    from ov3fast.inference.load import VisionTower


def hidden_states(model: OpenVision3 | VisionTower | ViTEncoder, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(pooled, states): the patch tokens [B, N, D] before the first block and after each block, without CLS; the last equal those of `encode`."""
    encoder = model if isinstance(model, ViTEncoder) else model.encoder
    blocks = list(encoder.transformer.blocks)
    states: list[Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][:, 1:]))] if blocks else []
    hooks += [block.register_forward_hook(lambda _, __, out: states.append((out[0] + out[1])[:, 1:])) for block in blocks]
    try:
        found = model.encode(images)
    finally:
        for hook in hooks:
            hook.remove()
    assert isinstance(found, tuple)
    pooled, tokens = found
    return pooled, [*states[:-1], tokens]
