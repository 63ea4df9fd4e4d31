"""The operators: one file each (maths, reference, registration, autograd, CPU kernels, public function).

`table()` lists op x backend, `use("reference")` forces a backend within a block, `impl="..."` within one call, and the
environment's OV3FAST_IMPL everywhere.
"""

# Each as itself: to be used from here.
from . import _dispatch
from . import random as random
from ._dispatch import table as table
from ._dispatch import use as use
from .adamw_ema import adamw_ema_ as adamw_ema_
from .contrastive_loss import contrastive_loss as contrastive_loss
from .flash_attention import flash_attention as flash_attention
from .flash_attention import flash_attention_qkvpacked as flash_attention_qkvpacked
from .group_norm_silu import group_norm_silu as group_norm_silu
from .latent_projection import latent_projection as latent_projection
from .layer_norm import layer_norm as layer_norm
from .linear import linear as linear
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .mlp import mlp as mlp
from .noise_projection import noise_projection as noise_projection
from .patch_embed import patch_embed as patch_embed
from .rms_norm import rms_norm as rms_norm
from .rope import rope as rope
from .swiglu import swiglu as swiglu

# Kernels that join the operators above.
from . import _attention_peers as _attention_peers  # isort: skip
from . import cpu as cpu, cuda as cuda, onednn as onednn, triton as triton  # isort: skip

BACKENDS = _dispatch.PREFERENCE
