// The gate of SiLU: silu(x) = x gate(x).
#pragma once

#include "math.h"

namespace ov3 {

#if defined(__AVX512F__)
// 2^f for 0 <= f < 1, from fit_math.py; largest errors 2.0e-09 and 2.9e-06.
constexpr float EXP2_ABOVE[] = {2.161291898e-04f, 1.246784512e-03f, 9.675451733e-03f,
                                5.548528052e-02f, 2.402293056e-01f, 6.931470444e-01f};
constexpr float EXP2_ABOVE_SHORT[] = {1.342668774e-02f, 5.224246637e-02f, 2.412802103e-01f, 6.930448437e-01f};
#endif

// 1 / (1 + e^-x) to the precision of T; infinities and NaN are handled as by a division.
template <class T>
inline vf gate(vf x) {
#if defined(__AVX512F__)
    constexpr bool SHORT = sizeof(T) == 2;
    // The fraction of an infinity is 0, and scaling by 2^t rounds t down, so no clamping is needed.
    const __m512 t = bit_cast<__m512>(x * -LOG2_E);
    const vf f = bit_cast<vf>(_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const vf power = (SHORT ? polynomial(f, EXP2_ABOVE_SHORT) : polynomial(f, EXP2_ABOVE)) * f + 1.0f;
    const __m512 d = _mm512_add_ps(_mm512_scalef_ps(bit_cast<__m512>(power), t), _mm512_set1_ps(1.0f)), s = _mm512_rcp14_ps(d);
    if (SHORT) return bit_cast<vf>(s);
    // Newton's step would turn s = 0 into NaN.
    const __m512 rest = _mm512_fnmadd_ps(d, s, _mm512_set1_ps(1.0f));
    return bit_cast<vf>(_mm512_mask_fmadd_ps(s, _mm512_cmp_ps_mask(t, _mm512_set1_ps(126.0f), _CMP_LT_OQ), rest, s));
#else
    return sigmoid(x);
#endif
}

}  // namespace ov3
