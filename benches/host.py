"""Host time of a call: the overhead of Python, the dispatcher and autograd around the kernels, measured on tiny tensors.

    python -m benches.host [--backend cpu | triton] [--before OLD_TREE] [--out benches/results/host-BACKEND.csv]

The Triton backend needs no GPU for this: it runs on CPU tensors, its kernels are compiled for sm_90, and the driver's launch function is replaced by
one that returns at once (tools/gpu/pretend.py). PyTorch's own kernels between ours (products, sums) then take CPU host time, not that of a GPU; "products
aside" is what a call takes without them.

"forward + backward" is one call and one torch.autograd.grad, which alone takes some 40 us; "in a chain" is the cost of one more call in a model with a
single backward pass: the difference between a chain of 12 calls and of one, per call. "beside others" is the same for calls of which none takes another's
result.

"floor" is what PyTorch alone takes for such a call: a trivial torch.autograd.Function that allocates as often as the operator's kernels require,
makes the products that the operator leaves to PyTorch, and launches nothing. "PyTorch's own" is the same formula with its own operators, whose autograd
nodes are written in C++.

The time is the thread's CPU time, the minimum over many rounds, so a busy machine has little effect. With --before, another checkout (with built
kernels) is measured alternately with this one, in a separate process, and both appear in the table.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

FIELDS = ("op", "direction", "before_us", "after_us", "ratio", "cpu", "torch")
ROUNDS = 2
CHAIN = 12
"""Number of calls, each on the result of the previous one."""
NEEDED = {"layer_norm": (4, 0, 4, 0, 0), "linear": (0, 1, 1, 1, 1), "flash_attention": (2, 0, 5, 0, 0), "mlp": (3, 0, 7, 0, 0)}
"""A forward's allocations and linear layers of PyTorch's; a backward's allocations, products with a weight, and products of two activations."""


def least(run: Callable[[], object], rounds: int = 40, inner: int = 25) -> float:
    """Microseconds per call."""
    for _ in range(inner):
        run()
    times = []
    for _ in range(rounds):
        start = time.thread_time_ns()
        for _ in range(inner):
            run()
        times.append((time.thread_time_ns() - start) / inner / 1e3)
    return min(times)


def measure(backend: str) -> dict[str, float]:
    """ "op: direction" -> microseconds, for the imported ov3fast."""
    from ov3fast import ops

    torch.set_num_threads(1)
    gc.disable()
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(8, 8), torch.randn(8)
    calls = {
        "layer_norm": (ops.layer_norm, (x, bias + 1, bias)),
        "linear": (ops.linear, (x, weight, bias)),
        "flash_attention": (ops.flash_attention, tuple(torch.randn(1, 2, 1, 8) for _ in range(3))),
        "mlp": (ops.mlp, (x, weight, bias, weight + 1, bias + 1)),
    }
    found = {}
    with pretended() if backend == "triton" else nullcontext():
        if backend == "triton":
            found |= whole("linear as chosen", *calls["linear"])  # which is PyTorch's own
            large = {
                "mlp": calls["mlp"],
                "contrastive_loss": (ops.contrastive_loss, pairs(16)),
                "linear_cross_entropy": further(ops)["linear_cross_entropy"],
            }
            with ops.use(backend), of_large_calls():
                for name, call in large.items():
                    found |= (whole if name == "mlp" else once)(f"{name} of large calls", *call)
            with ops.use(backend), of_large_calls(), products_aside():
                for name, call in large.items():
                    found |= once(f"{name} of large calls, products aside", *call)
        for name, (function, values) in calls.items():
            with ops.use(backend):
                found |= whole(name, function, values)
            leaves, upstream = [value.clone().requires_grad_() for value in values], torch.ones_like(PYTORCH[name](*values))
            trivial = trivial_function(*NEEDED[name])
            found[f"{name}: floor of forward + backward"] = least(
                lambda f=trivial, v=leaves, g=upstream: torch.autograd.grad(f(*v), v, g)
            )
            found[f"{name}: floor, in a chain"] = in_a_chain(trivial, values, upstream)
            own = PYTORCH[name]
            found[f"{name}: PyTorch's own, forward + backward"] = least(
                lambda f=own, v=leaves, g=upstream: torch.autograd.grad(f(*v), v, g)
            )
            found[f"{name}: PyTorch's own, in a chain"] = in_a_chain(own, values, upstream)
        with ops.use(backend):
            for name, (function, values) in further(ops).items():
                found |= once(name, function, values)
    return found


def further(ops: Any) -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Calls of the other operators, of the tensors that training differentiates."""
    x, weight, bias = torch.randn(2, 4, 8), torch.randn(8, 8), torch.randn(8)
    qkv, cos, sin = torch.randn(1, 4, 3, 2, 8), torch.randn(4, 4), torch.randn(4, 4)
    sigma, rng = torch.rand(2), torch.tensor([1, 2])
    moments, labels = torch.randn(2, 8, 8, 8), torch.tensor([[1, 2, 3, -100], [1, 2, 3, 4]])
    return {
        "layer_norm + residual": (lambda x, h, w, b: ops.layer_norm(x, w, b, residual=h), (x, x + 1, bias + 1, bias)),
        "rms_norm": (ops.rms_norm, (x, bias)),
        "rms_norm + residual": (lambda x, h, w: ops.rms_norm(x, w, residual=h), (x, x + 1, bias)),
        "flash_attention_qkvpacked": (ops.flash_attention_qkvpacked, (qkv,)),
        "swiglu": (ops.swiglu, (x,)),
        "rope": (lambda qkv, q, k: ops.rope(qkv, cos, sin, q, k), (qkv, bias, bias + 1)),
        "patch_embed": (
            lambda *weights: ops.patch_embed(moments, *weights, moments=True, rng=rng),
            (torch.randn(8, 16), bias, torch.randn(17, 8), bias + 1),
        ),
        "noise_projection": (lambda z, w, b: ops.noise_projection(z, sigma, w, b, rng=rng), (x, weight, bias)),
        "latent_projection": (lambda tokens, w, b: ops.latent_projection(tokens, w, b, grid=(2, 2)), (x, weight, bias)),
        "group_norm_silu": (lambda x, w, b: ops.group_norm_silu(x, 2, w, b), (torch.randn(2, 8, 4, 4), bias, bias + 1)),
        "contrastive_loss": (ops.contrastive_loss, pairs(4)),
        "linear_cross_entropy": (lambda hidden, w: ops.linear_cross_entropy(hidden, w, labels), (x, torch.randn(16, 8))),
    }


def pairs(count: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(count, 8), torch.randn(count, 8), torch.tensor(2.0)


@contextmanager
def pretended() -> Iterator[None]:
    """A pretended GPU's host, which looks neither at labels, whose assertion is queued, nor at the gradient of a loss, and zeroes no padding."""
    from ov3fast.kernels import linear_cross_entropy
    from ov3fast.kernels.lib import products
    from ov3fast.ops.linear_cross_entropy import _total
    from tools.gpu import pretend

    unseen = mock.patch.object(_total, "shortcut", lambda *_: None)
    queued = mock.patch.object(linear_cross_entropy, "_assert_fine", lambda fine, *_: torch._assert_async(fine.fill_(1)))
    unpadded = mock.patch.object(products, "_padding_is_read", lambda _: False)
    with pretend.host(), unseen, queued, unpadded:
        yield


@contextmanager
def products_aside() -> Iterator[None]:
    """PyTorch's products allocate what they return, and do nothing."""
    from ov3fast import _plans

    def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return a.new_empty_strided((a.shape[0], b.shape[1]), (b.shape[1], 1)) if out is None else out

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows, tokens, width = *x.shape[:-1], len(weight)
        return x.new_empty_strided((rows, tokens, width), (tokens * width, width, 1))

    with mock.patch.dict(_plans.BINDINGS, {"mm": mm, "linear": linear}):
        yield


@contextmanager
def of_large_calls() -> Iterator[None]:
    """The launches of calls that are too large for the fewest, on tiny tensors."""
    from ov3fast.kernels.lib import gemm
    from ov3fast.ops import _dispatch, triton

    with mock.patch.object(gemm, "is_small", lambda *_: False), mock.patch.object(triton, "is_few", lambda *_: False):
        yield
    _dispatch.forget_choices()  # and the plans made within


def whole(name: str, function: Callable[..., torch.Tensor], values: tuple[torch.Tensor, ...]) -> dict[str, float]:
    upstream = torch.ones_like(function(*values))
    return once(name, function, values) | {f"{name}: forward + backward, in a chain": in_a_chain(function, values, upstream)}


def once(name: str, function: Callable[..., Any], values: tuple[torch.Tensor, ...]) -> dict[str, float]:
    leaves = [value.clone().requires_grad_() for value in values]
    upstream = [torch.ones_like(made) for made in as_tuple(function(*leaves))]
    return {
        f"{name}: forward": least(lambda: function(*values)),
        f"{name}: forward + backward": least(lambda: torch.autograd.grad(as_tuple(function(*leaves)), leaves, upstream)),
        f"{name}: forward + backward, beside others": beside_others(function, values),
    }


def of_one_more(run: Callable[[int], None]) -> float:
    """Microseconds that run(calls) takes longer per further call."""
    return (least(lambda: run(CHAIN), inner=5) - least(lambda: run(1))) / (CHAIN - 1)


def beside_others(function: Callable[..., Any], values: tuple[torch.Tensor, ...]) -> float:
    """Microseconds that one more call on tensors of its own adds to a step with a single backward pass."""
    leaves = [[value.clone().requires_grad_() for value in values] for _ in range(CHAIN)]
    upstream = [torch.ones_like(made) for made in as_tuple(function(*leaves[0]))]

    def run(calls: int) -> None:
        made = [made for own in leaves[:calls] for made in as_tuple(function(*own))]
        torch.autograd.grad(made, [leaf for own in leaves[:calls] for leaf in own], upstream * calls)

    return of_one_more(run)


def as_tuple(made: Any) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _attention(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


PYTORCH = {
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, (8,), weight, bias),
    "linear": F.linear,
    "flash_attention": _attention,
    "mlp": lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
}


def trivial_function(
    allocated: int, layers: int, allocated_back: int, inputs: int, weights: int
) -> Callable[..., torch.Tensor]:
    """(*inputs) -> something like the first; saves its inputs. See NEEDED."""

    def allocate(likes: tuple[torch.Tensor, ...], count: int) -> list[torch.Tensor]:
        return [torch.empty_like(likes[i % len(likes)]) for i in range(count)]

    class Trivial(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            made = allocate(tensors, allocated)
            for _ in range(layers):
                y = F.linear(*tensors[:3])
            return y if layers else made[0]

        @staticmethod
        def backward(ctx, grad):
            tensors = ctx.saved_tensors
            made, (x, weight, *_) = allocate(tensors, allocated_back), tensors
            for _ in range(inputs):
                torch.matmul(grad, weight)
            for _ in range(weights):
                torch.mm(grad.view(-1, 8).t(), x.view(-1, 8))
            return (*made, *tensors[len(made) :])[: len(tensors)]

    return Trivial.apply


def in_a_chain(function: Callable[..., torch.Tensor], values: tuple[torch.Tensor, ...], upstream: torch.Tensor) -> float:
    """Microseconds that one more call adds to a forward and backward pass."""
    first = values[0].clone().requires_grad_()
    others = [[value.clone().requires_grad_() for value in values[1:]] for _ in range(CHAIN)]

    def run(calls: int) -> None:
        h, leaves = first, [first]
        for own in others[:calls]:
            h = function(h, *own)
            leaves += own
        torch.autograd.grad(h, leaves, upstream)

    return of_one_more(run)


def _in_tree(tree: Path, backend: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--json", "--backend", backend]
    done = subprocess.run(
        command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cpu", "triton"), default="cpu")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json:
        print(json.dumps(measure(options.backend)))
        return
    trees = {"before": options.before and options.before.resolve(), "after": Path(__file__).resolve().parents[1]}
    runs = {name: [] for name, tree in trees.items() if tree}
    for _ in range(ROUNDS):
        for name, found in runs.items():
            found.append(_in_tree(trees[name], options.backend))
    best = {name: {key: min(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    from benches.timing import machine

    facts, rows = machine(), []
    for key, after in best["after"].items():
        op, direction = key.split(": ", 1)
        before = best.get("before", {}).get(key)
        rows.append(
            {
                "op": op, "direction": direction, "before_us": f"{before:.1f}" if before else "", "after_us": f"{after:.1f}",
                "ratio": f"{after / before:.2f}" if before else "", "cpu": facts["cpu"], "torch": facts["torch"],
            }
        )  # fmt: skip
        print(f"{op:26} {direction:30} {rows[-1]['before_us']:>7} {rows[-1]['after_us']:>7} us")
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
