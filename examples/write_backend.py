"""Write a backend for one operator, and check it against the error budget.

    python examples/write_backend.py

A backend is a plain function on tensors with the signature of the eager backend: the same inputs, outputs and saved tensors
(`_forward_...` in ov3fast/ops/layer_norm.py). Validation, autograd and torch.compile come with the operator. This one has no backward, so
gradients are computed by the next backend that has one.
"""

from functools import partial

import torch

from ov3fast import ops, testing
from ov3fast.ops._dispatch import register
from ov3fast.ops.layer_norm import reference


def forward(x, weight, bias, residual, eps):
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    y = (wide - mean) * rstd * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype), x.new_empty(0) if residual is None else h, mean[..., 0], rstd[..., 0]


def main() -> None:
    # Registered with the lowest priority; before="cpu" would prefer it over the CPU kernels.
    register("layer_norm", "mine", forward)
    print(ops.table()["layer_norm"])

    mine = partial(ops.layer_norm, impl="mine")
    weight, bias = testing.make(40, seed=1), testing.make(40, seed=2)
    for rows in testing.RAGGED_SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            testing.check(mine, reference, (testing.make(rows, 40), weight, bias), dtype=dtype)
    print("within the error budget, the same bits twice")


if __name__ == "__main__":
    main()
