// AdamW with gradient clipping and an EMA of the weights, over lists of tensors: one pass over the gradients for their norm, then every array
// is read and written once, chunk by chunk.
#include <algorithm>
#include <cmath>

#include "export.h"
#include "parallel.h"
#include "simd.h"

using namespace ov3;

namespace {

constexpr int64_t CHUNK = 8192;  // elements per task
constexpr int64_t BLOCK = 1024;  // squares accumulated in float

// Numbers the chunks of all tensors consecutively.
class Chunks {
  public:
    Chunks(const int64_t* sizes, int64_t tensors) : sizes_(sizes), tensors_(tensors), first_(tensors + 1) {
        first_[0] = 0;
        for (int64_t i = 0; i < tensors; i++) first_[i + 1] = first_[i] + ceil_div(sizes[i], CHUNK);
    }
    int64_t count() const { return first_[tensors_]; }

    // body(tensor, first element, elements)
    template <class Body>
    void at(int64_t chunk, const Body& body) const {
        const int64_t* first = first_;
        const int64_t tensor = std::upper_bound(first, first + tensors_ + 1, chunk) - first - 1, start = (chunk - first[tensor]) * CHUNK;
        body(tensor, start, std::min(CHUNK, sizes_[tensor] - start));
    }

  private:
    const int64_t* sizes_;
    int64_t tensors_;
    Buffer<int64_t> first_;
};

template <class T>
inline double sum_of_squares(const T* g, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = std::min(n, start + BLOCK);
        vf squares[4] = {};
        int64_t i = start;
        for (; i + 4 * VL <= end; i += 4 * VL) {
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                const vf x = load(g + i + v * VL);
                squares[v] += x * x;
            }
        }
        for_vectors(end - i, [&](int64_t j, int lanes) {
            const vf x = load(g + i + j, lanes);
            squares[0] += x * x;
        });
        total += sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
    return total;
}

// a + weight (b - a), computed from the nearer end.
struct Lerp {
    bool from_a;
    float factor;
    explicit Lerp(double weight) : from_a(weight < 0.5), factor(float(from_a ? weight : weight - 1.0)) {}
    vf operator()(vf a, vf b) const { return (from_a ? a : b) + factor * (b - a); }
};

// A factor of all elements, as the sum of two floats: its rounding error would be common to all elements.
struct Twofold {
    float high, low;
    explicit Twofold(double x) : high(float(x)), low(float(x - high)) {}
    vf times(vf x) const { return x * high + x * low; }
};

struct Step {
    Lerp average, ema;
    float beta2, rest2;          // rest2: 1 - beta2
    Twofold inverse_root, size;  // 1 / sqrt(1 - beta2^step), -lr / (1 - beta1^step)
    float eps;
    float clip;
    bool clips;
};

template <class P, class G>
inline void update(P* p, const G* g, float* m, float* v, float* ema, float keep, int64_t n, const Step& step) {
    const Step s = step;
    for_vectors(n, [&](int64_t i, int lanes) {
        vf grad = load(g + i, lanes);
        if (s.clips) grad *= s.clip;
        const vf first = s.average(load(m + i, lanes), grad), second = load(v + i, lanes) * s.beta2 + s.rest2 * grad * grad;
        store(m + i, first, lanes);
        store(v + i, second, lanes);
        const vf value = load(p + i, lanes) * keep + s.size.times(first / (s.inverse_root.times(sqrt(second)) + s.eps));
        store(p + i, value, lanes);
        if (ema) store(ema + i, s.ema(load(ema + i, lanes), sizeof(P) == sizeof(float) ? value : load(p + i, lanes)), lanes);
    });
}

}  // namespace

// Arrays of the addresses of `tensors` tensors: params P, grads P or (wide_grads[i] != 0) float, exp_avgs, exp_avg_sqs and ema (or null)
// float; sizes: their numbers of elements; keep: 1 - lr weight_decay. max_norm: NaN for none. norm [1]: the norm of all gradients, given (if
// these are shards) or NaN, in which case it is computed. With max_norm, a non-finite norm leaves everything else unchanged.
template <class P>
void adamw_ema(
    P* const* params, void* const* grads, const int64_t* wide_grads, float* const* exp_avgs, float* const* exp_avg_sqs, float* const* ema,
    const int64_t* sizes, const double* keep, int64_t tensors, double rest1, double beta2, double root, double eps, double size,
    double max_norm, double ema_rest, float* norm, int threads
) {
    const Chunks chunks(sizes, tensors);
    Buffer<double> squares(chunks.count());
    const bool clips = max_norm == max_norm, given = *norm == *norm;
    Step step = {Lerp(rest1), Lerp(ema_rest), float(beta2), float(1.0 - beta2), Twofold(1.0 / root), Twofold(size), float(eps), 1.0f, clips};

    const auto with_grads = [&](int64_t tensor, int64_t start, const auto& body) {
        if (wide_grads[tensor]) {
            body(static_cast<const float*>(grads[tensor]) + start);
        } else {
            body(static_cast<const P*>(grads[tensor]) + start);
        }
    };
    const auto measure = [&](int64_t chunk) {
        chunks.at(chunk, [&](int64_t t, int64_t start, int64_t n) {
            with_grads(t, start, [&](const auto* g) { squares[chunk] = sum_of_squares(g, n); });
        });
    };
    const auto all = [&] {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks.count(); chunk++) total += squares[chunk];
        *norm = float(std::sqrt(total));
    };
    if (clips) {
        if (!given) {
            parallel(chunks.count(), threads, [&](int64_t chunk, int) { measure(chunk); });
            all();
        }
        if (!std::isfinite(*norm)) return;
        step.clip = float(max_norm) / (*norm + 1e-6f);
        if (step.clip > 1.0f) step.clip = 1.0f;
    }
    // In reverse: the last gradients may still be cached.
    parallel(chunks.count(), threads, [&](int64_t task, int) {
        const int64_t chunk = chunks.count() - 1 - task;
        if (!clips && !given) measure(chunk);
        chunks.at(chunk, [&](int64_t t, int64_t start, int64_t n) {
            with_grads(t, start, [&](const auto* g) {
                float* average = ema ? ema[t] + start : nullptr;
                update(params[t] + start, g, exp_avgs[t] + start, exp_avg_sqs[t] + start, average, float(keep[t]), n, step);
            });
        });
    });
    if (!clips && !given) all();
}
OV3_EXPORT(adamw_ema)
