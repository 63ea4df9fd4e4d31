"""Sample calls of every operator: at a tiny size for the interpreter (a few programs per launch), and at a size of real training."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ov3fast import ops, testing


@dataclass(frozen=True, eq=False)
class Sample:
    op: str
    """As ops.table() names it."""
    label: str
    make: Callable[..., Sequence[Tensor]]
    """Sizes -> arguments: floating tensors in float64, others as they are."""
    function: Callable[..., Any]
    plain: Callable[..., Any]
    """The reference with the same arguments."""
    tiny: tuple[int, ...]
    real: tuple[int, ...]
    single: tuple[int, ...] = ()
    """Positions of arguments that stay float32 when the others are narrower."""
    differentiable: bool = True
    """If not, only the outputs are compared."""
    refused: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    """Backend -> dtypes of this call that it does not take, by its contract."""

    @property
    def name(self) -> str:
        return f"{self.op}-{self.label}" if self.label else self.op

    def inputs(self, size: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Arguments of the given size ("tiny" or "real") and dtype."""
        made = self.make(*getattr(self, size))
        kinds = [torch.float32 if i in self.single and dtype.itemsize < 4 else dtype for i in range(len(made))]
        return [(v.to(kind) if v.is_floating_point() else v).to(device) for v, kind in zip(made, kinds, strict=True)]

    def leaves(self, inputs: Sequence[Tensor]) -> list[int]:
        """Positions of the arguments that get gradients."""
        return [i for i, v in enumerate(inputs) if v.is_floating_point()] if self.differentiable else []

    def results(
        self, inputs: Sequence[Tensor], function: Callable[..., Any] | None = None, upstream: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Outputs, then the gradients of all floating arguments. Calls that repeat take one `upstream`: large ones take a second to draw."""
        leaves = {i: inputs[i].detach().requires_grad_() for i in self.leaves(inputs)}
        outputs = _listed((function or self.function)(*[leaves.get(i, v) for i, v in enumerate(inputs)]))
        if not leaves:
            return outputs
        upstream = upstream_of(outputs) if upstream is None else [u.to(o) for u, o in zip(upstream, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return [*(value.detach() for value in outputs), *grads]

    def upstream(self, inputs: Sequence[Tensor], function: Callable[..., Any] | None = None) -> list[Tensor]:
        """Of the outputs for these arguments."""
        with torch.no_grad():
            return upstream_of(_listed((function or self.function)(*inputs))) if self.differentiable else []

    def assert_parity(self, size: str, dtype: torch.dtype, device: str = "cpu") -> None:
        """Outputs and gradients within the error budget of ov3fast.testing."""
        narrow = self.inputs(size, dtype, device)
        upstream = self.upstream(narrow, self.plain)
        budget = testing.Budget(lambda values: self.results(values, self.plain, upstream), narrow)
        budget.check(self.results(narrow, upstream=upstream))

    def takes(self, backend: str, dtype: torch.dtype) -> bool:
        """Whether this call is one for the backend, by its contract."""
        return backend in ops.table()[self.op] and dtype not in self.refused.get(backend, ())


def upstream_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Upstream gradients that depend on shapes alone."""
    return [testing.make(*value.shape, seed=77 + n).to(value) for n, value in enumerate(outputs)]


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def reference(op: str) -> Callable[..., Any]:
    return importlib.import_module(f"ov3fast.ops.{op}").reference


def make(*shapes: tuple[int, ...]) -> list[Tensor]:
    """One tensor per shape; the last axis of a matrix after the first is taken for an inner dimension, so that products stay near 1."""
    return [
        testing.make(*shape, seed=i, scale=shape[-1] ** -0.5 if i and len(shape) == 2 else 1.0)
        for i, shape in enumerate(shapes)
    ]


ALL = (torch.float32, torch.bfloat16, torch.float16)
RNG = ops.random.make_rng(5, 3)


# ---- arguments -------------------------------------------------------------------------------------------------------


def qkv(batch, queries, keys, heads, head_dim):
    return make((batch, queries, heads, head_dim), (batch, keys, heads, head_dim), (batch, keys, heads, head_dim))


def packed(batch, tokens, heads, head_dim):
    return make((batch, tokens, 3, heads, head_dim))


def features(batch, width):
    image, text = testing.make(batch, width), testing.make(batch, width, seed=1)
    return [image, text, torch.tensor(7.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)]


def tokens_and_labels(tokens, width, classes):
    labels = torch.arange(tokens) * 7919 % classes
    labels[1::5] = -100
    return [*make((tokens, width), (classes, width)), labels]


def normed(rows, width):
    return [
        testing.make(rows, width),
        testing.make(width, seed=1) + 1,
        testing.make(width, seed=2),
        testing.make(rows, width, seed=3),
    ]


def images(batch, channels, height, width):
    x = testing.make(batch, channels, height, width)
    return [x, testing.make(channels, seed=1) + 1, testing.make(channels, seed=2)]


def moments(batch, channels, side, width):
    tokens = 1 + side * side // 4
    shapes = (batch, 2 * channels, side, side), (width, 4 * channels), (width,), (tokens, width), (width,)
    return [*make(*shapes), RNG]


def noised(batch, tokens, width, features):
    z, weight, bias = make((batch, tokens, width), (features, width), (features,))
    return [z, testing.make(batch, seed=5).abs(), weight, bias, RNG]


def parameters(*sizes):
    """params, grads, m, v, ema, one after the other."""
    kinds = [[testing.make(size, seed=10 * kind + i) for i, size in enumerate(sizes)] for kind in range(5)]
    return [t.abs() if kind == 3 else t for kind, tensors in enumerate(kinds) for t in tensors]


# ---- calls -----------------------------------------------------------------------------------------------------------


def pair(op: str, call: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(ours, the reference), each called by call(function, *arguments)."""
    return (lambda *a: call(getattr(ops, op), *a)), (lambda *a: call(reference(op), *a))


def attention(**options):
    return pair("flash_attention", lambda f, q, k, v: f(q, k, v, **options))


def attention_packed(**options):
    plain = reference("flash_attention")
    return lambda x: ops.flash_attention_qkvpacked(x, **options), lambda x: plain(*x.unbind(2), **options)


def contrastive(kind):
    if kind == "softmax":
        return pair("contrastive_loss", lambda f, image, text, scale, bias: f(image, text, scale, kind=kind) + 0 * bias)
    return pair("contrastive_loss", lambda f, image, text, scale, bias: f(image, text, scale, kind=kind, logit_bias=bias))


def in_chunks(function):
    """The same call on the reference's backend."""

    def call(*arguments):
        with ops.use("reference"):
            return function(*arguments)

    return call


def embed(moments, weight, bias, position, cls, rng):
    return (moments, weight, bias, position, cls), dict(scale=0.36, shift=0.12, moments=True, rng=rng)


def optimizer_step(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors):
        count = len(tensors) // 5
        lists = [[t.clone() for t in tensors[i * count : (i + 1) * count]] for i in range(5)]
        norm = function(*lists, step=3, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_norm=1.0, ema_decay=0.99)
        return [norm, *lists[0], *lists[2], *lists[3], *lists[4]]

    return call


SAMPLES = [
    Sample("flash_attention", "", qkv, *attention(), (1, 70, 90, 2, 24), (8, 1024, 1024, 12, 64)),
    Sample("flash_attention", "causal", qkv, *attention(causal=True, prefix_len=5), (2, 130, 140, 1, 72), (4, 777, 1029, 8, 72)),
    Sample("flash_attention_qkvpacked", "", packed, *attention_packed(), (2, 75, 2, 16), (16, 257, 12, 64)),
    Sample("contrastive_loss", "softmax", features, *contrastive("softmax"), (150, 40), (4096, 768), single=(2, 3)),
    Sample("contrastive_loss", "sigmoid", features, *contrastive("sigmoid"), (150, 40), (4096, 768), single=(2, 3)),
    Sample(
        "linear_cross_entropy", "", tokens_and_labels,
        *pair("linear_cross_entropy", lambda f, h, w, labels: f(h, w, labels, reduction="none")), (20, 24, 100), (2048, 768, 32000),
    ),
    Sample(
        "linear_cross_entropy_total", "", tokens_and_labels,
        *pair("linear_cross_entropy", lambda f, h, w, labels: f(h, w, labels)), (20, 24, 100), (2048, 768, 32000),
    ),
    Sample("layer_norm", "", normed, *pair("layer_norm", lambda f, x, w, b, _: f(x, w, b) + 0 * _), (37, 130), (16448, 768)),
    Sample("layer_norm", "residual", normed, *pair("layer_norm", lambda f, x, w, b, r: f(x, w, b, residual=r)), (37, 130), (8224, 1152)),
    Sample("linear", "", lambda m, n, k: make((m, k), (n, k), (n,)), *pair("linear", lambda f, *a: f(*a)), (150, 140, 72), (16448, 2304, 768)),
    *(
        Sample(
            "mlp", activation, lambda rows, width, hidden: make((rows, width), (hidden, width), (hidden,), (width, hidden), (width,)),
            *pair("mlp", lambda f, *a, activation=activation: f(*a, activation=activation)), (70, 40, 150), (8224, 768, 3072),
        )
        for activation in ("gelu", "gelu_tanh")
    ),
    Sample("patch_embed", "", moments, *pair("patch_embed", lambda f, *a: f(*embed(*a)[0], **embed(*a)[1])), (3, 4, 12, 72), (64, 16, 32, 768)),
    Sample(
        "noise_projection", "", noised, *pair("noise_projection", lambda f, *a: f(*a[:4], rng=a[4])), (3, 50, 40, 72), (64, 256, 768, 768),
        single=(1,),
    ),
    Sample(
        "latent_projection", "", lambda batch, side, width, channels: make((batch, side * side, width), (4 * channels, width), (4 * channels,)),
        *pair("latent_projection", lambda f, t, w, b: f(t, w, b, grid=(int(t.shape[1] ** 0.5),) * 2)), (3, 6, 40, 4), (64, 16, 768, 16),
    ),
    Sample(
        "group_norm_silu", "", images, *pair("group_norm_silu", lambda f, x, w, b: f(x, 4, w, b)), (2, 12, 13, 11), (4, 128, 128, 128),
        refused={"cuda": ALL},
    ),
    Sample(
        "group_norm_silu", "channels_last", images,
        *pair("group_norm_silu", lambda f, x, w, b: f(x.contiguous(memory_format=torch.channels_last), 4, w, b)),
        (2, 12, 13, 11), (4, 128, 128, 128),
    ),
    Sample(
        "random_normal", "", lambda *shape: [RNG, testing.make(*shape)], lambda rng, like: ops.random.normal(like.shape, rng, like.dtype),
        lambda rng, like: ops.random.reference(like.shape, rng, like.dtype), (3, 7, 1001), (64, 256, 768), differentiable=False,
    ),
    Sample(
        "adamw_ema_", "", parameters, optimizer_step(ops.adamw_ema_), optimizer_step(reference("adamw_ema")), (5, 1001, 64, 1),
        (768 * 3072, 768, 768 * 768, 1, 33), single=tuple(range(8, 25)), differentiable=False, refused={"cuda": (torch.float16,)},
    ),
]  # fmt: skip

# At sizes that the launchers take in several chunks, the last one smaller; against the reference's backend, which takes chunks too: the
# plain reference would need all logits at once, in float64.
ACROSS_CHUNKS = [
    *(
        Sample("contrastive_loss", f"{kind}-{rows}", features, contrastive(kind)[0], in_chunks(contrastive(kind)[0]), (150, 40), (rows, 768), single=(2, 3))
        for kind in ("softmax", "sigmoid")
        for rows in (16384, 40000)
    ),
    *(
        Sample(op, "5000", tokens_and_labels, *pair("linear_cross_entropy", call), (20, 24, 100), (5000, 768, 32000))
        for op, call in (
            ("linear_cross_entropy", lambda f, h, w, labels: f(h, w, labels, reduction="none")),
            ("linear_cross_entropy_total", lambda f, h, w, labels: f(h, w, labels)),
        )
    ),
]  # fmt: skip


def with_backend(name: str, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """The samples whose operator has this backend, and that it takes in this dtype."""
    return [sample for sample in SAMPLES if sample.takes(name, dtype)]
