"""PTX text -> a control-flow graph of decoded instructions.

Calls of functions defined in the module are inlined; their parameters live in local memory. So a kernel is
one graph, with `.reg` declarations of nested scopes, labels, jump tables and source locations resolved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .module import SIZES, Module, PtxError, declaration


@dataclass
class Reg:
    index: int  # slot in the register file
    size: int  # bytes; 0 for a predicate
    name: str


@dataclass
class Imm:
    value: object  # int (for integers and raw float bits) or float
    kind: str = "int"  # 'int' | 'f32' (bits) | 'f64' (bits) | 'float' (decimal literal)


@dataclass
class Sym:
    name: str  # shared/global/param/label symbol or a special register


@dataclass
class Mem:
    base: object  # Reg | Sym | None
    offset: int


@dataclass
class Vec:
    items: list


@dataclass
class Instr:
    index: int
    op: str  # full opcode, e.g. 'ld.global.v4.b32'
    operands: list
    pred: Reg | None  # guard predicate
    negate: bool
    line: int  # line in the PTX text
    loc: str  # outermost source line, e.g. 'kernels.py:36'
    text: str

    @property
    def parts(self):
        return self.op.split(".")


@dataclass
class Block:
    index: int
    instrs: list = field(default_factory=list)  # without the terminator
    term: Instr | None = None  # bra / brx / ret / exit / trap or None (falls through)
    target: int | None = None
    table: list = field(default_factory=list)  # of a brx
    succ: list = field(default_factory=list)
    ipdom: int = -1  # -1 is the virtual exit


@dataclass
class Kernel:
    name: str
    params: list  # Variables
    threads: int | None = None  # as required by the text (.reqntid)
    max_threads: int | None = None  # as promised by the text (.maxntid)
    regs: list = field(default_factory=list)
    blocks: list = field(default_factory=list)
    instrs: list = field(default_factory=list)
    local_bytes: int = 0
    locals: dict = field(default_factory=dict)  # symbol -> offset in a thread's local memory
    globals: dict = field(default_factory=dict)  # module variables in .global and .const: name -> Variable
    shared: dict = field(default_factory=dict)  # shared arrays: name -> Variable (size 0: dynamic)
    target: str = ""

    def add_local(self, name, size, align=16):
        if name not in self.locals:
            self.locals[name] = self.local_bytes
            self.local_bytes += (size + 15) // 16 * 16


SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid|clock|clock64|globaltimer|smid|gridid|envreg\d+|"
    r"lanemask_\w+|dynamic_smem_size|total_smem_size|nclusterid\.\w|clusterid\.\w|cluster_ctaid\.\w|"
    r"cluster_nctaid\.\w|cluster_ctarank|cluster_nctarank|nsmid|is_explicit_cluster|nwarpid)$"
)


def parse_imm(tok):
    """A literal, or None when the token is not one."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", tok):
        return Imm(int(tok[2:], 16), "f32")
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", tok):
        return Imm(int(tok[2:], 16), "f64")
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", tok):
        tok = tok.rstrip("U")
        return Imm(int(tok, 0) if "x" in tok.lower() else int(tok))
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", tok):
        return Imm(float(tok), "float")
    if tok in ("true", "false"):
        return Imm(int(tok == "true"))
    if tok == "WARP_SZ":
        return Imm(32)
    return None


class _Scope:
    def __init__(self, parent):
        self.parent, self.regs, self.labels = parent, {}, {}
        self.slots, self.tables = {}, {}  # call parameters in local memory; jump tables

    def find(self, table, name):
        s = self
        while s is not None:
            if name in getattr(s, table):
                return getattr(s, table)[name]
            s = s.parent
        return None


def _split_operands(text):
    out, depth, cur = [], 0, ""
    for ch in text:
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


def parse(text: str, entry: str | None = None) -> Kernel:
    """Parse the module and return its (named or only) entry."""
    mod = Module(text)
    names = [n for n in mod.entries() if entry is None or n == entry]
    if len(names) != 1:
        raise PtxError(f"expected one .entry{'' if entry is None else ' ' + entry}, found {len(names)} of {mod.entries()}")
    fn = mod.functions[names[0]]
    k = Kernel(fn.name, fn.params, target=mod.target)
    for attr, directive in (("threads", "reqntid"), ("max_threads", "maxntid")):
        m = re.search(rf"\.{directive}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", fn.attributes)
        if m:
            setattr(k, attr, int(m.group(1)) * int(m.group(2) or 1) * int(m.group(3) or 1))
    k.globals = {n: v for n, v in mod.variables.items() if v.space != "shared"}
    k.shared = {n: v for n, v in mod.variables.items() if v.space == "shared"}
    _Body(k, mod).run(fn)
    _post_dominators(k.blocks)
    return k


class _Body:
    """Builds the blocks of one kernel."""

    def __init__(self, k, mod):
        self.k, self.mod, self.text = k, mod, mod.text
        self.blocks, self.pending = [Block(0)], []  # pending: (block, scope, label) branches to resolve
        self.root = _Scope(None)  # special registers
        self.targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$%\w]+)", self.text))  # debug labels do not split blocks
        for names in re.findall(r"\.branchtargets([^;]*);", self.text):
            self.targets |= {n.strip() for n in names.split(",")}
        self.inlined = {}  # source place -> the place it was inlined at
        self.calls, self.slots = [], 0  # functions being expanded

    def run(self, fn):
        self.function(fn, _Scope(self.root))
        for blk, sc, label in self.pending:
            found = [sc.find("labels", n) for n in ([label] if isinstance(label, str) else label)]
            if None in found:
                raise PtxError(f"line {blk.term.line}: unknown label {label}")
            blk.target, blk.table = found[0], found
        self.k.blocks = self.blocks

    def new_block(self):
        last = self.blocks[-1]
        if last.instrs or last.term:
            self.blocks.append(Block(len(self.blocks)))
        return self.blocks[-1].index

    # ---- text to statements -------------------------------------------------------------------------------------
    def function(self, fn, scope):
        """Statements of a function's body."""
        line = self.text.count("\n", 0, fn.body) + 1
        self.calls.append(fn.name)
        self.scope, self.loc, self.label = scope, "", None
        returns, self.returns = getattr(self, "returns", None), []
        buf, buf_line, depth = "", line, 1
        pos = fn.body + 1
        while depth:
            end = self.text.find("\n", pos)
            end = len(self.text) if end < 0 else end
            code, _, comment = self.text[pos:end].partition("//")
            if code.lstrip().startswith(".loc") and re.match(r"\s*\.loc\s", code):
                self.place(code, comment)
            else:
                for ch in code:
                    if ch == ";":
                        self.statement(" ".join(buf.split()), buf_line)
                        buf = ""
                    elif ch == "{" and not buf.strip():
                        self.scope, depth = _Scope(self.scope), depth + 1
                    elif ch == "}" and not buf.strip():
                        self.scope, depth = self.scope.parent, depth - 1
                        if depth == 0:
                            break
                    else:
                        if not buf.strip() and not ch.isspace():
                            buf_line = line
                        buf += ch
                        if ch == ":" and re.fullmatch(r"\s*[$%\w]+:", buf):  # a label (opcodes with '::' contain a dot first)
                            self.label = buf.strip()[:-1]
                            if self.label in self.targets:
                                self.scope.labels[self.label] = self.new_block()
                            buf = ""
            buf += " "
            pos, line = end + 1, line + 1
        self.calls.pop()
        mine, self.returns = self.returns, returns
        return mine

    def place(self, code, comment):
        """.loc: the outermost source line."""
        where = re.findall(r"([\w.\-]+):(\d+):\d+", comment)
        if where:  # Triton lists the chain of inlined places in a comment
            self.loc = f"{where[-1][0]}:{where[-1][1]}"
            return
        m = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)", code)
        at = tuple(map(int, m.groups()))
        up = re.search(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)", code)
        if up:
            self.inlined[at] = tuple(map(int, up.groups()))
            seen = set()
            while at in self.inlined and at not in seen:
                seen.add(at)
                at = self.inlined[at]
        if at[1]:
            self.loc = f"{self.mod.files.get(at[0], at[0])}:{at[1]}"

    # ---- statements ---------------------------------------------------------------------------------------------
    def add_reg(self, name, size):
        self.scope.regs[name] = Reg(len(self.k.regs), size, name)
        self.k.regs.append(self.scope.regs[name])

    def operand(self, tok):
        if tok.startswith("{"):
            return Vec([self.operand(t) for t in _split_operands(tok.strip()[1:-1])])
        if tok.startswith("("):
            return Vec([self.operand(t) for t in _split_operands(tok.strip()[1:-1])])
        if tok.startswith("["):
            inner = tok[1 : tok.rindex("]")].strip()
            mm = re.fullmatch(r"([%$\w.]+)\s*(?:\+\s*(-?\s*(?:0x[0-9a-fA-F]+|\d+)))?", inner)
            if not mm:
                raise PtxError(f"address {tok!r}")
            imm = parse_imm(mm.group(1))
            base = None if imm else self.operand(mm.group(1))
            return Mem(base, (imm.value if imm else 0) + int((mm.group(2) or "0").replace(" ", ""), 0))
        imm = parse_imm(tok)
        if imm:
            return imm
        if "|" in tok:
            return Vec([self.operand(t.strip()) for t in tok.split("|")])
        if tok.startswith("!"):
            return ("!", self.operand(tok[1:].strip()))
        r = self.scope.find("regs", tok) or self.scope.find("slots", tok)
        if r is not None:
            return r
        if SPECIAL.match(tok):  # a special register: a read-only slot of the register file
            size = 8 if tok in ("%clock64", "%globaltimer") else 4
            r = self.root.regs[tok] = Reg(len(self.k.regs), size, tok)
            self.k.regs.append(r)
            return r
        return Sym(tok)

    def slot(self, name, size, scope):
        """Allocates a call parameter in local memory."""
        self.slots += 1
        sym = scope.slots[name] = Sym(f"{name}:{self.slots}")
        self.k.add_local(sym.name, size)
        return sym

    def directive(self, s, ln):
        if s.startswith(".reg"):
            mm = re.match(r"\.reg\s*\.(\w+)\s+(.*)", s)
            for name in mm.group(2).split(","):
                rng = re.fullmatch(r"\s*([%$\w]+)<(\d+)>\s*", name)
                for nm in [f"{rng.group(1)}{i}" for i in range(int(rng.group(2)))] if rng else [name.strip()]:
                    self.add_reg(nm, SIZES[mm.group(1)])
            return
        if s.startswith(".branchtargets"):
            self.scope.tables[self.label] = [x.strip() for x in s[14:].split(",")]
            return
        if s.startswith((".pragma", ".callprototype")):
            return
        v = declaration(s)
        if v is None:
            raise PtxError(f"line {ln}: directive {s[:60]!r}")
        if v.space == "local":
            self.k.add_local(v.name, v.size)
        elif v.space == "shared":
            self.k.shared.setdefault(v.name, v)
        elif v.space == "param":
            self.slot(v.name, v.size, self.scope)
        else:
            self.k.globals.setdefault(v.name, v)

    def statement(self, s, ln):
        if not s:
            return
        if s.startswith("."):
            return self.directive(s, ln)
        mm = re.match(r"(?:@\s*(!?)\s*([%$\w]+)\s+)?([a-zA-Z][\w.:]*)\s*(.*)", s)
        if not mm:
            raise PtxError(f"line {ln}: {s[:80]!r}")
        pred = self.scope.find("regs", mm.group(2)) if mm.group(2) else None
        if mm.group(2) and pred is None:
            raise PtxError(f"line {ln}: unknown predicate {mm.group(2)}")
        op = mm.group(3)
        toks = _split_operands(mm.group(4))
        base = op.split(".")[0]
        if base == "bra":
            ops = [Sym(toks[0])]
        elif base == "brx":
            ops = [self.operand(toks[0]), Sym(toks[1])]
        else:
            ops = [self.operand(t) for t in toks]
        if (
            base in ("ld", "st")
            and ".param" in op
            and any(isinstance(o, Mem) and isinstance(o.base, Sym) and o.base.name in self.k.locals for o in ops)
        ):
            op = op.replace(".param::func", ".param").replace(".param", ".local")
        ins = Instr(len(self.k.instrs), op, ops, pred, mm.group(1) == "!", ln, self.loc, s)
        if base == "call":
            names = [o.name for o in ops if isinstance(o, Sym)]
            fn = self.mod.functions.get(names[0]) if names else None
            if fn is not None and fn.body is not None:
                return self.expand(fn, ins)
        self.k.instrs.append(ins)
        if base == "ret" and len(self.calls) > 1:  # of an expanded function: go on after the call
            ins.op = "bra"
            self.returns.append(self.blocks[-1])
        if base in ("bra", "brx", "ret", "exit", "trap"):
            self.blocks[-1].term = ins
            if base == "bra":
                self.pending.append((self.blocks[-1], self.scope, toks[0]))
            elif base == "brx":
                table = self.scope.find("tables", toks[1])
                if table is None:
                    raise PtxError(f"line {ln}: unknown jump table {toks[1]}")
                self.pending.append((self.blocks[-1], self.scope, table))
            self.blocks.append(Block(len(self.blocks)))
        else:
            self.blocks[-1].instrs.append(ins)

    def expand(self, fn, ins):
        """Inlines the body of a called function."""
        if fn.name in self.calls:
            raise PtxError(f"line {ins.line}: recursive function {fn.name}")
        if ins.pred is not None:
            raise PtxError(f"line {ins.line}: predicated call")
        lists = [[x.name for x in o.items] for o in ins.operands if isinstance(o, Vec)]
        outs, args = (lists + [[]])[:2] if fn.returns else ([], (lists + [[]])[0])
        if len(args) != len(fn.params) or len(outs) != len(fn.returns):
            raise PtxError(f"line {ins.line}: arguments of {fn.name}")
        scope = _Scope(self.root)
        for formal, actual in zip(fn.returns + fn.params, outs + args, strict=False):
            scope.slots[formal.name] = Sym(actual)
        caller, loc = self.scope, self.loc
        returns = self.function(fn, scope)
        self.scope, self.loc = caller, loc
        after = self.new_block()
        for blk in returns:
            blk.target = after


def _post_dominators(blocks):
    """Immediate post-dominators, where lanes that took different sides of a branch reconverge."""
    n = len(blocks)
    for b in blocks:
        nxt = b.index + 1 if b.index + 1 < n else -1
        base = b.term.op.split(".")[0] if b.term else None
        if base is None:
            b.succ = [nxt]
        elif base in ("bra", "brx"):
            b.succ = list(dict.fromkeys(b.table or [b.target])) + ([] if b.term.pred is None else [nxt])
        else:
            b.succ = [-1] if b.term.pred is None else [-1, nxt]
    full = (1 << (n + 1)) - 1  # bit n is the virtual exit
    pdom = [full] * n + [1 << n]
    changed = True
    while changed:
        changed = False
        for b in reversed(blocks):
            meet = full
            for s in b.succ:
                meet &= pdom[s]  # pdom[-1] is the exit
            new = meet | (1 << b.index)
            if new != pdom[b.index]:
                pdom[b.index], changed = new, True
    depth = [x.bit_count() for x in pdom]
    for b in blocks:
        # the nearest strict post-dominator is the one that all the others post-dominate
        rest, best = pdom[b.index] & ~(1 << b.index), n
        while rest:
            low = rest & -rest
            i = low.bit_length() - 1
            rest ^= low
            if depth[i] > depth[best]:
                best = i
        b.ipdom = -1 if best == n else best
