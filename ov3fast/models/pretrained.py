"""Weights and folders on disk: finding them (folder or hub id), reading, checking keys, writing atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HUB_PREFIX = "hf-hub:"


def resolve(path: str | Path, what: str, patterns: list[str]) -> Path:
    """A local folder or file as it is; a hub id (owner/name, with or without hf-hub:) downloaded, `patterns` only.

    FileNotFoundError says what was looked for.
    """
    text = str(path).removeprefix(HUB_PREFIX)
    local = Path(text).expanduser()
    if local.exists():
        return local
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{what}: no such folder or file {text}; give a path or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: offline, gated, absent
        first = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{what}: {text} is no local folder, and the hub could not give it; name a folder, or check the id and network ({first})"
        ) from error


def model_folder(folder: Path, what: str) -> Path:
    """The folder of the model within a training run's folder; any other folder as it is. FileNotFoundError for a run that has no
    model yet."""
    if (folder / "config.json").is_file() or not folder.is_dir():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "recipe.json").is_file():
        raise FileNotFoundError(
            f"{what}: the run has no model yet (no {folder / 'model'}); it is written when training ends or stops"
        )
    return folder


def check_device(device: torch.device | str | None, what: str) -> torch.device | None:
    """The device, where it exists here: ValueError says why not, in one line."""
    if device is None:
        return None
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{what}: device {str(device)!r} can't be used here: {reason}") from None
    return device


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError or ValueError names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {path.parent} has no {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{what}: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{what}: {path} must hold a JSON object, got {type(values).__name__}")
    return values


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file (weights only, so that nothing in it runs). CPU tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {path.parent} has no {path.name}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # cut files raise SafetensorError, UnpicklingError, RuntimeError, EOFError ...
        raise ValueError(
            f"{what}: can't read {path}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
        ) from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: {path} must hold a state dict, got {type(values).__name__}")
    return dict(values)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A .safetensors file; transposed views and parts of larger storages are written as plain tensors."""
    from safetensors.torch import save_file

    save_file({key: _plain(value) for key, value in tensors.items()}, str(path), {"format": "pt"})


def check_state(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """ValueError, in one line, that names the first missing, unexpected or misshapen key and counts the rest."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    if missing or unexpected:
        parts = [f"{kind} key {_some(keys)}" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise ValueError(f"{what}: {'; '.join(parts)}")
    for key, value in expected.items():
        if tuple(given[key].shape) != tuple(value.shape):
            raise ValueError(f"{what}: {key} must have shape {tuple(value.shape)}, got {tuple(given[key].shape)}")


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Strict load with one-line errors."""
    check_state(module.state_dict(), state, what)
    module.load_state_dict(state, strict=True)


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    # safetensors refuses tensors that share a storage.
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()


def _some(keys: list[str]) -> str:
    return repr(keys[0]) + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
