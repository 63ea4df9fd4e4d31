"""Plans (kernels/lib/plan.py) do the same as the launcher for the calls that they apply to, and pass other calls to it."""

import ctypes
import re
import struct
import threading

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from ov3fast import _plans, ops, testing
from ov3fast.kernels import linear_cross_entropy
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib import launch as launches
from ov3fast.kernels.lib import plan as plans
from ov3fast.ops import _calls
from tools.gpu import pretend

pytestmark = pytest.mark.skipif(ops.triton.INTERPRETED, reason="the interpreter launches nothing")


class Driver:
    """Records the arguments of cuLaunchKernel."""

    def __init__(self):
        self.launches = []

    def __call__(self, function, *numbers_and_rest):
        *sizes, _, _, extra = numbers_and_rest
        size = ctypes.c_size_t.from_address(extra[3]).value
        self.launches.append((function.value, tuple(sizes), ctypes.string_at(extra[1], size)))
        return 0


@pytest.fixture
def driver():
    driver = Driver()
    with pretend.host(launch=driver):
        yield driver


class Kept(TorchDispatchMode):
    """Every tensor created within the block, in order."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made += _plans.tensors_in(result)
        return result


def described(record, places):
    """The words of the argument record, with addresses as (index of the memory, offset)."""
    words, i = [], 0
    while i < len(record):
        if i + 8 <= len(record):
            [address] = struct.unpack_from("Q", record, i)
            place = next(
                ((n, address - first) for n, (first, size) in enumerate(places) if first <= address < first + size), None
            )
            if place is not None:
                words.append(place)
                i += 8
                continue
        words.append(record[i : i + 4])
        i += 4
    return words


def noted(driver, function, args):
    """The driver calls and the result of a call, without addresses and values, and the sizes of the memory that there is."""
    driver.launches.clear()
    with Kept() as kept:
        result = function(*args)
    memory = {}
    for tensor in (*_plans.tensors_in(args), *kept.made):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            memory.setdefault(storage.data_ptr(), storage.nbytes())
    launched = [(function, sizes, described(record, memory.items())) for function, sizes, record in driver.launches]
    return launched, [(t.shape, t.stride(), t.dtype) for t in _plans.tensors_in(result)], list(memory.values())


def assert_same(found, expected):
    """The same launches and results, wherever the memory lies: a plan allocates small work space together."""
    assert found[1] == expected[1] and len(found[0]) == len(expected[0])
    lies = {}
    for (function, sizes, words), (wanted_function, wanted_sizes, wanted) in zip(found[0], expected[0], strict=True):
        assert (function, sizes, len(words)) == (wanted_function, wanted_sizes, len(wanted))
        for word, other in zip(words, wanted, strict=True):
            if not isinstance(other, tuple):
                assert word == other
                continue
            place = word[0], word[1] - other[1]
            assert lies.setdefault(other[0], place) == place
    for memory, size in enumerate(found[2]):
        pieces = sorted((first, expected[2][piece]) for piece, (where, first) in lies.items() if where == memory)
        ends = [first + length for first, length in pieces]
        assert all(first >= end for (first, _), end in zip(pieces, [0, *ends], strict=False)) and all(
            end <= size for end in ends
        )


def draw(*shape, scale=1.0):
    return testing.make(*shape, scale=scale)


def small(call, dtype):
    bound = _calls.Bound(call, call.make(draw, call.least, dtype), data=True)
    return bound(call.function), bound.leaves


def calls():
    return [c for c in _calls.every() if "triton" in ops.table()[c.op] and c.op != "random_normal"]


def every_call():
    """Compiling all of them takes a while; one launch of each kind is enough for the quick tests."""
    for call in calls():
        for dtype in (torch.float32, torch.bfloat16):
            quick = call.name in ("layer_norm", "mlp-gelu") and dtype == torch.float32
            yield pytest.param(call, dtype, id=f"{call.name}-{dtype}", marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize(("call", "dtype"), list(every_call()))
def test_a_plan_does_what_the_launcher_does(call, dtype, driver, monkeypatch):
    """The same launches in the same order with the same arguments, and the same results except for their values."""
    compared = []

    class Compared(plans.Planned):
        def __call__(self, *args):
            self.launcher(*args)
            expected = noted(driver, self.launcher, args)
            for _ in range(2):
                super().__call__(*args)
            result = super().__call__(*args)
            found = noted(driver, super().__call__, args)
            assert_same(found, expected)
            compared.append(hasattr(self.run, "source"))
            return result

    monkeypatch.setattr(plans, "Planned", Compared)
    function, leaves = small(call, dtype)
    with ops.use("triton"):
        outputs = function(*leaves)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
        if outputs and leaves:
            # Not 1, for which linear_cross_entropy's backward has nothing to do.
            torch.autograd.grad(outputs, leaves, [torch.full_like(o, 2) for o in outputs], allow_unused=True)
    # The check of labels reads a value back on a CPU.
    assert compared and all(compared[1:] if call.op.startswith("linear_cross_entropy") else compared)


def test_both_gradients_of_a_loss_are_scaled_in_one_launch(driver):
    scaled, args = plans.Planned(linear_cross_entropy.scale), (torch.ones(()), torch.ones(4, 8), torch.ones(16, 8))
    for _ in range(3):
        scaled(*args)
    assert hasattr(scaled.run, "source") and len(noted(driver, scaled, args)[0]) == 1


# ---- which calls are a plan's


@launches.kernel
def added(x, other, y, count, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0) + tl.load(other + i, mask=i < count, other=0) * factor
    tl.store(y + i, value, mask=i < count)


class Launcher:
    """A launch, a product, and a view of what the launch wrote."""

    def __init__(self, more=lambda x: None):
        self.calls, self.more = 0, more

    def __call__(self, x, other, factor):
        self.calls += 1
        self.more(x)
        y = x.new_empty(x.numel())
        added[(2,)](x, other, y, x.numel(), factor, BLOCK=64)
        return y.view(x.shape), torch.mm(x.t(), other)


@pytest.fixture
def launcher():
    return Launcher()


@pytest.fixture
def planned(launcher, driver):
    """After the two calls that the plan is made from."""
    function = plans.planned(launcher)
    for _ in range(2):
        function(torch.zeros(8, 4), torch.zeros(8, 4), 0.5)
    assert launcher.calls == 2 and driver.launches
    driver.launches.clear()
    return function


def pair(offset=0):
    return [torch.randn(33)[offset : 32 + offset].view(8, 4) for _ in range(2)]


def test_a_plan_serves_other_addresses_and_values(planned, launcher, driver):
    for _ in range(3):
        x, other = pair()
        y, product = planned(x, other, 0.5)
        assert torch.equal(product, x.t() @ other) and y.shape == x.shape
        pointers = struct.unpack_from("3Q", driver.launches[-1][2])
        assert pointers == (x.data_ptr(), other.data_ptr(), y.data_ptr())
    assert launcher.calls == 2 and len(driver.launches) == 3


def test_one_tensor_passed_twice_stands_for_two(launcher, driver):
    planned = plans.planned(launcher)
    same = torch.zeros(8, 4)
    for _ in range(2):
        planned(same, same, 0.5)
    x, other = pair()
    planned(x, other, 0.5)
    assert launcher.calls == 2 and struct.unpack_from("2Q", driver.launches[-1][2]) == (x.data_ptr(), other.data_ptr())


def test_views_of_arguments_begin_where_these_do(launcher, driver):
    """An argument's storage offset is not part of its kind."""
    planned = plans.planned(lambda x, other, factor: launcher(x, other, factor)[1] + x[1:3, :].t() @ other[1:3, :])
    room = torch.randn(2, 64)
    for start in (0, 0, 0, 16, 32):
        x, other = (part[start : start + 32].view(8, 4) for part in room)
        assert torch.equal(planned(x, other, 0.5), x.t() @ other + x[1:3].t() @ other[1:3])
    assert launcher.calls == 2


@pytest.mark.parametrize("what", ["float", "alignment", "rows that are tried", "hooks"])
def test_what_differs_is_left_to_the_launcher(what, planned, launcher, monkeypatch):
    if what == "float":
        planned(*pair(), 0.25)
    elif what == "alignment":
        planned(*pair(offset=1), 0.5)
    elif what == "rows that are tried":
        with configs.trying({}):
            planned(*pair(), 0.5)
    else:
        launches._entered.add(print)
        try:
            planned(*pair(), 0.5)
        finally:
            launches._entered.remove(print)
    assert launcher.calls == 3
    planned(*pair(), 0.5)
    assert launcher.calls == 3


def test_other_rows_of_configuration_make_another_plan(planned, launcher, monkeypatch):
    monkeypatch.setattr(configs, "generation", configs.generation + 1)
    for _ in range(5):
        planned(*pair(), 0.5)
    assert launcher.calls == 5


@pytest.mark.parametrize(
    "more",
    [lambda x: x.sum().item(), lambda x: torch.equal(x, x), lambda x: torch.stack([ELSEWHERE, ELSEWHERE])],
    ids=["value", "comparison", "a tensor from elsewhere"],
)
def test_what_can_t_be_repeated_stays_with_the_launcher(more, driver):
    launcher = Launcher(more)
    planned = plans.planned(launcher)
    for _ in range(5):
        planned(*pair(), 0.5)
    assert launcher.calls == 5


ELSEWHERE = torch.zeros(3)


def test_a_loop_of_many_steps_is_no_plan(driver):
    launcher = Launcher(lambda x: [x + i for i in range(_plans.MOST_STEPS)])
    planned = plans.planned(launcher)
    for _ in range(5):
        planned(*pair(), 0.5)
    assert launcher.calls == 5


def test_memory_is_given_back_as_soon_as_it_is_not_needed(driver):
    """Buffers are freed within the call, not at its end: a launcher's loop holds one at a time."""
    launcher = Launcher(lambda x: [x.new_empty(2**20).zero_() for _ in range(8)])
    planned = plans.planned(launcher)
    for _ in range(2):
        planned(*pair(), 0.5)
    lines = planned.run.source.splitlines()
    buffers = [line.split(" = ")[0].strip() for line in lines if f"({2**20},)" in line]
    assert len(buffers) == 8
    for name, following in zip(buffers, buffers[1:], strict=False):
        ended = next(i for i, line in enumerate(lines) if line.strip().startswith("del ") and name in line)
        assert ended < next(i for i, line in enumerate(lines) if line.strip().startswith(f"{following} ="))


def test_small_work_space_is_allocated_together(driver):
    def launcher(x, sizes, kept):
        pieces = [x.new_empty(size) for size in sizes]
        for piece in pieces:
            added[(1,)](x, x, piece, x.numel(), 0.5, BLOCK=64)
        return pieces[kept].view(-1)

    largest = _plans.LARGEST_PIECE // 4
    sizes = [33, 7, largest + 1, 64, largest, 16, 9]
    planned, x = plans.planned(launcher), torch.randn(8)
    for _ in range(2):
        planned(x, sizes, 3)
    assert_same(noted(driver, planned, (x, sizes, 3)), noted(driver, launcher, (x, sizes, 3)))
    allocated = re.findall(r"new_empty_strided\(\((\d+),\)", planned.run.source)
    together = sum(-(-size * 4 // 256) * 64 for size in (33, 7, largest, 16, 9))
    assert sorted(map(int, allocated)) == sorted([together, largest + 1, 64])
    driver.launches.clear()
    planned(x, sizes, 3)
    addresses = [struct.unpack_from("3Q", record)[2] for _, _, record in driver.launches]
    assert all(
        address % _plans.PIECES_START_AT == addresses[0] % _plans.PIECES_START_AT
        for address in (addresses[i] for i in (1, 4, 5, 6))
    )


def test_no_more_than_so_much_work_space_is_allocated_together(driver, monkeypatch):
    monkeypatch.setattr(_plans, "LARGEST_POOL", 1024)

    def launcher(x):
        for _ in range(3):
            piece = x.new_empty(128)
            added[(1,)](x, x, piece, x.numel(), 0.5, BLOCK=64)
        return None

    planned, x = plans.planned(launcher), torch.randn(8)
    for _ in range(2):
        planned(x)
    assert_same(noted(driver, planned, (x,)), noted(driver, launcher, (x,)))
    assert re.findall(r"new_empty_strided\(\((\d+),\)", planned.run.source) == ["256", "128"]


def test_threads_share_a_plan(planned, launcher, driver):
    threads = [threading.Thread(target=lambda: planned(*pair(), 0.5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launcher.calls == 2 and len(driver.launches) == 4


def test_the_operators_plan_by_themselves(driver):
    """From the third call of a kind on, forward and backward; also with hooks on saved tensors, which may change the kind."""
    x, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((6, 8), (8,), (8,)))

    def both():
        torch.autograd.grad(ops.layer_norm(x, weight, bias), (x, weight, bias), torch.ones(6, 8))

    with ops.use("triton"):
        for _ in range(3):
            both()
        driver.launches.clear()
        both()
        assert len(driver.launches) == 3
        made = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.t() if t.ndim == 2 else t, lambda t: made.append(t) or t.t() if t.ndim == 2 else t
        ):
            both()
    assert len(driver.launches) == 6 and made
