"""Somebody else's model, faster: the operators in the places of its modules, where they are measured to be faster.

fast = ov3fast.optimize(AutoencoderKL.from_pretrained(...))       # or a transformers CLIP, SigLIP or DINOv2 tower, or an own model
print(fast.report)                                                # what was replaced by what, and why not
fast.original                                                     # the model that was given, as it was
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast.inference import fusions
from ov3fast.inference.load import VisionTower
from ov3fast.io import atomic_write
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vit import ViTEncoder
from ov3fast.testing import error_and_budget

MODES = ("auto", "ours", "compile", "graph")
TRANSFORMERS = (
    "clip", "clip_vision_model", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model", "dinov2", "dinov2_with_registers",
)  # fmt: skip
"""model_type of the transformers models that are known."""

SECONDS, ROUNDS = 0.2, 7
"""What a measurement takes: rounds of one call of each variant, until both are reached."""
GAIN = 0.98
"""A variant must take at most this share of eager's time to be preferred to it."""


@dataclass
class Report:
    """What `optimize` did. choices: path -> "ours", "compile" or "eager"; reasons: path -> why, in words and milliseconds."""

    model: str
    mode: str
    choices: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    whole: str = ""
    channels_last: bool = False

    def __str__(self) -> str:
        lines = [f"{self.model}, mode {self.mode}: {self.whole}".rstrip(": ")]
        if self.channels_last:
            lines.append("  convolutions: channels_last")
        groups: dict[tuple[str, str], list[str]] = {}
        for path, choice in self.choices.items():
            groups.setdefault((choice, self.reasons.get(path, "")), []).append(path)
        for (choice, reason), paths in groups.items():
            rest = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"  {paths[0]}{rest}: {choice} ({reason})")
        return "\n".join(lines)


def optimize(model: Any, dtype: torch.dtype | None = None, mode: str = "auto", calibration: Any = None) -> Any:
    """The same model with the operators where they are faster: same class, methods and state_dict keys, parameters shared with `model`.

    model: in eval mode; a diffusers AutoencoderKL, a transformers CLIP, SigLIP or DINOv2 tower, or a model of ov3fast. dtype: another one
    for the weights, which are then copied. mode: "auto" measures each kind of module on the input, ours against eager and torch.compile,
    and keeps the fastest whose error is within the budget (`ov3fast.testing`), and all eager if the whole is not faster; choices
    are kept by machine and module. "ours" and "compile" put that everywhere unmeasured; "graph" captures CUDA graphs of an own model.
    calibration: the model's input, a tensor, or a tuple or dict of arguments; default: one random image of the config's size.

    The result has `.report`, and `.original`, which is `model`, unchanged. ValueError for a model that isn't known, by its name.
    """
    if mode not in MODES:
        raise ValueError(f"optimize: mode must be one of {', '.join(MODES)}; got {mode!r}")
    model = getattr(model, "__dict__", {}).get("original", model)
    kind = _kind(model)
    if model.training:
        raise ValueError("optimize: the model is in training mode; call eval() first")
    if mode == "graph":
        if kind != "ov3fast":
            raise ValueError("optimize: mode 'graph' takes a model of ov3fast")
        from ov3fast.inference.graphs import capture

        captured = capture(_converted(model, dtype))
        captured.__dict__.update(original=model, report=Report(type(model).__name__, mode, whole="replays CUDA graphs"))
        return captured
    base = _converted(model, dtype)
    report = Report(type(model).__name__, mode)
    made = _twin(base)
    if kind == "ov3fast":
        report.whole = "runs on the operators as it is"
    else:
        _replace(base, made, kind, mode, calibration, report)
    made.__dict__["original"] = model
    made.__dict__["report"] = report
    return made


def _replace(base: nn.Module, made: nn.Module, kind: str, mode: str, calibration: Any, report: Report) -> None:
    units = fusions.units(base)
    if not units:
        raise ValueError(f"optimize: {report.model} has no module that the operators replace")
    if mode != "auto":
        for path, what in units.items():
            _put(base, made, path, mode)
            report.choices[path], report.reasons[path] = mode, what
        return
    call = _caller(base, kind, calibration)
    with torch.no_grad():
        _choose(base, made, units, call, report)
        if kind == "diffusers":
            _try_channels_last(made, call, report)
        eager, ours = _times([lambda: call(base), lambda: call(made)])
        report.whole = f"{ours * 1e3:.2f} ms, before {eager * 1e3:.2f} ms"
        if ours > eager and any(choice != "eager" for choice in report.choices.values()):
            for path in units:
                _put(base, made, path, "eager")
                report.choices[path], report.reasons[path] = "eager", f"the whole was not faster ({report.whole})"


def _choose(base: nn.Module, made: nn.Module, units: dict[str, str], call: Callable[[nn.Module], Any], report: Report) -> None:
    """The fastest of each kind of unit, measured once for all units that have the same shapes."""
    inputs = _inputs(base, units, call)
    known, memory = dict[str, tuple[str, str]](), _Memory()
    for path, what in units.items():
        if path not in inputs:
            report.choices[path], report.reasons[path] = "eager", "not used by the calibration input"
            continue
        unit = base.get_submodule(path)
        key = _key(unit, inputs[path])
        if key not in known:
            known[key] = memory.get(key) or _measure(unit, inputs[path], what)
            memory.put(key, known[key])
        report.choices[path], report.reasons[path] = known[key]
        _put(base, made, path, report.choices[path])


def _measure(unit: nn.Module, inputs: tuple[Any, Any], what: str) -> tuple[str, str]:
    """(the fastest of eager, ours and compile, what was measured)."""
    args, kwargs = inputs
    variants: dict[str, nn.Module] = {"eager": unit}
    notes = [what]
    ours = _twin(unit)
    fusions.fuse(ours)
    try:
        expected, got = _tensor(unit(*args, **kwargs)), _tensor(ours(*args, **kwargs))
        error, budget = error_and_budget(got, expected, _exact(unit, args, kwargs))
        if error <= budget:
            variants["ours"] = ours
        else:
            notes.append(f"ours: error {error:.2e} is over the budget {budget:.2e}")
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as failure:
        notes.append(f"ours: {str(failure).splitlines()[0]}")
    try:
        variants["compile"] = _compiled(unit, args, kwargs)
    except Exception as failure:  # a compiler fails in many ways, and one is enough to leave it out
        notes.append(f"compile: {(str(failure) or type(failure).__name__).splitlines()[0]}")
    times = dict(zip(variants, _times([lambda v=v: v(*args, **kwargs) for v in variants.values()]), strict=True))  # type: ignore[misc]
    best = min(times, key=times.__getitem__)
    if times[best] > GAIN * times["eager"]:
        best = "eager"
    notes.append(", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in times.items()))
    return best, "; ".join(notes)


def _exact(unit: nn.Module, args: Any, kwargs: Any) -> Tensor:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return _tensor(copy.deepcopy(unit).double()(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()}))


def _compiled(unit: nn.Module, args: Any, kwargs: Any) -> nn.Module:
    made = _twin(unit)
    made.compile(dynamic=False)
    made(*args, **kwargs)
    return made


def _put(base: nn.Module, made: nn.Module, path: str, choice: str) -> None:
    unit = _twin(base.get_submodule(path))
    if choice == "ours":
        fusions.fuse(unit)
    elif choice == "compile":
        unit.compile(dynamic=False)
    made.set_submodule(path, unit)


def _try_channels_last(made: nn.Module, call: Callable[[nn.Module], Any], report: Report) -> None:
    """Convolutions' weights in channels_last, own copies, where that is faster."""
    other = _twin(made)
    for module in other.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().clone(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    before, after = _times([lambda: call(made), lambda: call(other)])
    if after < GAIN * before:
        report.channels_last = True
        ours, theirs = dict(made.named_modules()), dict(other.named_modules())
        for path, module in ours.items():
            if isinstance(module, nn.Conv2d):
                module.weight = theirs[path].weight


def _inputs(base: nn.Module, units: dict[str, str], call: Callable[[nn.Module], Any]) -> dict[str, tuple[Any, Any]]:
    """Path -> (args, kwargs) of the unit's first call."""
    seen: dict[str, tuple[Any, Any]] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.setdefault(path, (args, kwargs)) and None

    hooks = [base.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in units]
    try:
        call(base)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _times(calls: list[Callable[[], Any]]) -> list[float]:
    """Medians in seconds, the variants taking turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:  # once without the clock
        call()
    end = time.perf_counter() + SECONDS * len(calls)
    while len(taken[0]) < ROUNDS or time.perf_counter() < end:
        for call, times in zip(calls, taken, strict=True):
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _caller(base: Any, kind: str, calibration: Any) -> Callable[[Any], Any]:
    """A model -> its result on the calibration input."""
    like = next(base.parameters())
    if calibration is None:
        side = 256 if kind == "diffusers" else _image_size(base.config)
        images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        calibration = images.to(like.device, like.dtype)
    if kind == "diffusers":
        if not isinstance(calibration, Tensor):
            raise ValueError(
                f"optimize: calibration of an AutoencoderKL is a tensor of images, got {type(calibration).__name__}"
            )
        images = calibration.to(like.device, like.dtype)
        return lambda model: model.decode(model.encode(images).latent_dist.mode()).sample
    if isinstance(calibration, dict):
        return lambda model: model(**calibration)
    if isinstance(calibration, tuple):
        return lambda model: model(*calibration)
    if hasattr(base, "get_image_features"):
        return lambda model: model.get_image_features(pixel_values=calibration)
    return lambda model: model(pixel_values=calibration)


def _image_size(config: Any) -> int:
    config = getattr(config, "vision_config", config)
    return int(getattr(config, "image_size", 224))


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _converted(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return model if dtype is None or own == {dtype} else copy.deepcopy(model).to(dtype)


def _twin(module: Any) -> Any:
    """New modules on the same parameters and buffers."""
    shared: list[Tensor] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        if isinstance(part, ViTEncoder) and part.vae is not None:
            shared += [*part.vae.parameters(), *part.vae.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def _kind(model: Any) -> str:
    """ "ov3fast", "diffusers" or "transformers". ValueError for any other model."""
    if isinstance(model, OpenVision3 | VisionTower | ViTEncoder):
        return "ov3fast"
    names = {cls.__name__ for cls in type(model).__mro__}
    if "AutoencoderKL" in names:
        return "diffusers"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model, nn.Module) and model_type in TRANSFORMERS:
        return "transformers"
    called = type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")
    raise ValueError(
        f"optimize: doesn't know {called}; it takes models of ov3fast, diffusers' AutoencoderKL, and transformers models "
        f"of type {', '.join(TRANSFORMERS)}"
    )


class _Memory:
    """Choices of this machine, in a file: key -> (choice, what was measured)."""

    def __init__(self) -> None:
        self.path = Path(os.environ.get("OV3FAST_CACHE") or "~/.cache/ov3fast").expanduser() / "optimize.json"
        try:
            self.values = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.values = {}
        if not isinstance(self.values, dict):
            self.values = {}

    def get(self, key: str) -> tuple[str, str] | None:
        found = self.values.get(key)
        known = isinstance(found, list) and len(found) == 2 and found[0] in ("ours", "eager", "compile")
        return (found[0], str(found[1])) if known else None

    def put(self, key: str, value: tuple[str, str]) -> None:
        if self.values.get(key) == list(value):
            return
        self.values[key] = list(value)
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.values, indent=1), encoding="utf-8")
        except OSError:  # a measurement that can't be kept is made again
            pass


def _key(unit: nn.Module, inputs: tuple[Any, Any]) -> str:
    def word(value: Any) -> str:
        return (
            f"{tuple(value.shape)}{value.stride()}{value.dtype}{value.device}"
            if isinstance(value, Tensor)
            else repr(value)[:200]
        )

    args, kwargs = inputs
    from ov3fast import __version__

    parts = [
        *_machine(), __version__, torch.__version__, type(unit).__name__, repr(unit),
        *(f"{name}{tuple(p.shape)}{p.dtype}" for name, p in unit.named_parameters()),
        *map(word, args), *(f"{name}={word(value)}" for name, value in sorted(kwargs.items())),
    ]  # fmt: skip
    return f"{type(unit).__name__} {hashlib.sha256(' '.join(parts).encode()).hexdigest()[:24]}"


def _machine() -> list[str]:
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        chip += next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), "")
    return [platform.machine(), chip, str(torch.get_num_threads()), os.environ.get("OV3FAST_IMPL", "")]
