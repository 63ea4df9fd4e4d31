"""Greedy and beam search on probability tables small enough to search by hand."""

import itertools
import math

import pytest
import torch

from ov3fast.models.generation import search

PAD, BOS, EOS, A, B, C = range(6)
IMPOSSIBLE = 1e-9


def chain(table: dict[int, dict[int, float]]):
    """A Markov chain as a step function: the next id depends on the last one alone."""
    log_probs = torch.full((6, 6), math.log(IMPOSSIBLE))
    for last, following in table.items():
        for next_id, probability in following.items():
            log_probs[last, next_id] = math.log(probability)

    def step(place, ids, rows):
        return log_probs[ids]

    return step, log_probs


def run(step, beams, length=5, batch=1, **options):
    return search(step, batch, beams, length, bos=BOS, eos=EOS, pad=PAD, **options)


def score(log_probs, ids) -> float:
    total = 0.0
    for last, following in itertools.pairwise(ids.tolist()):
        if last == EOS:
            break
        total += float(log_probs[last, following])
    return total


# The likeliest first word leads to unlikely endings, the second likeliest to a certain one.
GARDEN_PATH = {BOS: {A: 0.55, B: 0.45}, A: {A: 0.2, B: 0.2, C: 0.2, EOS: 0.4}, B: {C: 0.9, EOS: 0.1}, C: {EOS: 1.0}}


def test_beam_search_finds_a_better_sequence_than_greedy():
    step, log_probs = chain(GARDEN_PATH)
    greedy, beam = run(step, 1)[0], run(step, 2)[0]
    assert greedy.tolist() == [BOS, A, EOS]
    assert beam.tolist() == [BOS, B, C, EOS]
    assert score(log_probs, beam) > score(log_probs, greedy) + 0.5


def test_a_wide_beam_is_exhaustive_search():
    torch.manual_seed(0)
    log_probs = torch.randn(6, 6).log_softmax(-1)
    sequences = [(BOS, *tail) for tail in itertools.product((EOS, A, B, C), repeat=3)]
    best = max(sequences, key=lambda ids: score(log_probs, torch.tensor(ids)))
    found = run(lambda place, ids, rows: log_probs[ids], beams=64, length=4)[0]
    assert score(log_probs, found) == pytest.approx(score(log_probs, torch.tensor(best)), abs=1e-5)


def test_rows_tell_which_beam_goes_on():
    step, _ = chain(GARDEN_PATH)
    history = [[] for _ in range(4)]

    def remembering(place, ids, rows):
        nonlocal history
        history = [[*history[row], int(i)] for row, i in zip(rows, ids, strict=True)]
        return step(place, ids, rows)

    found = run(remembering, beams=2, batch=2)
    assert found.tolist() == [[BOS, B, C, EOS]] * 2
    # Each row remembers its own sequence, so a cache reordered by `rows` would be correct.
    assert [BOS, B, C] in history


def test_batch_rows_are_independent_and_padded():
    tables = torch.stack([chain(GARDEN_PATH)[1], chain({BOS: {EOS: 1.0}})[1]])

    def step(place, ids, rows):
        return tables[torch.arange(2).repeat_interleave(len(ids) // 2), ids]

    assert run(step, 2, batch=2).tolist() == [[BOS, B, C, EOS], [BOS, EOS, PAD, PAD]]


def test_length_limit_and_penalty():
    step, _ = chain({BOS: {A: 0.6, EOS: 0.4}, A: {A: 0.6, EOS: 0.4}})
    assert run(step, 1, length=4).tolist() == [[BOS, A, A, A]]
    assert run(step, 3, length=4).tolist() == [[BOS, EOS, PAD]]
    assert run(step, 3, length=4, length_penalty=1.0).tolist() == [[BOS, A, A, A]]


def test_padding_and_bos_are_never_said():
    step, _ = chain({BOS: {PAD: 0.6, BOS: 0.3, A: 0.1}, A: {PAD: 0.5, EOS: 0.4}})
    assert run(step, 1).tolist() == run(step, 2)[:, :3].tolist() == [[BOS, A, EOS]]


def test_no_beam_is_an_error():
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        run(chain(GARDEN_PATH)[0], 0)
