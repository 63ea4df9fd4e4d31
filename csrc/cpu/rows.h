// Rows that need not lie at one distance from each other (a batch of tokens without their first one, say), packed for gemm.h.
#pragma once

#include "gemm.h"

namespace ov3 {

// Row r of [outer, per] rows; per == 0: all rows at the distance `inner`.
template <class T>
struct Rows {
    const T* data;
    int64_t inner, per = 0, outer = 0;
    const T* operator()(int64_t r) const { return per ? data + r / per * outer + r % per * inner : data + r * inner; }
};

// Rows at one distance are told apart from others here, so that reading them needs no division.
template <class T>
inline Rows<T> batched_rows(const T* data, int64_t outer, int64_t per, int64_t inner) {
    return outer == per * inner ? Rows<T>{data, inner} : Rows<T>{data, inner, per, outer};
}

// Values k0 .. k0 + ks of rows [m0, m0 + count) as panels of A that are `words` deep in all; k0 is a multiple of a word.
// `row(m)` is a pointer to its value 0. VL rows at a time, since that is what a transposition takes.
template <class T, class Row>
inline void pack_rows(const Row& row, int64_t m0, int64_t count, int64_t k0, int64_t ks, int64_t words, word_t<T>* dst) {
    constexpr int KS = Word<T>::ks;
    for (int64_t m = 0; m < count; m += VL) {
        const T* p[VL];
        const int here = int(std::min<int64_t>(VL, count - m));
        for (int i = 0; i < here; i++) p[i] = row(m0 + m + i) + k0;
        for (int64_t k = 0; k < ks; k += VL * KS) {
            const int deep = int(std::min<int64_t>(VL, ceil_div(ks - k, KS)));
            vf values[VL];
            for (int i = 0; i < VL; i++) values[i] = i < here ? row_words<T>(p[i] + k, ks - k) : vf{};
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

// Columns [n0, n0 + count) of rows [r0, r0 + rows) as panels of A whose k are the rows.
template <class T, class Row>
inline void pack_columns(const Row& row, int64_t r0, int64_t rows, int64_t n0, int64_t count, word_t<T>* dst) {
    constexpr int KS = Word<T>::ks;
    const int64_t words = words_of<T>(rows), wide = round_up(count, MR);
    for (int64_t w = 0; w < words; w++) {
        const T* p = row(r0 + w * KS) + n0;
        const T* next = KS > 1 && w * KS + 1 < rows ? row(r0 + w * KS + 1) + n0 : nullptr;
        for (int64_t n = 0; n < wide; n += VL) {
            const vf x = column_words<T>(p + n, next ? next + n : nullptr, int(std::min<int64_t>(VL, count - n)));
            for (int64_t h = 0; h < VL && n + h < wide; h += MR)
                std::memcpy(dst + (n + h) * words + w * MR, reinterpret_cast<const float*>(&x) + h, MR * 4);
        }
    }
}

// A product whose rows of A cost something to make: they are made once, whatever the threads. fill(m0, rows, words, thread); store as in
// gemm_with; done(m0, rows, thread) comes when these rows are complete.
template <class T, class Fill, class Store, class Done>
inline void gemm_rows(int64_t M, const Packed<T>& b, const Fill& fill, const Store& store, const Done& done, int threads) {
    if (M == 0) return;
    BlockRoom<T> room(std::min(M, round_up(ceil_div(M, 2 * threads), MR)), b.K, threads);
    parallel(ceil_div(M, room.rows), threads, [&](int64_t task, int thread) {
        const int64_t m0 = task * room.rows, rows = std::min(room.rows, M - m0);
        fill(m0, rows, room.a_of(thread), thread);
        block_product<T>(
            rows, room.a_of(thread), b, 0, b.panels(), room.c_of(thread),
            [&](int64_t m, int64_t n, int count, float* values) { store(m0 + m, n, count, values); }
        );
        done(m0, rows, thread);
    });
}
inline void nothing(int64_t, int64_t, int) {}

// Asks for the memory of n values that will be wanted soon.
template <bool WRITE = false, class T>
inline void prefetch(const T* p, int64_t n) {
    const char *c = reinterpret_cast<const char*>(p), *last = reinterpret_cast<const char*>(p + n) - 1;
    for (; c < last; c += 64) __builtin_prefetch(c, WRITE);
    __builtin_prefetch(last, WRITE);
}
constexpr int64_t AHEAD = 8;  // rows

// A store for gemm: rows of `out` are `width` apart; adds bias [N] unless it is null.
template <class T>
inline auto store_rows(T* out, int64_t width, const T* bias = nullptr) {
    return [=](int64_t m, int64_t n, int count, const float* values) {
        for_vectors(count, [&](int64_t i, int lanes) {
            vf v = load(values + i, lanes);
            if (bias) v += load(bias + n + i, lanes);
            store(out + m * width + n + i, v, lanes);
        });
    };
}

}  // namespace ov3
