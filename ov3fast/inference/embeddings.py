"""Embeddings on disk: .safetensors, .npz and .parquet (pooled and tokens), .npy (pooled alone, with a .json beside it), and folders of these."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ov3fast.io import atomic_write, check_writable

SUFFIXES = (".safetensors", ".npz", ".npy", ".parquet")
INDEX = "index.json"
"""Lists the files in order, in a folder that holds embeddings in parts."""
GROUP = 4096
"""Rows per row group of a .parquet file."""


@dataclass(frozen=True)
class Embeddings:
    """pooled [N, E] and tokens [N, n, D] (None if they were not kept), float32 or the stored dtype, of the images `names` [N].

    skipped: name -> reason, for the images that could not be read. about: how they were made: "latents" (the convention), "image_size",
    "preprocess". File names that are not UTF-8 have surrogate escapes, as in Python (os.fsencode gives the bytes).
    """

    pooled: Tensor
    tokens: Tensor | None
    names: list[str]
    skipped: dict[str, str]
    about: dict[str, str]


class MappedFile:
    """Rows [n, ...] of one dtype appended to a file, and read back as one memory-mapped tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.float32)

    def __enter__(self) -> MappedFile:
        self.file = open(self.path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, rows: Tensor) -> None:
        array = np.ascontiguousarray(rows.numpy())
        self.shape, self.dtype = array.shape[1:], array.dtype
        self.file.write(array.data if array.size else b"")

    def tensor(self, count: int) -> Tensor:
        self.file.flush()
        return torch.from_numpy(np.memmap(self.path, self.dtype, "r+", shape=(count, *self.shape)))


def check_output(path: str | Path, what: str = "out", otherwise: str = "") -> Path:
    """`path` with ~ expanded, if write_embeddings could write it; call it before the work. what: the argument's name in errors. otherwise: what
    else it may do instead of ending as a file.

    ValueError for another suffix, FileExistsError if a .npy would overwrite a .json that is not its own, OSError if
    nothing can be written.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{what} must end in {', '.join(SUFFIXES)}{otherwise and f', or {otherwise}'}; got {path}")
    check_writable(path, what)
    if path.suffix == ".npy":
        sidecar = check_writable(path.with_suffix(".json"), what)
        if sidecar.exists() and not _is_ours(sidecar):
            raise FileExistsError(
                f"{what}: {path} writes its names to {sidecar}, which holds something else; choose another name"
            )
    return path


def write_embeddings(path: str | Path, embeddings: Embeddings) -> Path:
    """Writes the file atomically, in the format of its suffix, and creates folders. Returns the path, with ~ expanded.

    All formats hold the same metadata as ASCII JSON: names, skipped and `about`; .parquet has its names in a column, escaped if not UTF-8. Errors as in `check_output`.
    """
    path = check_output(path)
    words = {"names": json.dumps(embeddings.names), "skipped": json.dumps(embeddings.skipped), **embeddings.about}
    tensors = {"pooled": embeddings.pooled}
    if embeddings.tokens is not None and path.suffix != ".npy":
        tensors["tokens"] = embeddings.tokens
    if path.suffix == ".npy":
        with atomic_write(path) as temporary, atomic_write(path.with_suffix(".json")) as sidecar:
            np.save(temporary, embeddings.pooled.numpy())
            sidecar.write_text(json.dumps(words, indent=1), encoding="ascii")
        return path
    with atomic_write(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, embeddings, words)
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: value.contiguous() for name, value in tensors.items()}, str(temporary), words)
        else:
            arrays: dict[str, Any] = {name: value.numpy() for name, value in tensors.items()}
            np.savez(temporary, about=np.array(json.dumps(words)), **arrays)
    return path


def read_embeddings(path: str | Path) -> Embeddings:
    """Reads a file of write_embeddings, or joins the parts in a folder of `encode`. FileNotFoundError or ValueError names the file."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _joined(path)
    words, read = _opened(path)
    arrays = read()
    about = {key: value for key, value in words.items() if key not in ("names", "skipped")}
    return Embeddings(arrays["pooled"], arrays.get("tokens"), json.loads(words["names"]), json.loads(words["skipped"]), about)


class Head(NamedTuple):
    """A file's metadata."""

    names: list[str]
    skipped: dict[str, str]
    about: dict[str, str]


def read_head(path: Path) -> Head:
    """The metadata of a file that write_embeddings wrote, without its values. Errors as in `read_embeddings`."""
    words, _ = _opened(path)
    about = {key: value for key, value in words.items() if key not in ("names", "skipped")}
    return Head(json.loads(words["names"]), json.loads(words["skipped"]), about)


def _joined(folder: Path) -> Embeddings:
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"read_embeddings: {folder} has no {INDEX}; is `ov3fast encode` still writing it?")
    parts = [read_embeddings(folder / part["file"]) for part in json.loads(index.read_text(encoding="utf-8"))["parts"]]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    names = [name for part in parts for name in part.names]
    skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
    return Embeddings(
        torch.cat([part.pooled for part in parts]), torch.cat(tokens) if tokens else None, names, skipped, parts[0].about
    )


def _opened(path: Path) -> tuple[dict[str, str], Callable[[], dict[str, Tensor]]]:
    """A file's metadata, and a function that reads its values."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"read_embeddings: {path} must end in {', '.join(SUFFIXES)}")
    for needed in [path, path.with_suffix(".json")] if path.suffix == ".npy" else [path]:
        if not needed.is_file():
            raise FileNotFoundError(f"read_embeddings: there is no file {needed}")
    read: Callable[[], dict[str, Tensor]]
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        from safetensors.torch import load_file

        with safe_open(str(path), "pt") as file:
            words, held, read = file.metadata() or {}, list(file.keys()), lambda: load_file(str(path))
    elif path.suffix == ".npz":
        with np.load(path) as file:
            words = json.loads(str(file["about"])) if "about" in file else {}
            held = [name for name in file.files if name != "about"]
        read = lambda: {name: torch.from_numpy(array) for name, array in np.load(path).items() if name != "about"}  # noqa: E731
    elif path.suffix == ".parquet":
        words, held, read = _read_parquet(path)
    else:
        words = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        held, read = ["pooled"], lambda: {"pooled": torch.from_numpy(np.load(path))}
    if "pooled" not in held or "names" not in words:
        raise ValueError(
            f"read_embeddings: {path} was not written by write_embeddings (it holds {', '.join(held) or 'nothing'})"
        )
    return words, read


def _write_parquet(path: Path, embeddings: Embeddings, words: dict[str, str]) -> None:
    """Columns name, pooled and tokens (a list of all values of an image; their shape is in the metadata)."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"pooled": embeddings.pooled} | ({} if embeddings.tokens is None else {"tokens": embeddings.tokens})
    shapes = {name: list(values.shape[1:]) for name, values in columns.items()}
    arrays = {name: values.numpy().reshape(len(values), -1) for name, values in columns.items()}
    kinds = [(name, pa.list_(pa.from_numpy_dtype(array.dtype), array.shape[1])) for name, array in arrays.items()]
    metadata = {**{key: value for key, value in words.items() if key != "names"}, "shapes": json.dumps(shapes)}
    schema = pa.schema([("name", pa.string()), *kinds], metadata=metadata)
    names = [name.encode("utf-8", "backslashreplace").decode() for name in embeddings.names]
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(names), GROUP):
            rows = [
                pa.FixedSizeListArray.from_arrays(pa.array(array[start : start + GROUP].reshape(-1)), array.shape[1])
                for array in arrays.values()
            ]
            writer.write_table(
                pa.Table.from_arrays([pa.array(names[start : start + GROUP], pa.string()), *rows], schema=schema)
            )


def _read_parquet(path: Path) -> tuple[dict[str, str], list[str], Callable[[], dict[str, Tensor]]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    schema = file.schema_arrow
    words = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items() if not key.startswith(b"ARROW:")}
    shapes = json.loads(words.pop("shapes", "{}"))
    held = [name for name in schema.names if name != "name"]
    if "name" in schema.names:
        words["names"] = json.dumps(file.read(["name"]).column("name").to_pylist())

    def read() -> dict[str, Tensor]:
        found = {}
        for name in held:
            flat = file.read([name]).column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            found[name] = torch.from_numpy(np.array(flat)).view(-1, *shapes[name])
        return found

    return words, held, read


def _is_ours(path: Path) -> bool:
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(words, dict) and {"names", "skipped", "latents"} <= set(words)
