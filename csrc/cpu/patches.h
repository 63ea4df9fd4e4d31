// Images [B, C, H, W] as rows of patches [B h w, C p p] in the order (c, dy, dx), and back, one strip (row of patches) at a time.
#pragma once

#include "rows.h"

namespace ov3 {

struct Grid {
    int64_t C, p, h, w;  // channels, patch size, patches vertically and horizontally
    int64_t lines() const { return C * p; }           // lines of pixels per strip, (c, dy)
    int64_t values() const { return C * p * p; }      // values per patch
    int64_t width() const { return w * p; }
    int64_t tokens() const { return h * w; }
};

// Calls body(strip, j0, j1, r), covering rows [r0, r0 + rows): patches [j0, j1) of a strip are the rows from r on. Strips are numbered over the batch.
template <class Body>
inline void for_strips(const Grid& g, int64_t r0, int64_t rows, const Body& body) {
    for (int64_t r = r0; r < r0 + rows;) {
        const int64_t strip = r / g.w, j0 = r % g.w, j1 = std::min(g.w, j0 + r0 + rows - r);
        body(strip, j0, j1, r);
        r += j1 - j0;
    }
}

// Copies P pixels between a line and each patch that it crosses: line[j p + dx] <-> rows[j ld + dx].
template <int P, bool TO_ROWS, class T>
inline void move_line(T* line, T* rows, int64_t ld, int64_t patches, int64_t p) {
    for (int64_t j = 0; j < patches; j++) {
        T *pixels = line + j * (P ? P : p), *row = rows + j * ld;
        if (P) std::memcpy(TO_ROWS ? row : pixels, TO_ROWS ? pixels : row, P * sizeof(T));
        else std::memcpy(TO_ROWS ? row : pixels, TO_ROWS ? pixels : row, p * sizeof(T));
    }
}
template <bool TO_ROWS, class T>
inline void move_line(T* line, T* rows, int64_t ld, int64_t patches, int64_t p) {
    switch (p) {
        case 1: return move_line<1, TO_ROWS>(line, rows, ld, patches, p);
        case 2: return move_line<2, TO_ROWS>(line, rows, ld, patches, p);
        case 4: return move_line<4, TO_ROWS>(line, rows, ld, patches, p);
        default: return move_line<0, TO_ROWS>(line, rows, ld, patches, p);
    }
}
template <class T>
inline void line_to_rows(const T* line, T* rows, int64_t ld, int64_t patches, int64_t p) {
    move_line<true>(const_cast<T*>(line), rows, ld, patches, p);
}
template <class T>
inline void rows_to_line(const T* rows, T* line, int64_t ld, int64_t patches, int64_t p) {
    move_line<false>(line, const_cast<T*>(rows), ld, patches, p);
}

// The product of the rows `row` with b, delivered in blocks of full strips if these are short: done(r0, rows, values [rows, b.N], thread).
template <class T, class Row, class Done>
inline void gemm_strips(int64_t R, const Grid& g, const Row& row, const Packed<T>& b, const Done& done, int threads) {
    if (R == 0) return;
    BlockRoom<T> room(std::min(R, round_up(ceil_div(R, 2 * threads), round_up(g.w, MR))), b.K, threads);
    const int64_t most = room.rows > g.w ? room.rows / g.w * g.w : room.rows, each = round_up(most * b.N, 16);
    Buffer<float> made(each * threads);
    parallel(ceil_div(R, most), threads, [&](int64_t task, int thread) {
        const int64_t r0 = task * most, rows = std::min(most, R - r0);
        float* out = made + each * thread;
        pack_rows<T>(row, r0, rows, b.K, room.a_of(thread));
        block_product<T>(rows, room.a_of(thread), b, 0, b.panels(), room.c_of(thread), [&](int64_t m, int64_t n, int count, float* values) {
            std::memcpy(out + m * b.N + n, values, count * sizeof(float));
        });
        done(r0, rows, out, thread);
    });
}

}  // namespace ov3
