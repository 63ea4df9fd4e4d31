"""An image's results are bitwise independent of its batch."""

import contextlib

import pytest
import torch

from ov3fast import ops
from ov3fast.inference import encode, reconstruct_image
from ov3fast.inference.batches import InProvenBatches, batch_invariant, same
from ov3fast.inference.reconstruct import reconstruct_batch

BUILT = ops.table()["linear"]["cpu"] == "ready"


@pytest.fixture(scope="module")
def pictures(model):
    return torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.skipif(not BUILT, reason="the CPU kernels are not built")
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.full)])
@torch.inference_mode()
def test_rows_of_a_batch_have_the_bits_that_they_have_alone(model, pictures, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with batch_invariant(model):
            alone = [model.encode(picture[None]) for picture in pictures]
            for count in (2, 3, 5, 8, 9):
                pooled, tokens = model.encode(pictures[:count])
                assert torch.equal(pooled, torch.cat([row[0] for row in alone[:count]])), count
                assert torch.equal(tokens, torch.cat([row[1] for row in alone[:count]])), count
            made = reconstruct_batch(model, pictures)
            assert all(same(one, reconstruct_batch(model, pictures[i : i + 1])[0]) for i, one in enumerate(made))
            texts = ["a", "a red square", "red"]
            assert torch.equal(model.encode_text(texts), torch.cat([model.encode_text([text]) for text in texts]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not BUILT, reason="the CPU kernels are not built")
@pytest.mark.filterwarnings("ignore::ov3fast.data.skips.SkipWarning")
@torch.inference_mode()
def test_encode_gives_the_same_bits_for_any_batch_size(model, folder):
    found = [encode(model, folder, batch_size=size) for size in (1, 2, 7)]
    assert all(torch.equal(one.pooled, found[0].pooled) and torch.equal(one.tokens, found[0].tokens) for one in found)
    near = encode(model, folder, batch_invariant=False)
    assert (near.pooled - found[0].pooled).abs().max() <= 2e-6 * found[0].pooled.abs().max()
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert reconstruct_image(model, picture).psnr == reconstruct_image(model, picture).psnr


def test_a_backend_that_is_asked_for_stays(model):
    from ov3fast.ops import _dispatch

    with ops.use("eager"), batch_invariant(model):
        assert _dispatch.override() == "eager"
    before = _dispatch.override()
    with contextlib.suppress(KeyError), batch_invariant(model):
        raise KeyError
    assert _dispatch.override() == before
    with batch_invariant(torch.nn.Linear(2, 2).double()):
        assert _dispatch.override() == before, "the CPU kernels take no float64"


class Sums:
    """Adds 1e-9 to all but the first item in batches of the given sizes."""

    def __init__(self, *wrong: int) -> None:
        self.wrong, self.sizes = wrong, []

    def __call__(self, items):
        self.sizes.append(len(items))
        return [(torch.tensor(float(x)) + (1e-9 if len(items) in self.wrong and x == 1 else 0), str(x)) for x in items]


def test_a_batch_size_is_used_once_it_changed_nothing():
    run = Sums()
    batches = InProvenBatches(run, 8)
    assert [int(value) for value, _ in batches(range(7))] == list(range(7))
    assert run.sizes == [1, 1, 1, 1, 4, 1, 1, 2, 1] and batches.proven == {1: True, 2: True, 4: True}
    run.sizes.clear()
    batches(range(20))
    assert run.sizes == [1] * 8 + [8, 8, 4]


def test_a_batch_size_that_changes_a_bit_is_not_used():
    class Off(Sums):
        def __call__(self, items):
            return [(value * (1 + 2**-23) if len(items) in self.wrong else value, x) for value, x in super().__call__(items)]

    run = Off(4)
    batches = InProvenBatches(run, 8)
    assert [int(value) for value, _ in batches(range(6))] == list(range(6))
    assert batches.proven[4] is False
    run.sizes.clear()
    batches(range(8))
    assert 4 not in run.sizes and 8 not in run.sizes


def test_same_looks_at_every_kind():
    assert same((torch.ones(2), "a", 1.0), (torch.ones(2), "a", 1.0))
    assert not same(torch.ones(2), torch.ones(2).double()) and not same(torch.ones(2), torch.tensor([1.0, 1.0000001]))
    assert not same((1,), (1, 2)) and not same("a", "b") and not same(torch.ones(1), 1.0)
