"""Makes tests/kernel_tools and tests/tiny_models importable by these names without putting tests/ on sys.path, where its folders would
shadow packages."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


class _Helpers(MetaPathFinder):
    """Finds tests/kernel_tools and tests/tiny_models."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in ("kernel_tools", "tiny_models"):
            return None
        folder = Path(__file__).parent / name
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


sys.meta_path.append(_Helpers)

# Shells start background jobs with SIGINT ignored, but tests of Ctrl-C send it to themselves and their subprocesses.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiled kernels are tested without the interpreter.
collect_ignore_glob = ["kernels/*_compiled.py", "kernels/test_cuda_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []


def pytest_addoption(parser):
    parser.addoption(
        "--implementations",
        metavar="NAME,...",
        help="run the operators' tests on these alone: eager, or instruction sets such as portable (tests/ops)",
    )


@pytest.fixture(scope="session")
def reuse_objects() -> Callable[[Path], None]:
    """reuse_objects(copy): a copy of this tree, made with the files' times, gets the objects compiled here, so that its build compiles only
    what differs: all of it takes minutes."""

    def copy_objects(copy: Path) -> None:
        for name in ("native", "cuda"):
            if (Path(__file__).parents[1] / "build" / name).is_dir():
                shutil.copytree(Path(__file__).parents[1] / "build" / name, copy / "build" / name)

    return copy_objects


@pytest.fixture
def build() -> ModuleType:
    """csrc/build.py, which is no package's: a module of its own for each test, to patch."""
    spec = spec_from_file_location("ov3fast_csrc_build", Path(__file__).parents[1] / "csrc" / "build.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(kilobytes) -> the folder of a file system of that size; calling it again resizes it. Skips if none can be
    mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        options = f"{'remount,' if folder.is_mount() else ''}size={kilobytes}k"
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no program mount")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)
