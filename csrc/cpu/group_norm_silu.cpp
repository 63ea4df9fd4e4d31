// Group normalisation and SiLU. Statistics are computed per strip, in two passes over cached data, and the strips' means and
// sums of squared deviations are then merged, so that a large mean costs no precision and x is read from memory once for them.
//
// Two layouts: planes, [B, C, S] with contiguous spatial positions, and channels last, [B, S, C]. The latter is treated as rows of
// W = k C elements, W being a multiple of the vector length if there are enough positions; the last row may be shorter.
#include <algorithm>
#include <numeric>

#include "export.h"
#include "parallel.h"
#include "quantized.h"
#include "silu.h"

using namespace ov3;

namespace {

constexpr int64_t STRIP = 8192;        // elements of a plane, or about as many in channels last
constexpr int64_t FUSED = 512 * 1024;  // up to this many bytes per set of statistics, one task does all steps
constexpr int64_t CHAIN = 16;          // terms of a channel's gradient accumulated in one chain, short for precision
constexpr int BLOCK = 4;               // vectors whose sums over rows are kept in registers

struct Moments {
    float mean, squares;  // squares: sum of squared deviations from the mean
};

// Merges the moments of `rows` rows of `length` positions in strips of `full` (the last strip of a row may be shorter), with `width` values per position.
inline void merge(
    const Moments* parts, int64_t step, int64_t rows, int64_t length, int64_t full, int64_t width, double eps, float& mean, float& rstd
) {
    const int64_t strips = ceil_div(length, full);
    const auto over_parts = [&](const auto& value) {
        double total = 0;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t s = 0; s < strips; s++)
                total += value(parts[(r * strips + s) * step], double(std::min(full, length - s * full) * width));
        return total / (double(rows) * double(length) * double(width));
    };
    const double centre = over_parts([](const Moments& part, double count) { return count * part.mean; });
    const double variance = over_parts([&](const Moments& part, double count) {
        return part.squares + count * (part.mean - centre) * (part.mean - centre);
    });
    mean = float(centre);
    rstd = float(1.0 / std::sqrt(variance + eps));
}

template <class T>
inline Moments moments(const T* x, int64_t n) {
    const auto sum_of = [&](const auto& value) {
        vf total[8] = {};
        int64_t i = 0;
        for (; i + 8 * VL <= n; i += 8 * VL) {
#pragma GCC unroll 8
            for (int v = 0; v < 8; v++) total[v] += value(load(x + i + v * VL));
        }
        for_vectors(n - i, [&](int64_t j, int lanes) {
            const vf v = value(load(x + i + j, lanes));
            total[0] += lanes < VL ? first_lanes(v, lanes) : v;
        });
        return sum(((total[0] + total[1]) + (total[2] + total[3])) + ((total[4] + total[5]) + (total[6] + total[7])));
    };
    const float mean = sum_of([](vf v) { return v; }) / float(n);
    return {mean, sum_of([&](vf v) { return (v - mean) * (v - mean); })};
}

// Per-channel coefficients, for a vector of elements.
struct Channel {
    vf mean, scale, shift;  // n = (x - mean) scale + shift
};
struct ChannelBack {
    vf mean, rstd, weight, bias;
    vf by_grad, by_normal, constant;  // dx = by_grad dn - by_normal x_hat - constant
};

template <class T>
inline vf silu(vf x, const Channel& c) {
    const vf n = (x - c.mean) * c.scale + c.shift;
    return n * gate<T>(n);
}

// x_hat and the gradient of n.
template <class T>
inline void back(vf grad_y, vf x, const ChannelBack& c, vf& normal, vf& grad_n) {
    normal = (x - c.mean) * c.rstd;
    const vf n = normal * c.weight + c.bias, s = gate<T>(n);
    grad_n = grad_y * s * (1.0f + n * (1.0f - s));
}

// y is a T*, or Quantized.
template <class T, class Y, class At>
inline void write_silu(const T* x, Y y, int64_t n, const At& at) {
    for_vectors(n, [&](int64_t i, int lanes) { store(y + i, silu<T>(load(x + i, lanes), at(i, lanes)), lanes); });
}
template <class T, class At>
inline void write_grad(const T* grad_y, const T* x, T* grad_x, int64_t n, const At& at) {
    for_vectors(n, [&](int64_t i, int lanes) {
        const ChannelBack c = at(i, lanes);
        vf normal, grad_n;
        back<T>(load(grad_y + i, lanes), load(x + i, lanes), c, normal, grad_n);
        store(grad_x + i, grad_n * c.by_grad - (normal * c.by_normal + c.constant), lanes);
    });
}

// Sizes and arguments shared by all steps.
struct Shape {
    int64_t B, C, S, G;
    int threads;
    int64_t per_group() const { return C / G; }
};

// Runs `first` for each of `sets` x `parts` tasks, `between` for each set, then `last` for each of `sets` x `others` tasks. If a set fits in
// the cache (and there are enough sets), one thread does all of its steps.
template <class First, class Between, class Last>
inline void phases(
    int64_t sets, int64_t bytes, int64_t parts, int64_t others, int threads, const First& first, const Between& between, const Last& last
) {
    if (bytes <= FUSED && (threads == 1 || sets >= 2 * threads)) {
        parallel(sets, threads, [&](int64_t set, int thread) {
            for (int64_t i = 0; i < parts; i++) first(set, i, thread);
            between(set);
            for (int64_t i = 0; i < others; i++) last(set, i, thread);
        });
        return;
    }
    parallel(sets * parts, threads, [&](int64_t task, int thread) { first(task / parts, task % parts, thread); });
    parallel(sets, threads, [&](int64_t set, int) { between(set); });
    // In reverse: what was read last may still be cached.
    parallel(sets * others, threads, [&](int64_t task, int thread) {
        const int64_t i = sets * others - 1 - task;
        last(i / others, i % others, thread);
    });
}

// Planes.

// The part of a group that one task of the elementwise step handles: some full channels, or part of one.
struct Pieces {
    int64_t channels, strips, count;
    Pieces(int64_t per_group, int64_t S)
        : channels(std::clamp<int64_t>(S ? STRIP / S : per_group, 1, per_group)),
          strips(std::max<int64_t>(1, ceil_div(S, STRIP))),
          count(ceil_div(per_group, channels) * strips) {}
    // body(channel within the group, first position, positions)
    template <class Body>
    void each(int64_t piece, int64_t per_group, int64_t S, const Body& body) const {
        const int64_t first = piece / strips * channels, position = piece % strips * STRIP;
        for (int64_t c = first; c < std::min(per_group, first + channels); c++) body(c, position, std::min(STRIP, S - position));
    }
};

template <class T>
void planes_forward(
    const T* x, int64_t x_batch, int64_t x_channel, const float* weight, const float* bias, double eps, T* y, float* mean, float* rstd,
    const Shape& shape
) {
    const auto [B, C, S, G, threads] = shape;
    const int64_t channels = C / G;
    // A group with contiguous channels is one long row.
    const int64_t rows = x_channel == S ? 1 : channels, length = channels / rows * S, strips = ceil_div(length, STRIP);
    const Pieces pieces(channels, S);
    Buffer<Moments> parts(B * G * rows * strips);
    phases(
        B * G, channels * S * sizeof(T), rows * strips, pieces.count, threads,
        [&](int64_t set, int64_t i, int) {
            const int64_t at = i % strips * STRIP;
            const T* row = x + set / G * x_batch + (set % G * channels + i / strips) * x_channel;
            parts[set * rows * strips + i] = moments(row + at, std::min(STRIP, length - at));
        },
        [&](int64_t set) { merge(parts + set * rows * strips, 1, rows, length, STRIP, 1, eps, mean[set], rstd[set]); },
        [&](int64_t set, int64_t i, int) {
            pieces.each(i, channels, S, [&](int64_t c, int64_t position, int64_t positions) {
                const int64_t b = set / G, channel = set % G * channels + c;
                const Channel constants = {splat(mean[set]), splat(rstd[set] * weight[channel]), splat(bias[channel])};
                write_silu(
                    x + b * x_batch + channel * x_channel + position, y + (b * C + channel) * S + position, positions,
                    [&](int64_t, int) { return constants; }
                );
            });
        }
    );
}

// The means of w dn and w dn x_hat over a group, from the channels' sums.
struct GroupMeans {
    float sum, dot;
    GroupMeans(const float* sums, const float* dots, const float* weight, int64_t channels, int64_t S) {
        double total = 0, along = 0;
        for (int64_t c = 0; c < channels; c++) {
            total += double(weight[c]) * sums[c];
            along += double(weight[c]) * dots[c];
        }
        sum = float(total / (double(channels) * double(S)));
        dot = float(along / (double(channels) * double(S)));
    }
};

// The factor of dx: rstd, or 0 for a group of one value, which is always normalised to 0.
inline float outer_factor(float rstd, int64_t channels, int64_t S) { return channels * S == 1 ? 0.0f : rstd; }

// sums, dots [B, C]: sums of dn and dn x_hat over the positions.
template <class T>
void planes_backward(
    const T* grad_y, int64_t grad_y_batch, int64_t grad_y_channel, const T* x, int64_t x_batch, int64_t x_channel, const float* weight,
    const float* bias, const float* mean, const float* rstd, T* grad_x, float* sums, float* dots, const Shape& shape
) {
    const auto [B, C, S, G, threads] = shape;
    const int64_t channels = C / G;
    const Pieces pieces(channels, S);
    const int64_t strips = pieces.strips;
    Buffer<float> partial(B * C * strips * 2);
    Buffer<float> means(B * G * 2);
    const auto constants = [&](int64_t set, int64_t channel) {
        const float r = rstd[set], w = weight[channel], outer = outer_factor(r, channels, S);
        return ChannelBack{
            splat(mean[set]),  splat(r), splat(w), splat(bias[channel]), splat(outer * w), splat(outer * means[2 * set + 1]),
            splat(outer * means[2 * set]),
        };
    };
    phases(
        B * G, channels * S * sizeof(T), pieces.count, grad_x ? pieces.count : 0, threads,
        [&](int64_t set, int64_t i, int) {
            pieces.each(i, channels, S, [&](int64_t c, int64_t position, int64_t positions) {
                const int64_t b = set / G, channel = set % G * channels + c;
                const T* dy = grad_y + b * grad_y_batch + channel * grad_y_channel + position;
                const T* row = x + b * x_batch + channel * x_channel + position;
                const float m = mean[set], r = rstd[set], w = weight[channel];
                const ChannelBack constant = {splat(m), splat(r), splat(w), splat(bias[channel]), vf{}, vf{}, vf{}};
                vf total = {}, along = {};
                for (int64_t j = 0; j < positions; j += 4 * CHAIN * VL) {
                    vf sums[4] = {}, dots[4] = {};
                    const auto add = [&](int64_t i, int v, int lanes) {
                        vf normal, grad_n;
                        back<T>(load(dy + i, lanes), load(row + i, lanes), constant, normal, grad_n);
                        if (lanes < VL) grad_n = first_lanes(grad_n, lanes), normal = first_lanes(normal, lanes);
                        sums[v] += grad_n;
                        dots[v] += grad_n * normal;
                    };
                    const int64_t end = std::min(positions, j + 4 * CHAIN * VL);
                    int64_t i = j;
                    for (; i + 4 * VL <= end; i += 4 * VL) {
#pragma GCC unroll 4
                        for (int v = 0; v < 4; v++) add(i + v * VL, v, VL);
                    }
                    for_vectors(end - i, [&](int64_t k, int lanes) { add(i + k, 0, lanes); });
                    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
                    along += (dots[0] + dots[1]) + (dots[2] + dots[3]);
                }
                float* out = partial + ((b * C + channel) * strips + position / STRIP) * 2;
                out[0] = sum(total);
                out[1] = sum(along);
            });
        },
        [&](int64_t set) {
            const int64_t first = set / G * C + set % G * channels;
            for (int64_t c = first; c < first + channels; c++) {
                double total = 0, along = 0;
                for (int64_t s = 0; s < strips; s++) {
                    total += partial[(c * strips + s) * 2];
                    along += partial[(c * strips + s) * 2 + 1];
                }
                sums[c] = float(total);
                dots[c] = float(along);
            }
            const GroupMeans group(sums + first, dots + first, weight + set % G * channels, channels, S);
            means[2 * set] = group.sum;
            means[2 * set + 1] = group.dot;
        },
        [&](int64_t set, int64_t i, int) {
            pieces.each(i, channels, S, [&](int64_t c, int64_t position, int64_t positions) {
                const int64_t b = set / G, channel = set % G * channels + c;
                const ChannelBack constant = constants(set, channel);
                write_grad(
                    grad_y + b * grad_y_batch + channel * grad_y_channel + position, x + b * x_batch + channel * x_channel + position,
                    grad_x + (b * C + channel) * S + position, positions, [&](int64_t, int) { return constant; }
                );
            });
        }
    );
}

// Channels last.

struct Rows {
    int64_t C, S, W, positions, strips;  // W: elements per row; positions: per strip; strips: per image

    Rows(int64_t C, int64_t S) : C(C), S(S) {
        int64_t k = VL / std::gcd<int64_t>(C, VL);
        k = std::min(std::max<int64_t>(S, 1), k * ceil_div(64, C * k));
        W = C * k;
        positions = k * std::clamp<int64_t>(2 * STRIP / W, 8, 128);
        strips = ceil_div(S, positions);
    }
    int64_t positions_of(int64_t strip) const { return std::min(positions, S - strip * positions); }
    int64_t room() const { return round_up(W, 16); }  // size of a table

    // For each vector of a row, body(first element, lanes, rows): all lanes exist in that many rows.
    template <class Many, class One>
    void columns(int64_t n, const Many& many, const One& one) const {
        const int64_t whole = n / W, rest = n % W;
        int64_t d = 0;
        const auto some = [&](int64_t end, int64_t rows) {
            for (; d + BLOCK * VL <= end; d += BLOCK * VL) many(d, rows);
            for (; d < end; d += VL) one(d, int(std::min<int64_t>(VL, end - d)), rows);
            d = end;
        };
        some(rest, whole + 1);
        some(W, whole);
    }

    // body(offset of a row, its number of elements), covering n elements.
    template <class Body>
    void each(int64_t n, const Body& body) const {
        for (int64_t at = 0; at < n; at += W) body(at, std::min(W, n - at));
    }

    // table[i] = of(group, channel) for the elements i of a row.
    template <class Of>
    void fill(float* table, int64_t G, const Of& of) const {
        const int64_t channels = C / G;
        for (int64_t g = 0; g < G; g++)
            for (int64_t c = g * channels; c < (g + 1) * channels; c++) table[c] = of(g, c);
        for (int64_t i = C; i < W; i += C) std::memcpy(table + i, table, C * sizeof(float));
    }

    // table[channel] = sum of the table over the elements of that channel.
    void fold(float* table) const {
        for (int64_t i = C; i < W; i += C)
            for_vectors(C, [&](int64_t c, int lanes) { store(table + c, load(table + c, lanes) + load(table + i + c, lanes), lanes); });
    }
};

// sums[d] = sum over rows of value(x, d).
template <class T, class Value>
inline void sum_rows(const Rows& rows, const T* x, int64_t n, float* sums, const Value& value) {
    rows.columns(
        n,
        [&](int64_t d, int64_t count) {
            vf total[BLOCK] = {};
            for (int64_t r = 0; r < count; r++) {
#pragma GCC unroll 4
                for (int v = 0; v < BLOCK; v++) total[v] += value(load(x + r * rows.W + d + v * VL), d + v * VL, VL);
            }
#pragma GCC unroll 4
            for (int v = 0; v < BLOCK; v++) store(sums + d + v * VL, total[v]);
        },
        [&](int64_t d, int lanes, int64_t count) {
            vf total = {};
            for (int64_t r = 0; r < count; r++) total += value(load(x + r * rows.W + d, lanes), d, lanes);
            store(sums + d, total, lanes);
        }
    );
}

// Moments of the groups in a strip. work: two tables.
template <class T>
inline void strip_moments(const Rows& rows, const T* x, int64_t positions, int64_t G, float* work, Moments* out) {
    const int64_t channels = rows.C / G, n = positions * rows.C;
    float *sums = work, *centre = work + rows.room();
    const auto per_group = [&](const auto& result) {
        rows.fold(sums);
        for (int64_t g = 0; g < G; g++) {
            double total = 0;
            for (int64_t c = g * channels; c < (g + 1) * channels; c++) total += sums[c];
            result(out[g], total);
        }
    };
    sum_rows(rows, x, n, sums, [](vf v, int64_t, int) { return v; });
    per_group([&](Moments& group, double total) { group.mean = float(total / double(positions * channels)); });
    rows.fill(centre, G, [&](int64_t g, int64_t) { return out[g].mean; });
    sum_rows(rows, x, n, sums, [&](vf v, int64_t d, int lanes) {
        const vf centred = v - load(centre + d, lanes);
        return centred * centred;
    });
    per_group([&](Moments& group, double total) { group.squares = float(total); });
}

template <class T, class Y>
void rows_forward(
    const T* x, int64_t x_batch, const float* weight, const float* bias, double eps, Y y, float* mean, float* rstd, const Shape& shape
) {
    const auto [B, C, S, G, threads] = shape;
    const int64_t channels = C / G;
    const Rows rows(C, S);
    Buffer<Moments> parts(B * rows.strips * G);
    Buffer<float> work(threads * 3 * rows.room());
    phases(
        B, C * S * sizeof(T), rows.strips, rows.strips, threads,
        [&](int64_t b, int64_t strip, int thread) {
            float* table = work + thread * 3 * rows.room();
            const T* data = x + b * x_batch + strip * rows.positions * C;
            strip_moments(rows, data, rows.positions_of(strip), G, table, parts + (b * rows.strips + strip) * G);
        },
        [&](int64_t b) {
            for (int64_t g = 0; g < G; g++)
                merge(parts + b * rows.strips * G + g, G, 1, S, rows.positions, channels, eps, mean[b * G + g], rstd[b * G + g]);
        },
        [&](int64_t b, int64_t strip, int thread) {
            float *means = work + thread * 3 * rows.room(), *scale = means + rows.room(), *shift = scale + rows.room();
            rows.fill(means, G, [&](int64_t g, int64_t) { return mean[b * G + g]; });
            rows.fill(scale, G, [&](int64_t g, int64_t c) { return rstd[b * G + g] * weight[c]; });
            rows.fill(shift, G, [&](int64_t, int64_t c) { return bias[c]; });
            const T* data = x + b * x_batch + strip * rows.positions * C;
            const Y out = y + (b * S + strip * rows.positions) * C;
            rows.each(rows.positions_of(strip) * C, [&](int64_t at, int64_t n) {
                write_silu(data + at, out + at, n, [&](int64_t i, int lanes) {
                    return Channel{load(means + i, lanes), load(scale + i, lanes), load(shift + i, lanes)};
                });
            });
        }
    );
}

// Sums of dn and dn x_hat over a strip's rows. table: mean, rstd, weight, bias; sums: two tables.
template <class T>
inline void strip_sums(const Rows& rows, const T* grad_y, const T* x, int64_t n, const float* table, float* sums) {
    const int64_t room = rows.room();
    const auto add = [&](int64_t r, int64_t d, int lanes, vf& total, vf& along) {
        const float* t = table + d;
        const ChannelBack c = {
            load(t, lanes), load(t + room, lanes), load(t + 2 * room, lanes), load(t + 3 * room, lanes), vf{}, vf{}, vf{},
        };
        vf normal, grad_n;
        back<T>(load(grad_y + r * rows.W + d, lanes), load(x + r * rows.W + d, lanes), c, normal, grad_n);
        total += grad_n;
        along += grad_n * normal;
    };
    rows.columns(
        n,
        [&](int64_t d, int64_t count) {
            for (int64_t r = 0; r == 0 || r < count; r += CHAIN) {
                vf total[BLOCK] = {}, along[BLOCK] = {};
                for (int64_t q = r; q < std::min(count, r + CHAIN); q++) {
#pragma GCC unroll 4
                    for (int v = 0; v < BLOCK; v++) add(q, d + v * VL, VL, total[v], along[v]);
                }
#pragma GCC unroll 4
                for (int v = 0; v < BLOCK; v++) {
                    float *out = sums + d + v * VL, *out_along = out + room;
                    store(out, r ? load(out) + total[v] : total[v]);
                    store(out_along, r ? load(out_along) + along[v] : along[v]);
                }
            }
        },
        [&](int64_t d, int lanes, int64_t count) {
            vf total = {}, along = {};
            for (int64_t r = 0; r < count; r++) add(r, d, lanes, total, along);
            store(sums + d, total, lanes);
            store(sums + room + d, along, lanes);
        }
    );
}

template <class T>
void rows_backward(
    const T* grad_y, int64_t grad_y_batch, const T* x, int64_t x_batch, const float* weight, const float* bias, const float* mean,
    const float* rstd, T* grad_x, float* sums, float* dots, const Shape& shape
) {
    const auto [B, C, S, G, threads] = shape;
    const int64_t channels = C / G;
    const Rows rows(C, S);
    const int64_t room = rows.room();
    Buffer<float> partial(B * rows.strips * 2 * C), means(B * G * 2), work(threads * 9 * room);
    const auto tables = [&](float* table, int64_t b) {
        rows.fill(table, G, [&](int64_t g, int64_t) { return mean[b * G + g]; });
        rows.fill(table + room, G, [&](int64_t g, int64_t) { return rstd[b * G + g]; });
        rows.fill(table + 2 * room, G, [&](int64_t, int64_t c) { return weight[c]; });
        rows.fill(table + 3 * room, G, [&](int64_t, int64_t c) { return bias[c]; });
    };
    phases(
        B, C * S * sizeof(T), rows.strips, grad_x ? rows.strips : 0, threads,
        [&](int64_t b, int64_t strip, int thread) {
            float *table = work + thread * 9 * room, *strip_total = table + 7 * room;
            tables(table, b);
            const int64_t at = strip * rows.positions * C;
            strip_sums(rows, grad_y + b * grad_y_batch + at, x + b * x_batch + at, rows.positions_of(strip) * C, table, strip_total);
            float* out = partial + (b * rows.strips + strip) * 2 * C;
            for (int i = 0; i < 2; i++) {
                rows.fold(strip_total + i * room);
                std::memcpy(out + i * C, strip_total + i * room, C * sizeof(float));
            }
        },
        [&](int64_t b) {
            for (int64_t c = 0; c < C; c++) {
                double total = 0, along = 0;
                for (int64_t s = 0; s < rows.strips; s++) {
                    total += partial[(b * rows.strips + s) * 2 * C + c];
                    along += partial[(b * rows.strips + s) * 2 * C + C + c];
                }
                sums[b * C + c] = float(total);
                dots[b * C + c] = float(along);
            }
            for (int64_t g = 0; g < G; g++) {
                const int64_t first = b * C + g * channels;
                const GroupMeans group(sums + first, dots + first, weight + g * channels, channels, S);
                means[2 * (b * G + g)] = group.sum;
                means[2 * (b * G + g) + 1] = group.dot;
            }
        },
        [&](int64_t b, int64_t strip, int thread) {
            float *table = work + thread * 9 * room, *by_grad = table + 4 * room, *by_normal = by_grad + room, *constant = by_normal + room;
            tables(table, b);
            const auto outer = [&](int64_t g) { return outer_factor(rstd[b * G + g], channels, S); };
            rows.fill(by_grad, G, [&](int64_t g, int64_t c) { return outer(g) * weight[c]; });
            rows.fill(by_normal, G, [&](int64_t g, int64_t) { return outer(g) * means[2 * (b * G + g) + 1]; });
            rows.fill(constant, G, [&](int64_t g, int64_t) { return outer(g) * means[2 * (b * G + g)]; });
            const int64_t first = strip * rows.positions * C;
            const T *dy = grad_y + b * grad_y_batch + first, *data = x + b * x_batch + first;
            T* out = grad_x + b * S * C + first;
            rows.each(rows.positions_of(strip) * C, [&](int64_t at, int64_t n) {
                write_grad(dy + at, data + at, out + at, n, [&](int64_t i, int lanes) {
                    const float* t = table + i;
                    return ChannelBack{load(t, lanes),        load(t + room, lanes),        load(t + 2 * room, lanes),
                                       load(t + 3 * room, lanes), load(by_grad + i, lanes), load(by_normal + i, lanes),
                                       load(constant + i, lanes)};
                });
            });
        }
    );
}

}  // namespace

// x [B, C, S] with batch and channel strides (channels_last: [B, S, C], dense except for the batch stride); weight, bias [C] float
// -> y, dense, in x's layout; mean, rstd [B, G].
template <class T>
void group_norm_silu_forward(
    const T* x, int64_t x_batch, int64_t x_channel, const float* weight, const float* bias, double eps, T* y, float* mean, float* rstd,
    bool channels_last, int64_t B, int64_t C, int64_t S, int64_t G, int threads
) {
    const Shape shape{B, C, S, G, threads};
    expect_writes(y, B * C * S);
    if (channels_last) return rows_forward(x, x_batch, weight, bias, eps, y, mean, rstd, shape);
    planes_forward(x, x_batch, x_channel, weight, bias, eps, y, mean, rstd, shape);
}
OV3_EXPORT(group_norm_silu_forward)

// Channels last, with y as uint8 [B, S, C], round(y / scale) + zero: what an int8 convolution takes.
template <class T>
void group_norm_silu_quantized(
    const T* x, int64_t x_batch, const float* weight, const float* bias, double eps, double scale, int64_t zero, void* y, int64_t B,
    int64_t C, int64_t S, int64_t G, int threads
) {
    const Quantized out(y, scale, zero);
    expect_writes(out, B * C * S);
    Buffer<float> mean(B * G), rstd(B * G);
    rows_forward(x, x_batch, weight, bias, eps, out, mean.data(), rstd.data(), Shape{B, C, S, G, threads});
}
OV3_EXPORT(group_norm_silu_quantized)

// grad_y and x as x in the forward; mean, rstd [B, G] -> grad_x (or null), dense, in x's layout; grad_weight, grad_bias [C] float.
template <class T>
void group_norm_silu_backward(
    const T* grad_y, int64_t grad_y_batch, int64_t grad_y_channel, const T* x, int64_t x_batch, int64_t x_channel, const float* weight,
    const float* bias, const float* mean, const float* rstd, T* grad_x, float* grad_weight, float* grad_bias, bool channels_last, int64_t B, int64_t C, int64_t S, int64_t G, int threads
) {
    const Shape shape{B, C, S, G, threads};
    if (grad_x) expect_writes(grad_x, B * C * S);
    Buffer<float> sums(B * C), dots(B * C);
    if (channels_last) {
        rows_backward(grad_y, grad_y_batch, x, x_batch, weight, bias, mean, rstd, grad_x, sums.data(), dots.data(), shape);
    } else {
        planes_backward(
            grad_y, grad_y_batch, grad_y_channel, x, x_batch, x_channel, weight, bias, mean, rstd, grad_x, sums.data(), dots.data(), shape
        );
    }
    for (int64_t c = 0; c < C; c++) {
        double total = 0, along = 0;
        for (int64_t b = 0; b < B; b++) {
            total += sums[b * C + c];
            along += dots[b * C + c];
        }
        if (grad_weight) grad_weight[c] = float(along);
        if (grad_bias) grad_bias[c] = float(total);
    }
}
OV3_EXPORT(group_norm_silu_backward)
