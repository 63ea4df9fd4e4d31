"""Every operator's Triton and CUDA kernels on a GPU, at sizes from training; `make test-gpu`.

With TRITON_INTERPRET=1, tests that need no GPU run in Triton's interpreter, at tiny sizes.
"""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kernel_tools.samples import ACROSS_CHUNKS, SAMPLES
from torch.utils._python_dispatch import TorchDispatchMode

from ov3fast import ops, testing
from ov3fast.kernels.lib import config as configs
from ov3fast.ops import triton
from ov3fast.ops.flash_attention import reference

GPU = torch.cuda.is_available() and not triton.INTERPRETED
if not GPU and not triton.INTERPRETED:
    pytest.skip("there is no GPU: the kernels' results on one were not looked at", allow_module_level=True)

DEVICE, SIZE = ("cuda", "real") if GPU else ("cpu", "tiny")
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if GPU else (torch.float32, torch.bfloat16)
BACKENDS = ("triton", "cuda") if GPU else ("triton",)
# Calls that a backend does not support are excluded here: as skips they would be indistinguishable from a missing backend.
CASES = [(b, sample, dtype) for b in BACKENDS for sample in SAMPLES for dtype in DTYPES if sample.takes(b, dtype)]
PAIRS = list(dict.fromkeys((sample, b) for b, sample, _ in CASES))

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@contextmanager
def chosen(backend, sample):
    state = ops.table()[sample.op][backend]
    if state != "ready":
        pytest.skip(f"{backend}: {state}")
    with ops.use(backend):
        yield sample


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[1]}-{pair[0].name}")
def sample(request):
    """Each sample, with the backend selected."""
    with chosen(request.param[1], request.param[0]) as sample:
        yield sample


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1].name}-{case[2]}")
def case(request):
    """Each sample and dtype, with the backend selected."""
    backend, sample, dtype = request.param
    with chosen(backend, sample):
        yield sample, dtype


def test_parity(case):
    sample, dtype = case
    sample.assert_parity(SIZE, dtype, DEVICE)


@needs_gpu
@pytest.mark.parametrize("sample", ACROSS_CHUNKS, ids=lambda sample: sample.name)
def test_parity_across_chunks(sample):
    with ops.use("triton"):
        sample.assert_parity("real", torch.bfloat16, "cuda")


@needs_gpu
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.op.startswith("flash_attention")], ids=lambda sample: sample.name)
@pytest.mark.parametrize("library", ["flash_attn", "flash_attn_3", "cudnn", "xformers", "sdpa"])
def test_attention_of_a_library(library, sample):
    """Libraries that automatic selection may use instead of the Triton kernels satisfy the same contract."""
    state = ops.table()[sample.op][library]
    if state != "ready":
        pytest.skip(f"{library}: {state}")
    try:
        with ops.use(library):
            sample.assert_parity(SIZE, torch.bfloat16, DEVICE)
    except RuntimeError as reason:
        if "can't run this call" not in str(reason):
            raise
        pytest.skip(str(reason))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("way", ["tma", "warp-specialized"])
def test_attention_through_descriptors(way, head_dim, causal, dtype):
    """Variants that `ov3fast tune` may enable: parity, determinism, and graph capture."""
    from ov3fast.kernels.attention.tiles import size_class
    from ov3fast.kernels.lib.common import TYPES

    if configs.current_architecture() not in configs.WITH_TMA:
        pytest.skip("this GPU has no tensor descriptors")
    name, size = "flash_attention_forward", size_class(head_dim)
    row = configs.pick(name, TYPES[dtype], f"{size} {way}", configs.current_architecture())
    qkv = testing.make(2, 1000, 3, 4, head_dim).to("cuda", dtype)
    scale = head_dim**-0.5
    with configs.trying({(name, TYPES[dtype], size): row}), ops.use("triton"):
        ours = [torch.ops.ov3fast.flash_attention_qkvpacked(qkv, causal, 0, scale, "") for _ in range(20)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.ops.ov3fast.flash_attention_qkvpacked(qkv, causal, 0, scale, "")
        graph.replay()
        torch.cuda.synchronize()
    exact = reference(*qkv.double().unbind(2), causal=causal)
    testing.assert_within_budget(ours[0][0], reference(*qkv.unbind(2), causal=causal), exact, "out")
    for results in (*ours[1:], captured):
        testing.assert_same_bits(results, ours[0])


def test_the_same_bits_every_time(case):
    sample, dtype = case
    inputs = sample.inputs(SIZE, dtype, DEVICE)
    upstream = sample.upstream(inputs)
    expected = sample.results(inputs, upstream=upstream)
    for _ in range(19 if GPU else 1):
        testing.assert_same_bits(sample.results(inputs, upstream=upstream), expected)


class Recorded(TorchDispatchMode):
    """Calls of our operators within the block: (operator, arguments, keyword arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ov3fast":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def fresh(value, differentiated):
    if isinstance(value, (list, tuple)):
        return [fresh(each, False) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().clone()
    return copy.requires_grad_(differentiated and copy.is_floating_point())


def test_opcheck(sample):
    with Recorded() as recorded:
        sample.results(sample.inputs("tiny", torch.float32, DEVICE))
    assert recorded.calls
    for function, args, kwargs in recorded.calls:
        differentiated = sample.call.differentiable and not function._schema.name.endswith("_backward")
        torch.library.opcheck(function, tuple(fresh(arg, differentiated) for arg in args), kwargs)


@needs_gpu
def test_compile_keeps_the_whole_graph(sample):
    """In the interpreter, tests/ops covers this."""
    inputs = sample.inputs("tiny", torch.float32, DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(sample.function, fullgraph=True, backend="inductor")
    for ours, eager in zip(sample.results(inputs, compiled), sample.results(inputs), strict=True):
        torch.testing.assert_close(ours, eager)


@needs_gpu
def test_graph_capture(sample):
    """A captured call, replayed with other values in the same memory, equals an eager call."""
    inputs = sample.inputs(SIZE, torch.bfloat16, DEVICE)
    upstream = sample.upstream(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            sample.results(inputs, upstream=upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample.results(inputs, upstream=upstream)
    for value in inputs:
        if value.is_floating_point() and value.ndim:
            value.copy_(value.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    testing.assert_same_bits(captured, sample.results(inputs, upstream=upstream))


@needs_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compute_sanitizer(backend, tool):
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tools.gpu.once", backend]
    # The caching allocator would hide out-of-bounds and uninitialised reads.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
