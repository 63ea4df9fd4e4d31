"""`target`: the chips whose compiled code is executed. Compiled code is left to the full suite, but for one kernel's, which shows that it runs."""

import pytest
from kernel_tools import launches

QUICK = "test_layer_norm_compiled.py"


@pytest.fixture(params=launches.TARGETS)
def target(request):
    return request.param


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.endswith("_compiled.py") and item.path.name != QUICK:
            item.add_marker(pytest.mark.full)
