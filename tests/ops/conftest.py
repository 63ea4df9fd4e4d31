"""Every operator's test runs on the plain reference and on the CPU kernels of each instruction set that this machine has.

With TRITON_INTERPRET=1 it runs on the Triton kernels instead, in Triton's interpreter, with fewer examples, since each takes long.
"""

import os
from contextlib import nullcontext

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from ov3fast import ops
from ov3fast.ops import cpu, triton

# The fixture below holds for a whole test, whatever number of examples it tries.
settings.register_profile("ops", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
EXAMPLES = int(os.environ.get("OV3FAST_INTERPRETER_EXAMPLES", 4))
settings.register_profile("interpreter", settings.get_profile("ops"), max_examples=EXAMPLES)
settings.load_profile("interpreter" if triton.INTERPRETED else "ops")

VARIANTS = ["triton"] if triton.INTERPRETED else ["reference", *cpu.available_isas()]


@pytest.fixture(autouse=True, params=VARIANTS)
def implementation(request):
    """'reference', 'triton', or the instruction set: their kernels are chosen wherever they take the call."""
    contexts = {"reference": lambda: ops.use("reference"), "triton": nullcontext}
    with contexts.get(request.param, lambda: cpu.use_isa(request.param))():
        yield request.param


def pytest_collection_modifyitems(items):
    """Fewer examples in the interpreter, also where a test asks for a number of its own."""
    for item in items if triton.INTERPRETED else ():
        if is_hypothesis_test(getattr(item, "obj", None)):
            asked = getattr(item.obj, "_hypothesis_internal_use_settings", settings())
            item.obj._hypothesis_internal_use_settings = settings(asked, max_examples=min(EXAMPLES, asked.max_examples))
