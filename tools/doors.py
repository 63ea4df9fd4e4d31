"""Tests ov3fast.interop against the real libraries: python tools/doors.py [--folder build/doors]

timm and open_clip need torchvision, which needs an exact torch version, so they get a separate environment. It runs all of tests/interop, including
the tests that are otherwise skipped without timm or open_clip, and the tests of `optimize` on their models. `make test-doors` runs this; it downloads
gigabytes the first time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("torch==2.14.1", "torchvision==0.29.1")
LIBRARIES = ("timm==1.0.31", "open_clip_torch==3.3.0")
PINNED = (
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "scikit-image",
    "tyro",
    "rich",
    "webdataset",
    "wids",
    "pyarrow",
    "fastapi",
    "uvicorn",
    "python-multipart",
    "prometheus_client",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "pytest",
    "hypothesis",
)
"""Pinned as in constraints.txt: what the tests of interop and the examples of its pages import."""
TESTS = ("tests/interop", "tests/inference/test_optimize.py")


def prepare(home: Path) -> Path:
    """The environment's Python. Reuses a complete environment with the same packages."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    packages = [*TORCH, *LIBRARIES, *(f"{name}=={pins[name]}" for name in PINNED)]
    python, finished = home / "bin" / "python", home / "finished"
    if not finished.exists() or finished.read_text() != "\n".join(packages):
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        finished.write_text("\n".join(packages))
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "doors")
    given = parser.parse_args()
    python = prepare(given.folder.resolve())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    # If a library were missing, the tests that matter would be skipped.
    needed = "import timm, open_clip, torchvision, diffusers, transformers"
    for command in ([python, "-c", needed], [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *TESTS]):
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
