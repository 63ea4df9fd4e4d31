"""int8: accuracy on photos that it was not calibrated on, modules that are not quantised, and errors."""

import pytest
import torch

import ov3fast
from ov3fast import ops
from ov3fast.inference import fusions, int8
from ov3fast.inference.photos import package_photos
from ov3fast.models.config import DecoderConfig, OpenVision3Config, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE
from ov3fast.ops import cpu

pytestmark = pytest.mark.skipif(int8.unavailable_reason() is not None, reason=str(int8.unavailable_reason()))

COSINE, PSNR = 0.999, 40.0
"""Guaranteed accuracy: minimum cosine of pooled vectors and tokens, and PSNR of a VAE's reconstruction, relative to the unquantised model."""


@pytest.fixture(scope="module")
def photos():
    """(photos for calibration, photos for evaluation)."""
    pytest.importorskip("skimage")
    prepared = ov3fast.preprocess(package_photos("photos"), 64)
    return prepared[:5], prepared[5:]


@pytest.fixture(scope="module")
def small_vae():
    return FrozenVAE.from_pretrained("small")


@pytest.fixture(scope="module")
def tower(small_vae):
    """The demo's sizes, with channels that differ in scale by two orders of magnitude, as in trained models."""
    torch.manual_seed(0)
    vision = VisionConfig(width=192, depth=4, heads=3, mlp_dim=768, image_size=64, embed_dim=64)
    model = OpenVision3(
        OpenVision3Config(vision=vision, decoder=DecoderConfig(width=64, depth=1, heads=1, mlp_dim=64)), small_vae
    )
    with torch.no_grad():
        for block in model.encoder.transformer.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight.copy_(10 ** torch.empty(192).uniform_(-1, 1))
                norm.bias.normal_()
                block.attn.qkv.weight.div_(block.norm1.weight)
                block.mlp.fc1.weight.div_(block.norm2.weight)
    return model.eval()


def least_cosine(got, expected):
    return float(torch.cosine_similarity(got.float(), expected.float(), dim=-1).min())


def test_tokens(tower, photos):
    calibration, others = photos
    fast = ov3fast.optimize(tower, dtype=torch.int8, mode="ours", calibration=calibration)
    with torch.no_grad():
        (pooled, tokens), (exact_pooled, exact) = fast.encode(others), tower.encode(others)
    assert least_cosine(tokens, exact) >= COSINE and least_cosine(pooled, exact_pooled) >= COSINE
    assert fast.report.choices["encoder.transformer.blocks.0"] == "int8"
    assert fast.report.choices["text.transformer.blocks.0"] == "ours", "no image leads there"
    assert not any(path.endswith(("conv_in", "conv_out")) and choice == "int8" for path, choice in fast.report.choices.items())
    assert fast.report.accuracy["least cosine, tokens"] >= COSINE and "int8" in str(fast.report)
    assert fast.original is tower and list(fast.state_dict()) == list(tower.state_dict())
    assert all(p.dtype == torch.float32 for p in tower.parameters()) and tower.get_vae().dtype == torch.float32


def test_convolutions_that_are_slower_stay_wide(small_vae, photos, monkeypatch, tmp_path):
    monkeypatch.setenv("OV3FAST_CACHE", str(tmp_path))
    timed = []

    def times(calls):
        for call in calls:
            call()
        timed.append(len(calls))
        return [1.0, 2.0 if len(timed) % 2 else 0.5]

    monkeypatch.setattr("ov3fast.inference.choosing.times", times)
    fast = ov3fast.optimize(small_vae, dtype=torch.int8, calibration=photos[0][:1])
    measured = {path: choice for path, choice in fast.report.choices.items() if "conv" in path}
    assert set(measured.values()) == {"int8", "ours"} and 2 < len(timed) < len(measured), "alike ones are measured once"
    slow = next(path for path, choice in measured.items() if choice == "ours")
    assert fast.vae.get_submodule(slow.removeprefix("vae.")).__dict__[fusions.STATE].ranges is None
    assert "int8 2000.000 ms, bfloat16 1000.000 ms" in fast.report.reasons[slow] or "float32 1000" in fast.report.reasons[slow]
    timed.clear()
    assert ov3fast.optimize(small_vae, dtype=torch.int8, calibration=photos[0][:1]).report.choices == fast.report.choices
    assert not timed, "remembered"


def test_evening_out_the_channels_is_what_brings_it_there(tower, photos, monkeypatch):
    monkeypatch.setattr("ov3fast.inference.products.evened", lambda largest, weight: torch.ones_like(largest))
    fast = ov3fast.optimize(tower, dtype=torch.int8, mode="ours", calibration=photos[0])
    with torch.no_grad():
        assert least_cosine(fast.encode(photos[1])[1], tower.encode(photos[1])[1]) < COSINE


def test_the_small_vae(small_vae, photos):
    calibration, others = photos[0][:3], photos[1][:1]
    fast = ov3fast.optimize(small_vae, dtype=torch.int8, mode="ours", calibration=calibration)
    with torch.no_grad():
        got, expected = (vae.decode(vae.encode(others)).float() for vae in (fast, small_vae))
    assert 10 * torch.log10(4 / (got - expected).square().mean()) >= PSNR
    choices = fast.report.choices
    assert choices["vae.encoder.down_blocks.0.resnets.0.conv1"] == "int8" and "vae.encoder.conv_in" not in choices


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_the_formula(bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 24, generator=generator) + 1, torch.randn(40, 24, generator=generator)
    offset = torch.randn(40, generator=generator) if bias else None
    seen = int8.Range()
    seen.see(x)
    scale, zero = seen.scale_and_zero()
    got = int8.QuantizedLinear(weight, offset, (scale, zero), dtype)(x.to(dtype))
    q = (torch.round(x.to(dtype).double() / scale) + zero).clamp(0, 255)
    w, t = int8.quantize_weight(weight)
    exact = scale * t.double() * ((q - zero) @ w.double().t()) + (0 if offset is None else offset.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    # Half a quantisation step of each operand, and of both at once.
    x, step = x.double(), t.double()[None, None]
    bound = scale / 2 * weight.double().abs().sum(1) + step / 2 * x.abs().sum(-1, keepdim=True) + 24 * scale / 2 * step / 2
    rounded = torch.finfo(dtype).eps * (x.abs() @ weight.double().abs().t())
    assert (
        (exact - ops.linear(x, weight.double(), None if offset is None else offset.double())).abs() <= bound + rounded
    ).all()


needs_kernels = pytest.mark.skipif(bool(cpu.unavailable_reason()), reason=str(cpu.unavailable_reason()))
DTYPES = (torch.float32, torch.bfloat16)


def within_a_level(got, exact, scale, zero):
    """uint8 against values before quantisation: only what lies between two levels may round either way."""
    expected = (exact.double() / scale).round().add(zero).clamp(0, 255)
    assert got.dtype == torch.uint8 and (got.double() - expected).abs().max() <= 1
    assert (got.double() == expected).double().mean() > 0.97


@needs_kernels
@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_is_the_formula(dtype, isa):
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, -0.0, 1e9, -1e9, float("inf"), -float("inf"), 0.5, 1.5, -0.5])
    with cpu.use_isa(isa):
        for size in (0, 1, 15, 16, 17, 40_000):
            x = torch.cat([odd, 3 * torch.randn(size, generator=generator)]).to(dtype)
            # A power of two: halves lie exactly between two levels, and go to the even one.
            assert torch.equal(
                int8.quantize_activation(x, 0.5, 51), (torch.round(x.double() / 0.5) + 51).clamp(0, 255).to(torch.uint8)
            )
        assert int8.quantize_activation(torch.tensor([float("nan")], dtype=dtype), 0.5, 51).item() == 0
    pictures = torch.randn(2, 3, 5, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    made = int8.quantize_activation(pictures, 0.1, 100)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.shape == pictures.shape
    within_a_level(int8.quantize_activation(pictures[:, 1:, ::2], 0.1, 100), pictures[:, 1:, ::2], 0.1, 100)
    assert int8.quantize_activation(made, 9.0, 0) is made


@needs_kernels
@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
def test_a_norm_that_quantises(dtype, isa, residual):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 7, 50).to(dtype), torch.rand(50) + 0.5, torch.randn(50)
    more = torch.randn(3, 7, 50).to(dtype) if residual else None
    with cpu.use_isa(isa):
        got, h = int8.QuantizedNorm(weight, bias, 1e-6, (0.03, 120))(x, more)
        assert torch.equal(h, x if more is None else ops.layer_norm(x, weight, bias, residual=more, impl="cpu")[1])
    within_a_level(got, ops.layer_norm(h.double(), weight.double(), bias.double()), 0.03, 120)


@needs_kernels
@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 12, 9, 5), (1, 64, 32, 32), (3, 4, 1, 1)])
def test_a_group_norm_that_quantises(dtype, isa, size):
    torch.manual_seed(0)
    x = (torch.randn(size) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(size[1]) + 0.5, torch.randn(size[1])
    with cpu.use_isa(isa):
        got = int8.group_norm_silu_quantized(x, 4, weight, bias, 1e-6, (0.02, 14))
    assert got.is_contiguous(memory_format=torch.channels_last)
    within_a_level(got, ops.group_norm_silu(x.double(), 4, weight.double(), bias.double()), 0.02, 14)


@needs_kernels
def test_the_kernels_are_those_of_every_library():
    for name in int8._DECLARED:
        for isa in cpu.available_isas():
            int8.kernel(name).check(cpu._library(isa))


@pytest.mark.parametrize("missing", [False, pytest.param(True, id="without kernels")])
def test_convolutions_behind_a_norm_get_uint8(small_vae, photos, monkeypatch, missing):
    if missing:
        monkeypatch.setattr(int8, "has_kernels", lambda x: False)
        monkeypatch.setattr(fusions, "has_kernels", lambda x: False)
    fast = ov3fast.optimize(small_vae, dtype=torch.int8, mode="ours", calibration=photos[0][:3])
    given = {}
    for path, conv in fusions.convolutions(fast).items():
        conv.register_forward_pre_hook(lambda _, args, path=path: given.update({path: args[0].dtype}))
    with torch.no_grad():
        got, expected = (vae.decode(vae.encode(photos[1][:1])).float() for vae in (fast, small_vae))
    behind = {path for path, dtype in given.items() if dtype == torch.uint8}
    assert behind == (set() if missing or cpu.unavailable_reason() else set(fusions.norms_before(fast)))
    assert missing or len(behind) > 10
    assert 10 * torch.log10(4 / (got - expected).square().mean()) >= PSNR


def test_ranges():
    seen = int8.Range()
    assert not seen.seen
    seen.see(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    seen.see(torch.tensor([[0.5, 4.0]]))
    assert seen.largest().tolist() == [3.0, 4.0]
    scale, zero = seen.scale_and_zero()
    assert scale == pytest.approx(5 / 255) and zero == 51
    only = int8.Range()
    only.see(torch.full((2, 2), 7.0))
    assert only.scale_and_zero() == (pytest.approx(7 / 255), 0), "0 is in every range"
    nothing = int8.Range()
    nothing.see(torch.zeros(2, 2))
    assert nothing.scale_and_zero() == (int8.SMALLEST, 0)
    q = int8.quantize_activation(torch.tensor([-100.0, 0.0, 1.0, 100.0]), scale, zero)
    assert q.tolist() == [0, 51, 102, 255]


def test_changed_weights_reach_the_products(tower, photos):
    fast = ov3fast.optimize(tower, dtype=torch.int8, mode="ours", calibration=photos[0][:2])
    block = fast.encoder.transformer.blocks[0]
    x = torch.randn(1, 17, 192, dtype=fast.encoder.cls_token.dtype)
    with torch.no_grad():
        before = block(x, None)[1]
        block.mlp.fc2.weight.mul_(2)
        block.mlp.fc2.bias.mul_(2)
        after = block(x, None)[1]
    assert torch.cosine_similarity(after.float().flatten(), 2 * before.float().flatten(), dim=0) > 0.999
    assert not torch.equal(after, before)


def test_gradients_are_refused(tower, photos):
    fast = ov3fast.optimize(tower, dtype=torch.int8, mode="ours", calibration=photos[0][:2])
    assert not any(p.requires_grad for p in fast.parameters())
    x = torch.randn(1, 17, 192, dtype=fast.encoder.cls_token.dtype, requires_grad=True)
    with pytest.raises(ValueError, match="an int8 model has no gradients"):
        fast.encoder.transformer.blocks[0](x, None)


@pytest.mark.full
def test_a_tower_of_transformers(photos):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    model = transformers.CLIPVisionModel(config).eval()  # quick_gelu, between two products
    calibration = ov3fast.preprocess(package_photos("photos"), 32)
    fast = ov3fast.optimize(model, dtype=torch.int8, calibration=calibration[:5])
    with torch.no_grad():
        got = fast(pixel_values=calibration[5:].to(fast.dtype)).last_hidden_state
        expected = model(pixel_values=calibration[5:]).last_hidden_state
    assert least_cosine(got, expected) >= COSINE
    assert fast.report.choices[next(path for path in fast.report.choices if path.endswith("layers.0"))] == "int8"


def test_refusals(tower, photos, monkeypatch):
    for dtype, words in (
        (torch.float8_e4m3fn, "float8 products are not supported"),
        (torch.int32, "not a dtype for inference"),
    ):
        with pytest.raises(ValueError, match=f"optimize: dtype must be .*; got {dtype}: .*{words}"):
            ov3fast.optimize(tower, dtype=dtype)
    with pytest.raises(ValueError, match="dtype torch.int8 takes mode 'auto' or 'ours', got 'compile'"):
        ov3fast.optimize(tower, dtype=torch.int8, mode="compile")
    with pytest.raises(ValueError, match="calibration of a model of ov3fast is a tensor of images, got dict"):
        ov3fast.optimize(tower, dtype=torch.int8, calibration={})
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="dtype torch.int8 runs on CPUs: int8 products need a chip with VNNI"):
        ov3fast.optimize(tower, dtype=torch.int8)


def test_photos_that_are_missing_are_asked_for(tower, monkeypatch):
    monkeypatch.setattr("ov3fast.inference.photos.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="optimize: calibration: pass images; the default is scikit-image's photos"):
        ov3fast.optimize(tower, dtype=torch.int8)


def test_a_copy_makes_its_own(tower, photos):
    import copy

    fast = ov3fast.optimize(tower, dtype=torch.int8, mode="ours", calibration=photos[0][:2])
    again = copy.deepcopy(fast.encoder)
    assert fusions.STATE in again.transformer.blocks[0].__dict__
    with torch.no_grad():
        assert torch.equal(again.encode(photos[1])[1], fast.encoder.encode(photos[1])[1])
