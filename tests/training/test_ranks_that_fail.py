"""Processes that disagree, fail or hang: every process of the run ends with an error, within a limit."""

import pytest

LIMIT = 120
"""Seconds after which a process that hangs is killed, and its test has failed."""
WAIT = 6.0
"""Seconds that processes wait for one that hangs for 15."""
pytestmark = pytest.mark.full


def ends(server, data, out, do="train", fields_of_rank=None, world=2, **fields) -> list[str]:
    """What every process printed; all have ended with an error."""
    fields = {"stages": [[4, 32]], "gradient_norms_every": None, **fields}
    server.start(world, data, out, [{"name": "run", "do": do, "fields": fields, "fields_of_rank": fields_of_rank or {}}], LIMIT)
    codes = server.wait()
    assert codes == [1] * world, (codes, server.output())
    return server.output()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("one_image_less", "the processes disagree: the number of images is [18, 17] in rank order"),
        ("one_micro_batch_less", "the processes disagree: the number of micro batches is [6, 5] in rank order"),
        ("no_captions", "the processes disagree: the branches that run is ["),
    ],
)
def test_uneven_batches(server, data, tmp_path, fault, words, parallel):
    for text in ends(server, data, tmp_path, fault, parallel=parallel):
        assert words in text


def test_another_recipe(server, data, tmp_path):
    for text in ends(server, data, tmp_path, fields_of_rank={"1": {"seed": 7}}):
        assert "the processes disagree: seed is 0 for rank 0 and 7 for rank 1" in text


def test_one_that_fails(server, data, tmp_path):
    others, failed = ends(server, data, tmp_path, "no_data", parallel="fsdp")
    assert "100 samples in a row can't be used" in failed
    assert "another process of the run has gone" in others


def test_one_that_hangs(server, data, tmp_path):
    first, hanging, last = ends(server, data, tmp_path, "hang", world=3, rank_timeout_minutes=WAIT / 60)
    assert f"did not answer within {WAIT / 60:g} minutes (rank_timeout_minutes)" in first + last
    for text in (first, hanging, last):
        assert "did not answer" in text or "another process of the run has gone" in text
