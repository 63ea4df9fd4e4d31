"""Speeds up existing models: the operators replace their modules wherever they are measured to be faster.

fast = ov3fast.optimize(AutoencoderKL.from_pretrained(...))       # or a CLIP, SigLIP, DINOv2, timm or open_clip tower, or an OpenVision3
small = ov3fast.optimize(model, dtype=torch.int8)                 # on CPUs: products in int8, calibrated on photos
print(fast.report)                                                # what was replaced by what, or why not
fast.original                                                     # the given model, unchanged
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast.inference import choosing, fusions, int8
from ov3fast.inference.kinds import Kind, caller, kind_of, roots, vae_of

MODES = ("auto", "ours", "compile", "graph")
WIDE_CONVOLUTIONS = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")
"""The first and last convolutions of encoder and decoder, which int8 excludes."""


@dataclass
class Report:
    """What `optimize` did. choices: path -> "ours", "compile", "eager" or "int8"; reasons: path -> why, with milliseconds; accuracy: for int8,
    metric -> its value on the calibration images."""

    model: str
    mode: str
    choices: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    whole: str = ""
    channels_last: bool = False
    packed: bool = False
    accuracy: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model}, mode {self.mode}: {self.whole}".rstrip(": ")]
        if self.channels_last:
            lines.append("  convolutions: channels_last" + (", packed" if self.packed else ""))
        groups: dict[tuple[str, str], list[str]] = {}
        for path, choice in self.choices.items():
            groups.setdefault((choice, self.reasons.get(path, "")), []).append(path)
        for (choice, reason), paths in groups.items():
            rest = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"  {paths[0]}{rest}: {choice} ({reason})")
        lines += [f"  {name}: {value:.6g}" for name, value in self.accuracy.items()]
        return "\n".join(lines)


def optimize(model: Any, dtype: torch.dtype | None = None, mode: str = "auto", calibration: Any = None) -> Any:
    """The same model with the operators where they are faster: same class, methods and state_dict keys, parameters shared with `model`.

    model: in eval mode; a model of ov3fast, a diffusers AutoencoderKL, a transformers CLIP, SigLIP or DINOv2 tower, a timm or open_clip ViT.
    dtype: casts a copy of the weights; torch.int8, on CPUs with VNNI: weights per channel, activations per tensor with ranges from
    `calibration`, everything else in bfloat16 if the chip supports it. mode: "auto" measures each kind of module on the input, ours against
    eager and torch.compile, and keeps the fastest whose error is within the budget (`ov3fast.testing`), or eager throughout if the whole model
    isn't faster; choices are cached by machine and module. "ours" and "compile" use that everywhere without measuring; "graph" captures CUDA
    graphs of a model of ov3fast. calibration: the model's input: a tensor of images, or a tuple or dict of arguments; default: one random
    image of the config's size, for int8 a package's photos.

    The result has `.report`, and `.original`, which is `model`, unchanged. ValueError naming the model if it isn't supported.
    """
    if mode not in MODES:
        raise ValueError(f"optimize: mode must be one of {', '.join(MODES)}; got {mode!r}")
    model = getattr(model, "__dict__", {}).get("original", model)
    kind = kind_of(model)
    if model.training:
        raise ValueError("optimize: the model is in training mode; call eval() first")
    _check_dtype(dtype, mode, model)
    if mode == "graph":
        if kind != "ov3fast":
            raise ValueError("optimize: mode 'graph' takes a model of ov3fast")
        from ov3fast.inference.graphs import capture

        captured = capture(_converted(model, dtype))
        captured.__dict__.update(original=model, report=Report(type(model).__name__, mode, whole="replays CUDA graphs"))
        return captured
    report = Report(type(model).__name__, mode)
    if dtype is torch.int8:
        made = _quantized(model, kind, calibration, report)
    else:
        base = _converted(model, dtype)
        made = choosing.twin(base)
        _replace(base, made, kind, mode, calibration, report)
    made.__dict__["original"] = model
    made.__dict__["report"] = report
    return made


def _check_dtype(dtype: torch.dtype | None, mode: str, model: Any) -> None:
    if dtype is None or (dtype.is_floating_point and dtype.itemsize > 1):
        return
    if dtype is not torch.int8:
        kind = "float8 products are not supported" if dtype.is_floating_point else "not a dtype for inference"
        raise ValueError(f"optimize: dtype must be a floating dtype of 16 bits or more, or torch.int8; got {dtype}: {kind}")
    if mode not in ("auto", "ours"):
        raise ValueError(f"optimize: dtype torch.int8 takes mode 'auto' or 'ours', got {mode!r}")
    device = next(model.parameters()).device
    reason = int8.unavailable_reason() if device.type == "cpu" else f"the model is on {device}"
    if reason is not None:
        raise ValueError(f"optimize: dtype torch.int8 runs on CPUs: {reason}")


def _replace(base: nn.Module, made: nn.Module, kind: Kind, mode: str, calibration: Any, report: Report) -> None:
    trees = [
        (prefix, own, theirs, fusions.units(own)) for (prefix, own), (_, theirs) in zip(roots(base), roots(made), strict=True)
    ]
    if not any(units for *_, units in trees) and kind != "autoencoder":
        raise ValueError(f"optimize: {report.model} has no modules that the operators can replace")
    if mode != "auto":
        for prefix, own, theirs, units in trees:
            for path, what in units.items():
                _put(own, theirs, path, mode)
                report.choices[prefix + path], report.reasons[prefix + path] = mode, what
        if mode == "ours":
            _pack(made, kind)
        return
    call = caller(base, kind, calibration)
    with torch.no_grad():
        memory = choosing.Memory()
        for prefix, own, theirs, units in trees:
            _choose(prefix, own, theirs, units, lambda: call(base), memory, report)
        if kind in ("autoencoder", "ov3fast"):
            _try_convolutions(made, kind, call, report)
        eager, ours = choosing.times([lambda: call(base), lambda: call(made)])
        report.whole = f"{ours * 1e3:.2f} ms, before {eager * 1e3:.2f} ms"
        if ours > eager and (report.channels_last or any(choice != "eager" for choice in report.choices.values())):
            _undo(base, made, trees, report)


def _undo(base: Any, made: Any, trees: list[Any], report: Report) -> None:
    for prefix, own, theirs, units in trees:
        for path in units:
            _put(own, theirs, path, "eager")
            name = prefix + path
            measured = report.reasons[name]
            report.choices[name], report.reasons[name] = "eager", f"the whole model was not faster ({report.whole}); {measured}"
        for path, module in own.named_modules():
            if isinstance(module, nn.Conv2d):
                theirs.get_submodule(path).__class__ = type(module)
                theirs.get_submodule(path).weight = module.weight
    report.channels_last = report.packed = False


def _choose(
    prefix: str,
    base: nn.Module,
    made: nn.Module,
    units: dict[str, str],
    run: Callable[[], Any],
    memory: choosing.Memory,
    report: Report,
) -> None:
    """The fastest choice for each kind of unit, measured once per set of shapes."""
    inputs, known = choosing.inputs_of(base, units, run), dict[str, tuple[str, str]]()
    for path, what in units.items():
        name = prefix + path
        if path not in inputs:
            report.choices[name], report.reasons[name] = "eager", "not used by the calibration input"
            continue
        unit = base.get_submodule(path)
        key = choosing.key_of(unit, inputs[path])
        if key not in known:
            known[key] = memory.get(key) or choosing.measure(unit, inputs[path], what)
            memory.put(key, known[key])
        report.choices[name], report.reasons[name] = known[key]
        _put(base, made, path, known[key][0])


def _put(base: nn.Module, made: nn.Module, path: str, choice: str) -> None:
    unit = choosing.twin(base.get_submodule(path))
    if choice == "ours":
        fusions.fuse(unit)
    elif choice == "compile":
        unit.compile(dynamic=False)
    made.set_submodule(path, unit)


def _autoencoder(model: Any, kind: Kind) -> Any:
    return model if kind == "autoencoder" else vae_of(model)


def _pack(made: Any, kind: Kind) -> None:
    """Packed convolutions in an autoencoder on a CPU."""
    vae = _autoencoder(made, kind) if kind in ("autoencoder", "ov3fast") else None
    if vae is not None and next(vae.parameters()).device.type == "cpu":
        for conv in fusions.convolutions(vae).values():
            fusions.fuse_convolution(conv)


def _try_convolutions(made: Any, kind: Kind, call: Callable[[Any], Any], report: Report) -> None:
    """Convolutions with copies of their weights in channels_last, or packed, if that is faster."""
    if _autoencoder(made, kind) is None:
        return
    other, packed = choosing.twin(made), choosing.twin(made)
    for module in _autoencoder(other, kind).modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().clone(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    _pack(packed, kind)
    before, *after = choosing.times([lambda m=m: call(m) for m in (made, other, packed)])  # type: ignore[misc]
    if min(after) >= choosing.GAIN * before:
        return
    report.channels_last = True
    if after[1] <= after[0] and next(made.parameters()).device.type == "cpu":
        _pack(made, kind)
        report.packed = True
        return
    ours, theirs = (dict(_autoencoder(m, kind).named_modules()) for m in (made, other))
    for path, module in ours.items():
        if isinstance(module, nn.Conv2d):
            module.weight = theirs[path].weight


# int8


def _quantized(model: Any, kind: Kind, calibration: Any, report: Report) -> Any:
    wide = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    call = caller(model, kind, calibration, photos=True)
    made = choosing.twin(_frozen(model, wide))
    fused: list[tuple[str, Any]] = []
    for prefix, tree in roots(made):
        fused += [(prefix + path, tree.get_submodule(path)) for path in fusions.units(tree)]
    vae = _autoencoder(made, kind) if kind in ("autoencoder", "ov3fast") else None
    convolutions = [] if vae is None else list(fusions.convolutions(vae).items())
    for _, unit in fused:
        fusions.fuse(unit)
    for _, conv in convolutions:
        fusions.fuse_convolution(conv)
    blocks = [(path, unit) for path, unit in fused if fusions.STATE in unit.__dict__]
    inner = [(path, conv) for path, conv in convolutions if path.rpartition(".")[2] not in WIDE_CONVOLUTIONS]
    with torch.no_grad():
        for _, module in (*blocks, *inner):
            fusions.calibrate(module)
        shapes = _shapes(inner, lambda: call(made))
        for path, module in (*blocks, *inner):
            seen = fusions.calibrated(module)
            report.choices[path] = "int8" if seen else "ours"
            report.reasons[path] = "calibrated" if seen else f"not used by the calibration input, {wide}"
        norms = {} if vae is None else fusions.norms_before(vae)
        if report.mode == "auto":
            _keep_faster(inner, shapes, norms, report)
        for path, conv in inner:
            if vae is not None and path in norms and report.choices[path] == "int8":
                fusions.quantize_norm(vae.get_submodule(norms[path]), conv)
        report.accuracy = _nearness(call(model), call(made))
    products = sum(choice == "int8" for choice in report.choices.values())
    report.whole = f"{products} modules in int8, the rest in {wide}"
    return made


def _shapes(convolutions: list[tuple[str, Any]], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Path -> an example of the convolution's input in `run`, for one image."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            seen.setdefault(path, torch.zeros_like(args[0][:1]))

        return hook

    hooks = [conv.register_forward_pre_hook(note(path)) for path, conv in convolutions]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _keep_faster(
    convolutions: list[tuple[str, Any]], inputs: dict[str, Tensor], quantized: Container[str], report: Report
) -> None:
    """Convolutions stay in int8 if that is measured to be faster. quantized: paths of those whose norm writes uint8."""
    memory = choosing.Memory()
    for path, conv in convolutions:
        if report.choices[path] != "int8":
            continue
        key = f"int8{' behind a norm' * (path in quantized)} {choosing.key_of(conv, ((inputs[path],), {}))}"
        choice, words = memory.get(key) or choosing.measure_int8(conv, inputs[path], path in quantized)
        memory.put(key, (choice, words))
        report.choices[path], report.reasons[path] = choice, words
        if choice != "int8":
            fusions.leave_wide(conv)


def _frozen(model: Any, dtype: torch.dtype) -> Any:
    """A copy in `dtype`, including its autoencoder, without gradients."""
    made = copy.deepcopy(model).to(dtype)
    for _, tree in roots(made):
        tree.to(dtype).requires_grad_(False)
    return made.eval()


def _nearness(expected: list[Tensor], got: list[Tensor]) -> dict[str, float]:
    """Smallest cosine similarity of vectors, PSNR of images in [-1, 1]."""
    found = {}
    for number, (truth, value) in enumerate(zip(expected, got, strict=True)):
        truth, value = truth.float(), value.float()
        if truth.ndim == 4:
            found["PSNR of the reconstruction, dB"] = float(10 * torch.log10(4 / (truth - value).square().mean()))
        else:
            name = {2: "pooled", 3: "tokens"}.get(truth.ndim, f"output {number}")
            found[f"least cosine, {name}"] = float(torch.cosine_similarity(truth, value, dim=-1).min())
    return found


def _converted(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return model if dtype is None or own == {dtype} else copy.deepcopy(model).to(dtype)
