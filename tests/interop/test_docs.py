"""The first code block of each interop page, of serve.md and of bulk.md runs unchanged, in a folder with a run and a photo."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted([*DOCS.glob("interop/*.md"), *(page for page in (DOCS / "serve.md", DOCS / "bulk.md") if page.exists())])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_first_example_runs(page, model_folder, photo, tmp_path):
    language, code = re.search(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL).groups()
    assert language == "python"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(model_folder)
    photo.save(tmp_path / "photo.jpg")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
