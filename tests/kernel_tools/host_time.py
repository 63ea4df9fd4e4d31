"""Host time of a call, measured without a clock: the function calls within it."""

import sys

import torch


def events(run):
    """Number of Python and C function calls in one run, with warm caches."""
    seen = []
    for _ in range(3):
        run()
    sys.setprofile(lambda frame, event, argument: seen.append(event) if event in ("call", "c_call") else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(seen) - 1  # setprofile itself


class Plain(torch.autograd.Function):
    """PyTorch's own overhead per autograd node."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad
