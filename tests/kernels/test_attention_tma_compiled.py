"""The compiled code of attention's forward with TMA matches its configurations. It is inspected, not executed."""

import re

import pytest

from ov3fast.kernels.aot import compile as aot
from ov3fast.kernels.aot.cases import attention
from ov3fast.kernels.lib import config as configs
from ov3fast.ops import triton as backend

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="compiled kernels, not the interpreter")

CASES = [(way, head_dim) for way in ("tma", "warp-specialized") for head_dim in (64, 72, 128)]


def compiled(variant, target):
    import triton

    [entry] = [entry for entry in attention.entries() if entry.variant == variant]
    [config] = [config for dtype, _, config in aot.variants(entry, target) if dtype == "bf16"]
    with aot._private_cache():
        return triton.compile(
            aot._source(entry, config, "bf16", target), target=aot._gpu(target), options=aot._options(config)
        ), config


@pytest.mark.parametrize("target", configs.WITH_TMA)
@pytest.mark.parametrize(("way", "head_dim"), CASES)
def test_code_loads_through_tma(way, head_dim, target):
    code, config = compiled(f"D={head_dim} causal {way}", target)
    ptx, descriptors = code.asm["ptx"], 6 if head_dim == 72 else 3
    assert ptx.count("tensormap.cp_fenceproxy") == descriptors and code.metadata.global_scratch_size == 128 * descriptors
    assert ptx.count("cp.async.bulk.tensor.2d") >= descriptors and "cp.async.cg" not in ptx and "ld.global.v" not in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    groups = re.findall(r"^ +(?:default \{|partition\d+\()", code.asm["ttgir"], re.MULTILINE)
    if config.blocks["WARP_SPECIALIZED"]:
        assert len(groups) >= 3 and "setmaxnreg" in ptx and code.metadata.num_warps > config.warps
    else:
        assert not groups and "setmaxnreg" not in ptx and code.metadata.num_warps == config.warps


def test_groups_of_warps_share_the_queries_on_hopper():
    """Each consumer multiplies 64 of the 128 rows, so no product is computed twice."""
    code, config = compiled("D=64 warp-specialized", "sm_90")
    assert config.blocks["BLOCK_QUERIES"] == 128
    products = re.findall(r"ttng\.warp_group_dot .* -> tensor<(\d+)x", code.asm["ttgir"])
    assert products == ["64"] * 4
    first_rows = re.findall(r"async_tma_copy_global_to_local %[^[]*\[(%\w+),", code.asm["ttgir"])
    assert len(first_rows) == 4 and len(set(first_rows)) == 3, "two halves of q, a tile of k and v"


def test_plain_rows_use_no_tma():
    for (dtype, size, _), row in configs.TABLE["flash_attention_forward"].items():
        assert row.blocks["TMA"] == int(" " in size) and (dtype != "fp32" or not row.blocks["TMA"])
        assert row.blocks["WARP_SPECIALIZED"] == int(size.endswith("warp-specialized"))
