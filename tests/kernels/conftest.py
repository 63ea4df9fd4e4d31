"""`target`: the chips whose compiled code is executed. Tests of compiled code are in the full suite, except for one kernel."""

import pytest
from kernel_tools import launches

from ov3fast import ops

QUICK = "test_layer_norm_compiled.py"


@pytest.fixture(autouse=True)
def by_name():
    """In the interpreter the kernels are asked for by name: an automatic choice leaves some calls to PyTorch."""
    if ops.triton.INTERPRETED:
        with ops.use("triton"):
            yield
    else:
        yield


@pytest.fixture(params=launches.TARGETS)
def target(request):
    return request.param


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.endswith("_compiled.py") and item.path.name != QUICK:
            item.add_marker(pytest.mark.full)
