"""Token statistics and FID metrics: library, command line and errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast import cli
from ov3fast.data.skips import DataError
from ov3fast.generation import fid, inception
from ov3fast.generation.moments import FeatureMoments
from ov3fast.generation.statistics import LatentStatistics, as_latents, as_tokens, token_statistics
from ov3fast.inference import load_model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine small images and one corrupt file."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(9):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_statistics_do_not_depend_on_the_batch(folder, pictures, tmp_path):
    model = load_model(folder)
    one, many = (token_statistics(model, pictures, batch_size=batch) for batch in (1, 4))
    # Tokens may differ by float32 rounding between batch sizes.
    torch.testing.assert_close((one.mean, one.var), (many.mean, many.var), rtol=1e-4, atol=1e-6)
    assert one.about["images"] == "9" and one.about["skipped"] == "1" and one.mean.shape == (24, 2, 2)
    read = LatentStatistics.load(one.save(tmp_path / "statistics.safetensors"))
    assert torch.equal(read.mean, one.mean) and read.about == one.about
    z = torch.randn(3, 24, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(one.denormalize(one.normalize(z)), z)
    assert torch.equal(as_latents(as_tokens(z)), z)


def test_conventions_of_others(folder, pictures):
    """RAE divides by sqrt(var + 1e-5), diffusers by std + 1e-5; both match `normalize`."""
    found = token_statistics(load_model(folder), pictures)
    z = torch.randn(2, 24, 2, 2)
    rae, diffusers = found.to_rae(), found.to_diffusers()
    torch.testing.assert_close((z - rae["mean"]) / (rae["var"] + 1e-5).sqrt(), found.normalize(z))
    torch.testing.assert_close((z - diffusers["latents_mean"]) / (diffusers["latents_std"] + 1e-5), found.normalize(z))


def test_the_statistics_command(capsys, folder, pictures, tmp_path):
    out = tmp_path / "statistics.safetensors"
    code, text, _ = run(capsys, "statistics", folder, pictures, "--out", out)
    assert code == 0 and "9 images (1 skipped), 24 x 2 x 2" in text
    assert LatentStatistics.load(out).var.min() > 0
    assert run(capsys, "statistics", folder, pictures, "--out", tmp_path / "x.npz")[0] == 2
    with pytest.raises(DataError, match="none of the images"):
        token_statistics(load_model(folder), pictures / "broken.png")
    (tmp_path / "other.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="no file of"):
        LatentStatistics.load(tmp_path / "other.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the layout of FID's checkpoint."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05.pth"
    state = inception.Inception().state_dict()
    torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, path)
    return path


def test_inception(weights, tmp_path):
    network = inception.Inception.load(weights)
    assert (
        sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    )  # FID's graph: 1008 classes, no auxiliary head
    features, logits = network(torch.rand(1, 3, 299, 299))
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    state = torch.load(weights)
    state["fc.weight"] = state["fc.weight"][:1000]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"fc.weight of shape \(1008, 2048\), got \(1000, 2048\)"):
        inception.Inception.load(tmp_path / "other.pth")


def test_resize_of_tensorflow_1():
    """Upscaling a row [0, 1] by two samples at 0, 0.5, 1 and past the last pixel, which repeats."""
    row = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert inception.resize_tf1(row, 4)[0, 0, 0].tolist() == [0, 0.5, 1, 1]


def test_protocols(weights, pictures, tmp_path):
    """A reference of another protocol is rejected."""
    protocol = fid.protocol_named("torch-fidelity")
    extractor = fid.build_extractor(protocol, weights, lambda name: None)
    found = fid.extract(sorted(pictures.glob("[0-4].png")), protocol, extractor, image_size=32)
    reference = fid.Reference(protocol.name, found.moments, found.features)
    reference.save(tmp_path / "reference.npz")
    read = fid.Reference.load(tmp_path / "reference.npz", "torch-fidelity")
    figures = fid.figures(found, read)
    assert figures["fid"] == pytest.approx(0, abs=1e-6) and figures["precision"] == figures["recall"] == 1
    assert figures["protocol"] == "torch-fidelity" and figures["singular"]
    with pytest.raises(ValueError, match="of protocol 'torch-fidelity'"):
        fid.Reference.load(tmp_path / "reference.npz", "rfid")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert fid.Reference.load(tmp_path / "adm.npz", "adm").moments.count == 50_000
    with pytest.raises(ValueError, match="names no protocol"):
        fid.Reference.load(tmp_path / "adm.npz", "rfid")
    with pytest.raises(ValueError, match="256 px"):
        fid.extract(pictures, fid.protocol_named("adm"), extractor, image_size=32)
    with pytest.raises(ValueError, match="needs --weights"):
        fid.build_extractor(fid.protocol_named("adm"), None, lambda name: None)


def test_the_fid_command(capsys, monkeypatch, pictures, tmp_path):
    """With features that need no download: channel means and standard deviations."""
    features = lambda images: (torch.cat([images.float().mean((2, 3)), images.float().std((2, 3))], 1), None)  # noqa: E731
    monkeypatch.setattr(fid, "build_extractor", lambda *_: features)
    reference = tmp_path / "reference.npz"
    code, text, _ = run(capsys, "fid", pictures, "--save-reference", reference, "--image-size", "32")
    assert code == 0 and "9 images (1 skipped)" in text
    code, text, _ = run(capsys, "fid", pictures, "--reference", reference, "--image-size", "32", "--json")
    assert json.loads(text)["fid_style"] == pytest.approx(0, abs=1e-6)
    code, text, _ = run(capsys, "fid", pictures, "--reference", pictures, "--image-size", "32")
    assert code == 0 and "fid_style" in text and "not comparable with FID" in text
    for arguments, words in (
        ((), "either --reference or"),
        (("--reference", reference, "--save-reference", reference), "either --reference or"),
        (("--reference", reference, "--protocol", "fid"), "protocol must be one of"),
        (("--reference", tmp_path / "none.npz"), "no reference"),
        (("--reference", pictures / "broken.png"), "must be an .npz"),
    ):
        code, _, error = run(capsys, "fid", pictures, *arguments)
        assert code == 2 and words in error, (arguments, error)


def test_moments_of_a_reference_are_kept_exactly(tmp_path):
    moments = FeatureMoments.of(torch.randn(50, 4))
    fid.Reference("squeezenet", moments).save(tmp_path / "r.npz")
    read = fid.Reference.load(tmp_path / "r.npz", "squeezenet")
    torch.testing.assert_close(
        (read.moments.mean, read.moments.covariance), (moments.mean, moments.covariance), rtol=1e-14, atol=0
    )
