"""The CUDA kernels of adamw_ema_, compiled by nvcc for sm_80 and executed on the CPU."""

import copy
import importlib.util
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from ov3fast import ops, testing
from ov3fast.kernels.aot import cuda as cuda_aot
from ov3fast.ops.adamw_ema import reference
from ov3fast.ops.cuda import adamw_ema as glue

pytestmark = pytest.mark.skipif(not (shutil.which("nvcc") or os.environ.get("NVCC")), reason="there is no nvcc")

_spec = importlib.util.spec_from_file_location("ov3fast_tests_emulated_cuda", Path(__file__).with_name("emulated_cuda.py"))
emulation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulation)

KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
SHAPES = [(8191,), (3, 8192), (), (0, 4), (1,), (129, 65), (5,)]
HOW = {"step": 3, "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "max_norm": 1.0, "ema_decay": 0.99}


def tensors(dtypes, shapes=SHAPES):
    """params, grads, exp_avgs, exp_avg_sqs, ema; the moments as after some steps."""

    def some(seed, dtype):
        return [testing.make(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]

    return (
        some(0, dtypes[0]),
        some(10, dtypes[1]),
        some(20, torch.float32),
        [v.square() for v in some(30, torch.float32)],
        some(40, torch.float32),
    )


def step(lists, how=HOW, **options):
    """One step of a copy. (the norm and all tensors after it, what ran)."""
    ours = copy.deepcopy(lists)
    with emulation.emulated(**options) as ran:
        norm = ops.adamw_ema_(*ours, **how)
    return [norm, *(t for values in ours for t in values)], ran


def assert_in_budget(lists, how=HOW):
    exact, plain = [[t.double() for t in values] for values in lists], copy.deepcopy(lists)
    expected = [reference(*exact, **how), reference(*plain, **how)]
    (norm, *flat), _ = step(lists, how)
    testing.assert_within_budget(norm, expected[1], expected[0], "norm")
    for i, (got, p, e) in enumerate(zip(flat, sum(plain, []), sum(exact, []), strict=True)):
        testing.assert_within_budget(got, p, e, f"tensor {i}")


@pytest.mark.parametrize("dtypes", KINDS)
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_budget(dtypes, max_norm):
    assert_in_budget(tensors(dtypes), {**HOW, "max_norm": max_norm})


@pytest.mark.parametrize("dtypes", KINDS)
@pytest.mark.parametrize("ema_decay", [0.99, 0.3])
def test_budget_with_numbers_on_the_device(dtypes, ema_decay):
    """As read by a captured graph; `_lerp` starts from the other end for the second EMA decay."""
    lists, how = tensors(dtypes), {**HOW, "ema_decay": ema_decay, "weight_decay": [0.1 * (i % 3) for i in range(len(SHAPES))]}
    exact, plain = [[t.double() for t in values] for values in lists], copy.deepcopy(lists)
    expected = [reference(*exact, **how), reference(*plain, **how)]
    scheduled = {name: torch.tensor(how[name], dtype=torch.float64) for name in ("step", "lr", "ema_decay")}
    (norm, *flat), ran = step(lists, {**how, **scheduled})
    assert len(ran) == 2 and dict(ran[1][0].arguments)["scheduled"].shape == (7,)
    testing.assert_within_budget(norm, expected[1], expected[0], "norm")
    for i, (got, p, e) in enumerate(zip(flat, sum(plain, []), sum(exact, []), strict=True)):
        testing.assert_within_budget(got, p, e, f"tensor {i}")


def test_budget_without_ema():
    assert_in_budget(tensors(KINDS[1])[:4], {**HOW, "ema_decay": None, "weight_decay": [0.1 * i for i in range(len(SHAPES))]})


def test_gradients_of_both_dtypes_and_more_tensors_than_a_launch_takes(monkeypatch):
    """With fewer tensors than a launch's capacity."""
    lists = tensors(KINDS[1], [(i % 7 + 1,) for i in range(12)])
    lists[1][::3] = [g.float() for g in lists[1][::3]]
    expected, _ = step(lists)
    assert_in_budget(lists)
    monkeypatch.setattr(
        glue, "_alike", lambda *lists, alike=glue._alike: [half for c in alike(*lists) for half in (c[:3], c[3:])]
    )
    got, ran = step(lists)
    assert len(ran) == 8
    testing.assert_same_bits(got[1:], expected[1:])
    assert math.isclose(got[0], expected[0], rel_tol=1e-6)


@pytest.mark.parametrize("dtypes", KINDS)
def test_order_of_blocks_does_not_change_bits(dtypes):
    first, _ = step(tensors(dtypes))
    for order in ("reversed", "shuffled"):
        testing.assert_same_bits(first, step(tensors(dtypes), order=order)[0])


@pytest.mark.parametrize("dtypes", KINDS)
def test_misaligned_tensors_give_the_same_bits(dtypes):
    """Tensors inside larger ones, as gradients in DDP's buckets are, with NaN around them."""
    lists = tensors(dtypes)
    moved = [[testing.poisoned(t) if t.ndim == 1 else t for t in values] for values in lists]
    assert any(t.data_ptr() % 16 for values in moved for t in values)
    expected, _ = step(lists)
    for number in range(5):
        some = [moved[i] if i == number else values for i, values in enumerate(lists)]
        testing.assert_same_bits(expected, step(some)[0])


def test_traffic():
    for (param, grad), kind in (((4, 4), KINDS[0]), ((2, 2), KINDS[1]), ((2, 4), KINDS[2])):
        lists = tensors(kind, [(8192,)] * 6 + [(4096,)])
        _, ran = step(lists)
        elements, chunks = sum(p.numel() for p in lists[0]), 7
        for name, work in cuda_aot.adamw_ema_work(elements, chunks, chunks, param, grad).items():
            assert abs(emulation.moved(ran, name) / work.bytes - 1) < 0.1
            assert emulation.share16(ran, name) > 0.99


def test_two_launches_do_all():
    _, ran = step(tensors(KINDS[0], [(3,)] * 60))
    assert [launch.kernel for launch, _ in ran] == ["ov3_adamw_ema_squares_f32", "ov3_adamw_ema_update_f32_f32"]


def test_nothing_to_do():
    assert step(tensors(KINDS[0], [(0, 4)]))[0][0] == 0


def test_a_given_norm_is_clipped_by():
    lists = tensors((torch.float32, torch.float32))
    own, _ = step(lists)
    given, ran = step(lists, {**HOW, "norm": own[0].clone()})
    assert [launch.kernel for launch, _ in ran] == ["ov3_adamw_ema_update_f32_f32"]
    for a, b in zip(own, given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
