"""The estimate's four terms and the counted loops of machine code, against cases computed by hand."""

import pytest

from ov3fast.kernels.aot import loops
from ov3fast.kernels.aot.cases import attention
from ov3fast.kernels.aot.catalog import Work
from ov3fast.kernels.aot.chips import CHIPS
from ov3fast.kernels.aot.estimate import estimate, occupancy
from ov3fast.kernels.lib.config import pick
from ov3fast.ops import triton

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="reads machine code, runs no kernel")

H100 = CHIPS["sm_90"]


def line(text):
    return f"        /*0000*/                   {text} ;"


def sass(*lines):
    return "\n".join(text if text.endswith(":") else line(text) for text in lines)


NESTED = sass(
    "MOV R1, R2",
    ".L_outer:",
    "LDG.E.128 R4, [R2]",
    "MUFU.EX2 R5, R5",
    ".L_inner:",
    "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8], R24",
    "IADD3 R3, R3, 0x1, RZ",
    "@!P0 BRA `(.L_inner)",
    ".L_wait:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR16], R84",
    "@!P5 BRA `(.L_wait)",
    "@P1 BRA `(.L_cold)",
    ".L_back:",
    "@!P2 BRA `(.L_outer)",
    "STG.E [R2], R4",
    "EXIT",
    ".L_cold:",
    "IADD3 R6, R6, 0x1, RZ",
    "BRA `(.L_back)",
    ".L_end:",
    "BRA `(.L_end)",
)


def test_loops_are_those_of_the_control_flow():
    """A spin loop, and out-of-line code that ends in a backward branch, belong to the loop around them."""
    kernel, outer, inner = loops.of_nvidia(NESTED)
    assert [loop["parent"] for loop in (kernel, outer, inner)] == [None, 0, 1]
    assert inner["issue"] == 3 and inner["flops"] == 2 * 64 * 128 * 16 / 4 and inner["mufu"] == inner["bytes"] == 0
    assert outer["issue"] == 8 and outer["mufu"] == 1 and outer["bytes"] == 32 * 16
    assert kernel["issue"] == 4 and kernel["bytes"] == 32 * 4


def test_turns_follow_from_the_products():
    found = loops.of_nvidia(NESTED)
    each = found[2]["flops"]
    assert loops.trips(found, (5,), (), 5 * 7 * each, 0) == [1, 5, 35]
    # Unrolled twice, the body has twice the products and half the iterations.
    found[2]["flops"] *= 2
    assert loops.trips(found, (5,), (), 5 * 7 * each, 0) == [1, 5, 17.5]


def test_turns_follow_from_the_traffic_where_nothing_multiplies():
    copy = loops.of_nvidia(
        sass("LDG.E.128 R4, [R2]", ".L_loop:", "LDG.E.128 R4, [R2]", "STG.E.128 [R2], R4", "@P0 BRA `(.L_loop)", "EXIT")
    )
    assert loops.trips(copy, (), (), 0, 512 + 10 * 1024) == [1, 10]


def test_turns_of_loops_that_follow_each_other():
    two = loops.of_nvidia(
        sass(".L_a:", "HMMA.16816.F32 R4, R8, R10, R4", "@P0 BRA `(.L_a)", ".L_b:", "HMMA.16816.F32 R4, R8, R10, R4", "NOP",
             "MOV R1, R1", "@P0 BRA `(.L_b)", "EXIT")
    )  # fmt: skip
    first, second = (next(i for i in (1, 2) if two[i]["issue"] == size) for size in (2, 3))
    for shares, turns in (((), (8, 8)), ((3, 1), (12, 4)), ((1, 0), (16, 0))):
        found = loops.trips(two, (), shares, 16 * 4096, 0)
        assert (found[first], found[second]) == turns


def test_products_in_tf32_are_thirds():
    [found] = loops.of_nvidia(sass("HMMA.1688.F32.TF32 R4, R8, R10, R4", "EXIT"))
    assert found["flops"] == pytest.approx(2 * 16 * 8 * 8 / 3)


def test_loops_of_amd():
    kernel, loop = loops.of_amd(
        "\n".join(
            [".LBB0_1:", "\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]", "\tv_exp_f32_e32 v1, v2"]
            + ["\tglobal_load_dwordx4 v[0:3], v4, s[0:1]", "\ts_cbranch_scc1 .LBB0_1", "\ts_endpgm"]
        )
    )
    assert loop["flops"] == 2 * 32 * 32 * 8 and loop["mufu"] == 1 and loop["issue"] == 2 and loop["bytes"] == 64 * 16
    assert kernel["issue"] == 0


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [
        (8, 255, 0, 1),  # 8 warps of 8192 registers
        (8, 128, 0, 2),  # 8 warps of 4096
        (4, 32, 0, 16),  # 64 warps
        (1, 16, 0, 32),  # programs
        (4, 32, 100 * 1024, 2),  # 101 KB each of 228
        (4, 32, 114 * 1024, 1),
    ],
)
def test_occupancy(warps, registers, shared, programs):
    assert occupancy(H100, warps, registers, shared) == programs


def measured(*found, registers=255, shared=0):
    return {"registers": registers, "shared_bytes": shared, "loops": list(found)}


def counts(parent, issue=0, mufu=0, flops=0, bytes=0):
    return {"parent": parent, "at": 0 if parent is None else 1, "issue": issue, "mufu": mufu, "flops": flops, "bytes": bytes}


def test_the_four_terms():
    """Two programs per SM, one after the other; 8 warps, 1000 iterations of 4 products, 40 instructions and 2 special functions."""
    flops = 2 * 132 * 8 * 1000 * 4 * 4096
    work = Work(flops, bytes=6e9, programs=2 * 132, distinct=3e9)
    found = estimate(work, H100, "bf16", True, 8, measured(counts(None, 500), counts(0, 40, 2, 4 * 4096)))
    assert found["occupancy"] == 1
    assert found["tensor_us"] == pytest.approx(1e6 * flops / (0.8 * 989.4e12), rel=1e-4)
    assert found["hbm_us"] == pytest.approx(1e6 * 3e9 / (0.9 * 3.35e12), rel=1e-4)
    assert found["mufu_us"] == pytest.approx(1e6 * 2 * 8 / 4 * 1000 * 2 * 8 / 1.83e9, rel=1e-4)
    assert found["issue_us"] == pytest.approx(1e6 * 2 * 8 / 4 * (1000 * 40 + 500) / 1.83e9, rel=1e-4)
    assert found["bound"] == "hbm" and found["estimate_us"] == found["hbm_us"]


def test_a_program_that_is_alone_does_its_parts_one_after_the_other():
    work = Work(132 * 8 * 1000 * 4 * 4096, bytes=1, programs=132)
    loop, around = counts(0, 16, 0, 4 * 4096), counts(None, 20_000)
    alone, two = (estimate(work, H100, "bf16", True, 8, measured(around, loop, registers=r)) for r in (255, 128))
    assert alone["estimate_us"] == two["estimate_us"] == two["serial_us"]
    epilogue = 1e6 * 8 / 4 * 20_000 / 1.83e9
    assert alone["serial_us"] == pytest.approx(alone["tensor_us"] + epilogue, rel=1e-3)


def test_the_last_wave_counts_whole():
    one, more = (estimate(Work(programs * 1e9, 1, programs), H100, "bf16", True, 4, measured()) for programs in (132, 133))
    assert more["tensor_us"] == pytest.approx(2 * one["tensor_us"], rel=1e-3)


def test_what_waves_read_anew_beyond_the_cache():
    work = Work(0, bytes=1e9, programs=4 * 132, distinct=2e8, streamed=60 * 2**20)
    found = estimate(work, H100, "bf16", False, 8, measured())
    assert found["hbm_us"] == pytest.approx(1e6 * (2e8 + 3 * 10 * 2**20) / (0.9 * 3.35e12), rel=1e-4)
    assert estimate(Work(0, 1e9, 4 * 132, 2e8, 50 * 2**20), H100, "bf16", False, 8, measured())["hbm_us"] == pytest.approx(
        1e6 * 2e8 / (0.9 * 3.35e12), rel=1e-4
    )


def test_attention_is_bound_by_its_products():
    """8 x 1024 x 16 heads of 64: 34.4 GFLOP are 43 us at 790 TFLOP/s, on 128 programs each of 132 SMs 3 % more; its four tensors are 22 us."""
    config = pick("flash_attention_forward", "bf16", "64", "sm_90")
    work = attention._work("flash_attention_forward", 64, False, "bf16", config)
    assert work.flops == 4 * 64 * 1024**2 * 8 * 16 and work.programs == 1024
    found = estimate(work, H100, "bf16", True, 8, measured())
    assert found["tensor_us"] == pytest.approx(43.4 * 8 * 132 / 1024, rel=1e-2)
    assert found["hbm_us"] == pytest.approx(1e6 * 4 * 8 * 1024 * 16 * 64 * 2 / 3.015e12, rel=1e-2)
    # One exp per pair: 16 per clock and SM.
    one_exp = counts(0, mufu=64, flops=2 * 2 * 64 * 128 * 128 / 8)
    found = estimate(work, H100, "bf16", True, 8, measured(counts(None), one_exp))
    assert found["mufu_us"] == pytest.approx(1e6 * 8 * 128 * 1024 / 16 / 1.83e9, rel=1e-2)
    assert found["bound"] == "tensor"


def test_a_mask_halves_the_tiles_but_for_the_border():
    config = pick("flash_attention_forward", "bf16", "64", "sm_90")
    work = attention._work("flash_attention_forward", 64, True, "bf16", config)
    assert work.flops == 4 * 64 * 128 * 128 * (8 * 9 / 2) * 8 * 16 and work.shares == (28, 8)
