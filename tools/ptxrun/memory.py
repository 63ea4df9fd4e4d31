"""Global and shared memory with bounds, initialisation and race checks.

Accesses are tracked per granule (the narrowest access width that the kernel uses in that space). Each granule holds who
wrote and who read it last: a CTA for global memory (over the whole launch), a warp for shared memory (since the last
barrier). Codes in the writer table w: 0 nobody, n > 0 plain write by n, -n atomic update by n, further codes below.
Reader table r: 0 nobody, n one reader, MULTI several.
"""

import numpy as np

from .numerics import POISON, UINT, i8, u1

MULTI = -(1 << 30)  # several readers / several atomic writers
UNINIT = -(1 << 29)  # shared: never written
FLIGHT = 1 << 20  # shared: destination of a cp.async that has not completed (FLIGHT + warp)
NULL = 64  # arena offset that inactive lanes are pointed at
STEPS = np.arange(256, dtype=i8)[:, None]


class PtxFault(Exception):
    """An access that would fault on a GPU (out of bounds, misaligned), or a barrier reached by only part of the CTA."""


class Space:
    """A byte array with typed views; addresses are offsets into it."""

    def __init__(self, nbytes, granule):
        self.size = (nbytes + 63) // 64 * 64
        self.data = np.zeros(self.size, u1)
        self.views = {w: self.data.view(UINT[w]) for w in (1, 2, 4, 8)}
        self.gran, self.gshift = granule, granule.bit_length() - 1
        self.w, self.r = np.zeros(self.size // granule, np.int32), np.zeros(self.size // granule, np.int32)
        self.sel = None  # lanes of the access being checked (None: all)

    def granules(self, idx, nbytes):
        """(granules, lanes): tracking table slots of each lane's access."""
        g, n = idx >> self.gshift, nbytes >> self.gshift
        return g[None] if n <= 1 else g + STEPS[:n]

    @staticmethod
    def elements(idx, width, n):
        """(elements, lanes): element numbers of each lane's access."""
        e = idx >> (width.bit_length() - 1)
        return e[None] if n == 1 else e + STEPS[:n]

    def first(self, bad):
        """(granule row, lane column, thread) of the first flagged access."""
        gi, lane = (int(x[0]) for x in np.nonzero(bad))
        return gi, lane, lane if self.sel is None else int(self.sel[lane])

    @staticmethod
    def per_granule(flags, G):
        """(elements, T) flags -> (granules, T): a granule may hold several elements or part of one."""
        n, g = flags.shape[0], G.shape[0]
        return flags.repeat(g // n, 0) if g >= n else flags.reshape(g, n // g, -1).any(1)

    def note_read(self, G, me):
        """Record readers; several different readers of one granule become MULTI."""
        cur = self.r.take(G)
        new = np.where((cur == 0) | (cur == me), me, MULTI)
        self.r[G] = new
        if isinstance(me, np.ndarray):  # lanes of different warps may read the same granule at once
            clash = self.r.take(G) != new
            if clash.any():
                self.r[G[clash]] = MULTI


class GlobalMemory(Space):
    """All tensors of a launch in one arena, with unmapped gaps between them."""

    BASE = 0x7F00_0000_0000
    GAP = 4096

    def __init__(self, granule, threads):
        self.warp = np.arange(threads, dtype=np.int32) // 32
        self.regions, self.top = [], self.GAP  # (start, end, name)
        self.granule0 = granule
        self.me = 1  # current CTA + 1
        self.hb, self.released = {}, {}  # lock-style synchronisation between CTAs
        self.sync_names, self.exact = set(), False
        self.fenced = False  # a __threadfence since the CTA's last plain write

    def reserve(self, nbytes):
        start = (self.top + 255) // 256 * 256
        self.top = start + nbytes + self.GAP
        return start

    def build(self):
        super().__init__(self.top, self.granule0)
        self.lw, self.lr = np.zeros_like(self.w), np.zeros_like(self.w)  # last writing/reading warp: epoch * 64 + warp
        self.valid = np.zeros(self.size, np.bool_)
        self.valid[: self.GAP // 2] = False
        self.valid[NULL : NULL + 64] = True

    def allow(self, start, end, name, mask=None):
        self.regions.append((start, end, name))
        if mask is None:
            self.valid[start:end] = True
        else:
            self.valid[start:end] |= mask

    def name_of(self, off):
        for s, e, n in self.regions:
            if s <= off < e:
                return f"{n}[byte {off - s}]"
        near = min(self.regions, key=lambda r: min(abs(off - r[0]), abs(off - r[1] + 1)), default=None)
        if near is None:
            return "no tensor"
        s, e, n = near
        return f"{off - e} bytes past the end of {n}" if off >= e else f"{s - off} bytes before {n}"

    def tensor_of(self, off):
        return next((n for s, e, n in self.regions if s <= off < e), "?")

    def locate(self, addr, nbytes, mask, S, ln, kind):
        """Absolute addresses -> arena offsets, checked. Returns (offsets, mask); faulting lanes are dropped from mask."""
        idx = addr.view(i8) - self.BASE
        if mask is not None:
            idx = np.where(mask, idx, NULL)
        bad = None
        if nbytes > 1 and (idx & (nbytes - 1)).any():
            bad, why = (idx & (nbytes - 1)) != 0, "misaligned"
        else:
            ok = self.valid.take(idx, mode="clip") & (idx > 0) & (idx < self.size)
            for k in range(self.gran, nbytes, self.gran) if self.exact else [nbytes - 1]:
                ok &= self.valid.take(idx + k, mode="clip")
            if not ok.all():
                bad, why = ~ok, "out of bounds"
        if bad is not None:
            t = int(np.flatnonzero(bad)[0])
            S.report(
                "oob",
                ln,
                f"{why} {kind} of {nbytes} bytes at {int(addr[t]):#x} ({self.name_of(int(idx[t]))})",
                t,
                int(bad.sum()),
                fatal=not S.tolerate_oob,
            )
            mask = ~bad if mask is None else mask & ~bad
            idx = np.where(mask, idx, NULL)
        return idx, mask

    def load(self, S, ln, addr, width, n, mask, kind="ld", track=True):
        """(n, T) elements; inactive lanes hold garbage."""
        total = width * n
        self.sel = None
        idx, m2 = self.locate(addr, total, mask, S, ln, "read")
        S.count(kind, total, idx, m2)
        if S.check and track:
            G = self.granules(idx, total)
            t = self.w.take(G)
            bad = (t != 0) & (np.abs(t) != self.me)
            if m2 is not None:
                bad &= m2
            if bad.any():
                self.conflict(S, ln, G, bad, t, "read of data written by another CTA")
            self.note_read(G, self.me)
            self.warp_read(S, ln, G, m2)
        out = self.views[width].take(self.elements(idx, width, n))
        if m2 is not mask:  # tolerated out-of-bounds lanes read poison
            out = np.where(m2, out, UINT[width](POISON[width]))
        return out

    def store(self, S, ln, addr, data, width, mask):
        """data: (n, T)"""
        n = data.shape[0]
        total = width * n
        self.fenced = False
        idx, mask = self.locate(addr, total, mask, S, ln, "write")
        self.sel, sel = None, slice(None)
        if mask is not None:
            self.sel = sel = np.flatnonzero(mask)
            idx, data = idx[sel], data[:, sel]
        S.count("st", total, idx, None)
        E = self.elements(idx, width, n)
        if S.check:
            G = self.granules(idx, total)
            t, r = self.w.take(G), self.r.take(G)
            bad = (t != 0) & (np.abs(t) != self.me)
            if bad.any():
                differs = self.per_granule(self.views[width].take(E) != data, G)
                same = "" if differs[bad].any() else " (same value)"
                self.conflict(S, ln, G, bad, t, "write over data written by another CTA" + same)
            bad = (r != 0) & (r != self.me)
            if bad.any():
                self.conflict(S, ln, G, bad, r, "write over data read by another CTA")
            self.w[G] = self.me
            code, base = S.epoch * 64 + self.warp[sel], S.epoch * 64
            t, r = self.lw.take(G), self.lr.take(G)
            bad = (t >= base) & (t != code)
            if bad.any():
                bad &= self.per_granule(self.views[width].take(E) != data, G)
            bad |= (r >= base) & (r != code)
            if bad.any():
                self.warp_race(S, ln, "write over what another warp of the CTA wrote or read", G, bad)
            self.lw[G] = code
        self.views[width][E] = data
        if S.check:
            bad = self.views[width].take(E) != data
            if bad.any():
                self.warp_race(
                    S, ln, "store of different values to one address by several lanes", E * width >> self.gshift, bad
                )

    def warp_read(self, S, ln, G, mask):
        """Threads of one CTA also need a barrier between conflicting accesses of different warps."""
        base = S.epoch * 64
        code = base + self.warp
        t = self.lw.take(G)
        bad = (t >= base) & (t != code)
        if mask is not None:
            bad &= mask
        if bad.any():
            self.warp_race(S, ln, "read of what another warp of the CTA wrote", G, bad)
        cur = self.lr.take(G)
        new = np.where((cur < base) | (cur == code), code, base + 63)
        self.lr[G] = new
        clash = self.lr.take(G) != new
        if clash.any():
            self.lr[G[clash]] = base + 63

    def warp_race(self, S, ln, what, G, bad):
        gi, lane, thread = self.first(bad)
        S.report(
            "race",
            ln,
            f"global {what} (no barrier between): {self.name_of(int(G[gi, lane]) << self.gshift)}",
            thread,
            int(bad.sum()),
        )

    def atomic_access(self, S, ln, addr, nbytes, mask, is_sync):
        """Bounds and conflict checks of an atomic; returns (element offsets in bytes, active lanes)."""
        idx, mask = self.locate(addr, nbytes, mask, S, ln, "atomic")
        self.sel = lanes = np.arange(idx.size) if mask is None else np.flatnonzero(mask)
        idx = idx[lanes]
        S.count("atom", nbytes, idx, None)
        if S.check and idx.size:
            if is_sync or self.fenced or (self.sync_names and self.tensor_of(int(idx[0])) in self.sync_names):
                for loc in set(idx.tolist()):
                    mine = self.hb.setdefault(self.me, set())
                    mine |= self.released.get(loc, set())
                    self.released.setdefault(loc, set()).update(mine | {self.me})
            G = self.granules(idx, nbytes)
            t, r = self.w.take(G), self.r.take(G)
            bad = (t > 0) & (t != self.me)
            if bad.any():
                self.conflict(S, ln, G, bad, t, "atomic on data plainly written by another CTA")
            bad = (r != 0) & (r != self.me)
            if bad.any():
                self.conflict(S, ln, G, bad, r, "atomic on data plainly read by another CTA")
            self.w[G] = np.where(t == 0, -self.me, np.where((t < 0) & (t != -self.me), MULTI, t))
        return idx, lanes

    def conflict(self, S, ln, G, bad, who, what):
        seen = self.hb.get(self.me, ())
        if seen and all(i in seen or i == -MULTI for i in set(np.abs(who[bad]).tolist())):
            return  # ordered by a lock that this CTA acquired after them ("several"
        gi, lane, thread = self.first(bad)  # is taken to be ordered too)
        other = int(abs(who[gi, lane]))
        whom = "several CTAs" if other == -MULTI else f"CTA {other - 1}"
        off = int(G[gi, lane]) << self.gshift
        S.report("race", ln, f"global {what}: {self.name_of(off)}, by CTA {self.me - 1} and {whom}", thread, int(bad.sum()))


class SharedMemory(Space):
    """One CTA's shared memory. Addresses start at BASE, as on sm_90, so that absolute address 0 is not valid."""

    BASE = 1024

    def __init__(self, nbytes, granule, warp_of, ranges=None):
        """ranges: the arrays as (start, end, name); memory between them is not usable."""
        self.limit = self.BASE + nbytes
        super().__init__(self.limit + 16, granule)
        self.usable, self.ranges = None, ranges or []
        if len(self.ranges) > 1:
            self.usable = np.zeros(self.size, bool)
            self.usable[: self.BASE] = True  # where inactive lanes are pointed
            for a, b, _ in ranges:
                self.usable[self.BASE + a : self.BASE + b] = True
        self.warp_of = warp_of  # lane -> warp + 1
        self.async_reads = None  # wgmmas in flight that read a granule
        self.dirty = None  # written since the last fence.proxy.async
        self.begin()

    def track_async(self):
        self.async_reads, self.dirty = np.zeros(self.w.size, np.int16), np.zeros(self.w.size, bool)

    def begin(self):
        self.data[:] = 0xBA
        self.w[:] = UNINIT
        self.w[: self.BASE >> self.gshift] = 0  # where inactive lanes are pointed
        self.r[:] = 0
        if self.dirty is not None:
            self.async_reads[:] = 0
            self.dirty[:] = False

    def barrier(self, warps=None):
        """warps: the participants of a partial barrier. Granules that several warps touched then count as
        ordered too, since the other warps' accesses are no longer known."""
        w = self.w
        if warps is None:
            w[(w < FLIGHT) & (w != UNINIT)] = 0
            self.r[:] = 0
        else:
            w[np.isin(np.abs(w), warps) | (w == MULTI)] = 0
            self.r[np.isin(self.r, warps) | (self.r == MULTI)] = 0

    def locate(self, addr, nbytes, mask, S, ln, kind):
        idx = addr.astype(i8)
        if mask is not None:
            idx = np.where(mask, idx, NULL)
            lo_ok = (idx >= self.BASE) | ~mask
        else:
            lo_ok = idx >= self.BASE
        bad = ~(lo_ok & (idx <= self.limit - nbytes))
        why = "out of bounds"
        if self.usable is not None and not bad.any():
            bad = ~(self.usable.take(idx) & self.usable.take(idx + (nbytes - 1)))
        if not bad.any() and nbytes > 1:
            bad, why = (idx & (nbytes - 1)) != 0, "misaligned"
        if bad.any():
            t = int(np.flatnonzero(bad)[0])
            S.report(
                "oob",
                ln,
                f"{why} shared {kind} of {nbytes} bytes at offset {int(idx[t]) - self.BASE} "
                f"of {self.limit - self.BASE} ({self.name_of(int(idx[t]) - self.BASE)})",
                t,
                int(bad.sum()),
                fatal=True,
            )
        return idx

    def name_of(self, off):
        near = min(self.ranges, key=lambda r: max(r[0] - off, off - r[1] + 1), default=None)
        if near is None:
            return "shared memory"
        a, b, name = near
        return f"{off - b} bytes past the end of {name}" if off >= b else f"byte {off - a} of {name}"

    def check_read(self, S, ln, G, me, live=None):
        t = self.w.take(G)
        bad = (t != 0) & (t != me)
        if live is not None:
            bad &= live
        if bad.any():
            bad &= t != -me  # its own atomics
            un = bad & (t == UNINIT)
            if un.any():
                self.note(S, ln, "uninitialised", un, G, "read of shared memory that nobody wrote")
            fl = bad & (t >= FLIGHT)
            if fl.any():
                self.note(S, ln, "race", fl, G, "shared read of a cp.async destination before its wait_group")
            rest = bad & ~un & ~fl
            if rest.any():
                self.note(S, ln, "race", rest, G, "shared read of what another warp wrote since the last barrier", t)
        self.note_read(G, me)

    def check_write(self, S, ln, G, me, code, changed=None):
        t, r = self.w.take(G), self.r.take(G)
        bad = (t != 0) & (np.abs(t) != me) & (t != UNINIT)
        if bad.any():
            fl = bad & (t >= FLIGHT)
            if fl.any():
                self.note(S, ln, "race", fl, G, "shared write over a cp.async destination still in flight")
            rest = bad & ~fl
            if changed is not None:
                rest &= changed()  # the same value again: benign
            if rest.any():
                self.note(S, ln, "race", rest, G, "shared write over what another warp wrote since the last barrier", t)
        bad = (r != 0) & (r != me)
        if bad.any():
            self.note(S, ln, "race", bad, G, "shared write over what another warp read since the last barrier", r)
        if self.async_reads is not None and self.async_reads.take(G).any():
            self.note(S, ln, "race", self.async_reads.take(G) > 0, G, "shared write over an operand of a wgmma still in flight")
        self.w[G] = code
        if self.dirty is not None:
            self.dirty[G] = True

    def check_atomic(self, S, ln, G, me):
        t, r = self.w.take(G), self.r.take(G)
        bad = (t != 0) & (t != me) & ~((t < 0) & (t > UNINIT)) & (t != MULTI)
        if bad.any():
            kind = "uninitialised" if (t[bad] == UNINIT).all() else "race"
            self.note(S, ln, kind, bad, G, "shared atomic on data not ordered by a barrier", t)
        bad = (r != 0) & (r != me)
        if bad.any():
            self.note(S, ln, "race", bad, G, "shared atomic on data that another warp read since the last barrier", r)
        new = np.where(t == me, t, np.where((t == 0) | (t == -me) | (t == UNINIT), -me, MULTI))
        self.w[G] = new
        clash = self.w.take(G) != new
        if clash.any():
            self.w[G[clash]] = MULTI

    def note(self, S, ln, kind, bad, G, what, who=None):
        gi, lane, thread = self.first(bad)
        off = (int(G[gi, lane]) << self.gshift) - self.BASE
        other = "" if who is None else (", several warps" if who[gi, lane] < 0 else f", other warp {int(who[gi, lane]) - 1}")
        S.report(kind, ln, f"{what} (offset {off}{other})", thread, int(bad.sum()))

    def load(self, S, ln, addr, width, n, mask):
        idx = self.locate(addr, width * n, mask, S, ln, "read")
        self.sel = None
        if S.check:
            self.check_read(S, ln, self.granules(idx, width * n), self.warp_of, mask)
        if S.count_banks:
            S.banks(idx, width * n, mask)
        return self.views[width].take(self.elements(idx, width, n))

    def store(self, S, ln, addr, data, width, mask):
        n = data.shape[0]
        idx = self.locate(addr, width * n, mask, S, ln, "write")
        if S.count_banks:
            S.banks(idx, width * n, mask)
        warp, self.sel = self.warp_of, None
        if mask is not None:
            self.sel = sel = np.flatnonzero(mask)
            idx, data, warp = idx[sel], data[:, sel], warp[sel]
        E = self.elements(idx, width, n)
        view = self.views[width]
        if S.check:
            G = self.granules(idx, width * n)
            self.check_write(S, ln, G, warp, np.broadcast_to(warp, G.shape), lambda: self.per_granule(view.take(E) != data, G))
        view[E] = data
        if S.check:
            bad = view.take(E) != data
            if bad.any():
                self.note(
                    S,
                    ln,
                    "race",
                    bad,
                    E * width >> self.gshift,
                    "shared store of different values to one address by several lanes",
                )
