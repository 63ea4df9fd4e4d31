// Attention whose scores never leave the caches.
//
// Scores are computed transposed, keys x queries: the softmax then runs down the rows with one query per lane, and nothing is ever summed across
// lanes. Two consecutive rows interleaved into words are the first operand of P V and of dS K; a single row, whose words are pairs of queries,
// is the first operand of P^T dO and of dS^T Q. So no matrix of probabilities is transposed, and all results are produced row by row.
#include <algorithm>
#include <limits>

#include "export.h"
#include "gemm.h"
#include "math.h"

using namespace ov3;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double LN_2 = 0.693147180559945309, LOG2_E_EXACT = 1.44269504088896341;

// Block sizes in the forward. The products of KEYS probabilities are accumulated in one chain; float32 uses shorter ones for precision.
template <class T>
constexpr int KEYS = sizeof(T) == 2 ? 256 : 128;
constexpr int FORWARD_VECTORS = 2;
// Block sizes in the backward.
constexpr int BACK_KEYS = 128;
constexpr int BACK_QUERIES = 128;
constexpr int BACK_VECTORS = 2;

// [B, N, H, D] with any strides, except that the last axis is contiguous.
template <class T>
struct View {
    T* data;
    int64_t batch, row, head;
    T* of(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

struct Sizes {
    int64_t B, H, Nq, Nk, D;
    bool causal;
    int64_t prefix;
    // Query i sees keys [0, limit(i)); limits are nondecreasing.
    int64_t limit(int64_t i) const { return causal ? std::max(i + 1 + Nk - Nq, prefix) : Nk; }
    int64_t lanes() const { return round_up(D, VL); }
};

// Workspace of one thread, allocated in full cache lines.
class Room {
  public:
    explicit Room(float* base = nullptr) : base_(base) {}
    template <class W>
    W* take(int64_t count) {
        static_assert(sizeof(W) == 4, "room is counted in words of 4 bytes");
        W* taken = reinterpret_cast<W*>(base_ + used_);
        used_ += round_up(count, 16);
        return taken;
    }
    int64_t used() const { return used_; }

  private:
    float* base_;
    int64_t used_ = 0;
};

// --- products ----------------------------------------------------------------------------------------------------------------------

// MR rows of A B over `words` of D, accumulated in short chains for precision.
template <int NV, class W>
inline void score_block(int64_t words, const W* a, const W* b, float* c) {
    constexpr int64_t CHAINED = 128;
    for (int64_t w = 0; w == 0 || w < words; w += CHAINED)
        micro_block<NV, 1, MR>(std::min(CHAINED, words - w), a + w * MR, b + w * NV * VL, NV * VL, c, NV * VL, w > 0);
}

// Calls body(d0, vectors) for panels of up to VECTORS vectors, of nearly equal size, that cover D.
template <class Body>
inline void for_panels(int64_t D, const Body& body) {
    const int64_t vectors = ceil_div(D, VL), panels = ceil_div(vectors, VECTORS);
    for (int64_t p = 0; p < panels; p++) {
        const int64_t first = vectors * p / panels, last = vectors * (p + 1) / panels;
        body(first * VL, int(last - first));
    }
}

// x [n, D] as the second operand of a product over rows: panels of columns, each [words][width], the one starting at d0 at dst + d0 * words.
template <class T>
inline void pack_columns(const T* x, int64_t stride, int64_t n, int64_t D, word_t<T>* dst) {
    const int64_t words = words_of<T>(n);
    for_panels(D, [&](int64_t d0, int vectors) {
        const int width = vectors * VL;
        pack_panel<T>({x, 1, stride}, d0, int(std::min<int64_t>(width, D - d0)), 0, n, width, dst + d0 * words);
    });
}

// count <= FEW rows of x [.., D] as lanes of a panel [words of D][width]; the other `lanes` become 0. The remainder of 17 or 197 tokens
// isn't worth a transposition.
constexpr int FEW = 3;
template <class T>
inline void pack_few(const T* x, int64_t stride, int count, int64_t D, int lanes, int width, word_t<T>* dst) {
    constexpr int KS = Word<T>::ks;
    const int64_t words = words_of<T>(D);
    for (int64_t w = 0; w < words; w++) store(reinterpret_cast<float*>(dst) + w * width, vf{}, lanes);
    for (int i = 0; i < count; i++)
        for (int64_t w = 0; w < words; w += VL) {
            float row[VL];
            store(row, row_words<T>(x + i * stride + w * KS, D - w * KS));
            const int deep = int(std::min<int64_t>(VL, words - w));
            for (int j = 0; j < deep; j++) std::memcpy(dst + (w + j) * width + i, row + j, sizeof(float));
        }
}

// x [n, D] as the first operand of a product over D: panels [words of D][MR rows], the last one padded with zeros.
template <class T>
inline void pack_rows(const T* x, int64_t stride, int64_t n, int64_t D, word_t<T>* dst) {
    const int64_t few = !IN_TILES<T> && n % VL <= FEW ? n % VL : 0, most = n - few;
    ov3::pack_rows<T>([&](int64_t i) { return x + i * stride; }, 0, most, D, dst);
    if (few) pack_few(x + most * stride, stride, int(few), D, MR, MR, dst + most * words_of<T>(D));
}

// n rows of x [.., D] as the second operand of a product over D: one panel [words of D][n rounded up to full vectors].
template <class T>
inline void pack_lanes(const T* x, int64_t stride, int64_t n, int64_t D, word_t<T>* dst) {
    constexpr int KS = Word<T>::ks;
    const int64_t words = words_of<T>(D);
    const int width = int(round_up(n, VL));
    for (int64_t i0 = 0; i0 < n; i0 += VL) {
        const int count = int(std::min<int64_t>(VL, n - i0));
        if (count <= FEW) {
            pack_few(x + i0 * stride, stride, count, D, VL, width, dst + i0);
            return;
        }
        for (int64_t w = 0; w < words; w += VL) {
            vf rows[VL];
            for (int i = 0; i < VL; i++) rows[i] = i < count ? row_words<T>(x + (i0 + i) * stride + w * KS, D - w * KS) : vf{};
            transpose(rows);
            const int deep = int(std::min<int64_t>(VL, words - w));
            for (int j = 0; j < deep; j++) store(reinterpret_cast<float*>(dst) + (w + j) * width + i0, rows[j]);
        }
    }
}

// Two rows (the second is used only if a word holds two values) as the words of VL columns.
template <class T>
inline vf weave(vf first, vf second) {
#if defined(__AVX512BF16__)
    if constexpr (Word<T>::ks == 2) {
        alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512bh both = _mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first));
        return bit_cast<vf>(_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), bit_cast<__m512i>(both)));
    }
#endif
    (void)second;
    return first;
}

// The lane-wise sum of the values in a vector of words.
template <class T>
inline vf unwoven_sum(vf words) {
    if constexpr (Word<T>::ks == 2) {
        const vi bits = bit_cast<vi>(words);
        return bit_cast<vf>(bits << 16) + bit_cast<vf>(bits & int32_t(0xffff0000));
    }
    return words;
}

// The values that make up a row of words.
template <class T>
using part_t = std::conditional_t<Word<T>::ks == 2, bf16, float>;

// 2^(score * factor - shift) for exponents that are at most slightly above 0. In float32 the rounding of factor and shift matters and is corrected with
// factor.error, the factor's relative error, and `low`, shift * factor.error minus the rounding error of shift. The exponent is clamped first, since
// an infinite score times the error would be NaN.
struct Factor {
    explicit Factor(double exact) : value(float(exact)), error(value == 0.0f ? 0.0f : float((exact - value) / value)) {}
    float value, error;
};
template <class T>
inline vf power(vf score, const Factor& factor, vf shift, vf low) {
    vf x = max(score * factor.value - shift, splat(-150.0f));
    if (sizeof(T) == 4) x += x * factor.error + low;
    const vf n = round_to_integer(x), f = x - n;
    return scale_by_power((sizeof(T) == 2 ? polynomial(f, EXP2_SHORT) : polynomial(f, EXP2)) * f + 1.0f, n);
}

// VL lanes as the first operand of a product: their words, of which the first `words` exist, become tiles.
template <class T>
inline void turn_lanes(word_t<T>* lanes, int64_t words) {
    if constexpr (IN_TILES<T>) {
        const int64_t whole = round_up(words, Word<T>::whole);
        std::memset(lanes + words * VL, 0, (whole - words) * VL * sizeof(word_t<T>));
        turn_tiles<T>(lanes, whole);
    }
}

inline vi visible(int64_t key, vi limits) { return (int32_t(key) - vi{}) < limits; }

// --- forward -----------------------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
    typedef word_t<T> W;
    static constexpr int KS = Word<T>::ks, QUERIES = FORWARD_VECTORS * VL, KEY_WORDS = KEYS<T> / KS;

    Forward(const Sizes& sizes, double scale, Room room)
        : sizes(sizes), factor(scale * LOG2_E_EXACT), k(room.take<W>(round_up(sizes.Nk, MR) * words_of<T>(sizes.D))),
          v(room.take<W>(words_of<T>(sizes.Nk) * sizes.lanes())), q(room.take<W>(words_of<T>(sizes.D) * QUERIES)),
          p(room.take<W>(KEY_WORDS * QUERIES)), s(room.take<float>(KEYS<T> * QUERIES)), o(room.take<float>(QUERIES * sizes.lanes())),
          used(room.used()) {}

    const Sizes& sizes;
    const Factor factor;
    W *const k, *const v, *const q, *const p;
    float *const s, *const o;
    const int64_t used;

    void pack(const T* key, int64_t k_stride, const T* value, int64_t v_stride) {
        pack_rows(key, k_stride, sizes.Nk, sizes.D, k);
        pack_columns(value, v_stride, sizes.Nk, sizes.D, v);
    }

    // In place: scores times the factor, -inf where masked.
    template <int NV>
    void mask(int64_t i0, int64_t n, int64_t k0, int64_t nk) {
        int32_t limits[NV * VL] = {};
        for (int64_t i = 0; i < n; i++) limits[i] = int32_t(sizes.limit(i0 + i));
        for (int j = 0; j < NV; j++) {
            vi limit;
            std::memcpy(&limit, limits + j * VL, sizeof limit);
            for (int64_t r = 0; r < nk; r++) {
                float* at = s + r * NV * VL + j * VL;
                store(at, visible(k0 + r, limit) ? load(at) * factor.value : splat(-INF));
            }
        }
    }

    // Queries [i0, i0 + n), n <= NV * VL.
    template <int NV>
    void block(const T* query, int64_t q_stride, int64_t i0, int64_t n, T* out, int64_t out_stride, float* lse) {
        constexpr int LANES = NV * VL;
        const int64_t D = sizes.D, words = words_of<T>(D), ldo = sizes.lanes();
        const int64_t all_see = sizes.limit(i0), seen = sizes.limit(i0 + n - 1);
        pack_lanes(query + i0 * q_stride, q_stride, n, D, q);
        vf m_i[NV], l_i[NV];
        for (int j = 0; j < NV; j++) m_i[j] = splat(-INF), l_i[j] = vf{};
        for (int64_t k0 = 0; k0 < seen; k0 += KEYS<T>) {
            const int64_t nk = std::min<int64_t>(KEYS<T>, seen - k0);
            for (int64_t r = 0; r < nk; r += MR) score_block<NV>(words, k + (k0 + r) * words, q, s + r * LANES);
            const bool masked = k0 + nk > all_see || !(factor.value > 0);
            if (masked) mask<NV>(i0, n, k0, nk);
            softmax<NV>(nk, masked ? Factor(1) : factor, k0 > 0, n, m_i, l_i);
            for (int j = 0; j < NV; j++) turn_lanes<T>(p + j * KEY_WORDS * VL, ceil_div(nk, KS));
            for_panels(D, [&](int64_t d0, int vectors) {
                const W* values = v + d0 * words_of<T>(sizes.Nk) + k0 / KS * vectors * VL;
                for (int64_t m = 0; m < n; m += MR)
                    micro<1, VL>(
                        vectors, words_of<T>(nk), p + m / VL * KEY_WORDS * VL + m % VL, values, vectors * VL, o + m * ldo + d0, ldo, k0 > 0
                    );
            });
        }
        finish<NV>(i0, n, m_i, l_i, out, out_stride, lse);
    }

    // Probabilities of a block of scores, relative to the running maximum; earlier results are rescaled by alpha.
    template <int NV>
    void softmax(int64_t nk, const Factor& scale, bool later, int64_t n, vf (&m_i)[NV], vf (&l_i)[NV]) {
        constexpr int LANES = NV * VL;
        vf m_block[NV], shift[NV], low[NV], sums[NV];
        for (int j = 0; j < NV; j++) m_block[j] = splat(-INF), sums[j] = vf{};
        vf others[NV];
        for (int j = 0; j < NV; j++) others[j] = m_block[j];
        int64_t row = 0;
        for (; row + 2 <= nk; row += 2)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                m_block[j] = max(m_block[j], load(s + row * LANES + j * VL));
                others[j] = max(others[j], load(s + (row + 1) * LANES + j * VL));
            }
        for (int j = 0; j < NV; j++) {
            if (row < nk) m_block[j] = max(m_block[j], load(s + row * LANES + j * VL));
            m_block[j] = max(m_block[j], others[j]);
        }
        float alpha[LANES];
        bool rescale = false;
        for (int j = 0; j < NV; j++) {
            const vf before = m_i[j];
            m_i[j] = max(before, m_block[j] * scale.value);
            shift[j] = (m_i[j] == -INF) ? vf{} : m_i[j];
            low[j] = shift[j] * scale.error;
            const vf alpha_j = exp2(before - shift[j]);
            l_i[j] *= alpha_j;
            store(alpha + j * VL, alpha_j);
        }
        for (int64_t r = 0; r < nk; r += KS) {
            const bool last = KS == 2 && r + 1 == nk;
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                const float* at = s + r * LANES + j * VL;
                const vf first = power<T>(load(at), scale, shift[j], low[j]);
                vf second = {};
                if (KS == 2 && !last) second = power<T>(load(at + LANES), scale, shift[j], low[j]);
                sums[j] += first + second;
                store(reinterpret_cast<float*>(p) + (j * KEY_WORDS + r / KS) * VL, weave<T>(first, second));
            }
        }
        for (int j = 0; j < NV; j++) l_i[j] += sums[j];
        if (!later) return;
        for (int64_t m = 0; m < n; m++) rescale |= alpha[m] != 1.0f;
        if (!rescale) return;
        for (int64_t m = 0; m < n; m++)
            for (int64_t d = 0; d < sizes.lanes(); d += VL) store(o + m * sizes.lanes() + d, load(o + m * sizes.lanes() + d) * alpha[m]);
    }

    template <int NV>
    void finish(int64_t i0, int64_t n, const vf (&m_i)[NV], const vf (&l_i)[NV], T* out, int64_t out_stride, float* lse) {
        float sums[NV * VL], logs[NV * VL], m_all[NV * VL];
        for (int j = 0; j < NV; j++) {
            const vf sum = l_i[j], value = log(sum);
            store(logs + j * VL, (sum == 0.0f) ? splat(-INF) : (m_i[j] == INF) ? m_i[j] : (sum == sum) ? value : sum);
            store(sums + j * VL, sum);
            store(m_all + j * VL, (sum == 0.0f) ? vf{} : m_i[j]);
        }
        for (int64_t m = 0; m < n; m++) {
            const bool blind = sizes.limit(i0 + m) <= 0;
            T* row = out + (i0 + m) * out_stride;
            const float inverse = 1.0f / sums[m];
            for_vectors(sizes.D, [&](int64_t d, int lanes) {
                store(row + d, blind ? vf{} : load(o + m * sizes.lanes() + d) * inverse, lanes);
            });
            lse[i0 + m] = blind ? -INF : float(m_all[m] * LN_2 + logs[m]);
        }
    }

    void queries(const T* query, int64_t q_stride, int64_t first, int64_t last, T* out, int64_t out_stride, float* lse) {
        for (int64_t i0 = first; i0 < last; i0 += QUERIES) {
            const int64_t n = std::min<int64_t>(QUERIES, last - i0);
            switch (ceil_div(n, VL)) {
                case 1: block<1>(query, q_stride, i0, n, out, out_stride, lse); break;
                case 2: block<2>(query, q_stride, i0, n, out, out_stride, lse); break;
                default: block<FORWARD_VECTORS>(query, q_stride, i0, n, out, out_stride, lse);
            }
        }
    }
};

// For a single query, such as a decoder's next token, packing the keys would not pay off. `room` holds Nk floats, rounded up to full vectors.
template <class T>
struct OneQuery {
    const int64_t D, seen;
    const Factor factor;
    float* const room;

    // Unscaled; the last key's score is repeated as padding.
    void scores(const T* query, const T* key, int64_t stride) {
        for (int64_t j = 0; j < seen; j += VL) {
            vf dots[VL];
            for (int r = 0; r < VL; r++) {
                const T* row = key + std::min(j + r, seen - 1) * stride;
                vf dot = {};
                for_vectors(D, [&](int64_t d, int lanes) { dot += load(query + d, lanes) * load(row + d, lanes); });
                dots[r] = dot;
            }
            transpose(dots);
            for (int half = VL / 2; half; half /= 2)
                for (int r = 0; r < half; r++) dots[r] += dots[r + half];
            store(room + j, dots[0]);
        }
    }

    // Unnormalised probabilities; returns their sum, and the scores' maximum in m_i.
    float softmax(float& m_i) {
        vf m_lanes = splat(-INF), l_i = {};
        for (int64_t j = 0; j < seen; j += VL) m_lanes = max(m_lanes, load(room + j) * factor.value);
        m_i = reduce_max(m_lanes);
        const vf shift = splat(m_i == -INF ? 0.0f : m_i), low = shift * factor.error;
        for (int64_t j = 0; j < seen; j += VL) {
            const vf p = first_lanes(power<T>(load(room + j), factor, shift, low), int(std::min<int64_t>(VL, seen - j)));
            store(room + j, p);
            l_i += p;
        }
        return sum(l_i);
    }

    void average(const T* value, int64_t stride, float inverse, T* out) {
        constexpr int WIDE = 4, CHAINED = 128;
        for (int64_t d0 = 0; d0 < D; d0 += WIDE * VL) {
            const int vectors = int(ceil_div(std::min<int64_t>(WIDE * VL, D - d0), VL));
            const int last = int(D - d0 - (vectors - 1) * VL);
            vf total[WIDE] = {};
            for (int64_t j0 = 0; j0 < seen; j0 += CHAINED) {
                vf chain[WIDE] = {};
                for (int64_t j = j0; j < std::min(seen, j0 + CHAINED); j++)
                    for (int v = 0; v < vectors; v++)
                        chain[v] += room[j] * load(value + j * stride + d0 + v * VL, v + 1 < vectors ? VL : std::min(VL, last));
                for (int v = 0; v < WIDE; v++) total[v] += chain[v];
            }
            for (int v = 0; v < vectors; v++)
                store(out + d0 + v * VL, total[v] * inverse, v + 1 < vectors ? VL : std::min(VL, last));
        }
    }

    void run(const T* query, const T* key, int64_t k_stride, const T* value, int64_t v_stride, T* out, float* lse) {
        if (seen <= 0) {
            std::memset(static_cast<void*>(out), 0, D * sizeof(T));
            *lse = -INF;
            return;
        }
        scores(query, key, k_stride);
        float m_i;
        const float l_i = softmax(m_i);
        average(value, v_stride, 1.0f / l_i, out);
        const bool plain = l_i == l_i && l_i != 0.0f && m_i != INF;
        *lse = plain ? float(m_i * LN_2 + std::log(double(l_i))) : m_i == INF ? INF : l_i == 0.0f ? -INF : l_i;
    }
};

}  // namespace

// q [B, Nq, H, D], k, v [B, Nk, H, D] -> out [B, Nq, H, D], lse [B, H, Nq] float, both contiguous.
template <class T>
void flash_attention_forward(
    const T* q_data, int64_t q_batch, int64_t q_row, int64_t q_head, const T* k_data, int64_t k_batch, int64_t k_row, int64_t k_head,
    const T* v_data, int64_t v_batch, int64_t v_row, int64_t v_head, T* out, float* lse, int64_t B, int64_t H, int64_t Nq, int64_t Nk,
    int64_t D, bool causal, int64_t prefix, double scale, int threads
) {
    const View<const T> q{q_data, q_batch, q_row, q_head}, k{k_data, k_batch, k_row, k_head}, v{v_data, v_batch, v_row, v_head};
    const Sizes sizes{B, H, Nq, Nk, D, causal, prefix};
    const int64_t heads = B * H, room = Forward<T>(sizes, scale, Room()).used;
    if (Nq == 1) {
        const int64_t length = round_up(sizes.Nk, 16);
        Buffer<float> rooms(length * threads);
        return parallel(heads, threads, [&](int64_t head, int thread) {
            const int64_t b = head / H, h = head % H;
            OneQuery<T> work{D, sizes.limit(0), Factor(scale * LOG2_E_EXACT), rooms + length * thread};
            work.run(q.of(b, h), k.of(b, h), k.row, v.of(b, h), v.row, out + head * D, lse + head);
        });
    }
    constexpr int64_t QUERIES = Forward<T>::QUERIES;
    // With few heads, queries are distributed over threads too. A query's result does not depend on its group.
    const int64_t blocks = ceil_div(Nq, QUERIES);
    if (heads == 0 || blocks == 0) return;
    const int64_t groups = heads >= 4 * threads || threads == 1 ? 1 : std::min<int64_t>(blocks, ceil_div(4 * threads, heads));
    Buffer<float> rooms(room * threads);
    parallel(heads * groups, threads, [&](int64_t task, int thread) {
        const int64_t head = task / groups, group = task % groups, b = head / H, h = head % H;
        Forward<T> work(sizes, scale, Room(rooms + room * thread));
        work.pack(k.of(b, h), k.row, v.of(b, h), v.row);
        const int64_t first = blocks * group / groups * QUERIES, last = std::min(Nq, blocks * (group + 1) / groups * QUERIES);
        work.queries(q.of(b, h), q.row, first, last, out + (b * Nq * H + h) * D, H * D, lse + head * Nq);
    });
}
OV3_EXPORT(flash_attention_forward)

namespace {

// --- backward ----------------------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
    typedef word_t<T> W;
    static constexpr int KS = Word<T>::ks, QUERY_WORDS = BACK_QUERIES / KS, KEY_WORDS = BACK_KEYS / KS, LANES = BACK_VECTORS * VL;
    static_assert(BACK_QUERIES % LANES == 0 && BACK_KEYS % VL == 0, "whole panels");

    Backward(const Sizes& sizes, double scale, Room room)
        : sizes(sizes), scale(float(scale)), factor(scale * LOG2_E_EXACT), D(sizes.D), words(words_of<T>(D)), ldc(sizes.lanes()),
          key_rows(round_up(sizes.Nk, MR)), k_rows(room.take<W>(key_rows * words)), v_rows(room.take<W>(key_rows * words)),
          k_columns(room.take<W>(words_of<T>(sizes.Nk) * ldc)), q_lanes(room.take<W>(words * BACK_QUERIES)),
          g_lanes(room.take<W>(words * BACK_QUERIES)), q_columns(room.take<W>(QUERY_WORDS * ldc)),
          g_columns(room.take<W>(QUERY_WORDS * ldc)), p(room.take<W>(BACK_KEYS * QUERY_WORDS)), ds(room.take<W>(BACK_KEYS * QUERY_WORDS)),
          ds_woven(room.take<W>(KEY_WORDS * BACK_QUERIES)), s(room.take<float>(BACK_KEYS * LANES)), dp(room.take<float>(BACK_KEYS * LANES)),
          dq(room.take<float>(BACK_QUERIES * ldc)), dk(room.take<float>(key_rows * ldc)), dv(room.take<float>(key_rows * ldc)),
          lse2(room.take<float>(BACK_QUERIES)), lse2_low(room.take<float>(BACK_QUERIES)), delta(room.take<float>(BACK_QUERIES)),
          excess(room.take<float>(BACK_QUERIES)), mean(room.take<float>(ldc)), limits(room.take<int32_t>(BACK_QUERIES)),
          used(room.used()) {}

    const Sizes& sizes;
    const float scale;
    const Factor factor;
    const int64_t D, words, ldc, key_rows;
    W *const k_rows, *const v_rows, *const k_columns, *const q_lanes, *const g_lanes, *const q_columns, *const g_columns;
    W *const p, *const ds, *const ds_woven;
    float *const s, *const dp, *const dq, *const dk, *const dv, *const lse2, *const lse2_low, *const delta, *const excess, *const mean;
    int32_t* const limits;
    const int64_t used;

    bool one_block() const { return sizes.Nk <= BACK_KEYS; }

    void keys(const T* key, int64_t k_stride, const T* value, int64_t v_stride) {
        pack_rows(key, k_stride, sizes.Nk, D, k_rows);
        pack_rows(value, v_stride, sizes.Nk, D, v_rows);
        pack_columns(key, k_stride, sizes.Nk, D, k_columns);
        if (!one_block()) mean_of(key, k_stride);
        std::memset(dk, 0, key_rows * ldc * sizeof(float));
        std::memset(dv, 0, key_rows * ldc * sizeof(float));
    }

    // Mean over the first block of keys.
    void mean_of(const T* key, int64_t stride) {
        for_vectors(D, [&](int64_t d, int lanes) {
            vf total = {};
            for (int64_t j = 0; j < BACK_KEYS; j++) total += load(key + j * stride + d, lanes);
            store(mean + d, total * (1.0f / BACK_KEYS), lanes);
        });
    }

    // A row of dS sums to 0, so a common offset of the keys does not contribute to dq; but delta has the rounding of `out`, and dS its own. This
    // subtracts the excess of the sum times the mean key.
    void without_excess(int64_t n) {
        for (int64_t i = 0; i < n; i++)
            for_vectors(D, [&](int64_t d, int lanes) {
                float* at = dq + i * ldc + d;
                store(at, load(at, lanes) - excess[i] * load(mean + d, lanes), lanes);
            });
    }

    // Queries [i0, i0 + n), n <= BACK_QUERIES; pointers are to the first of them.
    void queries(int64_t i0, int64_t n, const T* query, int64_t q_stride, const T* grad, int64_t g_stride, const T* out, int64_t out_stride,
                 const float* lse) {
        pack_columns(query, q_stride, n, D, q_columns);
        pack_columns(grad, g_stride, n, D, g_columns);
        for (int64_t i = 0; i < n; i += LANES) {
            const int64_t count = std::min<int64_t>(LANES, n - i);
            pack_lanes(query + i * q_stride, q_stride, count, D, q_lanes + i * words);
            pack_lanes(grad + i * g_stride, g_stride, count, D, g_lanes + i * words);
        }
        for (int64_t i = 0; i < n; i++) {
            if (!one_block()) {
                vf total = {};
                for_vectors(D, [&](int64_t d, int lanes) {
                    total += load(grad + i * g_stride + d, lanes) * load(out + i * out_stride + d, lanes);
                });
                delta[i] = sum(total);
            }
            const double exact = lse[i] * LOG2_E_EXACT;
            lse2[i] = float(exact);
            lse2_low[i] = std::isfinite(lse[i]) ? float(exact * factor.error - (exact - lse2[i])) : 0.0f;
            limits[i] = int32_t(std::max<int64_t>(0, sizes.limit(i0 + i)));
        }
        for (int64_t i = n; i < round_up(n, VL); i++) lse2[i] = lse2_low[i] = delta[i] = 0.0f, limits[i] = 0;
    }

    // The softmax's per-query data for NV vectors of queries.
    template <int NV>
    struct Lanes {
        vf shift[NV], low[NV], delta[NV], sum[NV], inverse[NV], excess[NV];
        vi limit[NV];
    };

    // P^T and dS^T of keys [k0, k0 + nk) and NV vectors of queries from i on, into p, ds and ds_woven.
    template <int NV>
    void probabilities(int64_t i, int64_t k0, int64_t nk) {
        constexpr int WIDTH = NV * VL;
        Lanes<NV> at;
        int32_t all_see = std::numeric_limits<int32_t>::max();
        for (int l = 0; l < WIDTH; l++) all_see = std::min(all_see, limits[i + l]);
        for (int j = 0; j < NV; j++) {
            at.shift[j] = load(lse2 + i + j * VL);
            at.low[j] = load(lse2_low + i + j * VL);
            at.delta[j] = one_block() ? vf{} : load(delta + i + j * VL);
            at.sum[j] = vf{};
            at.excess[j] = k0 > 0 ? load(excess + i + j * VL) : vf{};
            at.inverse[j] = splat(1.0f);
            std::memcpy(&at.limit[j], limits + i + j * VL, sizeof(vi));
        }
        for (int64_t r = 0; r < nk; r += MR) {
            float *scores = s + r * WIDTH, *slopes = dp + r * WIDTH;
            score_block<NV>(words, k_rows + (k0 + r) * words, q_lanes + i * words, scores);
            score_block<NV>(words, v_rows + (k0 + r) * words, g_lanes + i * words, slopes);
            if (k0 + r + MR > all_see)
                exponentials<NV, true>(k0 + r, scores, slopes, at);
            else
                exponentials<NV, false>(k0 + r, scores, slopes, at);
            if (!one_block()) slopes_of<NV>(i, r, scores, slopes, at);
        }
        if (!one_block()) {
            for (int j = 0; j < NV; j++) store(excess + i + j * VL, at.excess[j]);
            return;
        }
        for (int j = 0; j < NV; j++) {
            at.inverse[j] = 1.0f / ((at.sum[j] == 0.0f) ? splat(1.0f) : at.sum[j]);
            at.delta[j] *= at.inverse[j];
        }
        for (int64_t r = 0; r < nk; r += MR) slopes_of<NV>(i, r, s + r * WIDTH, dp + r * WIDTH, at);
    }

    // In place: MR rows of scores -> probabilities. With a single block of keys their sum corrects the rounding of lse, and delta is computed
    // from them, without the rounding of `out`.
    template <int NV, bool MASKED>
    void exponentials(int64_t key, float* scores, const float* slopes, Lanes<NV>& at) {
        for (int row = 0; row < MR; row++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                float* here = scores + (row * NV + j) * VL;
                const vf score = load(here);
                vf probability = power<T>(score, factor, at.shift[j], at.low[j]);
                if (MASKED) {
                    // A query's only visible key has probability 1 whatever its score.
                    if (key + row == 0) probability = (at.limit[j] == 1) ? score * 0.0f + 1.0f : probability;
                    probability = visible(key + row, at.limit[j]) ? probability : vf{};
                }
                store(here, probability);
                if (one_block()) {
                    at.delta[j] += probability * load(slopes + (row * NV + j) * VL);
                    at.sum[j] += probability;
                }
            }
    }

    template <int NV>
    void slopes_of(int64_t i, int64_t r, const float* probabilities, const float* slopes, Lanes<NV>& at) {
        for (int row = 0; row < MR; row += KS)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                vf pair[2] = {};
#pragma GCC unroll 2
                for (int half = 0; half < KS; half++) {
                    const int here = ((row + half) * NV + j) * VL;
                    const int64_t place = (r + row + half) * BACK_QUERIES + i + j * VL;
                    const vf probability = load(probabilities + here) * at.inverse[j];
                    pair[half] = probability * (load(slopes + here) - at.delta[j]);
                    store(reinterpret_cast<part_t<T>*>(p) + place, probability);
                    store(reinterpret_cast<part_t<T>*>(ds) + place, pair[half]);
                }
                const vf woven = weave<T>(pair[0], pair[1]);
                store(reinterpret_cast<float*>(ds_woven) + ((i / VL + j) * KEY_WORDS + (r + row) / KS) * VL, woven);
                if (!one_block()) at.excess[j] += unwoven_sum<T>(woven);
            }
    }

    void block(int64_t n, int64_t k0, int64_t nk) {
        for (int64_t i = 0; i < n; i += LANES)
            if (n - i > VL * (BACK_VECTORS - 1))
                probabilities<BACK_VECTORS>(i, k0, nk);
            else
                probabilities<1>(i, k0, nk);
        if constexpr (IN_TILES<T>) fill_tiles(n, nk);
        for_panels(D, [&](int64_t d0, int vectors) {
            const int width = vectors * VL;
            const int64_t deep = words_of<T>(n), first = d0 * deep;
            for (int64_t r = 0; r < nk; r += MR)
                micro<QUERY_WORDS, 1>(
                    vectors, deep, p + r * QUERY_WORDS, g_columns + first, width, dv + (k0 + r) * ldc + d0, ldc, true
                );
            for (int64_t r = 0; r < nk; r += MR)
                micro<QUERY_WORDS, 1>(
                    vectors, deep, ds + r * QUERY_WORDS, q_columns + first, width, dk + (k0 + r) * ldc + d0, ldc, true
                );
            const W* keys = k_columns + d0 * words_of<T>(sizes.Nk) + k0 / KS * width;
            for (int64_t m = 0; m < n; m += MR)
                micro<1, VL>(
                    vectors, words_of<T>(nk), ds_woven + m / VL * KEY_WORDS * VL + m % VL, keys, width, dq + m * ldc + d0, ldc, k0 > 0
                );
        });
    }

    // Pads the queries with zeros to full tiles of words, and rearranges ds_woven into tiles.
    void fill_tiles(int64_t n, int64_t nk) {
        const int64_t there = round_up(n, VL), words_there = there / KS, missing = words_of<T>(n) - words_there;
        for (int64_t r = 0; missing && r < round_up(nk, MR); r++) {
            std::memset(p + r * QUERY_WORDS + words_there, 0, missing * sizeof(W));
            std::memset(ds + r * QUERY_WORDS + words_there, 0, missing * sizeof(W));
        }
        for (int64_t i = 0; i < there; i += VL) turn_lanes<T>(ds_woven + i * KEY_WORDS, round_up(nk, MR) / KS);
    }

    void write(const float* from, float times, int64_t n, T* to, int64_t stride) {
        for (int64_t i = 0; i < n; i++)
            for_vectors(D, [&](int64_t d, int lanes) { store(to + i * stride + d, load(from + i * ldc + d) * times, lanes); });
    }
};

}  // namespace

// grad_out, q, out [B, Nq, H, D] (out contiguous), k, v [B, Nk, H, D], lse [B, H, Nq] -> grad_q, grad_k, grad_v, each [B, N, H, D] with
// contiguous heads and rows `apart` elements apart.
template <class T>
void flash_attention_backward(
    const T* grad_data, int64_t grad_batch, int64_t grad_row, int64_t grad_head, const T* q_data, int64_t q_batch, int64_t q_row,
    int64_t q_head, const T* k_data, int64_t k_batch, int64_t k_row, int64_t k_head, const T* v_data, int64_t v_batch, int64_t v_row,
    int64_t v_head, const T* out, const float* lse, T* grad_q, T* grad_k, T* grad_v, int64_t apart, int64_t B, int64_t H, int64_t Nq,
    int64_t Nk, int64_t D, bool causal, int64_t prefix, double scale, int threads
) {
    const View<const T> grad_out{grad_data, grad_batch, grad_row, grad_head}, q{q_data, q_batch, q_row, q_head},
        k{k_data, k_batch, k_row, k_head}, v{v_data, v_batch, v_row, v_head};
    const Sizes sizes{B, H, Nq, Nk, D, causal, prefix};
    const int64_t room = Backward<T>(sizes, scale, Room()).used;
    Buffer<float> rooms(room * threads);
    parallel(B * H, threads, [&](int64_t head, int thread) {
        const int64_t b = head / H, h = head % H;
        Backward<T> work(sizes, scale, Room(rooms + room * thread));
        work.keys(k.of(b, h), k.row, v.of(b, h), v.row);
        for (int64_t i0 = 0; i0 < Nq; i0 += BACK_QUERIES) {
            const int64_t n = std::min<int64_t>(BACK_QUERIES, Nq - i0), seen = sizes.limit(i0 + n - 1);
            if (seen > 0)
                work.queries(
                    i0, n, q.of(b, h) + i0 * q.row, q.row, grad_out.of(b, h) + i0 * grad_out.row, grad_out.row,
                    out + ((b * Nq + i0) * H + h) * D, H * D, lse + head * Nq + i0
                );
            else
                std::memset(work.dq, 0, n * work.ldc * sizeof(float));
            for (int64_t k0 = 0; k0 < seen; k0 += BACK_KEYS) work.block(n, k0, std::min<int64_t>(BACK_KEYS, seen - k0));
            if (seen > BACK_KEYS) work.without_excess(n);
            work.write(work.dq, work.scale, n, grad_q + (b * Nq + i0) * apart + h * D, apart);
        }
        work.write(work.dk, work.scale, Nk, grad_k + b * Nk * apart + h * D, apart);
        work.write(work.dv, 1.0f, Nk, grad_v + b * Nk * apart + h * D, apart);
    });
}
OV3_EXPORT(flash_attention_backward)
