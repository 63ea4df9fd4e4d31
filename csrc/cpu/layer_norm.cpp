// Layer normalisation over rows of D, with a residual: each row is read from memory once and written once.
#include <algorithm>
#include <type_traits>

#include "export.h"
#include "parallel.h"
#include "quantized.h"
#include "row_sums.h"

using namespace ov3;

namespace {

constexpr int64_t ROWS = 16;    // rows per task
constexpr int64_t STRIP = 64;   // rows per partial sum of the weight and bias gradients

// Rows whose weight and bias gradients are combined in registers; divides STRIP. For float rows the prefetcher works better one row at a time.
template <class T>
constexpr int TOGETHER = sizeof(T) == 2 ? 2 : 1;

// y is a T*, or Quantized; mean and rstd may be null.
template <class T, class Y>
void normalise(
    const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* weight, const float* bias, double eps, Y y,
    T* h, float* mean, float* rstd, int64_t R, int64_t D, int threads
) {
    expect_writes(y, R * D);
    if (residual) expect_writes(h, R * D);
    // Rows r0 .. r0 + count - 1, interleaved so that their sums are independent.
    const auto rows = [&](int64_t r0, auto count) {
        constexpr int N = decltype(count)::value;
        const T* row[N];
        float m[N], s[N];
        vf total[N];
        for (int i = 0; i < N; i++) {
            row[i] = x + (r0 + i) * x_stride;
            if (!residual) {
                total[i] = lane_sums(D, [&](int64_t d, int lanes) { return load(row[i] + d, lanes); });
                continue;
            }
            const T *first = row[i], *other = residual + (r0 + i) * residual_stride;
            T* out = h + (r0 + i) * D;
            total[i] = lane_sums(D, [&](int64_t d, int lanes) {
                const vf v = load(first + d, lanes) + load(other + d, lanes);
                store(out + d, v, lanes);
                return rounded<T>(v);
            });
            row[i] = out;
        }
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) m[i] = sum(total[i]) / float(D);
        // Squared deviations in a second pass over cached data, so that a large mean costs no precision.
        for (int i = 0; i < N; i++)
            total[i] = lane_sums(D, [&](int64_t d, int lanes) {
                vf centred = load(row[i] + d, lanes) - m[i];
                if (lanes < VL) centred = first_lanes(centred, lanes);
                return centred * centred;
            });
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            s[i] = 1.0f / std::sqrt(sum(total[i]) / float(D) + float(eps));
            if (mean) mean[r0 + i] = m[i];
            if (rstd) rstd[r0 + i] = s[i];
        }
        for (int i = 0; i < N; i++)
            for_vectors(D, [&](int64_t d, int lanes) {
                vf v = (load(row[i] + d, lanes) - m[i]) * s[i] * load(weight + d, lanes);
                if (bias) v += load(bias + d, lanes);
                store(y + ((r0 + i) * D + d), v, lanes);
            });
    };
    parallel(ceil_div(R, ROWS), threads, [&](int64_t task, int) {
        int64_t r = task * ROWS;
        const int64_t end = std::min(R, r + ROWS);
        for (; r + 4 <= end; r += 4) rows(r, std::integral_constant<int, 4>());
        for (; r < end; r++) rows(r, std::integral_constant<int, 1>());
    });
}

}  // namespace

// x, residual (or null) [R, D] with row strides; weight, bias (or null) [D] float -> y, h (null without residual) [R, D],
// mean, rstd [R].
template <class T>
void layer_norm_forward(
    const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* weight, const float* bias, double eps, T* y,
    T* h, float* mean, float* rstd, int64_t R, int64_t D, int threads
) {
    normalise(x, x_stride, residual, residual_stride, weight, bias, eps, y, h, mean, rstd, R, D, threads);
}
OV3_EXPORT(layer_norm_forward)

// The same with y as uint8 [R, D], round(y / scale) + zero: what an int8 product takes.
template <class T>
void layer_norm_quantized(
    const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* weight, const float* bias, double eps,
    double scale, int64_t zero, void* y, T* h, int64_t R, int64_t D, int threads
) {
    const Quantized out(y, scale, zero);
    normalise<T>(x, x_stride, residual, residual_stride, weight, bias, eps, out, h, nullptr, nullptr, R, D, threads);
}
OV3_EXPORT(layer_norm_quantized)

// grad_y, grad_h (or null), h [R, D], weight [D], mean, rstd [R] -> grad_x [R, D], grad_weight, grad_bias [D] float; results may be null.
template <class T>
void layer_norm_backward(
    const T* grad_y, int64_t grad_y_stride, const T* grad_h, int64_t grad_h_stride, const T* h, int64_t h_stride, const float* weight,
    const float* mean, const float* rstd, T* grad_x, float* grad_weight, float* grad_bias, int64_t R, int64_t D, int threads
) {
    const int64_t strips = ceil_div(R, STRIP);
    const bool sums = grad_weight || grad_bias;
    Buffer<float> partial(sums ? strips * 2 * D : 0);
    if (grad_x) expect_writes(grad_x, R * D);
    // Rows r0 .. r0 + count - 1.
    const auto rows = [&](int64_t r0, auto count, float* dweight, float* dbias) {
        constexpr int N = decltype(count)::value;
        const T *dy[N], *row[N];
        float m[N], s[N];
        for (int i = 0; i < N; i++) {
            dy[i] = grad_y + (r0 + i) * grad_y_stride;
            row[i] = h + (r0 + i) * h_stride;
            m[i] = mean[r0 + i];
            s[i] = rstd[r0 + i];
        }
        vf total[N] = {}, dots[N] = {};
        for (int64_t start = 0; start < D; start += CHAIN * VL) {
            vf part[N] = {}, along[N] = {};
            const auto add = [&](int64_t d, int lanes) __attribute__((always_inline)) {
                const vf w = load(weight + d, lanes);
                vf weights = {}, biases = {};
#pragma GCC unroll 4
                for (int k = 0; k < N; k++) {
                    const vf g = load(dy[k] + d, lanes), normal = (load(row[k] + d, lanes) - m[k]) * s[k], scaled = g * w;
                    part[k] += scaled;
                    along[k] += scaled * normal;
                    weights += g * normal;
                    biases += g;
                }
                if (!sums) return;
                store(dweight + d, load(dweight + d, lanes) + weights, lanes);
                store(dbias + d, load(dbias + d, lanes) + biases, lanes);
            };
            const int64_t end = std::min(D, start + CHAIN * VL);
            int64_t d = start;
            for (; d + VL <= end; d += VL) add(d, VL);
            if (d < end) add(d, int(end - d));
#pragma GCC unroll 4
            for (int k = 0; k < N; k++) {
                total[k] += part[k];
                dots[k] += along[k];
            }
        }
        if (!grad_x) return;
        float averages[N], alongs[N];
#pragma GCC unroll 4
        for (int k = 0; k < N; k++) {
            averages[k] = sum(total[k]) / float(D);
            alongs[k] = sum(dots[k]) / float(D);
        }
        for (int k = 0; k < N; k++) {
            const float average = averages[k], along = alongs[k];
            const T *dy_k = dy[k], *row_k = row[k], *rest = grad_h ? grad_h + (r0 + k) * grad_h_stride : nullptr;
            const float m_k = m[k], s_k = s[k];
            T* out = grad_x + (r0 + k) * D;
            for_vectors(D, [&](int64_t d, int lanes) {
                const vf normal = (load(row_k + d, lanes) - m_k) * s_k;
                vf v = (load(dy_k + d, lanes) * load(weight + d, lanes) - average - normal * along) * s_k;
                if (rest) v += load(rest + d, lanes);
                store(out + d, v, lanes);
            });
        }
    };
    parallel(strips, threads, [&](int64_t strip, int) {
        float *dweight = partial + strip * 2 * D, *dbias = dweight + D;
        if (sums) std::memset(dweight, 0, 2 * D * sizeof(float));
        int64_t r = strip * STRIP;
        const int64_t end = std::min(R, r + STRIP);
        for (; r + TOGETHER<T> <= end; r += TOGETHER<T>) rows(r, std::integral_constant<int, TOGETHER<T>>(), dweight, dbias);
        for (; r < end; r++) rows(r, std::integral_constant<int, 1>(), dweight, dbias);
    });
    if (!sums) return;
    for_vectors(D, [&](int64_t d, int lanes) {
        vf dweight = {}, dbias = {};
        for (int64_t strip = 0; strip < strips; strip++) {
            dweight += load(partial + strip * 2 * D + d, lanes);
            dbias += load(partial + strip * 2 * D + D + d, lanes);
        }
        if (grad_weight) store(grad_weight + d, dweight, lanes);
        if (grad_bias) store(grad_bias + d, dbias, lanes);
    });
}
OV3_EXPORT(layer_norm_backward)
