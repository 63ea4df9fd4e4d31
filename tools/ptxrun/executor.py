"""Runs a translated kernel, one CTA at a time: control flow with reconvergence, warp- and CTA-wide instructions.

All threads of a CTA run in lockstep. Where a branch splits them, the sides run one after the other under a lane mask and
meet again at the branch's immediate post-dominator (so per-thread slow paths of libdevice work). A barrier that only part
of the CTA reaches is an error, as is a warp-wide instruction that only part of a warp reaches.
"""

import numpy as np

from .cpasync import CpAsync
from .generic import GenericMemory
from .memory import MULTI, GlobalMemory, PtxFault, SharedMemory
from .numerics import POISON, UINT, bf, f2, f4, f8, i4, i8, matrix_width, to_bf, u2, u4, u8, widen
from .parser import PtxError
from .private import LocalMemory, ParamMemory
from .translate import Translator, shuffle_index
from .warp import WarpOps
from .wmma import Wmma


class Executor(WarpOps, CpAsync, Wmma):
    """State of a launch. S in the generated code."""

    def __init__(
        self,
        kernel,
        block,
        gm: GlobalMemory,
        shared_bytes,
        report,
        check=True,
        tolerate_oob=False,
        count_banks=False,
        max_instructions=None,
        translator=None,
        params=b"",
    ):
        self.block, n = block, block[0] * block[1] * block[2]
        threads = (n + 31) // 32 * 32  # lanes; those past the block's end never become active
        self.k, self.T, self.W = kernel, threads, threads // 32
        self.tr = translator or Translator(kernel, threads)
        self.gm, self.rep = gm, report
        self.check, self.tolerate_oob, self.count_banks = check, tolerate_oob, count_banks
        self.warp_of = (np.arange(threads) // 32 + 1).astype(np.int32)
        exist = np.arange(threads) < n
        self.exist_bits, self.exist = self.bits(exist), None if n == threads else exist
        self.sym_shared, self.dynamic = self.lay_out_shared(shared_bytes)
        self.lm = LocalMemory(max(16, kernel.local_bytes), threads)
        self.pm = ParamMemory(params, self.lm)
        self.gen = GenericMemory(self)
        self.max_instructions = max_instructions
        self.frags, self.patterns = {}, {}
        if any(i.op.startswith("wgmma.mma") for i in kernel.instrs):
            self.sm.track_async()
        self.cc = np.zeros(threads, i8)
        self.epoch = 0  # counts barriers, over all CTAs

    def lay_out_shared(self, dynamic):
        """Dynamic shared memory first, then the static arrays, with unusable gaps in between, so that an index past the end
        of its array is detected."""
        static = {n: v for n, v in self.k.shared.items() if v.size}
        top, places, ranges = (
            dynamic,
            {n: 0 for n, v in self.k.shared.items() if not v.size},
            [(0, dynamic, "dynamic shared memory")],
        )
        for name, v in static.items():
            align = max(16, v.align)
            top = (top + (16 if top else 0) + align - 1) // align * align
            places[name] = top
            ranges.append((top, top + v.size, name))
            top += v.size
        self.sm = SharedMemory(top, self.tr.granules["shared"], self.warp_of, ranges)
        return places, dynamic

    # ---- reporting and statistics -------------------------------------------------------------------------------
    def report(self, kind, ln, what, lane, count, fatal=False):
        ins = self.k.instrs[ln]
        self.rep.add(kind, ins, what, lane, self.ctaid, count)
        if fatal:
            raise PtxFault(
                f"{self.k.name} at {ins.loc} (PTX line {ins.line}: {ins.text}): thread {lane} of CTA {self.ctaid}: {what}"
            )

    def fault(self, ln, what):
        self.report("sync", ln, what, 0, 1, fatal=True)

    def count(self, kind, nbytes, idx, mask):
        """Global traffic, by kind and access width and by tensor (that of the first active lane)."""
        total = nbytes * (idx.size if mask is None else int(np.count_nonzero(mask)))
        if total:
            t = self.rep.traffic.setdefault(kind, {})
            t[nbytes] = t.get(nbytes, 0) + total
            p = self.rep.per_tensor.setdefault(self.gm.tensor_of(int(idx[0 if mask is None else mask.argmax()])), {})
            p[kind] = p.get(kind, 0) + total

    def banks(self, idx, nbytes, mask):
        """Extra shared-memory passes: lanes of a phase (128 bytes' worth) hitting one bank at different words."""
        words = (idx >> 2)[:, None] + np.arange(max(1, nbytes // 4))
        live = np.ones(len(idx), bool) if mask is None else mask
        per = max(1, min(32, 128 // nbytes))
        for s in range(0, len(idx), per):
            w = np.unique(words[s : s + per][live[s : s + per]])
            if w.size:
                self.rep.bank_conflicts += int(np.bincount(w % 32).max()) - 1

    # ---- running ------------------------------------------------------------------------------------------------
    def run(self, grid, cta_list, params, symbols):
        T, R0 = self.T, []
        for r in self.k.regs:
            R0.append(np.full(T, POISON[r.size], UINT[r.size]))
        tid, (bx, by, bz) = np.arange(T, dtype=u4), self.block
        one = u4(1) << (tid % 32)
        const = {
            "%tid.x": tid % bx,
            "%tid.y": tid // bx % by,
            "%tid.z": tid // (bx * by),
            "%laneid": tid % 32,
            "%warpid": tid // 32,
            "%ntid.x": bx,
            "%ntid.y": by,
            "%ntid.z": bz,
            "%nwarpid": self.W,
            "%nctaid.x": grid[0],
            "%nctaid.y": grid[1],
            "%nctaid.z": grid[2],
            "%cluster_nctarank": 1,
            "%lanemask_eq": one,
            "%lanemask_lt": one - u4(1),
            "%lanemask_le": one | (one - u4(1)),
            "%lanemask_gt": ~(one | (one - u4(1))),
            "%lanemask_ge": ~(one - u4(1)),
            "%nsmid": 1,
            "%dynamic_smem_size": self.dynamic,
            "%total_smem_size": self.sm.limit - SharedMemory.BASE,
        }
        special = []
        for r in self.k.regs:
            if r.name in const:
                R0[r.index] = np.broadcast_to(np.asarray(const[r.name], UINT[r.size]), (T,)).copy()
            elif r.name in ("%ctaid.x", "%ctaid.y", "%ctaid.z"):
                special.append((r.index, "xyz".index(r.name[-1])))
            elif r.name.startswith(("%clock", "%cluster", "%smid", "%global", "%gridid", "%envreg")):
                R0[r.index] = np.zeros(T, UINT[r.size])
        A = Symbols(self, symbols)
        with np.errstate(all="ignore"):
            for linear in cta_list:
                c = (linear % grid[0], linear // grid[0] % grid[1], linear // (grid[0] * grid[1]))
                self.ctaid, self.gm.me = c, linear + 1
                R = list(R0)
                for i, axis in special:
                    R[i] = np.full(T, c[axis], u4)
                self.sm.begin()
                self.gm.fenced = False
                if self.k.local_bytes:
                    self.lm.begin()
                self.epoch += 1
                self.cp_begin()
                self.wg_groups, self.wg_current = [], []
                self.frags.clear()
                self.run_cta(R, params, A)
                self.rep.ctas += 1

    def run_cta(self, R, P, A):
        blocks, fns, T = self.k.blocks, self.tr.fns, self.T
        self.live = self.exist  # lanes that have not returned (None: all)
        stack = [[0, -1, self.exist]]  # block, reconvergence block, mask (None: every lane)
        n = 0
        while stack:
            top = stack[-1]
            b, stop, M = top
            if b == stop or b == -1 or (M is not None and not M.any()):
                stack.pop()
                continue
            full, masked, size = fns[b]
            if M is None:
                full(self, R, None, P, A)
            else:
                (masked or self.tr.masked(b))(self, R, M, P, A)
            n += size
            if self.max_instructions and n > self.max_instructions:
                raise PtxFault(
                    f"more than {self.max_instructions} instructions in CTA {self.ctaid}: an endless loop, or "
                    "waiting for a later CTA?"
                )
            blk = blocks[b]
            term = blk.term
            nxt = b + 1 if b + 1 < len(blocks) else -1
            if term is None:
                top[0] = nxt
                continue
            kind = term.op.split(".")[0]
            if term.pred is None:
                taken, other = M, None
                every, none = True, False
            else:
                p = R[term.pred.index]
                if term.negate:
                    p = ~p
                taken = p if M is None else p & M
                cnt = int(np.count_nonzero(taken))
                every, none = cnt == (T if M is None else int(np.count_nonzero(M))), cnt == 0
                other = ~p if M is None else M & ~p
            if none:
                top[0] = nxt
            elif kind == "trap":
                self.fault(term.index, "trap (device assertion)")
            elif kind == "bra":
                if every:
                    top[0] = blk.target
                else:  # run both sides up to the post-dominator
                    self.rep.divergent_branches += 1
                    top[0] = blk.ipdom
                    stack.append([nxt, blk.ipdom, other])
                    stack.append([blk.target, blk.ipdom, taken])
            elif kind == "brx":  # jump table: one side per index
                which = R[term.operands[0].index]
                lanes = np.ones(T, bool) if taken is None else taken
                values = sorted(set(which[lanes].tolist()))
                if values[-1] >= len(blk.table):
                    self.fault(term.index, f"jump table index {values[-1]} of {len(blk.table)}")
                if len(values) == 1 and every:
                    top[0] = blk.table[values[0]]
                else:
                    self.rep.divergent_branches += 1
                    top[0] = blk.ipdom
                    if not every:
                        stack.append([nxt, blk.ipdom, other])
                    stack += [[blk.table[v], blk.ipdom, lanes & (which == v)] for v in values]
            else:  # ret
                gone = np.ones(T, bool) if taken is None else taken
                self.live = ~gone if self.live is None else self.live & ~gone
                if not self.live.any():
                    break
                for e in stack:
                    e[2] = self.live.copy() if e[2] is None else e[2] & self.live
                top[0] = nxt
        self.rep.instructions += n
        self.cp_end()

    # ---- barriers -----------------------------------------------------------------------------------------------
    def barrier(self, ln, M):
        if M is not None and (M != (True if self.live is None else self.live)).any():
            self.fault(ln, "barrier reached by only part of the CTA")
        self.rep.barriers += 1
        self.epoch += 1
        if self.check:
            self.sm.barrier()

    def part_barrier(self, ln, which, count, M):
        """bar.sync with a thread count: the threads that arrive together, by barrier number, must be that many."""
        act = np.ones(self.T, bool) if M is None else M
        for v in sorted(set(which[act].tolist())):
            lanes = act & (which == v)
            warps = np.flatnonzero(lanes.reshape(-1, 32).any(1))
            need = int(count[int(lanes.argmax())])
            if need != 32 * warps.size:
                self.fault(ln, f"barrier {v} expects {need} threads but {32 * warps.size} reach it together")
            self.rep.barriers += 1
            if self.check:
                self.sm.barrier(None if warps.size == self.W else warps + 1)
        self.epoch += 1

    def barrier_red(self, ln, op, p, M):
        """A barrier that also reduces a predicate over the CTA."""
        self.barrier(ln, M)
        act = np.ones(self.T, bool) if M is None else M
        if op == "popc":
            return np.full(self.T, int((p & act).sum()), u4)
        return np.full(self.T, bool((p & act).any() if op == "or" else (p | ~act).all()))

    def assertion(self, ln, m):
        lane = 0 if m is None else int(m.argmax())
        self.report("sync", ln, "device assertion failed", lane, 1, fatal=True)

    def shuffle_index(self, mode, b, c):
        return shuffle_index(mode, b, c, self.T)

    # ---- atomics ------------------------------------------------------------------------------------------------
    def atomic(self, ln, space, addr, op, ty, width, b, c, m, lock):
        """b, c: (n, T) bits. Returns the old values; lanes update in lane order."""
        if space == "generic":
            return self.gen.atomic(self, ln, addr, op, ty, width, b, c, m, lock)
        if space not in ("shared", "global"):
            self.report("oob", ln, f"atomic on {space} memory", 0, 1, fatal=True)
        n, T = b.shape
        if space == "shared":
            idx = self.sm.locate(addr, width * n, m, self, ln, "atomic")
            lanes = np.arange(T) if m is None else np.flatnonzero(m)
            idx, mem = idx[lanes], self.sm
            mem.sel = lanes
            if self.check:
                mem.check_atomic(self, ln, mem.granules(idx, width * n), self.warp_of[lanes])
        else:
            idx, lanes = self.gm.atomic_access(self, ln, addr, width * n, m, lock)
            mem = self.gm
        view, E = mem.views[width], mem.elements(idx, width, n)
        old = np.zeros((n, T), UINT[width])
        if np.unique(idx).size == idx.size:
            cur = view.take(E)
            old[:, lanes] = cur
            view[E] = self.combine(op, ty, cur, b[:, lanes], None if c is None else c[:, lanes])
        else:  # several lanes at one address: serialised
            for j, lane in enumerate(lanes):
                e = E[:, j]
                cur = view.take(e)
                old[:, lane] = cur
                view[e] = self.combine(op, ty, cur, b[:, lane], None if c is None else c[:, lane])
        return old

    @staticmethod
    def combine(op, ty, cur, b, c):
        if op == "exch":
            return b
        if op == "cas":
            return np.where(cur == b, c, cur)
        if ty[:2] == "bf":
            x, y = bf(np.ascontiguousarray(cur).view(u2)), bf(np.ascontiguousarray(b).view(u2))
            return to_bf({"add": np.add, "min": np.fmin, "max": np.fmax}[op](x, y)).view(cur.dtype)
        dt = {"f16": f2, "f16x2": f2, "f32": f4, "f64": f8}.get(ty) or (f"i{cur.itemsize}" if ty[0] == "s" else cur.dtype)
        x, y = np.ascontiguousarray(cur).view(dt), np.ascontiguousarray(b).view(dt)
        if op == "inc":
            return np.where(x >= y, 0, x + 1).astype(cur.dtype)
        if op == "dec":
            return np.where((x == 0) | (x > y), y, x - 1).astype(cur.dtype)
        f = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[op]
        return f(x, y).view(cur.dtype)

    # ---- matrices -----------------------------------------------------------------------------------------------
    def matrix_rows(self, ln, n, addr, m, kind):
        """Row addresses of n 8x8 matrices: (T-compressed offsets, granules)."""
        if m is not None:
            self.whole_warps(ln, m)
        give = (np.arange(self.T) % 32) < 8 * n
        live = give if m is None else give & m
        self.sm.sel = sel = np.flatnonzero(live)
        idx = self.sm.locate(addr, 16, live if m is not None or n < 4 else None, self, ln, kind)
        if self.count_banks:
            self.banks(idx, 16, live)
        return idx[sel], sel

    def ldmatrix(self, ln, R, ds, addr, trans, m):
        n, sm = len(ds), self.sm
        idx, sel = self.matrix_rows(ln, n, addr, m, "ldmatrix")
        if idx.size == 0:
            return
        if self.check:
            sm.check_read(self, ln, sm.granules(idx, 16), self.warp_of[sel])
        rows = sm.views[8].take(idx[:, None] // 8 + np.arange(2))  # (warps*n*8, 2) 64-bit halves of a row
        rows = rows.view(u2).reshape(-1, n, 8, 8)  # warp, matrix, row, column
        if trans:
            rows = rows.transpose(0, 1, 3, 2)
        vals = np.ascontiguousarray(rows.transpose(1, 0, 2, 3)).view(u4).reshape(n, -1)
        for j, d in enumerate(ds):
            if m is None:
                R[d] = vals[j]
            else:
                new = R[d].copy()
                new[m] = vals[j]
                R[d] = new

    def stmatrix(self, ln, R, ss, addr, trans, m):
        n, sm = len(ss), self.sm
        idx, sel = self.matrix_rows(ln, n, addr, m, "stmatrix")
        if idx.size == 0:
            return
        regs = np.stack([R[s] if m is None else R[s][m] for s in ss])  # (n, warps*32)
        mats = regs.view(u2).reshape(n, -1, 8, 8)
        if trans:
            mats = mats.transpose(0, 1, 3, 2)
        data = np.ascontiguousarray(mats.transpose(1, 0, 2, 3)).view(u8).reshape(-1, 2).T
        E = sm.elements(idx, 8, 2)
        if self.check:
            G, warp = sm.granules(idx, 16), self.warp_of[sel]
            sm.check_write(
                self, ln, G, warp, np.broadcast_to(warp, G.shape), lambda: sm.per_granule(sm.views[8].take(E) != data, G)
            )
        sm.views[8][E] = data

    def fragment(self, R, slots, kind, which, M=16):
        """Operand tile of an mma from its registers, as floats: A (W, M, K), B (W, K, 8). Cached by register identity."""
        regs = [R[s] for s in slots]
        key = (which, kind, M, *map(id, regs))
        hit = self.frags.get(key)
        if hit is not None:
            return hit[1]
        x = widen(np.stack(regs).view(UINT[matrix_width(kind)]), kind)
        e = x.shape[1] // self.T  # elements per register
        if which == "A":
            rr = M // 8
            x = x.reshape(-1, rr, self.W, 8, 4, e).transpose(2, 1, 3, 0, 4, 5).reshape(self.W, M, -1)
        else:
            x = x.reshape(-1, self.W, 8, 4, e).transpose(1, 0, 3, 4, 2).reshape(self.W, -1, 8)
        if len(self.frags) > 256:
            self.frags.clear()
        self.frags[key] = (regs, x)  # keeping regs alive keeps the ids valid
        return x

    def mma(self, ln, R, d, a, b, c, shape, kind, acc, sat, m, count=""):
        """Products are exact, sums are fp32 (numpy's order; a GPU's order and internal rounding are unspecified)."""
        if m is not None:
            self.whole_warps(ln, m)
        M = int(shape[1 : shape.index("n")])
        P = self.fragment(R, a, kind, "A", M) @ self.fragment(R, b, kind, "B")
        P = P.reshape(self.W, M // 8, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(M // 4, self.T)
        if acc == "s32":
            out = [(p.astype(i8) + x) for p, x in zip(P, c, strict=False)]
            out = [(np.clip(x, -(2**31), 2**31 - 1) if sat else x).astype(i4).view(u4) for x in out]
        elif acc == "f16":  # two columns packed per register
            P = P.reshape(-1, 2, self.T).transpose(0, 2, 1).reshape(-1, 2 * self.T)
            out = [(p + x.astype(f4)).astype(f2).view(u4) for p, x in zip(P, c, strict=False)]
        else:
            out = [(p + x).view(UINT[x.itemsize]) for p, x in zip(P, c, strict=False)]
        for s, v in zip(d, out, strict=False):
            R[s] = v if m is None else np.where(m, v, R[s])
        if count is not None:  # None: a further step of one wmma
            name = count or f"mma.{shape}.{kind}"
            self.rep.mma[name] = self.rep.mma.get(name, 0) + (self.W if m is None else int(m.sum()) // 32)

    # ---- sm_90: asynchronous proxy and warpgroup mma ------------------------------------------------------------
    def fence_async(self, ln):
        if self.sm.dirty is not None:
            self.sm.dirty[:] = False

    def wg_commit(self):
        self.wg_groups.append(self.wg_current)
        self.wg_current = []

    def wg_wait(self, keep):
        while len(self.wg_groups) > keep:
            for G in self.wg_groups.pop(0):  # each warp knows only of its own completion: until the next
                self.sm.async_reads[G] -= 1  # barrier, the other warps may still be reading
                self.sm.r[G] = MULTI

    def tile(self, ln, desc, rows, cols, width, mn_major):
        """Matrix operand of one warpgroup in shared memory, (rows, cols) with cols along K, as raw elements.

        desc: start, leading and stride offsets (16-byte units) and swizzle mode; see the PTX manual's wgmma chapter."""
        lead, stride = (desc >> 16 & 0x3FFF) * 16, (desc >> 32 & 0x3FFF) * 16
        mode = desc >> 62
        span = {0: 16, 1: 128, 2: 64, 3: 32}[mode]  # bytes of a row that stay together
        if desc >> 49 & 7:
            raise PtxError("wgmma descriptor with a base offset")
        key = (lead, stride, mode, rows, cols, width, mn_major)
        rel = self.patterns.get(key)
        if rel is None:
            r, c = np.arange(rows, dtype=i8)[:, None], np.arange(cols, dtype=i8)[None]
            if mn_major:  # consecutive rows are contiguous, 8 columns make a group
                near, group = (lead, stride) if mode else (stride, lead)
                rel = r * width // span * near + r * width % span + c // 8 * group + c % 8 * span
            elif mode:
                rel = r // 8 * stride + r % 8 * span + c * width
            else:
                rel = r // 8 * stride + r % 8 * 16 + c * width // 16 * lead + c * width % 16
            self.patterns[key] = rel
        idx = (desc & 0x3FFF) * 16 + rel
        if mode:
            idx = idx ^ ((idx >> 7 & (span // 16 - 1)) << 4)
        sm = self.sm
        if idx.min() < sm.BASE or idx.max() + width > sm.limit:
            self.report("oob", ln, f"wgmma operand outside shared memory (offset {int(idx.max()) - sm.BASE})", 0, 1, fatal=True)
        if self.check:
            G = np.unique(idx >> sm.gshift)[None]
            sm.sel = np.zeros(G.size, int)  # no single thread is to blame: name thread 0
            sm.check_read(self, ln, G, 0)  # written since the last barrier by whomever: a race
            sm.r[G] = MULTI
            sm.async_reads[G] += 1
            self.wg_current.append(G)
            if sm.dirty.take(G).any():
                sm.note(self, ln, "race", sm.dirty.take(G), G, "wgmma reads shared writes without fence.proxy.async")
        return sm.views[width].take(idx >> (width.bit_length() - 1))

    def wgmma(self, ln, R, d, a, b, scale, flags, shape, kind, acc, M):
        """Results are available at once; shared operands count as being read until the group's wait."""
        if M is not None and not M.all():
            self.fault(ln, "wgmma under divergence")
        n, k = (int(x) for x in shape[4:].split("k"))
        width = matrix_width(kind)
        if acc not in ("f32", "s32") or any(f not in (0, 1) for f in flags) or 0 in flags[:2]:
            raise PtxError(f"wgmma form {acc} {flags}")
        trans = flags[2:] + [0] * (4 - len(flags))  # a in registers: only b's flag is given
        from_regs = isinstance(a, tuple)
        tb = trans[0] if from_regs else trans[1]
        G = self.T // 128
        B = np.stack([widen(self.tile(ln, int(b[g * 128]), n, k, width, tb), kind) for g in range(G)])
        A = (
            self.fragment(R, a, kind, "A").reshape(G, 64, k)
            if from_regs
            else np.stack([widen(self.tile(ln, int(a[g * 128]), 64, k, width, trans[0]), kind) for g in range(G)])
        )
        P = A @ B.transpose(0, 2, 1)
        P = P.reshape(G, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, self.T)
        if acc == "s32":
            P = P.astype(i4)
        old = np.stack([R[s] for s in d]).view(P.dtype)
        P = np.where(scale, P + old, P).view(u4)
        for s, v in zip(d, P, strict=False):
            R[s] = v
        name = f"wgmma.{shape}.{kind}"
        self.rep.mma[name] = self.rep.mma.get(name, 0) + G


class Symbols(dict):
    """(name, size) -> array of the symbol's address; shared symbols live in the shared window."""

    def __init__(self, ex, tables):
        super().__init__()
        self.ex, self.tables = ex, tables
        self.params = ex.tr.param_offsets

    def __missing__(self, key):
        name, size = key
        ex = self.ex
        if name in self.tables:
            v = self.tables[name]
        elif name in ex.k.locals:
            v = ex.k.locals[name]
        elif name in ex.sym_shared:
            v = SharedMemory.BASE + ex.sym_shared[name]
        elif name in self.params:
            v = ParamMemory.BASE + self.params[name]
        else:
            raise PtxError(f"unknown symbol {name}")
        self[key] = np.full(ex.T, v, UINT[size])
        return self[key]
