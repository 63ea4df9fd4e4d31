"""Makes tests/kernel_tools importable by that name, without tests/ on the path, where folders would pass for packages."""

import importlib.util
import os
import signal
import sys
from pathlib import Path


def _load(name: str) -> None:
    folder = Path(__file__).parent / name
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if "kernel_tools" not in sys.modules:
    _load("kernel_tools")

# A shell starts what runs in the background with Ctrl-C ignored, and tests of Ctrl-C send it to themselves and to processes of theirs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiled kernels are tried without the interpreter.
collect_ignore_glob = ["kernels/*_compiled.py", "kernels/test_cuda_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []


def pytest_addoption(parser):
    parser.addoption(
        "--implementations",
        metavar="NAME,...",
        help="run the operators' tests on these alone: eager, or instruction sets such as portable (tests/ops)",
    )
