"""A tiny model, and a demo set of coloured squares: 6 concepts in one held-out style, 5 unseen ones in two styles, 4 photos."""

import gzip
import io
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SMALL_VAE, tiny_config, tiny_tokenizer

from ov3fast.data import write_shards
from ov3fast.data.demo import DemoSet
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE

COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40), "black": (20, 20, 20),
    "white": (250, 250, 250), "pink": (250, 120, 180), "orange": (240, 140, 20), "brown": (120, 70, 30), "grey": (128, 128, 128),
    "purple": (130, 40, 160),
}  # fmt: skip


@pytest.fixture(scope="session")
def model() -> OpenVision3:
    tokenizer = tiny_tokenizer(f"a picture of a {colour} square" for colour in COLOURS)
    config = tiny_config(tokenizer, vision={"depth": 1})
    torch.manual_seed(0)
    vae = FrozenVAE.from_config(SMALL_VAE)
    return OpenVision3(config, vae=vae, tokenizer=tokenizer).eval()


def square(colour: tuple[int, int, int], style: int, size=(48, 40)) -> bytes:
    """A square on transparency, the left half filled in style 0, all of it in style 1."""
    image = Image.new("RGBA", size)
    image.paste((*colour, 255), (4, 4, 24 if style == 0 else 44, 36))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def samples(names, styles, split: str):
    for style in styles:
        for name in names:
            text = {"name": f"{name} square", "caption": f"a picture of a {name} square"}
            record = {"captions": text, "meta": {"concept": name, "style": f"style{style}", "split": split}}
            yield f"{split}-{style}-{name}", {"png": square(COLOURS[name], style), "json": json.dumps(record).encode()}


def photos(count: int):
    rng = np.random.default_rng(0)
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).resize((60, 50)).save(buffer, "PNG")
        yield f"photo-{i}", {"png": buffer.getvalue(), "json": json.dumps({"meta": {"style": "photo"}}).encode()}


def write_idx(path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_fashion_mnist(folder, train: int = 60, test: int = 40) -> None:
    """Pictures in which the position of a bright row is the class, so that a linear probe can learn it."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8)[::-1] % 10
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), labels * 2 + 3] = 220
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)


@pytest.fixture(scope="session")
def fashion_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    write_fashion_mnist(folder)
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> DemoSet:
    root, names = tmp_path_factory.mktemp("demo"), list(COLOURS)
    write_shards(samples(names[:6], [1], "style"), root / "pairs-style")
    write_shards(samples(names[6:], [0, 1], "unseen"), root / "pairs-unseen", samples_per_shard=4)
    write_shards(photos(4), root / "photos-heldout")
    write_fashion_mnist(root / "fashion-mnist")
    parts = {name: {} for name in ("pairs-style", "pairs-unseen", "photos-heldout", "fashion-mnist")}
    return DemoSet(root, {"parts": parts, "left_out": {}})
