"""Tests one combination of supported versions: python tools/versions.py TORCH TRITON NUMPY [--folder build/versions]

Creates a separate environment with them and the test tools of constraints.txt, and runs there: the imports, the private names of
torch and Triton that we rely on, part of the operators' tests in Triton's interpreter, every kernel compiled for NVIDIA's chips and checked (a quarter of
an hour on two cores), and for sm_90 part of what ptxrun executes, and the launchers on a pretended GPU. `make test-versions` does this for the oldest and
the newest versions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pytest", "hypothesis", "rich", "tyro")
IMPORTS = "import ov3fast, ov3fast.ops, ov3fast.testing, ov3fast.kernels.attention.forward, torch, triton; print(torch.__version__, triton.__version__)"
INTERPRETED = ("tests/ops/test_layer_norm.py", "tests/ops/test_mlp.py", "tests/ops/test_flash_attention.py")
SHARED = "triton and not (opcheck or compile or errors or gradcheck or import)"
NAMES = ("tests/test_private_names.py",)
COMPILED = (
    "tests/kernels/test_pretended_gpu.py",
    "tests/kernels/test_fences.py",
    "tests/kernels/test_mlp_compiled.py",
)
GATED = "(pretended and not encoder) or fences or (sm_90 and whole and (test_forward and large or test_backward and small))"


def prepare(folder: Path, torch: str, triton: str, numpy: str) -> Path:
    """The environment's Python. Reuses a complete environment with the same packages."""
    home = folder / f"torch-{torch}-triton-{triton}-numpy-{numpy}"
    python, finished = home / "bin" / "python", home / "finished"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tools = [f"{name}=={pins[name]}" for name in TOOLS]
    packages = [f"torch=={torch}", f"triton=={triton}", f"numpy=={numpy}", *tools]
    if not finished.exists() or finished.read_text().split() != packages:
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        finished.write_text("\n".join(packages))
    return python


def try_out(python: Path) -> bool:
    """Whether everything passed. A failure does not stop the rest."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pytest = [python, "-m", "pytest", "--disable-warnings", "-p", "no:cacheprovider"]
    commands = [
        ({}, [python, "-c", IMPORTS]),
        ({}, [*pytest, *NAMES]),
        ({"TRITON_INTERPRET": "1"}, [*pytest, *INTERPRETED, "-k", SHARED]),
        ({}, [*pytest, *COMPILED, "-k", GATED]),
        ({}, [python, "-m", "ov3fast.kernels.aot", "--target", "sm_80", "sm_90", "sm_100", "--brief"]),
    ]
    return all([subprocess.run(command, cwd=ROOT, env={**environment, **more}).returncode == 0 for more, command in commands])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch")
    parser.add_argument("triton")
    parser.add_argument("numpy", help="Triton 3.6's interpreter fails with 2.4 and later")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions")
    options = parser.parse_args()
    passed = try_out(prepare(options.folder, options.torch, options.triton, options.numpy))
    print(f"torch {options.torch}, Triton {options.triton}, numpy {options.numpy}: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
