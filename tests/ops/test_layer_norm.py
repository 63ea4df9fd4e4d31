import pytest
import torch

from ov3fast import ops, testing
from ov3fast.ops.layer_norm import layer_norm, reference


def inputs(rows: int, width: int):
    return testing.make(rows, 3, width), testing.make(width, seed=1), testing.make(width, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(("rows", "width"), [(2, 72), (1, 1), (0, 8), (5, 33)])
def test_parity(dtype, layout, rows, width):
    testing.check(layer_norm, reference, inputs(rows, width), dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual(dtype):
    x, weight, bias = inputs(4, 24)

    def ours(x, weight, bias, residual):
        return layer_norm(x, weight, bias, residual=residual)

    def plain(x, weight, bias, residual):
        return reference(x, weight, bias, residual=residual)

    testing.check(ours, plain, (x, weight, bias, testing.make(4, 3, 24, seed=3)), dtype=dtype, every_subset=True)


def test_gradcheck():
    leaves = [value.requires_grad_() for value in inputs(2, 5)]
    residual = testing.make(2, 3, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b, r: layer_norm(x, w, b, residual=r), (*leaves, residual))
    assert torch.autograd.gradcheck(lambda x, w, b, r: reference(x, w, b, residual=r), (*leaves, residual))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    x, weight, bias = (v.float() for v in inputs(4, 8))
    x = testing.LAYOUTS[layout](x).requires_grad_()
    residual = torch.ones_like(x)
    for rest in (None, residual):
        torch.library.opcheck(torch.ops.ov3fast.layer_norm, (x, weight.requires_grad_(), bias.requires_grad_(), rest, 1e-6, ""))


def test_compile_keeps_one_node():
    x, weight, bias = (v.float().requires_grad_() for v in inputs(2, 8))
    compiled = torch.compile(lambda x, w, b: layer_norm(x, w, b).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(x, weight, bias).backward()
    got = x.grad.clone()
    x.grad = None
    layer_norm(x, weight, bias).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_float32_parameters_with_bfloat16_input():
    x, weight, bias = inputs(3, 16)
    y = layer_norm(x.bfloat16(), weight.float(), bias.float())
    exact = reference(x.bfloat16().double(), weight.float().double(), bias.float().double())
    assert y.dtype == torch.bfloat16
    testing.assert_within_budget(y, exact.bfloat16(), exact)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "layer_norm: x must be a tensor, got list"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x must be of dtype float32"),
        ({"x": torch.ones(2, 8, dtype=torch.float16)}, TypeError, "use bfloat16"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(8,\) \[D\], got \(7,\)"),
        ({"weight": torch.ones(8).double()}, TypeError, "weight must be of dtype float32, got float64"),
        ({"residual": torch.ones(8)}, ValueError, "residual must have shape"),
        ({"impl": "nonsense"}, ValueError, "layer_norm: impl must be one of cpu, reference; got 'nonsense'"),
    ],
)
def test_errors(change, error, words):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), **change}
    with pytest.raises(error, match=words):
        ops.layer_norm(**arguments)
