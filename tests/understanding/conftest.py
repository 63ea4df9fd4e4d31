"""An untrained tower with four tokens, pictures, and conversations about them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import get_tokenizer
from ov3fast.recipes.understand import SmallLanguageModel, UnderstandRecipe, UnderstandStage

COLOURS = {"red": (220, 30, 30), "blue": (30, 40, 220)}


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory):
    tokenizer = get_tokenizer("wordpiece").restrict(["a red apple"])
    config = OpenVision3Config(
        vision=VisionConfig(width=24, depth=2, heads=2, mlp_dim=32, image_size=32, embed_dim=16),
        decoder=DecoderConfig(width=24, depth=1, heads=2, mlp_dim=32),
        text=TextConfig(width=16, depth=1, heads=2, mlp_dim=32, context_length=8),
        caption=CaptionConfig(width=16, depth=1, heads=2, mlp_dim=32, length=8),
        vae="small",
    ).for_tokenizer(tokenizer)
    folder = tmp_path_factory.mktemp("tower") / "model"
    torch.manual_seed(0)
    OpenVision3(config, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of images, with conversations about them in two.json."""
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for i in range(12):
        colour = ("red", "blue")[i % 2]
        Image.fromarray(np.full((24 + i, 32, 3), COLOURS[colour], np.uint8)).save(folder / f"{i}.png")
        lines = [("human", "<image>\nwhich colour?"), ("gpt", colour), ("human", "is it green?"), ("gpt", "no")]
        turns = [{"from": who, "value": text} for who, text in lines[: 4 if i % 3 == 0 else 2]]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    records.append({"id": "text", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]})
    (folder / "two.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def recipe(tower_folder, pictures, tmp_path_factory) -> UnderstandRecipe:
    """Two stages of three steps each, the second packed."""
    data = {"data": str(pictures / "two.json"), "images": str(pictures), "batch_size": 5, "steps": 3, "max_length": 64}
    stages = (
        UnderstandStage(name="align", template="plain", **data),
        UnderstandStage(name="instruct", trains="both", packed=True, **data),
    )
    return UnderstandRecipe(
        tower=str(tower_folder), small=SmallLanguageModel(width=16, depth=1, heads=2, mlp_dim=24), template="short", stages=stages,
        precision="fp32", checkpoint_every=2, log_every=1, run_dir=tmp_path_factory.mktemp("runs") / "run",
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(recipe):
    """A finished run of the recipe."""
    pytest.importorskip("transformers")
    from ov3fast.understanding.training import train_understanding

    assert train_understanding(recipe)
    return recipe.run_dir
