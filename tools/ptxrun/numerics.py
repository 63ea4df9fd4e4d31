"""Bit-level number helpers. Register values are unsigned integer arrays; floats are views of them.

Approximate instructions (ex2.approx, div.full, ...) are computed as the correctly rounded numpy result, so they may
differ from a GPU in the last places; everything with a rounding mode in its name is exact.
"""

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
UINT = {0: np.bool_, 1: u1, 2: u2, 4: u4, 8: u8}
SINT = {1: i1, 2: i2, 4: i4, 8: i8}
POISON = {0: False, 1: 0xBA, 2: 0x7FBA, 4: 0x7FBADBAD, 8: 0x7FFBADBADBADBAD0}  # NaN patterns: unset registers show
where = np.where


def bf(x):
    """bf16 bits (u2) -> f4, exact."""
    return (x.astype(u4) << u4(16)).view(f4)


def to_bf(x):
    """f4 -> bf16 bits (u2), round to nearest even; NaN becomes 0x7fff as on the GPU."""
    b = np.ascontiguousarray(x, f4).view(u4)
    r = ((b + (u4(0x7FFF) + ((b >> u4(16)) & u4(1)))) >> u4(16)).astype(u2)
    nan = x != x
    return where(nan, u2(0x7FFF), r) if nan.any() else r


def f64_to_f32_odd(x):
    """f8 -> f4 with round-to-odd: a second rounding to a narrower type is then exact."""
    b = np.ascontiguousarray(x).view(u8)
    return ((b & ~u8(0x1FFFFFFF)) | where(b & u8(0x1FFFFFFF), u8(1 << 29), u8(0))).view(f8).astype(f4)


def ftz(x):
    """Flush subnormal f4 to a zero of the same sign."""
    small = np.abs(x) < f4(1.17549435e-38)
    return where(small, np.copysign(f4(0), x), x) if small.any() else x


def fma32(a, b, c):
    """f4 fused multiply-add with one rounding (subnormal results may be rounded twice)."""
    p = a.astype(f8) * b
    s = p + c
    r = s.astype(f4)
    # double rounding can only matter when the f8 sum sits exactly half way between two f4 values
    half = (s.view(u8) & u8(0x1FFFFFFF)) == u8(0x10000000)
    if half.any():
        t = s - p  # two-sum: what the f8 addition lost
        err = (p - (s - t)) + (c.astype(f8) - t)
        bits = s.view(i8) + where((err > 0) == (s > 0), i8(1), i8(-1))
        r = where(half & (err != 0), bits.view(f8).astype(f4), r)
    return r


def fma64(a, b, c):
    """f8 fused multiply-add: product and sum with their exact errors (Dekker, Knuth), rounded once more at the end."""
    p = a * b
    s = p + c
    split = f8(134217729.0)
    t = split * a
    ah = t - (t - a)
    t = split * b
    bh = t - (t - b)
    al, bl = a - ah, b - bh
    err = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    t = s - p
    err = err + ((p - (s - t)) + (c - t))
    return where(np.isfinite(err), s + err, s)


def directed(x, mode, dt=f4):
    """f8 -> f4 (or f2) rounded toward zero, down or up."""
    r = x.astype(dt)
    wrong = {"rz": np.abs(r) > np.abs(x), "rm": r > x, "rp": r < x}[mode]
    return where(wrong, np.nextafter(r, {"rz": dt(0), "rm": dt(-np.inf), "rp": dt(np.inf)}[mode]), r)


def xorsign(f, a, b):
    """min/max.xorsign.abs: of the magnitudes, with the product's sign."""
    return np.copysign(f(np.abs(a), np.abs(b)), where(np.signbit(a) ^ np.signbit(b), f4(-1), f4(1)))


def fma_bf(a, b, c):
    return to_bf(f64_to_f32_odd(a.astype(f8) * b + c))


def fma_h(a, b, c):
    return (a.astype(f8) * b + c).astype(f2)


def mulhi_u64(a, b):
    m, s = u8(0xFFFFFFFF), u8(32)
    al, ah, bl, bh = a & m, a >> s, b & m, b >> s
    mid = ((al * bl) >> s) + ((ah * bl) & m) + ((al * bh) & m)
    return ah * bh + ((ah * bl) >> s) + ((al * bh) >> s) + (mid >> s)


def mulhi_s64(a, b):
    r = mulhi_u64(a.view(u8), b.view(u8))
    return r - where(a < 0, b.view(u8), u8(0)) - where(b < 0, a.view(u8), u8(0))


def f2i(x, dt, mode):
    """Float -> integer with saturation; NaN gives 0."""
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(f8))
    info = np.iinfo(dt)
    r = where(x >= float(info.max), dt(info.max), where(x <= float(info.min), dt(info.min), 0))
    ok = (x < float(info.max)) & (x > float(info.min))
    return where(ok, where(ok, x, 0).astype(dt), r.astype(dt))


def rna_tf32(x):
    """Round f4 bits to tf32: nearest, ties away from zero."""
    special = (x & u4(0x7F800000)) == u4(0x7F800000)
    return where(special, x, (x + u4(0x1000)) & u4(0xFFFFE000))


def rn_tf32(x):
    special = (x & u4(0x7F800000)) == u4(0x7F800000)
    return where(special, x, (x + u4(0xFFF) + ((x >> u4(13)) & u4(1))) & u4(0xFFFFE000))


def to_f8(x, kind):
    """f4 -> fp8 bits (u1), nearest even, saturating to the largest finite value."""
    import torch

    dt, top = (torch.float8_e4m3fn, 448.0) if kind == "e4m3" else (torch.float8_e5m2, 57344.0)
    x = torch.from_numpy(np.ascontiguousarray(x, f4)).clamp(-top, top)
    return x.to(dt).view(torch.uint8).numpy()


def from_f8(x, kind):
    import torch

    dt = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    return torch.from_numpy(np.ascontiguousarray(x)).view(dt).float().numpy()


def matrix_width(kind):
    return {"bf16": 2, "f16": 2, "tf32": 4, "f64": 8}.get(kind, 1)


def widen(x, kind):
    """Bits of a matrix operand -> f4 (f8 for f64), exact; tf32 ignores its 13 lowest bits."""
    if kind == "bf16":
        return bf(x)
    if kind == "tf32":
        return (x & u4(0xFFFFE000)).view(f4)
    if kind == "f64":
        return x.view(f8)
    if kind in ("f16", "s8", "u8"):
        return x.view({"f16": f2, "s8": i1, "u8": u1}[kind]).astype(f4)
    return from_f8(x, kind)


def low_bits(n, dt, bits):
    """Mask of the n lowest bits."""
    return where(n >= bits, dt(~dt(0)), (dt(1) << (n % bits).astype(dt)) - dt(1))


def bfe(x, pos, length, bits, signed):
    dt, pos, length = x.dtype.type, pos & u4(255), length & u4(255)
    mask = low_bits(np.minimum(length, where(pos < bits, u4(bits) - pos, u4(0))), dt, bits)
    r = (x >> pos.astype(dt)) & mask
    if signed:  # fill with the field's top bit
        top = np.minimum(pos + length - u4(1), u4(bits - 1))
        r |= where((length > 0) & ((x >> top.astype(dt)) & dt(1) != 0), ~mask, dt(0))
    return r


def bfi(a, b, pos, length, bits):
    dt, pos = a.dtype.type, (pos & u4(255)).astype(a.dtype)
    mask = low_bits(length & u4(255), dt, bits) << pos
    return (b & ~mask) | ((a << pos) & mask)


def popc(x):
    return np.bitwise_count(x).astype(u4)


def clz(x):
    bits = x.dtype.itemsize * 8
    y = x.copy()
    for s in (1, 2, 4, 8, 16, 32):
        if s < bits:
            y |= y >> x.dtype.type(s)
    return u4(bits) - np.bitwise_count(y).astype(u4)


def brev(x):
    n = x.dtype.itemsize
    bits = np.unpackbits(np.ascontiguousarray(x).view(u1).reshape(-1, n), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").copy().view(x.dtype).reshape(-1)


def prmt(a, b, sel):
    src = np.stack([a, b], 1).view(u1)  # (T, 8): bytes of a, then of b
    nib = (sel[:, None] >> np.array([0, 4, 8, 12], u4)) & u4(15)
    out = np.take_along_axis(src, (nib & u4(7)).astype(np.intp), 1)
    sign = where(out & u1(0x80), u1(0xFF), u1(0))
    return np.ascontiguousarray(where(nib & u4(8), sign, out)).view(u4).reshape(-1)


def lop3(a, b, c, lut):
    out = np.zeros_like(a)
    for i in range(8):
        if lut >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def shf(lo, hi, n, left, clamp):
    n = np.minimum(n, u4(32)) if clamp else n & u4(31)
    w = (hi.astype(u8) << u8(32)) | lo
    return ((w << n.astype(u8)) >> u8(32)).astype(u4) if left else (w >> n.astype(u8)).astype(u4)


def idiv(a, b, rem):
    """Integer division truncating toward zero (by 0: all ones / the dividend)."""
    one = a.dtype.type(1)
    safe = where(b == 0, one, b)
    q = a // safe
    if a.dtype.kind == "i":
        q = q + ((q * safe != a) & ((a < 0) != (safe < 0)))  # floor -> truncation
    q = where(b == 0, ~(one ^ one), q)
    return a - q * b if rem else q
