import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _dispatch
from ov3fast.ops.adamw_ema import BUCKET, adamw_ema_, reference

SHAPES = [(7, 3), (), (0, 4), (1,), (5,), (2, 3, 2)]
NUMBERS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def tensors(dtype=torch.float32, grad_dtype=None, shapes=SHAPES, requires_grad=False):
    """params, grads, exp_avgs, exp_avg_sqs, ema; the moments as after some steps."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def some(seed, dtype):
        return [testing.make(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]

    params = [p.requires_grad_(requires_grad) for p in some(0, dtype)]
    return params, some(10, grad_dtype or dtype), some(20, wide), [v.square() for v in some(30, wide)], some(40, wide)


def check(lists, arrange=torch.Tensor.contiguous, **how):
    """Checks one step against the specification's budget, and determinism. Returns the norm."""

    def after_a_step(function, tensors, arrange=torch.Tensor.contiguous):
        """The norm, then params, grads, exp_avgs, exp_avg_sqs and ema."""
        tensors = [arrange(t.detach().clone()) for t in tensors]
        starts = range(0, len(tensors), len(lists[0]))
        return [function(*(tensors[start : start + len(lists[0])] for start in starts), **NUMBERS | how), *tensors]

    before = [t for values in lists for t in values]
    ours, again = (after_a_step(adamw_ema_, before, arrange) for _ in range(2))
    testing.Budget(lambda tensors: after_a_step(reference, tensors), before).check(ours)
    testing.assert_same_bits(ours, again)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == lists[0][0].dtype
    return ours[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_against_torch(dtype, max_norm):
    """Five steps of torch.optim.AdamW, clip_grad_norm_ and an EMA written by hand."""
    params, _, _, _, ema = tensors(dtype)
    theirs = [p.clone().requires_grad_() for p in params]
    their_ema = [e.clone() for e in ema]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    optimizer = torch.optim.AdamW(theirs, **NUMBERS, weight_decay=0.1)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
    for step in range(1, 6):
        grads = [testing.make(*p.shape, seed=step, dtype=dtype) for p in params]
        kept = [g.clone() for g in grads]
        norm = adamw_ema_(
            params, grads, *moments, ema, step=step, **NUMBERS, weight_decay=0.1, max_norm=max_norm, ema_decay=0.9
        )
        testing.assert_same_bits(grads, kept)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        their_norm = torch.nn.utils.clip_grad_norm_(theirs, torch.inf if max_norm is None else max_norm)
        optimizer.step()
        for e, p in zip(their_ema, theirs, strict=True):
            e.copy_(0.9 * e + 0.1 * p.detach())
        torch.testing.assert_close(norm, their_norm, **tolerance)
        for got, expected in zip([*params, *ema], [*theirs, *their_ema], strict=True):
            torch.testing.assert_close(got, expected.detach(), **tolerance)


@pytest.mark.parametrize(
    "dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_parity(layout, dtype):
    """For every layout, with per-parameter decay."""
    decays = [0.1 * i for i in range(len(SHAPES))]
    check(tensors(*dtype), testing.LAYOUTS[layout], step=3, weight_decay=decays, max_norm=1.0, ema_decay=0.99)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


LONG = [(8191,), (3, 8192), (8193,), (1,), (129, 193), (4, 5, 7, 3), (47,), (1025,)]
"""Sizes around the boundaries of chunks and vectors."""


@pytest.mark.parametrize(
    "dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
)
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_long_tensors(dtype, max_norm):
    check(tensors(*dtype, shapes=LONG), channels_last, step=7, weight_decay=0.1, max_norm=max_norm, ema_decay=0.3)


def test_gradients_of_both_dtypes():
    lists = tensors(torch.bfloat16)
    lists[1][::2] = [g.float() for g in lists[1][::2]]
    check(lists, step=3, weight_decay=0.1, max_norm=1.0, ema_decay=0.9)


def test_layouts_that_differ():
    """A channels_last parameter with a contiguous gradient, and vice versa."""
    lists = tensors(shapes=[(4, 5, 7, 3), (2, 3, 4, 5)])
    other = copy.deepcopy(lists)
    how = dict(NUMBERS, step=1, weight_decay=0.1, max_norm=1.0, ema_decay=0.9)
    for i, values in enumerate(other):
        values[i % 2] = channels_last(values[i % 2])
    strides = [[t.stride() for t in values] for values in other]
    assert torch.equal(adamw_ema_(*lists, **how), adamw_ema_(*other, **how))
    for values, others in zip(lists, other, strict=True):
        testing.assert_same_bits(values, others)
    assert strides == [[t.stride() for t in values] for values in other]


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_threads_do_not_change_bits(max_norm):
    def run():
        lists = tensors(shapes=LONG)
        norm = adamw_ema_(*lists, step=2, **NUMBERS, weight_decay=0.1, max_norm=max_norm, ema_decay=0.9)
        return [norm, *(t for values in lists for t in values)]

    testing.assert_same_bits_on_threads(run, (1, 2))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 12), max_size=4).map(tuple), min_size=1, max_size=5),
    dtype=st.sampled_from([(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)]),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
    max_norm=st.sampled_from([None, 0.1, 10.0]),
    step=st.integers(1, 1000),
    ema_decay=st.sampled_from([0.0, 0.4, 0.9999, 1.0]),
)
@example([(8, 6)], (torch.float32, torch.float32), "contiguous", None, 189, 0.0)  # an update that nearly cancels a parameter
def test_any_shapes_and_strides(shapes, dtype, layout, max_norm, step, ema_decay):
    arrange = testing.LAYOUTS[layout]
    check(tensors(*dtype, shapes=shapes), arrange, step=step, weight_decay=0.1, max_norm=max_norm, ema_decay=ema_decay)


def test_backend(implementation):
    how = 1, 0.1, 0.9, 0.95, 1e-8, [0.1] * len(SHAPES), 1.0, 0.9, None, None
    expected = "eager" if implementation == "reference" else "cpu"
    word = _dispatch.request("adamw_ema_", None)
    for dtypes in ((torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)):
        assert _dispatch.chosen("adamw_ema_", word, *tensors(*dtypes), *how) == expected
    assert _dispatch.chosen("adamw_ema_", "", *tensors(torch.float64), *how) == "eager"


def test_buckets_do_not_change_bits(monkeypatch):
    import sys

    lists = tensors()
    other = copy.deepcopy(lists)
    how = dict(NUMBERS, step=1, weight_decay=0.1, max_norm=1.0, ema_decay=0.9)
    assert sum(p.numel() for p in lists[0]) < BUCKET
    norm = adamw_ema_(*lists, **how)
    monkeypatch.setattr(sys.modules["ov3fast.ops.adamw_ema"], "BUCKET", 6)
    assert torch.equal(norm, adamw_ema_(*other, **how))
    for values, others in zip(lists, other, strict=True):
        testing.assert_same_bits(values, others)


def test_without_ema_clip_or_parameters():
    check(tensors()[:4], step=2, weight_decay=0.0)
    assert adamw_ema_([], [], [], [], step=1, **NUMBERS, weight_decay=0.1) == 0


def test_parameters_that_require_gradients():
    """Leaves are updated outside autograd but bump its version counter: a graph that still needs the old values raises in backward."""
    lists = tensors(requires_grad=True)
    loss = lists[0][0].square().sum()
    before = lists[0][0].detach().clone()
    norm = adamw_ema_(*lists, step=1, **NUMBERS, weight_decay=0.1, ema_decay=0.9)
    assert lists[0][0].is_leaf and not norm.requires_grad and not torch.equal(lists[0][0], before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_nonfinite_gradient_shows_in_the_norm(value, max_norm):
    lists = tensors()
    lists[1][0][0, 0] = value
    norm = check(lists, step=1, weight_decay=0.1, max_norm=max_norm, ema_decay=0.9)
    assert norm.isnan() if value != value else norm.isinf()


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    arrange = testing.LAYOUTS[layout]
    lists = [[arrange(t) for t in values] for values in tensors(shapes=[(4, 3), (2,)])]
    torch.library.opcheck(torch.ops.ov3fast.adamw_ema_, (*lists, 1, 0.1, 0.9, 0.95, 1e-8, [0.1, 0.0], 1.0, 0.9, None, None, ""))
    torch.library.opcheck(
        torch.ops.ov3fast.adamw_ema_, (*lists[:4], [], 1, 0.1, 0.9, 0.95, 1e-8, [0.1, 0.0], None, None, None, None, "")
    )


@pytest.mark.backend_independent
def test_compile():
    lists, other = tensors(), tensors()

    def step(lists):
        return adamw_ema_(*lists, step=1, **NUMBERS, weight_decay=0.1, max_norm=1.0, ema_decay=0.9)

    norm = torch.compile(step, fullgraph=True, backend="aot_eager")(lists)
    torch.testing.assert_close(norm, step(other))
    for values, others in zip(lists, other, strict=True):
        testing.assert_same_bits(values, others)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grads": []}, ValueError, "adamw_ema_: grads must have one entry per parameter, 1, got 0"),
        ({"weight_decay": [0.1, 0.2]}, ValueError, "weight_decay must have one entry per parameter, 1, got 2"),
        ({"grads": [None]}, TypeError, r"grads\[0\] must be a tensor, got NoneType"),
        ({"grads": [torch.ones(2)]}, ValueError, r"grads\[0\] must have shape \(3,\) like its parameter, got \(2,\)"),
        ({"exp_avgs": [torch.ones(3).bfloat16()]}, TypeError, r"exp_avgs\[0\] must be of dtype float32, got bfloat16"),
        ({"ema": None}, ValueError, "ema and ema_decay must be given together, got ema_decay alone"),
        ({"step": 0}, ValueError, "step must be an integer from 1 on, got 0"),
        ({"step": 1.0}, ValueError, "step must be an integer from 1 on, got 1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1.0"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be above 0 or None, got 0.0"),
        ({"ema_decay": 1.5}, ValueError, r"ema_decay must be in \[0, 1\], got 1.5"),
        ({"impl": "apex"}, ValueError, "impl must be one of .*cpu, eager; got 'apex'"),
    ],
)
def test_errors(change, error, words):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema")
    arguments = {name: [torch.ones(3)] for name in names} | NUMBERS | {"step": 1, "weight_decay": 0.1, "ema_decay": 0.9}
    with pytest.raises(error, match=words):
        ops.adamw_ema_(**{**arguments, **change})


@pytest.mark.backend_independent
def test_mixed_parameters_are_refused():
    both = [torch.ones(3), torch.ones(3).bfloat16()]
    wide = [torch.ones(3)] * 2
    with pytest.raises(
        TypeError, match=r"params must be alike, got params\[1\] torch.bfloat16 on cpu, the first torch.float32"
    ):
        ops.adamw_ema_(both, wide, wide, wide, step=1, **NUMBERS, weight_decay=0.1)


SCHEDULE = {"step": 7, "lr": 0.1, "ema_decay": 0.97}


@pytest.mark.parametrize(
    "dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
)
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("names", [("step", "lr", "ema_decay"), ("lr",), ("step",)])
def test_numbers_as_tensors(dtype, max_norm, names):
    """As in a captured step; within the same budget of the specification, which takes Python numbers."""
    lists = tensors(*dtype)
    how = NUMBERS | SCHEDULE | {"weight_decay": [0.1 * (i % 2) for i in range(len(SHAPES))], "max_norm": max_norm}
    kinds = {"step": torch.int64, "lr": torch.float64, "ema_decay": torch.float64}
    scheduled = how | {name: torch.tensor(SCHEDULE[name], dtype=kinds[name]) for name in names}

    def after(function, tensors, how):
        tensors = [t.detach().clone() for t in tensors]
        starts = range(0, len(tensors), len(SHAPES))
        return [function(*(tensors[start : start + len(SHAPES)] for start in starts), **how), *tensors]

    before = [t for values in lists for t in values]
    testing.Budget(lambda values: after(reference, values, how), before).check(after(adamw_ema_, before, scheduled))


def test_a_scheduled_step_changes_nothing_where_the_norm_is_not_finite():
    lists = tensors()
    lists[1][1] = torch.tensor(torch.inf)
    before = copy.deepcopy(lists)
    how = NUMBERS | {
        "weight_decay": 0.1,
        "max_norm": torch.inf,
        "ema_decay": torch.tensor(0.9),
        "step": 3,
        "lr": torch.tensor(0.1),
    }
    assert not adamw_ema_(*lists, **how).isfinite()
    testing.assert_same_bits([t for values in lists for t in values], [t for values in before for t in values])


def test_a_recorded_step_reads_its_numbers_anew():
    """On the stand-in for CUDA graphs, in which reading a value raises."""
    from kernel_tools.graphs import graphs_on_cpu

    from ov3fast._graphs import Graph

    ours, start = tensors(), tensors()
    how = {"betas": NUMBERS["betas"], "eps": 1e-8, "weight_decay": 0.1, "max_norm": 1.0}

    def step(lists, schedule):
        return adamw_ema_(*lists, **how, step=schedule[0], lr=schedule[1], ema_decay=schedule[2])

    with graphs_on_cpu():
        graph = Graph(lambda schedule: step(ours, schedule), [torch.ones(3, dtype=torch.float64)], None, warm_up=0)
    for number in (4, 5):
        for values, from_start in zip(ours, start, strict=True):
            torch._foreach_copy_(values, from_start)
        expected = copy.deepcopy(start)
        schedule = torch.tensor([number, 0.1 / number, 0.9], dtype=torch.float64)
        norm = step(expected, schedule)
        testing.assert_same_bits([graph(schedule), *sum(ours, [])], [norm, *sum(expected, [])])


def test_scheduled_numbers_are_checked():
    lists = tensors()
    with pytest.raises(ValueError, match=r"adamw_ema_: lr must be a scalar on cpu, got shape \(2,\) on cpu"):
        adamw_ema_(*lists, **(NUMBERS | {"lr": torch.ones(2)}), step=1, weight_decay=0.0, ema_decay=0.9)
    with pytest.raises(RuntimeError, match="impl='cpu' can't run this call: it takes step, lr and ema_decay as numbers"):
        adamw_ema_(*lists, **(NUMBERS | {"lr": torch.ones(())}), step=1, weight_decay=0.0, ema_decay=0.9, impl="cpu")


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_shards_with_the_norm_of_the_whole(max_norm):
    """Updating the halves of every tensor separately equals updating the full tensors."""
    how = dict(NUMBERS, step=3, weight_decay=0.1, max_norm=max_norm, ema_decay=0.9)
    lists = tensors(shapes=[(8, 3), (2,), (16384,)])
    whole = copy.deepcopy(lists)
    norm = adamw_ema_(*whole, **how)
    for half in (0, 1):
        shards = [[t.chunk(2)[half] for t in values] for values in lists]
        assert adamw_ema_(*shards, **how, norm=norm) == norm
    for got, expected in zip([t for values in lists for t in values], [t for values in whole for t in values], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", [torch.nan, torch.inf])
def test_a_norm_of_the_whole_that_is_not_finite_changes_nothing(norm):
    lists = tensors()
    before = [t.clone() for values in lists for t in values]
    got = adamw_ema_(*lists, **NUMBERS, step=3, weight_decay=0.1, max_norm=1.0, ema_decay=0.9, norm=torch.tensor(norm))
    testing.assert_same_bits([t for values in lists for t in values], before)
    assert not got.isfinite()


def test_a_norm_that_does_not_fit():
    lists, how = tensors(), dict(NUMBERS, step=1, weight_decay=0.0, ema_decay=0.9)
    with pytest.raises(TypeError, match="norm"):
        adamw_ema_(*lists, **how, norm=torch.ones((), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="norm"):
        adamw_ema_(*lists, **how, norm=torch.ones(2))
