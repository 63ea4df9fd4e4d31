"""Every operator has a sample, which the local backend computes within the error budget."""

import pytest
import torch
from kernel_tools.samples import ACROSS_CHUNKS, SAMPLES

from ov3fast import ops
from ov3fast.ops import _check, cuda, triton


def test_every_operator_has_a_sample():
    assert {sample.op for sample in SAMPLES} == set(ops.table())
    assert len({sample.name for sample in SAMPLES}) == len(SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_parity(sample, dtype):
    if triton.INTERPRETED and "triton" not in ops.table()[sample.op]:
        pytest.skip(f"{sample.op} has no Triton kernels")
    sample.assert_parity("tiny", dtype)


@pytest.mark.parametrize("sample", ACROSS_CHUNKS, ids=lambda sample: sample.name)
def test_parity_across_chunks(sample):
    """On a GPU at real sizes: tests/gpu."""
    sample.assert_parity("tiny", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", [s for s in SAMPLES if "cuda" in ops.table()[s.op]], ids=lambda sample: sample.name)
def test_samples_that_the_cuda_backend_refuses(sample, dtype, monkeypatch):
    """tests/gpu excludes exactly the unsupported samples."""
    monkeypatch.setattr(_check, "tensor", lambda *_, **__: None)  # it would reject float16 on the CPU
    with cuda.executed_by(lambda launch: None), ops.use("cuda"):
        inputs = sample.inputs("tiny", dtype)
        if sample.takes("cuda", dtype):
            sample.results(inputs)
        else:
            with pytest.raises(RuntimeError, match="'cuda' can't run this call"):
                sample.results(inputs)
