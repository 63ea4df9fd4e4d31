"""The objective against equations 4 to 6, written out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ov3fast.losses import Objective, ObjectiveConfig, l1


def outputs(images: int = 4, texts: int = 4):
    torch.manual_seed(0)
    return SimpleNamespace(
        pooled=torch.randn(images, 8, requires_grad=True),
        text=torch.randn(texts, 8, requires_grad=True),
        latents_hat=torch.randn(3, 16, 4, 4, requires_grad=True),
        caption_hidden=torch.randn(2, 5, 8, requires_grad=True),
        caption_weight=torch.randn(11, 8, requires_grad=True),
        caption_labels=torch.tensor([[1, 2, 3, -100, -100], [4, 5, -100, -100, -100]]),
        logit_scale=torch.tensor(10.0),
        logit_bias=torch.tensor(-3.0),
    )


def clip(image, text, scale):
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def lpips(x, y):
    return (x - y).square().mean(dim=(1, 2, 3))


def test_equations():
    out, latents = outputs(), torch.randn(3, 16, 4, 4)
    images, images_hat = torch.rand(2, 2, 3, 8, 8) * 2 - 1
    losses = Objective(ObjectiveConfig(lpips_weight=0.5), lpips)(out, latents=latents, images=images, images_hat=images_hat)
    pixel, latent = (images - images_hat).abs().mean(), (latents - out.latents_hat).abs().mean()
    caption = F.cross_entropy((out.caption_hidden @ out.caption_weight.T).flatten(0, 1), out.caption_labels.flatten())
    rec = pixel + 0.4 * latent + 0.5 * lpips(images, images_hat).mean()
    und = caption + clip(out.pooled, out.text, 10.0)
    torch.testing.assert_close(losses["rec"], rec)
    torch.testing.assert_close(losses["und"], und)
    torch.testing.assert_close(losses["loss"], 0.5 * rec + und)
    assert set(losses) == {"pixel", "latent", "lpips", "caption", "contrastive", "rec", "und", "loss"}


def test_views_share_their_texts():
    out = outputs(images=9, texts=4)
    pairs = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]])
    losses = Objective(ObjectiveConfig())(out, pairs=pairs)
    expected = (clip(out.pooled[pairs[0]], out.text, 10.0) + clip(out.pooled[pairs[1]], out.text, 10.0)) / 2
    torch.testing.assert_close(losses["contrastive"], expected)


def test_sigmoid_uses_the_bias():
    out = outputs()
    got = Objective(ObjectiveConfig(contrastive="sigmoid"))(out)["contrastive"]
    logits = 10.0 * F.normalize(out.pooled, dim=-1) @ F.normalize(out.text, dim=-1).T - 3.0
    signs = 2 * torch.eye(4) - 1
    torch.testing.assert_close(got, -F.logsigmoid(signs * logits).sum() / 4)


def test_a_weight_of_zero_leaves_the_part_out():
    config = ObjectiveConfig(caption_weight=0, latent_weight=0, pixel_weight=0)
    losses = Objective(config)(outputs(), latents=torch.randn(3, 16, 4, 4))
    assert set(losses) == {"contrastive", "rec", "und", "loss"}
    assert not config.needs_pixels and ObjectiveConfig().needs_pixels


def test_sum_reductions():
    a, b = torch.randn(2, 3, 4, 4, 4)
    torch.testing.assert_close(l1(a, b, "sum"), (a - b).abs().sum() / 3)
    out = outputs()
    got = Objective(ObjectiveConfig(caption_reduction="sum"))(out)["caption"]
    logits = (out.caption_hidden @ out.caption_weight.T).flatten(0, 1)
    torch.testing.assert_close(got, F.cross_entropy(logits, out.caption_labels.flatten(), reduction="sum") / 2)


def test_errors():
    with pytest.raises(ValueError, match="rec_weight must be 0 or more, got -1"):
        ObjectiveConfig(rec_weight=-1)
    with pytest.raises(ValueError, match="pixel_reduction must be 'mean' or 'sum', got 'max'"):
        ObjectiveConfig(pixel_reduction="max")
    with pytest.raises(ValueError, match="contrastive must be 'softmax' or 'sigmoid'"):
        ObjectiveConfig(contrastive="hinge")
    with pytest.raises(ValueError, match="lpips must be a module"):
        Objective(ObjectiveConfig(lpips_weight=0.5))
    with pytest.raises(ValueError, match="must have one shape"):
        l1(torch.zeros(2, 3), torch.zeros(3, 2))
