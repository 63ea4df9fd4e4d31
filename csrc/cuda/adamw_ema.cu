// AdamW with gradient clipping and an EMA of the weights, over lists of tensors: one launch reads all gradients for their norm, a second one reads
// and writes every array once. A block handles a chunk of one tensor; the tensors' addresses are passed as a kernel parameter, so nothing is
// copied to the device beforehand and a captured graph contains them.
#include "vectors.h"

using namespace ov3;

namespace {

constexpr int CAPACITY = 512;  // tensors per launch: as many as fit in 32764 bytes of kernel parameters
constexpr int CHUNK = 8192;    // elements per block

struct Lists {
    void* params[CAPACITY];
    const void* grads[CAPACITY];
    float* exp_avgs[CAPACITY];
    float* exp_avg_sqs[CAPACITY];
    float* ema[CAPACITY];  // or null
    int64_t sizes[CAPACITY];
    float keep[CAPACITY];  // 1 - lr weight_decay; with Scheduled, weight_decay
    int32_t first[CAPACITY];  // first chunk of each tensor; the chunks of all tensors are numbered consecutively
    int32_t tensors, chunks;
};

// a + weight (b - a), computed from the nearer end: factor is weight or weight - 1.
struct Lerp {
    float factor;
    int32_t from_a;
    __device__ __forceinline__ float operator()(float a, float b) const { return (from_a ? a : b) + factor * (b - a); }
};

// A factor of all elements, as the sum of two floats: its rounding error would be common to all elements.
struct Twofold {
    float high, low;
    __device__ __forceinline__ float times(float x) const { return x * high + x * low; }
};

struct Step {
    Lerp average, ema;
    float beta2, rest2;          // rest2: 1 - beta2
    Twofold inverse_root, size;  // 1 / sqrt(1 - beta2^step), -lr / (1 - beta1^step)
    float eps;
    float max_norm;  // NaN for none
};

// Values that change from step to step, in device memory, since a captured graph keeps the Step that it was recorded with.
struct Scheduled {
    Twofold inverse_root, size;
    float ema_factor, ema_from_a, lr;
    __device__ __forceinline__ Step in(Step step) const {
        step.inverse_root = inverse_root;
        step.size = size;
        step.ema = {ema_factor, ema_from_a != 0};
        return step;
    }
};

struct Chunk {
    int tensor;
    int64_t start;
    int count;
};

__device__ __forceinline__ Chunk chunk_at(const Lists& lists, int index) {
    int low = 0, high = lists.tensors;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (lists.first[middle] <= index ? low : high) = middle;
    }
    const int64_t start = int64_t(index - lists.first[low]) * CHUNK, left = lists.sizes[low] - start;
    return {low, start, int(left < CHUNK ? left : CHUNK)};
}

__device__ __forceinline__ bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <int N>
struct Size {
    static constexpr int value = N;
};

// Calls body(Size, first element) for this thread's share of `count` elements: N at a time if alignment allows, else one.
template <int N, class Body>
__device__ __forceinline__ void for_elements(int count, bool vectors, const Body& body) {
    const int whole = vectors ? count / N * N : 0;
    // Not unrolled: other warps hide the latency, and unrolling would spill.
#pragma unroll 1
    for (int i = threadIdx.x * N; i < whole; i += THREADS * N) body(Size<N>(), i);
#pragma unroll 1
    for (int i = whole + threadIdx.x; i < count; i += THREADS) body(Size<1>(), i);
}

template <class G>
__device__ __forceinline__ void squares(const Lists& lists, float* partials) {
    constexpr int N = 16 / sizeof(G), UNROLL = 4;
    double total = 0;
    for (int index = blockIdx.x; index < lists.chunks; index += gridDim.x) {
        const Chunk chunk = chunk_at(lists, index);
        const G* g = static_cast<const G*>(lists.grads[chunk.tensor]) + chunk.start;
        const bool vectors = aligned(g);
        float sums[UNROLL] = {};
        int done = 0;
        if (vectors) {
            // Several loads in flight at once.
            for (; done + UNROLL * THREADS * N <= chunk.count; done += UNROLL * THREADS * N) {
                const G* from = g + done + threadIdx.x * N;
                const Packed<G, N> packs[UNROLL] = {
                    Packed<G, N>(from), Packed<G, N>(from + THREADS * N), Packed<G, N>(from + 2 * THREADS * N),
                    Packed<G, N>(from + 3 * THREADS * N)
                };
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    float values[N];
                    packs[u].unpack_to(values);
#pragma unroll
                    for (int j = 0; j < N; j++) sums[u] += values[j] * values[j];
                }
            }
        }
        for_elements<N>(chunk.count - done, vectors, [&](auto size, int i) {
            constexpr int n = decltype(size)::value;
            float values[n];
            load(g + done + i, values);
#pragma unroll
            for (int j = 0; j < n; j++) sums[0] += values[j] * values[j];
        });
        total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) partials[blockIdx.x] = float(total);
}

template <int N, class P, class G>
__device__ __forceinline__ void update_elements(P* p, const G* g, float* m, float* v, float* ema, float keep, float clip, const Step& step) {
    float params[N], grads[N], first[N], second[N];
    load(p, params);
    load(g, grads);
    load(m, first);
    load(v, second);
#pragma unroll
    for (int j = 0; j < N; j++) {
        const float grad = grads[j] * clip;
        first[j] = step.average(first[j], grad);
        second[j] = second[j] * step.beta2 + step.rest2 * grad * grad;
        params[j] = params[j] * keep + step.size.times(first[j] / (step.inverse_root.times(sqrtf(second[j])) + step.eps));
    }
    store(m, first);
    store(v, second);
    store(p, params);
    if (ema) {
        float averages[N];
        load(ema, averages);
#pragma unroll
        for (int j = 0; j < N; j++) averages[j] = step.ema(averages[j], to_float(rounded<P>(params[j])));
        store(ema, averages);
    }
}

template <class P, class G>
__device__ __forceinline__ void update(const Lists& lists, const Step& given, const Scheduled* scheduled, const float* partials, int parts, float* norm) {
    const Step step = scheduled ? scheduled->in(given) : given;
    const bool clips = step.max_norm == step.max_norm;
    float clip = 1.0f;
    // Every block adds up all partial sums: they are few and cached, and this avoids a third launch.
    if (clips || (norm && blockIdx.x == 0)) {
        double total = 0;
        for (int i = threadIdx.x; i < parts; i += THREADS) total += partials[i];
        const float all = float(sqrt(block_sum(total)));
        if (norm && blockIdx.x == 0 && threadIdx.x == 0) *norm = all;
        if (clips && !isfinite(all)) return;
        clip = step.max_norm / (all + 1e-6f);
        if (!clips || clip > 1.0f) clip = 1.0f;
    }
    // In reverse: the last gradients may still be cached.
    const Chunk chunk = chunk_at(lists, lists.chunks - 1 - blockIdx.x);
    const int t = chunk.tensor;
    P* p = static_cast<P*>(lists.params[t]) + chunk.start;
    const G* g = static_cast<const G*>(lists.grads[t]) + chunk.start;
    float *m = lists.exp_avgs[t] + chunk.start, *v = lists.exp_avg_sqs[t] + chunk.start;
    float* ema = lists.ema[t] ? lists.ema[t] + chunk.start : nullptr;
    const float keep = scheduled ? 1.0f - scheduled->lr * lists.keep[t] : lists.keep[t];
    const bool vectors = aligned(p) && aligned(g) && aligned(m) && aligned(v) && aligned(ema);
    for_elements<16 / sizeof(P)>(chunk.count, vectors, [&](auto size, int i) {
        update_elements<decltype(size)::value>(p + i, g + i, m + i, v + i, ema ? ema + i : nullptr, keep, clip, step);
    });
}

}  // namespace

// Lists of params P and grads G -> partials [blocks]: sums of squares of the gradients.
#define OV3_SQUARES(name, G) \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Lists lists, float* partials) { squares<G>(lists, partials); }
// One block per chunk. partials [parts] of all gradients of the step -> norm [1], or null if another launch writes it; all lists except the gradients.
#define OV3_UPDATE(name, P, G)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                 \
        name(const __grid_constant__ Lists lists, const __grid_constant__ Step step, const Scheduled* scheduled, const float* partials,   \
             int32_t parts, float* norm) {                                                                                                \
        update<P, G>(lists, step, scheduled, partials, parts, norm);                                                                      \
    }

OV3_SQUARES(ov3_adamw_ema_squares_f32, float)
OV3_SQUARES(ov3_adamw_ema_squares_bf16, bf16)
OV3_UPDATE(ov3_adamw_ema_update_f32_f32, float, float)
OV3_UPDATE(ov3_adamw_ema_update_bf16_bf16, bf16, bf16)
OV3_UPDATE(ov3_adamw_ema_update_bf16_f32, bf16, float)
