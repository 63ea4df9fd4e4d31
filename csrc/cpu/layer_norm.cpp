// Layer normalisation over rows of D, with a residual: one read of each row from memory, one write.
#include <algorithm>

#include "export.h"
#include "parallel.h"
#include "simd.h"

using namespace ov3;

namespace {

constexpr int64_t ROWS = 16;   // of a task
constexpr int64_t STRIP = 64;  // rows whose gradients by weight and bias are added up in one go

// Sum and sum of squared differences of a row in two passes, which lose no digits at large means.
template <class T>
inline void moments(const T* h, int64_t D, float& mean, float& variance) {
    vf total[4] = {};
    for_vectors(D, [&](int64_t d, int lanes) { total[d / VL % 4] += load(h + d, lanes); });
    mean = sum((total[0] + total[1]) + (total[2] + total[3])) / float(D);
    vf squares[4] = {};
    for_vectors(D, [&](int64_t d, int lanes) {
        vf centred = load(h + d, lanes) - mean;
        if (lanes < VL) centred = first_lanes(centred, lanes);
        squares[d / VL % 4] += centred * centred;
    });
    variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(D);
}

}  // namespace

// x, residual (or null) [R, D] with rows a stride apart; weight, bias (or null) [D] float -> y, h (null without residual) [R, D], mean, rstd [R].
template <class T>
void layer_norm_forward(
    const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const float* weight, const float* bias, double eps, T* y, T* h,
    float* mean, float* rstd, int64_t R, int64_t D, int threads
) {
    parallel(ceil_div(R, ROWS), threads, [&](int64_t task, int) {
        for (int64_t r = task * ROWS; r < std::min(R, (task + 1) * ROWS); r++) {
            const T* row = x + r * x_stride;
            if (residual) {
                const T* other = residual + r * residual_stride;
                for_vectors(D, [&](int64_t d, int lanes) { store(h + r * D + d, load(row + d, lanes) + load(other + d, lanes), lanes); });
                row = h + r * D;
            }
            float variance;
            moments(row, D, mean[r], variance);
            rstd[r] = 1.0f / std::sqrt(variance + float(eps));
            const float m = mean[r], s = rstd[r];
            for_vectors(D, [&](int64_t d, int lanes) {
                vf v = (load(row + d, lanes) - m) * s * load(weight + d, lanes);
                if (bias) v += load(bias + d, lanes);
                store(y + r * D + d, v, lanes);
            });
        }
    });
}
OV3_EXPORT(
    layer_norm_forward,
    (Ptr x, int64_t x_stride, Ptr residual, int64_t residual_stride, Ptr weight, Ptr bias, double eps, Ptr y, Ptr h, Ptr mean, Ptr rstd,
     int64_t R, int64_t D, int64_t threads),
    (x, x_stride, residual, residual_stride, weight, bias, eps, y, h, mean, rstd, R, D, int(threads))
)

// grad_y, grad_h (or null), h [R, D], weight [D], mean, rstd [R] -> grad_x [R, D], grad_weight, grad_bias [D] float; results may be null.
template <class T>
void layer_norm_backward(
    const T* grad_y, int64_t grad_y_stride, const T* grad_h, int64_t grad_h_stride, const T* h, int64_t h_stride, const float* weight,
    const float* mean, const float* rstd, T* grad_x, float* grad_weight, float* grad_bias, int64_t R, int64_t D, int threads
) {
    const int64_t strips = ceil_div(R, STRIP);
    const bool sums = grad_weight || grad_bias;
    Buffer<float> partial(sums ? strips * 2 * D : 0);
    parallel(strips, threads, [&](int64_t strip, int) {
        float *dweight = partial + strip * 2 * D, *dbias = dweight + D;
        if (sums) std::memset(dweight, 0, 2 * D * sizeof(float));
        for (int64_t r = strip * STRIP; r < std::min(R, (strip + 1) * STRIP); r++) {
            const T *dy = grad_y + r * grad_y_stride, *row = h + r * h_stride;
            const float m = mean[r], s = rstd[r];
            vf total[2] = {}, dots[2] = {};
            for_vectors(D, [&](int64_t d, int lanes) {
                const vf g = load(dy + d, lanes), normal = (load(row + d, lanes) - m) * s, scaled = g * load(weight + d, lanes);
                total[d / VL % 2] += scaled;
                dots[d / VL % 2] += scaled * normal;
                if (sums) {
                    store(dweight + d, load(dweight + d, lanes) + g * normal, lanes);
                    store(dbias + d, load(dbias + d, lanes) + g, lanes);
                }
            });
            if (!grad_x) continue;
            const float average = sum(total[0] + total[1]) / float(D), along = sum(dots[0] + dots[1]) / float(D);
            for_vectors(D, [&](int64_t d, int lanes) {
                const vf normal = (load(row + d, lanes) - m) * s;
                vf v = (load(dy + d, lanes) * load(weight + d, lanes) - average - normal * along) * s;
                if (grad_h) v += load(grad_h + r * grad_h_stride + d, lanes);
                store(grad_x + r * D + d, v, lanes);
            });
        }
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
OV3_EXPORT(
    layer_norm_backward,
    (Ptr grad_y, int64_t grad_y_stride, Ptr grad_h, int64_t grad_h_stride, Ptr h, int64_t h_stride, Ptr weight, Ptr mean, Ptr rstd,
     Ptr grad_x, Ptr grad_weight, Ptr grad_bias, int64_t R, int64_t D, int64_t threads),
    (grad_y, grad_y_stride, grad_h, grad_h_stride, h, h_stride, weight, mean, rstd, grad_x, grad_weight, grad_bias, R, D, int(threads))
)
