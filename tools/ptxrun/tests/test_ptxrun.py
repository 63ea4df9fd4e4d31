"""Tests of ptxrun: kernels against float64 references on sm_80 and sm_90, planted bugs, single instructions."""

import functools
import re

import numpy as np
import torch
import triton
import triton.language as tl
from ptxrun import PtxError, PtxFault, compile_kernel, run, run_ptx

ARCHS = ("sm_80", "sm_90")
ORDERS = ("forward", "reversed", "shuffled")


# ---- kernels -------------------------------------------------------------------------------------------------------
@triton.jit
def k_elementwise(X, Y, O, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + o, mask=m, other=0.0).to(tl.float32)
    y = tl.load(Y + o, mask=m, other=0.0).to(tl.float32)
    z = x * tl.sigmoid(x) + tl.maximum(y, x) - tl.sqrt(tl.abs(y)) / (1.0 + x * x)
    tl.store(O + o, z.to(O.dtype.element_ty), mask=m)


@triton.jit
def k_math(X, O, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + o, mask=m, other=1.0)
    a = tl.abs(x) + 0.1
    tl.store(O + o, tl.exp(x), mask=m)
    tl.store(O + N + o, tl.log(a), mask=m)
    tl.store(O + 2 * N + o, tl.rsqrt(a), mask=m)
    tl.store(O + 3 * N + o, tl.sin(x), mask=m)
    tl.store(O + 4 * N + o, tl.erf(x), mask=m)
    tl.store(O + 5 * N + o, tl.math.div_rn(x, x * x + 1), mask=m)
    tl.store(O + 6 * N + o, tl.math.sqrt_rn(a), mask=m)
    tl.store(O + 7 * N + o, tl.floor(x * 3) + tl.ceil(x * 5), mask=m)
    tl.store(O + 8 * N + o, tl.exp2(x) + tl.log2(a), mask=m)


@triton.jit
def k_ints(X, Y, O, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + o, mask=m, other=1)
    y = tl.load(Y + o, mask=m, other=1)
    tl.store(O + o, x // y, mask=m)
    tl.store(O + N + o, x % y, mask=m)
    tl.store(O + 2 * N + o, (x << 3) ^ (y >> 2) | (x & ~y), mask=m)
    tl.store(O + 3 * N + o, tl.umulhi(x.to(tl.uint32), y.to(tl.uint32)).to(tl.int32), mask=m)
    tl.store(O + 4 * N + o, ((x.to(tl.int64) * y.to(tl.int64)) >> 16).to(tl.int32), mask=m)
    tl.store(O + 5 * N + o, tl.minimum(x, y) + tl.abs(x) * tl.maximum(x, y), mask=m)
    tl.store(O + 6 * N + o, x.to(tl.int8).to(tl.int32) + x.to(tl.uint8).to(tl.int32) + x.to(tl.int16).to(tl.int32), mask=m)
    tl.store(O + 7 * N + o, (x.to(tl.float32) * 0.37).to(tl.int32), mask=m)
    tl.store(O + 8 * N + o, (x.to(tl.uint32) // 10).to(tl.int32) + (x.to(tl.int64) // y.to(tl.int64)).to(tl.int32), mask=m)


@triton.jit
def k_casts(X, OH, OB, O8, OI, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + o, mask=m, other=1)
    h = x.to(tl.float16)
    b = x.to(tl.bfloat16)
    tl.store(OH + o, h * h, mask=m)
    tl.store(OB + o, b * b, mask=m)
    tl.store(O8 + o, h.to(tl.float8e5), mask=m)
    tl.store(OI + o, x.to(tl.int32) + h.to(tl.int32), mask=m)


@triton.jit
def k_softmax(X, O, stride, N, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    x = tl.load(X + r * stride + c, mask=c < N, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(O + r * stride + c, (e / tl.sum(e, 0)).to(O.dtype.element_ty), mask=c < N)


@triton.jit
def k_reduce(X, O, P, S, A, H, R: tl.constexpr, C: tl.constexpr):
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    x = tl.load(X + r[:, None] * C + c[None, :])
    tl.store(O + r, tl.sum(x, 1))
    tl.store(P + c, tl.max(x, 0))
    tl.store(S + r[:, None] * C + c[None, :], tl.cumsum(x, 1))
    tl.store(A + r, tl.argmax(x, 1))
    tl.store(H + tl.arange(0, 16), tl.histogram(tl.reshape(x * 4, (R * C,)).to(tl.int32) & 15, 16))


@triton.jit
def k_ln_fwd(X, Y, W, B, Mean, Rstd, stride, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    acc = tl.zeros([BLOCK], tl.float32)
    for off in range(0, N, BLOCK):
        c = off + tl.arange(0, BLOCK)
        acc += tl.load(X + row * stride + c, mask=c < N, other=0.0).to(tl.float32)
    mean = tl.sum(acc, 0) / N
    acc = tl.zeros([BLOCK], tl.float32)
    for off in range(0, N, BLOCK):
        c = off + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + c, mask=c < N, other=0.0).to(tl.float32)
        x = tl.where(c < N, x - mean, 0.0)
        acc += x * x
    rstd = 1 / tl.sqrt(tl.sum(acc, 0) / N + eps)
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)
    for off in range(0, N, BLOCK):
        c = off + tl.arange(0, BLOCK)
        m = c < N
        x = tl.load(X + row * stride + c, mask=m, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * tl.load(W + c, mask=m) + tl.load(B + c, mask=m)
        tl.store(Y + row * stride + c, y.to(Y.dtype.element_ty), mask=m)


@triton.jit
def k_ln_bwd(DX, DY, DW, DB, X, W, Mean, Rstd, Lock, stride, N, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Row-wise backward; rows of one group add into shared partial sums under a lock."""
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    m = c < N
    x = tl.load(X + row * stride + c, mask=m, other=0).to(tl.float32)
    dy = tl.load(DY + row * stride + c, mask=m, other=0).to(tl.float32)
    w = tl.load(W + c, mask=m, other=0).to(tl.float32)
    rstd = tl.load(Rstd + row)
    xhat = tl.where(m, (x - tl.load(Mean + row)) * rstd, 0.0)
    wdy = w * dy
    c1 = tl.sum(xhat * wdy, 0) / N
    c2 = tl.sum(wdy, 0) / N
    tl.store(DX + row * stride + c, ((wdy - (xhat * c1 + c2)) * rstd).to(DX.dtype.element_ty), mask=m)
    g = row % GROUP
    dw = dy * xhat
    db = dy
    while tl.atomic_cas(Lock + g, 0, 1) == 1:
        pass
    if tl.load(Lock + GROUP + g) == 0:
        tl.atomic_xchg(Lock + GROUP + g, 1)
    else:
        dw += tl.load(DW + g * N + c, mask=m)
        db += tl.load(DB + g * N + c, mask=m)
    tl.store(DW + g * N + c, dw, mask=m)
    tl.store(DB + g * N + c, db, mask=m)
    tl.debug_barrier()
    tl.atomic_xchg(Lock + g, 0)


@triton.jit
def k_matmul(
    A, B, C, M, N, K, sam, sak, sbk, sbn, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    a = A + rm[:, None] * sam + rk[None, :] * sak
    b = B + rk[:, None] * sbk + rn[None, :] * sbn
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        x = tl.load(a, mask=(rm[:, None] < M) & (rk[None, :] < K - k * BK), other=0.0)
        y = tl.load(b, mask=(rn[None, :] < N) & (rk[:, None] < K - k * BK), other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PREC)
        a += BK * sak
        b += BK * sbk
    tl.store(C + rm[:, None] * scm + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def k_dot_small(A, B, C, N: tl.constexpr, OUT: tl.constexpr):
    o = tl.arange(0, N)
    i = o[:, None] * N + o[None, :]
    tl.store(C + i, tl.dot(tl.load(A + i), tl.load(B + i), out_dtype=OUT))


@triton.jit
def k_attn_fwd(
    Q, K, V, O, L, Lens, scale, sb, sh, st, H, T, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr
):
    pm = tl.program_id(0)
    bh = tl.program_id(1)
    n = tl.load(Lens + bh // H)
    base = bh // H * sb + bh % H * sh
    rm = pm * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    q = tl.load(Q + base + rm[:, None] * st + rd[None, :], mask=rm[:, None] < n, other=0.0)
    m = tl.full((BM,), -float("inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    hi = n
    if CAUSAL:
        hi = tl.minimum(n, (pm + 1) * BM)
    for j in range(0, hi, BN):
        rn = j + tl.arange(0, BN)
        k = tl.load(K + base + rn[None, :] * st + rd[:, None], mask=rn[None, :] < n, other=0.0)
        s = tl.dot(q, k) * (scale * 1.44269504)
        keep = rn[None, :] < n
        if CAUSAL:
            keep = keep & (rn[None, :] <= rm[:, None])
        s = tl.where(keep, s, -1e30)
        mn = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - mn[:, None])
        al = tl.exp2(m - mn)
        l = l * al + tl.sum(p, 1)
        v = tl.load(V + base + rn[:, None] * st + rd[None, :], mask=rn[:, None] < n, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * al[:, None])
        m = mn
    tl.store(L + bh * T + rm, m + tl.log2(l), mask=rm < n)
    tl.store(O + base + rm[:, None] * st + rd[None, :], (acc / l[:, None]).to(O.dtype.element_ty), mask=rm[:, None] < n)


@triton.jit
def k_attn_delta(O, DO, Delta, Lens, sb, sh, st, H, T, D: tl.constexpr, BM: tl.constexpr):
    bh = tl.program_id(1)
    n = tl.load(Lens + bh // H)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    off = bh // H * sb + bh % H * sh + rm[:, None] * st + tl.arange(0, D)[None, :]
    o = tl.load(O + off, mask=rm[:, None] < n, other=0.0).to(tl.float32)
    do = tl.load(DO + off, mask=rm[:, None] < n, other=0.0).to(tl.float32)
    tl.store(Delta + bh * T + rm, tl.sum(o * do, 1), mask=rm < n)


@triton.jit
def k_attn_bwd(
    Q,
    K,
    V,
    DO,
    DQ,
    DK,
    DV,
    L,
    Delta,
    Lens,
    scale,
    sb,
    sh,
    st,
    H,
    T,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    pn = tl.program_id(0)
    bh = tl.program_id(1)
    n = tl.load(Lens + bh // H)
    base = bh // H * sb + bh % H * sh
    rn = pn * BN + tl.arange(0, BN)
    rd = tl.arange(0, D)
    kv = base + rn[:, None] * st + rd[None, :]
    k = tl.load(K + kv, mask=rn[:, None] < n, other=0.0)
    v = tl.load(V + kv, mask=rn[:, None] < n, other=0.0)
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    lo = 0
    if CAUSAL:
        lo = (pn * BN) // BM * BM
    for i in range(lo, n, BM):
        rm = i + tl.arange(0, BM)
        mm = rm < n
        q = tl.load(Q + base + rm[:, None] * st + rd[None, :], mask=mm[:, None], other=0.0)
        do = tl.load(DO + base + rm[:, None] * st + rd[None, :], mask=mm[:, None], other=0.0)
        lse = tl.load(L + bh * T + rm, mask=mm, other=0.0)
        de = tl.load(Delta + bh * T + rm, mask=mm, other=0.0)
        st_ = tl.dot(k, tl.trans(q)) * (scale * 1.44269504)
        keep = (rn[:, None] < n) & mm[None, :]
        if CAUSAL:
            keep = keep & (rn[:, None] <= rm[None, :])
        pt = tl.where(keep, tl.exp2(st_ - lse[None, :]), 0.0)
        dv = tl.dot(pt.to(do.dtype), do, dv)
        ds = (pt * (tl.dot(v, tl.trans(do)) - de[None, :]) * scale).to(q.dtype)
        dk = tl.dot(ds, q, dk)
        tl.atomic_add(DQ + base + rm[:, None] * st + rd[None, :], tl.dot(tl.trans(ds), k), mask=mm[:, None])
    tl.store(DK + kv, dk.to(DK.dtype.element_ty), mask=rn[:, None] < n)
    tl.store(DV + kv, dv.to(DV.dtype.element_ty), mask=rn[:, None] < n)


@triton.jit
def k_philox(O, P, seed, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, o)
    m = o < N
    tl.store(O + o * 4, a, mask=m)
    tl.store(O + o * 4 + 1, b, mask=m)
    tl.store(O + o * 4 + 2, c, mask=m)
    tl.store(O + o * 4 + 3, d, mask=m)
    tl.store(P + o, tl.randn(seed, o), mask=m)


@triton.jit
def k_atomics(X, S, B, MX, MN, OR, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    x = tl.load(X + o, mask=m, other=0)
    tl.atomic_add(S + x % 7, x.to(tl.float32), mask=m)
    tl.atomic_add(B + x % 8, (x % 2).to(tl.bfloat16), mask=m)
    tl.atomic_max(MX + x % 5, x, mask=m)
    tl.atomic_min(MN + x % 5, x, mask=m)
    tl.atomic_or(OR, 1 << tl.program_id(0))


@triton.jit
def k_splitk(A, B, C, P, Count, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr):
    pk = tl.program_id(0)
    rm = tl.arange(0, BM)
    rn = tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(pk * BK, K, BK * S):
        rk = k + tl.arange(0, BK)
        acc = tl.dot(tl.load(A + rm[:, None] * K + rk[None, :]), tl.load(B + rk[:, None] * BN + rn[None, :]), acc)
    off = rm[:, None] * BN + rn[None, :]
    tl.store(P + pk * BM * BN + off, acc)
    tl.debug_barrier()
    if tl.atomic_add(Count, 1) == S - 1:
        t = tl.zeros((BM, BN), tl.float32)
        for s in range(S):
            t += tl.load(P + s * BM * BN + off)
        tl.store(C + off, t)


@triton.jit
def k_asm(X, O, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + o, mask=o < N, other=0)
    y = tl.inline_asm_elementwise(
        "{ .reg .b32 t<2>; .reg .pred q; setp.gt.f32 q, $1, 0f00000000; mul.f32 t0, $1, 0f40000000; "
        "@!q bra skip; add.f32 t0, t0, $1; skip: mov.b32 $0, t0; }",
        "=r,r",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    tl.store(O + o, y, mask=o < N)


@triton.jit
def k_copy(X, O, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(O + o, tl.load(X + o, mask=o < N), mask=o < N)


@triton.jit
def k_oob_read(X, O, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + o)  # no mask
    tl.store(O + o, x, mask=o < N)


@triton.jit
def k_oob_write(X, O, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(O + o, tl.load(X + o, mask=o < N, other=0))


@triton.jit
def k_race(X, O, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    tl.store(O + p * (BLOCK - 8) + o, tl.load(X + p * BLOCK + o))  # neighbours overlap by 8 elements


@triton.jit
def k_read_other(X, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + BLOCK + o, tl.load(X + o) + 1)  # reads what the CTA before writes


@triton.jit
def k_neighbour(X, O, BLOCK: tl.constexpr, SAFE: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(X + o, tl.load(X + o) * 2)
    if SAFE:
        tl.debug_barrier()
    tl.store(O + o, tl.load(X + (o + 64) % BLOCK))  # written by another warp


@triton.autotune([triton.Config({"BLOCK": 64})], key=["N"])
@triton.heuristics({"EVEN": lambda a: a["N"] % 64 == 0})
@triton.jit
def k_scalars(X, O, Opt, N, big, flag, eps, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    if Opt is not None:
        m = m & (tl.load(Opt + o, mask=m, other=0) > 0)
    x = tl.load(X + o, mask=m, other=0.0)
    if flag:
        x = x + eps
    tl.store(O + o, x + (big >> 33).to(tl.float32) + tl.program_id(1) * 0, mask=m)


# ---- helpers -------------------------------------------------------------------------------------------------------
def close(got, want, tol):
    err = (got.double() - want.double()).abs()
    bound = tol * (1 + want.double().abs())
    assert not torch.isnan(got.double()).any() and (err <= bound).all(), f"largest error {err.max():.3g}"


def clean(report):
    assert report.ok, str(report)
    return report


def raises(kind, f, *words):
    try:
        f()
    except kind as e:
        assert all(w in str(e) for w in words), f"{words} not in: {e}"
        return e
    raise AssertionError(f"{kind.__name__} expected")


def drop(pattern, which=0, by=""):
    """An edit that removes (or replaces) one occurrence of a pattern in the PTX."""

    def edit(ptx):
        m = list(re.finditer(pattern, ptx))[which]
        return ptx[: m.start()] + by + ptx[m.end() :]

    return edit


def matmul(M, N, K, dtype, arch, blocks=(64, 64, 32), ta=False, tb=False, prec="tf32", tol=2e-5, warps=4, stages=3, **kw):
    g = torch.Generator().manual_seed(M + N + K)
    a, b = (torch.randn(s, generator=g).to(dtype) for s in ((M, K), (K, N)))
    A, B = (a.t().contiguous() if ta else a), (b.t().contiguous() if tb else b)
    c = torch.full((M, N), float("nan"))
    bm, bn, bk = blocks
    r = run(
        k_matmul,
        (-(-M // bm), -(-N // bn)),
        dict(
            A=A, B=B, C=c, M=M, N=N, K=K, sam=1 if ta else K, sak=M if ta else 1, sbk=1 if tb else N, sbn=K if tb else 1, scm=N
        ),
        dict(BM=bm, BN=bn, BK=bk, PREC=prec),
        target=arch,
        num_warps=warps,
        num_stages=stages,
        **kw,
    )
    if tol:
        close(clean(r) and c, a.double() @ b.double(), tol * K**0.5)
    return r


def softmax(dtype=torch.bfloat16, rows=3, n=1000, tol=5e-3, **kw):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    o = torch.full_like(x, float("nan"))
    r = run(k_softmax, (rows,), dict(X=x, O=o, stride=n, N=n), dict(BLOCK=1024), **kw)
    if tol:
        close(clean(r) and o, torch.softmax(x.double(), 1), tol)
    return r


# ---- kernels against references ------------------------------------------------------------------------------------
def test_elementwise():
    for dtype, tol in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        for n in (3000, 4096):
            x, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
            o = torch.full_like(x, float("nan"))
            clean(run(k_elementwise, (4,), dict(X=x, Y=y, O=o, N=n), dict(BLOCK=1024)))
            X, Y = x.double(), y.double()
            close(o, X * torch.sigmoid(X) + torch.maximum(X, Y) - Y.abs().sqrt() / (1 + X * X), tol)


def test_math_slow_paths():
    n = 500
    x = torch.randn(n) * 3
    x[:5] = torch.tensor([1e6, -3e5, 1e-30, 7e8, 2e20])  # sin takes its per-thread slow path: divergent branches
    o = torch.zeros(9, n)
    r = clean(run(k_math, (2,), dict(X=x, O=o, N=n), dict(BLOCK=256)))
    assert r.divergent_branches > 0
    X = x.double()
    a = X.abs() + 0.1
    for got, want in zip(
        o,
        (
            X.exp(),
            a.log(),
            a.rsqrt(),
            X.sin(),
            torch.erf(X),
            X / (X * X + 1),
            a.sqrt(),
            (x * 3).floor() + (x * 5).ceil(),
            X.exp2() + a.log2(),
        ),
        strict=False,
    ):
        small = (want.abs() < 3e38) & (want.abs() > 1e-37)
        close(got[small], want[small], 3e-6)


def test_integers():
    n = 500
    x = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32)
    y = torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    y[y == 0] = 3
    o = torch.zeros(9, n, dtype=torch.int32)
    clean(run(k_ints, (2,), dict(X=x, Y=y, O=o, N=n), dict(BLOCK=256)))
    X, Y = x.long(), y.long()
    q = torch.div(X, Y, rounding_mode="trunc")
    u = X & 0xFFFFFFFF
    hi = torch.tensor([((int(a) & 0xFFFFFFFF) * (int(b) & 0xFFFFFFFF)) >> 32 for a, b in zip(X, Y, strict=False)])
    refs = (
        q,
        X - q * Y,
        (X << 3) ^ (Y >> 2) | (X & ~Y),
        hi,
        (X * Y) >> 16,
        torch.minimum(X, Y) + X.abs() * torch.maximum(X, Y),
        x.to(torch.int8).long() + x.to(torch.uint8).long() + x.to(torch.int16).long(),
        (x.float() * 0.37).long(),
        u // 10 + q,
    )
    for got, want in zip(o, refs, strict=False):
        assert torch.equal(got.long() & 0xFFFFFFFF, want.long() & 0xFFFFFFFF)


def test_casts():
    n = 500
    x = torch.randn(n) * 50
    h, b = x.half(), x.bfloat16()
    for arch in ARCHS:
        oh, ob, o8 = torch.zeros(n).half(), torch.zeros(n).bfloat16(), torch.zeros(n).to(torch.float8_e5m2)
        oi = torch.zeros(n, dtype=torch.int32)
        clean(run(k_casts, (2,), dict(X=x, OH=oh, OB=ob, O8=o8, OI=oi, N=n), dict(BLOCK=256), target=arch))
        assert torch.equal(oh, h * h) and torch.equal(ob, b * b) and torch.equal(oi, x.int() + h.int())
        assert torch.equal(o8.float(), h.to(torch.float8_e5m2).float())


def test_softmax():
    for dtype, tol in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        for n in (1000, 1024, 17):
            for warps in (1, 4, 8):
                softmax(dtype, 3, n, tol, num_warps=warps)


def test_reductions_scan_histogram():
    x = torch.randn(32, 64)
    o, p, s = torch.zeros(32), torch.zeros(64), torch.zeros(32, 64)
    a, h = torch.zeros(32, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    clean(run(k_reduce, (1,), dict(X=x, O=o, P=p, S=s, A=a, H=h), dict(R=32, C=64)))
    close(o, x.double().sum(1), 1e-5)
    close(s, x.double().cumsum(1), 1e-5)
    assert torch.equal(p, x.max(0)[0]) and torch.equal(a.long(), x.argmax(1))
    assert torch.equal(h.long(), torch.bincount(((x * 4).int() & 15).flatten(), minlength=16))


def test_layer_norm():
    M, N, G = 6, 700, 2
    x, dy = torch.randn(M, N).half(), torch.randn(M, N).half()
    w, b, mean, rstd = torch.randn(N), torch.randn(N), torch.empty(M), torch.empty(M)
    y = torch.empty_like(x)
    clean(run(k_ln_fwd, (M,), dict(X=x, Y=y, W=w, B=b, Mean=mean, Rstd=rstd, stride=N, N=N, eps=1e-5), dict(BLOCK=512)))
    X, W, B = (t.double().requires_grad_() for t in (x, w, b))
    ref = torch.nn.functional.layer_norm(X, (N,), W, B, 1e-5)
    ref.backward(dy.double())
    close(y, ref.detach(), 2e-3)
    for order in ORDERS:  # the lock orders the CTAs: no race may be reported
        dx, dw, db, lock = torch.empty_like(x), torch.zeros(G, N), torch.zeros(G, N), torch.zeros(2 * G, dtype=torch.int32)
        clean(
            run(
                k_ln_bwd,
                (M,),
                dict(DX=dx, DY=dy, DW=dw, DB=db, X=x, W=w, Mean=mean, Rstd=rstd, Lock=lock, stride=N, N=N),
                dict(GROUP=G, BLOCK=1024),
                order=order,
            )
        )
        close(dx, X.grad, 3e-3)
        close(dw.sum(0), W.grad, 1e-5)
        close(db.sum(0), B.grad, 1e-5)


def test_matmul():
    for arch in ARCHS:
        for dtype, prec, tol in (
            (torch.bfloat16, "tf32", 2e-6),
            (torch.float16, "tf32", 2e-6),
            (torch.float32, "tf32", 4e-3),
            (torch.float32, "ieee", 2e-6),
            (torch.float32, "tf32x3", 2e-6),
        ):
            bk = 16 if prec in ("ieee", "tf32x3") else 32
            matmul(128, 128, 96, dtype, arch, (64, 64, bk), prec=prec, tol=tol)
            matmul(130, 100, 72, dtype, arch, (64, 64, bk), prec=prec, tol=tol)  # ragged
    assert matmul(128, 128, 64, torch.bfloat16, "sm_80").mma == {"mma.m16n8k16.bf16": 128 * 128 * 64 // (16 * 8 * 16)}


def test_matmul_layouts():
    """Transposed operands, block sizes and warps: ldmatrix(.trans) on sm_80, descriptors and swizzles on sm_90."""
    for arch in ARCHS:
        for ta in (False, True):
            for tb in (False, True):
                matmul(128, 64, 64, torch.bfloat16, arch, (64, 64, 64), ta, tb)
                matmul(64, 64, 96, torch.float16, arch, (64, 32, 16), ta, tb, stages=4)
                matmul(128, 256, 64, torch.bfloat16, arch, (128, 128, 32), ta, tb, warps=8, stages=2)
        matmul(128, 128, 64, torch.float32, arch, (128, 64, 32), tb=True, tol=4e-3)
    assert any(k.startswith("wgmma") for k in matmul(128, 128, 64, torch.bfloat16, "sm_90", (128, 128, 64)).mma)


def test_dot_types():
    for arch in ARCHS:
        for dtype, out, tol in (
            (torch.float64, tl.float64, 1e-12),
            (torch.float16, tl.float16, 1e-2),
            (torch.int8, tl.int32, 0),
        ):
            a, b = ((torch.randn(32, 32) * (20 if dtype == torch.int8 else 1)).to(dtype) for _ in range(2))
            c = torch.zeros(32, 32).to({tl.float64: torch.float64, tl.float16: torch.float16, tl.int32: torch.int32}[out])
            clean(run(k_dot_small, (1,), dict(A=a, B=b, C=c), dict(N=32, OUT=out), target=arch))
            close(c, a.double() @ b.double(), tol)


def test_flash_attention():
    B, H, T, D = 2, 2, 150, 64
    lens = torch.tensor([150, 77], dtype=torch.int32)
    g = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(B, H, T, D, generator=g).bfloat16() for _ in range(4))
    idx = torch.arange(T)
    valid = (idx < lens[:, None])[:, None, :, None]
    common = dict(Lens=lens, sb=H * T * D, sh=T * D, st=D, H=H, T=T)
    scale = D**-0.5
    for arch in ARCHS:
        for causal in (False, True):
            o, L = torch.zeros_like(q), torch.zeros(B * H, T)
            clean(
                run(
                    k_attn_fwd,
                    (3, B * H),
                    dict(Q=q, K=k, V=v, O=o, L=L, scale=scale, **common),
                    dict(D=D, BM=64, BN=64, CAUSAL=causal),
                    target=arch,
                )
            )
            Q, K, V = (t.double().requires_grad_() for t in (q, k, v))
            keep = (idx[None, :] < lens[:, None])[:, None, None, :].expand(B, H, T, T)
            if causal:
                keep = keep & (idx[None, :] <= idx[:, None])
            ref = (Q @ K.transpose(-1, -2) * scale).masked_fill(~keep, -1e30).softmax(-1) @ V
            close(o * valid, ref.detach() * valid, 6e-3)
            (ref * do.double() * valid).sum().backward()
            delta = torch.zeros(B * H, T)
            clean(run(k_attn_delta, (3, B * H), dict(O=o, DO=do, Delta=delta, **common), dict(D=D, BM=64), target=arch))
            for order in ORDERS if causal else ORDERS[:1]:
                dq, dk, dv = torch.zeros(B, H, T, D), torch.zeros_like(q), torch.zeros_like(q)
                clean(
                    run(
                        k_attn_bwd,
                        (3, B * H),
                        dict(Q=q, K=k, V=v, DO=do, DQ=dq, DK=dk, DV=dv, L=L, Delta=delta, scale=scale, **common),
                        dict(D=D, BM=32, BN=64, CAUSAL=causal),
                        target=arch,
                        order=order,
                    )
                )
                for got, t in ((dq, Q), (dk, K), (dv, V)):
                    close(got * valid, t.grad * valid, 1.2e-2)


def test_philox():
    def philox(seed, c0, rounds=10):  # Philox4x32 from its definition
        m = 0xFFFFFFFF
        c, k = [c0, 0, 0, 0], [seed & m, seed >> 32]
        for _ in range(rounds):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & m, (a >> 32) ^ c[3] ^ k[1], a & m]
            k = [(k[0] + 0x9E3779B9) & m, (k[1] + 0xBB67AE85) & m]
        return c

    n, seed = 500, 12345678901
    o, p = torch.zeros(n, 4, dtype=torch.int32), torch.zeros(n)
    clean(run(k_philox, (2,), dict(O=o, P=p, seed=seed, N=n), dict(BLOCK=256)))
    want = torch.tensor([philox(seed, i) for i in range(n)])
    assert torch.equal(o.long() & 0xFFFFFFFF, want)
    assert abs(p.mean()) < 0.15 and abs(p.std() - 1) < 0.1


def test_atomics():
    n = 500
    x = torch.randint(0, 100, (n,), dtype=torch.int32)
    for arch in ARCHS:  # sm_80 has no bf16 atomics: a compare-and-swap loop
        s, b = torch.zeros(7), torch.zeros(8).bfloat16()
        mx, mn, bits = torch.full((5,), -1).int(), torch.full((5,), 999).int(), torch.zeros(1, dtype=torch.int32)
        clean(run(k_atomics, (2,), dict(X=x, S=s, B=b, MX=mx, MN=mn, OR=bits, N=n), dict(BLOCK=256), target=arch))
        assert torch.equal(s, torch.zeros(7).index_add_(0, (x % 7).long(), x.float()))
        assert torch.equal(b.float(), torch.zeros(8).index_add_(0, (x % 8).long(), (x % 2).float()))
        assert all(mx[i] == x[x % 5 == i].max() and mn[i] == x[x % 5 == i].min() for i in range(5)) and bits.item() == 3


def test_split_k_counter():
    a, b = torch.randn(32, 256).half(), torch.randn(256, 32).half()
    for sync in ((), ("Count",)):  # a counter orders CTAs only if declared
        c, p, n = torch.zeros(32, 32), torch.zeros(4, 32, 32), torch.zeros(1, dtype=torch.int32)
        r = run(k_splitk, (4,), dict(A=a, B=b, C=c, P=p, Count=n, K=256), dict(BM=32, BN=32, BK=32, S=4), sync=sync)
        close(c, a.double() @ b.double(), 1e-5)
        assert bool(r.races) != bool(sync)


def test_inline_asm_scopes_and_divergence():
    x, o = torch.randn(300), torch.zeros(300)
    r = clean(run(k_asm, (2,), dict(X=x, O=o, N=300), dict(BLOCK=256)))
    close(o, torch.where(x > 0, 3 * x, 2 * x), 1e-6)
    assert r.divergent_branches >= 2


def test_parameters():
    """Integers equal to 1 leave the parameter list; the rest keep their order, two hidden pointers follow."""
    x = torch.zeros(64)
    c = compile_kernel(
        k_matmul, dict(A=x, B=x, C=x, M=8, N=8, K=8, sam=8, sak=1, sbk=8, sbn=1, scm=8), dict(BM=16, BN=16, BK=16, PREC="tf32")
    )
    assert c.arg_names == ["A", "B", "C", "M", "N", "K", "sam", "sbk", "scm"]
    assert len(re.findall(r"\.param [^\n]*k_matmul_param_\d+", c.ptx)) == len(c.arg_names) + 2


def test_scalar_arguments_and_decorators():
    x = torch.randn(100)
    for flag in (True, False):
        for opt in (None, torch.tensor([1, 0] * 50).int()):
            o = torch.zeros(100)
            clean(
                run(
                    k_scalars,
                    lambda meta: (1, 1, -(-100 // meta["BLOCK"])),
                    dict(X=x, O=o, Opt=opt, N=100, big=7 << 33, flag=flag, eps=0.5),
                    dict(BLOCK=64, EVEN=False),
                )
            )
            want = x + 0.5 * flag + 7
            close(o, want if opt is None else want * opt, 1e-6)


# ---- statistics ----------------------------------------------------------------------------------------------------
def test_traffic():
    x = torch.randn(4096).half()
    o = torch.zeros_like(x)
    r = clean(run(k_copy, (2,), dict(X=x, O=o, N=4096), dict(BLOCK=2048)))
    assert torch.equal(x, o)
    assert (r.bytes_read(), r.bytes_written(), r.share16()) == (8192, 8192, 1.0) and r.traffic == {
        "ld": {16: 8192},
        "st": {16: 8192},
    }
    assert r.per_tensor == {"X": {"ld": 8192}, "O": {"st": 8192}}
    assert r.footprint["X"] == (8192, 0) and r.footprint["O"] == (0, 8192)
    r = clean(run(k_copy, (2,), dict(X=x, O=o, N=4095), dict(BLOCK=2048)))
    assert r.bytes_read() == 8190 and r.share16() == 0
    r = matmul(128, 128, 64, torch.bfloat16, "sm_80", count_banks=True)
    assert r.traffic["cp.async"] == {16: 2 * 2 * 128 * 64 * 2} and r.footprint["A"][0] == 128 * 64 * 2


def test_bank_conflicts():
    x = torch.zeros(32).int()
    r = run_ptx(
        SNIPPET.format(
            regs=".reg .b32 %q<4>;",
            n=1,
            body="""
        shl.b32 %q0, %r0, 7; add.s32 %q0, %q0, 1024; st.shared.b32 [%q0], %r0;
        shl.b32 %q1, %r0, 2; add.s32 %q1, %q1, 8192; st.shared.b32 [%q1], %r0;""",
        ),
        [("X", x), ("O", x)],
        (1,),
        shared=16384,
        num_warps=1,
        count_banks=True,
    )
    assert r.bank_conflicts == 31  # stride 128 bytes: one bank; stride 4: none


# ---- planted bugs --------------------------------------------------------------------------------------------------
def test_out_of_bounds():
    x, o = torch.randn(1000), torch.zeros(1000)
    # Triton 3.9 gives the merged load a line two below its own
    raises(
        PtxFault,
        lambda: run(k_oob_read, (4,), dict(X=x, O=o, N=1000), dict(BLOCK=256)),
        "out of bounds read",
        "test_ptxrun.py:",
        "CTA (3, 0, 0)",
        "thread",
        "past the end of X",
    )
    raises(PtxFault, lambda: run(k_oob_write, (4,), dict(X=x, O=o, N=1000), dict(BLOCK=256)), "out of bounds write", "of O")
    r = run(k_oob_read, (4,), dict(X=x, O=o, N=1000), dict(BLOCK=256), tolerate_oob=True)
    assert torch.equal(x, o) and sum(f.count for f in r.oob) == 12  # lanes, 8 bytes each
    big = torch.zeros(2000)  # a view: only its own range may be touched
    raises(PtxFault, lambda: run(k_copy, (4,), dict(X=x, O=big[:999], N=1000), dict(BLOCK=256)), "past the end of O")
    clean(run(k_copy, (4,), dict(X=big, O=big[1000:], N=1000), dict(BLOCK=256)))
    cols = torch.zeros(8, 16)[:, :8]
    clean(run(k_copy, (1,), dict(X=cols, O=torch.zeros(128), N=100), dict(BLOCK=128)))
    raises(
        PtxFault,
        lambda: run(k_copy, (1,), dict(X=cols, O=torch.zeros(128), N=100), dict(BLOCK=128), bounds="exact"),
        "out of bounds read",
    )


def test_misaligned():
    x = torch.zeros(4096).half()
    c = compile_kernel(k_copy, dict(X=x, O=x, N=2048), dict(BLOCK=2048))
    raises(PtxFault, lambda: run_ptx(c.ptx, [("X", x[1:]), ("O", torch.zeros(2048).half()), ("N", 2048)], (1,)), "misaligned")


def test_race_between_ctas():
    x = torch.randn(4 * 128)
    outs = []
    for order in ("forward", "reversed"):
        o = torch.zeros(4 * 128)
        r = run(k_race, (4,), dict(X=x, O=o), dict(BLOCK=128), order=order)
        assert len(r.races) == 1 and "written by another CTA" in r.races[0].what and r.races[0].count == 3 * 8
        outs.append(o)
    assert not torch.equal(*outs)
    r = run(k_read_other, (3,), dict(X=torch.zeros(4 * 128)), dict(BLOCK=128))
    assert any("read of data written by another CTA" in f.what for f in r.races)
    r = run(k_read_other, (3,), dict(X=torch.zeros(4 * 128)), dict(BLOCK=128), order="reversed")
    assert any("write over data read by another CTA" in f.what for f in r.races)


def test_race_inside_cta():
    for safe in (True, False):
        r = run(k_neighbour, (2,), dict(X=torch.ones(256), O=torch.zeros(256)), dict(BLOCK=256, SAFE=safe))
        got = [f for f in r.races if "another warp of the CTA" in f.what]
        assert bool(got) != safe
    r = run(k_race, (1,), dict(X=torch.randn(128), O=torch.zeros(128)), dict(BLOCK=128))
    assert r.ok
    x = torch.arange(32).int()
    r = run_ptx(SNIPPET.format(regs="", n=0, body="st.global.b32 [%d1], %r0;"), [("X", x), ("O", x)], (1,))
    assert "different values to one address" in r.races[0].what


def test_removed_barriers():
    """Every barrier of the softmax matters, and of a pipelined matmul; on sm_80 the one at the loop's head repeats the one at its end."""
    for f, spare in (
        (lambda **kw: softmax(tol=None, rows=1, **kw), ()),
        (lambda **kw: matmul(64, 64, 160, torch.bfloat16, "sm_80", tol=None, **kw), (1,)),
        (lambda **kw: matmul(64, 64, 160, torch.bfloat16, "sm_90", tol=None, **kw), ()),
    ):
        n = len(re.findall(r"bar\.sync[^;]*;", clean(f()).ptx))
        assert n >= 3
        for i in range(n):
            assert bool(f(edit=drop(r"bar\.sync[^;]*;", i)).races) == (i not in spare), f"barrier {i}"


def test_removed_waits():
    for arch in ARCHS:
        f = functools.partial(matmul, 64, 64, 160, torch.bfloat16, arch, tol=None)
        n = len(re.findall(r"cp\.async\.wait_group[^;]*;", clean(f()).ptx))
        for i in range(n):
            # on sm_80 the waits at the loop's head and end repeat each other
            spare = arch == "sm_80" and i in (1, 2, 3)
            assert f(edit=drop(r"cp\.async\.wait_group[^;]*;", i)).ok == spare
        assert not f(edit=lambda p: p.replace("cp.async.wait_group \t2;", "cp.async.wait_group 3;")).ok
    edit = drop(r"fence\.proxy\.async[^;]*;")
    assert any("fence.proxy.async" in r.what for r in matmul(64, 64, 160, torch.bfloat16, "sm_90", tol=None, edit=edit).races)
    r = matmul(64, 64, 160, torch.bfloat16, "sm_90", tol=None, edit=lambda p: re.sub(r"wgmma\.wait_group[^;]*;", "", p))
    assert any("wgmma still in flight" in x.what for x in r.races)


def test_uninitialised_shared():
    r = softmax(tol=None, rows=1, edit=drop(r"st\.shared[^;]*;"))
    assert r.uninitialised and "nobody wrote" in r.uninitialised[0].what


def test_bad_ptx():
    raises(PtxError, lambda: softmax(edit=drop(r"bar\.sync", 0, "frobnicate.sync")), "unknown opcode", "frobnicate")
    x = torch.zeros(32).int()
    raises(
        PtxFault,
        lambda: run_ptx(
            SNIPPET.format(
                regs="",
                n=1,
                body="""
        setp.lt.u32 %p0, %r0, 7; @%p0 bra A; bra B; A: bar.sync 0; B: mov.b32 %r1, 0;""",
            ),
            [("X", x), ("O", x)],
            (1,),
        ),
        "barrier",
    )
    raises(
        PtxFault,
        lambda: run_ptx(SNIPPET.format(regs="", n=1, body="L: bra L;"), [("X", x), ("O", x)], (1,), max_instructions=1000),
        "endless",
    )
    raises(
        PtxFault,
        lambda: run_ptx(SNIPPET.format(regs="", n=1, body="st.shared.b32 [1024], %r0;"), [("X", x), ("O", x)], (1,)),
        "shared write",
    )


# ---- single instructions -------------------------------------------------------------------------------------------
SNIPPET = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry snip(.param .u64 .ptr .global X, .param .u64 .ptr .global O)
.reqntid 32
{{
  .reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %d<16>; {regs}
  ld.param.b64 %d0, [X]; ld.param.b64 %d1, [O];
  mov.u32 %r0, %tid.x;
  mad.wide.u32 %d0, %r0, 12, %d0; mad.wide.u32 %d1, %r0, {n}, %d1;
  {body}
  ret;
}}
"""


def snippet(body, x):
    """Run `body` on 32 threads: %r1..%r3 are a thread's inputs, %r4 its result. x: (32, 3) uint32."""
    t = torch.from_numpy(np.ascontiguousarray(x, np.uint32).view(np.int32).copy())
    o = torch.zeros(32, dtype=torch.int32)
    ptx = SNIPPET.format(
        regs="",
        n=4,
        body=f"ld.global.b32 %r1, [%d0]; ld.global.b32 %r2, [%d0+4]; ld.global.b32 %r3, [%d0+8];\n"
        f"{body}\nst.global.b32 [%d1], %r4;",
    )
    clean(run_ptx(ptx, [("X", t), ("O", o)], (1,)))
    return o.numpy().view(np.uint32)


def test_bit_instructions():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, (32, 3), dtype=np.uint64)
    x[:8, 1] = np.array([0, 1, 5, 31, 32, 33, 40, 255])
    x[8:20, 1], x[8:20, 2] = rng.integers(0, 40, 12), rng.integers(0, 40, 12)
    M = 0xFFFFFFFF

    def sgn(v, n=32):
        v &= (1 << n) - 1
        return v - (1 << n) if v >> (n - 1) else v

    def bfe(a, b, c, signed):
        pos, ln = b & 255, c & 255
        bit = (a >> min(pos + ln - 1, 31)) & 1 if signed and ln else 0
        return sum((((a >> (pos + i)) & 1 if i < ln and pos + i < 32 else bit) << i) for i in range(32))

    def bfi(a, b, c, d):
        pos, ln = c & 255, d & 255
        for i in range(ln):
            if pos + i < 32:
                b = b & ~(1 << (pos + i)) | ((a >> i) & 1) << (pos + i)
        return b

    def prmt(a, b, s):
        by = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
        out = 0
        for i in range(4):
            n = s >> 4 * i & 15
            v = by[n & 7]
            out |= ((255 if v & 128 else 0) if n & 8 else v) << 8 * i
        return out

    def lop3(a, b, c, lut):
        return sum((lut >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))

    cases = {
        "bfe.u32 %r4, %r1, %r2, %r3;": lambda a, b, c: bfe(a, b, c, False),
        "bfe.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: bfe(a, b, c, True),
        "bfi.b32 %r4, %r1, %r3, %r2, 7;": lambda a, b, c: bfi(a, c, b, 7),
        "prmt.b32 %r4, %r1, %r2, %r3;": prmt,
        "prmt.b32 %r4, %r1, %r2, 0x3340U;": lambda a, b, c: prmt(a, b, 0x3340),
        "lop3.b32 %r4, %r1, %r2, %r3, 0xE8;": lambda a, b, c: lop3(a, b, c, 0xE8),
        "shf.l.wrap.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
        "shf.r.clamp.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
        "shl.b32 %r4, %r1, %r2;": lambda a, b, c: a << b if b < 32 else 0,
        "shr.u32 %r4, %r1, %r2;": lambda a, b, c: a >> b if b < 32 else 0,
        "shr.s32 %r4, %r1, %r2;": lambda a, b, c: sgn(a) >> min(b, 31),
        "mul.hi.u32 %r4, %r1, %r2;": lambda a, b, c: a * b >> 32,
        "mul.hi.s32 %r4, %r1, %r2;": lambda a, b, c: sgn(a) * sgn(b) >> 32,
        "mad.lo.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: a * b + c,
        "mad.lo.cc.u32 %r5, %r1, %r2, %r3; madc.hi.u32 %r4, %r1, %r2, 0;": lambda a, b, c: (a * b + c) >> 32,
        "add.cc.u32 %r5, %r1, %r2; addc.u32 %r4, %r3, 0;": lambda a, b, c: c + (a + b >> 32),
        "mul.wide.s32 %d2, %r1, %r2; mov.b64 {%r5, %r4}, %d2;": lambda a, b, c: sgn(a) * sgn(b) >> 32,
        "mov.b64 %d2, {%r1, %r2}; mov.b64 %d3, {%r3, %r1}; mul.hi.u64 %d2, %d2, %d3; cvt.u32.u64 %r4, %d2;": lambda a, b, c: (
            (b << 32 | a) * (a << 32 | c) >> 64
        ),
        "mov.b64 %d2, {%r1, %r2}; mov.b64 %d3, {%r3, %r1}; mul.hi.s64 %d2, %d2, %d3; cvt.u32.u64 %r4, %d2;": lambda a, b, c: (
            sgn(b << 32 | a, 64) * sgn(a << 32 | c, 64) >> 64
        ),
        "popc.b32 %r4, %r1;": lambda a, b, c: bin(a).count("1"),
        "clz.b32 %r4, %r2;": lambda a, b, c: 32 - b.bit_length(),
        "brev.b32 %r4, %r1;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
        "abs.s32 %r4, %r1;": lambda a, b, c: abs(sgn(a)),
        "min.s32 %r4, %r1, %r2;": lambda a, b, c: min(sgn(a), sgn(b)),
        "max.relu.s32 %r4, %r1, %r2;": lambda a, b, c: max(sgn(a), sgn(b), 0),
        "max.u32 %r4, %r1, %r2;": max,
        "cvt.s32.s8 %r4, %r1;": lambda a, b, c: sgn(a, 8),
        "mov.b32 {%h0, %h1}, %r1; mov.b32 %r4, {%h1, %h0};": lambda a, b, c: (a << 16 | a >> 16) & M,
        "setp.lt.s32 %p0, %r1, %r2; setp.lo.and.u32 %p1|%p2, %r1, %r3, %p0; selp.b32 %r4, 1, 0, %p1; @%p2 add.s32 %r4, %r4, 2;": lambda a, b, c: (
            (sgn(a) < sgn(b)) * (1 if a < c else 2)
        ),
        "setp.ge.u32 %p0, %r0, 16; @%p0 bra Z; mov.b32 %r4, %r1; bra Y; Z: mov.b32 %r4, %r2; Y: add.s32 %r4, %r4, 1;": None,
    }
    for body, f in cases.items():
        got = snippet(body, x)
        for i in range(32):
            a, b, c = (int(v) for v in x[i])
            if f is None:
                want = (b if i >= 16 else a) + 1
            else:
                want = f(a, b, c) if f is not max else max(a, b)
            assert int(got[i]) == want & M, f"{body} lane {i}: {got[i]:#x} != {want & M:#x}"


def test_control_flow():
    x = np.arange(96, dtype=np.uint32).reshape(32, 3)
    lane = np.arange(32)
    loop = "mov.b32 %r4, 0; mov.b32 %r5, 0; L: setp.ge.u32 %p0, %r5, %r0; @%p0 bra E; add.s32 %r5, %r5, 1; "
    assert (snippet(loop + "add.s32 %r4, %r4, %r5; bra L; E: add.s32 %r4, %r4, 1;", x) == lane * (lane + 1) // 2 + 1).all()
    assert (
        snippet(loop + "and.b32 %r6, %r5, 1; setp.eq.u32 %p1, %r6, 0; @%p1 bra L; add.s32 %r4, %r4, %r5; bra L; E:", x)
        == [sum(range(1, n + 1, 2)) for n in lane]
    ).all()
    r = snippet("mov.b32 %r4, 9; setp.lt.u32 %p0, %r0, 5; @%p0 ret; bar.sync 0; add.s32 %r4, %r0, 1;", x)
    assert (r == np.where(lane < 5, 0, lane + 1)).all()


def test_cp_async_partial():
    x, o = torch.arange(32 * 4).int() + 0x01020304, torch.zeros(32 * 4).int()
    body = """mov.u32 %r0, %tid.x; ld.param.b64 %d0, [X]; mad.wide.u32 %d0, %r0, 16, %d0; shl.b32 %r1, %r0, 4; add.s32 %r1, %r1, 1024;
        and.b32 %r2, %r0, 15; cp.async.cg.shared.global [%r1], [%d0], 0x10, %r2; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1]; st.global.v4.b32 [%d1], {%r3, %r4, %r5, %r6};"""
    clean(run_ptx(SNIPPET.format(regs="", n=16, body=body), [("X", x), ("O", o)], (1,), shared=512))
    want = x.numpy().view(np.uint8).reshape(32, 16).copy()
    for i in range(32):
        want[i, i % 16 :] = 0
    assert (o.numpy().view(np.uint8).reshape(32, 16) == want).all()


def test_float_instructions():
    rng = np.random.default_rng(1)
    f = (rng.standard_normal((32, 3)) * 10.0 ** rng.integers(-6, 6, (32, 3))).astype(np.float32)
    f[0], f[1, :2], f[2, :2] = (np.nan, 1, 2), (np.inf, -np.inf), (-0.0, 0.0)
    f[3], f[4, 0], f[5] = (1 + 2**-23, 1 + 2**-23, 2**-60), 1e-41, (1 + 2**-12, 1 + 2**-12, -(2**-40))
    x = f.view(np.uint32)
    F = np.float32

    def check(body, want):
        got, want = snippet(body, x), np.asarray(want, F)
        nan = np.isnan(want)
        assert (np.isnan(got.view(F)) == nan).all() and (got[~nan] == want.view(np.uint32)[~nan]).all(), body

    from fractions import Fraction

    def exact_fma(a, b, c):  # one rounding, by rational arithmetic
        if not np.isfinite([a, b, c]).all():
            return F(a) * F(b) + F(c)
        v = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        r = F(float(v))
        best = min(
            (r, np.nextafter(r, F(np.inf)), np.nextafter(r, F(-np.inf))),
            key=lambda t: (abs(Fraction(float(t)) - v), int(F(t).view(np.uint32)) & 1),
        )
        return best

    a, b, c = f.T
    with np.errstate(all="ignore"):
        check("add.f32 %r4, %r1, %r2;", a + b)
        check("mul.rn.f32 %r4, %r1, %r2;", a * b)
        check("fma.rn.f32 %r4, %r1, %r2, %r3;", [exact_fma(*v) for v in f])
        check("min.f32 %r4, %r1, %r2;", np.fmin(a, b))
        check("max.NaN.f32 %r4, %r1, %r2;", np.maximum(a, b))
        check("neg.f32 %r4, %r1;", -a)
        check("add.ftz.f32 %r4, %r1, 0f00000000;", np.where(np.abs(a) < 1.18e-38, F(0), a + F(0)))
        check(
            "cvt.rn.bf16x2.f32 %r5, %r2, %r1; mov.b32 {%h0, %h1}, %r5; cvt.f32.bf16 %r4, %h0;",
            torch.from_numpy(a.copy()).bfloat16().float().numpy(),
        )
        check("cvt.rn.f16x2.f32 %r5, %r2, %r1; mov.b32 {%h0, %h1}, %r5; cvt.f32.f16 %r4, %h1;", b.astype(np.float16).astype(F))
        check("cvt.rni.f32.f32 %r4, %r1;", np.rint(a))
        limited = np.nan_to_num(np.clip(a.astype(float), -(2**31), 2**31 - 1), nan=0)
        check("cvt.rzi.s32.f32 %r5, %r1; cvt.rn.f32.s32 %r4, %r5;", np.trunc(limited) + 0.0)
        bits = a.view(np.uint32)
        check(
            "cvt.rna.tf32.f32 %r4, %r1;", np.where(np.isfinite(a), (bits + 0x1000) & 0xFFFFE000, bits).astype(np.uint32).view(F)
        )
        for op, want in (
            ("eq", a == b),
            ("ne", (a < b) | (a > b)),
            ("leu", ~(a > b)),
            ("neu", a != b),
            ("num", ~np.isnan(a + b * 0)),
            ("nan", np.isnan(a) | np.isnan(b)),
        ):
            want = ~(np.isnan(a) | np.isnan(b)) if op == "num" else want
            check(f"setp.{op}.f32 %p0, %r1, %r2; selp.f32 %r4, 0f3F800000, 0f00000000, %p0;", want)


def test_warp_instructions():
    x = np.arange(96, dtype=np.uint32).reshape(32, 3) * 7
    a, lane = x[:, 0], np.arange(32)
    for body, want in (
        ("shfl.sync.bfly.b32 %r4, %r1, 5, 31, -1;", a[lane ^ 5]),
        ("shfl.sync.up.b32 %r4, %r1, 3, 0, -1;", a[np.where(lane >= 3, lane - 3, lane)]),
        ("shfl.sync.down.b32 %r4, %r1, 3, 31, -1;", a[np.where(lane < 29, lane + 3, lane)]),
        ("shfl.sync.idx.b32 %r4, %r1, 2, 0x181F, -1;", a[lane & 24 | 2]),
        ("shfl.sync.idx.b32 %r4|%p0, %r1, 9, 31, -1;", a[np.full(32, 9)]),
        ("setp.lt.u32 %p0, %r0, 5; vote.sync.ballot.b32 %r4, %p0, -1;", np.full(32, 31)),
        ("redux.sync.add.s32 %r4, %r1, -1;", np.full(32, a.sum())),
    ):
        assert (snippet(body, x) == want.astype(np.uint32)).all(), body


def test_speed():
    """Informative: CTA-instructions per second of an attention forward pass with all checks."""
    B, H, T, D = 1, 2, 256, 64
    q = torch.randn(B, H, T, D).bfloat16()
    args = dict(
        Q=q,
        K=q,
        V=q,
        O=torch.zeros_like(q),
        L=torch.zeros(B * H, T),
        Lens=torch.tensor([T], dtype=torch.int32),
        scale=0.1,
        sb=H * T * D,
        sh=T * D,
        st=D,
        H=H,
        T=T,
    )
    run(k_attn_fwd, (4, 2), args, dict(D=D, BM=64, BN=64, CAUSAL=False))
    r = clean(run(k_attn_fwd, (4, 2), args, dict(D=D, BM=64, BN=64, CAUSAL=False)))
    print(f"    {r.instructions / r.seconds:.0f} CTA-instructions/s ({r.instructions} in {r.seconds:.2f} s)")
