"""Generates or checks benches/results/certificates.json, the certificates of a demo-size model's exports.

    python tools/certificates.py            # make certificates
    python tools/certificates.py --check    # exits with 1 if a format fails, or its parts, inputs or outputs differ from the file

The model has random weights with a fixed seed, the small VAE, and the demo recipe's sizes. A check skips formats whose packages are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ov3fast import OpenVision3
from ov3fast.interop._certificate import FILE
from ov3fast.io import atomic_write
from ov3fast.models.tokenizer import get_tokenizer
from ov3fast.models.vae import FrozenVAE
from ov3fast.recipes import get_recipe

RESULTS = Path(__file__).resolve().parent.parent / "benches" / "results" / "certificates.json"
NEEDS = {"torch": (), "onnx": ("onnxscript", "onnxruntime"), "openvino": ("openvino",)}
WORDS = ["a red square", "a photo of a dog on the grass", "two blue boats"]


def demo_model() -> OpenVision3:
    """The demo recipe's model, with a fixed seed."""
    tokenizer = get_tokenizer("wordpiece").restrict(WORDS)
    config = get_recipe("demo").model
    torch.manual_seed(0)
    return OpenVision3(config.for_tokenizer(tokenizer), FrozenVAE.from_pretrained("small"), tokenizer).eval()


def certificates(formats: Iterable[str]) -> dict[str, Any]:
    """Format -> certificate, for the formats whose packages are installed."""
    found = {}
    for format in formats:
        missing = [name for name in NEEDS[format] if importlib.util.find_spec(name) is None]
        if missing:
            print(f"{format}: skipped, {', '.join(missing)} not installed", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = {"aotinductor": True} if format == "torch" else {}
            import_module(f"ov3fast.interop.{format}").export(demo_model(), Path(folder) / "out", **options)
            found[format] = json.loads((Path(folder) / "out" / FILE).read_text(encoding="utf-8"))
        for file, part in found[format]["parts"].items():
            print(f"{format}: {file}: {', '.join(f'{name} {error:.1e}' for name, error in part['max_error'].items())}")
    return found


def differences(committed: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Differences between the committed and a newly made certificate. Errors need no comparison: an export over the budget fails."""
    found = []
    for format, values in made.items():
        before, after = (
            {file: (part["inputs"], part["outputs"], len(part["cases"])) for file, part in side["parts"].items()}
            for side in (committed.get(format, {"parts": {}}), values)
        )
        found += [f"{format}: {file}" for file in sorted({*before, *after}) if before.get(file) != after.get(file)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--formats", default=",".join(NEEDS), help="comma-separated; the others are kept unchanged")
    given = parser.parse_args()
    check = given.check
    committed = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    made = certificates(given.formats.split(","))
    if check:
        changed = differences(committed, made)
        print("\n".join(f"differs from {RESULTS.name}: {line}" for line in changed) or f"as in {RESULTS.name}")
        return 1 if changed else 0
    # Another run may have added to it meanwhile.
    committed = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with atomic_write(RESULTS) as file:
        file.write_text(json.dumps({**committed, **made}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
