"""FLOPs against torch's counter on plain PyTorch towers of the same shape, and the paper's model."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ov3fast.models import flops
from ov3fast.models.config import OpenVision3Config, vision_config
from ov3fast.models.openvision3 import OpenVision3


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def plain_blocks(tokens, width, depth, hidden):
    """The matrix products of a stack of blocks, attention with all pairs."""
    x = torch.randn(1, tokens, width)
    for _ in range(depth):
        q, k, v = F.linear(x, torch.randn(3 * width, width)).chunk(3, -1)
        scores = torch.bmm(q, k.transpose(1, 2))
        x = F.linear(torch.bmm(scores, v), torch.randn(width, width))
        x = F.linear(F.linear(x, torch.randn(hidden, width)), torch.randn(width, hidden))


def test_encoder(config):
    vision = config.vision

    def run():
        nn.functional.conv2d(torch.randn(1, 16, 8, 8), torch.randn(vision.width, 16, 2, 2), stride=2)
        plain_blocks(17, vision.width, vision.depth, vision.mlp_dim)
        F.linear(torch.randn(1, vision.width), torch.randn(vision.embed_dim, vision.width))

    assert flops.encoder_flops(vision, 16) == counted(run)


def test_decoder(config):
    decoder = config.decoder

    def run():
        F.linear(torch.randn(16, config.vision.width), torch.randn(decoder.width, config.vision.width))
        plain_blocks(16, decoder.width, decoder.depth, decoder.mlp_dim)
        F.linear(torch.randn(16, decoder.width), torch.randn(64, decoder.width))

    assert flops.decoder_flops(config, 16) == counted(run)


def test_text(config):
    text = config.text

    def run():
        plain_blocks(12, text.width, text.depth, text.mlp_dim)
        F.linear(torch.randn(1, text.width), torch.randn(40, text.width))

    assert flops.text_flops(text, 12, 40) == counted(run)


@pytest.mark.parametrize("fields", [{}, {"style": "queries", "text_prefix": True}, {"visual_keep": 0.35}])
def test_captioner(config, fields):
    caption = dataclasses.replace(config.caption, **fields)
    seen = int(16 * caption.visual_keep)
    text = 12 if caption.text_prefix else 0
    targets, width = 9, caption.width

    def run():
        F.linear(torch.randn(seen, 48), torch.randn(width, 48))
        F.linear(torch.randn(text, 32), torch.randn(width, 32))
        plain_blocks(seen + text + targets, width, caption.depth, caption.mlp_dim)
        F.linear(torch.randn(targets, width), torch.randn(caption.vocab_size, width))

    # The counter assumes full attention; the mask saves its share of the pairs.
    hidden_pairs = (seen + text) * targets + targets * (targets - 1) // 2
    saved = caption.depth * 4 * width * hidden_pairs
    assert flops.caption_flops(caption, 16, 10, 48, 12, 32) == counted(run) - saved


def test_vae(make_vae):
    vae = make_vae()
    encoder, decoder = flops.vae_flops(dataclasses.asdict(vae.vae.config), 32)
    # torch's counter leaves out attention on the CPU: here one head of 16 channels on 4 x 4 places in each half.
    attention = 4 * 16**2 * 16
    assert encoder == counted(lambda: vae.vae.encode(torch.zeros(1, 3, 32, 32))) + attention
    assert decoder == counted(lambda: vae.vae.decode(torch.zeros(1, 16, 4, 4))) + attention
    assert flops.vae_flops(dataclasses.asdict(vae.vae.config), 64)[0] > 4 * encoder


def test_flops_per_image_has_every_part(config, flux_vae):
    vae_config = dataclasses.asdict(flux_vae.vae.config)
    counts = flops.flops_per_image(config, vae_config=vae_config)
    assert list(counts) == ["vae_encoder", "encoder", "decoder", "vae_decoder", "text", "captioner"]
    assert counts["encoder"] == flops.encoder_flops(config.vision, 16)
    assert flops.flops_per_image(config, 128, vae_config=vae_config)["encoder"] == flops.encoder_flops(config.vision, 64)
    with pytest.raises(ValueError, match="image_size must be a multiple of 16 pixels, got 100"):
        flops.flops_per_image(config, 100)


def test_the_papers_base_model():
    config = OpenVision3Config(vision=vision_config("B", image_size=256))
    counts = flops.parameter_counts(config)
    assert counts["encoder"] == 85_893_120 - 257 * 768  # the position table is no parameter
    assert counts["vae"] == 83_819_683
    assert counts["total"] == sum(counts[part] for part in ("encoder", "decoder", "text", "captioner", "other"))
    work = flops.flops_per_image(config)
    # ViT-B at 197 tokens is 35.1 GFLOP (2 x 17.6 GMAC); here 257 tokens.
    assert 45e9 < work["encoder"] < 48e9 and 45e9 < work["decoder"] < 48e9
    assert work["vae_decoder"] > work["vae_encoder"] > 2e11


def test_counts_are_those_of_the_built_model(config, flux_vae):
    model = OpenVision3(config, vae=flux_vae)
    assert flops.parameter_counts(config, vae_config=dataclasses.asdict(flux_vae.vae.config)) == model.parameter_counts()
