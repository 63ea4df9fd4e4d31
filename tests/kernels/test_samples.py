"""The samples that the tests of kernels call: every operator has one, and the backend that runs here gives their results within the budget."""

import pytest
import torch
from kernel_tools.samples import SAMPLES

from ov3fast import ops
from ov3fast.ops import triton


def test_every_operator_has_a_sample():
    assert {sample.op for sample in SAMPLES} == set(ops.table())
    assert len({sample.name for sample in SAMPLES}) == len(SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_parity(sample, dtype):
    if triton.INTERPRETED and "triton" not in ops.table()[sample.op]:
        pytest.skip(f"{sample.op} has no Triton kernels")
    sample.assert_parity("tiny", dtype)
