"""Rows of one [N, ...] tensor sharded over a process group, and the collectives that the contrastive loss runs on them.

Rank w holds sizes[w] rows, in rank order; sizes may differ, and be 0. Without a group there is one rank and every method is
the identity. Sums over ranks run in the collective's own fixed order. Every rank of the group must call them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ov3fast import environment

PIECE_ROWS, MOST_PIECES = 512, 16
"""Rows per piece that the ring passes on, and the largest number of pieces per rank."""


@dataclass(frozen=True)
class RowShards:
    group: Any
    """The process group, or None."""
    rank: int
    sizes: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Where this rank's rows begin."""
        return sum(self.sizes[: self.rank])

    def own(self, x: Tensor) -> Tensor:
        """[N, ...] -> this rank's rows."""
        return x[self.offset : self.offset + self.sizes[self.rank]]

    def gather(self, x: Tensor) -> Tensor:
        """This rank's rows -> [N, ...], of any dtype (the bytes travel)."""
        if self.group is None:
            return x
        import torch.distributed as dist

        longest = max(self.sizes)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8), group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def exchange(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its rows) for every rank: this one's first, while the others' are in flight, then those in rank order."""
        if self.group is None:
            yield self.rank, x
            return
        import torch.distributed as dist

        parts = [x.new_empty((size, *x.shape[1:])) for size in self.sizes]
        parts[self.rank] = x.contiguous()
        travelling = {
            rank: dist.broadcast(part.view(torch.uint8), group=self.group, group_src=rank, async_op=True)
            for rank, part in enumerate(parts) if part.numel()
        }  # fmt: skip
        yield self.rank, parts[self.rank]
        for rank, part in enumerate(parts):
            if rank in travelling:
                travelling[rank].wait()
            if rank != self.rank:
                yield rank, part

    def ring(self, x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(rank, first, its rows from `first` on) until every rank's rows have arrived: this one's whole, then the others' in `pieces`,
        each received from the previous rank while the piece before it is computed on. At most three pieces are in memory."""
        x = x.contiguous()
        places = [(piece, hop) for piece in range(self.pieces) for hop in range(1, self.world)]
        arriving = self._next(x, places, 0, None)
        yield self.rank, 0, x
        for number, (piece, hop) in enumerate(places):
            block = arriving.wait()
            arriving = self._next(x, places, number + 1, block)
            owner = (self.rank - hop) % self.world
            yield owner, self.piece(owner, piece).start, block

    @property
    def pieces(self) -> int:
        """Pieces per rank."""
        return min(MOST_PIECES, max(1, -(-max(self.sizes) // PIECE_ROWS)))

    def piece(self, rank: int, number: int) -> slice:
        """The rows of a rank's piece `number`."""
        return slice(*(self.sizes[rank] * part // self.pieces for part in (number, number + 1)))

    def _next(self, x: Tensor, places: list[tuple[int, int]], number: int, held: Tensor | None) -> _Arriving:
        """Starts transfer `number`: the first hop sends this rank's own piece, later hops the piece it received."""
        if number == len(places):
            return _Arriving(x, x, [])
        piece, hop = places[number]
        rows = self.piece((self.rank - hop) % self.world, piece)
        sent = x[self.piece(self.rank, piece)] if hop == 1 or held is None else held
        return self._pass_on(sent, x.new_empty((rows.stop - rows.start, *x.shape[1:])))

    def _pass_on(self, sent: Tensor, room: Tensor, tag: int = 0) -> _Arriving:
        """Starts sending a block to the next rank and receiving the previous rank's into `room`."""
        import torch.distributed as dist

        ends = ((dist.isend, sent, 1), (dist.irecv, room, -1))
        operations = [
            dist.P2POp(act, x.view(torch.uint8), group=self.group, tag=tag, group_peer=(self.rank + step) % self.world)
            for act, x, step in ends if x.numel()
        ]  # fmt: skip
        return _Arriving(sent, room, dist.batch_isend_irecv(operations) if operations else [])

    def merge(self, m_i: Tensor, l_i: Tensor) -> tuple[Tensor, Tensor]:
        """A log-sum-exp's running (max, sum of exponentials below it) on each rank -> the same over all ranks."""
        if self.group is None:
            return m_i, l_i
        import torch.distributed as dist

        overall = m_i.clone()
        dist.all_reduce(overall, dist.ReduceOp.MAX, group=self.group)
        l_i = l_i * (m_i - overall).exp_()
        dist.all_reduce(l_i, group=self.group)
        return overall, l_i

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[N, ...] of partial sums -> this rank's rows of their sum over the ranks."""
        if self.group is None:
            return x
        import torch.distributed as dist

        if dist.get_backend(self.group) == "gloo":  # older releases of gloo lack reduce_scatter
            dist.all_reduce(x, group=self.group)
            return self.own(x)
        longest = max(self.sizes)
        padded = [torch.cat([part, part.new_zeros((longest - len(part), *x.shape[1:]))]) for part in x.split(self.sizes)]
        out = torch.empty_like(padded[0])
        dist.reduce_scatter(out, padded, group=self.group)
        return out[: self.sizes[self.rank]]


class _Arriving:
    """A block in flight. The block being sent is kept alive until it has left."""

    def __init__(self, sent: Tensor, room: Tensor, works: list[Any]) -> None:
        self.sent: Tensor | None = sent
        self.room, self.works = room, works

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        self.sent = None
        return self.room


class RingSums:
    """Sums over the ranks for the rows that `RowShards.ring` yields: each travels one hop behind its piece, and ends at the rows' owner.

        for owner, first, block in shards.ring(x):
            sums.expect(len(block))     # starts receiving the sum of the previous ranks for this piece
            sums.add(partial)           # [len(block), D]
        own = sums.home()               # [n, D]

    The order of a sum is that of the ring, so its bits depend on the number of ranks alone.
    """

    def __init__(self, shards: RowShards, like: Tensor) -> None:
        """like: a tensor of the sums' dtype, device and trailing shape."""
        self.shards, self.like, self.number = shards, like, -1
        self._own: Tensor | None = None
        self._sum: Tensor | None = None
        self._arriving: _Arriving | None = None
        self._returning: tuple[slice, _Arriving] | None = None

    def expect(self, rows: int) -> None:
        if self.number >= 0 and self.number % (self.shards.world - 1):  # a later hop of the piece
            self._arriving = self._sent_on(rows)

    def add(self, partial: Tensor) -> None:
        if self._own is None:
            self._own = partial
        else:
            self._sum = partial if self._arriving is None else self._arriving.wait().add_(partial)
            self._arriving = None
        self.number += 1
        hops = self.shards.world - 1
        if self.number and self.number % hops == 0:  # the piece's owner is next
            self._arrived()
            rows = self.shards.piece(self.shards.rank, self.number // hops - 1)
            self._returning = rows, self._sent_on(rows.stop - rows.start)
            self._sum = None

    def home(self) -> Tensor:
        """This rank's rows of the sums."""
        self._arrived()
        assert self._own is not None
        return self._own

    def _sent_on(self, rows: int) -> _Arriving:
        assert self._sum is not None
        return self.shards._pass_on(self._sum, self.like.new_empty((rows, *self.like.shape[1:])), tag=1)

    def _arrived(self) -> None:
        if self._returning is not None and self._own is not None:
            rows, arriving = self._returning
            self._own[rows].add_(arriving.wait())
        self._returning = None


def deal(op: str, group_name: str, rows: int, facts: dict[str, int], device: torch.device) -> RowShards:
    """All-gathers the ranks' row counts. `facts` are integers that must agree on all ranks: ValueError on every rank if they don't.

    RuntimeError if a rank doesn't arrive within OV3FAST_EXCHANGE_TIMEOUT seconds.
    """
    if not group_name:
        return RowShards(None, 0, (rows,))
    import torch.distributed as dist

    group = resolve(group_name)
    # On the CPU where the group can: reading sizes from a GPU would wait for its whole queue.
    on_cpu = any(kind.startswith("cpu:") for kind in str(dist.get_backend_config(group)).split(","))
    mine = torch.tensor([rows, *facts.values()], device="cpu" if on_cpu else device)
    told = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    limit = environment.exchange_timeout()
    try:
        dist.all_gather(told, mine, group=group, async_op=True).wait(timedelta(seconds=limit))
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: not every rank of the group reached the exchange within {limit:g} s (OV3FAST_EXCHANGE_TIMEOUT): one of them has "
            f"failed, or runs no {op} in this step ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
        ) from None
    sizes, *columns = zip(*(values.tolist() for values in told), strict=True)
    for name, values in zip(facts, columns, strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"{op}: {name} must be the same on all ranks of the group, got {list(values)} in rank order")
    return RowShards(group, dist.get_rank(group), tuple(sizes))


def resolve(group_name: Any) -> Any:
    """The process group of that name (ProcessGroup.group_name): a schema can carry the name, not the group."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group_name)


def name_of(op: str, group: Any) -> str:
    """The group's name; '' for None. TypeError for anything but a process group, ValueError where this process is not in it."""
    if group is None:
        return ""
    import torch.distributed as dist

    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: group does not contain this process")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a torch.distributed process group or None, got {type(group).__name__}")
    return group.group_name
