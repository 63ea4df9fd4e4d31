// Latents to tokens in one pass: sampling, scale and shift, patches, product, CLS token and position embedding, strip by strip.
#include <algorithm>

#include "../common/philox.h"
#include "column_sums.h"
#include "export.h"
#include "outer_sums.h"
#include "patches.h"

using namespace ov3;

namespace {

// Latents [B, C, H, W], or with `moments` [B, 2 C, H, W], with dense lines of pixels. `sampled` requires moments.
template <class L>
struct Latents {
    const L* data;
    int64_t batch_stride, channel_stride, line_stride;
    Grid grid;
    bool moments, sampled;
    float scale, shift;
    Philox philox;

    // Pixel x0 of line (c, dy) of a strip.
    const L* at(int64_t strip, int64_t c, int64_t dy, int64_t x0) const {
        return data + strip / grid.h * batch_stride + c * channel_stride + (strip % grid.h * grid.p + dy) * line_stride + x0;
    }
    // Noise of channel c of patches [j0, j1) of a strip, with line stride grid.width(). Null without sampling.
    const float* draw(int64_t strip, int64_t c, int64_t j0, int64_t j1, float* room) const {
        if (!sampled) return nullptr;
        const int64_t line = (strip / grid.h * grid.C + c) * grid.h * grid.p + strip % grid.h * grid.p;
        return philox.draw(line * grid.width() + j0 * grid.p, (grid.p - 1) * grid.width() + (j1 - j0) * grid.p, room);
    }
    const L* logvar(const L* mean) const { return mean + grid.C * channel_stride; }
    int64_t room() const { return round_up(Philox::room(grid.p * grid.width()), 16); }

    static vf deviation(vf logvar) { return exp(0.5f * min(max(logvar, splat(-30.0f)), splat(20.0f))); }

    // Pixels [x0, x0 + n) of a line, sampled, scaled and rounded to T.
    template <class T>
    void line(int64_t strip, int64_t c, int64_t dy, int64_t x0, int64_t n, const float* noise, T* out) const {
        const L* mean = at(strip, c, dy, x0);
        for_vectors(n, [&](int64_t i, int lanes) {
            vf z = load(mean + i, lanes);
            if (sampled) z += deviation(load(logvar(mean) + i, lanes)) * load(noise + i, lanes);
            store(out + i, (z - shift) * scale, lanes);
        });
    }

    // Rows [r0, r0 + rows) of patches, dense. `pixels` holds a line.
    template <class T>
    void patches(int64_t r0, int64_t rows, T* out, T* pixels, float* room) const {
        const int64_t p = grid.p, K = grid.values();
        for_strips(grid, r0, rows, [&](int64_t strip, int64_t j0, int64_t j1, int64_t r) {
            for (int64_t c = 0; c < grid.C; c++) {
                const float* noise = draw(strip, c, j0, j1, room);
                for (int64_t dy = 0; dy < p; dy++) {
                    line(strip, c, dy, j0 * p, (j1 - j0) * p, noise ? noise + dy * grid.width() : nullptr, pixels);
                    line_to_rows(pixels, out + (r - r0) * K + (c * p + dy) * p, K, j1 - j0, p);
                }
            }
        });
    }

    // The gradient of pixels [x0, x0 + n) of a line, from that of z before scaling; grad has dense lines.
    void gradient(int64_t strip, int64_t c, int64_t dy, int64_t x0, int64_t n, const float* dz, const float* noise, L* grad) const {
        const int64_t H = grid.h * grid.p, plane = H * grid.width(), channels = moments ? 2 * grid.C : grid.C;
        const L* mean = at(strip, c, dy, x0);
        L* dmean = grad + (strip / grid.h * channels + c) * plane + (strip % grid.h * grid.p + dy) * grid.width() + x0;
        L* dlogvar = dmean + grid.C * plane;
        for_vectors(n, [&](int64_t i, int lanes) {
            const vf g = load(dz + i, lanes) * scale;
            store(dmean + i, g, lanes);
            if (!moments) return;
            vf d = {};
            if (sampled) {
                const vf v = load(logvar(mean) + i, lanes), inside = ((v >= -30.0f) & (v <= 20.0f)) ? splat(0.5f) : vf{};
                d = deviation(v) * inside * load(noise + i, lanes) * g;
            }
            store(dlogvar + i, d, lanes);
        });
    }
};

template <class L>
Latents<L> latents_of(
    const void* data, int64_t batch_stride, int64_t channel_stride, int64_t line_stride, const int64_t* rng, int64_t moments, double scale,
    double shift, Grid grid
) {
    const int64_t none[2] = {};
    return {static_cast<const L*>(data), batch_stride, channel_stride, line_stride, grid, moments != 0, rng != nullptr, float(scale),
            float(shift), Philox(rng ? rng : none)};
}

// A thread's workspace for packing strips of patches.
template <class T>
struct PatchRoom {
    PatchRoom(const Grid& g, int64_t rows, int64_t noise, int threads)
        : each(round_up(rows * g.values(), 32)), line(round_up(g.width(), 32)), noise(noise), rows_(each * threads), line_(line * threads),
          noise_(noise * threads) {}
    const int64_t each, line, noise;
    T* rows_of(int thread) { return rows_ + each * thread; }
    T* line_of(int thread) { return line_ + line * thread; }
    float* noise_of(int thread) { return noise_ + noise * thread; }

  private:
    Buffer<T> rows_, line_;
    Buffer<float> noise_;
};

template <class T, class L>
void forward(const Latents<L>& z, const T* w, int64_t w_stride, const T* bias, const T* pos, const T* cls, T* y, int64_t B, int64_t D,
    int threads) {
    const int64_t K = z.grid.values(), N = z.grid.tokens(), first = cls != nullptr;
    expect_writes(y, B * (first + N) * D);
    Packed<T> b(K, D);
    b.pack({w, w_stride, 1}, threads);
    PatchRoom<T> room(z.grid, 64, z.room(), threads);
    const auto fill = [&](int64_t m0, int64_t rows, word_t<T>* dst, int thread) {
        for (int64_t m = 0; m < rows; m += 64) {
            const int64_t count = std::min<int64_t>(64, rows - m);
            z.patches(m0 + m, count, room.rows_of(thread), room.line_of(thread), room.noise_of(thread));
            pack_rows<T>(Rows<T>{room.rows_of(thread), K}, 0, count, K, dst + m * b.words);
        }
    };
    const auto store_token = [&](int64_t m, int64_t d, int count, const float* values) {
        const int64_t n = first + m % N;
        T* out = y + ((first + N) * (m / N) + n) * D + d;
        for_vectors(count, [&](int64_t i, int lanes) {
            vf v = load(values + i, lanes);
            if (bias) v += load(bias + d + i, lanes);
            if (pos) v += load(pos + n * D + d + i, lanes);
            store(out + i, v, lanes);
        });
    };
    gemm_rows<T>(B * N, b, fill, store_token, nothing, threads);
    if (!cls) return;
    parallel(B, threads, [&](int64_t image, int) {
        for_vectors(D, [&](int64_t d, int lanes) {
            vf v = load(cls + d, lanes);
            if (pos) v += load(pos + d, lanes);
            store(y + image * (1 + N) * D + d, v, lanes);
        });
    });
}

// out [rows, D] = sum of grad_y over images, in order.
template <class T>
void sum_over_images(const T* grad_y, int64_t batch_stride, int64_t row_stride, T* out, int64_t B, int64_t rows, int64_t D, int threads) {
    parallel(rows, threads, [&](int64_t n, int) {
        for_vectors(D, [&](int64_t d, int lanes) {
            vf total = {}, chain = {};
            for (int64_t image = 0; image < B; image++) {
                chain += load(grad_y + image * batch_stride + n * row_stride + d, lanes);
                if (image % 16 == 15) total += chain, chain = vf{};
            }
            store(out + n * D + d, total + chain, lanes);
        });
    });
}

template <class T, class L>
void backward(
    const T* grad_y, int64_t batch_stride, int64_t row_stride, bool has_cls, const Latents<L>& z, const T* w, int64_t w_stride,
    L* grad_latents, T* grad_w, T* grad_bias, T* grad_pos, T* grad_cls, int64_t B, int64_t D, int threads
) {
    const int64_t K = z.grid.values(), N = z.grid.tokens(), R = B * N;
    const Rows<T> dy = batched_rows(grad_y + (has_cls ? row_stride : 0), batch_stride, N, row_stride);
    if (grad_latents) {
        Packed<T> b(D, K);
        b.pack({w, 1, w_stride}, threads);
        PatchRoom<float> room(z.grid, 0, z.room(), threads);
        const int64_t p = z.grid.p;
        gemm_strips<T>(R, z.grid, dy, b, [&](int64_t r0, int64_t rows, const float* made, int thread) {
            float* line = room.line_of(thread);
            for_strips(z.grid, r0, rows, [&](int64_t strip, int64_t j0, int64_t j1, int64_t r) {
                for (int64_t c = 0; c < z.grid.C; c++) {
                    const float* noise = z.draw(strip, c, j0, j1, room.noise_of(thread));
                    for (int64_t dy = 0; dy < p; dy++) {
                        rows_to_line(made + (r - r0) * K + (c * p + dy) * p, line, K, j1 - j0, p);
                        z.gradient(strip, c, dy, j0 * p, (j1 - j0) * p, line, noise ? noise + dy * z.grid.width() : nullptr, grad_latents);
                    }
                }
            });
        }, threads);
    }
    if (grad_w) {
        PatchRoom<T> room(z.grid, STRIP_ROWS, z.room(), threads);
        OuterSums<T> sums(R, D, K, threads);
        sums.add_all(R, dy, [&](int64_t r0, int64_t rows, int thread) {
            z.patches(r0, rows, room.rows_of(thread), room.line_of(thread), room.noise_of(thread));
            return Matrix<T>{room.rows_of(thread), 1, K};
        }, store_block(grad_w, K));
    }
    if (grad_pos) sum_over_images(grad_y, batch_stride, row_stride, grad_pos, B, N + has_cls, D, threads);
    if (grad_cls) sum_over_images(grad_y, batch_stride, row_stride, grad_cls, B, 1, D, threads);
    if (grad_bias) {
        // Sums per image first, since images need not be contiguous.
        Buffer<float> sums(std::max<int64_t>(B, 1) * D);
        parallel(B, threads, [&](int64_t image, int) {
            column_sums<T, float>(dy.data + image * batch_stride, row_stride, N, D, sums + image * D, 1);
        });
        column_sums<float, T>(sums, D, B, D, grad_bias, threads);
    }
}

}  // namespace

// latents [B, C, H, W] or moments [B, 2 C, H, W] of float (wide) or T, w [D, C p p], bias [D], pos [(1+) h w, D], cls [D] or null, rng
// (seed, offset) or null -> y [B, (1+) h w, D].
template <class T>
void patch_embed_forward(
    const void* latents, int64_t batch_stride, int64_t channel_stride, int64_t line_stride, int64_t is_wide, const T* w, int64_t w_stride,
    const T* bias, const T* pos, const T* cls, const int64_t* rng, double scale, double shift, int64_t moments, T* y, int64_t B, int64_t C,
    int64_t p, int64_t h, int64_t wide, int64_t D, int threads
) {
    const auto run = [&](auto element) {
        typedef decltype(element) L;
        const auto z = latents_of<L>(latents, batch_stride, channel_stride, line_stride, rng, moments, scale, shift, {C, p, h, wide});
        forward<T, L>(z, w, w_stride, bias, pos, cls, y, B, D, threads);
    };
    is_wide ? run(float{}) : run(T{});
}
OV3_EXPORT(patch_embed_forward)

// grad_y [B, (1+) h w, D] -> grad_latents (dense, with latents' shape and type), grad_w [D, C p p], grad_bias [D], grad_pos [(1+) h w, D],
// grad_cls [D]; each may be null.
template <class T>
void patch_embed_backward(
    const T* grad_y, int64_t grad_batch_stride, int64_t grad_row_stride, int64_t has_cls, const void* latents, int64_t batch_stride,
    int64_t channel_stride, int64_t line_stride, int64_t is_wide, const T* w, int64_t w_stride, const int64_t* rng, double scale,
    double shift, int64_t moments, void* grad_latents, T* grad_w, T* grad_bias, T* grad_pos, T* grad_cls, int64_t B, int64_t C, int64_t p,
    int64_t h, int64_t wide, int64_t D, int threads
) {
    const auto run = [&](auto element) {
        typedef decltype(element) L;
        const auto z = latents_of<L>(latents, batch_stride, channel_stride, line_stride, rng, moments, scale, shift, {C, p, h, wide});
        backward<T, L>(grad_y, grad_batch_stride, grad_row_stride, has_cls != 0, z, w, w_stride, static_cast<L*>(grad_latents), grad_w,
                       grad_bias, grad_pos, grad_cls, B, D, threads);
    };
    is_wide ? run(float{}) : run(T{});
}
OV3_EXPORT(patch_embed_backward)
