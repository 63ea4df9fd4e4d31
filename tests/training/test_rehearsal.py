"""tools/rehearse_pretraining.py: `train --recipe base` on img2dataset's tars with joined recaptions, under torchrun with FSDP2, killed, resumed on
another number of processes, exported and loaded."""

import importlib.util
from pathlib import Path

import pytest

from ov3fast.data import SampleStore
from ov3fast.data.assets import ASSETS
from ov3fast.data.demo import build_demo
from ov3fast.recipes import read_recipe
from ov3fast.training.logs import read_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.full


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(tmp_path) -> Path:
    """Pairs of a demo set built from small fake packages: no network."""
    packages = load(ROOT / "tests" / "data" / "packages.py")
    (tmp_path / "packages").mkdir()
    files = {name: packages.build(name, tmp_path / "packages") for name in ASSETS}
    return build_demo(tmp_path / "cache", progress=False, fetch=lambda name, cache: files[name], held_out=4).pairs_train


def test_both_stages_of_base(demo, tmp_path):
    rehearsal = load(ROOT / "tools" / "rehearse_pretraining.py")
    out = tmp_path / "out"
    summary = rehearsal.rehearse(out, demo, samples=72)
    assert summary["step"] == sum(rehearsal.STEPS) and not summary["interrupted"]
    rows = read_rows(out / "run" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 8)) and [row["stage"] for row in rows] == ["pretrain"] * 3 + [
        "finetune"
    ] * 4
    assert all("lpips" in row for row in rows[3:]) and all(row["caption"] > 0 and row["contrastive"] > 0 for row in rows)
    recipe = read_recipe(out / "run" / "recipe.json")
    assert (recipe.name, recipe.parallel, recipe.activation_checkpointing, recipe.data.decode) == (
        "base",
        "fsdp",
        True,
        "fast",
    )
    sample = SampleStore(recipe.data).sample(0, decode=False)[1]
    assert sample.captions["re_caption"].startswith("The picture shows") and sample.meta["status"] == "success"
