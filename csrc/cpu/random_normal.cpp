// Standard normal random numbers.
#include <algorithm>

#include "../common/philox.h"
#include "export.h"
#include "parallel.h"

using namespace ov3;

// rng (seed, offset) -> out [n].
template <class T>
void random_normal(const int64_t* rng, T* out, int64_t n, int threads) {
    constexpr int64_t TASK = 256 * Philox::GROUP;
    const Philox philox(rng);
    parallel(ceil_div(n, TASK), threads, [&](int64_t task, int) {
        for (int64_t i = task * TASK; i < std::min(n, (task + 1) * TASK); i += Philox::GROUP) {
            vf x[4];
            philox.normals(uint64_t(i / 4), x);
            for (int j = 0; j < 4; j++) {
                const int64_t left = n - i - j * VL;
                if (left > 0) store(out + i + j * VL, x[j], int(std::min<int64_t>(VL, left)));
            }
        }
    });
}
OV3_EXPORT(random_normal)

// The raw 32-bit words, out [n]; for tests.
template <class T>
void random_words(const int64_t* rng, uint32_t* out, int64_t n, int) {
    const Philox philox(rng);
    for (int64_t i = 0; i < n; i += Philox::GROUP) {
        vu w[4];
        philox.words(uint64_t(i / 4), w);
        for (int lane = 0; lane < VL; lane++)
            for (int j = 0; j < 4; j++) {
                const int64_t at = i + 4 * (VL / 4 * (lane % 4) + lane / 4) + j;
                if (at < n) out[at] = w[j][lane];
            }
    }
}
OV3_EXPORT_AS(random_words, f32, float)
