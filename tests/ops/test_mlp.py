import pytest
import torch

from ov3fast import testing
from ov3fast.ops.mlp import mlp, reference


def inputs(*lead: int, width=9, hidden=13, features=5):
    """x, w1, b1, w2, b2."""
    return (
        testing.make(*lead, width),
        testing.make(hidden, width, seed=1, scale=0.5),
        testing.make(hidden, seed=2),
        testing.make(features, hidden, seed=3, scale=0.5),
        testing.make(features, seed=4),
    )


def both(activation="gelu"):
    return lambda *a: mlp(*a, activation=activation), lambda *a: reference(*a, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(
    ("lead", "width", "hidden", "features"),
    [((3, 7), 33, 65, 17), ((1, 1), 1, 1, 1), ((0, 4), 8, 3, 2), ((2, 3), 8, 0, 2), ((2, 0, 3), 8, 3, 2), ((4,), 7, 5, 3)],
)
def test_parity(dtype, layout, lead, width, hidden, features):
    values = inputs(*lead, width=width, hidden=hidden, features=features)
    testing.check(*both(), values, dtype=dtype, layout=testing.LAYOUTS[layout])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_subset_of_gradients(activation, dtype):
    testing.check(*both(activation), inputs(2, 3), dtype=dtype, every_subset=True)


@pytest.mark.parametrize(("has_b1", "has_b2"), [(False, False), (True, False), (False, True)])
def test_without_biases(has_b1, has_b2):
    x, w1, b1, w2, b2 = inputs(2, 3)
    values = (x, w1, b1 if has_b1 else None, w2, b2 if has_b2 else None)
    testing.check(*both(), values, dtype=torch.float32)


def test_activations():
    x, w1, b1, w2, b2 = inputs(4)
    h = x @ w1.t() + b1
    exact = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    torch.testing.assert_close(mlp(x, w1, b1, w2, b2), exact @ w2.t() + b2)
    tanh = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x, w1, b1, w2, b2, activation="gelu_tanh"), tanh @ w2.t() + b2)


def test_autocast():
    leaves = [v.float().requires_grad_() for v in inputs(2, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(*leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in leaves)


def test_autocast_in_a_compiled_function():
    leaves = [v.float().requires_grad_() for v in inputs(2, 3)]

    def run(*values):
        with torch.autocast("cpu", torch.bfloat16):
            return mlp(*values)

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(y, run(*leaves))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gradcheck(activation):
    leaves = [v.requires_grad_() for v in inputs(2, 2, width=3, hidden=4, features=2)]
    for function in both(activation):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    x, *rest = (v.float() for v in inputs(4, 3))
    leaves = [v.requires_grad_() for v in (testing.LAYOUTS[layout](x), *rest)]
    torch.library.opcheck(torch.ops.ov3fast.mlp, (*leaves, "gelu", ""))


def test_compile_keeps_one_node():
    leaves = [v.float().requires_grad_() for v in inputs(2, 3)]
    torch.compile(lambda *v: mlp(*v).square().sum(), fullgraph=True, backend="aot_eager")(*leaves).backward()
    expected = torch.autograd.grad(mlp(*leaves).square().sum(), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least 1 dimension"),
        ({"x": torch.ones(2, 9, dtype=torch.float16)}, TypeError, "use bfloat16"),
        ({"w1": torch.ones(13, 8)}, ValueError, r"w1 must have shape \(13, 9\) \[H, K\], got \(13, 8\)"),
        ({"w1": torch.ones(13, 9).bfloat16()}, TypeError, "w1 must be of dtype float32, got bfloat16"),
        ({"b1": torch.ones(9)}, ValueError, r"b1 must have shape \(13,\)"),
        ({"w2": torch.ones(5, 12)}, ValueError, r"w2 must have shape \(5, 13\) \[D, H\]"),
        ({"w2": torch.ones(5)}, ValueError, "w2 must have 2 dimensions"),
        ({"b2": torch.ones(13)}, ValueError, r"b2 must have shape \(5,\)"),
        ({"activation": "relu"}, ValueError, "activation must be one of gelu, gelu_tanh; got 'relu'"),
        ({"impl": "nonsense"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(change, error, words):
    arguments = {"x": torch.ones(2, 9), "w1": torch.ones(13, 9), "b1": None, "w2": torch.ones(5, 13), "b2": None, **change}
    with pytest.raises(error, match=words):
        mlp(**arguments)
