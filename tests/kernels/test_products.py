"""Plain products and their operands."""

import pytest
import torch

from ov3fast.kernels.lib.products import room_for_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_lies_between_rows_on_cpus(dtype):
    """With AMX, PyTorch's product of bfloat16 lets NaN from a strided operand's padding into its result."""
    room = room_for_rows(torch.empty(1), 3, 17, dtype)
    assert room.shape == (3, 17) and room.is_contiguous()
