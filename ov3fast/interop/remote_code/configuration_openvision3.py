"""OpenVision 3's configs for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class OpenVision3VisionConfig(PretrainedConfig):
    """The vision tower: a frozen VAE's encoder and the ViT on its latents.

    image_size and patch_size are in pixels, latent_patch_size in latents. latent_scale, latent_shift: latents = (z - shift) * scale.
    learned_positions: the weights hold their position embedding; False: it is computed. post_ln: the norm is applied to the tokens that
    come out. vae_config: of diffusers' AutoencoderKL.
    """

    model_type = "openvision3_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        image_size: int = 256,
        patch_size: int = 16,
        latent_patch_size: int = 2,
        latent_channels: int = 16,
        num_channels: int = 3,
        projection_dim: int = 768,
        layer_norm_eps: float = 1e-6,
        hidden_act: str = "gelu",
        final_ln_after_pool: bool = True,
        post_ln: bool = False,
        learned_positions: bool = False,
        latent_convention: str = "openvision3",
        latent_scale: float = 0.3611,
        latent_shift: float = 0.0,
        initializer_range: float = 0.02,
        vae_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.latent_patch_size = latent_patch_size
        self.latent_channels = latent_channels
        self.num_channels = num_channels
        self.projection_dim = projection_dim
        self.layer_norm_eps = layer_norm_eps
        self.hidden_act = hidden_act
        self.final_ln_after_pool = final_ln_after_pool
        self.post_ln = post_ln
        self.learned_positions = learned_positions
        self.latent_convention = latent_convention
        self.latent_scale = latent_scale
        self.latent_shift = latent_shift
        self.initializer_range = initializer_range
        self.vae_config = vae_config
        super().__init__(**kwargs)


class OpenVision3TextConfig(PretrainedConfig):
    """The text encoder: bidirectional, pooled at its last, first or mean position (`pool`)."""

    model_type = "openvision3_text_model"
    base_config_key = "text_config"

    def __init__(
        self,
        hidden_size: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        intermediate_size: int = 2048,
        vocab_size: int = 32000,
        max_position_embeddings: int = 80,
        projection_dim: int = 768,
        layer_norm_eps: float = 1e-6,
        hidden_act: str = "gelu_pytorch_tanh",
        pool: str = "last",
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.projection_dim = projection_dim
        self.layer_norm_eps = layer_norm_eps
        self.hidden_act = hidden_act
        self.pool = pool
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class OpenVision3Config(PretrainedConfig):
    """Both towers. sigmoid: logits have a bias too (SigLIP's loss)."""

    model_type = "openvision3"
    sub_configs = {"vision_config": OpenVision3VisionConfig, "text_config": OpenVision3TextConfig}

    def __init__(
        self,
        vision_config: dict[str, Any] | OpenVision3VisionConfig | None = None,
        text_config: dict[str, Any] | OpenVision3TextConfig | None = None,
        projection_dim: int = 768,
        logit_scale_init_value: float = 2.6592,
        sigmoid: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(vision_config, OpenVision3VisionConfig):
            vision_config = OpenVision3VisionConfig(**(vision_config or {}))
        if not isinstance(text_config, OpenVision3TextConfig):
            text_config = OpenVision3TextConfig(**(text_config or {}))
        self.vision_config = vision_config
        self.text_config = text_config
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        self.sigmoid = sigmoid
        super().__init__(**kwargs)


__all__ = ["OpenVision3Config", "OpenVision3TextConfig", "OpenVision3VisionConfig"]
