"""Which sample comes at which position: a permutation per epoch that is computed, never stored or shuffled.

`Order(lengths, seed)` maps a global position t = 0, 1, 2, ... to a sample: epoch t // n, place t % n, and within an epoch
every sample comes exactly once. Every position costs the same, so a run can resume anywhere without a replay, and the
sequence doesn't depend on workers, ranks or batch sizes.

The permutation is a Feistel network on the smallest power of four that holds n, cycle-walked until the result is below n
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from ov3fast.data import hash_rng

ROUNDS = 8


def permute(index: np.ndarray, n: int, seed: int, *counters: int) -> np.ndarray:
    """Applies the pseudo-random permutation of range(n) given by seed and counters to `index` (int64, values in [0, n))."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    x = np.asarray(index, np.int64).astype(np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x[outside] >> shift, x[outside] & mask
        for i in range(ROUNDS):
            left, right = right, left ^ (hash_rng.bits(seed, hash_rng.ORDER, *counters, i, right) & mask)
        x[outside] = (left << shift) | right
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


class Order:
    """Positions -> sample numbers, epoch after epoch.

    lengths: the number of samples in each shard (or one number). seed: determines the permutations.
    window: how many shards are shuffled together: 0 shuffles all samples; w > 0 permutes the shards and then the samples of w
    consecutive shards together, so that few shards are open at a time (for sets too large for random access everywhere).
    """

    def __init__(self, lengths: int | Iterable[int], seed: int = 0, window: int = 0):
        self.lengths = np.atleast_1d(np.asarray(lengths if isinstance(lengths, int) else list(lengths), np.int64))
        self.n, self.seed = int(self.lengths.sum()), seed
        self.window = window if 0 < window < len(self.lengths) else 0
        if self.n == 0:
            raise ValueError("lengths: there are no samples to order; check the shards")
        self._first = np.concatenate([[0], np.cumsum(self.lengths)])  # where each shard's samples start in the set
        self._shards: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __getitem__(self, positions: np.ndarray | int) -> np.ndarray:
        """Sample numbers, int64, at the global positions (int64, any shape, >= 0)."""
        positions = np.asarray(positions, np.int64)
        epochs, places = np.divmod(positions, self.n)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._epoch(int(epoch), places[here])
        return samples

    def _epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if not self.window:
            return permute(places, self.n, self.seed, epoch)
        shards, starts, edges = self._order_of_shards(epoch)
        blocks = np.searchsorted(edges, places, side="right") - 1
        samples = np.empty_like(places)
        for block in np.unique(blocks):
            here, start, size = blocks == block, edges[block], int(edges[block + 1] - edges[block])
            inside = start + permute(places[here] - start, size, self.seed, epoch, 1 + int(block))
            shard = np.searchsorted(starts, inside, side="right") - 1
            samples[here] = self._first[shards[shard]] + inside - starts[shard]
        return samples

    def _order_of_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's shards in their order, where each starts, and where each block of `window` shards starts: three numbers a shard."""
        if epoch not in self._shards:
            shards = permute(np.arange(len(self.lengths)), len(self.lengths), self.seed, epoch, 0)
            starts = np.concatenate([[0], np.cumsum(self.lengths[shards])])
            edges = starts[np.append(np.arange(0, len(shards), self.window), len(shards))]
            while len(self._shards) > 1:  # a batch may lie in two epochs
                self._shards.pop(next(iter(self._shards)))
            self._shards[epoch] = shards, starts, edges
        return self._shards[epoch]


def order_hash(previous: str, keys: Iterable[str | int]) -> str:
    """Running sha256 over the keys of the batches: chain it from "" batch by batch; equal hashes mean equal sequences."""
    digest = hashlib.sha256(previous.encode())
    for key in keys:
        digest.update(b"\0" + str(key).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
