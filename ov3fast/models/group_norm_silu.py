"""Puts ops.group_norm_silu in the places of a diffusers VAE where a GroupNorm is followed by SiLU: in front of every convolution."""

from __future__ import annotations

from torch import Tensor, nn

from ov3fast import ops


class GroupNormSiLU(nn.Module):
    """silu(group_norm(x)) with the parameters, and their names, of the GroupNorm that it replaces."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


def fuse_group_norm_silu(vae: nn.Module) -> None:
    """Replaces the pairs within diffusers' ResnetBlock2D, Encoder and Decoder, in place.

    A block whose activation is not SiLU, or is also used on a time embedding, stays as it is; so do norms without an activation.
    """
    for module in vae.modules():
        if _is_pair(module, "norm1", "nonlinearity") and _is_pair(module, "norm2", "nonlinearity"):
            if getattr(module, "time_emb_proj", None) is None:
                _replace(module, ("norm1", "norm2"), "nonlinearity")
        elif _is_pair(module, "conv_norm_out", "conv_act"):
            _replace(module, ("conv_norm_out",), "conv_act")


def _is_pair(module: nn.Module, norm: str, activation: str) -> bool:
    first, second = getattr(module, norm, None), getattr(module, activation, None)
    return isinstance(first, nn.GroupNorm) and first.affine and isinstance(second, nn.SiLU)


def _replace(module: nn.Module, norms: tuple[str, ...], activation: str) -> None:
    for name in norms:
        setattr(module, name, GroupNormSiLU(getattr(module, name)))
    setattr(module, activation, nn.Identity())
