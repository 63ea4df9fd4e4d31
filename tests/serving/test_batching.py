"""The queue in front of the model: which items are batched together, and which are rejected."""

import threading
import time
from concurrent.futures import CancelledError

import pytest

from ov3fast.serving.batching import Batcher, Closed, Full


class Model:
    """Records its batches; waits for `gate` before each."""

    def __init__(self) -> None:
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, bucket, items):
        self.gate.wait(10)
        self.batches.append((bucket, list(items)))
        if any(item == "bad" for item in items):
            raise ValueError("bad item")
        return [(bucket, item) for item in items]


@pytest.fixture
def model():
    return Model()


def batcher(model, **options) -> Batcher:
    return Batcher({"job": model}, **{"max_wait": 0.0, **options})


def behind_a_busy_model(model, queue) -> None:
    """Returns once an item is being processed, which lasts until the gate opens."""
    model.gate.clear()
    queue.submit("job", "first", ["x"])
    while queue.waiting:
        time.sleep(0.001)


def test_items_of_a_bucket_ride_together_up_to_the_limit(model):
    queue = batcher(model, max_batch=4)
    behind_a_busy_model(model, queue)
    futures = [f for bucket in ("a", "b", "a") for f in queue.submit("job", bucket, [1, 2, 3])]
    model.gate.set()
    assert [f.result(10) for f in futures] == [(bucket, i) for bucket in ("a", "b", "a") for i in (1, 2, 3)]
    queue.close()
    assert model.batches[1:] == [("a", [1, 2, 3, 1]), ("b", [1, 2, 3]), ("a", [2, 3])]


def test_an_idle_model_waits_for_company_and_not_longer(model):
    queue = batcher(model, max_wait=0.3, max_batch=3)
    began = time.monotonic()
    first = queue.submit("job", 0, [1]) + queue.submit("job", 0, [2])
    assert [f.result(10) for f in first] == [(0, 1), (0, 2)] and time.monotonic() - began >= 0.3
    began = time.monotonic()
    [f.result(10) for f in queue.submit("job", 0, [1, 2, 3])]
    assert time.monotonic() - began < 0.3, "a full batch leaves at once"
    queue.close()
    assert [len(items) for _, items in model.batches] == [2, 3]


def test_a_full_queue_and_a_full_share(model):
    queue = batcher(model, max_queue=6, client_queue=3)
    behind_a_busy_model(model, queue)
    mine = queue.submit("job", 0, [1, 2, 3], client="me")
    with pytest.raises(Full) as refused:
        queue.submit("job", 0, [4], client="me")
    assert refused.value.client and refused.value.retry_after > 0
    queue.submit("job", 0, [5, 6, 7], client="you")
    with pytest.raises(Full) as refused:
        queue.check_room(1, client="they")
    assert not refused.value.client
    model.gate.set()
    assert [f.result(10) for f in mine] == [(0, 1), (0, 2), (0, 3)]
    while queue.waiting:
        time.sleep(0.001)
    assert [f.result(10) for f in queue.submit("job", 0, list(range(9)), client="me")], (
        "what is larger than a share comes alone"
    )
    queue.close()


def test_one_bad_item_does_not_take_the_others_down(model):
    queue = batcher(model)
    behind_a_busy_model(model, queue)
    good, bad = queue.submit("job", 0, ["good"]), queue.submit("job", 0, ["bad"])
    model.gate.set()
    assert good[0].result(10) == (0, "good")
    with pytest.raises(ValueError, match="bad item"):
        bad[0].result(10)
    assert queue.submit("job", 0, ["after"])[0].result(10) == (0, "after")
    queue.close()


def test_what_was_cancelled_is_not_run(model):
    queue = batcher(model)
    behind_a_busy_model(model, queue)
    left, stays = queue.submit("job", 0, ["left"]), queue.submit("job", 0, ["stays"])
    assert left[0].cancel()
    model.gate.set()
    assert stays[0].result(10) == (0, "stays")
    with pytest.raises(CancelledError):
        left[0].result(10)
    queue.close()
    assert model.batches[1:] == [(0, ["stays"])] and queue.waiting == 0 and not queue._clients


def test_close_runs_what_waits_and_takes_no_more(model):
    queue = batcher(model, max_wait=60.0)
    waiting = queue.submit("job", 0, [1, 2])
    queue.close()
    assert [f.result(0) for f in waiting] == [(0, 1), (0, 2)]
    with pytest.raises(Closed):
        queue.submit("job", 0, [3])


def test_the_oldest_bucket_comes_first(model):
    queue = batcher(model, max_batch=2)
    behind_a_busy_model(model, queue)
    futures = queue.submit("job", "old", [1]) + queue.submit("job", "busy", [1, 2, 3, 4, 5, 6])
    model.gate.set()
    [f.result(10) for f in futures]
    queue.close()
    assert model.batches[1][0] == "old"
