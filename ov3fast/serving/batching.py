"""Dynamic batching: one thread runs the model, on batches of the items that wait for it.

    batcher = Batcher({"encode": run}, max_batch=32, max_wait=0.005)
    future = batcher.submit("encode", 256, [picture], client="127.0.0.1")
    future.result()       # what run(256, [picture]) gave for it

Items of the same job and bucket (an image size, a number of beams) form a batch. A batch runs when it is full, or when its oldest item has waited
for max_wait; the bucket whose first item has waited longest goes first, so none starves.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

Run = Callable[[Any, list[Any]], Sequence[Any]]
"""(bucket, items) -> one result per item."""


class Full(Exception):
    """The queue is full. retry_after: seconds; client: whether only this client's share is used up."""

    def __init__(self, retry_after: float, client: bool) -> None:
        super().__init__("the queue is full")
        self.retry_after, self.client = retry_after, client


class Closed(Exception):
    """The batcher no longer accepts items."""


class _Waiting(NamedTuple):
    item: Any
    future: Future
    client: str
    since: float


class Batcher:
    """jobs: name -> function that runs a batch, in the batcher's own thread. done: called after each batch (job, size, seconds)."""

    def __init__(
        self,
        jobs: dict[str, Run],
        *,
        max_batch: int = 32,
        max_wait: float = 0.005,
        max_queue: int = 512,
        client_queue: int = 256,
        done: Callable[[str, int, float], None] = lambda job, size, seconds: None,
    ) -> None:
        self.jobs, self.max_batch, self.max_wait = jobs, max_batch, max_wait
        self.max_queue, self.client_queue, self.done = max_queue, client_queue, done
        self._queues: dict[tuple[str, Hashable], deque[_Waiting]] = {}
        self._clients: Counter[str] = Counter()
        self._count = 0
        self._item_seconds = 0.01
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="ov3fast-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._count

    def submit(self, job: str, bucket: Hashable, items: Sequence[Any], client: str = "") -> list[Future]:
        """A future for each item; either all are accepted or none. Raises Full or Closed. A future cancelled before its batch runs
        costs no computation."""
        now = time.monotonic()
        futures: list[Future] = [Future() for _ in items]
        with self._changed:
            self._check_room(len(items), client)
            queue = self._queues.setdefault((job, bucket), deque())
            queue.extend(_Waiting(item, future, client, now) for item, future in zip(items, futures, strict=True))
            self._count += len(items)
            self._clients[client] += len(items)
            self._changed.notify()
        return futures

    def check_room(self, count: int, client: str = "") -> None:
        """Raises what `submit` would raise for so many items, before they are prepared."""
        with self._changed:
            self._check_room(count, client)

    def close(self) -> None:
        """Runs the waiting items, then stops. No more are accepted."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _check_room(self, count: int, client: str) -> None:
        if self._closing:
            raise Closed
        # A request larger than the whole share is still accepted by itself.
        mine = self._clients[client]
        full, share = self._count + count > self.max_queue, bool(mine) and mine + count > self.client_queue
        if share or (full and self._count):
            raise Full(self._count * self._item_seconds, client=share)

    def _work(self) -> None:
        while True:
            with self._changed:
                key = self._next()
                if key is None:
                    return
                batch = self._take(key)
            self._run(*key, batch)

    def _next(self) -> tuple[str, Hashable] | None:
        """Waits for the bucket whose batch runs next. None: closed, and nothing is left."""
        while True:
            heads = [(queue[0].since, key) for key, queue in self._queues.items()]
            if heads:
                since, key = min(heads, key=lambda head: head[0])
                full = [(since, key) for since, key in heads if len(self._queues[key]) >= self.max_batch]
                left = since + self.max_wait - time.monotonic()
                if left <= 0 or self._closing:
                    return key
                if full:
                    return min(full, key=lambda head: head[0])[1]
                self._changed.wait(left)
            elif self._closing:
                return None
            else:
                self._changed.wait()

    def _take(self, key: tuple[str, Hashable]) -> list[_Waiting]:
        queue: deque[_Waiting] = self._queues[key]
        batch: list[_Waiting] = []
        while queue and len(batch) < self.max_batch:
            one = queue.popleft()
            self._count -= 1
            self._clients[one.client] -= 1
            if not self._clients[one.client]:
                del self._clients[one.client]
            if one.future.set_running_or_notify_cancel():
                batch.append(one)
        if not queue:
            del self._queues[key]
        return batch

    def _run(self, job: str, bucket: Hashable, batch: list[_Waiting]) -> None:
        if not batch:
            return
        began = time.monotonic()
        try:
            results = self.jobs[job](bucket, [one.item for one in batch])
            for one, result in zip(batch, results, strict=True):
                one.future.set_result(result)
        except BaseException as error:  # the thread must survive any error in a batch
            self._after_failure(job, bucket, batch, error)
        seconds = time.monotonic() - began
        self._item_seconds += 0.2 * (seconds / len(batch) - self._item_seconds)
        self.done(job, len(batch), seconds)

    def _after_failure(self, job: str, bucket: Hashable, batch: list[_Waiting], error: BaseException) -> None:
        """A bad item must not fail its whole batch: each item is retried alone."""
        for one in batch:
            if one.future.done():
                continue
            if len(batch) == 1:
                one.future.set_exception(error)
                continue
            try:
                [result] = self.jobs[job](bucket, [one.item])
                one.future.set_result(result)
            except BaseException as own:
                one.future.set_exception(own)
