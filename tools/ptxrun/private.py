"""Memory without sharing: per-thread local memory and the kernel's parameters."""

import numpy as np

from .memory import Space
from .numerics import i8, u8


class LocalMemory(Space):
    """Per-thread memory; a thread's bytes are contiguous."""

    kind = "local memory"

    def __init__(self, per_thread, T):
        super().__init__(per_thread * T, 4)
        self.per, self.base = per_thread, np.arange(T, dtype=i8) * per_thread

    def begin(self):
        self.data[:] = 0xBA

    def index(self, S, ln, addr, nbytes, mask):
        a = addr.astype(i8)
        act = True if mask is None else mask
        bad, why = ((a < 0) | (a + nbytes > self.per)) & act, "out of bounds"
        if nbytes > 1 and not bad.any():
            bad, why = ((a & (nbytes - 1)) != 0) & act, "misaligned"
        if bad.any():
            S.report("oob", ln, f"{self.kind} access {why}", int(np.flatnonzero(bad)[0]), int(bad.sum()), fatal=True)
        return (a if mask is None else np.where(mask, a, 0)) + self.base

    def load(self, S, ln, addr, width, n, mask):
        return self.views[width].take(self.elements(self.index(S, ln, addr, width * n, mask), width, n))

    def store(self, S, ln, addr, data, width, mask):
        E = self.elements(self.index(S, ln, addr, width * data.shape[0], mask), width, data.shape[0])
        if mask is None:
            self.views[width][E] = data
        else:
            self.views[width][E[:, mask]] = data[:, mask]


class ParamMemory(LocalMemory):
    """The kernel's parameters, for accesses with a computed address (such as a struct of arrays passed by value).

    An inlined function has its parameters in local memory; an address formed from those is below BASE."""

    BASE = 1 << 24
    kind = "kernel parameter"

    def __init__(self, raw, local):
        Space.__init__(self, len(raw) + 16, 4)
        self.data[: len(raw)] = np.frombuffer(raw, np.uint8)
        self.per, self.base, self.local = len(raw), 0, local

    def load(self, S, ln, addr, width, n, mask):
        a = addr & u8(0xFFFFFFFF)  # with or without its generic window
        if int(a[0 if mask is None else mask.argmax()]) < self.BASE:
            return self.local.load(S, ln, a, width, n, mask)
        return super().load(S, ln, a - u8(self.BASE), width, n, mask)

    def store(self, S, ln, addr, data, width, mask):
        S.report("oob", ln, "write to a kernel parameter", 0, 1, fatal=True)
