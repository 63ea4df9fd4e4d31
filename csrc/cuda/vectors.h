// float, bfloat16 and float16 elements as floats, in packs of N that move 16 bytes at a time if they are that large, and sums over the
// threads of a block in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ov3 {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int THREADS = 256;  // per block

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T rounded(float x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else if constexpr (std::is_same_v<T, bf16>) {
        return __float2bfloat16_rn(x);
    } else {
        return __float2half_rn(x);
    }
}

// Two adjacent 16-bit elements.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
    if constexpr (std::is_same_v<T, bf16>) {
        return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    } else {
        __half2 pair;
        memcpy(&pair, &word, sizeof(pair));
        return __half22float2(pair);
    }
}
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    if constexpr (std::is_same_v<T, bf16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&word, &pair, sizeof(word));
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        memcpy(&word, &pair, sizeof(word));
    }
    return word;
}

// N elements as stored in memory: one (N = 1), or full 16-byte words, so that several loads can be in flight before one is unpacked.
template <class T, int N>
struct Packed {
    static constexpr int WORDS = N * sizeof(T) / 16;
    static_assert(WORDS * 16 == N * sizeof(T));
    uint4 words[WORDS];

    __device__ __forceinline__ explicit Packed(const T* from) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = reinterpret_cast<const uint4*>(from)[i];
    }
    __device__ __forceinline__ void unpack_to(float (&out)[N]) const {
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const uint32_t w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if constexpr (sizeof(T) == 4) {
                    out[4 * i + j] = __uint_as_float(w[j]);
                } else {
                    const float2 two = unpack<T>(w[j]);
                    out[8 * i + 2 * j] = two.x;
                    out[8 * i + 2 * j + 1] = two.y;
                }
            }
        }
    }
};
template <class T>
struct Packed<T, 1> {
    T value;
    __device__ __forceinline__ explicit Packed(const T* from) : value(*from) {}
    __device__ __forceinline__ void unpack_to(float (&out)[1]) const { out[0] = to_float(value); }
};

template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&out)[N]) {
    Packed<T, N>(from).unpack_to(out);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&values)[N]) {
    if constexpr (N == 1) {
        *to = rounded<T>(values[0]);
    } else {
        constexpr int PER_WORD = 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < N / PER_WORD; i++) {
            uint32_t w[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if constexpr (sizeof(T) == 4) {
                    w[j] = __float_as_uint(values[4 * i + j]);
                } else {
                    w[j] = pack<T>(values[8 * i + 2 * j], values[8 * i + 2 * j + 1]);
                }
            }
            reinterpret_cast<uint4*>(to)[i] = {w[0], w[1], w[2], w[3]};
        }
    }
}

// The sum over a warp, in all its lanes.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// The sum over a block of THREADS, in all its threads, in a fixed order. All threads of the block must call it.
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double warps[THREADS / 32];
    value = warp_sum(value);
    __syncthreads();  // other threads may still be reading the previous sum
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    double total = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) total += warps[i];
    return total;
}

}  // namespace ov3
