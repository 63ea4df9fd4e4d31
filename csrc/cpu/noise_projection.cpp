// y = (z + sigma eps) W^T + b, with noise generated where it is used and never stored.
#include "../common/philox.h"
#include "column_sums.h"
#include "export.h"
#include "outer_sums.h"

using namespace ov3;

namespace {

// z [B, N, K] with its noise. Row r belongs to instance r / N; its noise is elements [r K, (r + 1) K) of the random stream.
template <class T>
struct Noisy {
    const T* z;
    int64_t batch_stride, row_stride;
    const float* sigma;
    Philox philox;
    int64_t N, K;

    int64_t rows_at_once() const { return std::min<int64_t>(VL, std::max<int64_t>(1, 1024 / std::max<int64_t>(K, 1))); }
    int64_t room() const { return round_up(Philox::room(rows_at_once() * K), 16); }

    // Calls body(row, noise of the row) for rows [r0, r0 + count).
    template <class Body>
    void each(int64_t r0, int64_t count, float* room, const Body& body) const {
        const int64_t step = rows_at_once();
        for (int64_t r = 0; r < count; r += step) {
            const int64_t here = std::min(step, count - r);
            const float* noise = philox.draw((r0 + r) * K, here * K, room);
            for (int64_t i = 0; i < here; i++) body(r0 + r + i, noise + i * K);
        }
    }

    // x = z + sigma eps of rows [r0, r0 + count), rounded to T, with row stride K.
    void make(int64_t r0, int64_t count, T* x, float* room) const {
        each(r0, count, room, [&](int64_t r, const float* noise) {
            const T* row = z + r / N * batch_stride + r % N * row_stride;
            const float s = sigma[r / N];
            T* out = x + (r - r0) * K;
            for_vectors(K, [&](int64_t k, int lanes) { store(out + k, load(row + k, lanes) + s * load(noise + k, lanes), lanes); });
        });
    }
};

}  // namespace

// z [B, N, K], sigma [B] float, w [D, K], bias [D] or null, rng (seed, offset) -> y [B, N, D].
template <class T>
void noise_projection_forward(
    const T* z, int64_t batch_stride, int64_t row_stride, const float* sigma, const T* w, int64_t w_stride, const T* bias,
    const int64_t* rng, T* y, int64_t B, int64_t N, int64_t K, int64_t D, int threads
) {
    const Noisy<T> x{z, batch_stride, row_stride, sigma, Philox(rng), N, K};
    expect_writes(y, B * N * D);
    Packed<T> b(K, D);
    b.pack({w, w_stride, 1}, threads);
    Buffer<float> noise(x.room() * threads);
    Buffer<T> made(VL * K * threads);
    const auto fill = [&](int64_t m0, int64_t rows, word_t<T>* dst, int thread) {
        T* some = made + VL * K * thread;
        for (int64_t m = 0; m < rows; m += VL) {
            const int64_t count = std::min<int64_t>(VL, rows - m);
            x.make(m0 + m, count, some, noise + x.room() * thread);
            pack_rows<T>(Rows<T>{some, K}, 0, count, K, dst + m * b.words);
        }
    };
    gemm_rows<T>(B * N, b, fill, store_rows(y, D, bias), nothing, threads);
}
OV3_EXPORT(noise_projection_forward)

// grad_y [B N, D] -> grad_z [B, N, K], grad_sigma [B] float, grad_w [D, K], grad_bias [D]; each may be null.
template <class T>
void noise_projection_backward(
    const T* grad_y, int64_t grad_stride, const T* z, int64_t batch_stride, int64_t row_stride, const float* sigma, const T* w,
    int64_t w_stride, const int64_t* rng, T* grad_z, float* grad_sigma, T* grad_w, T* grad_bias, int64_t B, int64_t N, int64_t K, int64_t D,
    int threads
) {
    const Noisy<T> x{z, batch_stride, row_stride, sigma, Philox(rng), N, K};
    const int64_t R = B * N;
    Buffer<float> noise(x.room() * threads);
    if (grad_z || grad_sigma) {
        Packed<T> b(D, K);
        b.pack({w, 1, w_stride}, threads);
        Buffer<float> dots(grad_sigma ? R : 0);
        Buffer<T> rounded(grad_z ? 0 : R * K);
        T* out = grad_z ? grad_z : rounded;
        const auto fill = [&](int64_t m0, int64_t rows, word_t<T>* dst, int) {
            pack_rows<T>(Rows<T>{grad_y, grad_stride}, m0, rows, D, dst);
        };
        const auto done = [&](int64_t m0, int64_t rows, int thread) {
            if (!grad_sigma) return;
            x.each(m0, rows, noise + x.room() * thread, [&](int64_t r, const float* eps) {
                vf total[4] = {};
                for_vectors(K, [&](int64_t k, int lanes) { total[k / VL % 4] += load(out + r * K + k, lanes) * load(eps + k, lanes); });
                dots[r] = sum((total[0] + total[1]) + (total[2] + total[3]));
            });
        };
        gemm_rows<T>(R, b, fill, store_rows(out, K), done, threads);
        for (int64_t i = 0; grad_sigma && i < B; i++) {
            double total = 0.0;
            for (int64_t n = 0; n < N; n++) total += dots[i * N + n];
            grad_sigma[i] = float(total);
        }
    }
    if (grad_w) {
        Buffer<T> made(STRIP_ROWS * K * threads);
        OuterSums<T> sums(R, D, K, threads);
        sums.add_all(R, Rows<T>{grad_y, grad_stride}, [&](int64_t r0, int64_t rows, int thread) {
            T* some = made + STRIP_ROWS * K * thread;
            x.make(r0, rows, some, noise + x.room() * thread);
            return Matrix<T>{some, 1, K};
        }, store_block(grad_w, K));
    }
    if (grad_bias) column_sums(grad_y, grad_stride, R, D, grad_bias, threads);
}
OV3_EXPORT(noise_projection_backward)
