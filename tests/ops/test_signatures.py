"""Every Python declaration of a CPU kernel matches the types exported by the C++ side."""

import ctypes

import pytest
import torch

from ov3fast import ops
from ov3fast.ops import cpu

pytestmark = [
    pytest.mark.backend_independent,
    pytest.mark.skipif(not cpu.available_isas(), reason="the CPU kernels were not built"),
]


@pytest.fixture
def library():
    return ctypes.CDLL(str(cpu.FOLDER / f"ov3_{cpu.isa()}.so"))


def test_every_declaration_fits(library):
    assert set(cpu.KERNELS) >= {"linear_forward", "mlp_backward", "adamw_ema", "contrastive_loss_project", "random_words"}
    for kernel in cpu.KERNELS.values():
        kernel.check(library)


@pytest.mark.parametrize(
    "parameters",
    [
        "T* x, int64_t x_stride, int64_t w_stride, P* w, P* bias, T* y, int64_t R, int64_t K, int64_t N",  # two swapped
        "T* x, int64_t x_stride, P* w, int64_t w_stride, P* bias, T* y, int64_t R, int64_t K",  # one left out
        "T* x, int64_t x_stride, P* w, int64_t w_stride, P* bias, T* y, int64_t R, int64_t K, double N",
        "T* x, int64_t x_stride, float* w, int64_t w_stride, P* bias, T* y, int64_t R, int64_t K, int64_t N",  # not for bfloat16
    ],
)
def test_a_broken_declaration_keeps_the_library_from_loading(monkeypatch, parameters):
    monkeypatch.setattr(cpu, "KERNELS", dict(cpu.KERNELS))
    cpu.Kernel("linear_forward", parameters, mixed=True)
    cpu._library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"the CPU kernel linear_forward is declared with \(.*built from other sources"):
            cpu._library(cpu.isa())
    finally:
        cpu._library.cache_clear()


def test_a_kernel_that_is_not_there(monkeypatch, library):
    monkeypatch.setattr(cpu, "KERNELS", dict(cpu.KERNELS))
    with pytest.raises(RuntimeError, match="no such kernel"):
        cpu.Kernel("linear_sideways", "T* x").check(library)


def test_pointers_to_pointers_and_mixed_dtypes():
    kernel = cpu.KERNELS["adamw_ema"]
    assert kernel.signature(torch.bfloat16, torch.bfloat16).startswith("bf16** void** int64_t* float** float**")
    mixed = cpu.KERNELS["linear_forward"].signature(torch.bfloat16, torch.float32)
    assert mixed == "bf16* int64_t float* int64_t float* bf16* int64_t int64_t int64_t int64_t"


def test_a_call_goes_through():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(ops.linear(x, weight, impl="cpu"), x @ weight.T)


@pytest.mark.backend_independent
def test_each_library_has_kernels_of_its_own():
    """If the dynamic linker shared symbols among the loaded libraries, all instruction sets would run the first one's kernels."""
    places = {}
    for isa in cpu.available_isas():
        library = cpu._library(isa)
        for kernel in cpu.KERNELS.values():
            for dtype, parameters in kernel.variants:
                places.setdefault((kernel.name, dtype, parameters), []).append(
                    kernel._export(library, dtype, parameters).function
                )
    assert places and all(len(set(functions)) == len(cpu.available_isas()) for functions in places.values())
