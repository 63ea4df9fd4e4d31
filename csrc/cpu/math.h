// Elementary functions on vectors. The coefficients come from fit_math.py.
#pragma once

#include "simd.h"

namespace ov3 {

// Highest power first.
template <int N>
inline vf polynomial(vf x, const float (&coefficients)[N]) {
    vf p = splat(coefficients[0]);
    for (int i = 1; i < N; i++) p = p * x + coefficients[i];
    return p;
}

// largest error 2.0e-09
constexpr float EXP2[] = {1.535336062e-04f, 1.339887487e-03f, 9.618437366e-03f,
                          5.550332470e-02f, 2.402264791e-01f, 6.931472029e-01f};
// largest error 2.8e-06
constexpr float EXP2_SHORT[] = {9.582850669e-03f, 5.590642825e-02f, 2.402409868e-01f, 6.931241928e-01f};
// largest error 5.8e-09
constexpr float LOG[] = {-7.634429862e-02f, 1.276155034e-01f,  -1.316019506e-01f, 1.420176247e-01f,
                         -1.662335648e-01f, 2.000122667e-01f,  -2.500082106e-01f, 3.333333171e-01f};
// largest error 2.0e-09
constexpr float SIN[] = {-1.948874536e-04f, 8.331923956e-03f, -1.666664969e-01f};
// largest error 1.1e-10
constexpr float COS[] = {2.443120314e-05f, -1.388730602e-03f, 4.166664565e-02f};
// largest error 1.5e-08
constexpr float TAIL[] = {-1.142562029e-01f, 4.495569077e-01f, -3.270597679e-01f, 3.307864191e-01f, 4.336014880e-02f, 1.176125104e-01f};

constexpr float LOG2_E = 1.44269504088896341f;

// exp(x), within an ulp or two; underflows to 0 and overflows to inf.
inline vf exp(vf x) {
    const vf clamped = min(max(x, splat(-105.0f)), splat(90.0f));
    const vf n = round_to_integer(clamped * LOG2_E);
    // ln 2 in two parts, for an accurate remainder, which is then converted back to base 2.
    const vf remainder = (clamped - n * 0.693145751953125f) - n * 1.42860677e-6f;
    const vf f = remainder * LOG2_E;
    return scale_by_power(polynomial(f, EXP2) * f + 1.0f, n);
}

// 2^x, for a softmax with log2(e) folded into its scale. SHORT: relative error 3e-6, sufficient for bfloat16.
template <bool SHORT = false>
inline vf exp2(vf x) {
    const vf clamped = min(max(x, splat(-150.0f)), splat(129.0f));
    const vf n = round_to_integer(clamped);
    const vf f = clamped - n;
    return scale_by_power((SHORT ? polynomial(f, EXP2_SHORT) : polynomial(f, EXP2)) * f + 1.0f, n);
}

// ln(x) for positive, normal x.
inline vf log(vf x) {
    // x = m 2^e, m in [sqrt(1/2), sqrt(2)).
    const vi bits = bit_cast<vi>(x) - 0x3f3504f3;
    const vf e = __builtin_convertvector(bits >> 23, vf);
    const vf f = bit_cast<vf>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const vf small = f * f * (polynomial(f, LOG) * f - 0.5f) + e * -2.12194440e-4f;
    return (small + f) + e * 0.693359375f;
}

// sin and cos for 0 <= x <= 2 pi.
inline void sin_cos(vf x, vf& sine, vf& cosine) {
    const vf n = round_to_integer(x * 0.636619772367581f);
    const vi quarter = __builtin_convertvector(n, vi);
    vf r = x - n * 1.5703125f;
    r = r - n * 4.83751296997e-4f;
    r = r - n * 7.54978995489e-8f;
    const vf square = r * r;
    const vf s = r + r * square * polynomial(square, SIN);
    const vf c = square * square * polynomial(square, COS) + (1.0f - 0.5f * square);
    const vi swapped = (quarter & 1) != 0;
    const vu sign_s = bit_cast<vu>((quarter & 2) << 30), sign_c = bit_cast<vu>(((quarter + 1) & 2) << 30);
    sine = bit_cast<vf>(bit_cast<vu>(swapped ? c : s) ^ sign_s);
    cosine = bit_cast<vf>(bit_cast<vu>(swapped ? s : c) ^ sign_c);
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// The normal CDF, absolute error 1e-7, and exp(-x^2 / 2), which its tails are computed from.
inline vf normal_cdf(vf x, vf& bell) {
    bell = exp2(x * x * (-0.5f * LOG2_E));
    const vf s = 1.0f / (1.0f + 0.275f * abs(x)), tail = bell * (polynomial(s, TAIL) * s);
    return (x < 0.0f) ? tail : 1.0f - tail;
}

enum Activation { GELU, GELU_TANH };

inline vf tanh_argument(vf x) { return x * (1.5957691216057308f + 0.07135481282723f * x * x); }  // 2 sqrt(2/pi) (x + 0.044715 x^3)

// gelu(x) and its derivative.
template <Activation KIND>
inline void gelu_with_slope(vf x, vf& value, vf& slope) {
    if (KIND == GELU) {
        vf bell;
        const vf cdf = normal_cdf(x, bell);
        value = x * cdf;
        slope = cdf + x * (0.398942280401432678f * bell);
    } else {
        const vf e = exp(-tanh_argument(x)), s = 1.0f / (1.0f + e), rest = (e < 1.0f) ? e * s : 1.0f - s;  // 1 - s without cancellation
        value = x * s;
        slope = s + value * rest * (1.5957691216057308f + 0.21406443848169f * x * x);
    }
}
template <Activation KIND>
inline vf gelu(vf x) {
    vf value, slope;
    gelu_with_slope<KIND>(x, value, slope);
    return value;
}

}  // namespace ov3
