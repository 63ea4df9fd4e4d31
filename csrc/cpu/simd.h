// Float vectors, written once and compiled once per instruction set: GCC's and Clang's vector extensions provide the arithmetic, and only what they
// can't express (bfloat16 dot products, transposition) is written per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ov3 {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vu16 __attribute__((vector_size(VL * 2)));

struct bf16 {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline vf splat(float x) { return x - vf{}; }

// Conversion of elements to and from float. bfloat16 is rounded to nearest even; NaN stays NaN.

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

inline vu round_to_bf16(vf x) {
    const vu bits = bit_cast<vu>(x);
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (x == x) ? rounded : ((bits >> 16) | 0x40u);
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return {uint16_t(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u)};
}

inline vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#else
    vu16 x;
    std::memcpy(&x, p, sizeof x);
    return bit_cast<vf>(__builtin_convertvector(x, vu) << 16);
#endif
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
inline void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
    const __m256bh narrow = _mm512_cvtneps_pbh(bit_cast<__m512>(x));
    std::memcpy(p, &narrow, sizeof narrow);
#else
    const vu16 narrow = __builtin_convertvector(round_to_bf16(x), vu16);
    std::memcpy(p, &narrow, sizeof narrow);
#endif
}

// The first `count` elements, 0 < count <= VL; memory past them is not accessed, and the other lanes are 0.

template <class T>
inline vf load_part(const T* p, int count) {
    T values[VL] = {};
    std::memcpy(values, p, count * sizeof(T));
    return load(values);
}
template <class T>
inline void store_part(T* p, vf x, int count) {
    T values[VL];
    store(values, x);
    std::memcpy(p, values, count * sizeof(T));
}
#if defined(__AVX512F__)
template <>
inline vf load_part<float>(const float* p, int count) {
    return bit_cast<vf>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
}
template <>
inline void store_part<float>(float* p, vf x, int count) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), bit_cast<__m512>(x));
}
template <>
inline vf load_part<bf16>(const bf16* p, int count) {
    const __m256i x = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
    return bit_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
template <>
inline void store_part<bf16>(bf16* p, vf x, int count) {
    bf16 values[VL];
    store(values, x);
    __m256i narrow;
    std::memcpy(&narrow, values, sizeof narrow);
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), narrow);
}
#endif

// x with zeros from lane `count` on.
inline vf first_lanes(vf x, int count) {
    for (int i = count; i < VL; i++) x[i] = 0.0f;
    return x;
}

// Calls body(i, count) for each vector of n elements; count is VL except for the last one.
template <class Body>
inline void for_vectors(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) body(i, VL);
    if (i < n) body(i, int(n - i));
}
template <class T>
inline vf load(const T* p, int count) { return count == VL ? load(p) : load_part(p, count); }
template <class T>
inline void store(T* p, vf x, int count) { count == VL ? store(p, x) : store_part(p, x, count); }

// Arithmetic. NaN propagates, except that `max` and `min` then return their first argument.

#if defined(__AVX512F__)
inline vf max(vf a, vf b) { return bit_cast<vf>(_mm512_max_ps(bit_cast<__m512>(b), bit_cast<__m512>(a))); }
inline vf min(vf a, vf b) { return bit_cast<vf>(_mm512_min_ps(bit_cast<__m512>(b), bit_cast<__m512>(a))); }
#elif defined(__AVX2__)
inline vf max(vf a, vf b) { return bit_cast<vf>(_mm256_max_ps(bit_cast<__m256>(b), bit_cast<__m256>(a))); }
inline vf min(vf a, vf b) { return bit_cast<vf>(_mm256_min_ps(bit_cast<__m256>(b), bit_cast<__m256>(a))); }
#else
inline vf max(vf a, vf b) { return (a < b) ? b : a; }
inline vf min(vf a, vf b) { return (a > b) ? b : a; }
#endif
inline vf abs(vf a) { return bit_cast<vf>(bit_cast<vu>(a) & 0x7fffffffu); }
inline vf sqrt(vf a) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_sqrt_ps(bit_cast<__m512>(a)));
#elif defined(__AVX2__)
    return bit_cast<vf>(_mm256_sqrt_ps(bit_cast<__m256>(a)));
#else
    for (int i = 0; i < VL; i++) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
}

// Horizontal reduction, halves first: a fixed order, so that all instruction sets of the same width agree.
template <class Join>
inline float across(vf a, const Join& join) {
#if defined(__AVX512F__)
    a = join(a, bit_cast<vf>(_mm512_shuffle_f32x4(bit_cast<__m512>(a), bit_cast<__m512>(a), 0x4e)));
    a = join(a, bit_cast<vf>(_mm512_shuffle_f32x4(bit_cast<__m512>(a), bit_cast<__m512>(a), 0xb1)));
    a = join(a, bit_cast<vf>(_mm512_permute_ps(bit_cast<__m512>(a), 0x4e)));
    return join(a, bit_cast<vf>(_mm512_permute_ps(bit_cast<__m512>(a), 0xb1)))[0];
#else
    float x[VL];
    store(x, a);
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = join(x[i], x[i + half]);
    return x[0];
#endif
}
inline float sum(vf a) {
    return across(a, [](auto x, auto y) { return x + y; });
}
inline float reduce_max(vf a) {
    return across(a, [](auto x, auto y) { return (x < y) ? y : x; });
}

// 2^n x for integral n between -300 and 300.
inline vf scale_by_power(vf x, vf n) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_scalef_ps(bit_cast<__m512>(x), bit_cast<__m512>(n)));
#else
    const vi whole = __builtin_convertvector(n, vi), half = whole >> 1;
    const vf first = bit_cast<vf>((half + 127) << 23), second = bit_cast<vf>((whole - half + 127) << 23);
    return x * first * second;
#endif
}
inline vf round_to_integer(vf x) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_roundscale_ps(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23
    return (x + magic) - magic;
#endif
}

}  // namespace ov3
