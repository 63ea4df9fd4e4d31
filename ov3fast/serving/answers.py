"""Results -> JSON, base64, .npy, .safetensors or PNG, by the Accept header."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ov3fast.serving.errors import Refusal

JSON, NPY, SAFETENSORS, PNG = "application/json", "application/x-npy", "application/x-safetensors", "image/png"
ALIASES = {"application/npy": NPY, "application/safetensors": SAFETENSORS, "application/vnd.safetensors": SAFETENSORS}


class Answer(NamedTuple):
    """A response's body and its media type."""

    body: bytes
    media_type: str


def negotiate(accept: str, offered: Sequence[str]) -> str:
    """The best of `offered` (the first is the default) for an Accept header. Refusal 406 if none is acceptable."""
    wanted: list[tuple[float, int, str]] = []
    for place, part in enumerate(accept.split(",")):
        kind, _, rest = part.strip().lower().partition(";")
        quality = next((word.split("=")[1] for word in rest.replace(" ", "").split(";") if word.startswith("q=")), "1")
        try:
            wanted.append((-float(quality), place, ALIASES.get(kind.strip(), kind.strip())))
        except ValueError:
            continue
    for worth, _, kind in sorted(wanted):
        if worth == 0:
            continue
        if kind in ("", "*/*"):
            return offered[0]
        for one in offered:
            if kind == one or (kind.endswith("/*") and one.startswith(kind[:-1])):
                return one
    raise Refusal(406, "not_acceptable", f"the response can be {', '.join(offered)}; Accept was {accept[:200]!r}")


def values(tensor: Tensor, encoding: str) -> Any:
    """A tensor for JSON: nested lists, whose numbers read back as the same float32, or its bytes in base64."""
    array = tensor.numpy()
    if encoding == "list":
        return array.tolist()
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64_of(little.tobytes())}


def as_json(found: dict[str, Any]) -> Answer:
    return Answer(json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace"), JSON)


def as_npy(tensor: Tensor) -> Answer:
    file = io.BytesIO()
    np.save(file, tensor.numpy(), allow_pickle=False)
    return Answer(file.getvalue(), NPY)


def as_safetensors(tensors: dict[str, Tensor], words: dict[str, str]) -> Answer:
    """words: the file's metadata."""
    from safetensors.torch import save

    return Answer(save({name: tensor.contiguous() for name, tensor in tensors.items()}, words), SAFETENSORS)


def png(picture: Any) -> bytes:
    """A Pillow image as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def finite(value: float) -> float | None:
    """JSON has no infinity: the PSNR of equal images is null."""
    return value if math.isfinite(value) else None
