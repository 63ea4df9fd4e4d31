"""Generic addresses: windows of the 64-bit address space in which shared, local and parameter memory appear."""

import numpy as np

from .numerics import UINT, u8

WINDOWS = {"shared": 0x7E00_0000_0000, "local": 0x7D00_0000_0000, "param": 0x7C00_0000_0000}
SHIFT = u8(40)
SPACE_OF = {base >> 40: name for name, base in WINDOWS.items()}


class GenericMemory:
    """ld, st and atom without a state space: each lane's address selects the memory."""

    def __init__(self, S):
        self.spaces = {"shared": S.sm, "local": S.lm, "param": S.pm}
        self.gm = S.gm

    @staticmethod
    def parts(addr, mask):
        """[(space, lanes or None for all the active ones, address in the space)]"""
        top = addr >> SHIFT
        live = top if mask is None else top[mask]
        if live.size == 0:
            return [("global", mask, addr)]
        one = int(live[0])
        if (live == live[0]).all():
            name = SPACE_OF.get(one)
            return [("global", mask, addr)] if name is None else [(name, mask, addr - u8(WINDOWS[name]))]
        out, left = [], np.ones(addr.size, bool) if mask is None else mask
        for key, name in SPACE_OF.items():
            m = left & (top == u8(key))
            if m.any():
                out.append((name, m, addr - u8(WINDOWS[name])))
                left = left & ~m
        if left.any():
            out.append(("global", left, addr))
        return out

    def load(self, S, ln, addr, width, n, mask, track=True):
        result = None
        for space, m, a in self.parts(addr, mask):
            x = (
                self.gm.load(S, ln, a, width, n, m, track=track)
                if space == "global"
                else self.spaces[space].load(S, ln, a, width, n, m)
            )
            result = x if result is None else np.where(m, x, result)
        return result

    def store(self, S, ln, addr, data, width, mask):
        for space, m, a in self.parts(addr, mask):
            (self.gm if space == "global" else self.spaces[space]).store(S, ln, a, data, width, m)

    def atomic(self, S, ln, addr, op, ty, width, b, c, mask, lock):
        old = np.zeros(b.shape, UINT[width])
        for space, m, a in self.parts(addr, mask):
            x = S.atomic(ln, space, a, op, ty, width, b, c, m, lock)
            old = x if m is None else np.where(m, x, old)
        return old
