"""wmma: whole-matrix loads and stores, and their products as sequences of m?n8k? mma steps. A mixin of the executor.

PTX does not specify which element a lane's register holds; here it is as on sm_80, the layout of the mma instructions:
8x8 tiles (8 rows, 32 bits in each of 4 column positions), numbered down the rows first.
"""

import re

import numpy as np

from .numerics import matrix_width, u1, u4

UNIT = {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4, "s32": 4, "s8": 1, "u8": 1, "f64": 8}


def dims(shape):
    return tuple(int(x) for x in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())


def fragment_map(which, shape, kind):
    """(row, column) arrays of shape (registers, 32 lanes, elements per register) in the matrix as the product sees it."""
    M, N, K = dims(shape)
    lane = np.arange(32)[None, :, None]
    if which in "ab":
        e = 4 // UNIT[kind]
        rows, cols = (M, K) if which == "a" else (N, K)  # b is laid out as its transpose
        j = np.arange(rows // 8 * (cols // (4 * e)))[:, None, None]
        h = np.arange(e)[None, None, :]
        down, across = (rows // 8, cols // (4 * e))
        rt, ct = (j % down, j // down) if which == "a" else (j // across, j % across)
        r, c = rt * 8 + lane // 4, ct * 4 * e + lane % 4 * e + h
        return (r + 0 * c, c + 0 * r) if which == "a" else (c + 0 * r, r + 0 * c)
    e = 4 // UNIT[kind]  # accumulator: pairs of columns
    i = (np.arange(M * N // 32 // e)[:, None] * e + np.arange(e))[:, None, :]
    r = i // 2 % (M // 8) * 8 + lane // 4
    c = i // (2 * (M // 8)) * 8 + lane % 4 * 2 + i % 2
    return r + 0 * c, c + 0 * r


class Wmma:
    def wmma_plan(self, which, shape, kind, layout):
        """(lines, bytes per line, element positions of the fragment in the lines)."""
        key = ("wmma", which, shape, kind, layout)
        if key not in self.patterns:
            M, N, K = dims(shape)
            rows, cols = {"a": (M, K), "b": (K, N)}.get(which, (M, N))
            r, c = fragment_map(which, shape, kind)
            lines, length = (rows, cols) if layout == "row" else (cols, rows)
            self.patterns[key] = lines, length * UNIT[kind], (r * length + c if layout == "row" else c * length + r)
        return self.patterns[key]

    def wmma_lanes(self, lines, nbytes, base, stride, size):
        """Distributes 16-byte chunks of the matrix over the lanes of each warp: [(addresses, lanes in use, chunk numbers)]"""
        per, lane, out = nbytes // 16, np.arange(self.T) % 32, []
        for first in range(0, lines * per, 32):
            chunk = lane + first
            use = chunk < lines * per
            chunk = np.where(use, chunk, 0)
            off = (chunk // per) * stride.astype(np.int64) * size + chunk % per * 16
            out.append((base + off.astype(base.dtype), use, chunk))
        return out

    def wmma_load(self, ln, R, ds, mem, which, shape, kind, layout, base, stride, m):
        lines, nbytes, where_to = self.wmma_plan(which, shape, kind, layout)
        if m is not None:
            self.whole_warps(ln, m)
        buf = np.zeros((self.W, lines * nbytes // 16, 16), u1)
        for addr, use, chunk in self.wmma_lanes(lines, nbytes, base, stride, UNIT[kind]):
            active = use if m is None else use & m
            if not active.any():
                continue
            x = mem.load(self, ln, addr, 4, 4, None if active.all() else active)  # (4, T) words
            x = np.ascontiguousarray(x.T).view(u1).reshape(self.W, 32, 16)
            n = int(use[:32].sum())
            buf[:, chunk[0] : chunk[0] + n] = x[:, :n]
        flat = buf.reshape(self.W, -1).view(f"u{UNIT[kind]}")
        regs = np.ascontiguousarray(flat[:, where_to].transpose(1, 0, 2, 3)).view(u4)  # (registers, W, 32, 1)
        regs = regs.reshape(regs.shape[0], self.T)
        for j, d in enumerate(ds):  # more registers than elements: copies
            v = regs[j % len(regs)]
            R[d] = v.copy() if m is None else np.where(m, v, R[d])

    def wmma_store(self, ln, R, ss, mem, shape, kind, layout, base, stride, m):
        lines, nbytes, where_to = self.wmma_plan("d", shape, kind, layout)
        if m is not None:
            self.whole_warps(ln, m)
        regs = np.stack([R[s] for s in ss]).reshape(len(ss), self.W, 32, 1).view(f"u{UNIT[kind]}")
        flat = np.zeros((self.W, lines * nbytes // UNIT[kind]), f"u{UNIT[kind]}")
        flat[:, where_to] = regs.transpose(1, 0, 2, 3)
        buf = flat.view(u4).reshape(self.W, -1, 4)
        for addr, use, chunk in self.wmma_lanes(lines, nbytes, base, stride, UNIT[kind]):
            active = use if m is None else use & m
            if active.any():
                data = buf[np.arange(self.T) // 32, chunk].T
                mem.store(self, ln, addr, np.ascontiguousarray(data), 4, None if active.all() else active)

    def wmma_mma(self, ln, R, d, a, b, c, shape, kind, acc, sat, m):
        """One mma per 8 columns of the result."""
        M, N, K = dims(shape)
        na, nb = (x * K * matrix_width(kind) // 128 for x in (M, N))
        a, b = a[:na], b[:nb]  # f16 fragments of some shapes carry copies
        pb, pd = nb // (N // 8), len(d) // (N // 8)
        for t in range(N // 8):
            self.mma(
                ln,
                R,
                d[t * pd : (t + 1) * pd],
                a,
                b[t * pb : (t + 1) * pb],
                c[t * pd : (t + 1) * pd],
                f"m{M}n8k{K}",
                kind,
                acc,
                sat,
                m,
                count=f"wmma.{shape}.{kind}" if t == 0 else None,
            )
