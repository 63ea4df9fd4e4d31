// Group normalisation and SiLU of channels-last tensors, x [B, S, C] with contiguous spatial positions per image. A block handles a strip of
// positions and a tile of channels; each thread handles N adjacent channels and steps down the strip, one row of threads at a
// time. Per-channel results of each strip are stored, and later launches merge the strips in order, so that the bits are the same on every GPU.
//
//     forward:  strips' moments -> mean and rstd of each group -> y
//     backward: strips' sums of dn and dn x_hat -> sums of each channel -> means over groups, gradients of weight and bias -> dx
#include "vectors.h"

using namespace ov3;

namespace {

constexpr int UNROLL = 4;  // loads of a thread in flight at once
constexpr int CHAIN = 16;  // terms of a channel's gradient accumulated in one chain, short for precision

struct Shape {
    int64_t S;
    int32_t B, C, G;
    int32_t rows, strips;  // positions per strip, strips per image
    int32_t columns;       // packs of N channels per tile

    __device__ __forceinline__ int per_group() const { return C / G; }
};

// Weight and bias, float32 (wide) or in the activations' type.
template <class T>
struct Parameter {
    const void* address;
    bool wide;
    template <int N>
    __device__ __forceinline__ void load_at(int channel, float (&out)[N]) const {
        if (wide) {
            load(static_cast<const float*>(address) + channel, out);
        } else {
            load(static_cast<const T*>(address) + channel, out);
        }
    }
    __device__ __forceinline__ float at(int channel) const {
        return wide ? static_cast<const float*>(address)[channel] : to_float(static_cast<const T*>(address)[channel]);
    }
};

// values [B, G] for N channels, which usually belong to one group.
template <int N>
__device__ __forceinline__ void load_per_group(const float* values, const Shape& shape, int b, int channel, float (&out)[N]) {
    const int per_group = shape.per_group();
    const float* group = values + int64_t(b) * shape.G + channel / per_group;
    float value = *group;
    int left = per_group - channel % per_group;
#pragma unroll
    for (int j = 0; j < N; j++) {
        out[j] = value;
        if (--left == 0 && j + 1 < N) {
            value = *++group;
            left = per_group;
        }
    }
}

// The position that a thread works on.
template <int N>
struct Position {
    int b, strip, channel;  // channel: the first of N
    int column, row, stride;  // of the thread within the tile; stride: number of thread rows
    int rows;                 // of the strip
    bool active;

    __device__ __forceinline__ Position(const Shape& shape, int block, int tile) {
        b = block / shape.strips;
        strip = block % shape.strips;
        column = threadIdx.x % shape.columns;
        row = threadIdx.x / shape.columns;
        stride = THREADS / shape.columns;
        channel = (tile * shape.columns + column) * N;
        const int64_t left = shape.S - int64_t(strip) * shape.rows;
        rows = int(left < shape.rows ? left : shape.rows);
        active = row < stride && channel < shape.C;
    }
    // Offset of the strip's first element of this thread's channels.
    __device__ __forceinline__ int64_t offset(const Shape& shape) const {
        return (int64_t(b) * shape.S + int64_t(strip) * shape.rows) * shape.C + channel;
    }
    // Rows of the strip handled by thread rows [from, to).
    __device__ __forceinline__ int rows_of(int from, int to) const {
        const int rest = rows % stride - from, width = to - from;
        return width * (rows / stride) + (rest < 0 ? 0 : rest < width ? rest : width);
    }
    // Offset in [B, strips, 2, C] of the strip's i-th result for this thread's channels.
    __device__ __forceinline__ int64_t part(const Shape& shape, int i) const {
        return ((int64_t(b) * shape.strips + strip) * 2 + i) * shape.C + channel;
    }
};

template <int N>
__device__ __forceinline__ void store_floats(float* to, const float (&values)[N]) {
    if constexpr (N == 8) {
        reinterpret_cast<float4*>(to)[0] = {values[0], values[1], values[2], values[3]};
        reinterpret_cast<float4*>(to)[1] = {values[4], values[5], values[6], values[7]};
    } else {
        store(to, values);
    }
}

// Welford's mean and sum of squared deviations of N channels: one pass, accurate for large means.
template <int N>
struct Moments {
    float mean[N] = {}, squares[N] = {};

    __device__ __forceinline__ void add(const float (&x)[N], float inverse_count) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float delta = x[j] - mean[j];
            mean[j] += delta * inverse_count;
            squares[j] += delta * (x[j] - mean[j]);
        }
    }
};

template <class T, int N>
__device__ __forceinline__ void moments(const T* x, float* parts, const Shape& shape) {
    const Position<N> pos(shape, blockIdx.x, blockIdx.y);
    Moments<N> own;
    if (pos.active) {
        const T* data = x + pos.offset(shape);
        const int64_t step = int64_t(pos.stride) * shape.C;
        data += int64_t(pos.row) * shape.C;
        int row = pos.row;
        float count = 0;
        const auto add = [&](const Packed<T, N>& pack) {
            float values[N];
            pack.unpack_to(values);
            count += 1.0f;
            own.add(values, __frcp_rn(count));
        };
        for (; row + 3 * pos.stride < pos.rows; row += UNROLL * pos.stride, data += UNROLL * step) {
            const Packed<T, N> packs[UNROLL] = {
                Packed<T, N>(data), Packed<T, N>(data + step), Packed<T, N>(data + 2 * step), Packed<T, N>(data + 3 * step)
            };
#pragma unroll
            for (int u = 0; u < UNROLL; u++) add(packs[u]);
        }
        for (; row < pos.rows; row += pos.stride, data += step) add(Packed<T, N>(data));
    }
    // Thread rows are merged in a binary tree.
    __shared__ float means[N][THREADS], squares[N][THREADS];
#pragma unroll
    for (int j = 0; j < N; j++) means[j][threadIdx.x] = own.mean[j], squares[j][threadIdx.x] = own.squares[j];
    for (int reach = 1; reach < pos.stride; reach *= 2) {
        __syncthreads();
        const int other = pos.row + reach, end = min(other + reach, pos.stride);
        if (pos.active && pos.row % (2 * reach) == 0 && other < pos.stride) {
            const float mine = float(pos.rows_of(pos.row, other)), theirs = float(pos.rows_of(other, end));
            if (theirs > 0) {
                const float share = theirs / (mine + theirs);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    const int at = threadIdx.x + reach * shape.columns;
                    const float delta = means[j][at] - own.mean[j];
                    own.squares[j] += squares[j][at] + delta * delta * (mine * share);
                    own.mean[j] += delta * share;
                    means[j][threadIdx.x] = own.mean[j];
                    squares[j][threadIdx.x] = own.squares[j];
                }
            }
        }
    }
    if (pos.active && pos.row == 0) {
        store_floats(parts + pos.part(shape, 0), own.mean);
        store_floats(parts + pos.part(shape, 1), own.squares);
    }
}

// dn and x_hat of N elements.
template <int N>
struct Normal {
    float mean[N], rstd[N], weight[N], bias[N];

    template <class T>
    __device__ __forceinline__ Normal(
        const float* means, const float* rstds, const Parameter<T>& weights, const Parameter<T>& biases, const Shape& shape, int b, int channel
    ) {
        load_per_group(means, shape, b, channel, mean);
        load_per_group(rstds, shape, b, channel, rstd);
        weights.load_at(channel, weight);
        biases.load_at(channel, bias);
    }
    __device__ __forceinline__ void back(float grad_y, float x, int j, float& x_hat, float& grad_n) const {
        x_hat = (x - mean[j]) * rstd[j];
        const float n = x_hat * weight[j] + bias[j], gate = __fdividef(1.0f, 1.0f + __expf(-n));
        grad_n = grad_y * gate * (1.0f + n * (1.0f - gate));
    }
};

template <class T, int N>
__device__ __forceinline__ void write_silu(
    const T* x, const Parameter<T>& weights, const Parameter<T>& biases, const float* means, const float* rstds, T* y, const Shape& shape
) {
    // In reverse: what was read last may still be cached.
    const Position<N> pos(shape, gridDim.x - 1 - blockIdx.x, blockIdx.y);
    if (!pos.active) return;
    float mean[N], scale[N], bias[N];
    {
        float weight[N];
        load_per_group(means, shape, pos.b, pos.channel, mean);
        load_per_group(rstds, shape, pos.b, pos.channel, scale);
        weights.load_at(pos.channel, weight);
        biases.load_at(pos.channel, bias);
#pragma unroll
        for (int j = 0; j < N; j++) scale[j] *= weight[j];
    }
    const int64_t step = int64_t(pos.stride) * shape.C, first = pos.offset(shape) + int64_t(pos.row) * shape.C;
    const T* from = x + first;
    T* to = y + first;
    const auto write = [&](const Packed<T, N>& pack, T* out) {
        float values[N];
        pack.unpack_to(values);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float n = (values[j] - mean[j]) * scale[j] + bias[j];
            values[j] = __fdividef(n, 1.0f + __expf(-n));
        }
        store(out, values);
    };
    int row = pos.row;
    for (; row + 3 * pos.stride < pos.rows; row += UNROLL * pos.stride, from += UNROLL * step, to += UNROLL * step) {
        const Packed<T, N> packs[UNROLL] = {
            Packed<T, N>(from), Packed<T, N>(from + step), Packed<T, N>(from + 2 * step), Packed<T, N>(from + 3 * step)
        };
#pragma unroll
        for (int u = 0; u < UNROLL; u++) write(packs[u], to + u * step);
    }
    for (; row < pos.rows; row += pos.stride, from += step, to += step) write(Packed<T, N>(from), to);
}

template <class T, int N>
__device__ __forceinline__ void strip_sums(
    const T* grad_y, const T* x, const Parameter<T>& weights, const Parameter<T>& biases, const float* means, const float* rstds, float* parts,
    const Shape& shape
) {
    const Position<N> pos(shape, blockIdx.x, blockIdx.y);
    float sums[N] = {}, dots[N] = {};
    if (pos.active) {
        const Normal<N> normal(means, rstds, weights, biases, shape, pos.b, pos.channel);
        const int64_t step = int64_t(pos.stride) * shape.C, first = pos.offset(shape) + int64_t(pos.row) * shape.C;
        const T *dy = grad_y + first, *data = x + first;
        for (int row = pos.row; row < pos.rows;) {
            float some[N] = {}, along[N] = {};
            const auto add = [&](const Packed<T, N>& grads, const Packed<T, N>& values) {
                float g[N], v[N];
                grads.unpack_to(g);
                values.unpack_to(v);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float x_hat, grad_n;
                    normal.back(g[j], v[j], j, x_hat, grad_n);
                    some[j] += grad_n;
                    along[j] += grad_n * x_hat;
                }
            };
            const int end = min(pos.rows, row + CHAIN * pos.stride);
            for (; row + pos.stride < end; row += 2 * pos.stride, dy += 2 * step, data += 2 * step) {
                const Packed<T, N> grads[2] = {Packed<T, N>(dy), Packed<T, N>(dy + step)};
                const Packed<T, N> values[2] = {Packed<T, N>(data), Packed<T, N>(data + step)};
                add(grads[0], values[0]);
                add(grads[1], values[1]);
            }
            for (; row < end; row += pos.stride, dy += step, data += step) add(Packed<T, N>(dy), Packed<T, N>(data));
#pragma unroll
            for (int j = 0; j < N; j++) sums[j] += some[j], dots[j] += along[j];
        }
    }
    __shared__ float shared[2][N][THREADS];
#pragma unroll
    for (int j = 0; j < N; j++) shared[0][j][threadIdx.x] = sums[j], shared[1][j][threadIdx.x] = dots[j];
    for (int reach = 1; reach < pos.stride; reach *= 2) {
        __syncthreads();
        if (pos.active && pos.row % (2 * reach) == 0 && pos.row + reach < pos.stride) {
            const int at = threadIdx.x + reach * shape.columns;
#pragma unroll
            for (int j = 0; j < N; j++) {
                shared[0][j][threadIdx.x] = sums[j] += shared[0][j][at];
                shared[1][j][threadIdx.x] = dots[j] += shared[1][j][at];
            }
        }
    }
    if (pos.active && pos.row == 0) {
        store_floats(parts + pos.part(shape, 0), sums);
        store_floats(parts + pos.part(shape, 1), dots);
    }
}

template <class T, int N>
__device__ __forceinline__ void write_grad(
    const T* grad_y, const T* x, const Parameter<T>& weights, const Parameter<T>& biases, const float* means, const float* rstds,
    const float* mean_sums, const float* mean_dots, T* grad_x, const Shape& shape
) {
    const Position<N> pos(shape, gridDim.x - 1 - blockIdx.x, blockIdx.y);
    if (!pos.active) return;
    const Normal<N> normal(means, rstds, weights, biases, shape, pos.b, pos.channel);
    float sum[N], dot[N];
    load_per_group(mean_sums, shape, pos.b, pos.channel, sum);
    load_per_group(mean_dots, shape, pos.b, pos.channel, dot);
    // A group of one value is always normalised to 0.
    const bool constant = int64_t(shape.per_group()) * shape.S == 1;
    const int64_t step = int64_t(pos.stride) * shape.C, first = pos.offset(shape) + int64_t(pos.row) * shape.C;
    const T *dy = grad_y + first, *from = x + first;
    T* to = grad_x + first;
    const auto write = [&](const Packed<T, N>& grads, const Packed<T, N>& values, T* out) {
        float g[N], v[N];
        grads.unpack_to(g);
        values.unpack_to(v);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float x_hat, grad_n;
            normal.back(g[j], v[j], j, x_hat, grad_n);
            const float grad = (grad_n * normal.weight[j] - sum[j]) - x_hat * dot[j];
            v[j] = grad * (constant ? 0.0f : normal.rstd[j]);
        }
        store(out, v);
    };
    int row = pos.row;
    for (; row + pos.stride < pos.rows; row += 2 * pos.stride, dy += 2 * step, from += 2 * step, to += 2 * step) {
        const Packed<T, N> grads[2] = {Packed<T, N>(dy), Packed<T, N>(dy + step)};
        const Packed<T, N> values[2] = {Packed<T, N>(from), Packed<T, N>(from + step)};
        write(grads[0], values[0], to);
        write(grads[1], values[1], to + step);
    }
    for (; row < pos.rows; row += pos.stride, dy += step, from += step, to += step) write(Packed<T, N>(dy), Packed<T, N>(from), to);
}

template <class T>
__device__ __forceinline__ void write_parameter_grad(void* grad, bool wide, int channel, double value) {
    if (!grad) return;
    if (wide) {
        static_cast<float*>(grad)[channel] = float(value);
    } else {
        static_cast<T*>(grad)[channel] = rounded<T>(float(value));
    }
}

// One warp per group for the means of w dn and w dn x_hat, then one thread per channel for the gradients of weight and bias.
template <class T>
__device__ __forceinline__ void finish(
    const float* totals, const Parameter<T>& weights, float* mean_sums, float* mean_dots, void* grad_weight, void* grad_bias, int group_blocks,
    const Shape& shape
) {
    const int C = shape.C, per_group = shape.per_group();
    if (blockIdx.x < group_blocks) {
        const int lane = threadIdx.x % 32, group = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
        if (group >= shape.B * shape.G) return;
        const float* of_image = totals + int64_t(group / shape.G) * 2 * C;
        double sum = 0, dot = 0;
        for (int c = lane; c < per_group; c += 32) {
            const int channel = group % shape.G * per_group + c;
            const double weight = weights.at(channel);
            sum += weight * of_image[channel];
            dot += weight * of_image[C + channel];
        }
        sum = warp_sum(sum);
        dot = warp_sum(dot);
        if (lane == 0) {
            const double size = double(per_group) * double(shape.S);
            mean_sums[group] = float(sum / size);
            mean_dots[group] = float(dot / size);
        }
        return;
    }
    const int channel = (blockIdx.x - group_blocks) * THREADS + threadIdx.x;
    if (channel >= C) return;
    double sum = 0, dot = 0;
    for (int b = 0; b < shape.B; b++) {
        sum += totals[int64_t(b) * 2 * C + channel];
        dot += totals[int64_t(b) * 2 * C + C + channel];
    }
    write_parameter_grad<T>(grad_bias, weights.wide, channel, sum);
    write_parameter_grad<T>(grad_weight, weights.wide, channel, dot);
}

}  // namespace

// parts [B, strips, 2, C]: each strip's moments -> mean, rstd [B, G]; one block per group.
extern "C" __global__ void __launch_bounds__(THREADS)
    ov3_group_norm_silu_merge(const float* parts, float eps, float* mean, float* rstd, const __grid_constant__ Shape shape) {
    const int per_group = shape.per_group(), b = blockIdx.x / shape.G, first = blockIdx.x % shape.G * per_group;
    const float* of_image = parts + int64_t(b) * shape.strips * 2 * shape.C + first;
    const auto over_parts = [&](const auto& value) {
        double total = 0;
        for (int i = threadIdx.x; i < shape.strips * per_group; i += THREADS) {
            const int strip = i / per_group, channel = i % per_group;
            const int64_t left = shape.S - int64_t(strip) * shape.rows;
            const float* part = of_image + int64_t(strip) * 2 * shape.C + channel;
            total += value(part[0], part + shape.C, double(left < shape.rows ? left : shape.rows));
        }
        return block_sum(total) / (double(per_group) * double(shape.S));
    };
    const double centre = over_parts([](float part_mean, const float*, double count) { return count * part_mean; });
    const double variance = over_parts([&](float part_mean, const float* squares, double count) {
        return *squares + count * (part_mean - centre) * (part_mean - centre);
    });
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = float(centre);
        rstd[blockIdx.x] = float(1.0 / sqrt(variance + eps));
    }
}

// parts [B, strips, 2, C] -> totals [B, 2, C]: sums over the strips; a block handles 32 of an image's 2 C sums, with 8 threads each.
extern "C" __global__ void __launch_bounds__(THREADS)
    ov3_group_norm_silu_totals(const float* parts, float* totals, const __grid_constant__ Shape shape) {
    constexpr int LANES = THREADS / 32;
    __shared__ double shared[LANES][32];
    const int b = blockIdx.x, width = 2 * shape.C, column = blockIdx.y * 32 + threadIdx.x % 32, lane = threadIdx.x / 32;
    double total = 0;
    if (column < width)
        for (int strip = lane; strip < shape.strips; strip += LANES) total += parts[(int64_t(b) * shape.strips + strip) * width + column];
    shared[lane][threadIdx.x % 32] = total;
    __syncthreads();
    if (lane == 0 && column < width) {
        for (int i = 1; i < LANES; i++) total += shared[i][threadIdx.x];
        totals[int64_t(b) * width + column] = float(total);
    }
}

// Suffix: T, plus "_single" for tensors that don't allow 16-byte packs. x, y, grad_y, grad_x [B, S, C]; weight, bias [C] of T or (wide) float;
// mean, rstd, mean_sums, mean_dots [B, G]; parts [B, strips, 2, C].
#define OV3_GROUP_NORM_SILU(suffix, T, N)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                                     \
        ov3_group_norm_silu_moments_##suffix(const T* x, float* parts, const __grid_constant__ Shape shape) {                                 \
        moments<T, N>(x, parts, shape);                                                                                                       \
    }                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) ov3_group_norm_silu_apply_##suffix(                                                 \
        const T* x, const void* weight, const void* bias, int32_t wide, const float* mean, const float* rstd, T* y,                           \
        const __grid_constant__ Shape shape                                                                                                   \
    ) {                                                                                                                                       \
        write_silu<T, N>(x, {weight, wide != 0}, {bias, wide != 0}, mean, rstd, y, shape);                                                    \
    }                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) ov3_group_norm_silu_sums_##suffix(                                                  \
        const T* grad_y, const T* x, const void* weight, const void* bias, int32_t wide, const float* mean, const float* rstd, float* parts,  \
        const __grid_constant__ Shape shape                                                                                                   \
    ) {                                                                                                                                       \
        strip_sums<T, N>(grad_y, x, {weight, wide != 0}, {bias, wide != 0}, mean, rstd, parts, shape);                                        \
    }                                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) ov3_group_norm_silu_grad_##suffix(                                                  \
        const T* grad_y, const T* x, const void* weight, const void* bias, int32_t wide, const float* mean, const float* rstd,                \
        const float* mean_sums, const float* mean_dots, T* grad_x, const __grid_constant__ Shape shape                                        \
    ) {                                                                                                                                       \
        write_grad<T, N>(grad_y, x, {weight, wide != 0}, {bias, wide != 0}, mean, rstd, mean_sums, mean_dots, grad_x, shape);                 \
    }
#define OV3_GROUP_NORM_SILU_TYPE(suffix, T)                                                                                                   \
    OV3_GROUP_NORM_SILU(suffix, T, 16 / sizeof(T))                                                                                            \
    OV3_GROUP_NORM_SILU(suffix##_single, T, 1)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) ov3_group_norm_silu_finish_##suffix(                                                \
        const float* totals, const void* weight, int32_t wide, float* mean_sums, float* mean_dots, void* grad_weight, void* grad_bias,        \
        int32_t group_blocks, const __grid_constant__ Shape shape                                                                             \
    ) {                                                                                                                                       \
        finish<T>(totals, {weight, wide != 0}, mean_sums, mean_dots, grad_weight, grad_bias, group_blocks, shape);                            \
    }

OV3_GROUP_NORM_SILU_TYPE(f32, float)
OV3_GROUP_NORM_SILU_TYPE(bf16, bf16)
OV3_GROUP_NORM_SILU_TYPE(f16, fp16)
