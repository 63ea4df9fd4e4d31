// Vectorised random numbers: Philox4x32-10 words and Box-Muller normals, exactly as defined in ov3fast/ops/random.py.
//
// Element i is word i % 4 of counter offset + i / 4, so any element can be computed independently: `draw` gives the normals of a range.
#pragma once

#include "../cpu/math.h"

namespace ov3 {

typedef uint64_t vq __attribute__((vector_size(VL * 4)));  // VL / 2 counters

// 64-bit products of the lanes' lower halves.
inline vq multiply_low(vq a, uint32_t b) {
#if defined(__AVX512F__)
    return bit_cast<vq>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
    return bit_cast<vq>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
    return bit_cast<vq>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
    return (a & 0xffffffffu) * b;
#endif
}

// Combines the lower halves of two vectors; those of `odd` go to the upper halves of the lanes.
inline vu join_low(vq even, vq odd) {
#if defined(__AVX512F__)
    const __m512i upper = bit_cast<__m512i>(odd), lower = bit_cast<__m512i>(even);
    return bit_cast<vu>(_mm512_mask_shuffle_epi32(lower, 0xaaaa, upper, _MM_PERM_ENUM(0xa0)));
#else
    return bit_cast<vu>((even & 0xffffffffu) | (odd << 32));
#endif
}

// Transposes 4 vectors within groups of four lanes: lane 4 g + r of the inputs becomes lanes 4 g .. 4 g + 3 of result r.
inline void interleave(const vf (&x)[4], vf (&out)[4]) {
#if defined(__AVX512F__)
    const __m512 a = bit_cast<__m512>(x[0]), b = bit_cast<__m512>(x[1]), c = bit_cast<__m512>(x[2]), d = bit_cast<__m512>(x[3]);
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)), cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    out[0] = bit_cast<vf>(_mm512_unpacklo_pd(ab, cd)), out[1] = bit_cast<vf>(_mm512_unpackhi_pd(ab, cd));
    out[2] = bit_cast<vf>(_mm512_unpacklo_pd(ab_high, cd_high)), out[3] = bit_cast<vf>(_mm512_unpackhi_pd(ab_high, cd_high));
#elif defined(__AVX2__)
    const __m256 a = bit_cast<__m256>(x[0]), b = bit_cast<__m256>(x[1]), c = bit_cast<__m256>(x[2]), d = bit_cast<__m256>(x[3]);
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)), cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    out[0] = bit_cast<vf>(_mm256_unpacklo_pd(ab, cd)), out[1] = bit_cast<vf>(_mm256_unpackhi_pd(ab, cd));
    out[2] = bit_cast<vf>(_mm256_unpacklo_pd(ab_high, cd_high)), out[3] = bit_cast<vf>(_mm256_unpackhi_pd(ab_high, cd_high));
#else
    vf y[4];
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < VL; i++) y[r][i] = x[i % 4][i / 4 * 4 + r];
    for (int r = 0; r < 4; r++) out[r] = y[r];
#endif
}

class Philox {
  public:
    static constexpr int64_t GROUP = 4 * VL;  // elements generated at a time

    // rng: (seed, offset).
    explicit Philox(const int64_t* rng) {
        for (int i = 0; i < VL; i += 2) {
            even_[i / 2] = uint64_t(rng[1]) + uint64_t(VL / 4 * (i % 4) + i / 4);
            odd_[i / 2] = uint64_t(rng[1]) + uint64_t(VL / 4 * (i % 4 + 1) + i / 4);
        }
        uint32_t k0 = uint32_t(rng[0]), k1 = uint32_t(uint64_t(rng[0]) >> 32);
        for (int round = 0; round < 10; round++) {
            keys_[round][0] = k0, keys_[round][1] = k1;
            k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
        }
    }

    // Words w[0 .. 3] of blocks [block, block + VL). Lane 4 g + r holds block + VL / 4 * r + g, so that `interleave` alone puts
    // the elements in order.
    void words(uint64_t block, vu (&w)[4]) const {
        vq a[4], b[4];
        rounds(even_ + block, odd_ + block, a, b);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) w[i] = join_low(a[i], b[i]);
    }

    // Elements [4 block, 4 block + GROUP) in order.
    void normals(uint64_t block, vf (&out)[4]) const {
        vu w[4];
        vf x[4];
        words(block, w);
        box_muller(w[0], w[1], x[0], x[1]);
        box_muller(w[2], w[3], x[2], x[3]);
        interleave(x, out);
    }

    // Workspace that `draw` needs for n elements.
    static constexpr int64_t room(int64_t n) { return n + 3 + GROUP; }

    // Normals of elements [i, i + n), written to `room`; returns a pointer to the first one.
    const float* draw(int64_t i, int64_t n, float* room) const {
        const int64_t skip = i % 4;
        for (int64_t k = 0; k < skip + n; k += GROUP) {
            vf x[4];
            normals(uint64_t(i / 4 + k / 4), x);
            for (int j = 0; j < 4; j++) store(room + k + j * VL, x[j]);
        }
        return room + skip;
    }

  private:
    static vq splat(uint32_t x) { return uint64_t(x) - vq{}; }

    // Two vectors of counters at once, since each round depends on the one before. Only the lanes' lower halves matter.
    void rounds(vq even, vq odd, vq (&a)[4], vq (&b)[4]) const {
        a[0] = even, a[1] = even >> 32, a[2] = vq{}, a[3] = vq{};
        b[0] = odd, b[1] = odd >> 32, b[2] = vq{}, b[3] = vq{};
#pragma GCC unroll 10
        for (int i = 0; i < 10; i++) {
            round(a, splat(keys_[i][0]), splat(keys_[i][1]));
            round(b, splat(keys_[i][0]), splat(keys_[i][1]));
        }
    }

    static void round(vq (&c)[4], vq k0, vq k1) {
        const vq a = multiply_low(c[0], 0xd2511f53u), b = multiply_low(c[2], 0xcd9e8d57u);
        c[0] = (b >> 32) ^ c[1] ^ k0;
        c[2] = (a >> 32) ^ c[3] ^ k1;
        c[1] = b, c[3] = a;
    }

    static vf uniform(vu words) {
        const vi x = bit_cast<vi>(words);
        return __builtin_convertvector(x ^ (x >> 31), vf) * 4.6566127342e-10f;
    }

    static void box_muller(vu first, vu second, vf& a, vf& b) {
        const vf radius = sqrt(-2.0f * log(max(uniform(first), ov3::splat(1e-7f))));
        vf sine, cosine;
        sin_cos(uniform(second) * 6.283185307179586f, sine, cosine);
        a = radius * cosine, b = radius * sine;
    }

    vq even_, odd_;  // counters of block 0's lanes
    uint32_t keys_[10][2];
};

}  // namespace ov3
