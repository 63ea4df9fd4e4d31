"""Two generators over latents [B, C, H, W]: a deep, narrow trunk, and a wide two-block head that also takes x_t (DiT^DH).

DDT (RAE src/stage2/models/DDT.py, used in the paper): adaLN with shift throughout; predicts the velocity, or x if configured.

    trunk:  z = blocks(embed(x_t) + positions;  c),   c = silu(t_emb + y_emb)
    head:   v = final(blocks(embed'(x_t);  s);  s),   s = project(silu(t_emb + z)), one condition per token

InContextDDT (RAEv2): no adaLN in the trunk; time and class (or text) tokens are prepended to the image tokens; RMS norm on q
and k; predicts x. A base head after trunk block 8 also predicts x; internal guidance pushes away from it.

Conditions are class labels int64 [B] or a text tower's tokens float [B, L, E]. Legend: B batch, C channels, H, W grid size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ov3fast.generation import layers
from ov3fast.generation.flow import Denoiser, velocity_of
from ov3fast.models.transformer import Linear

TIME_TOKENS, CLASS_TOKENS = 4, 8
BASE_BLOCK = 8


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a generator. channels, height, width: of the latents; pairs are (trunk, head). classes: 0 for conditioning on
    text with text_width channels. predicts_x: the final layer outputs x, not the velocity, as the in-context generator always
    does. ValueError for inconsistent sizes."""

    channels: int
    height: int
    width: int
    widths: tuple[int, int]
    depths: tuple[int, int]
    heads: tuple[int, int]
    classes: int = 1000
    text_width: int = 0
    in_context: bool = False
    predicts_x: bool = False

    def __post_init__(self) -> None:
        if (self.classes > 0) == (self.text_width > 0):
            raise ValueError(
                f"GeneratorConfig: give classes or text_width, one of them; got classes={self.classes}, text_width={self.text_width}"
            )
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % (4 * heads):
                raise ValueError(f"GeneratorConfig: a width must be a multiple of 4 x its heads; got {width} and {heads} heads")
        if self.widths[1] < self.channels:
            # RAE, section 4: a denoiser narrower than the tokens can't fit even one image.
            raise ValueError(
                f"GeneratorConfig: the head must be at least as wide as the latents' {self.channels} channels, got {self.widths[1]}"
            )

    @property
    def clamped(self) -> bool:
        """Whether the velocity is derived from a prediction of x, with t clamped to at least flow.SMALLEST_T."""
        return self.predicts_x or self.in_context

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES = {
    "S": {"widths": (384, 2048), "depths": (12, 2), "heads": (6, 16)},
    "XL": {"widths": (1152, 2048), "depths": (28, 2), "heads": (16, 16)},
    "XL-context": {"widths": (1440, 2048), "depths": (28, 2), "heads": (20, 16), "in_context": True},
}
"""RAE's two sizes, and RAEv2's."""


def generator_config(size: str, channels: int = 768, height: int = 16, width: int = 16, **fields: Any) -> GeneratorConfig:
    """Config of a published size for latents [channels, height, width]. ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"generator_config: size must be one of {', '.join(SIZES)}, got {size!r}")
    return GeneratorConfig(channels, height, width, **{**SIZES[size], **fields})


def build_generator(config: GeneratorConfig) -> DDT | InContextDDT:
    return (InContextDDT if config.in_context else DDT)(config)


class _Generator(nn.Module):
    """Shared by both generators: embeddings of x_t, time and condition, and the wide head."""

    head_rotation: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        trunk, head = config.widths
        self.embed = Linear(config.channels, trunk)
        self.embed_head = Linear(config.channels, head)
        self.time = layers.TimeEmbedding(trunk)
        # One extra row: the null class.
        self.condition = nn.Embedding(config.classes + 1, trunk) if config.classes else Linear(config.text_width, trunk)
        self.null_text = nn.Parameter(torch.zeros(config.text_width)) if config.text_width else None
        self.project = Linear(trunk, head)
        self.trunk = nn.ModuleList(
            layers.Block(trunk, config.heads[0], conditioned=not config.in_context, qk_norm=config.in_context)
            for _ in range(config.depths[0])
        )
        self.head = nn.ModuleList(
            layers.Block(head, config.heads[1], conditioned=True, qk_norm=config.in_context) for _ in range(config.depths[1])
        )
        self.final = layers.FinalLayer(head, config.channels, conditioned=True)
        angles = layers.rotary_angles(config.height, config.width, head // config.heads[1])
        self.register_buffer("head_rotation", layers.rotation(angles), persistent=False)

    def _initialise(self) -> None:
        """Xavier-uniform matrices and zero biases; modulation and final layers start at zero (DiT)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and (name.endswith("modulation") or name in ("final.linear", "base.linear")):
                nn.init.zeros_(module.weight)
        for linear in (self.time.fc1, self.time.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.condition.weight, std=0.02)

    def null(self, condition: Tensor) -> Tensor:
        """The null condition (no class or no text) in the shape of `condition`."""
        if self.null_text is None:
            return torch.full_like(condition, self.config.classes)
        return self.null_text.to(condition.dtype).expand_as(condition)

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """The null condition where `dropped`, bool [B], is True, else the condition: classifier-free guidance training."""
        return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), self.null(condition), condition)

    def denoiser(self, condition: Tensor) -> Denoiser:
        """The velocity under a fixed condition, for flow.sample."""
        return lambda x, t: self(x, t, condition)[0]

    def _checked(self, x_t: Tensor) -> Tensor:
        expected = (self.config.channels, self.config.height, self.config.width)
        if x_t.ndim != 4 or tuple(x_t.shape[1:]) != expected:
            raise ValueError(
                f"{type(self).__name__}: x_t must have shape [B, {', '.join(map(str, expected))}]; got {tuple(x_t.shape)}"
            )
        return x_t.flatten(2).transpose(1, 2)

    def _embedded(self, condition: Tensor) -> Tensor:
        """Embedded labels [B, 1, D] or text tokens [B, L, D]."""
        if self.config.classes:
            if condition.is_floating_point() or condition.ndim != 1:
                raise ValueError(
                    f"{type(self).__name__}: labels must be integers [B]; got {condition.dtype} {tuple(condition.shape)}"
                )
            return self.condition(condition)[:, None]
        if condition.ndim != 3 or condition.shape[2] != self.config.text_width:
            raise ValueError(
                f"{type(self).__name__}: text must have shape [B, L, {self.config.text_width}]; got {tuple(condition.shape)}"
            )
        return self.condition(condition)

    def _wide(self, x_BNC: Tensor, z_BND: Tensor, time: Tensor) -> Tensor:
        """The head's prediction [B, N, C]."""
        s = self.project(F.silu(time[:, None] + z_BND))
        x = self.embed_head(x_BNC)
        for block in self.head:
            x = block(x, self.head_rotation, s)
        return self.final(x, s)


class DDT(_Generator):
    """(x_t, t [B], condition) -> (velocity,). dropped, bool [B]: samples with null condition. ValueError for bad shapes."""

    rotation: Tensor
    positions: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        trunk = config.widths[0]
        angles = layers.rotary_angles(config.height, config.width, trunk // config.heads[0])
        self.register_buffer("rotation", layers.rotation(angles), persistent=False)
        self.register_buffer("positions", layers.sincos_positions(config.height, config.width, trunk), persistent=False)
        self._initialise()

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, ...]:
        x_BNC = self._checked(x_t)
        time = self.time(t)
        condition = condition if dropped is None else self.drop(condition, dropped)
        c = F.silu(time[:, None] + self._embedded(condition).mean(1, keepdim=True))
        z = self.embed(x_BNC) + self.positions
        for block in self.trunk:
            z = block(z, self.rotation, c)
        found = self._wide(x_BNC, z, time).transpose(1, 2).reshape(x_t.shape)
        return (velocity_of(x_t, found, t) if self.config.predicts_x else found,)


class InContextDDT(_Generator):
    """(x_t, t [B], condition) -> (velocity, base head's velocity), both from x-predictions. dropped, errors: as in DDT."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        # Trunks of 8 blocks or fewer have the base head halfway instead of after RAEv2's block 8.
        self.base_block = BASE_BLOCK if config.depths[0] > BASE_BLOCK else max(1, config.depths[0] // 2)
        trunk = config.widths[0]
        self.time_tokens = nn.Parameter(torch.randn(TIME_TOKENS, trunk) * 0.02)
        self.class_tokens = nn.Parameter(torch.randn(CLASS_TOKENS if config.classes else 1, trunk) * 0.02)
        self.base = layers.FinalLayer(trunk, config.channels, conditioned=False)
        self._initialise()

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, ...]:
        x_BNC = self._checked(x_t)
        time = self.time(t)
        condition = condition if dropped is None else self.drop(condition, dropped)
        context = torch.cat([time[:, None] + self.time_tokens, self._embedded(condition) + self.class_tokens], 1)
        prefix = context.shape[1]
        config = self.config
        angles = layers.rotary_angles(config.height, config.width, config.widths[0] // config.heads[0], prefix).to(x_t.device)
        rotation = layers.rotation(angles)
        z = torch.cat([context, self.embed(x_BNC)], 1)
        base = z
        for number, block in enumerate(self.trunk, 1):
            z = block(z, rotation)
            if number == self.base_block:
                base = self.base(z[:, prefix:])
        full = self._wide(x_BNC, z[:, prefix:], time)
        return tuple(velocity_of(x_t, x_hat.transpose(1, 2).reshape(x_t.shape), t) for x_hat in (full, base))
