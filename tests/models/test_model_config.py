"""Configs: sizes by name, strict round trips, errors that name the field."""

import json

import pytest

from ov3fast.models.config import (
    CaptionConfig,
    DecoderConfig,
    OpenVision3Config,
    TextConfig,
    VisionConfig,
    from_dict,
    to_dict,
    vision_config,
)


@pytest.mark.parametrize(
    ("size", "numbers"),
    [
        ("Ti", (192, 12, 3, 768)),
        ("S", (384, 12, 6, 1536)),
        ("M", (512, 12, 8, 2048)),
        ("B", (768, 12, 12, 3072)),
        ("L", (1024, 24, 16, 4096)),
        ("So400m", (1152, 27, 16, 4304)),
        ("H", (1280, 32, 16, 5120)),
    ],
)
def test_sizes_of_the_official_repository(size, numbers):
    config = vision_config(size, image_size=128)
    assert (config.width, config.depth, config.heads, config.mlp_dim) == numbers
    assert (config.patch_size, config.image_size, config.grid) == (2, 128, 8)


def test_round_trip_through_json():
    config = OpenVision3Config(
        vision=vision_config("S"), caption=CaptionConfig(style="queries"), tau=0.2, latent_convention="flux"
    )
    assert OpenVision3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert from_dict(VisionConfig, to_dict(vision_config("Ti"))) == vision_config("Ti")


def test_missing_fields_take_their_defaults():
    assert OpenVision3Config.from_dict({"vision": {"depth": 3}}).vision == VisionConfig(depth=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OpenVision3Config.from_dict({"visoin": {}}), "OpenVision3Config: unknown key 'visoin'"),
        (lambda: OpenVision3Config.from_dict({"text": {"widht": 1}}), "OpenVision3Config.text: unknown key 'widht'"),
        (lambda: OpenVision3Config.from_dict({"text": 3}), "OpenVision3Config.text: takes a dict of fields, got int"),
        (lambda: vision_config("XL"), "size must be one of Ti, S, M, B, L, So400m, H; got 'XL'"),
        (lambda: VisionConfig(width=100, heads=12), "width must be a multiple of heads, got width 100 and heads 12"),
        (lambda: VisionConfig(image_size=100), "image_size must be a multiple of 16 pixels, got 100"),
        (lambda: DecoderConfig(depth=-1), "depth must be an integer of at least 0, got -1"),
        (lambda: TextConfig(vocab_size=0), "vocab_size must be a positive integer, got 0"),
        (lambda: TextConfig(pool="cls"), "pool must be one of last, first, mean; got 'cls'"),
        (lambda: CaptionConfig(style="gpt"), "style must be one of queries, autoregressive; got 'gpt'"),
        (lambda: CaptionConfig(visual_keep=0), r"visual_keep must be in \(0, 1\], got 0"),
        (lambda: CaptionConfig(text_prefix=True), 'text_prefix needs style="queries"'),
        (lambda: CaptionConfig(length=1), "length must be at least 2"),
        (lambda: OpenVision3Config(tau=-1.0), "tau must not be negative, got -1.0"),
        (lambda: OpenVision3Config(latent_convention="sd"), "latent_convention must be one of openvision3, flux; got 'sd'"),
    ],
)
def test_errors_name_the_field(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
