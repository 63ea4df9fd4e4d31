"""Each library's contract; test_conformance.py checks that the tokens are bitwise equal."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ov3fast
from ov3fast.interop import llava, open_clip, rae, timm

from .conftest import own_positions, released

pytest.importorskip("diffusers")
from ov3fast.interop.diffusers import AutoencoderOpenVision3, latent_statistics  # noqa: E402


class TestDiffusers:
    def test_encode_and_decode(self, model, images):
        autoencoder = AutoencoderOpenVision3.from_model(model)
        with torch.no_grad():
            latent = autoencoder.encode(images).latent
            assert latent.shape == (2, 32, 2, 2)
            tokens = model.encode(images)[1]
            # Statistics of zeros and ones leave the tokens unchanged except for the factor 1 / sqrt(1 + 1e-5).
            torch.testing.assert_close(latent.flatten(2).transpose(1, 2), tokens / (1 + 1e-5) ** 0.5)
            sample = autoencoder.decode(latent).sample
            torch.testing.assert_close(sample.clamp(-1, 1), model.reconstruct(images), rtol=1e-4, atol=1e-4)
            assert torch.equal(autoencoder(images).sample, sample)
            assert torch.equal(autoencoder.encode(images, return_dict=False)[0], latent)
        assert autoencoder.config.scaling_factor == 1.0

    def test_saved_and_loaded_with_its_statistics(self, model, images, tmp_path):
        autoencoder = AutoencoderOpenVision3.from_model(model)
        mean, var = latent_statistics(autoencoder, [images])
        autoencoder.set_statistics(mean, var)
        autoencoder.save_pretrained(tmp_path / "ae")
        again = AutoencoderOpenVision3.from_pretrained(tmp_path / "ae", low_cpu_mem_usage=False).eval()
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in autoencoder.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(again.encode(images).latent, autoencoder.encode(images).latent, rtol=1e-4, atol=1e-4)
            restored = again.decode(again.encode(images).latent).sample.clamp(-1, 1)
            torch.testing.assert_close(restored, model.reconstruct(images), rtol=1e-3, atol=1e-3)

    def test_statistics_know_neither_batch_nor_order(self, model):
        autoencoder = AutoencoderOpenVision3.from_model(model)
        images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(9)) * 2 - 1
        with torch.no_grad():
            z = torch.cat([autoencoder.encode(one[None]).latent for one in images]).double() * (1 + 1e-5) ** 0.5
        for batches in (images.split(1), images.split(3), images.flip(0).split(2)):
            mean, var = latent_statistics(autoencoder, batches)
            torch.testing.assert_close(mean, z.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(var, z.var(0, correction=0), rtol=1e-4, atol=1e-6)
        autoencoder.set_statistics(mean, var)
        normalised = autoencoder.encode(images).latent
        assert normalised.mean(0).abs().max() < 1e-3 and normalised.var(0, correction=0).max() < 1.01
        # Statistics are always those of the unnormalised latents.
        torch.testing.assert_close(latent_statistics(autoencoder, [images])[0], mean, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="got no image"):
            latent_statistics(autoencoder, [])

    def test_other_sizes(self, model):
        autoencoder, images = AutoencoderOpenVision3.from_model(model), torch.rand(1, 3, 48, 64) * 2 - 1
        assert autoencoder(images).sample.shape == images.shape
        autoencoder.set_statistics(torch.randn(32, 2, 2), torch.ones(32, 2, 2))
        with pytest.raises(ValueError, match=r"the statistics are of \(2, 2\) places, got \(3, 4\)"):
            autoencoder.encode(images)

    def test_a_model_keeps_its_dtypes(self, model):
        made = AutoencoderOpenVision3.from_model(copy.deepcopy(model).bfloat16())
        assert {p.dtype for part in (made.encoder, made.decoder) for p in part.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in made.vae.parameters()} == {made.latents_mean.dtype} == {torch.float32}

    def test_a_tower_is_refused(self, model):
        with pytest.raises(ValueError, match="a released vision tower has no decoder"):
            AutoencoderOpenVision3.from_model(released(model))


class TestLlava:
    def test_attributes(self, model, model_folder):
        tower = llava.OpenVision3VisionTower(model_folder, delay_load=True)
        assert not tower.is_loaded and (tower.hidden_size, tower.num_patches, tower.config.hidden_size) == (32, 4, 32)
        tower.load_model()
        tower.load_model()
        assert tower.is_loaded and tower.num_patches_per_side == 2 and tower.image_size == 32
        assert tower.dummy_feature.shape == (1, 32) and tower.dtype == torch.float32 and tower.device.type == "cpu"
        assert (tower.config.patch_size, tower.config.image_size, tower.config.num_hidden_layers) == (16, 32, 2)
        assert not any(p.requires_grad for p in tower.parameters())

    @pytest.mark.parametrize("feature", ["patch", "cls_patch"])
    def test_all_patch_tokens_are_kept(self, model, images, feature):
        tower = llava.OpenVision3VisionTower(model, SimpleNamespace(mm_vision_select_feature=feature))
        batch = tower(images)
        assert batch.shape == (2, 4, 32), "patch would cut the first"
        rows = tower(list(images))
        assert all(row.shape == (1, 4, 32) for row in rows)
        torch.testing.assert_close(torch.cat(rows), batch, rtol=1e-4, atol=1e-4)
        assert tower(images.bfloat16()).dtype == torch.bfloat16

    def test_the_layer_before_the_last(self, model, images):
        seen = []
        hook = model.encoder.transformer.blocks[0].register_forward_hook(lambda _, __, out: seen.append(sum(out)[:, 1:]))
        model.encode(images)
        hook.remove()
        assert torch.equal(llava.OpenVision3VisionTower(model)(images), seen[0])

    def test_clips_pixels_are_brought_back(self, model, images):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (llava.CLIP_MEAN, llava.CLIP_STD))
        clips = ((images + 1) / 2 - mean) / std
        got, expected = llava.OpenVision3VisionTower(model, pixels="clip")(clips), llava.OpenVision3VisionTower(model)(images)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        with pytest.raises(ValueError, match="pixels must be one of half, clip"):
            llava.OpenVision3VisionTower(model, pixels="imagenet")

    def test_image_processor(self, model, photo):
        pytest.importorskip("transformers")
        processor = llava.OpenVision3VisionTower(model).image_processor
        assert processor.crop_size["height"] == processor.size["height"] == 32
        pixels = processor.preprocess(photo, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, ov3fast.preprocess(photo, 32)[0], rtol=0, atol=1e-6)

    def test_a_wrong_feature(self, model, images):
        with pytest.raises(ValueError, match="Unexpected select feature: cls"):
            llava.OpenVision3VisionTower(model, SimpleNamespace(mm_vision_select_feature="cls"))(images)


class TestOpenClip:
    def test_a_loop_over_a_benchmark(self, model, model_folder, photo):
        clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
        tokenizer = open_clip.get_tokenizer(model_folder)
        pixels = transform(photo)
        assert torch.equal(pixels, ov3fast.preprocess(photo, 32)[0])
        ids = tokenizer(["a red square", "a square"])
        with torch.no_grad():
            image, text, scale = clip(pixels[None], ids)
            assert torch.equal(text, model.encode_text(["a red square", "a square"], normalize=True))
            torch.testing.assert_close(image, model.encode_image(photo, normalize=True))
            assert torch.equal(clip.encode_text(ids), model.encode_text(["a red square", "a square"]))
        assert scale == clip.logit_scale.exp() and clip.context_length == 10 and tokenizer("red").shape == (1, 10)
        assert clip.visual.image_size == 32

    def test_precision_and_refusals(self, model):
        clip, _, _ = open_clip.create_model_and_transforms(copy.deepcopy(model), precision="bf16")
        assert clip.logit_scale.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="precision must be one of fp32"):
            open_clip.create_model_and_transforms(model, precision="int4")
        tower, _, _ = open_clip.create_model_and_transforms(released(model))
        for call in (lambda: tower.encode_text(torch.zeros(1, 4, dtype=torch.int64)), lambda: open_clip.get_tokenizer(tower)):
            with pytest.raises(ValueError, match="a released vision tower has no text encoder"):
                call()

    def test_export_is_the_released_layout(self, model, model_folder, images, tmp_path, capsys):
        from ov3fast import cli, load_vision_encoder

        assert cli.main(["export", "open_clip", str(model_folder), "--out", str(tmp_path / "t")]) == 0
        encoder = load_vision_encoder(tmp_path / "t", vae=model.get_vae())
        with torch.no_grad():
            for found, expected in zip(encoder.encode(images), model.encode(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class TestTimm:
    def test_features_and_head(self, model, images):
        for weights in (copy.deepcopy, released, own_positions):
            door = timm.TimmModel(weights(model))
            with torch.no_grad():
                tokens = door.forward_features(images)
                torch.testing.assert_close(door.forward_head(tokens), door(images))
            assert door.forward_head(tokens, pre_logits=True).shape == (2, 32) and tokens.shape == (2, 4, 32)
        assert (door.num_features, door.num_prefix_tokens, door.num_classes) == (32, 0, 24)
        assert door.feature_info == [{"module": f"blocks.{i}", "num_chs": 32, "reduction": 16} for i in range(2)]
        assert door.pretrained_cfg["input_size"] == (3, 32, 32)

    def test_intermediates(self, model, images):
        door = timm.TimmModel(model)
        with torch.no_grad():
            tokens, found = door.forward_intermediates(images)
            assert torch.equal(tokens, model.encode(images)[1])
            assert [state.shape for state in found] == [(2, 32, 2, 2)] * 2
            assert torch.equal(found[-1].flatten(2).transpose(1, 2), tokens)
            [last] = door.get_intermediate_layers(images, norm=True)
            assert torch.equal(last, model.encoder.norm(tokens))
            [first] = door.forward_intermediates(images, [-2], output_fmt="NLC", intermediates_only=True)
            assert torch.equal(first, found[0].flatten(2).transpose(1, 2))
        for wrong in ([2], [-3], 5):
            with pytest.raises(ValueError, match=r"indices must be blocks 0\.\.1"):
                door.forward_intermediates(images, wrong)
        with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC"):
            door.forward_intermediates(images, output_fmt="NHWC")

    def test_input_size(self, model):
        door = timm.TimmModel(copy.deepcopy(model))
        door.set_input_size(48)
        door.set_input_size((64, 64))
        assert door.model.config.vision.image_size == 64 and door.pretrained_cfg["input_size"] == (3, 64, 64)
        for wrong in ({"img_size": (32, 64)}, {"img_size": 40}, {"patch_size": 8}):
            with pytest.raises(ValueError, match="square|multiple of 16|patch size is 16"):
                door.set_input_size(**wrong)


def test_rae(model, images):
    encoder = rae.Stage1Encoder(model)
    assert (encoder.patch_size, encoder.hidden_size) == (16, 32) and encoder.encode(images).shape == (2, 4, 32)
    pixels = torch.from_numpy(np.array([(0.0, 0.5, 1.0)]))
    assert ((pixels - torch.tensor(encoder.image_mean)) / torch.tensor(encoder.image_std)).tolist() == [[-1, 0, 1]]
    assert not any(p.requires_grad for p in copy.copy(encoder).parameters())
