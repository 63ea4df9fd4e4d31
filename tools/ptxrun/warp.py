"""Warp-wide instructions: member masks, votes, matches, shuffles, reductions. A mixin of the executor."""

import numpy as np

from .numerics import i8, u4

FULL = 0xFFFFFFFF


class WarpOps:
    def whole_warps(self, ln, m):
        """For instructions that need all 32 lanes of a warp (matrix instructions)."""
        k = m.reshape(-1, 32).sum(1)
        if ((k != 0) & (k != 32)).any():
            self.fault(ln, "warp-wide instruction reached by only part of a warp")

    def bits(self, m):
        """(W,) words with a bit per lane."""
        return (m.reshape(-1, 32).astype(u4) << np.arange(32, dtype=u4)).sum(1, dtype=u4)

    def members(self, ln, mask, m):
        """Checks that every existing lane in an executing lane's member mask participates. mask None: all 32."""
        if m is None and mask is None:
            return
        act = np.full(self.W, FULL, u4) if m is None else self.bits(m)
        if mask is None:
            if ((act != 0) & (act != self.exist_bits)).any():
                self.fault(ln, "warp-wide instruction reached by only part of a warp")
            return
        lanes = np.arange(self.T) if m is None else np.flatnonzero(m)
        named, warp = mask[lanes], lanes // 32
        if ((named >> (lanes % 32).astype(u4)) & u4(1) == 0).any():
            self.fault(ln, "executed by a lane that its member mask does not name")
        if (named & self.exist_bits[warp] & ~act[warp]).any():
            self.fault(ln, "warp-wide instruction reached by only part of the lanes in its member mask")

    def shuffled(self, values, idx, m):
        """values[idx]; a lane that does not participate gives a poison value."""
        return np.where(m.take(idx), values.take(idx), u4(0x7FFBADBA)) if m is not None else values.take(idx)

    def vote(self, mode, p, mask, M):
        """mask: member masks or None (all)."""
        if M is not None:
            p = p & M
        b = self.bits(p).repeat(32)
        if mask is not None:
            b = b & mask
        if mode == "ballot":
            return b
        want = self.exist_bits.repeat(32) if mask is None else mask & self.exist_bits.repeat(32)
        return {"any": b != 0, "all": b == want, "uni": (b == want) | (b == 0)}[mode]

    def activemask(self, M):
        act = np.ones(self.T, bool) if M is None else M
        return self.bits(act).repeat(32)

    def elect(self, M):
        act = np.ones(self.T, bool) if M is None else M
        first = act.reshape(-1, 32).argmax(1)
        out = np.zeros((self.W, 32), bool)
        out[np.arange(self.W), first] = True
        return out.ravel() & act

    def match(self, mode, v, mask, M):
        """Lanes of the warp with an equal value: (T,) masks and, for `all`, whether all the members agree."""
        w = v.reshape(-1, 32)
        eq = w[:, :, None] == w[:, None, :]
        act = np.ones_like(w, bool) if M is None else M.reshape(-1, 32)
        same = ((eq & act[:, None, :]).astype(u4) << np.arange(32, dtype=u4)).sum(2, dtype=u4).ravel()
        named = self.exist_bits.repeat(32)
        if mask is not None:
            named = named & mask
        if mode == "any":
            return same & named, None
        agree = (same & named) == named
        return np.where(agree, named, u4(0)), agree

    def redux(self, op, v, mask, M):
        f = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[op]
        if mask is None and (M is None or M.all()):
            return f.reduce(v.reshape(-1, 32), 1, dtype=v.dtype).repeat(32)
        out, act = v.copy(), np.ones(self.T, bool) if M is None else M
        named = np.full(self.T, FULL, u4) if mask is None else mask
        group = np.where(act, (np.arange(self.T) // 32).astype(i8) << 32 | named, -1)
        for g in set(group[act].tolist()):
            sel = group == g
            out[sel] = f.reduce(v[sel], dtype=v.dtype)
        return out
