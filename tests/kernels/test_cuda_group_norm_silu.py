"""The CUDA kernels of group_norm_silu, compiled by nvcc for sm_80 and executed on the CPU."""

import dataclasses
import importlib.util
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from ov3fast import testing
from ov3fast.kernels.aot import cuda as cuda_aot
from ov3fast.ops import _check, _dispatch
from ov3fast.ops.cuda.group_norm_silu import Plan
from ov3fast.ops.group_norm_silu import reference

pytestmark = pytest.mark.skipif(not (shutil.which("nvcc") or os.environ.get("NVCC")), reason="there is no nvcc")

_spec = importlib.util.spec_from_file_location("ov3fast_tests_emulated_cuda", Path(__file__).with_name("emulated_cuda.py"))
emulation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulation)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def inputs(shape, dtype, weight_dtype=None, mean=0.0):
    """x, weight, bias, grad_y."""
    x, grad_y = (channels_last((testing.make(*shape, seed=s) + m).to(dtype)) for s, m in ((0, mean), (3, 0.0)))
    weight, bias = (testing.make(shape[1], seed=s).to(weight_dtype or dtype) for s in (1, 2))
    return x, weight, bias, grad_y


def both_ways(groups, x, weight, bias, grad_y, needs=(True, True, True), **options):
    """(y, dx, dweight, dbias, mean, rstd) of the kernels, and the launches. Without the check that rejects float16 on the CPU."""
    with emulation.emulated(**options) as ran, mock.patch.object(_check, "tensor"):
        y, mean, rstd = torch.ops.ov3fast.group_norm_silu(x, groups, weight, bias, 1e-6, "cuda")
        grads = torch.ops.ov3fast.group_norm_silu_backward(grad_y, x, weight, bias, mean, rstd, *needs, "cuda")
    return [y, *grads, mean, rstd], ran


def expected(groups, x, weight, bias, grad_y, wide=False):
    """y, dx, dweight, dbias of the specification, in float64 if wide."""
    leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, weight, bias)]
    y = reference(leaves[0], groups, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def assert_in_budget(groups, *tensors):
    got, ran = both_ways(groups, *tensors)
    names = "y", "dx", "dweight", "dbias"
    for name, g, p, e in zip(names, got, expected(groups, *tensors), expected(groups, *tensors, wide=True), strict=False):
        testing.assert_within_budget(g, p, e, name)
    return got, ran


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 16, 9, 7), 4),
        ((1, 9, 5, 5), 3),
        ((1, 64, 33, 17), 32),
        ((2, 6, 1, 1), 2),
        ((3, 8), 2),
        ((1, 1, 1, 1), 1),
        ((1, 2600, 3, 2), 13),
        ((1, 128, 20, 41), 16),
    ],
)
def test_budget(dtype, shape, groups):
    assert_in_budget(groups, *inputs(shape, dtype))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)])
def test_nothing_to_do(shape):
    got, _ = both_ways(2, *inputs(shape, torch.float32))
    assert got[0].shape == shape and got[4].shape == (shape[0], 2) and got[4].isnan().all()
    assert (got[2] == 0).all() and (got[3] == 0).all()


def test_mean_far_from_zero():
    assert_in_budget(2, *inputs((2, 8, 40, 40), torch.float32, mean=300.0))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_parameters(dtype):
    got, _ = assert_in_budget(8, *inputs((2, 32, 9, 7), dtype, torch.float32))
    assert got[2].dtype == got[3].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_blocks_does_not_change_bits(dtype):
    tensors = inputs((2, 64, 33, 9), dtype)
    first, ran = both_ways(16, *tensors)
    assert all(launch.grid != (1, 1) for launch, _ in ran)
    for order in ("reversed", "shuffled"):
        testing.assert_same_bits(first, both_ways(16, *tensors, order=order)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(dtype):
    """Parts of larger tensors with NaN around them."""
    x, weight, bias, grad_y = inputs((1, 16, 9, 7), dtype)
    weight, bias = testing.poisoned(weight), testing.poisoned(bias)
    assert_in_budget(4, x, weight, bias, grad_y)
    room = torch.full((x.numel() + 2,), torch.nan, dtype=dtype)
    inside = room[1:-1].view(1, 9, 7, 16).permute(0, 3, 1, 2).copy_(x)
    assert inside.data_ptr() % 16 and inside.is_contiguous(memory_format=torch.channels_last)
    assert_in_budget(4, inside, weight, bias, grad_y)


def test_gradients_that_nobody_asks_for():
    tensors = inputs((2, 16, 9, 7), torch.bfloat16)
    every, _ = both_ways(4, *tensors)
    for needs in ((True, False, False), (False, True, True), (False, False, True), (False, False, False)):
        some, _ = both_ways(4, *tensors, needs=needs)
        for needed, a, b in zip(needs, some[1:4], every[1:4], strict=True):
            assert torch.equal(a, b) if needed else a.numel() == 0


def test_other_layouts_are_refused():
    x, weight, bias, _ = inputs((2, 16, 9, 7), torch.float32)
    with emulation.emulated():
        assert _dispatch.chosen("group_norm_silu", "", x, 4, weight, bias, 1e-6) == "cuda"
        assert _dispatch.chosen("group_norm_silu", "", x.contiguous(), 4, weight, bias, 1e-6) != "cuda"
        with pytest.raises(RuntimeError, match="it takes channels_last tensors alone"):
            torch.ops.ov3fast.group_norm_silu(x.contiguous(), 4, weight, bias, 1e-6, "cuda")


def test_choice_by_table(monkeypatch):
    """Against a stand-in for Triton: packable channels go to the CUDA kernels, odd ones to Triton, unless it can't run or cuda is requested."""
    ready = dataclasses.replace(_dispatch._backends["group_norm_silu"]["eager"])
    backends = dict(_dispatch._backends["group_norm_silu"])
    monkeypatch.setitem(_dispatch._backends, "group_norm_silu", {**backends, "triton": ready})
    for channels, chosen in ((16, "cuda"), (6, "triton")):
        x, weight, bias, _ = inputs((2, channels, 3, 5), torch.float32)
        with emulation.emulated():
            assert _dispatch.chosen("group_norm_silu", "", x, 2, weight, bias, 1e-6) == chosen
            assert _dispatch.chosen("group_norm_silu", "cuda", x, 2, weight, bias, 1e-6) == "cuda"
    missing = dataclasses.replace(ready, unavailable_reason=lambda: "not installed")
    monkeypatch.setitem(_dispatch._backends, "group_norm_silu", {**backends, "triton": missing})
    with emulation.emulated():
        assert _dispatch.chosen("group_norm_silu", "", x, 2, weight, bias, 1e-6) == "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic(dtype):
    """As many bytes as the table counts, all of them 16 at a time except for the statistics."""
    x, weight, bias, grad_y = inputs((1, 128, 48, 64), dtype)
    _, ran = both_ways(32, x, weight, bias, grad_y)
    plan = Plan(x, 32)
    sizes = {name: getattr(plan, name) for name in ("B", "C", "S", "G", "N", "strips", "columns")}
    for name, work in cuda_aot.group_norm_silu_work(**sizes, item=x.element_size(), weight=x.element_size()).items():
        got = emulation.moved(ran, f"silu_{name}")
        assert abs(got / work.bytes - 1) < 0.1, (name, got, work.bytes)
        if name in ("moments", "apply", "sums", "grad"):
            assert emulation.share16(ran, f"silu_{name}") > 0.8, name
