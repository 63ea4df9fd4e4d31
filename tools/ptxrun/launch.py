"""Run PTX text on CPU tensors: arguments, memory layout, launch."""

import random
import time

import numpy as np

from .arguments import encode, tensors_of
from .executor import Executor
from .memory import GlobalMemory, PtxFault
from .numerics import UINT
from .parser import PtxError, parse
from .report import Report
from .translate import Translator

_translated = {}


def prepare(ptx, entry, block):
    """(kernel, translation, block): parsed and translated once per number of lanes."""
    k = _translated.get((ptx, entry))
    if k is None:
        k = _translated[ptx, entry] = parse(ptx, entry)
    if block is None:
        if not k.threads:
            raise PtxError("number of threads unknown: pass block or num_warps")
        block = (k.threads, 1, 1)
    n = block[0] * block[1] * block[2]
    if not 1 <= n <= 1024:
        raise ValueError(f"block {block}: 1 to 1024 threads")
    if k.max_threads and n > k.max_threads:
        raise ValueError(f"block {block}: {n} threads, but the kernel promises at most {k.max_threads} (__launch_bounds__)")
    key = ptx, entry, (n + 31) // 32
    if key not in _translated:
        _translated[key] = Translator(k, (n + 31) // 32 * 32)
    return k, _translated[key], block


def triple(x):
    return tuple(int(v) for v in x) + (1,) * (3 - len(x)) if isinstance(x, (tuple, list)) else (int(x), 1, 1)


def _extent(t):
    """Byte range of a tensor view inside its storage."""
    size = t.element_size()
    first = t.storage_offset() * size
    if t.numel() == 0:
        return first, first
    return first, first + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=False)) + 1) * size


def _storage_bytes(t):
    import torch

    s = t.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(s, 0, (s.nbytes(),), (1,)).numpy()


def _element_mask(v, nbytes):
    """Which bytes of a view's range belong to its elements."""
    import torch

    size = v.element_size()
    hit = torch.zeros(nbytes // size, dtype=torch.bool)
    torch.as_strided(hit, v.shape, v.stride(), 0).fill_(True)
    return hit.numpy().repeat(size)


def _variables(k, gm, symbols):
    """Place the module's variables: name -> offset. symbols: name -> tensor that is the variable's content."""
    places = {n: gm.reserve(v.size) for n, v in k.globals.items()}
    unknown = set(symbols) - set(places)
    if unknown:
        raise ValueError(f"no module variable {sorted(unknown)}; there are {sorted(places)}")
    return places


def _fill_variables(k, gm, places, symbols):
    for n, off in places.items():
        v = k.globals[n]
        data = bytearray(v.data)
        for at, width, sym, addend, mask in v.relocs:
            if sym not in places:
                raise PtxError(f"initialiser of {n}: address of {sym}")
            a = gm.BASE + places[sym] + addend
            if mask:
                a = (a & mask) >> ((mask & -mask).bit_length() - 1)
            data[at : at + width] = a.to_bytes(8, "little")[:width]
        if n in symbols:
            raw = symbols[n].contiguous().view(-1).view(dtype=_uint8()).numpy()
            if raw.size > v.size:
                raise ValueError(f"{n}: {raw.size} bytes for a variable of {v.size}")
            data[: raw.size] = raw.tobytes()
        gm.data[off : off + v.size] = np.frombuffer(bytes(data), np.uint8)
        gm.allow(off, off + v.size, n)


def _uint8():
    import torch

    return torch.uint8


def _order(order, total, seed):
    if not isinstance(order, str):
        return list(order)
    ctas = list(range(total))
    if order == "reversed":
        ctas.reverse()
    elif order == "shuffled":
        random.Random(seed).shuffle(ctas)
    elif order != "forward":
        raise ValueError(order)
    return ctas


def run_ptx(
    ptx,
    args,
    grid,
    shared=0,
    num_warps=None,
    entry=None,
    order="forward",
    seed=0,
    check=True,
    tolerate_oob=False,
    bounds="range",
    sync=(),
    count_banks=False,
    max_instructions=20_000_000,
    block=None,
    symbols=None,
):
    """Run PTX text. args: list of (name, value) in parameter order; tensors are updated in place.

    block: threads per CTA, (x, y, z) or a number; or num_warps. shared: bytes of dynamic shared memory.
    order: 'forward', 'reversed', 'shuffled' (with seed) or a list of linear CTA numbers.
    bounds: 'range' allows a view's whole byte range, 'exact' only the bytes of its elements.
    sync: names of tensors whose atomics order CTAs (locks, counters); cas and exch, and atomics after a __threadfence,
        always do.
    symbols: contents of module variables by their names in the PTX, as tensors, updated in place.
    tolerate_oob: record out-of-bounds accesses (reads give NaN, writes are dropped) instead of raising.
    max_instructions: limit per CTA. CTAs run one after the other, so one that waits for a later one would spin for ever.
    A PtxFault carries the report so far in its attribute `report`.
    """
    import torch

    t0 = time.time()
    block = triple(block) if block is not None else (32 * num_warps, 1, 1) if num_warps else None
    k, tr, block = prepare(ptx, entry, block)
    rep = Report(kernel=k.name, ptx=ptx)
    grid, symbols = triple(grid), symbols or {}
    gm = GlobalMemory(tr.granules["global"], tr.T)
    gm.sync_names, gm.exact = set(sync), bounds == "exact"
    # one arena region per storage, covering every view of it that is passed
    stores = {}
    for name, v in tensors_of(args):
        if v.device.type != "cpu":
            raise ValueError(f"{name}: CPU tensors only")
        lo, hi = _extent(v)
        s = stores.setdefault(v.untyped_storage().data_ptr(), dict(lo=lo, hi=hi, bytes=_storage_bytes(v), views=[]))
        s["lo"], s["hi"] = min(s["lo"], lo), max(s["hi"], hi)
        s["views"].append((name, v, lo, hi))
    for s in stores.values():
        s["lo"] -= s["lo"] % 256  # keeps every view's alignment as in its storage
        s["start"] = gm.reserve(s["hi"] - s["lo"])
    places = _variables(k, gm, symbols)
    gm.build()
    pointers = {}
    for s in stores.values():
        gm.data[s["start"] : s["start"] + s["hi"] - s["lo"]] = s["bytes"][s["lo"] : s["hi"]]
        for name, v, lo, hi in s["views"]:
            a, b = s["start"] + lo - s["lo"], s["start"] + hi - s["lo"]
            gm.allow(a, b, name, _element_mask(v, b - a) if bounds == "exact" and b > a else None)
            pointers[name] = gm.BASE + a
    _fill_variables(k, gm, places, symbols)
    raw = encode(k.params, tr.param_offsets, tr.param_bytes, args, pointers)
    P = {}
    for pname, off, width, rsize in tr.params:
        at = tr.param_offsets[pname] + off
        P[pname, off, width, rsize] = np.full(tr.T, int.from_bytes(raw[at : at + width], "little"), UINT[rsize])
    ctas = _order(order, grid[0] * grid[1] * grid[2], seed)
    ex = Executor(k, block, gm, shared, rep, check, tolerate_oob, count_banks, max_instructions, tr, raw)
    try:
        ex.run(grid, ctas, P, {n: gm.BASE + off for n, off in places.items()})
    except PtxFault as e:
        e.report = rep
        raise
    finally:
        for s in stores.values():
            s["bytes"][s["lo"] : s["hi"]] = gm.data[s["start"] : s["start"] + s["hi"] - s["lo"]]
        for n, t in symbols.items():
            now = torch.from_numpy(gm.data[places[n] : places[n] + t.numel() * t.element_size()].copy())
            t.copy_(now.view(t.dtype).view(t.shape))
        rep.seconds = time.time() - t0
    if check:
        for a, b, name in gm.regions:
            g = slice(a // gm.gran, -(-b // gm.gran))
            rep.footprint[name] = (int(np.count_nonzero(gm.r[g])) * gm.gran, int(np.count_nonzero(gm.w[g])) * gm.gran)
    return rep
