"""The first code block of each interop page, of serve.md and of bulk.md runs unchanged, beside a run and the folder of `ov3fast data demo`."""

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from ov3fast.data.assets import ASSETS
from ov3fast.data.demo import build_demo

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("interop/*.md"), DOCS / "serve.md", DOCS / "bulk.md"])
DOORS = ("transformers", "diffusers", "rae", "llava", "open_clip", "timm", "sentence-transformers", "optimize", "export")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What `ov3fast data demo` leaves in OV3FAST_CACHE, from small packages."""
    spec = util.spec_from_file_location("small_packages", ROOT / "tests" / "data" / "packages.py")
    packages = util.module_from_spec(spec)
    spec.loader.exec_module(packages)
    folder, cache = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("cache")
    built = {name: packages.build(name, folder) for name in ASSETS}
    assert build_demo(cache, progress=False, fetch=lambda name, _: built[name]).photos_heldout
    return cache


def test_every_door_has_a_page():
    assert {page.stem for page in DOCS.glob("interop/*.md")} == set(DOORS)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.full) if page.stem == "export" else page for page in PAGES],
    ids=lambda page: page.stem,
)
def test_the_first_example_runs(page, model_folder, cache, tmp_path):
    language, code = re.search(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL).groups()
    assert language == "python" and "build_demo()" in code
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(model_folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OV3FAST_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
