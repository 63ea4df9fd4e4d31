"""Kernel arguments -> the bytes of the parameter space. A Struct is a struct passed by value, with pointers to tensors."""

import struct

FORMATS = {
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
    "f32": "f",
    "f64": "d",
    "f16": "e",
    "bool": "?",
    "ptr": "Q",
}


class Struct:
    """A struct argument. Fields in order, each (kind, value) or (kind, values, length), aligned as C does.

    kind: 'ptr' (tensors or None), i8..i64, u8..u64, f16, f32, f64, bool, another Struct, or bytes. With a length the field
    is an array, padded with zeros:

        Struct(('ptr', params, 24), ('ptr', grads, 24), ('i64', sizes, 24), ('i32', len(params)))
    """

    def __init__(self, *fields, align=1):
        self.fields, self.align, size = [], align, 0  # (offset, kind, value, label)
        for i, f in enumerate(fields):
            if isinstance(f, (bytes, Struct)):
                f = ("bytes" if isinstance(f, bytes) else "struct", f)
            kind, values = f[:2]
            array = len(f) > 2
            if array and len(values) > f[2]:
                raise ValueError(f"field {i}: {len(values)} values for an array of {f[2]}")
            if kind == "bytes":
                width, a = len(values), 1
            elif kind == "struct":
                width, a = values.size, values.align
            else:
                width = a = struct.calcsize("<" + FORMATS[kind])
            size += -size % a
            self.align = max(self.align, a)
            for j, v in enumerate(values if array else [values]):
                self.fields.append((size + j * width, kind, v, f"{i}[{j}]" if array else str(i)))
            size += width * (f[2] if array else 1)
        self.size = size + -size % self.align

    def tensors(self, name):
        for _, kind, v, label in self.fields:
            if kind == "struct":
                yield from v.tensors(f"{name}.{label}")
            elif kind == "ptr" and v is not None and not isinstance(v, int):
                yield f"{name}.{label}", v

    def encode(self, name, pointers):
        out = bytearray(self.size)
        for at, kind, v, label in self.fields:
            if kind == "struct":
                raw = v.encode(f"{name}.{label}", pointers)
            elif kind == "bytes":
                raw = v
            elif kind == "ptr":
                raw = struct.pack("<Q", 0 if v is None else v if isinstance(v, int) else pointers[f"{name}.{label}"])
            else:
                raw = struct.pack("<" + FORMATS[kind], v)
            out[at : at + len(raw)] = raw
        return bytes(out)


def tensors_of(args):
    """(name, tensor) pairs, including those in structs."""
    import torch

    for name, v in args:
        if isinstance(v, torch.Tensor):
            yield name, v
        elif isinstance(v, Struct):
            yield from v.tensors(name)


def encode(params, offsets, total, args, pointers):
    """The parameter space. Parameters without an argument are zero (Triton's hidden scratch pointers)."""
    import torch

    if len(args) > len(params):
        raise ValueError(f"{len(args)} arguments for {len(params)} parameters")
    out = bytearray(total)
    for p, (name, v) in zip(params, args, strict=False):
        if isinstance(v, Struct):
            raw = v.encode(name, pointers)
        elif isinstance(v, (bytes, bytearray)):
            raw = bytes(v)
        elif isinstance(v, torch.Tensor):
            raw = pointers[name].to_bytes(8, "little")
        elif v is None:
            raw = bytes(p.size)
        elif isinstance(v, float) or p.type in ("f32", "f64", "f16"):
            if p.type[0] in "us":
                raise ValueError(f"{name}: a float for an integer parameter")
            raw = struct.pack({2: "<e", 4: "<f", 8: "<d"}[p.size], v)
        else:
            raw = (int(v) % (1 << 8 * p.size)).to_bytes(p.size, "little")
        if len(raw) != p.size:
            raise ValueError(f"{name}: {len(raw)} bytes for a parameter of {p.size}")
        at = offsets[p.name]
        out[at : at + p.size] = raw
    return bytes(out)
