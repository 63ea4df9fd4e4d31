"""Captured models, on the stand-in for CUDA graphs of kernel_tools/graphs.py, which replays recorded calls into the recorded memory."""

import threading

import pytest
import torch
from kernel_tools.graphs import HostReadError, graphs_on_cpu

import ov3fast
from ov3fast import testing
from ov3fast._graphs import Graph
from ov3fast.inference import encode
from ov3fast.inference.graphs import capture
from ov3fast.inference.load import VisionTower


@pytest.fixture
def machine(monkeypatch):
    # It inspects values of CPU tensors but not of GPU tensors.
    for module in ("vit", "openvision3"):
        monkeypatch.setattr(f"ov3fast.models.{module}.as_images", lambda images, size: images)
    with graphs_on_cpu() as machine:
        yield machine


def pictures(batch, seed=0, side=32):
    return testing.make(batch, 3, side, side, seed=seed).clamp(-1, 1)


def results(model, name, x):
    with torch.no_grad():
        found = getattr(model, name)(x)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("name", ["encode", "encode_latents", "reconstruct"])
def test_a_replay_gives_what_the_model_gives(machine, model, name):
    fast = capture(model, sizes=[(2, 32)])
    inputs = [testing.make(2, 16, 4, 4, seed=seed) if name == "encode_latents" else pictures(2, seed) for seed in range(3)]
    found = [results(fast, name, x) for x in inputs]
    for ours, x in zip(found, inputs, strict=True):  # replays don't overwrite earlier results
        testing.assert_same_bits(ours, results(model, name, x))
    assert machine.recordings == 1 and machine.replays == 3 and not fast.eager_calls
    assert machine.log[:4] == ["wait", "side stream", "wait", "record"]


def test_a_posterior_is_sampled_by_the_rng_of_each_call(machine, model, monkeypatch):
    monkeypatch.setattr(model, "config", type(model.config)(**{**vars(model.config), "posterior": "sample"}))
    fast, x = capture(model), pictures(1)
    with torch.no_grad():
        for seed in (1, 2):
            rng = torch.tensor([seed, 0])
            testing.assert_same_bits(list(fast.encode(x, rng=rng)), list(model.encode(x, rng=rng)))
        assert machine.recordings == 1
        testing.assert_same_bits(list(fast.encode(x)), list(model.encode(x)))
    assert machine.recordings == 2


def test_other_sizes_and_gradients_are_the_originals(machine, model):
    fast = capture(model, sizes=[(2, 32)])
    with pytest.warns(
        UserWarning, match=r"encode: run without a graph, since \[3, 3, 32, 32\] is not one of the captured sizes"
    ):
        results(fast, "encode", pictures(3))
    results(fast, "encode", pictures(3))  # warned of once: warnings are errors here
    x = testing.make(2, 16, 4, 4).requires_grad_()
    with pytest.warns(UserWarning, match="an input requires grad"):
        fast.encode_latents(x)[0].sum().backward()
    assert x.grad is not None and machine.recordings == 0
    assert sorted(fast.eager_calls.values()) == [1, 2]


def test_without_sizes_the_least_recently_used_goes(machine, model):
    fast = capture(model, most=2)
    for batch in (1, 2, 1, 3, 1, 2):
        results(fast, "encode", pictures(batch))
    assert machine.recordings == 4 and machine.replays == 6
    assert len({pool for pool in machine.pools}) == 1


def test_weights_change_in_place_and_moves_record_anew(machine, model, vae):
    import copy

    own = copy.deepcopy(model)
    fast, x = capture(own), pictures(1)
    before = results(fast, "encode", x)
    with torch.no_grad():
        own.encoder.head.weight.mul_(2)
    testing.assert_same_bits(results(fast, "encode", x)[0], results(own, "encode", x)[0])
    assert machine.recordings == 1 and not torch.equal(results(fast, "encode", x)[0], before[0])
    assert fast.to(torch.bfloat16) is fast and next(own.parameters()).dtype == torch.bfloat16
    testing.assert_same_bits(results(fast, "encode", x), results(own, "encode", x))
    own.to(torch.float32)  # behind its back
    testing.assert_same_bits(results(fast, "encode", x), results(own, "encode", x))
    assert machine.recordings == 3


def test_it_is_the_model_otherwise(machine, model):
    fast = capture(model)
    assert isinstance(fast, type(model)) and fast.original is model and capture(fast).original is model
    assert fast.state_dict().keys() == model.state_dict().keys() and "original" not in dict(fast.named_modules())
    assert type(model).__name__ == "OpenVision3" and "eager_calls" not in model.__dict__
    with torch.inference_mode():
        fast.encode(pictures(1))
    results(fast, "encode", pictures(1))  # buffers made under inference_mode serve outside of it


def test_towers_and_encode(machine, model, vae, folder):
    tower = capture(VisionTower(model.encoder, vae).eval())
    assert not hasattr(tower, "reconstruct")
    files = [folder / name for name in ("p0.png", "p1.png")]
    ours, theirs = encode(tower, files, batch_size=1), encode(model, files, batch_size=1)
    testing.assert_same_bits([ours.pooled, ours.tokens], [theirs.pooled, theirs.tokens])
    assert machine.recordings == 1
    encoder = capture(model.encoder)
    testing.assert_same_bits(
        list(results(encoder, "encode_latents", testing.make(1, 16, 4, 4))),
        results(model, "encode_latents", testing.make(1, 16, 4, 4)),
    )


def test_by_way_of_optimize(machine, model):
    """In another dtype the weights are copies."""
    fast, x = ov3fast.optimize(model, torch.bfloat16, mode="graph"), pictures(1)
    assert fast.original is model and "replays CUDA graphs" in str(fast.report)
    ours = results(fast, "encode", x)
    assert ours[0].dtype == torch.bfloat16 and model.logit_scale.dtype == torch.float32 and machine.recordings == 1
    testing.assert_same_bits(ours, results(fast, "encode", x))


def test_threads_take_turns(machine, model):
    fast = capture(model, sizes=[(1, 32)])
    results(fast, "encode", pictures(1))
    inputs, found = [pictures(1, seed) for seed in range(6)], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: results(fast, "encode", inputs[i])})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        testing.assert_same_bits(found[i], results(model, "encode", x))


def test_bad_calls_are_refused(model):
    with pytest.raises(ValueError, match="capture: CUDA graphs need a GPU, and this is on cpu"):
        capture(model)
    with graphs_on_cpu():
        with pytest.raises(ValueError, match=r"a multiple of 16 pixels; got \(1, 40\)"):
            capture(model, sizes=[(1, 40)])
        with pytest.raises(ValueError, match="most must be at least 1"):
            capture(model, most=0)
        with pytest.raises(ValueError, match="call eval"):
            capture(type(model)(model.config))


def test_a_value_that_is_read_within_a_recording_is_found():
    """Tests the stand-in itself."""
    x = torch.arange(4.0)
    with graphs_on_cpu():
        for read in (lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.tolist(), lambda x: x[x > 1]):
            with pytest.raises(HostReadError):
                Graph(lambda x, read=read: (read(x), x)[1], [x], None)
        graph = Graph(lambda x: x + 1, [x], None)
        place = graph.results
        assert graph(x + 1) is place and place.tolist() == [2, 3, 4, 5]
