"""One step's gradients: micro-batches against the full batch, and the meaning of the measurements."""

import dataclasses

import pytest
import torch

from ov3fast.data.store import SampleStore
from ov3fast.losses import Objective
from ov3fast.training import build
from ov3fast.training.distributed import Ranks
from ov3fast.training.inputs import Inputs
from ov3fast.training.parallel import Parallel
from ov3fast.training.step import Step, derive_rng, subsample
from ov3fast.training.timing import Timer

RANKS = Ranks(0, 1, torch.device("cpu"))


def setting(tiny, data, tmp_path, accumulate=1, over="batch", **model):
    """(float64 model, micro_batches, Step) without noise and pixel losses, with all images captioned."""
    recipe = tiny.recipe(data, tmp_path, accumulate=accumulate, contrastive_over=over, cache_latents=False)
    stage = dataclasses.replace(recipe.stages[0], pixel_images=0, caption_images=None)
    objective = dataclasses.replace(recipe.objective, contrastive=model.get("contrastive", "softmax"))
    network = dataclasses.replace(recipe.model, tau=0.0, **model)
    recipe = dataclasses.replace(recipe, stages=(stage,), model=network, objective=objective)
    store, timer = SampleStore(recipe.data), Timer(RANKS.device)
    network = build.build_model(recipe, build.build_tokenizer(recipe, store), RANKS.device)
    objective = Objective(recipe.stage_objective(stage))
    inputs = Inputs(recipe, 0, objective.config, network, store, RANKS, timer, None)
    inputs.start(0, 1)
    micro_batches, _ = inputs.next(0)
    vae = network.vae
    network.set_vae(None)
    network.double()
    network.set_vae(vae)
    for part in micro_batches:
        part.latents = part.latents.double()
    step = Step(Parallel(network, recipe, RANKS), objective, timer, bf16=False, exact_contrastive=over == "batch")
    return network, micro_batches, step


@pytest.mark.parametrize("contrastive", ["softmax", "sigmoid"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_have_the_gradient_of_the_whole(tiny, data, tmp_path, accumulate, contrastive):
    changes = {"contrastive": "sigmoid"} if contrastive == "sigmoid" else {}
    whole, one, step = setting(tiny, data, tmp_path, **changes)
    expected, _ = step(one)
    parts, many, step = setting(tiny, data, tmp_path, accumulate, **changes)
    assert len(many) == accumulate and sorted(key for part in many for key in part.keys) == sorted(one[0].keys)
    losses, _ = step(many)
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-6
    )
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        # Losses are in float32, all else in float64.
        assert (a.grad - b.grad).abs().max() <= 1e-6 * a.grad.abs().max() + 1e-12, name


def test_over_the_micro_batch_there_are_fewer_negatives(tiny, data, tmp_path):
    _, micro_batches, exact = setting(tiny, data, tmp_path, 4)
    _, same, fewer = setting(tiny, data, tmp_path, 4, over="micro-batch")
    assert float(fewer(same)[0]["contrastive"]) < float(exact(micro_batches)[0]["contrastive"]) - 0.3


def test_branch_gradients_are_those_at_the_tokens(tiny, data, tmp_path):
    network, micro_batches, step = setting(tiny, data, tmp_path)
    _, measured = step(micro_batches, measure=True)
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    kept = []
    handle = network.encoder.register_forward_hook(lambda module, inputs, output: kept.append(output[1]))
    losses, config = step._forward(micro_batches[0]), step.objective.config
    rec, und = config.rec_weight * losses["rec"], config.und_weight * losses["und"]
    handle.remove()
    a, b = (torch.autograd.grad(loss, kept[0], retain_graph=True)[0] for loss in (rec, und))
    assert measured["rec_grad_norm"] == pytest.approx(float(a.norm()), rel=1e-9)
    assert measured["und_grad_norm"] == pytest.approx(float(b.norm()), rel=1e-9)
    assert measured["grad_cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-9)
    # Measuring changes no gradient.
    step(micro_batches, measure=False)
    for parameter, before in zip(network.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, before)


def test_a_choice_is_spread_over_the_batch_and_the_same_however_it_is_cut():
    rng = derive_rng("pixels", 3, 0, 17)
    whole = subsample(torch.arange(96), 12, rng, 0, 1)
    assert len(set(whole.tolist())) == 12 and torch.equal(whole // 8, torch.arange(12))
    cut = torch.cat([24 * part + subsample(torch.arange(24), 12, rng, part, 4) for part in range(4)])
    assert torch.equal(cut, whole)
    assert not torch.equal(subsample(torch.arange(96), 12, derive_rng("pixels", 3, 0, 18), 0, 1), whole)
    assert torch.equal(subsample(torch.arange(5), 8, rng, 0, 1), torch.arange(5))


def test_streams_differ_by_purpose_seed_stage_and_step():
    streams = [
        tuple(derive_rng(*arguments).tolist())
        for arguments in (("a", 0, 0, 0), ("b", 0, 0, 0), ("a", 1, 0, 0), ("a", 0, 1, 0), ("a", 0, 0, 1))
    ]
    assert len(set(streams)) == 5
