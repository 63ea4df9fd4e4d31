// RMS normalisation of rows of D, with a residual: one read of each row from memory, one write.
#include <type_traits>

#include "export.h"
#include "parallel.h"
#include "row_sums.h"

using namespace ov3;

namespace {

constexpr int64_t ROWS = 16;   // of a task
constexpr int64_t STRIP = 64;  // rows whose gradients by weight are added up in one go
template <int N>
using Count = std::integral_constant<int, N>;

// As in layer_norm.cpp: rows whose gradients by weight join in registers; divides STRIP.
template <class T>
constexpr int TOGETHER = sizeof(T) == 2 ? 2 : 1;

}  // namespace

// x, residual (or null) [R, D] with rows a stride apart; weight [D] float -> y, h (null without residual) [R, D].
template <class T>
void rms_norm_forward(
    const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* weight, double eps, T* y, T* h, int64_t R,
    int64_t D, int threads
) {
    expect_writes(y, R * D);
    if (residual) expect_writes(h, R * D);
    // Rows r0 .. r0 + count - 1, whose sums wait for each other nowhere.
    const auto rows = [&](int64_t r0, auto count) {
        constexpr int N = decltype(count)::value;
        const T* row[N];
        float s[N];
        vf total[N];
        for (int i = 0; i < N; i++) {
            row[i] = x + (r0 + i) * x_stride;
            if (!residual) {
                total[i] = lane_sums(D, [&](int64_t d, int lanes) {
                    const vf v = load(row[i] + d, lanes);
                    return v * v;
                });
                continue;
            }
            const T *first = row[i], *other = residual + (r0 + i) * residual_stride;
            T* out = h + (r0 + i) * D;
            total[i] = lane_sums(D, [&](int64_t d, int lanes) {
                const vf exact = load(first + d, lanes) + load(other + d, lanes), v = rounded<T>(exact);
                store(out + d, exact, lanes);
                return v * v;
            });
            row[i] = out;
        }
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) s[i] = 1.0f / std::sqrt(sum(total[i]) / float(D) + float(eps));
        for (int i = 0; i < N; i++)
            for_vectors(D, [&](int64_t d, int lanes) {
                store(y + (r0 + i) * D + d, load(row[i] + d, lanes) * s[i] * load(weight + d, lanes), lanes);
            });
    };
    parallel(ceil_div(R, ROWS), threads, [&](int64_t task, int) {
        int64_t r = task * ROWS;
        const int64_t end = std::min(R, r + ROWS);
        for (; r + 4 <= end; r += 4) rows(r, Count<4>());
        for (; r < end; r++) rows(r, Count<1>());
    });
}
OV3_EXPORT(rms_norm_forward)

// grad_y, grad_h (or null), h [R, D], weight [D] -> grad_x [R, D], grad_weight [D] float; either may be null. rstd is computed again, in the
// loop that adds up what dx needs anyway.
template <class T>
void rms_norm_backward(
    const T* grad_y, int64_t grad_y_stride, const T* grad_h, int64_t grad_h_stride, const T* h, int64_t h_stride, const float* weight,
    double eps, T* grad_x, float* grad_weight, int64_t R, int64_t D, int threads
) {
    const int64_t strips = ceil_div(R, STRIP);
    Buffer<float> partial(grad_weight ? strips * D : 0);
    if (grad_x) expect_writes(grad_x, R * D);
    // Rows r0 .. r0 + count - 1.
    const auto rows = [&](int64_t r0, auto count, float* dweight) {
        constexpr int N = decltype(count)::value;
        const T *dy[N], *row[N], *rest[N];
        T* out[N];
        for (int k = 0; k < N; k++) {
            dy[k] = grad_y + (r0 + k) * grad_y_stride;
            row[k] = h + (r0 + k) * h_stride;
            rest[k] = grad_h ? grad_h + (r0 + k) * grad_h_stride : nullptr;
            out[k] = grad_x ? grad_x + (r0 + k) * D : nullptr;
        }
        vf squares[N] = {}, dots[N] = {};
        for (int64_t start = 0; start < D; start += CHAIN * VL) {
            vf part[N] = {}, along[N] = {};
            for_vectors(std::min(CHAIN * VL, D - start), [&](int64_t i, int lanes) __attribute__((always_inline)) {
                const vf w = load(weight + start + i, lanes);
#pragma GCC unroll 4
                for (int k = 0; k < N; k++) {
                    const vf v = load(row[k] + start + i, lanes);
                    part[k] += v * v;
                    along[k] += load(dy[k] + start + i, lanes) * w * v;
                }
            });
#pragma GCC unroll 4
            for (int k = 0; k < N; k++) {
                squares[k] += part[k];
                dots[k] += along[k];
            }
        }
        float s[N], along[N];
#pragma GCC unroll 4
        for (int k = 0; k < N; k++) {
            s[k] = 1.0f / std::sqrt(sum(squares[k]) / float(D) + float(eps));
            along[k] = sum(dots[k]) * s[k] / float(D);
        }
        for_vectors(D, [&](int64_t d, int lanes) __attribute__((always_inline)) {
            const vf w = load(weight + d, lanes);
            vf weights = {};
#pragma GCC unroll 4
            for (int k = 0; k < N; k++) {
                const vf g = load(dy[k] + d, lanes), normal = load(row[k] + d, lanes) * s[k];
                weights += g * normal;
                if (!grad_x) continue;
                vf v = (g * w - normal * along[k]) * s[k];
                if (grad_h) v += load(rest[k] + d, lanes);
                store(out[k] + d, v, lanes);
            }
            if (grad_weight) store(dweight + d, load(dweight + d, lanes) + weights, lanes);
        });
    };
    parallel(strips, threads, [&](int64_t strip, int) {
        float* dweight = grad_weight ? partial + strip * D : nullptr;
        if (dweight) std::memset(dweight, 0, D * sizeof(float));
        int64_t r = strip * STRIP;
        const int64_t end = std::min(R, r + STRIP);
        for (; r + TOGETHER<T> <= end; r += TOGETHER<T>) rows(r, Count<TOGETHER<T>>(), dweight);
        for (; r < end; r++) rows(r, Count<1>(), dweight);
    });
    if (!grad_weight) return;
    for_vectors(D, [&](int64_t d, int lanes) {
        vf total = {};
        for (int64_t strip = 0; strip < strips; strip++) total += load(partial + strip * D + d, lanes);
        store(grad_weight + d, total, lanes);
    });
}
OV3_EXPORT(rms_norm_backward)
