"""What an export is worth: the largest differences of its outputs from the model's own, on real photos, at several batches and sizes.

    err(export) <= max over the cases of max(2 err(eager), err(operators)) + eps max|exact|

as everywhere (`ov3fast.testing`): errors are measured against the model in float64, eager is the model on PyTorch's operators in its own
dtype, and operators the model as it runs here, whose sums have another order as the export's have. An export beyond it is not written.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast import __version__, ops
from ov3fast.inference.photos import photo_batch
from ov3fast.interop._programs import Part, parts_of
from ov3fast.interop._tower import Model, encoder_of
from ov3fast.models.config import VAE_STRIDE
from ov3fast.testing import error, error_and_budget

FILE = "certificate.json"
BATCHES = (1, 2, 5)
Run = Callable[[Tensor], Sequence[Tensor]]
"""An exported part, where it is loaded again: its input -> its outputs on the CPU."""


class Certificate:
    """Measures an export part by part; `write` puts down what was found.

    images: files or folders; None takes `photos.package_photos`. ValueError from `check` where an output is over the budget.
    """

    def __init__(self, model: Model, format: str, runtime: str, images: Sequence[str | Path] | None = None) -> None:
        self.model, self.images = model, images
        self.exact = _in_float64(model)
        self.exact_parts = {part.name: part for part in parts_of(self.exact)}
        self.values: dict[str, Any] = {
            "format": format,
            "runtime": runtime,
            "ov3fast": __version__,
            "torch": torch.__version__.split("+")[0],
            "weights": digest(model),
            "images": [],
            "parts": {},
        }

    def check(self, part: Part, file: Path, run: Run, *, free: bool = True) -> None:
        """Runs the exported `file` beside the model at every batch and size that it should take. free: False where one size was compiled."""
        cases = [self._case(part, run, *sizes) for sizes in self._sizes(part, free)]
        self._judge(part, cases)
        outputs = part.module.outputs
        entry = {
            "inputs": {part.module.inputs[0]: [str(part.example.dtype).removeprefix("torch."), *_axes(part)]},
            "outputs": list(outputs),
            "max_error": {name: max(case["error"][name] for case in cases) for name in outputs},
            "cases": cases,
        }
        self.values["parts"][file.name] = entry

    def write(self, folder: Path) -> None:
        text = json.dumps(self.values, indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    def _sizes(self, part: Part, free: bool) -> list[tuple[int, tuple[int, int]]]:
        config = encoder_of(self.model).config
        own = config.image_size
        if not part.example.is_floating_point():
            return [(batch, (0, 0)) for batch in BATCHES]
        if not free:
            return [(part.example.shape[0], (part.example.shape[2], part.example.shape[3]))]
        others = [(own + 2 * VAE_STRIDE * config.patch_size, own)] if 2 in part.free else []
        return [(batch, (own, own)) for batch in BATCHES] + [(2, size) for size in others]

    def _case(self, part: Part, run: Run, batch: int, size: tuple[int, int]) -> dict[str, Any]:
        given = self._input(part, batch, size)
        with torch.no_grad():
            with ops.use("eager"):
                eager = _tuple(part.module(given))
            own = _tuple(part.module(given))
            wide = given.double() if given.is_floating_point() else given
            with ops.use("eager"):
                exact = _tuple(self.exact_parts[part.name].module(wide))
        errors, beyond, budgets = {}, {}, {}
        for name, got, same, other, truth in zip(part.module.outputs, run(given), eager, own, exact, strict=True):
            # What is said of an export is its difference from eager; the budget speaks of the exact result.
            errors[name] = error(got, same)
            beyond[name], budgets[name] = error_and_budget(got, same, truth, partial(error, other, truth))
        return {"batch": batch, **_shape(part, size), "error": errors, "from_exact": beyond, "budget": budgets}

    def _judge(self, part: Part, cases: list[dict[str, Any]]) -> None:
        """Each case against the largest budget of all: where PyTorch is lucky with one input, a sum in another order is not at fault."""
        for name in part.module.outputs:
            budget = max(case["budget"][name] for case in cases)
            for case in cases:
                if not case["from_exact"][name] <= budget:
                    raise ValueError(
                        f"export: {part.name}: {name} of the exported file is off by {case['from_exact'][name]:.2e} at batch "
                        f"{case['batch']}, size {case.get('height', '-')} x {case.get('width', '-')}; the budget is {budget:.2e}"
                    )

    def _input(self, part: Part, batch: int, size: tuple[int, int]) -> Tensor:
        if not part.example.is_floating_point():
            return torch.randint(3, 30, (batch, part.example.shape[1]), generator=torch.Generator().manual_seed(batch))
        images, names = photo_batch(self.images, max(size), batch)
        self.values["images"] = sorted({*self.values["images"], *names})
        return images[:, :, : size[0], : size[1]].to(part.example).contiguous()


def digest(model: Model) -> str:
    """Of the weights that an export was made from, the VAE's left out."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _in_float64(model: Model) -> Model:
    wide = copy.deepcopy(model).double()
    encoder_of(wide).get_vae().vae.double()
    return wide


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _axes(part: Part) -> list[Any]:
    words = {0: "batch", 2: "height", 3: "width"}
    return [words[axis] if axis in part.free else size for axis, size in enumerate(part.example.shape)]


def _shape(part: Part, size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]} if part.example.is_floating_point() else {}
