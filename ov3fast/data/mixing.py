"""How many samples of each source are drawn: per step for mixing="batch"; for mixing="stream" in the first n samples, for any n."""

from __future__ import annotations

import functools
import heapq
import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov3fast.data.store import Source

LONGEST_PERIOD = 10**6
"""Longest schedule that is computed once and kept, in about 2 s and 4 MB; fractions of six decimals that add up to 1 need it."""

_Tree = int | tuple["_Tree", "_Tree"]


def weights(fractions: Sequence[float]) -> list[int]:
    """The fractions, as written in decimal, as integers in the same ratio."""
    exact = [Fraction(str(fraction)) for fraction in fractions]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    common = math.gcd(*whole)
    return [weight // common for weight in whole]


def check_stream(sources: list[Source], batch_size: int, world: int) -> None:
    """ValueError if mixing="stream" can't serve these sources."""
    if any(source.config.views > 1 for source in sources):
        raise ValueError('mixing: "stream" takes sources with one view of a text; "batch" takes several')
    if len({source.config.paired for source in sources}) > 1:
        raise ValueError('mixing: "stream" takes sources that all have text or none: a rank may get no sample of one of them')
    if batch_size % world:
        raise ValueError(f"batch_size: {batch_size} images can't be shared evenly by {world} ranks")


def units_per_step(sources: list[Source], batch_size: int, world: int) -> list[int]:
    """Units per step of each source: batch_size divided exactly by the fractions (largest remainders first)."""
    views = {source.config.views for source in sources if source.config.paired}
    if len(views) > 1:
        raise ValueError(f"views: the paired sources must have the same number, got {sorted(views)}")
    total = sum(source.config.fraction for source in sources)
    ideal = [batch_size * source.config.fraction / total / source.config.views for source in sources]
    units = [int(share + 1e-9) for share in ideal]
    for k in sorted(range(len(sources)), key=lambda k: units[k] - ideal[k]):
        left = batch_size - sum(u * source.config.views for u, source in zip(units, sources, strict=True))
        if left >= sources[k].config.views:
            units[k] += 1
    made = sum(u * source.config.views for u, source in zip(units, sources, strict=True))
    if made != batch_size or not all(units):
        raise ValueError(f"batch_size: {batch_size} images can't be divided over the sources' fractions and views; got {units}")
    for u, source in zip(units, sources, strict=True):
        if u % world:
            raise ValueError(
                f"batch_size: {batch_size} gives {source.config.path} {u} units a step, which {world} ranks can't share evenly"
            )
    return units


def drawn(count: int, weight: Sequence[int]) -> list[int]:
    """How many of the first `count` samples of the stream come from each source; they add up to `count`.

    Each grows by 0 or 1 with every sample and stays within one sample of its share, weight / sum(weight) * count; within 1.7
    samples for five or more sources whose weights add up to more than LONGEST_PERIOD.
    """
    weight = tuple(weight)
    if len(weight) <= 4 or sum(weight) > LONGEST_PERIOD:
        return _halved(count, weight)
    periods, rest = divmod(count, sum(weight))
    return [periods * own + bisect_left(slots, rest) for own, slots in zip(weight, _schedule(weight), strict=True)]


@functools.lru_cache(8)
def _schedule(weight: tuple[int, ...]) -> list[array[int]]:
    """The slots of each source, ascending, in one period of sum(weight) slots: Tijdeman, "The chairman assignment problem" (1980).

    No prefix deviates by more than 1 - 1 / (2k - 2) from the share of any of k sources. That bound gives a source's n-th sample
    a release and a deadline; each slot goes to the released sample with the earliest deadline.
    """
    period, parts = sum(weight), 2 * len(weight) - 2

    def released(source: int, n: int) -> int:
        return -((parts * n + 1) * period // (-parts * weight[source])) - 1

    def deadline(source: int, n: int) -> int:
        return (parts * (n + 1) - 1) * period // (parts * weight[source])

    slots = [array("i") for _ in weight]
    waiting = [(released(source, 0), source) for source in range(len(weight))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (deadline(source, len(slots[source])), source))
        source = heapq.heappop(ready)[1]
        slots[source].append(slot)
        heapq.heappush(waiting, (released(source, len(slots[source])), source))
    return slots


def _halved(count: int, weight: tuple[int, ...]) -> list[int]:
    """The same by rounding alone: each node of a binary tree over the sources splits its samples between its two branches.

    Rounding costs half a sample at each node, and a branch inherits its share of the error above it. So a source of weight w is at most
    (1 + sum of w / a) / 2 from its share, summed over the weights `a` of the nodes above it except the root. One such node (four sources)
    gives less than 1. In a Huffman tree these nodes weigh at least w, 2w, 3w, 5w, 8w and so on, which gives less than 1.7.
    """
    counts = [0] * len(weight)

    def share(node: _Tree, left: int) -> None:
        if isinstance(node, int):
            counts[node] = left
            return
        own, rest = _weight(node[0], weight), _weight(node, weight)
        first = (2 * left * own + rest) // (2 * rest)
        share(node[0], first)
        share(node[1], left - first)

    share(_tree(weight), count)
    return counts


@functools.lru_cache(8)
def _tree(weight: tuple[int, ...]) -> _Tree:
    """A Huffman tree, except that its last four branches are paired; a leaf is a source's number."""
    heap: list[tuple[int, int, _Tree]] = [(own, source, source) for source, own in enumerate(weight)]
    heapq.heapify(heap)
    made = len(weight)  # breaks ties, before trees would be compared
    while len(heap) > 4:
        (a, _, light), (b, _, heavy) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a + b, made, (light, heavy)))
        made += 1
    branches = [node for _, _, node in sorted(heap, key=lambda branch: branch[:2])]
    while len(branches) > 1:
        branches = [*zip(branches[::2], branches[1::2], strict=False), *branches[len(branches) & ~1 :]]
    return branches[0]


def _weight(node: _Tree, weight: tuple[int, ...]) -> int:
    return weight[node] if isinstance(node, int) else _weight(node[0], weight) + _weight(node[1], weight)
