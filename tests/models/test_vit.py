"""Vision towers: the position formula, shapes, noise, precision, checkpointing, compilation."""

import math

import pytest
import torch
from torch import nn

from ov3fast import ops
from ov3fast.models.config import DecoderConfig, VisionConfig
from ov3fast.models.transformer import Transformer, init_normal, init_xavier
from ov3fast.models.vit import ViTDecoder, ViTEncoder, sincos2d

SMALL = VisionConfig(width=48, depth=2, heads=2, mlp_dim=80, image_size=64, embed_dim=40)


def make_encoder(**fields) -> ViTEncoder:
    torch.manual_seed(0)
    encoder = ViTEncoder(VisionConfig(**{**SMALL.__dict__, **fields}))
    with torch.no_grad():
        for parameter in encoder.parameters():  # zero biases and unit norms would hide errors
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def make_decoder() -> ViTDecoder:
    torch.manual_seed(0)
    return ViTDecoder(DecoderConfig(width=32, depth=2, heads=2, mlp_dim=64), token_dim=48)


def latents(batch: int = 2, side: int = 8, width: int | None = None) -> torch.Tensor:
    return torch.randn(batch, 16, side, width or side, generator=torch.Generator().manual_seed(side))


def test_sincos2d_is_the_formula():
    height, width, dim = 3, 5, 24
    table = sincos2d(height, width, dim)
    assert table.shape == (15, 24) and table.dtype == torch.float32
    expected = [
        [
            function(position / 10000 ** (i / (dim / 4 - 1)))
            for function, position in ((math.sin, x), (math.cos, x), (math.sin, y), (math.cos, y))
            for i in range(dim // 4)
        ]
        for y in range(height)
        for x in range(width)
    ]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=1e-7)


def test_position_embedding_has_a_zero_cls_row_and_is_not_trained():
    encoder = make_encoder()
    table = encoder.position_embedding((4, 4))
    assert table.shape == (17, 48) and not table[0].any()
    assert torch.equal(table[1:], sincos2d(4, 4, 48))
    assert not any("pos" in name for name in encoder.state_dict())


def test_encoder_shapes_on_any_grid():
    encoder = make_encoder()
    for height, width in ((8, 8), (4, 6), (2, 2)):
        pooled, tokens = encoder(latents(3, height, width))
        assert pooled.shape == (3, 40) and tokens.shape == (3, height * width // 4, 48)
    assert encoder(latents(0))[0].shape == (0, 40)


def test_pooling_orders():
    x = latents()
    after, before = make_encoder(), make_encoder(final_ln_after_pool=False)
    pooled, tokens = after(x)
    torch.testing.assert_close(pooled, after.head(after.norm(tokens.mean(1))))
    _, normed = after(x, post_ln=True)
    torch.testing.assert_close(normed, after.norm(tokens))
    pooled, tokens = before(x)
    torch.testing.assert_close(tokens, normed)
    torch.testing.assert_close(pooled, before.head(normed.mean(1)))


def test_moments_are_embedded_as_their_latents():
    encoder = make_encoder()
    moments = torch.randn(2, 32, 8, 8) * 0.1
    mean, logvar = moments.chunk(2, 1)
    scale, shift, rng = 0.36, 0.11, ops.random.make_rng(5)
    same = encoder(moments, moments=True, scale=scale, shift=shift)
    torch.testing.assert_close(same, encoder((mean - shift) * scale))
    drawn = mean + (0.5 * logvar).exp() * ops.random.normal(mean.shape, rng)
    sampled = encoder(moments, moments=True, scale=scale, shift=shift, rng=rng)
    torch.testing.assert_close(sampled, encoder((drawn - shift) * scale))
    assert not torch.allclose(sampled[0], same[0], atol=1e-3)


def test_decoder_shapes_and_noise():
    decoder = make_decoder()
    tokens = torch.randn(3, 6, 48)
    clean = decoder(tokens, (2, 3))
    assert clean.shape == (3, 16, 4, 6)
    sigma, rng = torch.tensor([0.0, 0.5, 2.0]), ops.random.make_rng(1, 7)
    noised = decoder(tokens, (2, 3), sigma, rng)
    by_hand = decoder(tokens + sigma[:, None, None] * ops.random.normal(tokens.shape, rng), (2, 3))
    torch.testing.assert_close(noised, by_hand)
    torch.testing.assert_close(noised[0], clean[0])
    assert not torch.allclose(noised[1:], clean[1:], atol=1e-2)
    assert torch.equal(noised, decoder(tokens, (2, 3), sigma, rng))


def test_decoder_unpatchifies_in_place():
    decoder = make_decoder()
    with torch.no_grad():
        decoder.head.weight.zero_()
        decoder.head.bias.copy_(torch.arange(64.0))
    out = decoder(torch.randn(1, 4, 48), (2, 2))
    # 64 values a token: channel, then row, then column of its 2 x 2 patch.
    assert torch.equal(out[0, :, :2, 2:].reshape(-1), torch.arange(64.0))


def test_decoder_sees_positions():
    decoder = make_decoder()
    out = decoder(torch.ones(1, 4, 48), (2, 2))
    assert not torch.allclose(out[..., :2, :2], out[..., 2:, 2:], atol=1e-3)


def test_float64_and_bfloat16_autocast():
    encoder, x = make_encoder(), latents()
    single, tokens = encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_tokens = encoder(x)
        decoded = make_decoder()(half_tokens, (4, 4), torch.ones(2), ops.random.make_rng(0))
    assert half.dtype == half_tokens.dtype == decoded.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), single, rtol=0.05, atol=0.05 * float(single.detach().abs().max()))
    double = encoder.double()(x.double())[0]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", ["block", "mlp"])
@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_activation_checkpointing_changes_no_gradient(tower, recompute):
    module = make_encoder() if tower == "encoder" else make_decoder()
    call = (lambda: module(latents())[1]) if tower == "encoder" else (lambda: module(torch.ones(2, 4, 48), (2, 2)))
    grads = []
    for enabled in (False, True):
        module.set_activation_checkpointing(enabled, recompute)
        module.zero_grad()
        call().square().sum().backward()
        grads.append([p.grad for p in module.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_compiles_into_one_graph(tower):
    if tower == "encoder":
        module = make_encoder()
        inputs = (latents(),)
    else:
        module = make_decoder()
        inputs = (torch.randn(2, 4, 48), (2, 2), torch.tensor([0.1, 0.2]), ops.random.make_rng(3))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, actual = module(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    (actual[1] if tower == "encoder" else actual).square().sum().backward()
    assert module.transformer.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_initialisation():
    torch.manual_seed(0)
    one, quarter = Transformer(64, 3, 4, 256), Transformer(64, 3, 4, 256)
    for transformer, factor in ((one, 1.0), (quarter, 0.25)):
        init_xavier(transformer, factor)
    block = one.blocks[1]
    limit = math.sqrt(6 / 128)  # q, k and v each 64 x 64, not one 64 x 192 matrix
    assert 0.95 * limit < float(block.attn.qkv.weight.detach().abs().max()) <= limit
    assert float(block.mlp.fc1.weight.detach().abs().max()) <= math.sqrt(6 / 320)
    for name in ("attn.proj", "mlp.fc2"):
        small, full = (t.get_submodule(f"blocks.1.{name}").weight.detach().std() for t in (quarter, one))
        assert abs(float(small / full) - 0.25) < 0.02
    assert all(not p.any() for n, p in one.named_parameters() if n.endswith("bias"))
    init_normal(one, 1.0)
    assert abs(float(block.attn.qkv.weight.detach().std()) - 64**-0.5) < 0.01
    assert abs(float(block.mlp.fc2.weight.detach().std()) - 64**-0.5 * 6**-0.5) < 0.005
    encoder = ViTEncoder(SMALL)
    assert not encoder.cls_token.any()
    assert abs(float(encoder.patch_embed.weight.detach().std()) - 64**-0.5) < 0.01
    assert isinstance(encoder.patch_embed, nn.Linear) and encoder.patch_embed.bias is None


def test_a_checkpoints_own_positions_travel_with_it():
    encoder = make_encoder()
    encoder.set_position_embedding(torch.randn(17, 48))
    assert encoder.state_dict()["pos_embed"].shape == (17, 48)
    other = make_encoder()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(latents())[0], encoder(latents())[0])
    with pytest.raises(ValueError, match="not sincos2d, so it serves 4x4 tokens only; got 2x2"):
        other(latents(1, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_encoder()(torch.zeros(1, 4, 8, 8)), r"latents must be \[B, 16, H, W\], got \(1, 4, 8, 8\)"),
        (lambda: make_encoder()(torch.zeros(1, 16, 8, 8), moments=True), r"moments must be \[B, 32, H, W\]"),
        (lambda: make_encoder()(torch.zeros(1, 16, 7, 8)), "multiples of the patch 2, got 7x8"),
        (
            lambda: make_decoder()(torch.zeros(1, 5, 48), (2, 2)),
            r"tokens must be \[B, 2 \* 2, 48\] for grid \(2, 2\), got \(1, 5, 48\)",
        ),
        (lambda: make_decoder()(torch.zeros(1, 4, 48), (2, 2), torch.ones(1)), "sigma needs rng"),
        (lambda: sincos2d(2, 2, 10), "dim must be a multiple of 4"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_sigma_of_the_wrong_shape_is_named():
    with pytest.raises((ValueError, TypeError), match="sigma"):
        make_decoder()(torch.zeros(2, 4, 48), (2, 2), torch.ones(3), ops.random.make_rng(0))
