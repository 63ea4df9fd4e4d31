"""The module level of PTX text: variables with initialisers, function headers, source files."""

import re
import struct
from dataclasses import dataclass, field

SIZES = {
    "pred": 0,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}


class PtxError(Exception):
    """The PTX can't be parsed or uses something that this interpreter does not support."""


@dataclass
class Variable:
    name: str
    space: str  # global | const | shared | local | param
    size: int  # bytes; 0 for an array without a length (dynamic shared memory)
    align: int
    type: str
    data: bytes = b""
    relocs: list = field(default_factory=list)  # (byte offset, width, symbol, addend, mask): addresses in `data`
    pointer: bool = False  # a parameter declared .ptr


@dataclass
class Function:
    name: str
    entry: bool
    params: list  # Variables
    returns: list
    body: int | None  # text offset of '{'; None for an external function
    attributes: str  # text between the parameter list and the body


DECLARATION = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local|param)\s+(?:\.attribute\s*\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:(\.ptr)\s+(?:\.(?:global|const|shared|local)\s*)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$%]+)((?:\s*\[\d*\])*)\s*(?:=\s*([^;]*))?"
)
HEADER = re.compile(r"\.(entry|func)\b(?:\s*\.noreturn)?\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?")


def declaration(text):
    """One variable declaration -> Variable, or None."""
    m = DECLARATION.match(text)
    if not m:
        return None
    space, align, ty, ptr, name, dims, init = m.groups()
    width, count = SIZES[ty], 1
    for d in re.findall(r"\[(\d*)\]", dims):
        count *= int(d or 0)
    v = Variable(name, space, width * count, max(int(align or 0), width, 1), ty, pointer=bool(ptr))
    v.data = bytes(v.size)
    if init:
        _initialise(v, init, width)
    return v


def _initialise(v, init, width):
    out = bytearray(v.data)
    for i, item in enumerate(x.strip() for x in init.translate(str.maketrans("", "", "{}")).split(",")):
        if not item:
            continue
        at = i * width
        sym = re.fullmatch(
            r"(?:(0[xX][0-9a-fA-F]+)\s*\(\s*)?(?:generic\s*\(\s*)?([A-Za-z_$%][\w$]*)\s*\)?\s*(?:\+\s*(\d+))?\s*\)*", item
        )
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", item):
            out[at : at + width] = int(item[2:], 16).to_bytes(width, "little")
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", item):
            out[at : at + width] = (int(item.rstrip("U"), 0) % (1 << 8 * width)).to_bytes(width, "little")
        elif re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", item):
            out[at : at + width] = struct.pack("<f" if width == 4 else "<d", float(item))
        elif sym:
            v.relocs.append((at, width, sym.group(2), int(sym.group(3) or 0), int(sym.group(1) or "0", 16)))
        else:
            raise PtxError(f"initialiser of {v.name}: {item!r}")
    v.data = bytes(out)


def _declarations(text):
    return [v for v in map(declaration, (x.strip() for x in (text or "").split(","))) if v]


class Module:
    def __init__(self, text):
        # comments become blanks, so that offsets and line numbers stay; the text itself keeps line comments (source places)
        self.text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
        clean = re.sub(r"//[^\n]*", lambda m: " " * len(m.group()), self.text)
        target = re.search(r"^\s*\.target\s+(\w+)", clean, re.M)
        self.target = target.group(1) if target else ""
        self.files = {
            int(n): re.split(r"[\\/]", p)[-1] for n, p in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', self.text, re.M)
        }
        self.functions, rest, pos = {}, [], 0
        for m in HEADER.finditer(clean):
            if m.start() < pos:
                continue
            stop = re.compile(r"[{;]").search(clean, m.end())
            if stop is None:
                raise PtxError(f"function {m.group(3)} has no end")
            body, end = None, stop.end()
            if stop.group() == "{":
                body, end = stop.start(), _closing(clean, stop.start())
            f = Function(
                m.group(3),
                m.group(1) == "entry",
                _declarations(m.group(4)),
                _declarations(m.group(2)),
                body,
                clean[m.end() : stop.start()],
            )
            if body is not None or f.name not in self.functions:
                self.functions[f.name] = f
            rest.append(clean[pos : m.start()])
            pos = end
        rest.append(clean[pos:])
        self.variables = {}
        for m in re.finditer(
            r"^[ \t]*((?:\.(?:visible|extern|weak|common)\s+)*\.(?:global|const|shared)\s[^;]*);", "\n".join(rest), re.M
        ):
            v = declaration(m.group(1))
            if v and (v.name not in self.variables or any(v.data) or v.relocs):
                self.variables[v.name] = v

    def entries(self):
        return [f.name for f in self.functions.values() if f.entry]


def _closing(text, start):
    depth = 0
    for m in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if m.group() == "{" else -1
        if depth == 0:
            return m.end()
    raise PtxError("unbalanced braces")
