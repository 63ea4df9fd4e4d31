"""Tests of ptxrun on CUDA C++: kernels against float64 references, planted bugs, single features. Needs nvcc."""

import os
import shutil

import numpy as np
import pytest
import torch
from ptxrun import PtxError, PtxFault, Struct, compile_cuda, run_cuda, run_ptx

pytestmark = pytest.mark.skipif(not (shutil.which("nvcc") or os.environ.get("NVCC")), reason="needs nvcc")
ARCHS = ("sm_80", "sm_90")
bf16 = torch.bfloat16


def fails(kind, *a, match="", **kw):
    """The run finds `kind` (and says `match`), as a finding or as a fault."""
    try:
        rep = run_cuda(*a, **kw)
    except PtxFault as e:
        rep = e.report
    hits = rep.of(kind)
    assert hits and any(match in str(f) for f in hits), f"expected {kind} {match!r}: {rep}"
    return rep


# ---- row norm: warp shuffles and a shared reduction ----------------------------------------------------------------
NORM = r"""
#include <cuda_bf16.h>
template <typename T> struct Vec8 { uint4 raw; };
__device__ __forceinline__ float warp_sum(float s) {
    for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    return s;
}
extern "C" __global__ void __launch_bounds__(256) row_norm(const __nv_bfloat16* __restrict__ x, const __nv_bfloat16* __restrict__ w,
                                                           __nv_bfloat16* __restrict__ y, int n, float eps) {
    __shared__ float part[32];
    const uint4* row = reinterpret_cast<const uint4*>(x + (size_t)blockIdx.x * n);
    const uint4* wr = reinterpret_cast<const uint4*>(w);
    uint4* out = reinterpret_cast<uint4*>(y + (size_t)blockIdx.x * n);
    float s = 0;
    for (int i = threadIdx.x; i < n / 8; i += blockDim.x) {
        uint4 v = row[i];
        const __nv_bfloat162* p = reinterpret_cast<const __nv_bfloat162*>(&v);
        #pragma unroll
        for (int j = 0; j < 4; j++) { float2 f = __bfloat1622float2(p[j]); s += f.x * f.x + f.y * f.y; }
    }
    s = warp_sum(s);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) part[warp] = s;
    __syncthreads();                                             // FIRST
    if (warp == 0) {
        s = lane < (blockDim.x + 31) / 32 ? part[lane] : 0;
        s = warp_sum(s);
        if (lane == 0) part[0] = rsqrtf(s / n + eps);
    }
    __syncthreads();                                             // SECOND
    float r = part[0];
    for (int i = threadIdx.x; i < n / 8; i += blockDim.x) {
        uint4 v = row[i], g = wr[i], q;
        const __nv_bfloat162 *p = reinterpret_cast<const __nv_bfloat162*>(&v), *k = reinterpret_cast<const __nv_bfloat162*>(&g);
        __nv_bfloat162* o = reinterpret_cast<__nv_bfloat162*>(&q);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 f = __bfloat1622float2(p[j]), h = __bfloat1622float2(k[j]);
            o[j] = __floats2bfloat162_rn(f.x * r * h.x, f.y * r * h.y);
        }
        out[i] = q;
    }
}
"""


def norm_args(rows, n, seed=0):
    torch.manual_seed(seed)
    x, w = torch.randn(rows, n).to(bf16), torch.randn(n).to(bf16)
    y = torch.zeros_like(x)
    ref = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * w.double()
    return dict(x=x, w=w, y=y, n=n, eps=1e-5), ref


@pytest.mark.parametrize("arch", ARCHS)
def test_row_norm(arch):
    for threads in (256, 96):
        a, ref = norm_args(3, 1024)
        rep = run_cuda(NORM, "row_norm", 3, threads, a, arch=arch)
        assert rep.ok, rep
        assert rep.share16("ld", "st") == 1.0 and rep.bytes_written() == 3 * 2048
        assert (a["y"].double() - ref).abs().max() < 0.03


def test_missing_syncthreads():
    for which in ("FIRST", "SECOND"):
        src = "\n".join(x for x in NORM.split("\n") if "// " + which not in x)
        a, _ = norm_args(1, 1024)
        rep = fails("race", src, "row_norm", 1, 256, a, match="other warp")
        assert all(f.loc.startswith("kernel.cu:") for f in rep.races), rep


def test_out_of_bounds():
    a, _ = norm_args(2, 1024)
    fails("oob", NORM, "row_norm", 3, 256, a, match="past the end of x")
    a, _ = norm_args(2, 1024)
    a["x"] = a["x"][:, 4:]  # 8-byte aligned only
    fails("oob", NORM, "row_norm", 1, 256, a, match="misaligned")
    a, _ = norm_args(2, 1024)
    rep = run_cuda(NORM, "row_norm", 3, 256, a, tolerate_oob=True)
    assert rep.oob
    with pytest.raises(ValueError, match="launch_bounds"):
        run_cuda(NORM, "row_norm", 1, 512, a)


# ---- tiled matmul in shared memory ---------------------------------------------------------------------------------
MATMUL = r"""
#include <cuda_bf16.h>
template <int TILE>
__global__ void matmul(const float* A, const float* B, float* C, int M, int N, int K) {
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE];
    int r = blockIdx.y * TILE + threadIdx.y, c = blockIdx.x * TILE + threadIdx.x;
    float s = 0;
    for (int k0 = 0; k0 < K; k0 += TILE) {
        a[threadIdx.y][threadIdx.x] = r < M && k0 + threadIdx.x < K ? A[r * K + k0 + threadIdx.x] : 0;
        b[threadIdx.y][threadIdx.x] = c < N && k0 + threadIdx.y < K ? B[(k0 + threadIdx.y) * N + c] : 0;
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < TILE; k++) s += a[threadIdx.y][k] * b[k][threadIdx.x];
        __syncthreads();                                         // LAST
    }
    if (r < M && c < N) C[r * N + c] = s;
}
template __global__ void matmul<16>(const float*, const float*, float*, int, int, int);
"""


def test_matmul_2d_block_and_templates():
    M, N, K = 37, 29, 45
    A, B, C = torch.randn(M, K), torch.randn(K, N), torch.zeros(M, N)
    rep = run_cuda(MATMUL, "matmul", (2, 3), (16, 16), [A, B, C, M, N, K])
    assert rep.ok, rep
    assert (C.double() - A.double() @ B.double()).abs().max() < 1e-4
    for order in ("reversed", "shuffled"):  # 'matmul<8>' is not in the source: instantiated
        C.zero_()
        rep = run_cuda(MATMUL, "matmul<8>", (4, 5), (8, 8), [A, B, C, M, N, K], order=order)
        assert rep.ok and (C.double() - A.double() @ B.double()).abs().max() < 1e-4, rep
    src = "\n".join(x for x in MATMUL.split("\n") if "// LAST" not in x)
    fails("race", src, "matmul<16>", (2, 3), (16, 16), [A, B, C, M, N, K], match="another warp")


WMMA = r"""
#include <mma.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using namespace nvcuda;
template <typename T, typename LB, bool BT>
__global__ void wmma_matmul(const T* A, const T* B, float* C, int N, int K) {        // 32 x 32 per CTA of 4 warps
    extern __shared__ __align__(128) unsigned char raw[];
    T *a = reinterpret_cast<T*>(raw), *b = a + 32 * 32;
    int warp = threadIdx.x / 32, wr = warp / 2, wc = warp % 2;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> acc;
    wmma::fill_fragment(acc, 0.f);
    for (int k0 = 0; k0 < K; k0 += 32) {
        int r = threadIdx.x / 4, c = threadIdx.x % 4 * 8;
        *(uint4*)&a[r * 32 + c] = *(const uint4*)&A[(blockIdx.y * 32 + r) * K + k0 + c];
        *(uint4*)&b[r * 32 + c] = BT ? *(const uint4*)&B[(blockIdx.x * 32 + r) * K + k0 + c]
                                     : *(const uint4*)&B[(k0 + r) * N + blockIdx.x * 32 + c];
        __syncthreads();
        for (int k = 0; k < 32; k += 16) {
            wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa;
            wmma::fragment<wmma::matrix_b, 16, 16, 16, T, LB> fb;
            wmma::load_matrix_sync(fa, &a[wr * 16 * 32 + k], 32);
            wmma::load_matrix_sync(fb, BT ? &b[wc * 16 * 32 + k] : &b[k * 32 + wc * 16], 32);
            wmma::mma_sync(acc, fa, fb, acc);
        }
        __syncthreads();
    }
    for (int i = 0; i < acc.num_elements; i++) acc.x[i] *= 2.f;
    wmma::store_matrix_sync(&C[(blockIdx.y * 32 + wr * 16) * N + blockIdx.x * 32 + wc * 16], acc, N, wmma::mem_row_major);
}
template <int M, int N>
__global__ void shapes(const half* A, const half* B, half* C) {
    wmma::fragment<wmma::matrix_a, M, N, 16, half, wmma::col_major> fa;
    wmma::fragment<wmma::matrix_b, M, N, 16, half, wmma::row_major> fb;
    wmma::fragment<wmma::accumulator, M, N, 16, half> acc;
    wmma::load_matrix_sync(acc, C, M, wmma::mem_col_major);
    wmma::load_matrix_sync(fa, A, M);
    wmma::load_matrix_sync(fb, B, N);
    wmma::mma_sync(acc, fa, fb, acc);
    wmma::store_matrix_sync(C, acc, M, wmma::mem_col_major);
}
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_wmma(arch):
    M, N, K = 64, 96, 64
    for T, name in ((bf16, "__nv_bfloat16"), (torch.half, "half")):
        for BT, layout in ((True, "col"), (False, "row")):
            A, B, C = torch.randn(M, K).to(T), torch.randn(K, N).to(T), torch.zeros(M, N)
            b = B.T.contiguous() if BT else B
            rep = run_cuda(
                WMMA,
                f"wmma_matmul<{name}, wmma::{layout}_major, {str(BT).lower()}>",
                (N // 32, M // 32),
                128,
                [A, b, C, N, K],
                shared=2 * 32 * 32 * 2,
                arch=arch,
            )
            assert rep.ok and rep.mma_count == 6 * 4 * 4, rep
            assert (C.double() - 2 * A.double() @ B.double()).abs().max() < 1e-3
    for m, n in ((16, 16), (32, 8), (8, 32)):
        A, B, C = torch.randn(16, m).half(), torch.randn(16, n).half(), torch.randn(n, m).half()
        ref = C.double() + (A.double().T @ B.double()).T
        rep = run_cuda(WMMA, f"shapes<{m}, {n}>", 1, 32, [A, B, C], arch=arch)
        assert rep.ok and (C.double() - ref).abs().max() < 0.03, rep


MMA = r"""
#include <cuda_bf16.h>
#include <cstdint>
__device__ __forceinline__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(void* d, const void* s) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(smem(d)), "l"(s));
}
__device__ __forceinline__ void ldsm4(uint32_t* r, const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem(p)));
}
__device__ __forceinline__ void ldsm4t(uint32_t* r, const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem(p)));
}
__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// C (64 x 64 per CTA, 4 warps of 32 x 32) = A B, two stages of 32 columns; rows are padded by 8 elements
extern "C" __global__ void mma_matmul(const __nv_bfloat16* A, const __nv_bfloat16* B, __nv_bfloat16* C, int N, int K) {
    __shared__ __align__(16) __nv_bfloat16 a[2][64][40], b[2][32][72];
    int t = threadIdx.x, warp = t / 32, lane = t % 32, wr = warp / 2 * 32, wc = warp % 2 * 32;
    A += (size_t)blockIdx.y * 64 * K;
    B += blockIdx.x * 64;
    float acc[2][4][4] = {};
    auto fetch = [&](int s, int k0) {
        for (int i = t; i < 256; i += 128) {
            copy16(&a[s][i / 4][i % 4 * 8], A + (size_t)(i / 4) * K + k0 + i % 4 * 8);
            copy16(&b[s][i / 8][i % 8 * 8], B + (size_t)(k0 + i / 8) * N + i % 8 * 8);
        }
        asm volatile("cp.async.commit_group;");
    };
    fetch(0, 0);
    for (int it = 0; it < K / 32; it++) {
        if (it + 1 < K / 32) { fetch((it + 1) & 1, (it + 1) * 32); asm volatile("cp.async.wait_group 1;"); }
        else asm volatile("cp.async.wait_group 0;");
        __syncthreads();                                         // ARRIVED
        for (int k = 0; k < 32; k += 16) {
            uint32_t fa[2][4], fb[2][4];
            for (int i = 0; i < 2; i++) ldsm4(fa[i], &a[it & 1][wr + i * 16 + lane % 16][k + lane / 16 * 8]);
            for (int j = 0; j < 2; j++) ldsm4t(fb[j], &b[it & 1][k + lane % 16][wc + j * 16 + lane / 16 * 8]);
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) mma(acc[i][j], fa[i], &fb[j / 2][j % 2 * 2]);
        }
        __syncthreads();                                         // USED
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int h = 0; h < 2; h++) {
                int r = blockIdx.y * 64 + wr + i * 16 + h * 8 + lane / 4, c = blockIdx.x * 64 + wc + j * 8 + lane % 4 * 2;
                *(__nv_bfloat162*)&C[(size_t)r * N + c] = __floats2bfloat162_rn(acc[i][j][h * 2], acc[i][j][h * 2 + 1]);
            }
}
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_mma_ldmatrix_cp_async(arch):
    M, N, K = 128, 64, 128
    A, B, C = torch.randn(M, K).to(bf16), torch.randn(K, N).to(bf16), torch.zeros(M, N).to(bf16)
    rep = run_cuda(MMA, "mma_matmul", (N // 64, M // 64), 128, [A, B, C, N, K], arch=arch, count_banks=True)
    assert rep.ok and rep.mma == {"mma.m16n8k16.bf16": 2 * 4 * 64}, rep
    assert set(rep.traffic["cp.async"]) == {16}
    plain = run_cuda(
        MMA.replace("[40]", "[32]").replace("[72]", "[64]"),
        "mma_matmul",
        (N // 64, M // 64),
        128,
        [A, B, C, N, K],
        arch=arch,
        count_banks=True,
    )
    assert plain.ok and plain.bank_conflicts > 2 * rep.bank_conflicts  # the padding pays
    ref = A.double() @ B.double()
    assert ((C.double() - ref).abs() / (1 + ref.abs())).max() < 0.01


def test_mma_planted_bugs():
    M, N, K = 64, 64, 128
    args = [torch.randn(M, K).to(bf16), torch.randn(K, N).to(bf16), torch.zeros(M, N).to(bf16), N, K]

    def without(word):
        return "\n".join(x for x in MMA.split("\n") if "// " + word not in x)

    fails("race", without("ARRIVED"), "mma_matmul", 1, 128, args, match="another warp")
    fails("race", without("USED"), "mma_matmul", 1, 128, args, match="read since the last barrier")
    fails("race", MMA.replace("wait_group 1", "wait_group 2"), "mma_matmul", 1, 128, args, match="before its wait_group")
    fails("oob", MMA.replace("i < 256", "i < 260"), "mma_matmul", 1, 128, args)


# ---- multi-tensor AdamW over a pointer list ------------------------------------------------------------------------
ADAMW = r"""
#include <cuda_bf16.h>
#define MAXT 24
struct Lists { __nv_bfloat16* p[MAXT]; const __nv_bfloat16* g[MAXT]; float* m[MAXT]; float* v[MAXT]; long long n[MAXT];
               unsigned char block_tensor[320]; int block_chunk[320]; };
template <int CHUNK>
__global__ void adamw(Lists L, float lr, float b1, float b2, float eps, float wd, float c1, float c2) {
    int t = L.block_tensor[blockIdx.x];
    long long start = (long long)L.block_chunk[blockIdx.x] * CHUNK, n = L.n[t] - start;
    __nv_bfloat16* p = L.p[t] + start; const __nv_bfloat16* g = L.g[t] + start; float *m = L.m[t] + start, *v = L.v[t] + start;
    for (int i = threadIdx.x; i < CHUNK && i < n; i += blockDim.x) {
        float w = __bfloat162float(p[i]), d = __bfloat162float(g[i]);
        w *= 1.f - lr * wd;
        m[i] = b1 * m[i] + (1 - b1) * d;
        v[i] = b2 * v[i] + (1 - b2) * d * d;
        p[i] = __float2bfloat16(w - lr * (m[i] / c1) / (sqrtf(v[i] / c2) + eps));
    }
}
"""


def test_multi_tensor_adamw():
    torch.manual_seed(1)
    sizes, chunk = [5, 300, 1024, 77, 513], 256
    ps, gs = ([torch.randn(n).to(bf16) for n in sizes] for _ in range(2))
    ms, vs = [torch.randn(n) for n in sizes], [torch.rand(n) for n in sizes]
    lr, b1, b2, eps, wd, c1, c2 = 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.19, 0.02
    want = []
    for p, g, m, v in zip(ps, gs, ms, vs, strict=False):
        p, g, m, v = (x.double() for x in (p, g, m, v))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        want.append((p * (1 - lr * wd) - lr * (m / c1) / ((v / c2).sqrt() + eps), m, v))
    blocks = [(t, c) for t, n in enumerate(sizes) for c in range(-(-n // chunk))]
    lists = Struct(
        ("ptr", ps, 24),
        ("ptr", gs, 24),
        ("ptr", ms, 24),
        ("ptr", vs, 24),
        ("i64", sizes, 24),
        ("u8", [t for t, _ in blocks], 320),
        ("i32", [c for _, c in blocks], 320),
    )
    args = dict(L=lists, lr=lr, b1=b1, b2=b2, eps=eps, wd=wd, c1=c1, c2=c2)
    rep = run_cuda(ADAMW, "adamw<256>", len(blocks), 128, args)
    assert rep.ok, rep
    assert rep.footprint["L.0[2]"] == (2048, 2048)  # field 0 (p), tensor 2
    for got, ref in zip(zip(ps, ms, vs, strict=False), want, strict=False):
        for x, y in zip(got, ref, strict=False):
            assert ((x.double() - y).abs() / (0.1 + y.abs())).max() < (5e-3 if x.dtype == bf16 else 1e-5)
    args["L"] = Struct(
        *[("ptr", x, 24) for x in (ps, gs, ms, vs)],
        ("i64", [n + 1 for n in sizes], 24),
        ("u8", [t for t, _ in blocks], 320),
        ("i32", [c for _, c in blocks], 320),
    )
    fails("oob", ADAMW, "adamw<256>", len(blocks), 128, args, match="past the end of L.")
    args["L"] = Struct(("ptr", ps, 24))
    with pytest.raises(ValueError, match="bytes for a parameter"):
        run_cuda(ADAMW, "adamw<256>", 1, 128, args)


# ---- GroupNorm + SiLU, NHWC, two passes ----------------------------------------------------------------------------
GROUPNORM = r"""
#include <cuda_bf16.h>
// pass 1: partial sums of a slice of the pixels for every group; a row of threads owns a channel pair
__global__ void gn_stats(const __nv_bfloat162* x, float2* stats, int HW, int C, int G, int slice) {
    extern __shared__ float sums[];                              // 2 * G
    for (int i = threadIdx.x; i < 2 * G; i += blockDim.x) sums[i] = 0;
    __syncthreads();                                             // CLEARED
    int b = blockIdx.y, c2 = threadIdx.x, per = C / G;
    float s = 0, q = 0;
    for (int p = blockIdx.x * slice; p < min(HW, (blockIdx.x + 1) * slice); p++) {
        float2 f = __bfloat1622float2(x[((size_t)b * HW + p) * (C / 2) + c2]);
        s += f.x + f.y; q += f.x * f.x + f.y * f.y;
    }
    atomicAdd(&sums[2 * (2 * c2 / per)], s);
    atomicAdd(&sums[2 * (2 * c2 / per) + 1], q);
    __syncthreads();
    for (int i = threadIdx.x; i < G; i += blockDim.x) {
        atomicAdd(&stats[b * G + i].x, sums[2 * i]);
        atomicAdd(&stats[b * G + i].y, sums[2 * i + 1]);
    }
}
__global__ void gn_apply(const __nv_bfloat162* x, const float2* __restrict__ stats, const float* __restrict__ w,
                         const float* __restrict__ bias, __nv_bfloat162* y, int HW, int C, int G, float eps, long long total) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < total; i += (long long)gridDim.x * blockDim.x) {
        int c = int(i % (C / 2)) * 2, b = int(i / (C / 2) / HW), g = c / (C / G);
        float2 st = __ldg(&stats[b * G + g]), f = __bfloat1622float2(x[i]);
        float n = (float)HW * (C / G), mean = st.x / n, r = rsqrtf(fmaxf(st.y / n - mean * mean, 0.f) + eps);
        float u = (f.x - mean) * r * w[c] + bias[c], v = (f.y - mean) * r * w[c + 1] + bias[c + 1];
        y[i] = __floats2bfloat162_rn(u / (1.f + __expf(-u)), v / (1.f + __expf(-v)));
    }
}
"""


def test_group_norm_silu():
    torch.manual_seed(2)
    B, H, W, C, G = 2, 5, 6, 64, 8
    x = (torch.randn(B, H, W, C) + 0.5).to(bf16)
    w, bias, y = torch.randn(C), torch.randn(C), torch.zeros_like(x)
    stats = torch.zeros(B, G, 2)
    rep = run_cuda(GROUPNORM, "gn_stats", (4, B), C // 2, dict(x=x, stats=stats, HW=H * W, C=C, G=G, slice=8), shared=8 * G)
    assert rep.ok, rep
    rep = run_cuda(
        GROUPNORM,
        "gn_apply",
        3,
        128,
        dict(x=x, stats=stats, w=w, bias=bias, y=y, HW=H * W, C=C, G=G, eps=1e-5, total=x.numel() // 2),
    )
    assert rep.ok, rep
    ref = torch.nn.functional.silu(
        torch.nn.functional.group_norm(x.double().permute(0, 3, 1, 2), G, w.double(), bias.double(), 1e-5)
    ).permute(0, 2, 3, 1)
    assert ((y.double() - ref).abs() / (1 + ref.abs())).max() < 0.01
    # plain stores instead of atomics: CTAs overwrite each other
    src = GROUPNORM.replace("atomicAdd(&stats[b * G + i].x, sums[2 * i]);", "stats[b * G + i].x += sums[2 * i];")
    fails(
        "race",
        src,
        "gn_stats",
        (4, B),
        C // 2,
        dict(x=x, stats=stats, HW=H * W, C=C, G=G, slice=8),
        shared=8 * G,
        match="another CTA",
    )
    fails("oob", GROUPNORM, "gn_stats", (4, B), C // 2, dict(x=x, stats=stats, HW=H * W, C=C, G=G, slice=8), shared=4 * G)


# ---- Philox normal noise -------------------------------------------------------------------------------------------
PHILOX = r"""
#include <cuda_bf16.h>
__device__ uint4 philox(uint4 c, uint2 k) {
    for (int r = 0; r < 10; r++) {
        unsigned h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x, h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
        c = make_uint4(h1 ^ c.y ^ k.x, l1, h0 ^ c.w ^ k.y, l0);
        k.x += 0x9E3779B9u; k.y += 0xBB67AE85u;
    }
    return c;
}
__global__ void noise(float* out, uint4* raw, long long n, unsigned long long seed, unsigned long long offset) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i * 4 >= n) return;
    uint4 r = philox(make_uint4((unsigned)i, (unsigned)(i >> 32), (unsigned)offset, (unsigned)(offset >> 32)),
                     make_uint2((unsigned)seed, (unsigned)(seed >> 32)));
    raw[i] = r;
    float u0 = (r.x + 0.5f) * 2.3283064e-10f, u1 = (r.y + 0.5f) * 2.3283064e-10f, a = sqrtf(-2.f * logf(u0)), s, c;
    sincosf(6.2831853f * u1, &s, &c);
    float v0 = (r.z + 0.5f) * 2.3283064e-10f, v1 = (r.w + 0.5f) * 2.3283064e-10f, b = sqrtf(-2.f * __logf(v0));
    out[4 * i] = a * c; out[4 * i + 1] = a * s;
    out[4 * i + 2] = b * cospif(2.f * v1); out[4 * i + 3] = b * __sinf(6.2831853f * v1);
}
"""


def philox_reference(n, seed, offset):
    i = np.arange(n, dtype=np.uint64)
    m = np.uint64(0xFFFFFFFF)
    c = [i & m, i >> np.uint64(32), np.full(n, offset & 0xFFFFFFFF, np.uint64), np.full(n, offset >> 32, np.uint64)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), p1 & m, (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), p0 & m]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 1)


def test_philox_normal():
    n, seed, offset = 4096, 0x123456789ABCDEF, 1 << 33 | 7
    out, raw = torch.zeros(n), torch.zeros(n // 4, 4, dtype=torch.int32)
    rep = run_cuda(PHILOX, "noise", 5, 256, [out, raw, n, seed, offset])
    assert rep.ok, rep
    bits = philox_reference(n // 4, seed, offset)
    assert (raw.numpy().view(np.uint32) == bits).all()
    u = (bits.astype(np.float32) + np.float32(0.5)).astype(np.float64) * np.float64(np.float32(2.3283064e-10))
    ref = np.stack(
        [
            np.sqrt(-2 * np.log(u[:, 0])) * np.cos(2 * np.pi * u[:, 1]),
            np.sqrt(-2 * np.log(u[:, 0])) * np.sin(2 * np.pi * u[:, 1]),
            np.sqrt(-2 * np.log(u[:, 2])) * np.cos(2 * np.pi * u[:, 3]),
            np.sqrt(-2 * np.log(u[:, 2])) * np.sin(2 * np.pi * u[:, 3]),
        ],
        1,
    )
    assert np.abs(out.numpy().reshape(-1, 4) - ref).max() < 5e-5
    assert abs(float(out.mean())) < 0.05 and abs(float(out.std()) - 1) < 0.05


# ---- histogram -----------------------------------------------------------------------------------------------------
HISTOGRAM = r"""
extern "C" __global__ void histogram(const unsigned char* x, unsigned* bins, unsigned* top, int n) {
    __shared__ unsigned local[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
    __syncthreads();                                             // CLEARED
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1u);
    __syncthreads();                                             // COUNTED
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
        if (local[i]) atomicAdd(&bins[i], local[i]);
        atomicMax(top, local[i]);
    }
}
"""


def test_histogram():
    x = torch.randint(0, 256, (3000,), dtype=torch.uint8)
    bins, top = torch.zeros(256, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rep = run_cuda(HISTOGRAM, "histogram", 3, 160, [x, bins, top, 3000])
    assert rep.ok and (bins == torch.bincount(x.int(), minlength=256)).all(), rep
    assert 0 < int(top) <= int(bins.max())
    for word in ("CLEARED", "COUNTED"):
        src = "\n".join(l for l in HISTOGRAM.split("\n") if "// " + word not in l)
        fails("race", src, "histogram", 1, 160, [x, bins, top, 3000])
    src = HISTOGRAM.replace("local[i] = 0;", ";")
    fails("uninitialised", src, "histogram", 1, 160, [x, bins, top, 3000])
    src = HISTOGRAM.replace("local[x[i]]", "local[x[i] + 1]")
    fails("oob", src, "histogram", 1, 160, [x, bins, top, 3000])


# ---- last block done: a fence and a counter order the CTAs ---------------------------------------------------------
LASTBLOCK = r"""
__device__ unsigned ticket = 0;
__global__ void total(const float* x, float* part, float* out, int n) {
    __shared__ bool last;
    float s = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
    for (int o = 16; o; o >>= 1) s += __shfl_down_sync(~0u, s, o);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = s;
        __threadfence();                                         // FENCE
        last = atomicAdd(&ticket, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (last) {
        s = threadIdx.x < gridDim.x ? part[threadIdx.x] : 0;
        for (int o = 16; o; o >>= 1) s += __shfl_down_sync(~0u, s, o);
        if (threadIdx.x == 0) { *out = s; ticket = 0; }
    }
}
"""


def test_last_block_and_inter_cta_race():
    x, part, out, ticket = torch.randn(1000), torch.zeros(8), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    rep = run_cuda(
        LASTBLOCK, "total", 8, 32, dict(x=x, part=part, out=out, n=1000), symbols=dict(ticket=ticket), order="shuffled"
    )
    assert rep.ok and int(ticket) == 0, rep
    assert abs(float(out) - float(x.double().sum())) < 1e-3
    src = "\n".join(l for l in LASTBLOCK.split("\n") if "// FENCE" not in l)
    fails("race", src, "total", 8, 32, dict(x=x, part=part, out=out, n=1000), match="another CTA")
    src = (
        r'extern "C" __global__ void shift(float* x, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x;'
        r" if (i + 1 < n) x[i] = x[i + 1]; }" + "\n"
    )
    fails("race", src, "shift", 4, 64, dict(x=x, n=256), match="another CTA")


# ---- single features -----------------------------------------------------------------------------------------------
FEATURES = r"""
#include <cstdio>
#include <cassert>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
namespace cg = cooperative_groups;
__constant__ float table[5] = {1.5f, -2.f, 3.25f};
__device__ double scale = 2.0;
__device__ float shift = 0.25f;
__device__ const float* where_shift = &shift;
struct Pair { double a; int b; };
__constant__ Pair pairs[2] = {{1.25, 3}, {-0.5, 7}};

extern "C" __global__ void variables(double* o) {
    o[0] = table[2]; o[1] = scale; o[2] = *where_shift; o[3] = pairs[1].a; o[4] = pairs[threadIdx.x].b; o[5] = table[4];
    scale = 5.0;
}

__device__ __noinline__ Pair make(Pair p, float x, int n) {
    for (int i = 0; i < n; i++) p.a = p.a * 0.5 + x;
    if (n == 2) return p;
    p.b += n;
    return p;
}
__device__ __noinline__ double twice(const float* q, int n) { Pair p = make({1.0, 2}, q[n], n); return p.a * p.b + make(p, 1.f, 1).b; }
extern "C" __global__ void functions(double* o, const float* x) { int i = threadIdx.x; o[i] = twice(x + i, i % 4) + twice(x, 1); }

__device__ __noinline__ int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
extern "C" __global__ void recursive(int* o) { o[0] = fib(o[1]); }

extern "C" __global__ void generic(float* o, const float* x, int n) {          // pointers to four kinds of memory
    extern __shared__ float dyn[];
    __shared__ float fixed[64];
    float mine[4] = {10, 20, 30, 40};
    int i = threadIdx.x + threadIdx.y * blockDim.x + threadIdx.z * blockDim.x * blockDim.y;
    dyn[i] = x[i] + 1; fixed[i] = x[i] + 2;
    __syncthreads();
    float* p = i % 4 == 0 ? dyn + i : i % 4 == 1 ? fixed + i : i % 4 == 2 ? mine + n : const_cast<float*>(x) + i;
    *p = *p * 2;
    atomicAdd(i % 2 ? fixed + i : o + 64 + i, 100.f);
    o[i] = *p + mine[n];
}

extern "C" __global__ void warps(unsigned* o, const int* x) {
    int i = threadIdx.x;
    unsigned m = __match_any_sync(~0u, x[i]); int same;
    unsigned all = __match_all_sync(~0u, i / 32, &same);
    o[i] = m; o[64 + i] = all + same;
    o[128 + i] = __ballot_sync(~0u, x[i] > 1) ^ (__any_sync(~0u, x[i] == 9) << 1) ^ __all_sync(~0u, x[i] >= 0);
    o[192 + i] = __reduce_add_sync(~0u, x[i]) + __reduce_max_sync(~0u, (unsigned)x[i]);
    if (i % 32 < 8) o[256 + i] = __shfl_down_sync(0xff, x[i], 2, 8) + __reduce_add_sync(0xff, 1) + __activemask();
    auto tile = cg::tiled_partition<16>(cg::this_thread_block());
    o[320 + i] = tile.shfl_xor(x[i], 5) + cg::reduce(tile, x[i], cg::plus<int>()) * 100;
    o[384 + i] = __syncthreads_count(x[i] > 1) + 100 * __syncthreads_or(x[i] == 7) + 1000 * __syncthreads_and(x[i] < 9);
    o[448 + i] = __popc(m) + __clz(x[i]) + __ffs(x[i]) + __brev(x[i]) + __funnelshift_l(x[i], i, 3) + __byte_perm(i, x[i], 0x5140);
}

extern "C" __global__ void atomics(int* a, unsigned long long* b, __half2* h, __nv_bfloat162* g, float* f, double* d, int* old) {
    int i = threadIdx.x;
    atomicAdd(a, i); atomicMax(a + 1, i * 7 % 50); atomicMin(a + 2, -i); atomicXor(a + 3, i); atomicInc((unsigned*)a + 4, 40);
    old[i] = atomicExch(a + 5 + i, i); atomicCAS(a + 5 + i, i, 2 * i);
    atomicAdd(b, (unsigned long long)i << 33);
    atomicAdd(h, __floats2half2_rn(1.f, 0.5f)); atomicAdd(g, __floats2bfloat162_rn(1.f, 2.f));
    atomicAdd(f, 0.5f); atomicAdd(d, 0.25);
}

extern "C" __global__ void numbers(double* d, float* f, long long* q, int n) {
    int i = threadIdx.x;
    double x = d[i]; float y = f[i]; long long a = q[i], b = q[64 + i];
    d[64 + i] = exp(x) + pow(fabs(x), 1.5); d[128 + i] = sin(x * 1e4) / (1 + x * x); d[192 + i] = fma(x, x, -1.0) + sqrt(fabs(x)) + floor(x) + erf(x);
    f[64 + i] = __expf(y) * __frcp_rn(1 + y * y); f[128 + i] = tanhf(y) + erff(y) + powf(fabsf(y), 0.3f); f[192 + i] = sinf(y * 1e5f) + log1pf(y * y) + fmodf(y, 0.3f);
    f[256 + i] = __half2float(__float2half_rz(y)) + __bfloat162float(__float2bfloat16(y)) + (isnan(y) ? 1 : 0) + rintf(y * 3) + __fdividef(y, 3.f);
    q[128 + i] = a / b; q[192 + i] = a % b; q[256 + i] = (long long)((unsigned long long)a / 7u) + __mul64hi(a, b) + (a >> 3) + (int)y + llrint(x);
    __half2 h = __hmul2(__floats2half2_rn(y, 2 * y), __floats2half2_rn(3.f, y)), k = __hmax2(h, __floats2half2_rn(0.f, 1.f));
    f[320 + i] = __low2float(k) + __high2float(__hfma2(h, k, h)) + __low2float(__hgt2(h, k)) + (__hlt(__low2half(h), __high2half(k)) ? 1 : 0);
    switch (n + i % 8) { case 0: y += 1; break; case 1: y *= 3; break; case 2: y = -y; break; case 3: y = y * y; break;
        case 4: y = expf(y); break; case 5: y = fabsf(y); break; case 6: y -= 7; break; case 7: y = 1 / (2 + y * y); break; }
    f[384 + i] = y;
}

extern "C" __global__ void messages(int* o, int n) { printf("%d\n", n); assert(n < 5); o[threadIdx.x] = n; }

extern "C" __global__ void halves(float* o, const float* x) {                 // two groups of warps with an own barrier each
    __shared__ float s[128];
    int i = threadIdx.x, g = i / 64;
    s[i] = x[i];
    asm volatile("bar.sync %0, %1;" :: "r"(g + 1), "n"(64) : "memory");
    o[i] = s[g * 64 + 63 - i % 64];
}

extern "C" __global__ void partial_warp(float* o, const float* x, int n) {
    int i = threadIdx.x;
    if (i >= n) return;
    o[i] = __shfl_xor_sync(~0u, x[i], 1);
}
extern "C" __global__ void lonely_barrier(float* o) { if (threadIdx.x < 32) __syncthreads(); o[threadIdx.x] = 1; }
extern "C" __global__ void two_arrays(float* o, int n) { __shared__ float a[8], b[8]; a[threadIdx.x] = 1; b[threadIdx.x] = 2; __syncthreads();
    o[threadIdx.x] = a[threadIdx.x + n] + b[threadIdx.x]; }
"""


def test_module_variables():
    o, scale = torch.zeros(6, dtype=torch.float64), torch.tensor([2.5], dtype=torch.float64)
    assert run_cuda(FEATURES, "variables", 1, 1, [o]).ok
    assert o.tolist() == [3.25, 2.0, 0.25, -0.5, 3.0, 0.0]
    assert run_cuda(FEATURES, "variables", 1, 1, [o], symbols={"scale": scale, "table": torch.tensor([1.0, 2, 3, 4, 5])}).ok
    assert o.tolist()[:2] == [3.0, 2.5] and o[5] == 5 and scale.item() == 5.0
    with pytest.raises(ValueError, match="no module variable"):
        run_cuda(FEATURES, "variables", 1, 1, [o], symbols={"nothing": scale})


def test_functions():
    def make(p, x, n):
        a, b = p
        for _ in range(n):
            a = a * 0.5 + x
        return (a, b) if n == 2 else (a, b + n)

    def twice(q, n):
        p = make((1.0, 2), float(q[n]), n)
        return p[0] * p[1] + make(p, 1.0, 1)[1]

    x, o = torch.randn(80), torch.zeros(64, dtype=torch.float64)
    assert run_cuda(FEATURES, "functions", 1, 64, [o, x]).ok
    ref = [twice(x[i:], i % 4) + twice(x, 1) for i in range(64)]
    assert np.allclose(o.numpy(), ref, rtol=1e-12)
    with pytest.raises(PtxError, match="recursive"):
        run_cuda(FEATURES, "recursive", 1, 1, [torch.tensor([0, 5], dtype=torch.int32)])


def test_generic_addresses_3d_block():
    x, o = torch.randn(64), torch.zeros(128)
    x0, n = x.clone(), 2
    rep = run_cuda(FEATURES, "generic", 1, (4, 8, 2), [o, x, n], shared=256)
    assert rep.ok, rep
    for i in range(64):
        v = 2 * (x0[i] + 1 if i % 4 == 0 else x0[i] + 2 if i % 4 == 1 else 30 if i % 4 == 2 else x0[i])
        if i % 4 == 1:
            v = v + 100
        assert abs(float(o[i]) - float(v + (60 if i % 4 == 2 else 30))) < 1e-4, i
        assert o[64 + i] == (0 if i % 2 else 100)
    fails("oob", FEATURES, "generic", 1, (4, 8, 2), [o, x, n], shared=128, match="shared")


def test_warp_operations():
    x = torch.randint(0, 4, (64,), dtype=torch.int32)
    for arch in ARCHS:
        o = torch.zeros(512, dtype=torch.int32)
        rep = run_cuda(FEATURES, "warps", 1, 64, [o, x], arch=arch)
        assert rep.ok, rep
        u, v = o.numpy().view(np.uint32).reshape(8, 64), x.numpy()
        for w in range(2):
            z = v[32 * w : 32 * w + 32]
            for lane in range(32):
                i = 32 * w + lane
                same = sum(1 << j for j in range(32) if z[j] == z[lane])
                assert u[0, i] == same and u[1, i] == 0  # 0xffffffff + 1
                ballot = sum(1 << j for j in range(32) if z[j] > 1)
                assert u[2, i] == ballot ^ 1
                assert u[3, i] == z.sum() + z.max()
                if lane < 8:
                    assert u[4, i] == z[lane + 2 if lane < 6 else lane] + 8 + 255
                h = lane // 16 * 16
                assert u[5, i] == z[h + (lane % 16 ^ 5)] + 100 * z[h : h + 16].sum()
                assert u[6, i] == (v > 1).sum() + 1000
                a, n = int(z[lane]), i
                clz, ffs = 32 - a.bit_length(), (a & -a).bit_length()
                brev = int(f"{a:032b}"[::-1], 2)
                funnel = ((n << 32 | a) << 3 >> 32) & 0xFFFFFFFF
                b = [n & 255, n >> 8 & 255, n >> 16 & 255, n >> 24, a & 255, a >> 8 & 255, 0, 0]
                perm = b[0] | b[4] << 8 | b[1] << 16 | b[5] << 24
                assert u[7, i] == (bin(same).count("1") + clz + ffs + brev + funnel + perm) & 0xFFFFFFFF


def test_atomics():
    a = torch.zeros(5 + 64, dtype=torch.int32)
    b, h, g = torch.zeros(1, dtype=torch.int64), torch.zeros(2).half(), torch.zeros(2).to(bf16)
    f, d, old = torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.full((64,), -1, dtype=torch.int32)
    for arch in ARCHS:
        for t in (a, b, h, g, f, d):
            t.zero_()
        rep = run_cuda(FEATURES, "atomics", 1, 64, [a, b, h, g, f, d, old], arch=arch)
        assert rep.ok, rep
        assert a[:5].tolist() == [2016, 49, -63, 0, 64 - 41] and a[5:].tolist() == [2 * i for i in range(64)]
        assert b.item() == 2016 << 33 and h.tolist() == [64, 32] and g.tolist() == [64, 128] and f == 32 and d == 16
        assert (old == 0).all()


def test_numbers():
    torch.manual_seed(4)
    d, f = torch.zeros(256, dtype=torch.float64), torch.zeros(448)
    q = torch.zeros(320, dtype=torch.int64)
    d[:64], f[:64] = torch.randn(64) * 2, torch.randn(64)
    q[:64] = torch.randint(-(2**60), 2**60, (64,))
    q[64:128] = torch.randint(1, 2**35, (64,)) * (torch.randint(0, 2, (64,)) * 2 - 1)
    rep = run_cuda(FEATURES, "numbers", 1, 64, [d, f, q, 0])
    assert rep.ok, rep
    x, y, a, b = d[:64].numpy(), f[:64].numpy().astype(np.float64), q[:64].tolist(), q[64:128].tolist()
    erf = torch.erf(d[:64]).numpy()
    assert np.allclose(d[64:128], np.exp(x) + np.abs(x) ** 1.5, rtol=1e-14)
    assert np.allclose(d[128:192], np.sin(x * 1e4) / (1 + x * x), rtol=1e-11, atol=1e-15)
    assert np.allclose(d[192:], x * x - 1 + np.sqrt(np.abs(x)) + np.floor(x) + erf, rtol=1e-13, atol=1e-14)
    erf = torch.erf(f[:64].double()).numpy()
    assert np.allclose(f[64:128], np.exp(y) / (1 + y * y), rtol=1e-5)
    assert np.allclose(f[128:192], np.tanh(y) + erf + np.abs(y) ** 0.3, rtol=1e-5, atol=1e-6)
    big = (f[:64].numpy() * np.float32(1e5)).astype(np.float64)
    assert np.allclose(
        f[192:256], np.sin(big) + np.log1p(y * y) + np.fmod(y, np.float64(np.float32(0.3))), rtol=1e-4, atol=2e-6
    )

    def trunc(p, r):
        return abs(p) // abs(r) * (1 if (p < 0) == (r < 0) else -1)

    assert q[128:192].tolist() == [trunc(p, r) for p, r in zip(a, b, strict=False)]
    assert q[192:256].tolist() == [p - r * trunc(p, r) for p, r in zip(a, b, strict=False)]
    want = [(p % 2**64 // 7 + (p * r >> 64) + (p >> 3) + int(yy) + round(xx)) for p, r, yy, xx in zip(a, b, y, x, strict=False)]
    assert q[256:].tolist() == [(w + 2**63) % 2**64 - 2**63 for w in want]
    sel = [
        lambda v: v + 1,
        lambda v: v * 3,
        lambda v: -v,
        lambda v: v * v,
        np.exp,
        abs,
        lambda v: v - 7,
        lambda v: 1 / (2 + v * v),
    ]
    assert np.allclose(f[384:], [sel[i % 8](y[i]) for i in range(64)], rtol=1e-5)
    h = np.stack([y.astype(np.float16) * np.float16(3), (2 * y).astype(np.float16) * y.astype(np.float16)]).astype(np.float64)
    k = np.maximum(h, [[0], [1]])
    fused = (h[1] * k[1] + h[1]).astype(np.float16)
    assert np.allclose(f[320:384], k[0] + fused + (h[0] > k[0]) + (h[0] < k[1]), rtol=1e-6)


def test_printf_and_assert():
    o = torch.zeros(32, dtype=torch.int32)
    assert run_cuda(FEATURES, "messages", 1, 32, [o, 3]).ok and (o == 3).all()
    with pytest.raises(PtxFault, match="assertion"):
        run_cuda(FEATURES, "messages", 1, 32, [o, 5])


def test_barriers():
    x, o = torch.randn(128), torch.zeros(128)
    rep = run_cuda(FEATURES, "halves", 1, 128, [o, x])
    assert rep.ok and (o.view(2, 64) == x.view(2, 64).flip(1)).all(), rep
    fails("sync", FEATURES, "lonely_barrier", 1, 64, [o], match="only part of the CTA")
    fails("sync", FEATURES, "partial_warp", 1, 64, [o, x, 40], match="member mask")


def test_block_of_any_size():
    x = torch.randn(50)
    o = torch.zeros(50)
    rep = run_cuda(FEATURES, "partial_warp", 1, 50, [o, x, 50])  # the last warp has 18 lanes
    assert rep.ok and (o.view(-1, 2) == x.view(-1, 2).flip(1)).all(), rep
    A, B, C = torch.randn(7, 7), torch.randn(7, 7), torch.zeros(7, 7)
    rep = run_cuda(MATMUL, "matmul<5>", (2, 2), (5, 5), [A, B, C, 7, 7, 7])
    assert rep.ok and (C - A @ B).abs().max() < 1e-5, rep
    with pytest.raises(ValueError, match="1 to 1024"):
        run_cuda(FEATURES, "partial_warp", 1, (64, 32), [o, x, 50])


def test_shared_array_overrun():
    o = torch.zeros(8)
    assert run_cuda(FEATURES, "two_arrays", 1, 8, [o, 0]).ok
    fails("oob", FEATURES, "two_arrays", 1, 8, [o, 1], match="past the end of")


JUMP = r"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry jump(.param .u64 jump_param_0)
{
    .reg .b32 %r<6>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [jump_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    and.b32 %r2, %r1, 3;
$L_table: .branchtargets $L_0, $L_1, $L_2, $L_1;
    brx.idx %r2, $L_table;
$L_0: mov.u32 %r3, 100; bra.uni $L_end;
$L_1: mov.u32 %r3, 200; bra.uni $L_end;
$L_2: mov.u32 %r3, 300;
$L_end: add.s32 %r3, %r3, %r1;
    st.global.u32 [%rd3], %r3;
    ret;
}
"""


def test_jump_table():
    o = torch.zeros(40, dtype=torch.int32)
    rep = run_ptx(JUMP, [("o", o)], 1, block=40)
    assert rep.ok and o.tolist() == [(100, 200, 300, 200)[i % 4] + i for i in range(40)], rep


def test_names_and_arguments():
    o, x = torch.zeros(64), torch.zeros(64)
    with pytest.raises(PtxError, match="no kernel"):
        run_cuda(FEATURES, "missing", 1, 32, [])
    with pytest.raises(ValueError, match="2 arguments for the 3 parameters"):
        run_cuda(FEATURES, "partial_warp", 1, 32, [o, x])
    with pytest.raises(PtxError, match="nvcc failed"):
        compile_cuda("__global__ void f() { nonsense; }\n")
    with pytest.raises(PtxError, match="ambiguous"):
        run_cuda(
            MATMUL + "template __global__ void matmul<4>(const float*, const float*, float*, int, int, int);",
            "matmul",
            1,
            32,
            [],
        )
