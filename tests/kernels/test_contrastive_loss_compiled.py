"""Executes contrastive_loss's compiled kernels with every schedule: results, findings, program order, traffic."""

import pytest
import torch
from kernel_tools.launches import assert_traffic, in_any_order, on_ptx

from ov3fast import testing
from ov3fast.kernels.aot.cases.contrastive import few_tile_bytes, project_bytes
from ov3fast.kernels.contrastive import few
from ov3fast.kernels.contrastive import launch as contrastive_loss
from ov3fast.ops.contrastive_loss import over_ranks, over_views, reference

RECTANGLE = over_ranks(contrastive_loss.forward_rows, contrastive_loss.backward_rows, contrastive_loss.project)
MANY = over_views(contrastive_loss.forward, contrastive_loss.backward)
FEW = over_views(few.forward, few.backward)
PAIRS, WIDTH = 139, 72


@pytest.fixture(params=["chunked", "cublas"])
def schedule(request, monkeypatch):
    """Each schedule at a small size; chunked and cublas in two chunks of rows."""
    monkeypatch.setattr(contrastive_loss, "schedule", lambda *_: request.param)
    monkeypatch.setattr(contrastive_loss, "FEW", 0)
    monkeypatch.setattr(contrastive_loss, "CHUNK_PAIRS", 128 * PAIRS)
    return request.param


def inputs(kind, dtype, pairs=PAIRS, width=WIDTH):
    features = testing.make(pairs, width, scale=2.0, dtype=dtype), testing.make(pairs, width, seed=1, scale=0.5, dtype=dtype)
    return *features, torch.tensor(10.0), None if kind == "softmax" else torch.tensor(-3.0)


def both_ways(image, text, scale, bias, kind, directions=MANY):
    """The loss and the gradients of image, text, scale (and bias) for an upstream gradient of 3."""
    forward, backward = directions
    loss, r, c, sizes = forward(image, text, scale, bias, kind, "", "gather")
    grads = backward(torch.tensor(3.0), image, text, scale, bias, r, c, sizes, kind, "", "gather", True, True)
    return loss, *grads[: 3 if bias is None else 4]


def plainly(image, text, scale, bias, kind):
    leaves = [v.detach().requires_grad_() for v in (image, text, scale, bias) if v is not None]
    loss = reference(*leaves[:3], kind=kind, logit_bias=leaves[3] if bias is not None else None)
    return loss.detach(), *torch.autograd.grad(3 * loss, leaves)


def check(ours, arguments):
    names = ("loss", "image", "text", "scale", "bias")[: len(ours)]
    testing.Budget(lambda values: plainly(*values), arguments).check(ours, names)


@pytest.mark.parametrize(
    ("dtype", "target"), [(torch.bfloat16, "sm_80"), (torch.float16, "sm_80"), (torch.bfloat16, "sm_90")], ids=str
)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_both_ways(schedule, kind, dtype, target):
    arguments = (*inputs(kind, dtype), kind)
    ours, reports = in_any_order(both_ways, *arguments, target=target)
    check(ours, arguments)
    products = [report for report in reports if report.mma]
    assert len(products) == {"chunked": 3, "cublas": 0}[schedule]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_ranks_rectangle(schedule, kind, dtype):
    arguments = (*inputs(kind, dtype), kind)
    ours, _ = in_any_order(lambda *args: both_ways(*args, RECTANGLE), *arguments)
    check(ours, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [40, PAIRS])
def test_columns_of_other_ranks(monkeypatch, dtype, rows):
    """Pairs that are not all, so that their gradients don't cancel. An all-gather gives the columns' statistics and weights side by side; the
    weights of ranks differ."""
    monkeypatch.setattr(contrastive_loss, "FEW", 0)
    image, text, scale, _ = inputs("softmax", dtype)
    r, c, offset = torch.stack([torch.full((rows,), 9.0), torch.rand(rows)]), torch.rand(2, PAIRS) + 8, 60
    weights = torch.where(torch.arange(PAIRS) < 70, 0.02, 0.01)
    gathered = torch.stack([*c, weights], 1).unbind(1)
    with on_ptx():
        together, apart = (
            contrastive_loss.backward_rows(
                image[:rows], text, scale, None, "softmax", offset, r, columns[:2], torch.tensor(0.02), columns[2], True, True
            )
            for columns in (gathered, (*c, weights))
        )
    testing.assert_same_bits(together, apart)
    if dtype == torch.float32:  # else the gradients by logits are rounded, which those of text alone, in float32, don't show
        budget = testing.Budget(lambda values: rectangle(*values, offset), (image[:rows], text, scale, r, c, weights))
        budget.check(together[1:3], ("text", "scale"))


def rectangle(image, text, scale, r, c, weights, offset):
    """Gradients of text, its norms held fixed, and of scale."""
    wide = torch.promote_types(image.dtype, torch.float32)
    cosine = torch.nn.functional.normalize(image.to(wide)) @ torch.nn.functional.normalize(text.to(wide)).T
    z, own = scale * cosine, weights[offset]
    g = ((z - r.sum(0)[:, None]).exp() * own + (z - c.sum(0)).exp() * weights) / 2
    g.diagonal(offset).sub_(own)
    by_text = scale * g.T @ torch.nn.functional.normalize(image.to(wide)) / text.to(wide).norm(dim=1, keepdim=True)
    return by_text, (g * cosine).sum()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_float32(schedule, kind):
    arguments = (*inputs(kind, torch.float32, 71, 40), kind)
    with on_ptx():
        check(both_ways(*arguments), arguments)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.float32, "sm_80"), (torch.bfloat16, "sm_80"), (torch.float16, "sm_80"), (torch.bfloat16, "sm_90"), (torch.float32, "sm_90")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("pairs", "width"), [(PAIRS, WIDTH), (33, 41)])
def test_few_pairs(kind, dtype, target, pairs, width):
    arguments = (*inputs(kind, dtype, pairs, width), kind)
    ours, reports = in_any_order(lambda *args: both_ways(*args, FEW), *arguments, target=target)
    check(ours, arguments)
    assert len(reports) == 5


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_traffic_of_few_pairs(kind):
    image, text, scale, bias = inputs(kind, torch.bfloat16, 96, 128)
    with on_ptx() as launched:
        both_ways(image, text, scale, bias, kind, FEW)
    (_, statistics), _, (_, gradients), _, (_, project) = launched
    scalars, sizes = ("scale", "bias", "grad_loss", "row_lse", "column_lse"), (96, 128, 2)
    assert_traffic(statistics, few_tile_bytes(*sizes, 32, False, kind == "sigmoid"), *scalars)
    assert_traffic(gradients, few_tile_bytes(*sizes, 32, True, kind == "sigmoid"), *scalars)
    assert_traffic(project, 2 * project_bytes(*sizes, 2, 4, False, False, True), "sums", "grad_scale", "grad_bias")


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_what_few_pairs_do_not_need(needs):
    image, text, scale, _ = inputs("softmax", torch.bfloat16, 40, 24)
    with on_ptx():
        _, r, c = few.forward(image, text, scale, None, "softmax")
        every, some = (
            few.backward(torch.tensor(3.0), image, text, scale, None, r, c, "softmax", *these)
            for these in ((True, True), needs)
        )
    for whole, part, need in zip(every, some, (*needs, True), strict=False):
        assert torch.equal(whole, part) if need else part.numel() == 0


@pytest.mark.parametrize("directions", [RECTANGLE, MANY, FEW], ids=["rectangle", "many", "few"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_pair_has_no_gradient(dtype, directions):
    """Exactly zero, since the backward recomputes the forward's logits bit for bit; features this narrow are float32, with a maximum per row."""
    with on_ptx():
        loss, by_image, by_text, by_scale = both_ways(*inputs("softmax", dtype, 1, 37), "softmax", directions)
    assert loss == 0 and by_scale == 0 and not by_image.any() and not by_text.any()


def test_a_row_far_below_the_shift(monkeypatch):
    """Its program uses maxima in a second launch, and the gradients then have one term for rows and one for columns."""
    monkeypatch.setattr(contrastive_loss, "FEW", 0)
    centre = testing.make(1, WIDTH, seed=5)
    image, text = (centre + 0.4 * testing.make(40, WIDTH, seed=seed) for seed in (1, 2))
    image[3] = -centre
    arguments = (image.bfloat16(), text.bfloat16(), torch.tensor(100.0), None, "softmax")
    with on_ptx() as launched:
        ours = both_ways(*arguments)
    check(ours, arguments)
    assert [bool(report.mma) for kernel, report in launched if kernel == "contrastive_statistics"] == [True, True]
