"""The folder that `ov3fast export torch|onnx|openvino` writes: the parts, their certificate, how to prepare images, the tokenizer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ov3fast.interop._certificate import FILE, Certificate
from ov3fast.interop._programs import Part, parts_of
from ov3fast.interop._tower import Model, encoder_of, loaded
from ov3fast.io import atomic_folder
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from ov3fast.models.tokenizer import FILE as TOKENIZER

PREPARATION = "preprocessor_config.json"
NAMES = ("image", "reconstruct", "text")
SUFFIXES = (".pt2", ".aotinductor.pt2", ".onnx", ".onnx.data", ".xml", ".bin")
FORMER = (FILE, PREPARATION, TOKENIZER, TOKENIZER_CONFIG, *(name + suffix for name in NAMES for suffix in SUFFIXES))
"""What a former export may have left in the folder."""


@contextmanager
def writing(
    model: Model | str | Path, out: str | Path, format: str, runtime: str, images: Sequence[str | Path] | None
) -> Iterator[tuple[Path, list[Part], Certificate]]:
    """(a new folder, the parts to write into it, what checks each); `out` is it once the block ends, else as it was."""
    given = loaded(model)
    with atomic_folder(out, former=FORMER) as folder:
        certificate = Certificate(given, format, runtime, images)
        yield folder, parts_of(given), certificate
        certificate.write(folder)
        size = encoder_of(given).config.image_size
        preparation = {
            "image_size": size,
            "resize": "shorter side, bicubic, antialias; centre crop; transparency on white",
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        (folder / PREPARATION).write_text(json.dumps(preparation, indent=1) + "\n", encoding="utf-8")
        if isinstance(given, OpenVision3):
            given.tokenizer.save(folder)


def required(name: str, format: str) -> Any:
    """The module. ImportError names the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"export {format}: needs {name}: pip install 'ov3fast[{format}]' ({error})") from None
