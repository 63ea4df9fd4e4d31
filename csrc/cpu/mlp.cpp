// The transformer's MLP: two products, with the activation between them computed where its operand is read or written anyway.
#include "column_sums.h"
#include "export.h"
#include "math.h"
#include "outer_sums.h"

using namespace ov3;

namespace {

constexpr int64_t PIECE = 512;  // columns of activations computed and packed at a time, in the L1 cache

template <Activation KIND, class T>
inline void gelu_row(const T* h, int64_t n, T* a) {
    for_vectors(n, [&](int64_t i, int lanes) { store(a + i, gelu<KIND>(load(h + i, lanes)), lanes); });
}

// Packs gelu(h) of rows [m0, m0 + rows) as A; `room` holds VL * PIECE values.
template <Activation KIND, class T>
inline void pack_activations(const T* h, int64_t m0, int64_t rows, int64_t H, word_t<T>* dst, T* room) {
    const int64_t words = words_of<T>(H);
    for (int64_t m = 0; m < rows; m += VL)
        for (int64_t k = 0; k < H; k += PIECE) {
            const int64_t here = std::min<int64_t>(VL, rows - m), deep = std::min(PIECE, H - k);
            for (int64_t i = 0; i < here; i++) gelu_row<KIND>(h + (m0 + m + i) * H + k, deep, room + i * PIECE);
            word_t<T>* panels = dst + m * words + k / Word<T>::ks * MR;
            pack_rows<T>(Rows<T>{room, PIECE}, 0, here, 0, deep, words, panels);
        }
}

template <Activation KIND, class T, class P>
void forward(
    const T* x, int64_t x_stride, const P* w1, int64_t w1_stride, const P* b1, const P* w2, int64_t w2_stride, const P* b2, T* y, T* h,
    int64_t R, int64_t K, int64_t H, int64_t D, int threads
) {
    expect_writes(h, R * H);
    expect_writes(y, R * D);
    {
        Packed<T> b(K, H);
        b.pack(Matrix<P>{w1, w1_stride, 1}, threads);
        const auto fill = [&](int64_t m0, int64_t rows, word_t<T>* dst) { pack_rows<T>(Rows<T>{x, x_stride}, m0, rows, K, dst); };
        gemm_with<T>(R, b, fill, store_rows(h, H, b1), threads);
    }
    Packed<T> b(H, D);
    Buffer<T> room(VL * PIECE * threads);
    b.pack(Matrix<P>{w2, w2_stride, 1}, threads);
    const auto fill = [&](int64_t m0, int64_t rows, word_t<T>* dst, int thread) {
        pack_activations<KIND>(h, m0, rows, H, dst, room + VL * PIECE * thread);
    };
    gemm_rows<T>(R, b, fill, store_rows(y, D, b2), nothing, threads);
}

template <Activation KIND, class T, class P>
void backward(
    const T* grad_y, int64_t grad_stride, const T* x, int64_t x_stride, const T* h, int64_t h_stride, const P* w1, int64_t w1_stride,
    const P* w2, int64_t w2_stride, T* grad_x, P* grad_w1, P* grad_b1, P* grad_w2, P* grad_b2, int64_t R, int64_t K, int64_t H, int64_t D,
    int threads
) {
    const bool need_h = grad_x || grad_w1 || grad_b1;
    expect_writes(grad_x, R * K);
    expect_writes(grad_w1, H * K);
    expect_writes(grad_w2, D * H);
    const int64_t chunk = std::min(R, CHUNK_ROWS);
    Buffer<T> dh(need_h ? chunk * H : 0), a(grad_w2 ? chunk * H : 0);
    Packed<T> to_hidden(need_h ? D : 0, need_h ? H : 0), to_input(grad_x ? H : 0, grad_x ? K : 0);
    to_hidden.pack(Matrix<P>{w2, 1, w2_stride}, threads);
    to_input.pack(Matrix<P>{w1, 1, w1_stride}, threads);
    OuterSums<T> sums1(grad_w1 ? R : 0, grad_w1 ? H : 0, grad_w1 ? K : 0, threads);
    OuterSums<T> sums2(grad_w2 ? R : 0, grad_w2 ? H : 0, grad_w2 ? D : 0, threads);
    Buffer<float> bias(grad_b1 ? H * 2 : 0);
    if (grad_b1) std::memset(bias.data(), 0, H * sizeof(float));
    if (grad_b2) column_sums(grad_y, grad_stride, R, D, grad_b2, threads);

    for (int64_t r0 = 0; r0 == 0 || r0 < R; r0 += CHUNK_ROWS) {
        const int64_t rows = std::min(CHUNK_ROWS, R - r0);
        const bool last = r0 + CHUNK_ROWS >= R;
        const Rows<T> dy{grad_y + r0 * grad_stride, grad_stride};
        if (need_h) {
            const auto fill = [&](int64_t m0, int64_t count, word_t<T>* dst) { pack_rows<T>(dy, m0, count, D, dst); };
            gemm_with<T>(rows, to_hidden, fill, [&](int64_t m, int64_t n, int count, const float* values) {
                const T* row = h + (r0 + m) * h_stride + n;
                if (m + AHEAD < rows) {
                    prefetch(row + AHEAD * h_stride, count);
                    prefetch<true>(dh + (m + AHEAD) * H + n, count);
                    if (grad_w2) prefetch<true>(a + (m + AHEAD) * H + n, count);
                }
                for_vectors(count, [&](int64_t i, int lanes) {
                    vf value, slope;
                    gelu_with_slope<KIND>(load(row + i, lanes), value, slope);
                    store(dh + m * H + n + i, load(values + i, lanes) * slope, lanes);
                    if (grad_w2) store(a + m * H + n + i, value, lanes);
                });
            }, threads);
        } else if (grad_w2) {
            parallel(rows, threads, [&](int64_t m, int) { gelu_row<KIND>(h + (r0 + m) * h_stride, H, a + m * H); });
        }
        if (grad_x) {
            const auto fill = [&](int64_t m0, int64_t count, word_t<T>* dst) { pack_rows<T>(Rows<T>{dh, H}, m0, count, H, dst); };
            gemm_with<T>(rows, to_input, fill, store_rows(grad_x + r0 * K, K), threads);
        }
        if (grad_w1) sums1.add(rows, last, Rows<T>{dh, H}, plain_strips(x + r0 * x_stride, x_stride), store_block(grad_w1, K));
        if (grad_w2) sums2.add(rows, last, Rows<T>{a, H}, plain_strips(dy.data, grad_stride), store_transposed(grad_w2, H));
        if (grad_b1) {
            column_sums<T, float>(dh, H, rows, H, bias + H, threads);
            for_vectors(H, [&](int64_t i, int lanes) { store(bias + i, load(bias + i, lanes) + load(bias + H + i, lanes), lanes); });
        }
    }
    if (grad_b1) for_vectors(H, [&](int64_t i, int lanes) { store(grad_b1 + i, load(bias + i, lanes), lanes); });
}

}  // namespace

// x [R, K] with row stride x_stride, w1 [H, K], b1 [H] or null, w2 [D, H], b2 [D] or null; kind 0 gelu, 1 gelu_tanh -> y [R, D], h [R, H].
template <class T, class P>
void mlp_forward(
    const T* x, int64_t x_stride, const P* w1, int64_t w1_stride, const P* b1, const P* w2, int64_t w2_stride, const P* b2, T* y, T* h,
    int64_t kind, int64_t R, int64_t K, int64_t H, int64_t D, int threads
) {
    const auto run = kind == 0 ? forward<GELU, T, P> : forward<GELU_TANH, T, P>;
    run(x, x_stride, w1, w1_stride, b1, w2, w2_stride, b2, y, h, R, K, H, D, threads);
}
OV3_EXPORT_MIXED(mlp_forward)

// grad_y [R, D], x [R, K], h [R, H] -> grad_x [R, K], grad_w1 [H, K], grad_b1 [H], grad_w2 [D, H], grad_b2 [D]; each may be null.
template <class T, class P>
void mlp_backward(
    const T* grad_y, int64_t grad_stride, const T* x, int64_t x_stride, const T* h, int64_t h_stride, const P* w1, int64_t w1_stride,
    const P* w2, int64_t w2_stride, T* grad_x, P* grad_w1, P* grad_b1, P* grad_w2, P* grad_b2, int64_t kind, int64_t R, int64_t K,
        int64_t H,
    int64_t D, int threads
) {
    const auto run = kind == 0 ? backward<GELU, T, P> : backward<GELU_TANH, T, P>;
    run(grad_y, grad_stride, x, x_stride, h, h_stride, w1, w1_stride, w2, w2_stride, grad_x, grad_w1, grad_b1, grad_w2, grad_b2, R, K, H, D,
        threads);
}
OV3_EXPORT_MIXED(mlp_backward)
