"""The tiny run of tests/training."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TINY = Path(__file__).parents[1] / "training" / "tiny.py"


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ov3fast_tests_tiny", TINY)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data(tiny, tmp_path_factory) -> Path:
    """Shards and a VAE; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_data(folder)
    return folder
