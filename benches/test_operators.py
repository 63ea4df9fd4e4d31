"""The same cases under pytest-benchmark, for its statistics and comparisons between commits:

python -m pytest benches -o addopts= -k "mlp and bf16" --benchmark-group-by=group
"""

import pytest

from . import cases

OPERATORS = (
    "flash_attention", "contrastive_loss", "linear_cross_entropy", "patch_embed", "noise_projection", "group_norm_silu", "mlp",
    "layer_norm", "rms_norm", "swiglu", "rope", "ViT-B/2 encoder",
)  # fmt: skip


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("variant", (cases.OURS, "first peer"))
def test_operator(benchmark, operator, dtype, variant):
    """The first case of the operator: ours, or its first peer."""
    case = next(cases.table(operator, dtype))
    name = cases.OURS if variant == cases.OURS else next(name for name in case.variants if name != cases.OURS)
    benchmark.group = f"{case.operator} {case.direction} {case.shape} {dtype}"
    benchmark.extra_info["variant"] = name
    benchmark.pedantic(case.variants[name], warmup_rounds=1, rounds=5)
