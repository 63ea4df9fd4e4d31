"""Embeddings on disk: .safetensors and .npz (pooled and tokens), .npy (pooled alone, with a .json beside it)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".safetensors", ".npz", ".npy")


@dataclass(frozen=True)
class Embeddings:
    """pooled float32 [N, E] and tokens float32 [N, n, D] (None if they were not kept) of the images `names` [N].

    skipped: name -> reason of the images that could not be read. about: how they were made: "latents" (the convention), "image_size",
    "preprocess".
    """

    pooled: Tensor
    tokens: Tensor | None
    names: list[str]
    skipped: dict[str, str]
    about: dict[str, str]


def write_embeddings(path: str | Path, embeddings: Embeddings) -> Path:
    """Writes the file whole or not at all, in the format of its suffix; folders are made. Returns the path.

    ValueError for another suffix.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"write_embeddings: {path} must end in {', '.join(SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    words = {
        "names": json.dumps(embeddings.names, ensure_ascii=False),
        "skipped": json.dumps(embeddings.skipped, ensure_ascii=False),
        **embeddings.about,
    }
    tensors = {"pooled": embeddings.pooled}
    if embeddings.tokens is not None and path.suffix != ".npy":
        tensors["tokens"] = embeddings.tokens
    if path.suffix == ".npy":
        _replace(path.with_suffix(".json"), json.dumps(words, ensure_ascii=False, indent=1).encode())
    temporary = path.with_name(f".{path.stem}.writing-{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: value.contiguous() for name, value in tensors.items()}, str(temporary), words)
        elif path.suffix == ".npz":
            np.savez(temporary, about=np.array(json.dumps(words)), **{name: value.numpy() for name, value in tensors.items()})
        else:
            np.save(temporary, tensors["pooled"].numpy())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_embeddings(path: str | Path) -> Embeddings:
    """What write_embeddings wrote. FileNotFoundError or ValueError names the file."""
    path = Path(path)
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


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
