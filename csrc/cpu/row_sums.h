// Sums along a row, for the norms.
#pragma once

#include <algorithm>

#include "simd.h"

namespace ov3 {

constexpr int64_t CHAIN = 64;  // terms accumulated in one chain, short for precision

// The lane-wise sum of value(first element, lanes) over a row of D. Lanes past the end must be 0.
template <class Value>
inline vf lane_sums(int64_t D, const Value& value) {
    vf total = {};
    for (int64_t start = 0; start < D; start += 4 * CHAIN * VL) {
        const int64_t end = std::min(D, start + 4 * CHAIN * VL);
        vf part[4] = {};
        int64_t d = start;
        for (; d + 4 * VL <= end; d += 4 * VL) {
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) part[v] += value(d + v * VL, VL);
        }
        for_vectors(end - d, [&](int64_t i, int lanes) { part[0] += value(d + i, lanes); });
        total += (part[0] + part[1]) + (part[2] + part[3]);
    }
    return total;
}

// x rounded to T and back.
template <class T>
inline vf rounded(vf x) {
    if constexpr (sizeof(T) == sizeof(float)) return x;
#if defined(__AVX512BF16__)
    return bit_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(x)))), 16));
#else
    return bit_cast<vf>(round_to_bf16(x) << 16);
#endif
}

}  // namespace ov3
