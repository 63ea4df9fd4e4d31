"""Loading a tower takes the memory of one copy: it is built without storage and filled tensor by tensor."""

import os
import subprocess
import sys

import pytest
import torch

from ov3fast.models.config import OpenVision3Config, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vision_tower import save_vision_encoder
from ov3fast.models.vit import ViTEncoder

PEAK = """
import resource, sys
import ov3fast, torch
from ov3fast.inference import load_model
from ov3fast.models.pretrained import read_tensors
path, dtype, weights = sys.argv[1:]
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
torch.zeros(10) @ torch.zeros(10)
read_tensors  # imported before the count
before = peak()
model = load_model(path, dtype=dtype, vae="small")
loaded = peak() - before
size = sum(p.numel() * p.element_size() for p in model.encoder.parameters())
assert next(model.parameters()).dtype == getattr(torch, dtype)
print(loaded, size)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tower of 170 M parameters."""
    config = VisionConfig(width=1024, depth=13, heads=16, mlp_dim=4096, image_size=64, embed_dim=64)
    path = tmp_path_factory.mktemp("tower") / "tower"
    from ov3fast.models import pretrained

    with pretrained.without_values():
        encoder = ViTEncoder(config)
    encoder.load_state_dict({key: torch.full(value.shape, 0.01) for key, value in encoder.state_dict().items()}, assign=True)
    save_vision_encoder(encoder, path)
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.full
def test_a_tower_loads_at_one_copys_memory(folder, dtype):
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), dtype, ""], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, size = map(int, done.stdout.split())
    largest = 4096 * 1024 * 4
    assert size > 300e6 and loaded < 1.1 * size + 2 * largest + 60e6, f"{loaded / size:.2f} copies"


def test_models_built_without_values_take_no_memory():
    from ov3fast.models import pretrained

    with pretrained.without_values():
        model = OpenVision3(OpenVision3Config())
    assert all(value.is_meta for value in model.state_dict().values())
