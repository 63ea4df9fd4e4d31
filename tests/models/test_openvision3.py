"""The whole model: forward and sub-batches, use from images, files, the VAE's place, errors."""

import copy
import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ov3fast import ops
from ov3fast.io import atomic_folder
from ov3fast.models import noise
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import get_tokenizer
from ov3fast.models.vae import FrozenVAE
from ov3fast.testing import assert_within_budget

TEXTS = ["a red apple", "a small dog on a table", "two blue birds"]


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def model(build, flux_vae) -> OpenVision3:
    model = build().eval()
    model.vae = flux_vae
    return model


def test_forward_gives_the_losses_what_they_need(build, latents):
    model = build()
    out = model(latents, model.text_ids(TEXTS), model.caption_ids(TEXTS))
    assert out.pooled.shape == out.text.shape == (3, 40)
    assert out.tokens.shape == (3, 16, 48)
    assert out.latents_hat.shape == latents.shape
    assert out.caption_hidden.shape == (3, 9, 24) and out.caption_labels.shape == (3, 9)
    assert out.caption_weight.data_ptr() == model.captioner.head.weight.data_ptr()
    assert out.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6) and out.logit_bias is None
    loss = ops.contrastive_loss(out.pooled, out.text, out.logit_scale)
    loss = loss + (out.latents_hat - latents).abs().mean()
    loss = loss + ops.linear_cross_entropy(out.caption_hidden, out.caption_weight, out.caption_labels)
    loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_parts_that_are_not_asked_for_do_not_run(build, latents):
    out = build()(latents, decode=False)
    assert out.text is out.latents_hat is out.caption_hidden is out.caption_labels is out.caption_weight is None


def test_sub_batches_are_chosen_by_index(build, latents):
    model = build()
    ids = model.caption_ids(TEXTS)
    every = model(latents, None, ids)
    some = model(latents, None, ids, decode_index=torch.tensor([2, 0]), caption_index=torch.tensor([1]))
    assert some.pooled.shape == (3, 40)
    torch.testing.assert_close(some.latents_hat, every.latents_hat[[2, 0]])
    torch.testing.assert_close(some.caption_hidden, every.caption_hidden[[1]])
    assert torch.equal(some.caption_labels, every.caption_labels[[1]])
    none = model(
        latents, None, ids, decode_index=torch.empty(0, dtype=torch.int64), caption_index=torch.empty(0, dtype=torch.int64)
    )
    assert none.latents_hat.shape == (0, 16, 8, 8) and none.caption_hidden.shape == (0, 9, 24)


def test_text_prefix_takes_each_images_own_text(build, latents):
    model = build(caption={"style": "queries", "text_prefix": True})
    texts, ids = model.text_ids(TEXTS[:2]), model.caption_ids(TEXTS)
    owner = torch.tensor([1, 0, 1])
    out = model(latents, texts, ids, text_index=owner, caption_index=torch.tensor([2, 1]))
    _, text_tokens = model.text(texts, return_tokens=True)
    expected, _ = model.captioner(out.tokens[[2, 1]], ids[[2, 1]], text_tokens[[1, 0]])
    torch.testing.assert_close(out.caption_hidden, expected)
    with pytest.raises(ValueError, match="captions with text_prefix need text_ids"):
        model(latents, None, ids)
    with pytest.warns(DeprecationWarning):
        assert len(model.caption(latents, texts=TEXTS)) == len(model.caption(latents)) == 3


def test_noise_reaches_the_decoder_alone(build, latents):
    model = build(tau=0.5)
    rng = ops.random.make_rng(7, 1)
    quiet, noised = model(latents), model(latents, rng=rng)
    assert torch.equal(quiet.tokens, noised.tokens) and torch.equal(quiet.pooled, noised.pooled)
    assert not torch.allclose(quiet.latents_hat, noised.latents_hat, atol=1e-3)
    assert torch.equal(noised.latents_hat, model(latents, rng=rng).latents_hat)
    sigma = noise.sample_sigma(3, 0.5, noise.derive_rng(rng, noise.SIGMA))
    assert torch.equal(noised.latents_hat, model.decode(noised.tokens, (4, 4), sigma, rng))
    assert torch.equal(noised.latents_hat, model(latents, sigma=sigma, rng=rng).latents_hat)
    assert torch.equal(build(tau=0.0)(latents, rng=rng).latents_hat, quiet.latents_hat)


def test_post_ln_tokens_serve_every_branch(build, latents):
    model = build(tokens="post_ln")
    out = model(latents)
    torch.testing.assert_close(out.tokens, model.encoder.norm(build()(latents).tokens))
    torch.testing.assert_close(out.latents_hat, model.decode(out.tokens))


def test_sigmoid_has_a_bias(build, latents):
    out = build(contrastive="sigmoid", logit_scale_init=10.0)(latents)
    assert out.logit_bias.item() == -10.0 and out.logit_scale.item() == pytest.approx(10.0)


def test_autocast_and_checkpointing(build, latents):
    model = build()
    model.set_activation_checkpointing(True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(latents, model.text_ids(TEXTS), model.caption_ids(TEXTS), rng=ops.random.make_rng(0))
    assert out.pooled.dtype == out.text.dtype == out.latents_hat.dtype == out.caption_hidden.dtype == torch.bfloat16
    sum(v.float().square().mean() for v in (out.pooled, out.text, out.latents_hat, out.caption_hidden)).backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())


def test_images_in_images_and_words_out(model, images):
    latents = model.encode_to_latents(images)
    torch.testing.assert_close(latents, model.vae.encode(images))
    pooled, tokens = model.encode(images)
    assert tokens.shape == (2, 8, 48)
    assert torch.equal(pooled, model.encode_latents(latents)[0])
    assert torch.equal(model.encode_image(images), pooled)
    torch.testing.assert_close(model.encode_image(images, normalize=True).norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.encode_text(TEXTS, normalize=True).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.encode_text(TEXTS), model.encode_text(model.text_ids(TEXTS)))
    shown = model.reconstruct(images)
    assert shown.shape == images.shape and shown.abs().max() <= 1 and not shown.requires_grad
    torch.testing.assert_close(shown, model.decode_latents(model.decode(tokens, (4, 2))).clamp(-1, 1))
    for beams in (1, 3):
        captions = model.caption(images, beams=beams, max_length=5)
        assert len(captions) == 2 and all(isinstance(c, str) for c in captions)


def test_posterior_sampling(build, flux_vae, images):
    model = build(posterior="sample")
    model.vae = flux_vae
    rng = ops.random.make_rng(2)
    mean, drawn = model.encode_to_latents(images), model.encode_to_latents(images, rng=rng)
    torch.testing.assert_close(mean, flux_vae.encode(images))
    assert not torch.allclose(mean, drawn, atol=1e-3) and torch.equal(drawn, model.encode_to_latents(images, rng=rng))


@pytest.mark.parametrize("convention", ["openvision3", "flux"])
def test_images_are_encoded_from_moments_alone(build, flux_vae, images, convention, monkeypatch):
    """One call of ops.patch_embed takes the moments: the same bits as through latents, which are never made."""
    model = build(latent_convention=convention, posterior="sample", tokens="post_ln").eval()
    model.vae = flux_vae
    rng = ops.random.make_rng(2)
    mean = model.encode_latents(model.encode_to_latents(images))
    drawn = model.encode_latents(model.encode_to_latents(images, rng))
    reconstruction = model.reconstruct(images)
    exact = copy.deepcopy(model).double()
    truth = exact.encode_latents(flux_vae.from_moments(flux_vae.moments(images).double(), "sample", convention, derived(rng)))
    for method in ("from_moments", "encode"):
        monkeypatch.setattr(FrozenVAE, method, lambda *_, **__: pytest.fail("latents were made"))
    assert all(torch.equal(a, b) for a, b in zip(model.encode(images), mean, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.encode_moments(model.encode_to_moments(images)), mean, strict=True))
    assert torch.equal(model.encode_image(images), mean[0]) and torch.equal(model.reconstruct(images), reconstruction)
    for actual, former, reference in zip(model.encode(images, rng=rng), drawn, truth, strict=True):
        assert_within_budget(actual, former, reference)


def derived(rng):
    return noise.derive_rng(rng, noise.POSTERIOR)


def test_the_posterior_mean_is_taken_unless_the_config_samples(model, images):
    mean = model.encode(images)
    assert all(torch.equal(a, b) for a, b in zip(mean, model.encode(images, rng=ops.random.make_rng(2)), strict=True))


def test_inputs_are_cast(model, images, latents):
    pooled, _ = model.encode(images)
    assert torch.equal(model.encode(images.double())[0], pooled)
    wanted, _ = model.encode_latents(latents)
    assert torch.equal(model.encode_latents(latents.double())[0], wanted)
    half = copy.deepcopy(model).bfloat16()
    assert half.encode(images)[0].dtype == half.encode_latents(latents.half())[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="latents: must be floating point, got torch.int64"):
        model.encode_latents(latents.long())


def test_latents_in_place_of_images_are_deprecated(model, images, latents):
    wanted = model.encode_latents(latents)
    for method, call in (
        ("encode", lambda: model.encode(latents)),
        ("encode_image", lambda: (model.encode_image(latents), wanted[1])),
    ):
        with pytest.warns(DeprecationWarning, match=f"OpenVision3.{method} takes images; latents are deprecated") as caught:
            found = call()
        assert caught[0].filename == __file__
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.warns(DeprecationWarning, match="caption takes images"):
        model.caption(latents, max_length=3)
    with pytest.warns(DeprecationWarning, match="now named encode_to_latents"):
        assert torch.equal(model.latents(images), model.encode_to_latents(images))


def test_pixel_losses_reach_the_encoder(model, images):
    out = model(model.encode_to_latents(images))
    (model.decode_latents(out.latents_hat) - images).abs().mean().backward()
    assert model.encoder.patch_embed.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.vae.parameters())


def test_the_vae_is_no_part_of_the_weights(model):
    assert not any("vae" in name for name in [*model.state_dict(), *dict(model.named_parameters())])
    assert model.double().vae.dtype == torch.float32
    assert not model.train().vae.training
    assert model.parameter_counts()["vae"] == sum(p.numel() for p in model.vae.parameters())


def test_conventions_do_not_mix(build, make_vae, images):
    openvision, flux = build(), build(latent_convention="flux")
    openvision.vae, flux.vae = make_vae(), make_vae()
    difference = (openvision.encode_to_latents(images) - flux.encode_to_latents(images)).flatten()
    torch.testing.assert_close(difference, torch.full_like(difference, 0.1159 * 0.3611))
    for mix in (
        lambda: flux.set_vae(openvision.vae),
        lambda: openvision.vae.encode(images, convention="flux"),
        lambda: openvision.decode_latents(torch.zeros(1, 16, 4, 4), convention="flux"),
    ):
        with pytest.raises(ValueError, match="can't be mixed"):
            mix()


def test_counts_add_up(build):
    counts = build().parameter_counts()
    assert sum(counts[part] for part in ("encoder", "decoder", "text", "captioner", "other")) == counts["total"]
    assert counts["other"] == 1 and "vae" not in counts


@pytest.mark.parametrize("caption", [{}, {"style": "queries", "text_prefix": True}, {"position": "learned"}])
def test_saved_and_loaded(build, flux_vae, latents, tmp_path, caption):
    model = build(caption=caption, contrastive="sigmoid").eval()
    model.save_pretrained(tmp_path / "m")
    names = {entry.name for entry in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    loaded = OpenVision3.from_pretrained(tmp_path / "m", vae=flux_vae)
    assert loaded.config == model.config and not loaded.training and loaded.vae is flux_vae
    left, right = model(latents, model.text_ids(TEXTS)), loaded(latents, loaded.text_ids(TEXTS))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True) if a is not None)
    with pytest.warns(DeprecationWarning):
        assert loaded.caption(latents) == model.caption(latents)
    model.save_pretrained(tmp_path / "m")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_non_contiguous_weights_are_saved(build, tmp_path):
    model = build()
    weight = model.encoder.head.weight
    expected = weight.detach().clone()
    weight.data = expected.t().contiguous().t()
    assert not weight.is_contiguous()
    model.text.embed.weight.data = torch.cat([model.text.embed.weight.data] * 2)[: len(model.text.embed.weight)]
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(OpenVision3.from_pretrained(tmp_path / "m").encoder.head.weight, expected)


def test_a_failed_save_leaves_the_old_one(build, tmp_path, monkeypatch):
    model = build()
    model.save_pretrained(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.logit_scale.add_(1)
    monkeypatch.setattr(type(model.tokenizer), "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_failed_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    def write(text):
        with atomic_folder(tmp_path / "m") as folder:
            (folder / "a").write_text(text)

    write("old")
    replace = os.replace

    def failing(source, target):
        if ".writing-" in str(source):
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space"):
        write("new")
    assert (tmp_path / "m" / "a").read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_saving_never_removes_other_files(build, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis.tex\)"):
        build().save_pretrained(tmp_path / "runs")
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("text.norm.weight"), "missing key 'text.norm.weight'"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "unexpected key 'extra.weight'"),
        (lambda s: s.update({"decoder.embed.bias": torch.zeros(5)}), r"decoder.embed.bias must have shape \(32,\), got \(5,\)"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("text.")], r"missing key 'text.pos_embed' and \d+ more"),
    ],
)
def test_load_errors_name_the_key(build, tmp_path, damage, message):
    build().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        OpenVision3.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_load_errors_of_files(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        OpenVision3.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        OpenVision3.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path / "m")
    weights, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"can't read .*model\.safetensors") as error:
        OpenVision3.from_pretrained(tmp_path / "m")
    assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        OpenVision3.from_pretrained(tmp_path / "m")
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "tua": 1}))
    with pytest.raises(ValueError, match="unknown key 'tua'"):
        OpenVision3.from_pretrained(tmp_path / "m")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        OpenVision3.from_pretrained(tmp_path / "m")


def test_vae_is_loaded_on_first_need(build, flux_vae, images, tmp_path):
    flux_vae.vae.save_pretrained(tmp_path / "vae")
    model = build(vae=str(tmp_path / "vae"))
    assert model.vae is None
    assert torch.equal(model.encode_to_latents(images), flux_vae.encode(images))
    assert isinstance(model.vae, FrozenVAE) and model.vae.latent_convention == "openvision3"


def test_default_tokenizer(config):
    text, caption = (dataclasses.replace(part, vocab_size=32000) for part in (config.text, config.caption))
    assert OpenVision3(dataclasses.replace(config, text=text, caption=caption)).tokenizer.vocab_size == 30522


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v: m(torch.zeros(2, 16, 8, 8), None, torch.ones(3, 4, dtype=torch.int64)), "a row per image, got 3 rows for 2 images"),
        (lambda m, v: m.encode(torch.zeros(1, 4, 8, 8)), r"images: must be \[B, 3, H, W\] .* got \(1, 4, 8, 8\)"),
        (lambda m, v: m.encode(torch.zeros(1, 3, 40, 64)), r"multiples of 16, got \(1, 3, 40, 64\)"),
        (lambda m, v: m.decode(torch.zeros(1, 8, 48)), r"8 tokens are no square; give grid \(h, w\)"),
        (lambda m, v: m.set_vae(v(latent_channels=4)), "vae: has 4 latent channels, the encoder takes 16"),
        (lambda m, v: setattr(m, "tokenizer", get_tokenizer()), "the tokenizer has 30522 ids, the embeddings"),
        (
            lambda m, v: OpenVision3(
                dataclasses.replace(m.config, caption=dataclasses.replace(m.config.caption, eos_id=5)), tokenizer=m.tokenizer
            ),
            "the tokenizer's eos_id is 2, the config's 5",
        ),
    ],
)  # fmt: skip
def test_errors(model, make_vae, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(model, make_vae)
    assert "\n" not in str(error.value)
