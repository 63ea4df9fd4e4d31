"""Everything between an operator's call and the compiler, on a pretended GPU (tools/gpu/pretend.py)."""

import pytest
import torch
import triton
from kernel_tools.samples import with_backend

from ov3fast import ops
from ov3fast.kernels.lib import config as configs
from tools.gpu import precompile, pretend
from tools.gpu.rows import Rows

pytestmark = pytest.mark.skipif(ops.triton.INTERPRETED, reason="the interpreter launches nothing")


@pytest.fixture(scope="module")
def record():
    """All samples in all dtypes, at tiny sizes."""
    with pretend.gpu("sm_90") as record, ops.use("triton"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for sample in with_backend("triton", dtype):
                sample.results(sample.inputs("tiny", dtype))
    return record


def test_every_launch_is_on_its_tensors_device(record):
    """The tensors are on GPU 1 while GPU 0 is the current one."""
    assert len({launch.kernel for launch in record.launches}) > 30
    assert {(launch.kernel, launch.device) for launch in record.launches if launch.device != pretend.DEVICE} == set()


def test_rows_are_those_of_each_gpu(monkeypatch):
    capabilities = {0: (8, 0), 1: (9, 0)}
    with pretend.gpu():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[device])
        for device, architecture in ((0, "sm_80"), (1, "sm_90"), (0, "sm_80")):
            with torch.cuda.device(device):
                assert configs.current_architecture() == architecture


def test_what_is_compiled_ahead_is_what_a_launch_looks_for(tmp_path, monkeypatch):
    """A later launch finds all of it in the cache."""
    [sample] = [s for s in with_backend("triton") if s.name == "layer_norm-residual"]
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

    def run(**options):
        with pretend.gpu("sm_90", **options) as record, ops.use("triton"):
            sample.results(sample.inputs("tiny", torch.bfloat16))
        return record

    rows = precompile.compile_all(run().specialisations, tmp_path, processes=2)
    assert rows and precompile.failures(rows) == []
    before = {path.name for path in tmp_path.iterdir()}
    run(compiles=True)
    assert before and {path.name for path in tmp_path.iterdir()} == before


def test_a_kernel_that_does_not_compile_is_named(record, tmp_path):
    data, kernel = next(iter(record.specialisations.items()))
    rows = precompile.compile_all({data.replace('"num_warps": ', '"num_warps": 3'): kernel}, tmp_path, processes=1)
    assert [failure.split(":")[0] for failure in precompile.failures(rows)] == [kernel.__name__]


def test_kernels_compile_as_launched(record, tmp_path):
    """One launched kernel per file; `tools/gpu_run.py` compiles all."""
    one = {kernel.module: (data, kernel) for data, kernel in record.specialisations.items() if "bf16" in data}
    rows = precompile.compile_all(dict(one.values()), tmp_path, processes=2)
    assert len(rows) > 8 and precompile.failures(rows) == []


def test_launchers_of_a_whole_encoder(tmp_path):
    """Its parameters are initialised and cast on fake tensors too."""
    rows = Rows(tmp_path / "rows.jsonl")
    record = precompile.collect("time", "ViT-B/2", "sm_90", rows, ["real"])
    assert rows.read() == [] and {"_layer_norm_forward", "_mlp_backward"} <= {launch.kernel for launch in record.launches}


def test_operators_without_triton_kernels_are_left_alone(tmp_path):
    """Other kernels would read from the addresses of fake tensors."""
    rows = Rows(tmp_path / "rows.jsonl")
    assert precompile.collect("time", "adamw_ema_", "sm_90", rows, ["real"]).launches == [] and rows.read() == []
