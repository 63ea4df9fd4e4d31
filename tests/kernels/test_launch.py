"""Our own launcher (kernels/lib/launch.py): what is passed to the driver, and which calls share compiled code."""

import ctypes
import threading

import ptxrun.arguments
import ptxrun.launch
import pytest
import torch
import triton
import triton.language as tl
from kernel_tools.host_time import Plain, events

from ov3fast import ops
from ov3fast.kernels.lib import cuda_driver
from ov3fast.kernels.lib import launch as launches
from tools.gpu import pretend

pytestmark = pytest.mark.skipif(ops.triton.INTERPRETED, reason="the interpreter launches nothing")


@launches.kernel
def scaled(x, other, y, count, step, factor, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * step, mask=i < count, other=0).to(tl.float32) * factor
    if other is not None:
        value += tl.load(other + i, mask=i < count, other=0).to(tl.float32)
    if KIND:
        value += 1.0
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < count)


class Driver:
    """Records the arguments of cuLaunchKernel."""

    def __init__(self):
        self.launches, self.error = [], 0

    def __call__(self, function, *numbers_and_rest):
        *sizes, stream, parameters, extra = numbers_and_rest
        assert parameters is None and extra[0] == 1 and extra[2] == 2 and not extra[4]
        size = ctypes.c_size_t.from_address(extra[3]).value
        self.launches.append((function.value, tuple(sizes), stream.value, ctypes.string_at(extra[1], size)))
        return self.error


@pytest.fixture
def driver():
    driver = Driver()
    with pretend.host(launch=driver) as driver.functions:
        yield driver


def call(x=None, other=None, y=None, count=40, step=2, factor=0.5, KIND=0, BLOCK=64, warps=4):  # noqa: N803
    x = torch.zeros(80) if x is None else x
    y = torch.zeros(40, dtype=x.dtype) if y is None else y
    return scaled[(3, 2)](x, other, y, count, step, factor, KIND=KIND, BLOCK=BLOCK, num_warps=warps)


def test_the_driver_gets_what_the_compiled_code_reads(driver):
    """Compared with the parameters that the PTX declares, in ptxrun's layout."""
    x, other, y = torch.zeros(80), torch.zeros(40), torch.zeros(40)
    for _ in range(2):
        compiled = call(x, other, y, count=40, factor=0.25)
    [(function, sizes, stream, record)] = driver.launches
    kernel, translated, block = ptxrun.launch.prepare(compiled.asm["ptx"], None, None)
    values = [("x", x), ("other", other), ("y", y), ("count", 40), ("step", 2), ("factor", 0.25)]
    pointers = {name: value.data_ptr() for name, value in values[:3]}
    expected = ptxrun.arguments.encode(kernel.params, translated.param_offsets, translated.param_bytes, values, pointers)
    assert record == expected
    assert function == 1 and driver.functions == ["scaled"] and not stream
    assert sizes == (3, 2, 1, 128, 1, 1, compiled.metadata.shared)


OTHERS = {
    "dtype": lambda: dict(x=torch.zeros(80, dtype=torch.bfloat16)),
    "address": lambda: dict(x=torch.zeros(81)[1:]),
    "a result's address": lambda: dict(y=torch.zeros(41)[1:]),
    "not None": lambda: dict(other=torch.zeros(40)),
    "integer 1": lambda: dict(step=1),
    "multiple of 16": lambda: dict(count=48),
    "64 bits": lambda: dict(count=2**40),
    "constexpr": lambda: dict(KIND=1),
    "block": lambda: dict(BLOCK=128),
    "warps": lambda: dict(warps=8),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_would_be_other_code_is_another_key(what, driver):
    for _ in range(2):
        call()
    assert driver.functions == ["scaled"] and [function for function, *_ in driver.launches] == [1]
    for _ in range(2):
        call(**OTHERS[what]())
    assert driver.functions == ["scaled"] * 2 and [function for function, *_ in driver.launches] == [1, 2]
    call()
    assert [function for function, *_ in driver.launches] == [1, 2, 1]


def test_floats_and_addresses_need_no_other_code(driver):
    for factor in (0.5, 1.0, 2):
        call(x=torch.zeros(80), factor=float(factor))
    assert driver.functions == ["scaled"] and len(driver.launches) == 2
    call(factor=2)  # an integer is of another type
    assert driver.functions == ["scaled"] * 2


def test_integers_of_one_kind_share_the_code(driver):
    for count in (40, 41, 42, 41, 42):
        call(count=count)
    assert driver.functions == ["scaled"] and len(driver.launches) == 2


def test_a_parameter_is_a_tensor(driver):
    for _ in range(2):
        call(x=torch.nn.Parameter(torch.zeros(80)))
    assert len(driver.launches) == 1


def test_an_empty_grid_launches_nothing(driver):
    for _ in range(3):
        scaled[(0,)](torch.zeros(8), None, torch.zeros(8), 0, 1, 0.5, KIND=0, BLOCK=64)
    assert driver.launches == []


def test_hooks_make_triton_launch(driver):
    """Profilers and tools/gpu rely on Triton's launch hooks."""
    for _ in range(2):
        call()
    hook = launches._entered
    hook.add(print)
    try:
        call()
    finally:
        hook.remove(print)
    assert len(driver.launches) == 1
    call()
    assert len(driver.launches) == 2


def test_what_the_key_does_not_know_is_left_to_triton(driver):
    for _ in range(3):
        call(KIND=tl.constexpr(0))
    types = tuple(map(type, (torch.zeros(1), tl.float32)))
    assert launches._call_of(types) is None and launches._call_of((int, float)) is None
    assert launches._call_of((torch.Tensor, float, int, type(None), str, bool)) is not None


def test_scratch_memory_and_clusters_are_left_to_triton(driver):
    compiled = call()
    of = launches._call_of(tuple(map(type, (torch.zeros(1), None, torch.zeros(1), 1, 1, 0.5))))
    assert launches._launch_of(compiled, of) is not None
    for name in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl"):
        metadata = compiled.metadata
        compiled.metadata = metadata._replace(**{name: 1})
        assert launches._launch_of(compiled, of) is None
        compiled.metadata = metadata
    compiled.packed_metadata = (4, 2, 0)
    assert launches._launch_of(compiled, of) is None
    compiled.packed_metadata = (4, 1, 0)
    compiled.asm["ptx"] = compiled.asm["ptx"].replace(".param .f32", ".param .f64")
    assert launches._launch_of(compiled, of) is None, "the record would not be what the code reads"


def test_a_refusal_is_in_the_driver_s_words(driver, monkeypatch):
    def words(error, found):
        found._obj.value = b"an illegal memory access was encountered"

    monkeypatch.setattr(cuda_driver.library(), "cuGetErrorString", words, raising=False)
    call()
    driver.error = 700
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernel: an illegal memory access was encountered \(700\)$"):
        call()


def test_each_thread_has_its_own_record_and_a_context(driver, monkeypatch):
    """The driver reads the record while other threads run."""
    ensured = []
    monkeypatch.setattr(cuda_driver, "ensure_context", lambda device: ensured.append((threading.get_ident(), device)))
    for _ in range(3):
        call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(driver.launches) == 3 and len(ensured) == 2 and len({ident for ident, _ in ensured}) == 2


def test_a_thread_without_a_context_gets_the_device_s(monkeypatch):
    made = []

    class Library:
        current = 0

        def cuCtxGetCurrent(self, found):  # noqa: N802
            found._obj.value = self.current
            return 0

        def cuDeviceGet(self, found, device):  # noqa: N802
            found._obj.value = 5 + device.value
            return 0

        def cuDevicePrimaryCtxRetain(self, found, handle):  # noqa: N802
            found._obj.value = 100 + handle.value
            return 0

        def cuCtxSetCurrent(self, context):  # noqa: N802
            made.append(context.value)
            return 0

    library = Library()
    monkeypatch.setattr(cuda_driver, "library", lambda: library)
    cuda_driver.context.cache_clear()
    cuda_driver.ensure_context(1)
    library.current = 77
    cuda_driver.ensure_context(1)
    cuda_driver.context.cache_clear()
    assert made == [106]


def test_the_environment_leaves_launches_to_triton(driver, monkeypatch):
    monkeypatch.setattr(launches, "OURS", False)
    for _ in range(3):
        call()
    assert driver.launches == [] and driver.functions == ["scaled"]


def test_every_kernel_that_a_launcher_calls_is_ours():
    """`kernel[grid](...)` of a plain `triton.jit` function would use Triton's slower launcher."""
    import ast
    import importlib
    from pathlib import Path

    from ov3fast import kernels

    root = Path(kernels.__path__[0])
    called = []
    for path in root.rglob("*.py"):
        if "aot" in path.parts:
            continue
        module = ".".join(["ov3fast.kernels", *path.relative_to(root).with_suffix("").parts])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
                value = getattr(importlib.import_module(module.removesuffix(".__init__")), node.value.id, None)
                if isinstance(value, triton.JITFunction):
                    called.append(value)
                    assert isinstance(value, launches.Kernel), f"{module}: @kernel, not @triton.jit, for {node.value.id}"
    assert len(called) > 30


# ---- host time -------------------------------------------------------------------------------------------------------


def calls():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(8, 8), torch.randn(8)
    return {
        "layer_norm": (ops.layer_norm, (x, bias + 1, bias)),
        "linear": (ops.linear, (x, weight, bias)),
        "flash_attention": (ops.flash_attention, tuple(torch.randn(1, 2, 1, 8) for _ in range(3))),
        "mlp": (ops.mlp, (x, weight, bias, weight + 1, bias + 1)),
    }


# Forward; forward and backward minus PyTorch's own share.
MOST_CALLS = {"layer_norm": (26, 54), "linear": (19, 41), "flash_attention": (28, 59), "mlp": (26, 66)}


@pytest.mark.parametrize("op", MOST_CALLS)
def test_calls_within_a_call(op):
    """Host time, measured in function calls; `python -m benches.host --backend triton` gives microseconds."""
    function, values = calls()[op]
    leaves = [value.clone().requires_grad_() for value in values]
    upstream = torch.ones_like(values[0])
    with pretend.host(), ops.use("triton"):
        forward = events(lambda: function(*values))
        both = events(lambda: torch.autograd.grad(function(*leaves), leaves, upstream))
        both -= events(lambda: torch.autograd.grad(Plain.apply(leaves[0]), leaves[:1], upstream))
    assert forward <= MOST_CALLS[op][0] and both <= MOST_CALLS[op][1], (forward, both)
