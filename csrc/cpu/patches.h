// Pictures [B, C, H, W] as rows of patches [B h w, C p p] in the order (c, dy, dx), and back, a strip (one row of patches) at a time.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace ov3 {

struct Grid {
    int64_t C, p, h, w;  // channels, patch size, patches down and across
    int64_t lines() const { return C * p; }           // of pixels in a strip, (c, dy)
    int64_t values() const { return C * p * p; }      // in a patch
    int64_t width() const { return w * p; }
    int64_t tokens() const { return h * w; }
};

// body(strip, j0, j1, r): patches [j0, j1) of a strip are the rows from r on; covers rows [r0, r0 + rows). A strip counts over the batch.
template <class Body>
inline void for_strips(const Grid& g, int64_t r0, int64_t rows, const Body& body) {
    for (int64_t r = r0; r < r0 + rows;) {
        const int64_t strip = r / g.w, j0 = r % g.w, j1 = std::min(g.w, j0 + r0 + rows - r);
        body(strip, j0, j1, r);
        r += j1 - j0;
    }
}

// P pixels between a line and the patches that it crosses: line[j p + dx] <-> rows[j ld + dx].
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

}  // namespace ov3
