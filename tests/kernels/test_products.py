"""Plain products and their operands."""

import pytest
import torch

from ov3fast.kernels.lib.products import room_for_rows


@pytest.fixture
def uninitialised_is_nan():
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_lie_between_rows_on_cpus(dtype, uninitialised_is_nan):
    """With AMX, PyTorch's bfloat16 product propagates NaN from a strided operand's padding."""
    room = room_for_rows(torch.empty(1), 3, 17, dtype)
    assert room.shape == (3, 17) and room.stride() == (32, 1)
    assert (room._base[:, 17:] == 0).all()
