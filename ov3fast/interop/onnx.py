"""ONNX files of a model's parts, checked in onnxruntime.

export("runs/demo", "exported")
session = onnxruntime.InferenceSession("exported/image.onnx")
pooled, tokens = session.run(None, {"images": images})
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast.interop._folder import required, writing
from ov3fast.interop._programs import Part, program
from ov3fast.interop._tower import Model

OPSET = 20
"""The first one with Gelu."""


def export(model: Model | str | Path, out: str | Path, *, images: Sequence[str | Path] | None = None) -> Path:
    """Writes image.onnx, and of a whole model reconstruct.onnx and text.onnx, with their certificate, to the folder `out`, all or nothing.

    images: for the certificate; default: a package's photos. ImportError without onnxscript and onnxruntime. ValueError where an output is over
    the error budget.
    """
    runtime = required("onnxruntime", "onnx")
    required("onnxscript", "onnx")
    with writing(model, out, "onnx", f"onnxruntime {runtime.__version__}", images) as (folder, parts, certificate):
        for part in parts:
            file = folder / f"{part.name}.onnx"
            write(part, file)
            certificate.check(part, file, _session(runtime, file, part.module.inputs[0]))
    return Path(out)


def write(part: Part, file: Path) -> None:
    """The part as an ONNX file; weights beyond ONNX's 2 GB go to FILE.data beside it."""
    made: Any = torch.onnx.export(
        program(part),
        (),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(part.module.inputs),
        output_names=list(part.module.outputs),
        verbose=False,
    )
    bytes_ = sum(value.numel() * value.element_size() for value in part.module.state_dict().values())
    made.save(str(file), external_data=bytes_ > 2**30)


def _session(runtime: Any, file: Path, name: str) -> Callable[[Tensor], list[Tensor]]:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda given: [torch.from_numpy(value) for value in session.run(None, {name: given.cpu().numpy()})]
