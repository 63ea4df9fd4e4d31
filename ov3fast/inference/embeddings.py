"""Embeddings on disk: .safetensors and .npz (pooled and tokens), .npy (pooled alone, with a .json beside it)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ov3fast.io import atomic_write, check_writable

SUFFIXES = (".safetensors", ".npz", ".npy")


@dataclass(frozen=True)
class Embeddings:
    """pooled float32 [N, E] and tokens float32 [N, n, D] (None if they were not kept) of the images `names` [N].

    skipped: name -> reason of the images that could not be read. about: how they were made: "latents" (the convention), "image_size",
    "preprocess". Names of files that are not UTF-8 hold surrogate escapes, as Python's own file names do (os.fsencode gives the bytes).
    """

    pooled: Tensor
    tokens: Tensor | None
    names: list[str]
    skipped: dict[str, str]
    about: dict[str, str]


def check_output(path: str | Path, what: str = "out") -> Path:
    """`path` with ~ expanded, where write_embeddings could write it: to be asked before the work. what: its name in errors.

    ValueError for another suffix, FileExistsError where a .npy would need a .json that is there and not its own, OSError where
    nothing can be written.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{what} must end in {', '.join(SUFFIXES)}; got {path}")
    check_writable(path, what)
    if path.suffix == ".npy":
        beside = check_writable(path.with_suffix(".json"), what)
        if beside.exists() and not _is_ours(beside):
            raise FileExistsError(f"{what}: {path} writes its names to {beside}, which holds something else; give another name")
    return path


def write_embeddings(path: str | Path, embeddings: Embeddings) -> Path:
    """Writes the file whole or not at all, in the format of its suffix; folders are made. Returns the path, with ~ expanded.

    All three formats hold the same JSON words, in ASCII: names, skipped and what `about` says. Errors as in `check_output`.
    """
    path = check_output(path)
    words = {"names": json.dumps(embeddings.names), "skipped": json.dumps(embeddings.skipped), **embeddings.about}
    tensors = {"pooled": embeddings.pooled}
    if embeddings.tokens is not None and path.suffix != ".npy":
        tensors["tokens"] = embeddings.tokens
    if path.suffix == ".npy":
        with atomic_write(path) as temporary, atomic_write(path.with_suffix(".json")) as beside:
            np.save(temporary, embeddings.pooled.numpy())
            beside.write_text(json.dumps(words, indent=1), encoding="ascii")
        return path
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: value.contiguous() for name, value in tensors.items()}, str(temporary), words)
        else:
            arrays: dict[str, Any] = {name: value.numpy() for name, value in tensors.items()}
            np.savez(temporary, about=np.array(json.dumps(words)), **arrays)
    return path


def read_embeddings(path: str | Path) -> Embeddings:
    """What write_embeddings wrote. FileNotFoundError or ValueError names the file."""
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"read_embeddings: {path} must end in {', '.join(SUFFIXES)}")
    for needed in [path, path.with_suffix(".json")] if path.suffix == ".npy" else [path]:
        if not needed.is_file():
            raise FileNotFoundError(f"read_embeddings: there is no file {needed}")
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            words, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    elif path.suffix == ".npz":
        with np.load(path) as file:
            words = json.loads(str(file["about"])) if "about" in file else {}
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "about"}
    else:
        words = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        arrays = {"pooled": torch.from_numpy(np.load(path))}
    if "pooled" not in arrays or "names" not in words:
        raise ValueError(
            f"read_embeddings: {path} holds no embeddings of write_embeddings (it holds {', '.join(arrays) or 'nothing'})"
        )
    about = {key: value for key, value in words.items() if key not in ("names", "skipped")}
    return Embeddings(arrays["pooled"], arrays.get("tokens"), json.loads(words["names"]), json.loads(words["skipped"]), about)


def _is_ours(path: Path) -> bool:
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(words, dict) and {"names", "skipped", "latents"} <= set(words)
