// Shared by the losses: exponentials and logarithms of a softmax, and accumulation of product blocks into rows of a result.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "math.h"

namespace ov3 {

typedef double vd __attribute__((vector_size(VL * 8)));

// Used instead of -infinity where the difference of two of them must be 0.
constexpr float LOWEST = -1e30f;

// exp(x) = 1 + x + x^2 q(x) for |x| <= ln(2) / 2, largest relative error 3.1e-9; from fit_math.py.
constexpr float EXP_SQUARES[] = {1.381461100e-03f, 8.368710035e-03f, 4.166838741e-02f, 1.666652069e-01f, 4.999999345e-01f};

// exp(x) for x <= 0 (up to rounding), x = z - max in a softmax. Errors of exp(x) near x = 0 don't average out in cancelling sums of
// gradients, so the leading terms are exact.
inline vf exp_below(vf x) {
    const vf t = max(x, splat(-105.0f)), n = round_to_integer(t * LOG2_E);
    const vf f = (t - n * 0.693145751953125f) - n * 1.42860677e-6f;
    return scale_by_power((polynomial(f, EXP_SQUARES) * f * f + f) + 1.0f, n);
}

// ln(1 + e) for 0 <= e <= 1, to full precision.
inline vf log1p_unit(vf e) {
    const vi large = e > 0.414213562f;
    const vf f = large ? e * 0.5f - 0.5f : e, one = large ? splat(1.0f) : vf{};
    const vf small = f * f * (polynomial(f, LOG) * f - 0.5f) + one * -2.12194440e-4f;
    return (small + f) + one * 0.693359375f;
}
inline vf softplus(vf z) { return max(z, vf{}) + log1p_unit(exp_below(-abs(z))); }

// Forces x to be rounded: later operations can't be fused with the one that produced it.
inline void keep_apart(vf& x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
}

// The rounding error of p = a * b.
inline vf product_error(vf a, vf b, vf p) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_fmsub_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(p)));
#elif defined(__FMA__)
    return bit_cast<vf>(_mm256_fmsub_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(p)));
#else
    const auto widen = [](vf x) { return __builtin_convertvector(x, vd); };
    return __builtin_convertvector(widen(a) * widen(b) - widen(p), vf);
#endif
}

inline bool any(vi mask) {
#if defined(__AVX512F__)
    const __m512i m = bit_cast<__m512i>(mask);
    return _mm512_test_epi32_mask(m, m) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8(bit_cast<__m256i>(mask)) != 0;
#else
    int32_t all = 0;
    for (int i = 0; i < VL; i++) all |= mask[i];
    return all != 0;
#endif
}

// A running log-sum-exp: the maximum m_i so far and the sum l_i of exp(x - m_i).
struct Lse {
    float m_i = LOWEST;
    double l_i = 0.0;

    void add(float other, double sum) {
        const float m_new = m_i < other ? other : m_i;
        // exp(0) = 1, which one of the two mostly is.
        if (m_i != m_new) l_i *= std::exp(double(m_i) - m_new);
        if (other != m_new) sum *= std::exp(double(other) - m_new);
        l_i += sum;
        m_i = m_new;
    }
    void add(vf other, vf sums) {
        const float m_new = reduce_max(other);
        add(m_new, sum(sums * exp_below(other - m_new)));
    }
};

// A block of a product: c[rows][columns] = (accumulate ? c : 0) + sum over `words` of a b[.][width]; rows <= ROWS_AT_ONCE; the total depth of a's
// panels is `depth` words.
template <class T>
inline void block_into(
    int64_t words, const word_t<T>* a, int64_t depth, const word_t<T>* b, int width, int rows, int columns, float* c, int64_t ldc, bool accumulate
) {
    constexpr int64_t LONGEST = CHAIN<word_t<T>>;
    const bool whole = rows % MR == 0 && columns == width;
    float room[ROWS_AT_ONCE<T> * NR];
    float* out = whole ? c : room;
    const int64_t ldo = whole ? ldc : NR;
    if (accumulate)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j += VL) __builtin_prefetch(c + i * ldc + j, 1);
    for (int64_t k = 0; k == 0 || k < words; k += LONGEST)
        micro_rows(width / VL, rows, std::min(LONGEST, words - k), a + k * MR, depth, b + k * width, width, out, ldo,
                   k > 0 || (whole && accumulate));
    if (whole) return;
    for (int i = 0; i < rows; i++)
        for_vectors(columns, [&](int64_t j, int lanes) {
            const vf x = load(room + i * NR + j, lanes);
            store(c + i * ldc + j, accumulate ? load(c + i * ldc + j, lanes) + x : x, lanes);
        });
}

}  // namespace ov3
