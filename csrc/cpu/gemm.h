// Matrix products C[m, n] = sum_k A[m, k] B[k, n] with fp32 accumulation, used by all operators.
//
// Operands are packed into panels of words. A word is the operand of one lane of a multiply-add: a float (one k) or, with bfloat16 dot
// products, a pair of bfloat16 (two k). Panels: A [words][MR], B [words][<= NR]; rows, lanes and half words beyond the matrix are 0.
// The micro-kernel keeps a block of C in registers. The order of additions for an element of C depends only on K, not on
// tiles or threads, so results are bitwise reproducible.
//
// With OV3_TILES, bfloat16 products run on the tile unit (AMX, tiles.h). K is then zero-padded to full tiles of 16 words, and a
// panel of A is a row of tiles, [words / 16][MR][16]: word k (a multiple of 16) of a panel is at k * MR in both layouts. The layout of B is unchanged.
//
//   Packed<T> b(K, N);  b.pack(source, threads);                      // once per call, for example a weight
//   gemm<T>(M, a_source, b, [&](int64_t m, int64_t n, int count, const float* values) { ... }, threads);
//
// `store` receives row segments of C of at most NR values, each exactly once, from any thread; bias, activation and scatter go there.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "parallel.h"
#include "simd.h"
#include "tiles.h"

namespace ov3 {

constexpr int VECTORS = 3;                // vectors in a full panel of B
constexpr int NR = VECTORS * VL;          // lanes in a full panel of B
constexpr int VECTOR_ROWS = VL == 16 ? 8 : 4;  // rows of C that fit in vector registers
#if defined(OV3_TILES)
constexpr int MR = TILE_ROWS;             // rows in a panel of A
#else
constexpr int MR = VECTOR_ROWS;
#endif
constexpr int64_t A_BLOCK_WORDS = 1 << 17;  // words of A that fit in the L2 cache

template <class T>
struct Word {
    typedef float type;
    static constexpr int ks = 1;     // values of k per word
    static constexpr int whole = 1;  // K is padded to a multiple of this many words
};
#if defined(__AVX512BF16__)
template <>
struct Word<bf16> {
    typedef uint32_t type;
    static constexpr int ks = 2;
#if defined(OV3_TILES)
    static constexpr int whole = TILE_BYTES / 4;
#else
    static constexpr int whole = 1;
#endif
};
#endif
template <class T>
using word_t = typename Word<T>::type;
template <class T>
constexpr bool IN_TILES = Word<T>::whole > 1;

// Words of K accumulated in one chain before being added to C: short enough to keep rounding errors small, long enough that C's
// block seldom leaves the registers.
template <class W>
constexpr int64_t CHAIN = 512;
template <>
inline constexpr int64_t CHAIN<float> = 192;

template <class T>
inline int64_t words_of(int64_t k) { return round_up(ceil_div(k, Word<T>::ks), Word<T>::whole); }

// A strided view of a matrix: element (i, k) is at data[i * stride + k * stride_k]; i counts rows of A or columns of B. Elements of type S become
// words of T, so float parameters can be combined with bfloat16 activations without a separate copy.
template <class S>
struct Matrix {
    const S* data;
    int64_t stride, stride_k;
};

// --- micro-kernel ------------------------------------------------------------------------------------------------------------------

template <class W>
inline vf load_words(const W* p) { return load(reinterpret_cast<const float*>(p)); }

inline void multiply_add(vf& c, const float* a, vf b) { c = c + splat(*a) * b; }
#if defined(__AVX512BF16__)
inline void multiply_add(vf& c, const uint32_t* a, vf b) {
    const __m512i pair = _mm512_set1_epi32(int(*a));
    c = bit_cast<vf>(_mm512_dpbf16_ps(bit_cast<__m512>(c), bit_cast<__m512bh>(pair), bit_cast<__m512bh>(b)));
}
#endif

// c[VECTOR_ROWS][NV * VL] = (accumulate ? c : 0) + (sum over `words` of a b[.][NV * VL]), with rows of b ldb words apart. Word k of A's
// row i is at a[i * ROW + k * STEP].
template <int NV, int ROW, int STEP, class W>
__attribute__((noinline)) void vector_block(int64_t words, const W* a, const W* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    vf acc[VECTOR_ROWS][NV];
    for (int i = 0; i < VECTOR_ROWS; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = vf{};
    for (int64_t k = 0; k < words; k++, a += STEP, b += ldb) {
        vf lanes[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) lanes[j] = load_words(b + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < VECTOR_ROWS; i++)
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) multiply_add(acc[i][j], a + i * ROW, lanes[j]);
    }
    for (int i = 0; i < VECTOR_ROWS; i++)
        for (int j = 0; j < NV; j++) {
            float* out = c + i * ldc + j * VL;
            store(out, accumulate ? load(out) + acc[i][j] : acc[i][j]);
        }
}

#if defined(OV3_TILES)
template <class Body, int... I>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, I...>, const Body& body) {
    (body(std::integral_constant<int, I>()), ...);
}
template <int N, class Body>
inline __attribute__((always_inline)) void unroll(const Body& body) { unrolled(std::make_integer_sequence<int, N>(), body); }

// MT x NT tiles of C. Rows of A's tiles are `row` words apart, tiles of the next 16 words `step`, and tiles of the next 16 rows `next`.
// With 2 x 3 there is one tile register for A and one for B, so B's tiles are traversed back and forth.
template <int MT, int NT>
__attribute__((noinline)) void tile_block(
    int64_t words, const uint32_t* a, int64_t row, int64_t step, int64_t next, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
    bool accumulate
) {
    constexpr int A = MT * NT, B = A + 1, WORDS = TILE_BYTES / 4;
    if (accumulate) unroll<MT * NT>([&](auto t) { Tiles::load<t>(c + t / NT * TILE_ROWS * ldc + t % NT * VL, ldc * 4); });
    else unroll<MT * NT>([&](auto t) { Tiles::zero<t>(); });
    for (int64_t k = 0; k < words; k += WORDS, a += step, b += WORDS * ldb)
        unroll<MT>([&](auto i) {
            Tiles::load<A>(a + i * next, row * 4);
            unroll<NT>([&](auto turn) {
                constexpr int j = i % 2 ? NT - 1 - turn : turn;
                if (i == 0 || turn > 0) Tiles::load<B>(b + j * VL, ldb * 4);
                Tiles::dot_bf16<i * NT + j, A, B>();
            });
        });
    unroll<MT * NT>([&](auto t) { Tiles::store<t>(c + t / NT * TILE_ROWS * ldc + t % NT * VL, ldc * 4); });
}
#endif

// A panel's MR rows of C, as in vector_block; word k of A's row i is at a[i * ROW + k * STEP] unless the panel is in tile layout (STEP == MR).
template <int NV, int ROW, int STEP, class W>
inline void micro_block(int64_t words, const W* a, const W* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
#if defined(OV3_TILES)
    if constexpr (sizeof(W) == 4 && !std::is_same<W, float>::value) {
        static_assert(STEP == MR || STEP == 1, "A's tiles lie one after another, or its rows do");
        constexpr int64_t row = STEP == 1 ? ROW : TILE_BYTES / 4, step = STEP == 1 ? TILE_BYTES / 4 : TILE_BYTES / 4 * MR;
        return tile_block<1, NV>(words, a, row, step, 0, b, ldb, c, ldc, accumulate);
    }
#endif
    for (int i = 0; i < MR; i += VECTOR_ROWS)
        vector_block<NV, ROW, STEP>(words, a + i * ROW, b, ldb, c + i * ldc, ldc, accumulate);
}

template <int ROW = 1, int STEP = MR, class W>
inline void micro(int vectors, int64_t words, const W* a, const W* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    switch (vectors) {
        case 1: return micro_block<1, ROW, STEP>(words, a, b, ldb, c, ldc, accumulate);
        case 2: return micro_block<2, ROW, STEP>(words, a, b, ldb, c, ldc, accumulate);
        default: return micro_block<3, ROW, STEP>(words, a, b, ldb, c, ldc, accumulate);
    }
}

// The same for the panels of `rows` rows, whose total depth is `depth` words.
template <class W>
inline void micro_rows(
    int vectors, int64_t rows, int64_t words, const W* a, int64_t depth, const W* b, int64_t ldb, float* c, int64_t ldc, bool accumulate
) {
    int64_t m = 0;
#if defined(OV3_TILES)
    if constexpr (!std::is_same<W, float>::value) {
        constexpr int64_t row = TILE_BYTES / 4;
        const auto pair = vectors == 1 ? tile_block<2, 1> : vectors == 2 ? tile_block<2, 2> : tile_block<2, 3>;
        for (; m + MR < rows; m += 2 * MR)
            pair(words, a + m * depth, row, row * MR, MR * depth, b, ldb, c + m * ldc, ldc, accumulate);
    }
#endif
    for (; m < rows; m += MR) micro(vectors, words, a + m * depth, b, ldb, c + m * ldc, ldc, accumulate);
}

// Preferred number of rows per call of micro_rows.
template <class T>
constexpr int ROWS_AT_ONCE = IN_TILES<T> ? 2 * MR : MR;

// --- packing -----------------------------------------------------------------------------------------------------------------------

// VL words of one row with contiguous k, of which `left` values exist.
template <class T, class S>
inline vf row_words(const S* p, int64_t left) {
#if defined(__AVX512BF16__)
    if constexpr (Word<T>::ks == 2) {
        if constexpr (sizeof(S) == 2) {
            const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
            return bit_cast<vf>(_mm512_maskz_loadu_epi16(mask, p));
        } else {
            const vf low = load(p, int(std::min<int64_t>(left, VL)));
            const vf high = left > VL ? load(p + VL, int(std::min<int64_t>(left - VL, VL))) : vf{};
            return bit_cast<vf>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
        }
    }
#endif
    return load(p, int(std::min<int64_t>(left, VL)));
}

// rows[i][j] -> rows[j][i], VL x VL words.
inline void transpose(vf (&rows)[VL]) {
#if defined(__AVX512F__)
    __m512 t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        const __m512 a = bit_cast<__m512>(rows[i]), b = bit_cast<__m512>(rows[i + 1]);
        t[i] = _mm512_unpacklo_ps(a, b);
        t[i + 1] = _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    // u[4 g + r] has rows 4 g .. 4 g + 3 of columns r, r + 4, r + 8, r + 12.
    for (int r = 0; r < 4; r++) {
        const __m512 a = _mm512_shuffle_f32x4(u[r], u[4 + r], 0x88), b = _mm512_shuffle_f32x4(u[8 + r], u[12 + r], 0x88);
        const __m512 c = _mm512_shuffle_f32x4(u[r], u[4 + r], 0xdd), d = _mm512_shuffle_f32x4(u[8 + r], u[12 + r], 0xdd);
        rows[r] = bit_cast<vf>(_mm512_shuffle_f32x4(a, b, 0x88));
        rows[4 + r] = bit_cast<vf>(_mm512_shuffle_f32x4(c, d, 0x88));
        rows[8 + r] = bit_cast<vf>(_mm512_shuffle_f32x4(a, b, 0xdd));
        rows[12 + r] = bit_cast<vf>(_mm512_shuffle_f32x4(c, d, 0xdd));
    }
#else
    float x[VL][VL];
    std::memcpy(x, rows, sizeof x);
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < VL; j++) rows[i][j] = x[j][i];
#endif
}

// Word k of VL contiguous columns; `next` is the row of k + 1, or null past the end.
template <class T, class S>
inline vf column_words(const S* p, const S* next, int count) {
    if constexpr (Word<T>::ks == 2) {
        const auto bits = [&](const S* row) {
            const vf x = load(row, count);
            return sizeof(S) == 2 ? bit_cast<vu>(x) >> 16 : round_to_bf16(x);
        };
        const vu low = bits(p);
        return bit_cast<vf>(next ? low | (bits(next) << 16) : low);
    } else {
        (void)next;
        return load(p, count);
    }
}

template <class T, class S>
inline word_t<T> one_word(const S* p, int64_t stride_k, int64_t left) {
    if constexpr (Word<T>::ks == 1) {
        (void)stride_k, (void)left;
        return to_float(*p);
    } else {
        const auto bits = [](S x) { return uint32_t(from_float<bf16>(to_float(x)).bits); };
        return bits(*p) | (left > 1 ? bits(p[stride_k]) << 16 : 0u);
    }
}

// One panel: `count` <= width rows (of A; columns of B) from i0 on, k from k0 to k0 + ks, as dst[words][width]. width % 4 == 0.
template <class T, class S = T>
inline void pack_panel(const Matrix<S>& source, int64_t i0, int count, int64_t k0, int64_t ks, int width, word_t<T>* dst) {
    constexpr int KS = Word<T>::ks;
    const int64_t words = words_of<T>(ks);
    const S* base = source.data + i0 * source.stride + k0 * source.stride_k;
    if (source.stride_k == 1 && ks > 1) {
        for (int64_t w = 0; w < words; w += VL) {
            const int deep = int(std::min<int64_t>(VL, words - w));
            for (int group = 0; group < width; group += VL) {
                vf rows[VL];
                for (int i = 0; i < VL; i++)
                    rows[i] = group + i < count ? row_words<T>(base + (group + i) * source.stride + w * KS, ks - w * KS) : vf{};
                transpose(rows);
                float* out = reinterpret_cast<float*>(dst) + w * width + group;
                if (group + VL <= width)
                    for (int j = 0; j < deep; j++) store(out + j * width, rows[j]);
                else
                    for (int j = 0; j < deep; j++) store_part(out + j * width, rows[j], width - group);
            }
        }
    } else if (source.stride == 1 || count == 1) {
        for (int64_t w = 0; w < words; w++) {
            const S* row = base + w * KS * source.stride_k;
            const S* next = KS > 1 && w * KS + 1 < ks ? row + source.stride_k : nullptr;
            float* out = reinterpret_cast<float*>(dst) + w * width;
            for (int group = 0; group < width; group += VL) {
                const int here = w * KS < ks ? std::min(VL, count - group) : 0, room = std::min(VL, width - group);
                const vf x = here > 0 ? column_words<T>(row + group, next ? next + group : nullptr, here) : vf{};
                store(out + group, x, room);
            }
        }
    } else {
        for (int64_t w = 0; w < words; w++)
            for (int i = 0; i < width; i++)
                dst[w * width + i] =
                    i < count && w * KS < ks ? one_word<T>(base + i * source.stride + w * KS * source.stride_k, source.stride_k,
                        ks - w * KS) : word_t<T>{};
    }
}

// B [K, N] in panels of NR columns; the last panel has only as many vectors as it needs. `source(n, k)` is a Matrix over columns n.
template <class T>
class Packed {
  public:
    Packed(int64_t K, int64_t N) : K(K), N(N), words(words_of<T>(K)), room_(words * round_up(N, VL)) {}
    const int64_t K, N, words;

    int64_t panels() const { return ceil_div(N, NR); }
    int width(int64_t panel) const { return int(std::min<int64_t>(NR, round_up(N - panel * NR, VL))); }
    int columns(int64_t panel) const { return int(std::min<int64_t>(NR, N - panel * NR)); }
    const word_t<T>* panel(int64_t p) const { return room_ + p * words * NR; }
    word_t<T>* panel(int64_t p) { return room_.data() + p * words * NR; }

    template <class S = T>
    void pack(const Matrix<S>& source, int threads) {
        parallel(panels(), threads, [&](int64_t p, int) { pack_panel<T>(source, p * NR, columns(p), 0, K, width(p), panel(p)); });
    }

  private:
    Buffer<word_t<T>> room_;
};

// --- the product -------------------------------------------------------------------------------------------------------------------

// Rows of A per block: as many as fit in the L2 cache.
template <class T>
inline int64_t block_rows(int64_t M, int64_t K) {
    const int64_t deep = std::max<int64_t>(1, words_of<T>(K));
    const int64_t rows = std::max<int64_t>(MR, A_BLOCK_WORDS / deep / MR * MR);
    return std::min(std::min<int64_t>(rows, 192), round_up(M, MR));
}

// At most that many, balanced so that all threads get the same number of blocks. Results don't depend on it, since a row's sums don't.
template <class T>
inline int64_t even_block_rows(int64_t M, int64_t K, int threads) {
    const int64_t most = block_rows<T>(M, K), blocks = std::max<int64_t>(1, threads * ceil_div(M, most * threads));
    return std::max<int64_t>(MR, std::min(most, round_up(ceil_div(M, blocks), MR)));
}

// A thread's workspace for one block of A: its words and the sums of C.
template <class T>
struct BlockRoom {
    BlockRoom(int64_t M, int64_t K, int threads)
        : rows(even_block_rows<T>(M, K, threads)), a_words(rows * words_of<T>(K)), a(a_words * threads), c(rows * NR * threads) {}
    const int64_t rows, a_words;
    Buffer<word_t<T>> a;
    Buffer<float> c;
    word_t<T>* a_of(int thread) { return a.data() + a_words * thread; }
    float* c_of(int thread) { return c.data() + rows * NR * thread; }
};

// Multiplies a block of up to room.rows packed rows (a, panels of MR) by panels [first, last) of b, and calls store(row in block, n, count,
// values).
template <class T, class Store>
inline void block_product(
    int64_t rows, const word_t<T>* a, const Packed<T>& b, int64_t first, int64_t last, float* c, const Store& store
) {
    for (int64_t p = first; p < last; p++) {
        const int width = b.width(p), columns = b.columns(p);
        for (int64_t k = 0; k == 0 || k < b.words; k += CHAIN<word_t<T>>) {
            const int64_t deep = std::min(CHAIN<word_t<T>>, b.words - k);
            micro_rows(width / VL, rows, deep, a + k * MR, b.words, b.panel(p) + k * width, width, c, NR, k > 0);
        }
        for (int64_t m = 0; m < rows; m++) store(m, p * NR, columns, c + m * NR);
    }
}

template <class T>
inline void store_tile(word_t<T>* dst, const vf (&rows)[VL]) {
    for (int i = 0; i < VL; i++) store(reinterpret_cast<float*>(dst) + i * VL, rows[i]);
}

// Packs values k0 .. k0 + ks of rows [m0, m0 + count) into panels of A with a total depth of `words`; k0 is a multiple of a word.
// `row(m)` points to value 0 of the row. VL rows at a time, the size of a transposition.
template <class T, class Row>
inline void pack_rows(const Row& row, int64_t m0, int64_t count, int64_t k0, int64_t ks, int64_t words, word_t<T>* dst) {
    constexpr int KS = Word<T>::ks;
    for (int64_t m = 0; m < count; m += VL) {
        decltype(row(m0)) p[VL];
        const int here = int(std::min<int64_t>(VL, count - m));
        for (int i = 0; i < here; i++) p[i] = row(m0 + m + i) + k0;
        for (int64_t k = 0; k < ks; k += VL * KS) {
            const int deep = int(std::min<int64_t>(VL, ceil_div(ks - k, KS)));
            vf values[VL];
            for (int i = 0; i < VL; i++) values[i] = i < here ? row_words<T>(p[i] + k, ks - k) : vf{};
            if constexpr (IN_TILES<T>) {
                store_tile<T>(dst + m * words + (k0 + k) / KS * MR, values);
                continue;
            }
            transpose(values);
            for (int h = 0; h < here; h += MR) {
                word_t<T>* out = dst + (m + h) * words + (k0 + k) / KS * MR;
                for (int j = 0; j < deep; j++) std::memcpy(out + j * MR, reinterpret_cast<const float*>(values + j) + h, MR * 4);
            }
        }
    }
}
template <class T, class Row>
inline void pack_rows(const Row& row, int64_t m0, int64_t count, int64_t K, word_t<T>* dst) {
    pack_rows<T>(row, m0, count, 0, K, words_of<T>(K), dst);
}

// Packs columns [n0, n0 + count) of rows [r0, r0 + rows) into panels of A, with the rows along k.
template <class T, class Row>
inline void pack_columns(const Row& row, int64_t r0, int64_t rows, int64_t n0, int64_t count, word_t<T>* dst) {
    constexpr int KS = Word<T>::ks;
    const int64_t words = words_of<T>(rows), wide = round_up(count, MR);
    if constexpr (IN_TILES<T>) {
        for (int64_t n = 0; n < count; n += MR)
            for (int64_t w = 0; w < words; w += VL) {
                vf lanes[VL];
                for (int i = 0; i < VL; i++) {
                    const int64_t r = (w + i) * KS;
                    const auto* p = r < rows ? row(r0 + r) + n0 + n : nullptr;
                    const auto* next = r + 1 < rows ? row(r0 + r + 1) + n0 + n : nullptr;
                    lanes[i] = p ? column_words<T>(p, next, int(std::min<int64_t>(VL, count - n))) : vf{};
                }
                transpose(lanes);
                store_tile<T>(dst + n * words + w * MR, lanes);
            }
        return;
    }
    // A few columns at a time, so that all panels are filled in parallel.
    constexpr int64_t STEP = 2 * VL * KS;
    for (int64_t n1 = 0; n1 < wide; n1 += STEP)
        for (int64_t w = 0; w < words; w++) {
            const auto* p = row(r0 + w * KS) + n0;
            const auto* next = KS > 1 && w * KS + 1 < rows ? row(r0 + w * KS + 1) + n0 : nullptr;
            for (int64_t n = n1; n < std::min(wide, n1 + STEP); n += VL) {
                const vf x = column_words<T>(p + n, next ? next + n : nullptr, int(std::min<int64_t>(VL, count - n)));
                for (int64_t h = 0; h < VL && n + h < wide; h += MR)
                    std::memcpy(dst + (n + h) * words + w * MR, reinterpret_cast<const float*>(&x) + h, MR * 4);
            }
        }
}

// A panel [words][MR] -> tiles, in place.
template <class T>
inline void turn_tiles(word_t<T>* panel, int64_t words) {
    for (int64_t w = 0; w < words; w += VL) {
        vf lanes[VL];
        for (int i = 0; i < VL; i++) lanes[i] = load_words(panel + (w + i) * VL);
        transpose(lanes);
        store_tile<T>(panel + w * VL, lanes);
    }
}

// `rows` rows of A as panels of MR.
template <class T, class S = T>
inline void pack_block(const Matrix<S>& a, int64_t m0, int64_t rows, int64_t K, word_t<T>* dst) {
    if (a.stride_k == 1) return pack_rows<T>([&](int64_t m) { return a.data + m * a.stride; }, m0, rows, K, dst);
    if (a.stride == 1) return pack_columns<T>([&](int64_t k) { return a.data + k * a.stride_k; }, 0, K, m0, rows, dst);
    const int64_t words = words_of<T>(K);
    for (int64_t m = 0; m < rows; m += MR) {
        pack_panel<T>(a, m0 + m, int(std::min<int64_t>(MR, rows - m)), 0, K, MR, dst + m * words);
        if constexpr (IN_TILES<T>) turn_tiles<T>(dst + m * words, words);
    }
}

// The full product. fill(m0, rows, words) packs or computes rows of A.
template <class T, class Fill, class Store>
inline void gemm_with(int64_t M, const Packed<T>& b, const Fill& fill, const Store& store, int threads) {
    if (M == 0 || b.N == 0) return;
    BlockRoom<T> room(M, b.K, threads);
    const int64_t blocks = ceil_div(M, room.rows);
    // With few blocks of rows, columns are distributed over threads too, and each group packs its rows again.
    const int64_t groups = blocks >= 2 * threads ? 1 : std::min<int64_t>(b.panels(), ceil_div(2 * threads, blocks));
    parallel(blocks * groups, threads, [&](int64_t task, int thread) {
        const int64_t m0 = task / groups * room.rows, group = task % groups;
        const int64_t rows = std::min(room.rows, M - m0);
        word_t<T>* a = room.a_of(thread);
        fill(m0, rows, a);
        block_product<T>(
            rows, a, b, b.panels() * group / groups, b.panels() * (group + 1) / groups, room.c_of(thread),
            [&](int64_t m, int64_t n, int count, float* values) { store(m0 + m, n, count, values); }
        );
    });
}

template <class T, class S = T, class Store>
inline void gemm(int64_t M, const Matrix<S>& a, const Packed<T>& b, const Store& store, int threads) {
    gemm_with<T>(M, b, [&](int64_t m0, int64_t rows, word_t<T>* dst) { pack_block<T>(a, m0, rows, b.K, dst); }, store, threads);
}

}  // namespace ov3
