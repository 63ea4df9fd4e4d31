import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tiny.py beside this file."""
    spec = importlib.util.spec_from_file_location("ov3fast_tests_tiny", Path(__file__).with_name("tiny.py"))
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


@pytest.fixture(autouse=True)
def one_thread():
    """Runs that are compared bit for bit must sum in one order, in this process and in those that tests start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
