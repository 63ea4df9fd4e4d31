"""Argument checks shared by the public operators: one line that names the argument, what it got and what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(op: str, name: str, value: Any, *, ndim: int | None = None, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """TypeError unless `value` is a tensor of one of `dtypes`; ValueError unless it has `ndim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be of dtype {_names(dtypes)}, got {_name(value.dtype)}")
    if value.dtype == torch.float16 and value.device.type == "cpu":
        raise TypeError(f"{op}: {name} is float16 on the CPU, where it is about 1000 times slower; use bfloat16")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {tuple(value.shape)}")


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], meaning: str = "") -> None:
    """ValueError unless the shape is `expected`; `meaning` explains it, e.g. "[D]"."""
    if tuple(value.shape) != tuple(expected):
        explained = f" {meaning}" if meaning else ""
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)}{explained}, got {tuple(value.shape)}")


def parameter(
    op: str,
    name: str,
    value: Tensor | None,
    expected: tuple[int, ...],
    like: Tensor,
    meaning: str = "",
    *,
    mixed: bool = False,
) -> None:
    """Checks an optional tensor: of shape `expected`, on the device and of the dtype of `like`, or with `mixed` of float32."""
    if value is None:
        return
    if isinstance(value, Tensor) and value.shape == expected and value.device == like.device:
        if value.dtype == like.dtype or (mixed and value.dtype == torch.float32):
            return  # the common case; what follows works out which error to raise
    tensor(op, name, value)
    shape(op, name, value, expected, meaning)
    same_device(op, name, value, like)
    if value.dtype != like.dtype and not (mixed and value.dtype == torch.float32):
        takes = _names((like.dtype, torch.float32)) if mixed and like.dtype != torch.float32 else _name(like.dtype)
        raise TypeError(f"{op}: {name} must be of dtype {takes}, got {_name(value.dtype)}")


def same_device(op: str, name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, the first argument on {like.device}; they must be on one device")


def rng(op: str, value: Any) -> None:
    """TypeError unless `value` is (seed, offset) as an int64[2] tensor."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != (2,):
        got = f"{_name(value.dtype)} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: rng must be an int64 tensor (seed, offset) of shape (2,), got {got}; see ops.random.make_rng")


def flag(op: str, name: str, value: Any) -> bool:
    """`value` as a bool; 0 and 1 are accepted. TypeError for anything else."""
    if not isinstance(value, (bool, int)):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")
    return bool(value)


def autocast(*values: Tensor | None) -> tuple[Any, ...]:
    """Under torch.autocast, casts float32 and half tensors to the autocast dtype, as PyTorch does for its matrix products."""
    first = values[0]
    if not isinstance(first, Tensor):
        first = next((value for value in values if isinstance(value, Tensor)), None)
    device = "meta" if first is None else first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return values
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64 else value
        for value in values
    )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(dict.fromkeys(_name(dtype) for dtype in dtypes))
