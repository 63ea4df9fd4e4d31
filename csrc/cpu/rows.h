// Packs rows that need not have a single stride (such as a batch of tokens without the first one) for gemm.h.
#pragma once

#include "gemm.h"

namespace ov3 {

// Row r of [outer, per] rows; per == 0: all rows have the stride `inner`.
template <class T>
struct Rows {
    const T* data;
    int64_t inner, per = 0, outer = 0;
    const T* operator()(int64_t r) const { return per ? data + r / per * outer + r % per * inner : data + r * inner; }
};

// Dispatches on whether rows have a single stride, which needs no division.
template <class T>
inline Rows<T> batched_rows(const T* data, int64_t outer, int64_t per, int64_t inner) {
    return outer == per * inner ? Rows<T>{data, inner} : Rows<T>{data, inner, per, outer};
}

// A product whose rows of A are expensive to compute: they are computed once, whatever the number of threads. fill(m0, rows, words, thread); store as
// in gemm_with; done(m0, rows, thread) is called when these rows are complete.
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

// Prefetches n values.
template <bool WRITE = false, class T>
inline void prefetch(const T* p, int64_t n) {
    const char *c = reinterpret_cast<const char*>(p), *last = reinterpret_cast<const char*>(p + n) - 1;
    for (; c < last; c += 64) __builtin_prefetch(c, WRITE);
    __builtin_prefetch(last, WRITE);
}
constexpr int64_t AHEAD = 8;  // rows

// A store for gemm: `out` has row stride `width`; adds bias [N] unless it is null.
template <class T, class P = T>
inline auto store_rows(T* out, int64_t width, const P* bias = nullptr) {
    return [=](int64_t m, int64_t n, int count, const float* values) {
        for_vectors(count, [&](int64_t i, int lanes) {
            vf v = load(values + i, lanes);
            if (bias) v += load(bias + n + i, lanes);
            store(out + m * width + n + i, v, lanes);
        });
    };
}

}  // namespace ov3
