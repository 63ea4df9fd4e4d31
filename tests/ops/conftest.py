"""Every operator's test runs on the plain reference and on the CPU kernels of each instruction set that this machine has."""


import pytest
from hypothesis import HealthCheck, settings

from ov3fast import ops
from ov3fast.ops import cpu

# The fixture below holds for a whole test, whatever number of examples it tries.
settings.register_profile("ops", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("ops")

VARIANTS = ["reference", *cpu.available_isas()]


@pytest.fixture(autouse=True, params=VARIANTS)
def implementation(request):
    """'reference', or the instruction set whose kernels are chosen wherever they take the call."""
    with ops.use("reference") if request.param == "reference" else cpu.use_isa(request.param):
        yield request.param
