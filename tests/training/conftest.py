import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


def beside(name: str) -> ModuleType:
    """The module of that name in this folder."""
    spec = importlib.util.spec_from_file_location(f"ov3fast_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tiny.py."""
    return beside("tiny")


@pytest.fixture(scope="session")
def many_ranks() -> ModuleType:
    """many_ranks.py."""
    return beside("many_ranks")


@pytest.fixture(scope="session")
def data(tiny, tmp_path_factory) -> Path:
    """Shards and a VAE; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Runs compared bit for bit must sum in the same order, in this process and in subprocesses."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
