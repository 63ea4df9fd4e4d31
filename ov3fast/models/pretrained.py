"""Weights and folders on disk: finding them (folder or hub id), reading, checking keys, writing atomically."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HUB_PREFIX = "hf-hub:"
INDEX_SUFFIX = ".index.json"
"""What follows a weights file's name in that of the list of its shards."""


@dataclass(frozen=True)
class Hub:
    """How a hub id is looked up, in huggingface_hub's words; a local path needs none of it."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


def resolve(path: str | Path, what: str, patterns: list[str], hub: Hub | None = None) -> Path:
    """A local folder or file as it is; a hub id (owner/name, with or without hf-hub:) downloaded, `patterns` only.

    FileNotFoundError says what was looked for.
    """
    hub = hub or Hub()
    text = str(path).removeprefix(HUB_PREFIX)
    local = Path(text).expanduser()
    if local.exists():
        return local
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{what}: no such folder or file {text}; give a path or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            text,
            revision=hub.revision,
            token=hub.token,
            cache_dir=hub.cache_dir,
            local_files_only=hub.local_files_only,
            allow_patterns=patterns,
        )
        return Path(found)
    except Exception as error:  # the hub client raises many types: offline, gated, absent
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
    """The device, where it exists here and can compute: ValueError says why not, in one line."""
    if device is None:
        return None
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0] if str(error).strip() else type(error).__name__
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


def as_dtype(dtype: torch.dtype | str | None, what: str) -> torch.dtype | None:
    """What `dtype=` may be: None is float32, "auto" the file's own (returned as None), else a floating torch.dtype or its name."""
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'{what}: dtype must be a floating torch.dtype, its name or "auto", got {dtype!r}')
    return found


def with_variant(name: str, variant: str | None) -> str:
    """model.safetensors -> model.fp16.safetensors, as transformers and diffusers name variants."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def weight_patterns(names: Iterable[str], variant: str | None = None) -> list[str]:
    """The files of the hub that may hold the weights called one of `names`: whole, or in shards with their list."""
    files = [with_variant(name, variant) for name in names]
    return [*files, *(_index_of(file) for file in files), *(_shards_of(file) for file in files)]


def find_weights(folder: Path, names: Iterable[str], what: str, variant: str | None = None) -> Path:
    """The first of `names` (of the variant) that is in the folder, or the list of its shards. FileNotFoundError names them all."""
    files = [with_variant(name, variant) for name in names]
    for file in files:
        for choice in (file, _index_of(file)):
            if (folder / choice).is_file():
                return folder / choice
    sought = f"no {' or '.join(files)}" if len(files) < 3 else f"none of {', '.join(files)}"
    raise FileNotFoundError(f"{what}: {folder} has {sought}")


def read_tensors(
    path: Path, what: str, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> dict[str, Tensor]:
    """A state dict from .safetensors, from a torch file (weights only, so that nothing in it runs), or from the list of their shards.

    Tensors are on `device` (default: CPU), floating ones in `dtype` (default: the file's). They own their memory, and a .safetensors file is
    read tensor by tensor, so that one copy is there at a time.
    """
    state: dict[str, Tensor] = {}
    for file in _shards(path, what):
        if not file.is_file():
            raise FileNotFoundError(f"{what}: {file.parent} has no {file.name}")
        try:
            for key, value in _safetensors(file) if file.suffix == ".safetensors" else _torch_file(file, what):
                if isinstance(value, Tensor):
                    floating = dtype if value.is_floating_point() else None
                    # safetensors returns views of the mapped file, which a later write to the file would change.
                    value = value.to(device=device, dtype=floating, copy=file.suffix == ".safetensors")
                state[key] = value
        except (FileNotFoundError, _NotAStateDict):
            raise
        except Exception as error:  # cut files raise SafetensorError, UnpicklingError, RuntimeError, EOFError ...
            raise ValueError(
                f"{what}: can't read {file}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            ) from error
    return state


class _NotAStateDict(ValueError):
    pass


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        keys = list(opened.keys())
    for key in keys:  # reopened for each tensor, so that pages already read don't stay mapped
        with safe_open(str(file), "pt") as opened:
            value = opened.get_tensor(key)
        yield key, value


def _torch_file(file: Path, what: str) -> Iterator[tuple[str, Any]]:
    values = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(values, Mapping):
        raise _NotAStateDict(f"{what}: {file} must hold a state dict, got {type(values).__name__}")
    yield from values.items()


def _index_of(file: str) -> str:
    """model.safetensors -> model.safetensors.index.json, model.fp16.safetensors -> model.safetensors.index.fp16.json."""
    stem, _, suffix = file.rpartition(".")
    stem, _, variant = stem.partition(".")
    return f"{stem}.{suffix}.index.{variant}.json" if variant else f"{stem}.{suffix}{INDEX_SUFFIX}"


def _shards_of(file: str) -> str:
    stem, _, suffix = file.rpartition(".")
    stem, _, variant = stem.partition(".")
    return f"{stem}{'.' + variant if variant else ''}-*-of-*.{suffix}"


def _shards(path: Path, what: str) -> list[Path]:
    if ".index." not in path.name or path.suffix != ".json":
        return [path]
    places = read_json(path, what).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise ValueError(f"{what}: {path} must hold a weight_map of keys to files in its folder")
    return [path.parent / name for name in dict.fromkeys(places.values())]


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A .safetensors file, or a torch file where the suffix is another; views and parts of larger storages are written as plain tensors."""
    if path.suffix != ".safetensors":
        torch.save({key: _plain(value) for key, value in tensors.items()}, path)
        return
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


@contextmanager
def without_values() -> Iterator[None]:
    """Modules built in here are on the meta device and take neither memory nor time; `load_state(..., assign=True)` fills them."""
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    """Leaves out in-place functions, and what draws numbers. The meta device has such functions too, but its first use of one
    imports torch.compile's machinery, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and (args or kwargs):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if name == "randn" else func)(*args, **(kwargs or {}))


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str, assign: bool = False) -> None:
    """Strict load with one-line errors. assign: the module, built on the meta device, takes the tensors themselves."""
    optional = _unset_buffers(module)
    check_state(module.state_dict(), {key: value for key, value in state.items() if key not in optional}, what)
    module.load_state_dict(state, strict=True, assign=assign)


def _unset_buffers(module: nn.Module) -> set[str]:
    """Keys of buffers that are there only in some state dicts: a position embedding that came with its weights."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name, value in part._buffers.items()
        if value is None
    }


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    # safetensors refuses tensors that share a storage.
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()


def _some(keys: list[str]) -> str:
    return repr(keys[0]) + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
