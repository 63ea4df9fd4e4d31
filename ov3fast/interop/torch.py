"""torch.export programs of a model's parts, and AOTInductor packages; both run without ov3fast.

export("runs/demo", "exported")
pooled, tokens = torch.export.load("exported/image.pt2").module()(images)
pooled, tokens = torch._inductor.aoti_load_package("exported/image.aotinductor.pt2")(images)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ov3fast.interop._folder import writing
from ov3fast.interop._programs import program
from ov3fast.interop._tower import Model


def export(
    model: Model | str | Path,
    out: str | Path,
    *,
    images: Sequence[str | Path] | None = None,
    aotinductor: bool = False,
) -> Path:
    """Writes image.pt2, and of a whole model reconstruct.pt2 and text.pt2, with their certificate, to the folder `out`, all or nothing.

    images: for the certificate; default: a package's photos. aotinductor: also NAME.aotinductor.pt2, compiled for this kind of machine, which
    takes a C++ compiler and minutes. ValueError where an output is over the error budget.
    """
    with writing(model, out, "torch", f"torch {torch.__version__}", images) as (folder, parts, certificate):
        for part in parts:
            exported = program(part)
            file = folder / f"{part.name}.pt2"
            torch.export.save(exported, file)
            certificate.check(part, file, _tuples(torch.export.load(file).module()))
            if aotinductor:
                package = folder / f"{part.name}.aotinductor.pt2"
                compile_package(exported, package)
                certificate.check(part, package, _tuples(torch._inductor.aoti_load_package(str(package))))
    return Path(out)


def compile_package(exported: ExportedProgram, file: Path) -> None:
    """`file` becomes an AOTInductor package, for the device that the program's example is on."""
    torch._inductor.aoti_compile_and_package(exported, package_path=str(file))


def _tuples(module: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def run(given: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = module(given)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return run
