// Tokens to latents: the product's rows are stored directly into the image's patches, and the backward reads its gradient from there.
#include <algorithm>

#include "export.h"
#include "outer_sums.h"
#include "patches.h"

using namespace ov3;

namespace {

// An image [B, C, h p, w p] with dense lines.
template <class T>
struct ImageView {
    const T* data;
    int64_t batch_stride, channel_stride, line_stride;
    Grid grid;

    // Rows [r0, r0 + rows) of patches, dense.
    void patches(int64_t r0, int64_t rows, T* out) const {
        const int64_t p = grid.p, K = grid.values();
        for_strips(grid, r0, rows, [&](int64_t strip, int64_t j0, int64_t j1, int64_t r) {
            const T* corner = data + strip / grid.h * batch_stride + strip % grid.h * p * line_stride + j0 * p;
            for (int64_t c = 0; c < grid.C; c++)
                for (int64_t dy = 0; dy < p; dy++)
                    line_to_rows(corner + c * channel_stride + dy * line_stride, out + (r - r0) * K + (c * p + dy) * p, K, j1 - j0, p);
        });
    }
};

// out [K] = sum of all rows of patches: over blocks of a fixed size, then over the blocks in order.
template <class T>
void sum_patches(const ImageView<T>& image, int64_t R, T* out, int threads) {
    constexpr int64_t BLOCK = 256;
    const int64_t K = image.grid.values(), blocks = ceil_div(R, BLOCK);
    Buffer<float> sums(blocks * K), total(K);
    Buffer<T> rows(STRIP_ROWS * K * threads);
    parallel(blocks, threads, [&](int64_t block, int thread) {
        float* sum = sums + block * K;
        T* some = rows + STRIP_ROWS * K * thread;
        std::memset(sum, 0, K * sizeof(float));
        for (int64_t r = block * BLOCK; r < std::min(R, (block + 1) * BLOCK); r += STRIP_ROWS) {
            const int64_t here = std::min(STRIP_ROWS, R - r);
            image.patches(r, here, some);
            for_vectors(K, [&](int64_t k, int lanes) {
                vf x = load(sum + k, lanes);
                for (int64_t i = 0; i < here;) {
                    vf chain = {};  // short chains, for precision
                    for (const int64_t stop = std::min(here, i + 16); i < stop; i++) chain += load(some + i * K + k, lanes);
                    x += chain;
                }
                store(sum + k, x, lanes);
            });
        }
    });
    for_vectors(K, [&](int64_t k, int lanes) {
        vf x = {};
        for (int64_t block = 0; block < blocks; block++) x += load(sums + block * K + k, lanes);
        store(out + k, x, lanes);
    });
}

}  // namespace

// tokens [B, h w, D], w [C p p, D], bias [C p p] or null -> x [B, C, h p, wide p].
template <class T>
void latent_projection_forward(
    const T* tokens, int64_t batch_stride, int64_t row_stride, const T* w, int64_t w_stride, const T* bias, T* x, int64_t B, int64_t C,
    int64_t p, int64_t h, int64_t wide, int64_t D, int threads
) {
    const Grid grid{C, p, h, wide};
    const int64_t K = grid.values(), plane = h * p * wide * p;
    Packed<T> b(D, K);
    b.pack({w, w_stride, 1}, threads);
    const int64_t each = round_up(grid.width(), 32);
    Buffer<float> lines(each * threads), added(K);
    for_vectors(K, [&](int64_t k, int lanes) { store(added + k, bias ? load(bias + k, lanes) : vf{}, lanes); });
    const Rows<T> rows = batched_rows(tokens, batch_stride, grid.tokens(), row_stride);
    gemm_strips<T>(B * grid.tokens(), grid, rows, b, [&](int64_t r0, int64_t count, float* values, int thread) {
        float* line = lines + each * thread;
        for (int64_t r = 0; r < count; r++)
            for_vectors(K, [&](int64_t k, int lanes) { store(values + r * K + k, load(values + r * K + k, lanes) + load(added + k,
                lanes), lanes); });
        for_strips(grid, r0, count, [&](int64_t strip, int64_t j0, int64_t j1, int64_t r) {
            T* corner = x + strip / h * C * plane + strip % h * p * grid.width() + j0 * p;
            for (int64_t c = 0; c < C; c++)
                for (int64_t dy = 0; dy < p; dy++) {
                    rows_to_line(values + (r - r0) * K + (c * p + dy) * p, line, K, j1 - j0, p);
                    T* out = corner + c * plane + dy * grid.width();
                    for_vectors((j1 - j0) * p, [&](int64_t i, int lanes) { store(out + i, load(line + i, lanes), lanes); });
                }
        });
    }, threads);
}
OV3_EXPORT(latent_projection_forward)

// grad_x [B, C, h p, wide p] with dense lines -> grad_tokens [B, h w, D], grad_w [C p p, D], grad_bias [C p p]; each may be null.
template <class T>
void latent_projection_backward(
    const T* grad_x, int64_t x_batch_stride, int64_t channel_stride, int64_t line_stride, const T* tokens, int64_t batch_stride,
    int64_t row_stride, const T* w, int64_t w_stride, T* grad_tokens, T* grad_w, T* grad_bias, int64_t B, int64_t C, int64_t p, int64_t h,
    int64_t wide, int64_t D, int threads
) {
    const ImageView<T> image{grad_x, x_batch_stride, channel_stride, line_stride, {C, p, h, wide}};
    const int64_t K = image.grid.values(), R = B * image.grid.tokens();
    Buffer<T> room(STRIP_ROWS * K * threads);
    if (grad_tokens) {
        Packed<T> b(K, D);
        b.pack({w, 1, w_stride}, threads);
        const auto fill = [&](int64_t m0, int64_t rows, word_t<T>* dst, int thread) {
            T* some = room + STRIP_ROWS * K * thread;
            for (int64_t m = 0; m < rows; m += STRIP_ROWS) {
                const int64_t count = std::min(STRIP_ROWS, rows - m);
                image.patches(m0 + m, count, some);
                pack_rows<T>(Rows<T>{some, K}, 0, count, K, dst + m * b.words);
            }
        };
        gemm_rows<T>(R, b, fill, store_rows(grad_tokens, D), nothing, threads);
    }
    if (grad_w) {
        OuterSums<T> sums(R, D, K, threads);
        const Rows<T> rows = batched_rows(tokens, batch_stride, image.grid.tokens(), row_stride);
        sums.add_all(R, rows, [&](int64_t r0, int64_t count, int thread) {
            T* some = room + STRIP_ROWS * K * thread;
            image.patches(r0, count, some);
            return Matrix<T>{some, 1, K};
        }, store_transposed(grad_w, D));
    }
    if (grad_bias) sum_patches(image, R, grad_bias, threads);
}
OV3_EXPORT(latent_projection_backward)
