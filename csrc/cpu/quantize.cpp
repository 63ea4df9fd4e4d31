// Activations as uint8 for int8 products: one read, one write.
#include <algorithm>

#include "export.h"
#include "parallel.h"
#include "quantized.h"

using namespace ov3;

namespace {

constexpr int64_t PIECE = 32768;  // elements of a task

}  // namespace

// x [n] -> q uint8 [n], round(x / scale) + zero.
template <class T>
void quantize(const T* x, double scale, int64_t zero, void* q, int64_t n, int threads) {
    const Quantized out(q, scale, zero);
    expect_writes(out, n);
    parallel(ceil_div(n, PIECE), threads, [&](int64_t task, int) {
        const int64_t start = task * PIECE;
        for_vectors(std::min(PIECE, n - start), [&](int64_t i, int lanes) { store(out + (start + i), load(x + start + i, lanes), lanes); });
    });
}
OV3_EXPORT(quantize)
