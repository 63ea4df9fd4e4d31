"""cp.async: data is read when the copy is issued and arrives in shared memory at the issuing thread's wait.

Groups are counted per thread, as on the GPU, so commits and waits may be divergent. A mixin of the executor.
"""

import numpy as np

from .memory import FLIGHT
from .numerics import u4, u8


class CpAsync:
    def cp_begin(self):
        self.copies = []  # [instruction, elements, data, granules, warps, lanes, groups]
        self.committed = np.zeros(self.T, np.int32)  # groups committed so far, by thread

    def cp_async(self, ln, dst, src, size, nsrc, m):
        T, words = self.T, size // 4
        data = np.zeros((words, T), u4)
        if nsrc is None:
            nsrc = np.full(T, size, u4)
        full = nsrc == size if m is None else (nsrc == size) & m
        if full.any():
            data = np.where(full, self.gm.load(self, ln, src, 4, words, full, "cp.async"), data)
        part = (nsrc > 0) & (nsrc < size) & (True if m is None else m)
        for k in range(0, size if part.any() else 0):  # partial copies, byte by byte (rare)
            now = part & (nsrc > k)
            if now.any():
                byte = self.gm.load(self, ln, src + u8(k), 1, 1, now, "cp.async")[0].astype(u4) << u4(8 * (k % 4))
                data[k // 4] |= np.where(now, byte, u4(0))
        sm = self.sm
        idx = sm.locate(dst, size, m, self, ln, "cp.async")
        if self.count_banks:
            self.banks(idx, size, m)
        warp, sel, sm.sel, groups = self.warp_of, None, None, self.committed
        if m is not None:
            sm.sel = sel = np.flatnonzero(m)
            idx, data, warp, groups = idx[sel], data[:, sel], warp[sel], groups[sel]
        G = sm.granules(idx, size)
        if self.check:
            sm.check_write(self, ln, G, warp, np.broadcast_to(warp + FLIGHT, G.shape))
        self.copies.append([ln, sm.elements(idx, 4, words), data, G, warp, sel, groups])

    def cp_commit(self, M):
        self.committed = self.committed + (np.int32(1) if M is None else M.astype(np.int32))

    def cp_wait(self, keep, M):
        """Waits until at most `keep` of the thread's groups are pending; keep < 0: for everything issued."""
        limit = self.committed - np.int32(keep)
        left = []
        for copy in self.copies:
            _, E, data, G, warp, sel, groups = copy
            done = groups < (limit if sel is None else limit[sel])
            if M is not None:
                done &= M if sel is None else M[sel]
            if done.all():
                self.arrive(E, data, G, warp)
            elif done.any():
                self.arrive(E[:, done], data[:, done], G[:, done], warp[done])
                stay = ~done
                left.append(
                    [
                        copy[0],
                        E[:, stay],
                        data[:, stay],
                        G[:, stay],
                        warp[stay],
                        np.flatnonzero(stay) if sel is None else sel[stay],
                        groups[stay],
                    ]
                )
            else:
                left.append(copy)
        self.copies = left

    def arrive(self, E, data, G, warp):
        self.sm.views[4][E] = data
        self.sm.w[G] = warp  # from now on like a plain write by the copying warp

    def cp_end(self):
        if self.copies and self.check:
            self.report("pending", self.copies[0][0], "cp.async copies never waited for", 0, 1)
