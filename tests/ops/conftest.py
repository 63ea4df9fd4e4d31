"""Every operator's test runs on eager PyTorch and on the CPU kernels of each instruction set that this machine supports.

Instruction sets other than the widest are tested only in the full suite. Tests marked `backend_independent`, and those in float64, which no kernel
supports, run once, with the automatic choice. With TRITON_INTERPRET=1 the others run on the Triton kernels in Triton's
interpreter, with fewer examples since each is slow; these are in the full suite too.
"""

import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import HealthCheck, is_hypothesis_test, settings

from ov3fast import ops
from ov3fast.ops import _choice, _dispatch, cpu, triton

# The fixture below applies to an entire test, whatever number of examples it tries.
settings.register_profile("ops", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
EXAMPLES = int(os.environ.get("OV3FAST_INTERPRETER_EXAMPLES", 4))
settings.register_profile("interpreter", settings.get_profile("ops"), max_examples=EXAMPLES)
settings.load_profile("interpreter" if triton.INTERPRETED else "ops")

VARIANTS = ["triton"] if triton.INTERPRETED else ["reference", *cpu.available_isas()]


@pytest.fixture(autouse=True, params=VARIANTS)
def implementation(request):
    """'reference', 'triton' or an instruction set, whose kernels are used wherever they support the call."""
    contexts = {"reference": lambda: ops.use("reference"), "triton": nullcontext}
    with contexts.get(request.param, lambda: our_kernels(request.param))():
        yield request.param


@contextmanager
def our_kernels(isa):
    """Selects the kernels of an instruction set even where PyTorch's products are faster and would be chosen (tests/test_choice.py)."""
    with pytest.MonkeyPatch.context() as patch, cpu.use_isa(isa):
        patch.setattr(_choice, "backend_for", lambda *_: _choice.OURS)
        _dispatch.forget_choices()
        yield
    _dispatch.forget_choices()


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    only = config.getoption("--implementations")
    once, quick = VARIANTS[-1], () if triton.INTERPRETED else {VARIANTS[0], VARIANTS[-1]}
    dropped = []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        variant = params.get("implementation")
        if variant is None:
            continue
        if torch.float64 in params.values():
            item.add_marker(pytest.mark.backend_independent)
        again = item.get_closest_marker("backend_independent") and (triton.INTERPRETED or variant != once)
        if again or (only and variant not in only.split(",")):
            dropped.append(item)
        elif variant not in quick:
            item.add_marker(pytest.mark.full)
        if triton.INTERPRETED:
            fewer_examples(item)
    config.hook.pytest_deselected(items=dropped)
    gone = set(dropped)
    items[:] = [item for item in items if item not in gone]


def fewer_examples(item):
    """Also for tests that set their own number of examples."""
    if is_hypothesis_test(getattr(item, "obj", None)):
        asked = getattr(item.obj, "_hypothesis_internal_use_settings", settings())
        item.obj._hypothesis_internal_use_settings = settings(asked, max_examples=min(EXAMPLES, asked.max_examples))


@pytest.fixture
def large_calls(monkeypatch):
    """To the Triton kernels, every call's products are cuBLAS's, and no pairs are few."""
    from ov3fast.kernels.lib import gemm

    monkeypatch.setattr(gemm, "is_small", lambda *_: False)
    monkeypatch.setattr(triton, "is_few", lambda *_: False)
