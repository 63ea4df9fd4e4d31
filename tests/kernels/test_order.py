"""Results are bitwise independent of the order of programs, since none reads or writes what another writes; in Triton's interpreter."""

import pytest
import torch
from kernel_tools.order import ORDERS, program_order
from kernel_tools.samples import SAMPLES

from ov3fast import ops, testing
from ov3fast.ops import triton

pytestmark = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")


def require_kernels(op):
    if "triton" not in ops.table()[op]:
        pytest.skip(f"{op} has no Triton kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_any_order_gives_the_same_bits(sample, dtype):
    require_kernels(sample.op)
    inputs = sample.inputs("tiny", dtype)
    with program_order("forward") as launches:
        expected = sample.results(inputs)
    assert launches.several, f"no launch had more than one program: {launches.grids}"
    for order in ORDERS[1:]:
        with program_order(order):
            testing.assert_same_bits(sample.results(inputs), expected)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_nothing_is_read_before_it_is_written(sample):
    """Fills all memory that launchers allocate with NaN."""
    require_kernels(sample.op)
    inputs = sample.inputs("tiny", torch.float32)
    expected = sample.results(inputs)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        got = sample.results(inputs)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    testing.assert_same_bits(got, expected)


# ---- the tool itself -------------------------------------------------------------------------------------------------


def launch(kernel, *arguments):
    kernel[(2, 3, 4)](*arguments)


def test_programs_run_in_the_order_asked_for():
    import triton as triton_package
    import triton.language as tl

    @triton_package.jit
    def numbered(turn, places):
        """places[n] = index of the program that ran n-th."""
        place = (tl.program_id(0) * 3 + tl.program_id(1)) * 4 + tl.program_id(2)
        now = tl.load(turn)
        tl.store(places + now, place)
        tl.store(turn, now + 1)

    seen = {}
    for order in ORDERS:
        turn, places = torch.zeros(1, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
        with program_order(order) as launches:
            launch(numbered, turn, places)
        assert launches.grids == [(2, 3, 4)] and launches.several == 1
        seen[order] = places.tolist()
    assert seen["forward"] == list(range(24)) and seen["reversed"] == seen["forward"][::-1]
    assert sorted(seen["shuffled"]) == seen["forward"] and seen["shuffled"] not in (seen["forward"], seen["reversed"])
    turn, places = torch.zeros(1, dtype=torch.int32), torch.zeros(24, dtype=torch.int32)
    launch(numbered, turn, places)
    assert places.tolist() == seen["forward"]
    with pytest.raises(ValueError, match="order must be one of"), program_order("backwards"):
        pass


def test_a_race_shows():
    import triton as triton_package
    import triton.language as tl

    @triton_package.jit
    def last_one_wins(out):
        tl.store(out, tl.program_id(0))

    found = set()
    for order in ORDERS:
        out = torch.zeros(1, dtype=torch.int32)
        with program_order(order):
            last_one_wins[(5,)](out)
        found.add(int(out))
    assert len(found) > 1
