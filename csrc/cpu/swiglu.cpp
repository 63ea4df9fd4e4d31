// SwiGLU's gated activation of rows (gate, value): one read of both, one write; the backward reads them again and keeps nothing.
#include <algorithm>

#include "export.h"
#include "parallel.h"
#include "silu.h"

using namespace ov3;

namespace {

constexpr int64_t TASK = 16384;  // elements of y, about

// body(row), several rows to a task.
template <class Body>
inline void over_rows(int64_t R, int64_t H, int threads, const Body& body) {
    const int64_t rows = std::max<int64_t>(1, TASK / std::max<int64_t>(H, 1));
    parallel(ceil_div(R, rows), threads, [&](int64_t task, int) {
        for (int64_t r = task * rows; r < std::min(R, (task + 1) * rows); r++) body(r);
    });
}

}  // namespace

// x [R, 2 H] with rows a stride apart -> y [R, H].
template <class T>
void swiglu_forward(const T* x, int64_t x_stride, T* y, int64_t R, int64_t H, int threads) {
    expect_writes(y, R * H);
    over_rows(R, H, threads, [&](int64_t r) {
        const T *gates = x + r * x_stride, *values = gates + H;
        T* out = y + r * H;
        for_vectors(H, [&](int64_t i, int lanes) {
            const vf g = load(gates + i, lanes);
            store(out + i, g * gate<T>(g) * load(values + i, lanes), lanes);
        });
    });
}
OV3_EXPORT(swiglu_forward)

// grad_y [R, H], x [R, 2 H] with rows a stride apart -> grad_x [R, 2 H].
template <class T>
void swiglu_backward(const T* grad_y, int64_t grad_stride, const T* x, int64_t x_stride, T* grad_x, int64_t R, int64_t H, int threads) {
    expect_writes(grad_x, R * 2 * H);
    over_rows(R, H, threads, [&](int64_t r) {
        const T *dy = grad_y + r * grad_stride, *gates = x + r * x_stride, *values = gates + H;
        T *out = grad_x + r * 2 * H, *out_values = out + H;
        for_vectors(H, [&](int64_t i, int lanes) {
            const vf d = load(dy + i, lanes), g = load(gates + i, lanes), s = gate<T>(g);
            store(out + i, d * load(values + i, lanes) * (s * (1.0f + g * (1.0f - s))), lanes);
            store(out_values + i, d * (g * s), lanes);
        });
    });
}
OV3_EXPORT(swiglu_backward)
