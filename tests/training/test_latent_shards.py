"""The cache of `ov3fast data encode`: a run that reads it equals one that encodes online."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from ov3fast.cli import main
from ov3fast.data import latent_shards
from ov3fast.data.latent_shards import LatentShards, in_full_batches, plain, write_latents
from ov3fast.data.loader import Loader
from ov3fast.data.skips import DataError
from ov3fast.data.store import SampleStore
from ov3fast.training import build, checkpoint, train

VAE = {"vae": "0" * 64, "vae_dtype": "fp32", "vae_batch": 3, "latent_convention": "openvision3", "shape": [2, 4, 4]}


def average(images):
    """Stands in for a VAE with stride 8: [B, 3, 32, 32] -> [B, 2, 4, 4]."""
    assert len(images) == VAE["vae_batch"]
    pooled = torch.nn.functional.avg_pool2d(images, 8)
    return torch.stack([pooled[:, 0], pooled[:, 1:].sum(1)], 1)


@pytest.fixture
def online(tiny, data, tmp_path):
    recipe = tiny.recipe(data, tmp_path / "online", stages=((3, 32), (2, 48)), cache_latents=False, vae_batch=4)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache_images=False))


def cached(recipe, folder, **changes):
    data = dataclasses.replace(recipe.data, latents=str(folder))
    return dataclasses.replace(recipe, data=data, run_dir=recipe.run_dir.with_name("cached"), **changes)


def encode(recipe, folder, *flags):
    path = recipe.run_dir.with_suffix(".json")
    path.write_text(json.dumps(recipe.to_dict()))
    return main(["data", "encode", "--recipe", str(path), "--out", str(folder), "--device", "cpu", *flags])


def same_end(one, other):
    a, b = (checkpoint.latest(recipe.run_dir / "checkpoints") for recipe in (one, other))
    for group, tensors in a.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, b.tensors[group][name]), (group, name)


@pytest.mark.parametrize("posterior", ["mean", pytest.param("sample", marks=pytest.mark.full)])
def test_the_cached_run_has_the_bits_of_the_online_run(online, tmp_path, posterior):
    online = dataclasses.replace(online, model=dataclasses.replace(online.model, posterior=posterior))
    assert encode(online, tmp_path / "latents") == 0
    kept = cached(online, tmp_path / "latents")
    hashes = {train(recipe)["order_hash"] for recipe in (online, kept)}
    assert len(hashes) == 1
    same_end(online, kept)


def test_a_latent_only_stage_decodes_no_image(online, tmp_path, monkeypatch):
    objective = dataclasses.replace(online.objective, pixel_weight=0.0)
    online = dataclasses.replace(online, objective=objective, stages=online.stages[:1])
    encode(online, tmp_path / "latents")
    train(online)
    monkeypatch.setattr("ov3fast.data.shards.decode_image", lambda *_: pytest.fail("an image was decoded"))
    monkeypatch.setattr("ov3fast.models.vae.FrozenVAE.moments", lambda *_: pytest.fail("the VAE ran"))
    kept = cached(online, tmp_path / "latents")
    train(kept)
    same_end(online, kept)


def of_data(**changes):
    return lambda recipe: dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **changes))


def of_model(**changes):
    return lambda recipe: dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **changes))


def of_run(**changes):
    return lambda recipe: dataclasses.replace(recipe, **changes)


def size(pixels):
    return lambda recipe: dataclasses.replace(recipe, stages=(dataclasses.replace(recipe.stages[0], image_size=pixels),))


@pytest.fixture(scope="module")
def encoded(tiny, data, tmp_path_factory):
    """A recipe, and the folder of its latents."""
    folder = tmp_path_factory.mktemp("encoded")
    recipe = tiny.recipe(data, folder / "run", stages=((1, 32),), cache_latents=False, vae_batch=4)
    encode(recipe, folder / "latents")
    return cached(recipe, folder / "latents")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_run(vae_dtype="bf16"), "encoded with vae "),
        (of_run(vae_batch=2), "vae_batch 4, the run has 2"),
        (of_data(min_area=0.5), "min_area 0.4, the run has 0.5"),
        (of_data(crop="center"), "crop 'inception', the run has 'center'"),
        (of_data(seed=1), "seed 0, the run has 1"),
        (of_data(variants=3), "holds 2 variants .* data.variants is 3"),
        (
            lambda recipe: of_data(sources=recipe.data.sources[:1])(recipe),
            r"sources of \[48, 16\] samples, the run's have \[48\]",
        ),
        (
            lambda recipe: of_data(sources=recipe.data.sources[::-1])(recipe),
            r"sources of \[48, 16\] samples, the run's have \[16, 48\]",
        ),
        (of_model(latent_convention="flux"), "latent_convention 'openvision3', the run has 'flux'"),
        (size(64), "holds 32 px, but 64 px are needed"),
    ],
)
def test_what_differs_is_refused_by_name(encoded, change, words):
    recipe = change(encoded)
    vae, pixels = build.build_vae(recipe.model.vae, None, recipe.vae_dtype), recipe.stages[0].image_size
    given = build.vae_facts(vae, pixels, recipe.model.latent_convention, recipe.vae_batch)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        wanted = latent_shards.facts(recipe.data, SampleStore(recipe.data), pixels, **given)
        LatentShards(recipe.data.latents, pixels).check(wanted)


def test_a_run_without_vae_batch_may_read_it(encoded):
    vae = build.build_vae(encoded.model.vae, None, "fp32")
    wanted = latent_shards.facts(encoded.data, SampleStore(encoded.data), 32, **build.vae_facts(vae, 32, "openvision3", None))
    LatentShards(encoded.data.latents, 32).check(wanted)


def test_another_vae_is_refused_by_name(encoded, data, tmp_path):
    from ov3fast.models.vae import FrozenVAE

    vae = FrozenVAE.from_pretrained(data / "vae")
    with torch.no_grad():
        next(vae.vae.parameters()).view(-1)[0] += 1
    vae.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="encoded with vae '"):
        train(dataclasses.replace(encoded, vae=str(tmp_path / "vae"), run_dir=tmp_path / "run"))


def test_it_goes_on_where_it_stopped_and_processes_share_the_parts(online, tmp_path):
    calls = []

    def counted(images):
        calls.append(len(images))
        return average(images)

    def write(folder, encode=counted, **options):
        return write_latents(online.data, tmp_path / folder, 32, encode, VAE, part=10, **options)

    assert write("whole") == 64
    assert len(list((tmp_path / "whole" / "32").glob("*.safetensors"))) == 7
    whole = len(calls)

    def dying(images):
        if len(calls) == whole + 20:
            raise KeyboardInterrupt
        return counted(images)

    with pytest.raises(KeyboardInterrupt):
        write("parts", dying)
    there = len(list((tmp_path / "parts" / "32").glob("*.safetensors")))
    assert 0 < there < 7
    assert sum(write("parts", process=process, processes=2) for process in range(2)) == 64 - 10 * there
    assert write("parts") == 0
    for path in (tmp_path / "whole" / "32").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / "32" / path.name).read_bytes()


def test_what_it_holds(online, tmp_path):
    write_latents(online.data, tmp_path, 32, average, VAE, part=10)
    kept = LatentShards(tmp_path, 32)
    store = SampleStore(plain(online.data))
    loader = Loader(store, image_size=32, batch_size=2)
    index, variant = np.array([63, 4, 11]), np.array([1, 0, 1])
    keys = [store.sample(i, decode=False)[1].key for i in index.tolist()]
    assert torch.equal(kept(index, variant, keys), average(loader.pixels(index, variant)))
    import hashlib

    source = store.source_of(63)
    assert kept.image_hash(63) == hashlib.sha256(source.dataset.image_bytes(63 - source.offset)[1]).digest()
    with pytest.raises(DataError, match="sample 63 is 'other' in the shards"):
        kept(index, variant, ["other", *keys[1:]])


def test_broken_images_are_skipped_as_without_the_cache(online, data, tmp_path, tiny):
    from ov3fast.data.shards import write_shards

    samples = [
        (f"{i:02d}", {"png": tiny.picture(i % 6, i % 4, 0) if i % 5 else b"no image", "txt": b"a text"}) for i in range(20)
    ]
    write_shards(samples, tmp_path / "shards")
    source = dataclasses.replace(online.data.sources[1], path=str(tmp_path / "shards"))
    config = dataclasses.replace(online.data, sources=(source,), skip_budget=1.0)
    write_latents(config, tmp_path, 32, average, VAE, part=7)
    loader = Loader(config, image_size=32, batch_size=8)
    with pytest.warns(match="broken_image"):
        expected = [(batch.keys, batch.skips, average_all(batch.images)) for batch in loader.batches(stop=6)]
    loader = Loader(config, image_size=32, batch_size=8)
    loader.latents = LatentShards(tmp_path, 32)
    with pytest.warns(match="broken_image"):
        got = [(batch.keys, batch.skips, batch.moments) for batch in loader.batches(stop=6, pixels=False)]
    for (keys, skips, moments), (other_keys, other_skips, others) in zip(expected, got, strict=True):
        assert keys == other_keys and torch.equal(moments, others)
        assert [skip.index for skip in skips] == [skip.index for skip in other_skips]


def average_all(images):
    return in_full_batches(average, images, VAE["vae_batch"])


def test_incomplete_and_damaged_caches_are_named(online, tmp_path):
    write_latents(online.data, tmp_path, 32, average, VAE, part=10)
    path = tmp_path / "32" / "0000000010.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match="1 of 7 parts of .* are missing"):
        LatentShards(tmp_path, 32)
    path.write_bytes(content[:50])
    with pytest.raises(DataError, match="0000000010.safetensors can't be read"):
        LatentShards(tmp_path, 32).skip(12)
    with pytest.raises(ValueError, match="holds a cache with vae_batch 3, this one has 4; name another folder"):
        write_latents(online.data, tmp_path, 32, average, {**VAE, "vae_batch": 4})


def test_workers_read_it_too(online, tmp_path):
    write_latents(online.data, tmp_path, 32, average, VAE)
    loader = Loader(dataclasses.replace(online.data, workers=1), image_size=32, batch_size=24)
    loader.latents = LatentShards(tmp_path, 32)
    loader.latents.skip(0)  # opened here, and again in the worker
    (made,) = loader.batches(stop=1, pixels=False)
    assert torch.equal(made.moments, loader.batch(0, pixels=False).moments)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["shards"], "--vae is needed"),
        (["--vae", "small"], "give the shards"),
        (["shards", "--vae", "small", "--process", "2/2"], "--process takes K/N"),
        (["{shards}", "--vae", "small", "--image-size", "36"], "multiple of the VAE's stride of 8"),
        (["{shards}", "--vae", "small", "--vae-batch", "0"], "--vae-batch must be at least 1"),
    ],
)
def test_flags_are_checked(data, tmp_path, capsys, flags, words):
    flags = [flag.format(shards=data / "photos") for flag in flags]
    assert main(["data", "encode", *flags, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"variants": None}, {"cache_latents": True}, {"vae_batch": 0}])
def test_recipes_that_can_not_be(online, changes):
    with pytest.raises(ValueError, match="vae_batch must be" if "vae_batch" in changes else "data.latents needs data.variants"):
        kept = cached(online, "latents")
        if "variants" in changes:
            kept = dataclasses.replace(kept, data=dataclasses.replace(kept.data, variants=None))
        dataclasses.replace(kept, **({} if "variants" in changes else changes))
