"""Decoded PTX -> Python source, one function per basic block (and one more for running it under a lane mask).

A register is a slot of the list R holding an immutable array with one unsigned integer (or bool) per thread. Immediates
are full arrays too, so every line is plain numpy. S is the executor (memory, warp-wide operations), M the lane mask of
the masked variant, P the kernel parameters, A the addresses of symbols, K the constants.
"""

import re
import struct

import numpy as np

from . import numerics as N
from .generic import WINDOWS
from .module import SIZES, PtxError
from .numerics import UINT
from .parser import Imm, Mem, Reg, Sym, Vec

SPACES = ("global", "shared", "local", "param", "const")
CMP = {
    "eq": "{a} == {b}",
    "ne": "{a} != {b}",
    "lt": "{a} < {b}",
    "le": "{a} <= {b}",
    "gt": "{a} > {b}",
    "ge": "{a} >= {b}",
    "lo": "{a} < {b}",
    "ls": "{a} <= {b}",
    "hi": "{a} > {b}",
    "hs": "{a} >= {b}",
}
FCMP = {
    **CMP,
    "ne": "({a} < {b}) | ({a} > {b})",
    "equ": "~(({a} < {b}) | ({a} > {b}))",
    "neu": "{a} != {b}",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
    "num": "({a} == {a}) & ({b} == {b})",
    "nan": "({a} != {a}) | ({b} != {b})",
}
NOPS = {"griddepcontrol", "nanosleep", "prefetch", "prefetchu", "discard", "applypriority", "setmaxnreg", "pmevent"}
UNARY = {
    "ex2": "np.exp2({})",
    "lg2": "np.log2({})",
    "sin": "np.sin({})",
    "cos": "np.cos({})",
    "tanh": "np.tanh({})",
    "rcp": "(f4(1) / {})",
    "sqrt": "np.sqrt({})",
    "rsqrt": "(f8(1) / np.sqrt({}.astype(f8))).astype(f4)",
}
ATOMS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def is_float(ty):
    return ty[0] == "f" or ty[:2] == "bf"


class Translator:
    def __init__(self, kernel, threads):
        self.k, self.T = kernel, threads
        self.consts, self.const_ids, self.params = [], {}, set()
        self.granules = {"global": 16, "shared": 16}  # narrowest access per space, for tracking
        self.param_offsets, self.param_bytes = {}, 0  # the parameters' places, naturally aligned
        for v in kernel.params:
            self.param_bytes += -self.param_bytes % v.align
            self.param_offsets[v.name] = self.param_bytes
            self.param_bytes += v.size
        self.ns = {**vars(N), "np": np, "K": self.consts}
        # compare-and-swap loops (emulated atomics): a plain load of the address seeds the loop
        self.roots = {
            i.operands[0].index: i.operands[1].index
            for i in kernel.instrs
            if i.op.startswith(("cvta.", "mov.b64", "mov.u64"))
            and i.pred is None
            and all(isinstance(o, Reg) for o in i.operands[:2])
        }
        cas = {
            self.root(o)
            for i in kernel.instrs
            if i.op.startswith("atom") and ".cas." in i.op
            for o in i.operands
            if isinstance(o, Mem) and isinstance(o.base, Reg)
        }
        self.cas_seeds = cas & {
            self.root(i.operands[1]) for i in kernel.instrs if i.op.startswith("ld.") and isinstance(i.operands[1].base, Reg)
        }
        src = "\n".join(self.function(b, False) for b in kernel.blocks)
        exec(compile(src, f"<ptx {kernel.name}>", "exec"), self.ns)
        # [whole-CTA function, masked function (made when first needed), instructions]
        self.fns = [[self.ns[f"b{b.index}"], None, len(b.instrs) + (b.term is not None)] for b in kernel.blocks]

    def function(self, b, masked):
        """Python source of a block."""
        body = [x for ins in b.instrs for x in self.instr(ins, masked)]
        return f"def b{b.index}{'m' if masked else ''}(S, R, M, P, A):\n" + "".join(f"    {x}\n" for x in body or ["pass"])

    def masked(self, index):
        """The function that runs a block under a lane mask."""
        exec(compile(self.function(self.k.blocks[index], True), f"<ptx {self.k.name}>", "exec"), self.ns)
        self.fns[index][1] = self.ns[f"b{index}m"]
        return self.fns[index][1]

    # ---- operands -----------------------------------------------------------------------------------------------
    def const(self, bits, size):
        return self.array((bits, size), np.full(self.T, bool(bits) if size == 0 else bits % (1 << 8 * size), UINT[size]))

    def array(self, key, arr):
        if key not in self.const_ids:
            self.const_ids[key] = len(self.consts)
            self.consts.append(arr)
        return f"K[{self.const_ids[key]}]"

    def raw(self, o, size):
        """The operand's bits as an unsigned array of `size` bytes (0: bool)."""
        if isinstance(o, tuple):
            return f"(~{self.raw(o[1], size)})"
        if isinstance(o, Reg):
            if o.size == size:
                return f"R[{o.index}]"
            return f"R[{o.index}].astype(u{size})"
        if isinstance(o, Imm):
            v = o.value
            if o.kind == "float":
                v = int.from_bytes(struct.pack("<f" if size == 4 else "<d", v), "little")
            return self.const(v, size)
        if isinstance(o, Sym):
            return f"A[{o.name!r}, {size}]"
        raise PtxError(f"operand {o!r}")

    def val(self, o, ty):
        """The operand as the array type that arithmetic of PTX type `ty` works on (bf16 is widened to f4)."""
        if ty == "pred":
            return self.raw(o, 0)
        r = self.raw(o, SIZES[ty])
        if ty[0] in "bu" and ty[:2] != "bf":
            return r
        if ty[:2] == "bf":
            return f"bf({r}.view(u2))"
        if ty[0] == "s":
            return f"{r}.view(i{SIZES[ty]})"
        return f"{r}.view(f{2 if ty == 'f16x2' else SIZES[ty]})"

    def bits(self, expr, ty):
        """Value of PTX type `ty` -> unsigned bits."""
        if ty == "pred" or (ty[0] in "bu" and ty[:2] != "bf"):
            return expr
        if ty[:2] == "bf":
            return f"to_bf({expr})" + (".view(u4)" if ty == "bf16x2" else "")
        return f"({expr}).view(u{SIZES[ty]})"

    def addr(self, mem, size):
        if not isinstance(mem, Mem):
            raise PtxError("address expected")
        if mem.base is None:
            return self.const(mem.offset, size)
        b = self.raw(mem.base, size)
        return b if mem.offset == 0 else f"({b} + {self.const(mem.offset, size)})"

    def place(self, mem, space):
        """Address expression of an access: 32-bit registers may hold shared and local addresses."""
        wide = space not in ("shared", "local") or isinstance(mem.base, Reg) and mem.base.size == 8
        return self.addr(mem, 8 if wide else 4)

    def root(self, mem):
        """(register, offset) of an address, looking through address conversions."""
        r, seen = mem.base.index, set()
        while r in self.roots and r not in seen:
            seen.add(r)
            r = self.roots[r]
        return r, mem.offset

    # ---- one instruction ----------------------------------------------------------------------------------------
    def instr(self, ins, masked):
        """Python lines of one instruction."""
        p = ins.parts
        base = p[0]
        guard = None
        if ins.pred is not None:
            guard = f"~R[{ins.pred.index}]" if ins.negate else f"R[{ins.pred.index}]"
        m = (f"(M & {guard})" if masked else guard) if guard else ("M" if masked else "None")
        try:
            if base in NOPS or ins.op.startswith("bar.warp"):
                return []
            fn = getattr(self, "op_" + base.replace("::", "_"), None)
            if fn is None:
                raise PtxError("unknown opcode")
            out = fn(ins, p, m)
        except (PtxError, KeyError, IndexError, ValueError, struct.error) as e:
            raise PtxError(f"{self.k.name}: PTX line {ins.line} ({ins.loc}): {ins.text!r}: {type(e).__name__} {e}") from None
        lines, multi = [], len(out) > 1 and not isinstance(out[0], str)
        if out and not isinstance(out[0], str):  # (destination, bits expression) pairs
            if m != "None" and multi:
                lines.append(f"m = {m}")
                m = "m"
            if multi:
                for j, (_, e) in enumerate(out):
                    lines.append(f"t{j} = {e}")
                out = [(d, f"t{j}") for j, (d, _) in enumerate(out)]
            for d, e in out:
                if isinstance(d, Sym) and d.name == "_":
                    continue
                lines.append(f"R[{d.index}] = {e}" if m == "None" else f"R[{d.index}] = where({m}, {e}, R[{d.index}])")
            return lines
        return out

    def guarded(self, m, lines):
        """Run lines (which use m) only if some lane is active."""
        if m == "None":
            return ["m = None"] + lines
        return [f"m = {m}", "if m.any():"] + ["    " + x for x in lines]

    def result(self, ins, expr, ty, d=None):
        d = d or ins.operands[0]
        if not isinstance(d, Reg):
            raise PtxError("destination")
        e = self.bits(expr, ty)
        size = SIZES[ty]
        if d.size != size:
            e = f"({e}).view(i{size}).astype(i{d.size}).view(u{d.size})" if ty[0] == "s" else f"({e}).astype(u{d.size})"
        return [(d, e)]

    def arith(self, ins, p, ty, fmt, nops):
        """Elementwise arithmetic with .ftz and .sat modifiers."""
        v = [self.val(o, ty) for o in ins.operands[1 : 1 + nops]]
        flush = "ftz" in p and ty == "f32"
        if flush:
            v = [f"ftz({x})" for x in v]
        mode = next((x for x in p[1:] if x in ("rz", "rm", "rp")), None)
        if mode and is_float(ty):
            if ty != "f32":
                raise PtxError("directed rounding")
            wide = fmt.replace("fma32({}, {}, {})", "{} * {} + {}").format(*(f"{x}.astype(f8)" for x in v))
            e = f"directed({wide}, {mode!r})"
        else:
            e = fmt.format(*v)
        if flush:
            e = f"ftz({e})"
        if "sat" in p and is_float(ty):
            e = f"np.fmin(np.fmax({e}, 0), 1).astype({'f2' if ty[:3] == 'f16' else 'f4'})"
        return self.result(ins, e, ty)

    # ---- integer and float arithmetic ---------------------------------------------------------------------------
    def op_add(self, ins, p, m, sym="+"):
        ty = p[-1]
        if "cc" in p or p[0] in ("addc", "subc"):
            s = SIZES[ty]
            if s != 4:
                raise PtxError("64-bit carry chain")
            a, b = (self.raw(o, s) for o in ins.operands[1:3])
            e = f"{a}.astype(i8) {sym} {b}.astype(i8)" + (f" {sym} S.cc" if p[0][-1] == "c" else "")
            d = ins.operands[0].index
            out = [f"x = {e}", f"R[{d}] = " + ("x.astype(u4)" if m == "None" else f"where({m}, x.astype(u4), R[{d}])")]
            return out + (["S.cc = (x >> 32) & 1"] if "cc" in p else [])
        if not is_float(ty):
            ty = "u" + ty[1:] if "x" not in ty else ty
        return self.arith(ins, p, ty, "{} " + sym + " {}", 2)

    def op_sub(self, ins, p, m):
        return self.op_add(ins, p, m, "-")

    op_addc, op_subc = op_add, op_sub

    def wide(self, a, b, ty):
        s = SIZES[ty]
        k = "i" if ty[0] == "s" else "u"
        return f"({self.val(a, ty)}.astype({k}{2 * s}) * {self.val(b, ty)})", ty[0] + str(16 * s)

    def product(self, ins, p):
        """(expression, type) of the product of operands 1 and 2, integer."""
        ty, (a, b) = p[-1], ins.operands[1:3]
        s = SIZES[ty]
        if "wide" in p:
            return self.wide(a, b, ty)
        if "hi" in p:
            if s == 8:
                return f"mulhi_{ty[0]}64({self.val(a, ty)}, {self.val(b, ty)})", "u64"
            e, _ = self.wide(a, b, ty)
            return f"({e} >> {8 * s}).astype({'i' if ty[0] == 's' else 'u'}{s})", ty
        return f"({self.raw(a, s)} * {self.raw(b, s)})", "u" + ty[1:]

    def op_mul(self, ins, p, m):
        if is_float(p[-1]):
            return self.arith(ins, p, p[-1], "{} * {}", 2)
        return self.result(ins, *self.product(ins, p))

    def op_mad(self, ins, p, m):
        if is_float(p[-1]):
            return self.op_fma(ins, p, m)
        if "cc" in p or p[0] == "madc":
            if p[-1] not in ("u32", "s32", "b32"):
                raise PtxError("64-bit carry chain")
            a, b, c = (self.raw(o, 4) for o in ins.operands[1:4])
            half = "(x >> u8(32))" if "hi" in p else "(x & u8(0xFFFFFFFF))"
            d = ins.operands[0].index
            out = [
                f"x = {a}.astype(u8) * {b}",
                f"x = {half} + {c}" + (" + S.cc.astype(u8)" if p[0] == "madc" else ""),
                f"R[{d}] = " + ("x.astype(u4)" if m == "None" else f"where({m}, x.astype(u4), R[{d}])"),
            ]
            return out + (["S.cc = x >> u8(32)"] if "cc" in p else [])
        e, ty = self.product(ins, p)
        return self.result(ins, f"{e} + {self.val(ins.operands[3], ty)}", ty)

    op_madc = op_mad

    def op_fma(self, ins, p, m):
        ty = p[-1]
        if "relu" in p:
            raise PtxError("fma.relu")
        if ty[:2] == "bf":  # fma_bf rounds by itself
            v = ", ".join(self.val(o, ty) for o in ins.operands[1:4])
            return [(ins.operands[0], f"fma_bf({v})" + (".view(u4)" if ty == "bf16x2" else ""))]
        fn = {"f32": "fma32({}, {}, {})", "f64": "fma64({}, {}, {})"}.get(ty, "fma_h({}, {}, {})")
        return self.arith(ins, p, ty, fn, 3)

    def op_div(self, ins, p, m):
        ty = p[-1]
        if is_float(ty):
            return self.arith(ins, p, ty, "{} / {}", 2)
        a, b = (self.val(o, ty) for o in ins.operands[1:3])
        return self.result(ins, f"idiv({a}, {b}, {p[0] == 'rem'})", ty)

    op_rem = op_div

    def op_min(self, ins, p, m):
        ty = p[-1]
        f = (
            ("np.minimum" if p[0] == "min" else "np.maximum")
            if "NaN" in p or not is_float(ty)
            else ("np.fmin" if p[0] == "min" else "np.fmax")
        )
        if ("relu" in p and is_float(ty)) or len(ins.operands) != 3:
            raise PtxError("min/max modifier")
        if "relu" in p:
            return self.arith(ins, p, ty, f"np.maximum({f}({{}}, {{}}), 0)", 2)
        if "xorsign" in p:
            f = f"xorsign({f}, "
            return self.arith(ins, p, ty, f + "{}, {})", 2)
        return self.arith(ins, p, ty, f + "({}, {})", 2)

    op_max = op_min

    def op_abs(self, ins, p, m):
        ty = p[-1]
        if not is_float(ty):
            return self.result(ins, f"np.abs({self.val(ins.operands[1], ty)})", ty)
        s = SIZES[ty]
        sign = {"f16": 1 << 15, "bf16": 1 << 15, "f32": 1 << 31, "f64": 1 << 63}.get(ty, 0x80008000)
        x = self.raw(ins.operands[1], s)
        e = f"({x} & {self.const(~sign, s)})" if p[0] == "abs" else f"({x} ^ {self.const(sign, s)})"
        return [(ins.operands[0], f"ftz({e}.view(f4)).view(u4)" if "ftz" in p and ty == "f32" else e)]

    def op_neg(self, ins, p, m):
        if is_float(p[-1]):
            return self.op_abs(ins, p, m)
        return [(ins.operands[0], f"(0 - {self.val(ins.operands[1], 'u' + p[-1][1:])})")]

    def op_copysign(self, ins, p, m):
        a, b = (self.val(o, p[-1]) for o in ins.operands[1:3])
        return self.result(ins, f"np.copysign({b}, {a})", p[-1])

    def op_ex2(self, ins, p, m):
        ty = p[-1]
        if ty in ("f16", "f16x2"):
            return self.result(ins, UNARY[p[0]].format(self.val(ins.operands[1], ty) + ".astype(f4)") + ".astype(f2)", ty)
        if ty == "f64":
            return self.result(ins, UNARY[p[0]].replace("f4", "f8").format(self.val(ins.operands[1], ty)), ty)
        return self.arith(ins, p, ty, UNARY[p[0]], 1)

    op_lg2 = op_sin = op_cos = op_tanh = op_rcp = op_sqrt = op_rsqrt = op_ex2

    # ---- bits ---------------------------------------------------------------------------------------------------
    def logic(self, ins, p, fmt, n):
        s = SIZES[p[-1]]
        return [(ins.operands[0], fmt.format(*(self.raw(o, s) for o in ins.operands[1 : 1 + n])))]

    def op_and(self, ins, p, m):
        return self.logic(ins, p, "{} & {}", 2)

    def op_or(self, ins, p, m):
        return self.logic(ins, p, "{} | {}", 2)

    def op_xor(self, ins, p, m):
        return self.logic(ins, p, "{} ^ {}", 2)

    def op_not(self, ins, p, m):
        return self.logic(ins, p, "~{}", 1)

    def op_shl(self, ins, p, m):
        ty, s = p[-1], SIZES[p[-1]]
        a, n = ins.operands[1:3]
        n = (
            self.const(min(n.value, 8 * s), s)
            if isinstance(n, Imm)
            else f"np.minimum({self.raw(n, 4)}, u4({8 * s})).astype(u{s})"
        )
        if p[0] == "shl":
            return [(ins.operands[0], f"{self.raw(a, s)} << {n}")]
        return self.result(ins, f"{self.val(a, ty)} >> {n}" + (f".view(i{s})" if ty[0] == "s" else ""), ty)

    op_shr = op_shl

    def op_shf(self, ins, p, m):
        a, b, c = (self.raw(o, 4) for o in ins.operands[1:4])
        return [(ins.operands[0], f"shf({a}, {b}, {c}, {p[1] == 'l'}, {'clamp' in p})")]

    def op_bfe(self, ins, p, m):
        s = SIZES[p[-1]]
        a, b, c = self.raw(ins.operands[1], s), self.raw(ins.operands[2], 4), self.raw(ins.operands[3], 4)
        return [(ins.operands[0], f"bfe({a}, {b}, {c}, {8 * s}, {p[-1][0] == 's'})")]

    def op_bfi(self, ins, p, m):
        s = SIZES[p[-1]]
        v = [self.raw(o, s) for o in ins.operands[1:3]] + [self.raw(o, 4) for o in ins.operands[3:5]]
        return [(ins.operands[0], f"bfi({', '.join(v)}, {8 * s})")]

    def op_prmt(self, ins, p, m):
        if len(p) != 2:
            raise PtxError("prmt mode")
        return self.logic(ins, p, "prmt({}, {}, {})", 3)

    def op_lop3(self, ins, p, m):
        lut = ins.operands[4].value
        return self.logic(ins, p, f"lop3({{}}, {{}}, {{}}, {lut})", 3)

    def op_popc(self, ins, p, m):
        return self.logic(ins, p, {"popc": "popc", "clz": "clz", "brev": "brev"}[p[0]] + "({})", 1)

    op_clz = op_brev = op_popc

    def op_bfind(self, ins, p, m):
        s = SIZES[p[-1]]
        x = self.raw(ins.operands[1], s)
        if p[-1][0] == "s":  # the highest bit that differs from the sign
            x = f"({x} ^ ({x}.view(i{s}) >> {8 * s - 1}).view(u{s}))"
        if "shiftamt" in p:
            return [(ins.operands[0], f"where({x} == 0, u4(0xFFFFFFFF), clz({x}))")]
        return [(ins.operands[0], f"(u4({8 * s - 1}) - clz({x}))")]

    def op_dp4a(self, ins, p, m):
        a, b = (
            f"{self.raw(o, 4)}.view({'i1' if t[0] == 's' else 'u1'}).reshape(-1, 4).astype(i8)"
            for o, t in zip(ins.operands[1:3], p[1:3], strict=False)
        )
        return [(ins.operands[0], f"(({a} * {b}).sum(1) + {self.raw(ins.operands[3], 4)}).astype(u4)")]

    def op_sad(self, ins, p, m):
        a, b, c = (self.val(o, p[-1]) for o in ins.operands[1:4])
        return self.result(ins, f"where({a} > {b}, {a} - {b}, {b} - {a}) + {c}", p[-1])

    def op_cnot(self, ins, p, m):
        s = SIZES[p[-1]]
        return [(ins.operands[0], f"({self.raw(ins.operands[1], s)} == 0).astype(u{s})")]

    # ---- comparison, selection, moves, conversion ---------------------------------------------------------------
    def op_setp(self, ins, p, m):
        ty, cmp = p[-1], p[1]
        d, (a, b) = ins.operands[0], ins.operands[1:3]
        if is_float(ty):
            e = FCMP[cmp].format(a=self.val(a, ty), b=self.val(b, ty))
        else:
            e = CMP[cmp].format(a=self.val(a, ty), b=self.val(b, ty))
        if "ftz" in p:
            e = FCMP[cmp].format(a=f"ftz({self.val(a, ty)})", b=f"ftz({self.val(b, ty)})")
        both = [("{}", e), ("{}", f"~({e})")]
        if ty in ("f16x2", "bf16x2"):  # p|q: one result per half
            both = [("{}", f"({e})[0::2].copy()"), ("{}", f"({e})[1::2].copy()")]
        comb = next((x for x in p[2:-1] if x in ("and", "or", "xor")), None)
        if comb:
            c = self.raw(ins.operands[3], 0)
            both = [(f, f"({x}) {dict(zip(('and', 'or', 'xor'), '&|^', strict=False))[comb]} {c}") for f, x in both]
        ds = d.items if isinstance(d, Vec) else [d]
        return [(r, x) for r, (_, x) in zip(ds, both, strict=False) if not isinstance(r, Sym)]

    def op_set(self, ins, p, m):
        """Comparison to 1.0 or all ones (per half of a packed type)."""
        dt, st = p[-2], p[-1]
        a, b = (self.val(o, st) for o in ins.operands[1:3])
        if "ftz" in p and st == "f32":
            a, b = f"ftz({a})", f"ftz({b})"
        e = (FCMP if is_float(st) else CMP)[p[1]].format(a=a, b=b)
        if st[-2:] == "x2":
            one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(dt, 0xFFFF)
            return [(ins.operands[0], f"where({e}, u2({one}), u2(0)).view(u4)")]
        one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}.get(dt, (1 << 8 * SIZES[dt]) - 1)
        return [(ins.operands[0], f"where({e}, u{SIZES[dt]}({one}), u{SIZES[dt]}(0))")]

    def op_testp(self, ins, p, m):
        x = self.val(ins.operands[1], p[-1])
        tiny = {"f32": 1.17549435e-38, "f64": 2.2250738585072014e-308}[p[-1]]
        e = {
            "finite": "np.isfinite({x})",
            "infinite": "np.isinf({x})",
            "number": "~np.isnan({x})",
            "notanumber": "np.isnan({x})",
            "normal": f"(np.isfinite({{x}}) & (np.abs({{x}}) >= {tiny}))",
            "subnormal": f"(({{x}} != 0) & (np.abs({{x}}) < {tiny}))",
        }[p[1]].format(x=x)
        return [(ins.operands[0], e)]

    def op_selp(self, ins, p, m):
        s = SIZES[p[-1]]
        a, b = (self.raw(o, s) for o in ins.operands[1:3])
        return [(ins.operands[0], f"where({self.raw(ins.operands[3], 0)}, {a}, {b})")]

    def op_mov(self, ins, p, m):
        d, a = ins.operands
        s = SIZES[p[-1]]
        if isinstance(d, Vec):  # unpack, lowest part first
            part = s // len(d.items)
            x = self.raw(a, s)
            return [(r, f"({x} >> u{s}({8 * part * i})).astype(u{part})") for i, r in enumerate(d.items)]
        if isinstance(a, Vec):
            part = s // len(a.items)
            return [
                (
                    d,
                    " | ".join(
                        f"({self.raw(x, part)}.astype(u{s}) << u{s}({8 * part * i}))"
                        if i
                        else f"{self.raw(x, part)}.astype(u{s})"
                        for i, x in enumerate(a.items)
                    ),
                )
            ]
        return [(d, self.raw(a, s))]

    def op_cvta(self, ins, p, m):
        space = next((x.split("::")[0] for x in p[1:] if x.split("::")[0] in SPACES), "global")
        x = self.raw(ins.operands[1], 8)
        if space in WINDOWS:
            x = f"({x} {'-' if 'to' in p else '+'} {self.const(WINDOWS[space], 8)})"
        return [(ins.operands[0], x)]

    def op_isspacep(self, ins, p, m):
        x, base = f"({self.raw(ins.operands[1], 8)} >> u8(40))", {k: v >> 40 for k, v in WINDOWS.items()}
        space = p[1].split("::")[0]
        if space in base:
            return [(ins.operands[0], f"({x} == u8({base[space]}))")]
        if space != "global":
            raise PtxError("isspacep form")
        return [(ins.operands[0], f"~np.isin({x}, np.array({list(base.values())!r}, u8))")]

    def op_cvt(self, ins, p, m):
        dt, st = p[-2:]
        d, srcs = ins.operands[0], ins.operands[1:]
        mods = set(p[1:-2])
        rnd = next((x for x in p[1:-2] if x in ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")), None)
        if dt == "tf32":
            fn = {"rna": "rna_tf32({})", "rn": "rn_tf32({})", "rz": "({} & u4(0xFFFFE000))"}[rnd]
            return [(d, fn.format(self.raw(srcs[0], 4)))]
        if dt in ("bf16x2", "f16x2") and st == "f32":  # the first source goes to the upper half
            if rnd != "rn" or len(srcs) != 2:
                raise PtxError("packed conversion")
            hi, lo = (self.val(o, "f32") for o in srcs)
            if "relu" in mods:
                hi, lo = f"np.maximum({hi}, f4(0))", f"np.maximum({lo}, f4(0))"
            e = f"np.stack(({lo}, {hi}), 1)"
            return [(d, f"to_bf({e}).view(u4).ravel()" if dt == "bf16x2" else f"{e}.astype(f2).view(u4).ravel()")]
        if dt in ("e4m3x2", "e5m2x2") and "satfinite" in mods and "relu" not in mods:
            x = (
                f"{self.val(srcs[0], st)}.astype(f4)"
                if st == "f16x2"
                else f"np.stack(({self.val(srcs[1], 'f32')}, {self.val(srcs[0], 'f32')}), 1).ravel()"
            )
            return [(d, f"to_f8({x}, {dt[:4]!r}).view(u2)")]
        if (dt, st) in (("f16x2", "e4m3x2"), ("f16x2", "e5m2x2")):
            return [(d, f"from_f8({self.raw(srcs[0], 2)}.view(u1), {st[:4]!r}).astype(f2).view(u4)")]
        if dt not in SIZES or st not in SIZES or "x2" in dt + st or "satfinite" in mods:
            raise PtxError("conversion")
        x = self.val(srcs[0], st)
        if "ftz" in mods and st == "f32":
            x = f"ftz({x})"
        if not is_float(st) and not is_float(dt):  # integer to integer
            k = "i" if dt[0] == "s" else "u"
            if "sat" in mods:
                x = f"np.clip({x}.astype(i8), np.iinfo({k}{SIZES[dt]}).min, np.iinfo({k}{SIZES[dt]}).max)"
            return self.result(ins, f"{x}.astype({k}{SIZES[dt]})", dt)
        if not is_float(dt):  # float to integer
            return self.result(ins, f"f2i({x}, {'i' if dt[0] == 's' else 'u'}{SIZES[dt]}, {rnd!r})", dt)
        if rnd in ("rni", "rzi", "rmi", "rpi"):  # float to an integral float
            x = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}[rnd] + f"({x})"
            rnd = "rn"
        if "sat" in mods:
            x = f"np.fmin(np.fmax({x}, 0), 1)"
        if rnd == "rz" and (dt, st) == ("bf16", "f32"):
            return [(d, f"({self.raw(srcs[0], 4)} >> u4(16)).astype(u2)")]
        widening = is_float(st) and SIZES[dt] >= SIZES[st] and {dt, st} != {"f16", "bf16"}
        if rnd not in (None, "rn") and not widening:
            if dt not in ("f32", "f16") or st in ("u64", "s64") or rnd not in ("rz", "rm", "rp"):
                raise PtxError("rounding mode")
            return self.result(ins, f"directed({x}.astype(f8), {rnd!r}, {'f4' if dt == 'f32' else 'f2'})", dt)
        if dt == "f32":
            e = x if st in ("bf16", "f32") else f"{x}.astype(f4)"
            return self.result(ins, f"ftz({e})" if "ftz" in mods else e, dt)
        if dt == "f64":
            return self.result(ins, f"{x}.astype(f8)", dt)
        if dt == "f16":
            return self.result(ins, f"{x}.astype(f2)" if is_float(st) else f"{x}.astype(f8).astype(f2)", dt)
        return self.result(ins, x if st in ("f16", "bf16", "f32") else f"f64_to_f32_odd({x}.astype(f8))", "bf16")

    # ---- memory -------------------------------------------------------------------------------------------------
    def access(self, p):
        space = next((x.split("::")[0] for x in p[1:] if x.split("::")[0] in SPACES), "generic")
        if space == "const":
            space = "global"
        n = next((int(x[1:]) for x in p[1:] if x in ("v2", "v4", "v8")), 1)
        width = SIZES[p[-1]]
        for s in self.granules if space == "generic" else [space] if space in self.granules else []:
            self.granules[s] = min(self.granules[s], width * n)
        return space, n, width

    def op_ld(self, ins, p, m):
        space, n, width = self.access(p)
        d, mem = ins.operands[:2]
        ds = d.items if isinstance(d, Vec) else [d]
        if space == "param" and isinstance(mem.base, Sym):
            out = []
            for j, r in enumerate(ds):
                signed = p[-1][0] == "s" and r.size > width
                key = (mem.base.name, mem.offset + j * width, width, width if signed else r.size)
                self.params.add(key)
                out.append((r, f"P[{key!r}]" + (f".view(i{width}).astype(i{r.size}).view(u{r.size})" if signed else "")))
            return out
        if len(ds) != n:
            raise PtxError("vector length")
        a, obj = self.place(mem, space), MEMORY[space]
        seed = space in ("global", "generic") and isinstance(mem.base, Reg) and self.root(mem) in self.cas_seeds
        lines = [f"x = {obj}.load(S, {ins.index}, {a}, {width}, {n}, m" + (", track=False)" if seed else ")")]
        for j, r in enumerate(ds):
            if isinstance(r, Sym):
                continue
            e = f"x[{j}]"
            if r.size != width:
                e += f".view(i{width}).astype(i{r.size}).view(u{r.size})" if p[-1][0] == "s" else f".astype(u{r.size})"
            lines.append(f"R[{r.index}] = {e}" if m == "None" else f"R[{r.index}] = where(m, {e}, R[{r.index}])")
        return self.guarded(m, lines)

    def op_st(self, ins, p, m):
        space, n, width = self.access(p)
        mem, v = ins.operands[:2]
        vs = v.items if isinstance(v, Vec) else [v]
        if len(vs) != n:
            raise PtxError("vector length")
        a, obj = self.place(mem, space), MEMORY[space]
        data = f"{self.raw(vs[0], width)}[None]" if n == 1 else f"np.stack(({', '.join(self.raw(x, width) for x in vs)}))"
        return self.guarded(m, [f"{obj}.store(S, {ins.index}, {a}, {data}, {width}, m)"])

    def op_atom(self, ins, p, m):
        space, n, width = self.access(p)
        for s in self.granules if space == "generic" else [space]:
            self.granules[s] = min(self.granules[s], width)
        ty = p[-1] if p[-1] in SIZES else next(x for x in reversed(p) if x in SIZES)
        op = next(x for x in p[1:] if x in ATOMS)
        d, ops = (None, ins.operands) if p[0] == "red" else (ins.operands[0], ins.operands[1:])
        a = self.place(ops[0], space)

        def vec(o):
            return "np.stack((" + ", ".join(self.raw(x, width) for x in (o.items if isinstance(o, Vec) else [o])) + ",))"

        c = vec(ops[2]) if op == "cas" else "None"
        b = ops[0].base
        lock = op in ("cas", "exch") and not (isinstance(b, Reg) and self.root(ops[0]) in self.cas_seeds)
        lines = [f"x = S.atomic({ins.index}, {space!r}, {a}, {op!r}, {ty!r}, {width}, {vec(ops[1])}, {c}, m, {lock})"]
        for j, r in enumerate([] if d is None else d.items if isinstance(d, Vec) else [d]):
            if isinstance(r, Reg):
                lines.append(f"R[{r.index}] = x[{j}]" if m == "None" else f"R[{r.index}] = where(m, x[{j}], R[{r.index}])")
        return self.guarded(m, lines)

    op_red = op_atom

    def op_cp(self, ins, p, m):
        if p[1] != "async" or "bulk" in ins.op or "mbarrier" in ins.op:
            raise PtxError("unknown opcode")
        if "commit_group" in p:
            return [f"S.cp_commit({m})"]
        if "wait_group" in p or "wait_all" in p:
            keep = ins.operands[0].value if "wait_group" in p else -1
            return [f"S.cp_wait({keep}, {m})"]
        dst, src, size = ins.operands[:3]
        for s in ("global", "shared"):
            self.granules[s] = min(self.granules[s], size.value)
        n = "None" if len(ins.operands) < 4 else self.raw(ins.operands[3], 4)
        return self.guarded(
            m, [f"S.cp_async({ins.index}, {self.place(dst, 'shared')}, {self.addr(src, 8)}, {size.value}, {n}, m)"]
        )

    # ---- warp- and CTA-wide operations --------------------------------------------------------------------------
    def op_call(self, ins, p, m):
        name = next((o.name for o in ins.operands if isinstance(o, Sym)), "through a pointer")
        if name == "vprintf":
            return []
        if name == "__assertfail":
            return self.guarded(m, [f"S.assertion({ins.index}, m)"])
        raise PtxError(f"call of {name}: not defined in the module")

    def op_membar(self, ins, p, m):
        return ["S.gm.fenced = True"] if {"gl", "sys", "gpu"} & set(p) else []

    def op_bar(self, ins, p, m):
        ops = ins.operands
        if "red" in p:
            mode = next(x for x in p if x in ("popc", "and", "or"))
            if len(ops) > 3:
                raise PtxError("reduction barrier of a part of the CTA")
            return [(ops[0], f"S.barrier_red({ins.index}, {mode!r}, {self.raw(ops[-1], 0)}, {m})")]
        if "sync" not in p or "cluster" in p:
            raise PtxError("barrier form")
        whole = len(ops) < 2 or isinstance(ops[1], Imm) and ops[1].value == self.T
        if whole and (not ops or isinstance(ops[0], Imm)):
            return [f"S.barrier({ins.index}, {m})"]
        count = self.raw(ops[1], 4) if len(ops) > 1 else self.const(self.T, 4)
        return self.guarded(m, [f"S.part_barrier({ins.index}, {self.raw(ops[0], 4)}, {count}, m)"])

    op_barrier = op_bar

    def members(self, o):
        """Member mask expression, 'None' for all 32 lanes."""
        return "None" if isinstance(o, Imm) and o.value & 0xFFFFFFFF == 0xFFFFFFFF else self.raw(o, 4)

    def op_shfl(self, ins, p, m):
        d, a, b, c = ins.operands[:4]
        mode = next(x for x in p if x in ("bfly", "up", "down", "idx"))
        ds = d.items if isinstance(d, Vec) else [d]
        mask = self.members(ins.operands[4]) if len(ins.operands) > 4 else "None"
        lines = [] if m == mask == "None" else [f"m = {m}", f"S.members({ins.index}, {mask}, m)"]
        if isinstance(b, Imm) and isinstance(c, Imm):
            idx, ok = shuffle_index(mode, np.uint32(b.value % 32), c.value, self.T)
            idx, ok = self.array(("shfl", mode, b.value, c.value), idx), self.array(("shflp", mode, b.value, c.value), ok)
        else:
            lines.append(f"i, ok = S.shuffle_index({mode!r}, {self.raw(b, 4)}, {self.raw(c, 4)})")
            idx, ok = "i", "ok"
        x = self.raw(a, 4)
        out = [(ds[0], f"{x}.take({idx})" if m == "None" else f"S.shuffled({x}, {idx}, m)")] + (
            [(ds[1], ok)] if len(ds) > 1 else []
        )
        for r, e in out:
            if isinstance(r, Reg):
                lines.append(f"R[{r.index}] = {e}" if m == "None" else f"R[{r.index}] = where(m, {e}, R[{r.index}])")
        return lines

    def warp_wide(self, ins, mask, m, out):
        """Results of an instruction with a member mask."""
        lines = [f"m = {m}"] + ([] if m == mask == "None" else [f"S.members({ins.index}, {mask}, m)"])
        lines += [f"t{j} = {e}" for j, (_, e) in enumerate(out)]
        return lines + [
            f"R[{r.index}] = t{j}" if m == "None" else f"R[{r.index}] = where(m, t{j}, R[{r.index}])"
            for j, (r, _) in enumerate(out)
            if isinstance(r, Reg)
        ]

    def op_vote(self, ins, p, m):
        mode, d, a = next(x for x in p if x in ("ballot", "any", "all", "uni")), *ins.operands[:2]
        mask = self.members(ins.operands[2]) if len(ins.operands) > 2 else "None"
        return self.warp_wide(ins, mask, m, [(d, f"S.vote({mode!r}, {self.raw(a, 0)}, {mask}, m)")])

    def op_match(self, ins, p, m):
        d, a = ins.operands[:2]
        ds, mask = d.items if isinstance(d, Vec) else [d], self.members(ins.operands[2])
        call = f"S.match({p[1]!r}, {self.raw(a, SIZES[p[-1]])}, {mask}, m)"
        return self.warp_wide(ins, mask, m, list(zip(ds, [f"{call}[0]", f"{call}[1]"], strict=False)))

    def op_createpolicy(self, ins, p, m):
        return [(ins.operands[0], self.const(0, 8))]

    def op_activemask(self, ins, p, m):
        return [(ins.operands[0], f"S.activemask({m})")]

    def op_elect(self, ins, p, m):
        ds = ins.operands[0].items
        return [(ds[1], f"S.elect({m})")] if isinstance(ds[0], Sym) else [(ds[0], self.const(0, 4)), (ds[1], f"S.elect({m})")]

    def op_redux(self, ins, p, m):
        d, a, mask = ins.operands[:3]
        mask = self.members(mask)
        e = f"S.redux({p[2]!r}, {self.val(a, p[-1])}, {mask}, m).view(u4)"
        return self.warp_wide(ins, mask, m, [(d, e)])

    def regs(self, o):
        """Slots of a register list, as a tuple literal."""
        return repr(tuple(r.index for r in (o.items if isinstance(o, Vec) else [o])))

    def op_ldmatrix(self, ins, p, m):
        self.granules["shared"] = min(self.granules["shared"], 16)
        if "m8n8" not in p or p[-1] != "b16":
            raise PtxError("ldmatrix form")
        return [
            f"S.ldmatrix({ins.index}, R, {self.regs(ins.operands[0])}, {self.place(ins.operands[1], 'shared')}, "
            f"{'trans' in p}, {m})"
        ]

    def op_stmatrix(self, ins, p, m):
        if "m8n8" not in p or p[-1] != "b16":
            raise PtxError("stmatrix form")
        return [
            f"S.stmatrix({ins.index}, R, {self.regs(ins.operands[1])}, {self.place(ins.operands[0], 'shared')}, "
            f"{'trans' in p}, {m})"
        ]

    def op_mma(self, ins, p, m):
        if p[1] != "sync" or "row" not in p or "sp" in p[1:3]:
            raise PtxError("mma form")
        dt, at, bt, ct = p[-4:]
        if at != bt or dt != ct or (at, dt) not in MMA_TYPES:
            raise PtxError("mma types")
        d, a, b, c = ins.operands
        cs = [self.val(x, {"f32": "f32", "s32": "s32", "f64": "f64", "f16": "f16x2"}[dt]) for x in c.items]
        return [
            f"S.mma({ins.index}, R, {self.regs(d)}, {self.regs(a)}, {self.regs(b)}, [{', '.join(cs)}], "
            f"{p[3]!r}, {at!r}, {dt!r}, {'satfinite' in p}, {m})"
        ]

    def op_wmma(self, ins, p, m):
        what = p[1]
        shape = next(x for x in p if re.fullmatch(r"m\d+n\d+k\d+", x))
        if what == "mma":
            types = p[p.index(shape) + 1 :]
            types = [t for t in types if t != "satfinite"]
            dt, kind, ct = (types[0], types[1], types[-1]) if len(types) == 4 else (types[0], "f16", types[1])
            if dt != ct or (kind, dt) not in MMA_TYPES:
                raise PtxError("wmma types")
            d, a, b, c = ins.operands
            cs = [self.val(x, {"f32": "f32", "s32": "s32", "f16": "f16x2"}[dt]) for x in c.items]
            return [
                f"S.wmma_mma({ins.index}, R, {self.regs(d)}, {self.regs(a)}, {self.regs(b)}, [{', '.join(cs)}], "
                f"{shape!r}, {kind!r}, {dt!r}, {'satfinite' in p}, {m})"
            ]
        kind, layout = p[-1], "row" if "row" in p else "col"
        space = next((x.split("::")[0] for x in p if x.split("::")[0] in ("global", "shared")), "generic")
        for s in self.granules if space == "generic" else [space]:
            self.granules[s] = min(self.granules[s], 16)
        load = what == "load"
        regs, mem = ins.operands[:2] if load else ins.operands[1::-1]
        minor = (
            {"a": "k", "b": "n", "c": "n", "d": "n"}[p[2]]
            if layout == "row"
            else {"a": "m", "b": "k", "c": "m", "d": "m"}[p[2]]
        )
        stride = (
            self.raw(ins.operands[2], 4)
            if len(ins.operands) > 2
            else self.const(int(re.search(minor + r"(\d+)", shape).group(1)), 4)
        )
        which = repr(p[2]) + ", " if load else ""
        return [
            f"S.wmma_{'load' if load else 'store'}({ins.index}, R, {self.regs(regs)}, {MEMORY[space]}, {which}{shape!r}, "
            f"{kind!r}, {layout!r}, {self.place(mem, space)}, {stride}, {m})"
        ]

    def op_fence(self, ins, p, m):
        return [f"S.fence_async({ins.index})"] if "proxy" in p else self.op_membar(ins, p, m)

    def op_wgmma(self, ins, p, m):
        if m not in ("None", "M"):
            raise PtxError("predicated wgmma")
        if p[1] == "fence":
            return []
        if p[1] == "commit_group":
            return ["S.wg_commit()"]
        if p[1] == "wait_group":
            return [f"S.wg_wait({ins.operands[0].value})"]
        d, a, b, scale = ins.operands[:4]
        flags = [x.value for x in ins.operands[4:]]
        a_arg = self.regs(a) if isinstance(a, Vec) else self.raw(a, 8)
        sc = self.raw(scale, 0)
        return [
            f"S.wgmma({ins.index}, R, {self.regs(d)}, {a_arg}, {self.raw(b, 8)}, {sc}, {flags!r}, {p[4]!r}, "
            f"{p[-1]!r}, {p[5]!r}, {m})"
        ]


MEMORY = {"global": "S.gm", "shared": "S.sm", "local": "S.lm", "param": "S.pm", "generic": "S.gen"}
MMA_TYPES = {
    ("bf16", "f32"),
    ("f16", "f32"),
    ("f16", "f16"),
    ("tf32", "f32"),
    ("e4m3", "f32"),
    ("e5m2", "f32"),
    ("s8", "s32"),
    ("u8", "s32"),
    ("f64", "f64"),
}


def shuffle_index(mode, b, c, T):
    """Source thread of each thread and whether it is in range. b and c: scalars or per-thread arrays."""
    lane = np.arange(T, dtype=np.int64) % 32
    b, clamp, seg = np.asarray(b, np.int64) & 31, np.asarray(c, np.int64) & 31, (np.asarray(c, np.int64) >> 8) & 31
    lo, hi = lane & seg, (lane & seg) | (clamp & ~seg & 31)
    j = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": lo | (b & ~seg & 31)}[mode]
    ok = (j >= hi) if mode == "up" else (j <= hi)
    return np.where(ok, j, lane) + (np.arange(T) - lane), np.broadcast_to(ok, (T,)).copy()
