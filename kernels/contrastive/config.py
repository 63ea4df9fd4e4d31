"""Constants of the contrastive loss, its schedule by width, and its kernels' configurations."""

from torch import Tensor

from ..lib.config import ANY, TABLE, Config

FEW = 512
"""Up to this many columns, rounding errors of 16-bit gradients do not average out, so every backend computes with float32 features."""

WIDEST = 2048
"""Up to this width few.py takes few pairs: one program adds up a whole product."""

GAIN = 256.0
"""Scaling factor of float16 gradients with respect to logits, whose small values would underflow."""

# Size classes: "cublas": products are read instead of computed; "maxima": each row and column has its own shift. Both tile kernels use the same BLOCK_K
# per dtype, so that the backward recomputes the forward's logits bit for bit.
TABLE["contrastive_statistics"] = {
    (ANY, ANY, ANY): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=3),
    (ANY, ANY, "sm_90"): Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=3),
    ("fp32", ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=2),
    ("fp32", ANY, "sm_80"): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, warps=4, stages=2),
    (ANY, "maxima", "sm_90"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=3),
    (ANY, "cublas", ANY): Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=1),
}
TABLE["contrastive_gradients"] = {
    (ANY, ANY, ANY): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=3),
    (ANY, ANY, "sm_80"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=4, stages=3),
    (ANY, ANY, "sm_90"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=4, stages=3),
    ("fp32", ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=2),
    (ANY, "cublas", ANY): Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=1),
}
# A few pairs: small tiles, so that there are more programs. Both kernels take the first's, since they must compute the same bits; FEW / BLOCK, the most
# tiles along a side, is a power of two.
TABLE["contrastive_few_statistics"] = TABLE["contrastive_few_gradients"] = {
    (ANY, ANY, ANY): Config({"BLOCK": 32, "BLOCK_K": 32}, warps=4, stages=3)
}
TABLE["contrastive_few_loss"] = {(ANY, ANY, ANY): Config({"BLOCK": FEW}, warps=8, stages=1)}
TABLE["contrastive_features"] = {(ANY, ANY, ANY): Config({"BLOCK_R": 16, "BLOCK_D": 256}, warps=8, stages=1)}
TABLE["contrastive_project"] = {(ANY, ANY, ANY): Config({"BLOCK_R": 8, "BLOCK_D": 128, "BLOCK_SUMS": 2048}, warps=4, stages=1)}
TABLE["contrastive_terms"] = {(ANY, ANY, ANY): Config({"BLOCK": 2048, "BLOCK_P": 32, "BLOCK_D": 64}, warps=8, stages=1)}
TABLE["contrastive_errors"] = {(ANY, ANY, ANY): Config({"BLOCK_P": 32, "BLOCK": 64}, warps=4, stages=1)}
TABLE["contrastive_total"] = {(ANY, ANY, ANY): Config({"BLOCK": 2048}, warps=8, stages=1)}
TABLE["contrastive_merge"] = {(ANY, ANY, ANY): Config({"BLOCK": 128}, warps=1, stages=1)}

SCHEDULES = {
    (ANY, "wide"): "chunked",
    (ANY, "huge"): "cublas",
    ("fp32", "huge"): "chunked",
}
"""(dtype, size class) -> schedule in launch.py. Size classes by width: wide up to 2048, huge beyond."""


def is_few(image: Tensor) -> bool:
    """Whether few.py takes the pairs of image [..., N, D], if no others are elsewhere."""
    pairs, width = image.shape[-2:]
    return 0 < pairs <= FEW and 0 < width <= WIDEST
