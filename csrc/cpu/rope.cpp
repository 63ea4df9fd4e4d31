// Rotary positions, and RMS norm before them, of q and k in rows (q, k, v) of heads: one read, one write. v passes through.
#include <algorithm>

#include "export.h"
#include "parallel.h"
#include "row_sums.h"

using namespace ov3;

namespace {

constexpr int64_t TOKENS = 16;  // of a task
constexpr int64_t STRIP = 32;   // tokens whose gradients by the weights are added up in one go

// Neighbouring lanes (2i, 2i + 1) in each other's places.
inline vf swap_pairs(vf x) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_permute_ps(bit_cast<__m512>(x), 0xb1));
#elif defined(__AVX2__)
    return bit_cast<vf>(_mm256_permute_ps(bit_cast<__m256>(x), 0xb1));
#else
    return vf{x[1], x[0], x[3], x[2]};
#endif
}

// A token's rotation: x turned = x cosine + swap_pairs(x) sine, the sines' signs within.
struct Turn {
    float *cosine, *sine;  // [P]
    void load_angles(const float* c, const float* s, int64_t P, bool inverse) const {
        const float sign = inverse ? -1.0f : 1.0f;
        for (int64_t i = 0; i < P / 2; i++) {
            cosine[2 * i] = cosine[2 * i + 1] = c[i];
            sine[2 * i] = -sign * s[i];
            sine[2 * i + 1] = sign * s[i];
        }
    }
    vf operator()(vf x, int64_t p, int lanes) const { return x * load(cosine + p, lanes) + swap_pairs(x) * load(sine + p, lanes); }
};

}  // namespace

// qkv [R, 3 H P] with rows a stride apart, row r being token r % N of its sample; cosine, sine [N, P / 2] -> out [R, 3 H P]. Without weights [P]
// (null) nothing is normalised. inverse: turns back.
template <class T>
void rope_forward(
    const T* qkv, int64_t stride, const float* cosine, const float* sine, const float* q_weight, const float* k_weight, double eps, T* out,
    bool inverse, int64_t R, int64_t N, int64_t H, int64_t P, int threads
) {
    expect_writes(out, R * 3 * H * P);
    Buffer<float> rooms(threads * 2 * P);
    parallel(ceil_div(R, TOKENS), threads, [&](int64_t task, int thread) {
        const Turn turn = {rooms + thread * 2 * P, rooms + thread * 2 * P + P};
        for (int64_t r = task * TOKENS; r < std::min(R, (task + 1) * TOKENS); r++) {
            turn.load_angles(cosine + r % N * (P / 2), sine + r % N * (P / 2), P, inverse);
            const T* x = qkv + r * stride;
            T* y = out + r * 3 * H * P;
            for (const float* weight : {q_weight, k_weight}) {
                for (int64_t head = 0; head < H; head++, x += P, y += P) {
                    if (!weight) {
                        for_vectors(P, [&](int64_t p, int lanes) { store(y + p, turn(load(x + p, lanes), p, lanes), lanes); });
                        continue;
                    }
                    const float s = 1.0f / std::sqrt(sum(lane_sums(P, [&](int64_t p, int lanes) {
                        const vf v = load(x + p, lanes);
                        return v * v;
                    })) / float(P) + float(eps));
                    for_vectors(P, [&](int64_t p, int lanes) {
                        store(y + p, turn(load(x + p, lanes) * s * load(weight + p, lanes), p, lanes), lanes);
                    });
                }
            }
            std::memcpy(y, x, H * P * sizeof(T));
        }
    });
}
OV3_EXPORT(rope_forward)

// Of the call with weights: grad_y, qkv [R, 3 H P] with rows a stride apart -> grad_qkv [R, 3 H P], grad_weights [2, P] float; either may be null.
template <class T>
void rope_backward(
    const T* grad_y, int64_t grad_stride, const T* qkv, int64_t stride, const float* cosine, const float* sine, const float* q_weight,
    const float* k_weight, double eps, T* grad_qkv, float* grad_weights, int64_t R, int64_t N, int64_t H, int64_t P, int threads
) {
    const int64_t strips = ceil_div(R, STRIP);
    if (grad_qkv) expect_writes(grad_qkv, R * 3 * H * P);
    Buffer<float> rooms(threads * 5 * P);
    Buffer<float> partial(grad_weights ? strips * 2 * P : 0);
    parallel(strips, threads, [&](int64_t strip, int thread) {
        float *room = rooms + thread * 5 * P, *back = room + 2 * P, *of_token = room + 3 * P;
        const Turn turn = {room, room + P};
        float* sums = grad_weights ? partial + strip * 2 * P : nullptr;
        if (sums) std::memset(sums, 0, 2 * P * sizeof(float));
        for (int64_t r = strip * STRIP; r < std::min(R, (strip + 1) * STRIP); r++) {
            turn.load_angles(cosine + r % N * (P / 2), sine + r % N * (P / 2), P, true);
            std::memset(of_token, 0, 2 * P * sizeof(float));
            const T *dy = grad_y + r * grad_stride, *x = qkv + r * stride;
            T* out = grad_qkv ? grad_qkv + r * 3 * H * P : nullptr;
            for (int part = 0; part < 2; part++) {
                const float* weight = part ? k_weight : q_weight;
                float* dweight = of_token + part * P;
                for (int64_t head = 0; head < H; head++, dy += P, x += P) {
                    vf squares = {}, dots = {};
                    for_vectors(P, [&](int64_t p, int lanes) {
                        const vf v = load(x + p, lanes), g = turn(load(dy + p, lanes), p, lanes);
                        store(back + p, g, lanes);
                        squares += v * v;
                        dots += g * load(weight + p, lanes) * v;
                    });
                    const float s = 1.0f / std::sqrt(sum(squares) / float(P) + float(eps)), along = sum(dots) * s / float(P);
                    for_vectors(P, [&](int64_t p, int lanes) {
                        const vf g = load(back + p, lanes), normal = load(x + p, lanes) * s;
                        if (sums) store(dweight + p, load(dweight + p, lanes) + g * normal, lanes);
                        if (out) store(out + p, (g * load(weight + p, lanes) - normal * along) * s, lanes);
                    });
                    if (out) out += P;
                }
            }
            if (out) std::memcpy(out, dy, H * P * sizeof(T));
            if (sums)
                for_vectors(2 * P, [&](int64_t p, int lanes) { store(sums + p, load(sums + p, lanes) + load(of_token + p, lanes), lanes); });
        }
    });
    if (!grad_weights) return;
    for_vectors(2 * P, [&](int64_t p, int lanes) {
        vf total = {};
        for (int64_t strip = 0; strip < strips; strip++) total += load(partial + strip * 2 * P + p, lanes);
        store(grad_weights + p, total, lanes);
    });
}
OV3_EXPORT(rope_backward)
