"""Small shards: picture i has the colour (i, 2 i, 3 i) and the key "0000i"."""

import io
import json

import pytest
from PIL import Image

from ov3fast.data import write_shards


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(i: int, size=(24, 16), concepts: int | None = None) -> tuple[str, dict[str, bytes]]:
    record = {
        "captions": {"name": f"name {i}", "caption": f"caption {i}"},
        "meta": {"concept": f"c{i % concepts if concepts else i}", "style": f"s{i // concepts if concepts else 0}"},
    }
    colour = (i % 256, 2 * i % 256, 3 * i % 256)
    return f"{i:05d}", {"png": encode(Image.new("RGB", size, colour)), "json": json.dumps(record).encode()}


@pytest.fixture
def make_shards(tmp_path):
    """make_shards(20, per_shard=8, replace={3: {...files}}) -> folder of shards."""

    def make(count: int, per_shard: int = 8, name: str = "shards", replace: dict | None = None, **options):
        samples = [sample(i, **options) for i in range(count)]
        for i, files in (replace or {}).items():
            samples[i] = (samples[i][0], files)
        write_shards(samples, tmp_path / name, samples_per_shard=per_shard)
        return tmp_path / name

    return make


@pytest.fixture
def files():
    """files(i) -> the files of sample i, for tests to modify."""
    return lambda i, **options: dict(sample(i, **options)[1])


@pytest.fixture
def png():
    return encode
