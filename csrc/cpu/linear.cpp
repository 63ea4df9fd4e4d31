// y = x W^T + b and its gradients.
#include "column_sums.h"
#include "export.h"
#include "gemm.h"

using namespace ov3;

// x [R, K] with row stride x_stride, w [N, K], bias [N] or null -> y [R, N].
template <class T, class P>
void linear_forward(
    const T* x, int64_t x_stride, const P* w, int64_t w_stride, const P* bias, T* y, int64_t R, int64_t K, int64_t N, int threads
) {
    expect_writes(y, R * N);
    Packed<T> b(K, N);
    b.pack(Matrix<P>{w, w_stride, 1}, threads);
    gemm<T>(R, Matrix<T>{x, x_stride, 1}, b, [&](int64_t m, int64_t n, int count, const float* values) {
        for_vectors(count, [&](int64_t i, int lanes) {
            vf v = load(values + i, lanes);
            if (bias) v += load(bias + n + i, lanes);
            store(y + m * N + n + i, v, lanes);
        });
    }, threads);
}
OV3_EXPORT_MIXED(linear_forward)

// grad_y [R, N] -> grad_x [R, K], grad_w [N, K], grad_bias [N]; each may be null.
template <class T, class P>
void linear_backward(
    const T* grad_y, int64_t grad_stride, const T* x, int64_t x_stride, const P* w, int64_t w_stride, T* grad_x, P* grad_w, P* grad_bias,
    int64_t R, int64_t K, int64_t N, int threads
) {
    const auto plain = [](auto* out, int64_t width) {
        return [=](int64_t m, int64_t n, int count, const float* values) {
            for_vectors(count, [&](int64_t i, int lanes) { store(out + m * width + n + i, load(values + i, lanes), lanes); });
        };
    };
    expect_writes(grad_x, R * K);
    expect_writes(grad_w, N * K);
    if (grad_x) {
        Packed<T> b(N, K);
        b.pack(Matrix<P>{w, 1, w_stride}, threads);
        gemm<T>(R, Matrix<T>{grad_y, grad_stride, 1}, b, plain(grad_x, K), threads);
    }
    if (grad_w) {
        Packed<T> b(R, K);
        b.pack(Matrix<T>{x, 1, x_stride}, threads);
        gemm<T>(N, Matrix<T>{grad_y, 1, grad_stride}, b, plain(grad_w, K), threads);
    }
    if (grad_bias) column_sums(grad_y, grad_stride, R, N, grad_bias, threads);
}
OV3_EXPORT_MIXED(linear_backward)
