"""The same random numbers in all languages: the compiled Triton kernel's words equal those of the reference and of the C++ kernels, bit for bit."""

import pytest
import torch
from kernel_tools import launches

from ov3fast.kernels import random_normal as kernels
from ov3fast.ops import cpu, random, triton

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="runs compiled code")


@pytest.mark.parametrize("seed", [0, -7, 2**63 + 12345])
@pytest.mark.parametrize("offset", [0, 2**32 - 7, 2**64 - 5])
def test_words(seed, offset):
    rng, n = random.make_rng(seed, offset), 1501
    with launches.compiled():
        words = kernels.words(n, rng)
    assert torch.equal(words.long() & (2**32 - 1), random.words(n, rng))
    if cpu.available_isas():
        native = torch.empty(n, dtype=torch.int32)
        cpu.KERNELS["random_words"](torch.float32, rng, native, n)
        assert torch.equal(words, native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normals(dtype):
    rng, n = random.make_rng(77, 2**32 - 9), 5003
    with launches.compiled() as reports:
        normals = kernels.forward((n,), rng, dtype)
    exact = random.reference((n,), rng)
    assert (normals.double() - exact.double()).abs().max() < 1e-6 + torch.finfo(dtype).eps * exact.abs().max() / 2
    (report,) = reports["random_normal"]
    assert abs(report.bytes_written() - n * dtype.itemsize) == 0
    # Only the ragged end is stored element by element.
    assert report.share16("st") > 0.8


def test_program_order_does_not_matter():
    rng = random.make_rng(5)
    results = []
    for order in launches.ORDERS:
        with launches.compiled(order):
            results.append(kernels.forward((4100,), rng, torch.bfloat16))
    assert all(torch.equal(results[0], other) for other in results[1:])
