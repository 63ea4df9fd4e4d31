// Sums over the rows of a matrix, for bias gradients.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace ov3 {

// out[n] = sum of x[r, n] over R rows. Rows are summed in strips of a fixed size and the strips in order, independent of the number of threads;
// within a strip in short chains, which keeps rounding errors small.
template <class T, class Out>
inline void column_sums(const T* x, int64_t stride, int64_t R, int64_t N, Out* out, int threads) {
    constexpr int64_t STRIP = 256, SHORT = 16, COLUMNS = 16 * VL;
    const int64_t strips = std::max<int64_t>(1, ceil_div(R, STRIP)), groups = ceil_div(N, COLUMNS);
    Buffer<float> partial(strips * N);
    parallel(strips * groups, threads, [&](int64_t task, int) {
        const int64_t strip = task / groups, n0 = task % groups * COLUMNS;
        float* sums = partial + strip * N;
        for_vectors(std::min(COLUMNS, N - n0), [&](int64_t i, int lanes) {
            vf total = {};
            const int64_t end = std::min(R, (strip + 1) * STRIP);
            for (int64_t r = strip * STRIP; r < end; r += SHORT) {
                vf few = {};
                for (int64_t s = r; s < std::min(end, r + SHORT); s++) few += load(x + s * stride + n0 + i, lanes);
                total += few;
            }
            store(sums + n0 + i, total, lanes);
        });
    });
    for_vectors(N, [&](int64_t n, int lanes) {
        vf total = {};
        for (int64_t strip = 0; strip < strips; strip++) total += load(partial + strip * N + n, lanes);
        store(out + n, total, lanes);
    });
}

}  // namespace ov3
