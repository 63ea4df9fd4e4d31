// uint8 as int8 products take it: q = round(x / scale) + zero, rounded to nearest even and saturated. A place for `store` beside T*.
#pragma once

#include "memory.h"
#include "simd.h"

namespace ov3 {

struct Quantized {
    uint8_t* data;
    float inverse, zero;  // 1 / scale

    Quantized(void* data, double scale, int64_t zero) : data(static_cast<uint8_t*>(data)), inverse(float(1.0 / scale)), zero(float(zero)) {}
    Quantized operator+(int64_t offset) const {
        Quantized moved = *this;
        moved.data += offset;
        return moved;
    }
};

inline void store(Quantized q, vf x, int lanes = VL) {
    // NaN becomes 0.
    const vf levels = min(max(round_to_integer(x * q.inverse) + q.zero, vf{}), splat(255.0f));
#if defined(__AVX512F__)
    const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(bit_cast<__m512>(levels)), _mm512_setzero_si512());
    _mm512_mask_cvtusepi32_storeu_epi8(q.data, __mmask16((1u << lanes) - 1), whole);
#else
    for (int i = 0; i < lanes; i++) q.data[i] = levels[i] >= 0.0f ? uint8_t(levels[i]) : uint8_t(0);
#endif
}

inline void expect_writes(Quantized q, int64_t n) { expect_writes(q.data, n); }

}  // namespace ov3
