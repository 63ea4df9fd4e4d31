"""Load a vision tower in the released layout (open_clip_config.json and weights).

python examples/load_released_tower.py path/to/tower      # or a hub id
python examples/load_released_tower.py                    # random weights in the same layout, generated on the fly
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ov3fast import load_vision_encoder
from ov3fast.models.config import VisionConfig
from ov3fast.models.vision_tower import to_released_state_dict
from ov3fast.models.vit import ViTEncoder


def random_tower(folder: Path) -> Path:
    """Writes a small tower with the file names and keys of the released ones."""
    tower = ViTEncoder(VisionConfig(width=48, depth=2, heads=3, mlp_dim=192, image_size=64, embed_dim=40))
    save_file(to_released_state_dict(tower), folder / "open_clip_model.safetensors")
    vision = {
        "image_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "layers": 2,
        "width": 48,
        "head_width": 16,
        "pool_type": "avg",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 40, "vision_cfg": vision}}))
    return folder


def main(path: str | None = None) -> tuple[torch.Size, torch.Size]:
    with tempfile.TemporaryDirectory() as folder:
        tower = load_vision_encoder(path or random_tower(Path(folder)))
    side = tower.config.grid * tower.config.patch_size
    latents = torch.randn(2, tower.config.in_channels, side, side)  # the VAE's posterior mean x scaling factor
    with torch.inference_mode():
        pooled, tokens = tower.encode_latents(latents)
    print(f"latents {tuple(latents.shape)} -> pooled {tuple(pooled.shape)}, tokens {tuple(tokens.shape)}")
    return pooled.shape, tokens.shape


if __name__ == "__main__":
    main(*sys.argv[1:])
