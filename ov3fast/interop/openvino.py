"""OpenVINO IR of a model's parts, by OpenVINO's own converter.

export("runs/demo", "exported")
compiled = openvino.Core().compile_model("exported/image.xml", "CPU")
pooled, tokens = compiled(images).values()
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


def export(model: Model | str | Path, out: str | Path, *, images: Sequence[str | Path] | None = None) -> Path:
    """Writes image.xml and image.bin, and of a whole model those of reconstruct and text, with their certificate, to the folder `out`, all or
    nothing.

    Weights are kept in float32. images: for the certificate; default: a package's photos. ImportError without openvino. ValueError
    where an output is over the error budget.
    """
    openvino = required("openvino", "openvino")
    with writing(model, out, "openvino", f"openvino {openvino.__version__}", images) as (folder, parts, certificate):
        for part in parts:
            file = folder / f"{part.name}.xml"
            openvino.save_model(convert(openvino, part), str(file), compress_to_fp16=False)
            certificate.check(part, file, _compiled(openvino, file))
    return Path(out)


def convert(openvino: Any, part: Part) -> Any:
    """The part as an OpenVINO model, with its inputs' and outputs' names."""
    made = openvino.convert_model(program(part))
    for port, name in zip((*made.inputs, *made.outputs), (*part.module.inputs, *part.module.outputs), strict=True):
        port.get_tensor().set_names({name})
    return made


def _compiled(openvino: Any, file: Path) -> Callable[[Tensor], list[Tensor]]:
    # OpenVINO would take bfloat16 where the chip has it.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda given: [torch.from_numpy(value).clone() for value in compiled(given.cpu().numpy()).values()]
