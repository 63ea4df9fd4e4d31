"""data.decode = "fast": JPEGs are decoded smaller where the crop allows it; near the full decode, and the same bits in any batch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.data import DataConfig, Loader, SourceConfig, jpeg, transforms
from ov3fast.data.images import decode_image
from ov3fast.data.latent_shards import LatentShards, facts, write_latents
from ov3fast.data.shards import write_shards
from ov3fast.data.store import SampleStore

VAE = {"vae": "0" * 64, "vae_dtype": "fp32", "vae_batch": 2, "latent_convention": "openvision3", "shape": [3, 32, 32]}


@pytest.fixture
def config(tmp_path):
    """config(decode="fast", ...) of 12 photo-like JPEGs; the fifth is on its side."""
    samples = []
    for i in range(12):
        coarse = np.random.default_rng(i).integers(0, 256, (20, 26, 3), dtype=np.uint8)
        exif = Image.Exif()
        if i == 4:
            exif[274] = 6
        file = io.BytesIO()
        Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92, exif=exif)
        samples.append((f"{i:03d}", {"jpg": file.getvalue(), "txt": b"text"}))
    write_shards(samples, tmp_path / "shards")
    source = SourceConfig(str(tmp_path / "shards"), captions=(("txt", 1.0),))
    return lambda **options: DataConfig(sources=(source,), **{"decode": "fast", **options})


def batches(config, stop=4, **options):
    return torch.stack([batch.images for batch in Loader(config, image_size=32, batch_size=12, **options).batches(stop=stop)])


def test_it_is_near_the_full_decode_and_smaller(config, monkeypatch):
    """Near the same boxes of the whole pictures, resized by the exact filter."""
    sizes, crop = [], transforms.crop_resize

    def exact(image, box, size, interpolation, gap):
        if isinstance(image, jpeg.Reduced):
            sizes.append(image.reduction)
            box = [image.reduction * round(side / image.reduction) for side in box]
            image = decode_image(bytes_of[image.pixels.tobytes()])
            box = [min(side, limit) for side, limit in zip(box, 2 * image.size, strict=True)]
        return crop(image, box, size, interpolation)

    bytes_of, real = {}, jpeg.pixels

    def noting(data, size=(0, 0)):
        found = real(data, size)
        bytes_of[found.tobytes()] = data
        return found

    monkeypatch.setattr(jpeg, "pixels", noting)
    fast = batches(config())
    monkeypatch.setattr(transforms, "crop_resize", exact)
    noise = (fast - batches(config())).square().mean((2, 3, 4))
    assert set(sizes) == {2, 4} and len(sizes) == 44  # the turned one is decoded whole
    assert float((10 * torch.log10(4 / noise)).min()) > 32


def test_neither_threads_nor_workers_nor_ranks_change_a_bit(config):
    expected = batches(config())
    for options in ({"threads": 2}, {"workers": 1}):
        assert torch.equal(batches(config(**options)), expected)
    ranks = [batches(config(), rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat(ranks, 1), expected)


def test_a_sample_twice_in_a_batch_has_the_bits_of_each_alone(config):
    loader = Loader(config(variants=3), image_size=32, batch_size=36)
    batch = loader.batch(0)
    assert sorted(set(batch.variant.tolist())) == [0, 1, 2]
    for row in range(36):
        alone = loader.pixels(batch.index[row : row + 1], batch.variant[row : row + 1])
        assert torch.equal(alone[0], batch.images[row])


def test_the_latent_cache_sees_the_pixels_of_the_run(config, tmp_path):
    data = config(variants=3)
    store = SampleStore(data)
    write_latents(data, tmp_path / "latents", 32, lambda images: images, VAE)
    kept = LatentShards(tmp_path / "latents", 32)
    index, variant = torch.arange(12).repeat(3), torch.arange(3).repeat_interleave(12)
    keys = [f"{i:03d}" for i in index.tolist()]
    pixels = Loader(store, image_size=32, batch_size=12).pixels(index, variant)
    assert torch.equal(kept(index.numpy(), variant.numpy(), keys), pixels)
    kept.check(facts(data, store, 32, **VAE))
    with pytest.raises(ValueError, match="with decode 'fast', the run has None"):
        kept.check(facts(config(variants=3, decode="full"), store, 32, **VAE))


def test_how_much_smaller():
    assert [transforms.reduction((0, 0, side, 300), 32) for side in (20, 63, 64, 127, 128, 256, 9999)] == [1, 1, 2, 2, 4, 8, 8]


def test_what_does_not_go_together(config):
    with pytest.raises(ValueError, match='decode: "fast" decodes for one crop, but cache_images keeps full images'):
        config(cache_images=True)
    with pytest.raises(ValueError, match="decode: got 'half'; it takes 'full' or 'fast'"):
        config(decode="half")
    with pytest.raises(ValueError, match='"fast" takes sources with one view'):
        DataConfig(sources=(SourceConfig("x", views=2),), decode="fast")
