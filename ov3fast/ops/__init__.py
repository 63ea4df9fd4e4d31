"""The operators: one file each (maths, reference, registration, autograd, public function).

`table()` lists op x backend, `use("reference")` forces a backend within a block, `impl="..."` within one call, and the
environment's OV3FAST_IMPL everywhere.
"""

from . import random
from ._dispatch import PREFERENCE as BACKENDS
from ._dispatch import table, use
from .adamw_ema import adamw_ema_
from .contrastive_loss import contrastive_loss
from .flash_attention import flash_attention, flash_attention_qkvpacked
from .group_norm_silu import group_norm_silu
from .latent_projection import latent_projection
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mlp import mlp
from .noise_projection import noise_projection
from .patch_embed import patch_embed

from . import _flops  # noqa: F401  isort: skip  (counts for FlopCounterMode)
from . import cpu, cuda, onednn, triton  # isort: skip  (their kernels join the operators defined above)

__all__ = [
    "BACKENDS",
    "adamw_ema_",
    "contrastive_loss",
    "cpu",
    "cuda",
    "flash_attention",
    "flash_attention_qkvpacked",
    "group_norm_silu",
    "latent_projection",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "noise_projection",
    "onednn",
    "patch_embed",
    "random",
    "table",
    "triton",
    "use",
]
