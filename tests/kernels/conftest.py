"""`target`: the chips whose compiled code is executed."""

import pytest
from kernel_tools import launches


@pytest.fixture(params=launches.TARGETS)
def target(request):
    return request.param
