import dataclasses

import numpy as np
import pytest
import torch

from ov3fast.data.store import SampleStore
from ov3fast.models.vae import FrozenVAE
from ov3fast.training import build, latents, train
from ov3fast.training.distributed import Ranks
from ov3fast.training.logs import read_rows

CPU = torch.device("cpu")


def pixels(index, variant):
    values = torch.from_numpy(10.0 * index + variant).float()
    return values[:, None, None, None].expand(-1, 3, 2, 2)


def encode(images):
    return torch.stack([images[:, 0], -images[:, 0]], 1)


def test_every_usable_sample_and_variant():
    usable = np.array([0, 2, 3, *range(5, 90)])
    cache = latents.fill(usable, 90, 3, pixels, encode, torch.float32, Ranks(0, 1, CPU))
    assert cache.values.shape == (90, 3, 2, 2, 2)
    index, variant = torch.tensor([3, 89, 3]), torch.tensor([2, 0, 0])
    assert torch.equal(cache(index, variant), encode(pixels(index.numpy(), variant.numpy())))
    assert not cache.values[[1, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_share_the_work_and_add_up(dtype):
    usable = np.arange(100)
    whole = latents.fill(usable, 100, 2, pixels, encode, dtype, Ranks(0, 1, CPU)).values
    parts = [latents.fill(usable, 100, 2, pixels, encode, dtype, Ranks(rank, 3, CPU)).values for rank in range(3)]
    assert all((part == 0).any() for part in parts)
    total = sum(part.view(torch.uint8) for part in parts).view(dtype)
    assert torch.equal(total, whole)


def test_kept_under_its_key(tmp_path):
    cache = latents.LatentCache(torch.randn(3, 2, 4, 2, 2))
    path = tmp_path / "sub" / "32.safetensors"
    latents.save(cache, path, "a")
    assert torch.equal(latents.load(path, "a").values, cache.values)
    assert latents.load(path, "b") is None and latents.load(tmp_path / "none", "a") is None
    assert [p.name for p in path.parent.iterdir()] == ["32.safetensors"]


def test_a_cache_that_can_not_be_read_is_made_again(tmp_path):
    latents.save(latents.LatentCache(torch.ones(3)), tmp_path / "x.safetensors", "key")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:20])
    assert latents.load(tmp_path / "x.safetensors", "key") is None


def test_the_key_names_the_decode(tiny, data, tmp_path, monkeypatch):
    recipe = tiny.recipe(data, tmp_path)
    store, vae = SampleStore(recipe.data), FrozenVAE.from_pretrained(recipe.model.vae)
    before = build.latents_key(recipe, recipe.stages[0], store, vae)
    assert before == build.latents_key(recipe, recipe.stages[0], store, vae)
    monkeypatch.setattr(build, "DECODE_VERSION", build.DECODE_VERSION + 1)
    assert build.latents_key(recipe, recipe.stages[0], store, vae) != before


def test_a_cached_run_is_the_run_that_encodes_as_it_goes(tiny, data, tmp_path):
    """The same samples, crops and noise; only the encoder's batch size differs, and hence the rounding of its sums."""
    cached = tiny.recipe(data, tmp_path / "cached", stages=((3, 32),))
    online = dataclasses.replace(cached, cache_latents=False, run_dir=tmp_path / "online")
    hashes = {train(recipe)["order_hash"] for recipe in (cached, online)}
    assert len(hashes) == 1
    a, b = (read_rows(recipe.run_dir / "log.jsonl") for recipe in (cached, online))
    for row, other in zip(a, b, strict=True):
        for name in ("latent", "pixel", "caption", "contrastive"):
            assert row[name] == pytest.approx(other[name], abs=2e-5), name
