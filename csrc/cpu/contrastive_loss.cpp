// Contrastive loss over a rectangle of pairs: rows x_i of this rank against all columns y_j.
//
// With bfloat16 dot products the features are multiplied unnormalised, and 1/|x_i|, 1/|y_j| and the scale are applied to the tile in float;
// with float words the rows are normalised as they are packed. A chunk of rows of gradients G_ij = s g_ij / (|x_i| |y_j|) serves both sides,
// since the gradients for fixed norms are G y and G^T x.
//
// G is stored in the features' dtype. If features are alike, G y largely cancels, but the bfloat16 rounding errors e_ij of G, weighted by |y_j|,
// would not. So the sums sum_j e_ij |y_j| are kept in float and added back along the mean of the unit rows; the remaining error is weighted
// only by the difference between y_j / |y_j| and that mean.
#include <numeric>
#include <type_traits>

#include "export.h"
#include "softmax.h"

using namespace ov3;

namespace {

constexpr double SMALLEST_NORM = 1e-12;
constexpr int64_t SEGMENT = 128;                                                 // panels accumulated in one chain
constexpr int64_t SHORT = 4;                                                     // rows accumulated in one chain of a column's sum
constexpr int64_t MAX_STRIPS = 64;                                               // strips of rows, each with its own column maxima and sums
constexpr int64_t TILE = 4 * NR;                                                 // most columns per task of the backward
constexpr int64_t BLOCK_WORDS = 1 << 17;                                         // words of A that fit in the L2 cache
template <class T>
constexpr int64_t CHUNK = sizeof(T) == 2 ? 384 : 144;                           // rows of gradients at a time

// A factor as the sum of two floats: at a logit of 100, the rounding of a single float, common to an entire row, would cost precision in the loss.
struct Factor {
    float high, low;
};
inline Factor split(double x) {
    const float high = float(x);
    return {high, float(x - high)};
}

// Float words hold unit rows, rounded once per element as in PyTorch; bfloat16 pairs stay unnormalised, so that they are exact.
template <class T>
constexpr bool PACKS_UNITS = std::is_same<word_t<T>, float>::value;

// Norms, at least SMALLEST_NORM, their inverses, and the factor that packing did not apply (at least the rounding error of the norm);
// 0 beyond the rows.
struct Norms {
    explicit Norms(int64_t R) : norm(round_up(R, NR)), inverse(round_up(R, NR)), left(round_up(R, NR)), left_low(round_up(R, NR)) {}
    Buffer<float> norm, inverse, left, left_low;
    Factor times(double scale, int64_t r) const { return split(scale * (double(left[r]) + left_low[r])); }
};

// product * row * column, rounded once. Forward and backward must agree bit for bit, so later operations must not be fused with it.
inline vf logit(vf product, Factor row, vf column, vf column_low) {
    const vf p = product * row.high, p_low = product_error(product, splat(row.high), p) + product * row.low;
    const vf q = p * column, q_low = product_error(p, column, q) + (p * column_low + p_low * column);
    vf z = q + q_low;
    keep_apart(z);
    return z;
}

template <class T>
inline double norm_of(const T* row, int64_t D) {
    vf squares[4] = {};
    for_vectors(D, [&](int64_t d, int lanes) {
        const vf v = load(row + d, lanes);
        squares[d / VL % 4] += v * v;
    });
    return std::sqrt(double(sum((squares[0] + squares[1]) + (squares[2] + squares[3]))));
}
inline double clamped(double norm) { return norm < SMALLEST_NORM ? SMALLEST_NORM : norm; }

template <class T>
void take_norms(const T* x, int64_t stride, int64_t R, int64_t D, Norms& out, int threads) {
    parallel(ceil_div(round_up(R, NR), NR), threads, [&](int64_t task, int) {
        for (int64_t r = task * NR; r < (task + 1) * NR; r++) {
            const double norm = r < R ? clamped(norm_of(x + r * stride, D)) : 0.0;
            const Factor inverse = r < R ? split(1.0 / norm) : Factor{0.0f, 0.0f};
            out.norm[r] = float(norm);
            out.inverse[r] = inverse.high;
            out.left[r] = PACKS_UNITS<T> && r < R ? 1.0f : inverse.high;
            out.left_low[r] = !PACKS_UNITS<T> ? inverse.low : r < R ? float(out.norm[r] / norm - 1.0) : 0.0f;
        }
    });
}

template <class By>
inline void divide(float* x, int64_t n, const By& by) {
    for_vectors(n, [&](int64_t i, int lanes) { store(x + i, load(x + i, lanes) / by(i, lanes), lanes); });
}

// Packs one panel of rows, as unit rows if words are floats.
template <class T>
void pack_units(const Matrix<T>& source, int64_t i0, int count, int64_t K, int width, const float* norm, word_t<T>* dst) {
    pack_panel<T>(source, i0, count, 0, K, width, dst);
    if constexpr (PACKS_UNITS<T>)
        for (int64_t w = 0; w < K; w++) divide(dst + w * width, count, [&](int64_t i, int lanes) { return load(norm + i, lanes); });
}
// As a panel of A.
template <class T>
void pack_unit_rows(const Matrix<T>& source, int64_t i0, int count, int64_t K, const float* norm, word_t<T>* dst) {
    if constexpr (IN_TILES<T>) pack_block<T>(source, i0, count, K, dst);
    else pack_units<T>(source, i0, count, K, MR, norm, dst);
}
template <class T>
void pack_units(const Matrix<T>& source, Packed<T>& b, const float* norm, int threads) {
    parallel(b.panels(), threads, [&](int64_t p, int) {
        pack_units(source, p * NR, b.columns(p), b.K, b.width(p), norm + p * NR, b.panel(p));
    });
}

// The same with rows along k, starting at row 0 of `norm`.
template <class T>
void pack_unit_columns(const Matrix<T>& source, int64_t i0, int count, int64_t K, int width, const float* norm, word_t<T>* dst) {
    pack_panel<T>(source, i0, count, 0, K, width, dst);
    if constexpr (PACKS_UNITS<T>)
        for (int64_t k = 0; k < K; k++) divide(dst + k * width, width, [&](int64_t, int) { return splat(norm[k]); });
}

// --- forward -----------------------------------------------------------------------------------------------------------------------

// Lane-wise state of a row's online softmax.
struct RowState {
    vf m_i, l_i;
};

// c: products -> logits. Maxima of rows and columns, then sums of exponentials relative to them.
template <int NV>
void softmax_tile(
    int64_t rows, int columns, float* c, const Factor* row, const float* column, const float* column_low, RowState* state,
    float* column_max, double* column_sum
) {
    vf m_j[NV];
    for (int j = 0; j < NV; j++) m_j[j] = load(column_max + j * VL);
    for (int64_t i = 0; i < rows; i++) {
        vf m_new = state[i].m_i;
        for (int j = 0; j < NV; j++) {
            float* at = c + i * NR + j * VL;
            vf z = logit(load(at), row[i], load(column + j * VL), load(column_low + j * VL));
            for (int lane = std::max(columns - j * VL, 0); lane < VL; lane++) z[lane] = LOWEST;
            store(at, z);
            m_j[j] = max(m_j[j], z);
            m_new = max(m_new, z);
        }
        if (any(m_new != state[i].m_i)) {
            state[i].l_i *= exp_below(state[i].m_i - m_new);
            state[i].m_i = m_new;
        }
    }
    vd l_j[NV] = {};
    for (int64_t i0 = 0; i0 < rows; i0 += SHORT) {
        vf part[NV] = {};
        for (int64_t i = i0; i < std::min(rows, i0 + SHORT); i++) {
            const vf m_i = state[i].m_i;
            vf sums = {};
            for (int j = 0; j < NV; j++) {
                const vf z = load(c + i * NR + j * VL);
                sums += exp_below(z - m_i);
                part[j] += exp_below(z - m_j[j]);
            }
            state[i].l_i += sums;
        }
        for (int j = 0; j < NV; j++) l_j[j] += __builtin_convertvector(part[j], vd);
    }
    for (int j = 0; j < NV; j++) {
        const vf alpha = exp_below(load(column_max + j * VL) - m_j[j]);
        for (int lane = 0; lane < VL; lane++) column_sum[j * VL + lane] = column_sum[j * VL + lane] * alpha[lane] + l_j[j][lane];
        store(column_max + j * VL, m_j[j]);
    }
}

// own: the column of row 0's positive; that of row i is own + i.
template <int NV>
void sigmoid_tile(
    int64_t rows, int columns, int64_t own, float* c, const Factor* row, const float* column, const float* column_low, float bias,
    RowState* state
) {
    for (int64_t i = 0; i < rows; i++) {
        float* z = c + i * NR;
        for (int j = 0; j < NV * VL; j += VL) store(z + j, logit(load(z + j), row[i], load(column + j), load(column_low + j)) + bias);
        for (int j = columns; j < NV * VL; j++) z[j] = LOWEST;
        if (own + i >= 0 && own + i < columns) z[own + i] = -z[own + i];
        for (int j = 0; j < NV; j++) state[i].l_i += softplus(load(z + j * VL));
    }
}

template <class T>
struct Forward {
    const Packed<T>& b;
    const Norms &x, &y;
    float scale, bias;
    bool sigmoid;
    int64_t offset;
    float *rows, *own;
    int64_t n;

    // Rows [i0, i0 + count) against all columns.
    void block(int64_t i0, int64_t count, const word_t<T>* a, float* c, Factor* factor, RowState* state, Lse* lse, float* column_max,
               double* column_sum) const {
        for (int64_t i = 0; i < count; i++) factor[i] = x.times(scale, i0 + i), lse[i] = Lse();
        for (int64_t first = 0; first < b.panels(); first += SEGMENT) {
            for (int64_t i = 0; i < count; i++) state[i] = {splat(LOWEST), vf{}};
            for (int64_t p = first; p < std::min(b.panels(), first + SEGMENT); p++) {
                block_product<T>(count, a, b, p, p + 1, c, [](int64_t, int64_t, int, float*) {});
                tile(i0, count, p, c, factor, state, column_max + p * NR, column_sum + p * NR);
            }
            for (int64_t i = 0; i < count; i++)
                if (sigmoid) lse[i].l_i += sum(state[i].l_i);
                else lse[i].add(state[i].m_i, state[i].l_i);
        }
        for (int64_t i = 0; i < count; i++) {
            rows[i0 + i] = sigmoid ? float(lse[i].l_i) : lse[i].m_i;
            if (!sigmoid) rows[n + i0 + i] = float(std::log(lse[i].l_i));
        }
    }

    void tile(int64_t i0, int64_t count, int64_t p, float* c, const Factor* factor, RowState* state, float* column_max,
              double* column_sum) const {
        switch (b.width(p) / VL) {
            case 1: return tile<1>(i0, count, p, c, factor, state, column_max, column_sum);
            case 2: return tile<2>(i0, count, p, c, factor, state, column_max, column_sum);
            default: return tile<3>(i0, count, p, c, factor, state, column_max, column_sum);
        }
    }
    template <int NV>
    void tile(int64_t i0, int64_t count, int64_t p, float* c, const Factor* factor, RowState* state, float* column_max,
              double* column_sum) const {
        const int64_t first_own = i0 + offset - p * NR;
        const float *left = y.left + p * NR, *low = y.left_low + p * NR;
        const int columns = b.columns(p);
        if (sigmoid) return sigmoid_tile<NV>(count, columns, first_own, c, factor, left, low, bias, state);
        softmax_tile<NV>(count, columns, c, factor, left, low, state, column_max, column_sum);
        for (int64_t i = std::max<int64_t>(0, -first_own); i < std::min(count, columns - first_own); i++)
            own[i0 + i] = c[i * NR + first_own + i];
    }
};

}  // namespace

// x [n, D], y [N, D] with row strides, scale, bias (or null) scalars; the positive of row i is column i + offset.
// softmax: rows [2, n] (max, log-sum), columns [2, N] (max, sum) over these rows, own [n]. sigmoid: rows [n].
template <class T>
void contrastive_loss_forward(
    const T* x, int64_t x_stride, const T* y, int64_t y_stride, const float* scale, const float* bias, bool sigmoid, int64_t offset,
    float* rows, float* columns, float* own, int64_t n, int64_t N, int64_t D, int threads
) {
    const int64_t words = words_of<T>(D), wide = round_up(N, NR);
    const int64_t strip = std::max<int64_t>(64, round_up(ceil_div(n, MAX_STRIPS), MR)), strips = ceil_div(n, strip);
    const int64_t block = std::min(strip, std::max<int64_t>(MR, BLOCK_WORDS / std::max<int64_t>(1, words) / MR * MR));
    Packed<T> b(D, N);
    Norms x_norms(n), y_norms(N);
    take_norms(x, x_stride, n, D, x_norms, threads);
    take_norms(y, y_stride, N, D, y_norms, threads);
    pack_units<T>({y, y_stride, 1}, b, y_norms.norm, threads);
    const Forward<T> forward{b, x_norms, y_norms, *scale, bias ? *bias : 0.0f, sigmoid, offset, rows, own, n};

    const int64_t sums = sigmoid ? 0 : wide;
    Buffer<float> column_max(strips * sums), c(threads * block * NR);
    Buffer<double> column_sum(strips * sums);
    Buffer<Factor> factor(threads * block);
    Buffer<word_t<T>> a(threads * block * words);
    Buffer<RowState> state(threads * block);
    Buffer<Lse> lse(threads * block);
    parallel(strips, threads, [&](int64_t task, int thread) {
        float* m_j = column_max + task * sums;
        double* l_j = column_sum + task * sums;
        std::fill(m_j, m_j + sums, LOWEST);
        std::fill(l_j, l_j + sums, 0.0);
        word_t<T>* packed = a + thread * block * words;
        for (int64_t i = task * strip; i < std::min(n, (task + 1) * strip); i += block) {
            const int64_t count = std::min(block, std::min(n, (task + 1) * strip) - i);
            for (int64_t m = 0; m < count; m += MR)
                pack_unit_rows<T>({x, x_stride, 1}, i + m, int(std::min<int64_t>(MR, count - m)), D, x_norms.norm + i + m,
                                  packed + m * words);
            forward.block(i, count, packed, c + thread * block * NR, factor + thread * block, state + thread * block,
                          lse + thread * block, m_j, l_j);
        }
    });
    if (sigmoid) return;
    parallel(ceil_div(N, VL), threads, [&](int64_t task, int) {
        for (int64_t j = task * VL; j < std::min(N, (task + 1) * VL); j++) {
            Lse lse;
            for (int64_t s = 0; s < strips; s++) lse.add(column_max[s * sums + j], column_sum[s * sums + j]);
            columns[j] = strips ? lse.m_i : -INFINITY;
            columns[N + j] = float(lse.l_i);
        }
    });
}
OV3_EXPORT(contrastive_loss_forward)

namespace {

// x [R, D] with a row stride -> out, dense and of another dtype.
template <class T, class Out>
void convert(const T* x, int64_t stride, Out* out, int64_t R, int64_t D, int threads) {
    parallel(ceil_div(R, 16), threads, [&](int64_t task, int) {
        for (int64_t r = task * 16; r < std::min(R, (task + 1) * 16); r++)
            for_vectors(D, [&](int64_t d, int lanes) { store(out + r * D + d, load(x + r * stride + d, lanes), lanes); });
    });
}

}  // namespace

// All N pairs, with the loss: rows, columns [2, N] (max, log-sum), empty for sigmoid. wide: computes with float features.
template <class T>
void contrastive_loss_alone_forward(
    const T* x, int64_t x_stride, const T* y, int64_t y_stride, const float* scale, const float* bias, bool sigmoid, bool wide, float* rows,
    float* columns, float* loss, int64_t N, int64_t D, int threads
) {
    if constexpr (!std::is_same<T, float>::value)
        if (wide) {
            Buffer<float> wide_x(N * D), wide_y(N * D);
            convert(x, x_stride, wide_x.data(), N, D, threads);
            convert(y, y_stride, wide_y.data(), N, D, threads);
            return contrastive_loss_alone_forward<float>(
                wide_x, D, wide_y, D, scale, bias, sigmoid, wide, rows, columns, loss, N, D, threads
            );
        }
    Buffer<float> own(N), losses(N);
    contrastive_loss_forward(
        x, x_stride, y, y_stride, scale, bias, sigmoid, 0, sigmoid ? losses.data() : rows, columns, own.data(), N, N, D, threads
    );
    double total = 0.0;
    for (int64_t i = 0; i < N; i++) {
        if (!sigmoid) {
            columns[N + i] = std::log(columns[N + i]);
            losses[i] = ((rows[i] - own[i] + rows[N + i]) + (columns[i] - own[i]) + columns[N + i]) / 2;
        }
        total += losses[i];
    }
    *loss = float(total / double(N));
}
OV3_EXPORT(contrastive_loss_alone_forward)

// --- backward ----------------------------------------------------------------------------------------------------------------------

namespace {

// Per-column data for the gradient of a tile, padded to full panels.
struct Columns {
    const float *inverse, *left, *left_low, *norm, *m_j, *log_sum, *weight;
};
// Per-row data.
struct Row {
    Factor factor;
    float left, inverse, norm, m_i, log_sum;
};

// Lane-wise sums over a tile, in double since terms cancel.
struct TileSums {
    vd scale, bias;
};

template <int NV, bool SIGMOID, class T>
void gradient_tile(
    int64_t rows, int columns, int64_t own, const float* c, const Row* row, const Columns& column, float scale, float bias, float weight,
    T* g, float* row_error, float* column_error, TileSums& sums
) {
    constexpr bool ROUNDS = !std::is_same<T, float>::value;
    vf errors[NV] = {};
    for (int64_t i = 0; i < rows; i++) {
        vf along = {}, total = {}, error = {};
        for (int j = 0; j < NV; j++) {
            const vf product = load(c + i * NR + j * VL), inverse = load(column.inverse + j * VL), left = load(column.left + j * VL);
            vf z = logit(product, row[i].factor, left, load(column.left_low + j * VL)), value;
            const int64_t lane = own + i - j * VL;
            const bool has_own = lane >= 0 && lane < VL && own + i < columns;
            if (SIGMOID) {
                z += bias;
                if (has_own) z[lane] = -z[lane];
            }
            // A padded column's product is 0, and exp(0 - m_i) could overflow if all logits of the row are far below 0.
            for (int k = std::max(columns - j * VL, 0); k < VL; k++) z[k] = LOWEST;
            if (SIGMOID) {
                // 1 - sigmoid(z) as sigmoid(-z), without cancellation.
                const vf e = exp_below(-abs(z));
                value = ((z < 0.0f) ? e : splat(1.0f)) / (1.0f + e) * weight;
                if (has_own) value[lane] = -value[lane];
                total += value;
            } else {
                const vf by_row = exp_below((z - row[i].m_i) - row[i].log_sum);
                const vf by_column = exp_below((z - load(column.m_j + j * VL)) - load(column.log_sum + j * VL));
                value = 0.5f * (by_row * weight + by_column * load(column.weight + j * VL));
                if (has_own) value[lane] -= weight;
            }
            along += value * (product * row[i].left * left);
            value *= PACKS_UNITS<T> ? splat(scale) : scale * row[i].inverse * inverse;
            T* at = g + i * TILE + j * VL;
            store(at, value);
            if (ROUNDS) {
                const vf lost = value - load(at);
                error += PACKS_UNITS<T> ? lost : lost * load(column.norm + j * VL);
                errors[j] += PACKS_UNITS<T> ? lost : lost * row[i].norm;
            }
        }
        sums.scale += __builtin_convertvector(along, vd);
        if (SIGMOID) sums.bias += __builtin_convertvector(total, vd);
        if (ROUNDS) row_error[i] += sum(error);
    }
    if (ROUNDS)
        for (int j = 0; j < NV; j++) store(column_error + j * VL, load(column_error + j * VL) + errors[j]);
}

// mean[d] = average over rows of x_id / |x_i|, over fixed strips of rows in a fixed order.
template <class T>
void mean_unit_row(const T* x, int64_t stride, int64_t R, int64_t D, const Norms& norms, float* mean, int threads) {
    const int64_t strip = std::max<int64_t>(64, ceil_div(R, MAX_STRIPS)), strips = ceil_div(R, strip);
    Buffer<float> partial(strips * D);
    parallel(strips, threads, [&](int64_t task, int) {
        float* sums = partial + task * D;
        std::fill(sums, sums + D, 0.0f);
        for (int64_t r = task * strip; r < std::min(R, (task + 1) * strip); r++)
            for_vectors(D, [&](int64_t d, int lanes) {
                store(sums + d, load(sums + d, lanes) + load(x + r * stride + d, lanes) * norms.inverse[r], lanes);
            });
    });
    for (int64_t d = 0; d < D; d++) {
        double total = 0.0;
        for (int64_t s = 0; s < strips; s++) total += partial[s * D + d];
        mean[d] = float(total / double(std::max<int64_t>(1, R)));
    }
}

// The gradient for a fixed norm -> the gradient: removes the component along x, unless the norm is clamped. out may alias grad.
template <class T, class Out>
inline void project_row(const float* grad, const T* x, float norm, int64_t D, Out* out) {
    if (!(norm >= float(SMALLEST_NORM))) {
        for_vectors(D, [&](int64_t d, int lanes) { store(out + d, load(grad + d, lanes), lanes); });
        return;
    }
    // x / |x| by division, so that the result is exactly 0 for D = 1.
    vf dots[4] = {};
    for_vectors(D, [&](int64_t d, int lanes) { dots[d / VL % 4] += load(grad + d, lanes) * (load(x + d, lanes) / norm); });
    const float along = sum((dots[0] + dots[1]) + (dots[2] + dots[3]));
    for_vectors(D, [&](int64_t d, int lanes) { store(out + d, load(grad + d, lanes) - load(x + d, lanes) / norm * along, lanes); });
}

template <class T>
struct Backward {
    static constexpr bool ROUNDS = !std::is_same<T, float>::value;
    static constexpr int64_t R = CHUNK<T>;

    const T* x;
    int64_t x_stride;
    const T* y;
    int64_t y_stride;
    float scale, bias;
    bool sigmoid;
    int64_t offset;
    const float* r;
    float weight;
    T* grad_x;
    float* grad_y;
    int64_t n, N, D;
    int threads;

    const int64_t words_d = words_of<T>(D), words_n = words_of<T>(N), words_r = words_of<T>(R);
    // With few columns, smaller tasks, to balance the threads. Whole panels of B, and whole words where they are packed as panels of A.
    static constexpr int64_t LEAST = std::lcm<int64_t>(NR, Word<T>::ks * Word<T>::whole);
    static_assert(TILE % LEAST == 0);
    const int64_t tile_columns = std::clamp(round_up(ceil_div(N, 4), LEAST), LEAST, TILE), tiles = ceil_div(N, tile_columns);
    const int64_t block = std::min(R, std::max<int64_t>(MR, A_BLOCK_WORDS / std::max<int64_t>(1, words_d) / MR * MR));
    Packed<T> by_width{D, N};                                                  // y for the logits
    Packed<T> by_pair{grad_x ? N : 0, D};                                      // y for the gradient of x
    Norms x_norms{n}, y_norms{N};
    Buffer<word_t<T>> x_rows{R * words_d};                                     // chunk of x for the logits
    Buffer<word_t<T>> x_columns{grad_y ? words_r * round_up(D, VL) : 0};       // chunk of x for the gradient of y
    Buffer<word_t<T>> gradients{grad_x ? round_up(R, MR) * words_n : 0};       // chunk of G for the gradient of x
    Buffer<float> grad_rows{grad_x ? R * D : 0};
    Buffer<float> row_error{tiles * R}, column_error{round_up(N, TILE)};
    Buffer<float> mean_x{D}, mean_y{D};
    Buffer<Row> row{R};
    Buffer<double> sums{tiles * 2};
    // Per thread:
    Buffer<float> products{threads * block * NR};
    Buffer<T> tile_of_g{threads * R * TILE};
    Buffer<word_t<T>> packed_tile{grad_y ? threads * TILE * words_r : 0};

    void run(const Columns& columns, double* grad_scale, double* grad_bias) {
        pack_units<T>({y, y_stride, 1}, by_width, y_norms.norm, threads);
        if (grad_x)
            parallel(by_pair.panels(), threads, [&](int64_t p, int) {
                pack_unit_columns<T>({y, 1, y_stride}, p * NR, columns_of(p), N, width(p), y_norms.norm, by_pair.panel(p));
            });
        if (ROUNDS) {
            if (grad_y) mean_unit_row(x, x_stride, n, D, x_norms, mean_x, threads);
            if (grad_x) mean_unit_row(y, y_stride, N, D, y_norms, mean_y, threads);
        }
        std::fill(sums.data(), sums + tiles * 2, 0.0);
        std::fill(column_error.data(), column_error + round_up(N, TILE), 0.0f);
        for (int64_t i0 = 0; i0 < n; i0 += R) {
            const int64_t count = std::min(R, n - i0);
            pack_chunk(i0, count);
            parallel(tiles, threads, [&](int64_t tile, int thread) { gradients_of_tile(i0, count, tile, columns, thread); });
            if (grad_x) {
                multiply_rows(count);
                parallel(ceil_div(count, MR), threads, [&](int64_t group, int) {
                    for (int64_t i = group * MR; i < std::min(count, (group + 1) * MR); i++) finish_row(i0, i);
                });
            }
        }
        *grad_scale = *grad_bias = 0.0;
        for (int64_t tile = 0; tile < tiles; tile++) *grad_scale += sums[2 * tile], *grad_bias += sums[2 * tile + 1];
    }

    int width(int64_t panel) const { return int(std::min<int64_t>(NR, round_up(D - panel * NR, VL))); }
    int columns_of(int64_t panel) const { return int(std::min<int64_t>(NR, D - panel * NR)); }

    void pack_chunk(int64_t i0, int64_t count) {
        const int64_t groups = ceil_div(count, MR), panels = grad_y ? ceil_div(D, NR) : 0;
        parallel(groups + panels, threads, [&](int64_t task, int) {
            if (task < groups) {
                const int64_t i = task * MR;
                pack_unit_rows<T>({x, x_stride, 1}, i0 + i, int(std::min<int64_t>(MR, count - i)), D, x_norms.norm + i0 + i,
                                  x_rows + i * words_d);
            } else {
                const int64_t p = task - groups;
                pack_unit_columns<T>({x + i0 * x_stride, 1, x_stride}, p * NR, columns_of(p), count, width(p), x_norms.norm + i0,
                                     x_columns + p * NR * words_r);
            }
        });
        for (int64_t i = 0; i < count; i++)
            row[i] = {x_norms.times(scale, i0 + i), x_norms.left[i0 + i], x_norms.inverse[i0 + i], x_norms.norm[i0 + i],
                sigmoid ? 0.0f : r[i0 + i], sigmoid ? 0.0f : r[n + i0 + i]};
    }

    // Computes the chunk's gradients for one tile of columns, and accumulates their contribution to the columns.
    void gradients_of_tile(int64_t i0, int64_t count, int64_t tile, const Columns& all, int thread) {
        T* g = tile_of_g + thread * R * TILE;
        float* c = products + thread * block * NR;
        float* errors = row_error + tile * R;
        const int64_t j0 = tile * tile_columns, here = std::min(tile_columns, N - j0), panel = j0 / NR;
        std::fill(errors, errors + count, 0.0f);
        for (int64_t i = 0; i < count; i += block)
            for (int64_t p = panel; p < panel + ceil_div(here, NR); p++) {
                const int64_t rows = std::min(block, count - i), j = p * NR;
                block_product<T>(rows, x_rows + i * words_d, by_width, p, p + 1, c, [](int64_t, int64_t, int, float*) {});
                const Columns columns{all.inverse + j, all.left + j, all.left_low + j, all.norm + j, all.m_j + j, all.log_sum + j,
                    all.weight + j};
                TileSums total = {};
                const auto take = [&](auto function) {
                    function(rows, by_width.columns(p), i0 + i + offset - j, c, row + i, columns, scale, bias, weight,
                        g + i * TILE + j - j0,
                             errors + i, column_error + j, total);
                };
                switch (by_width.width(p) / VL) {
                    case 1: take(sigmoid ? gradient_tile<1, true, T> : gradient_tile<1, false, T>); break;
                    case 2: take(sigmoid ? gradient_tile<2, true, T> : gradient_tile<2, false, T>); break;
                    default: take(sigmoid ? gradient_tile<3, true, T> : gradient_tile<3, false, T>);
                }
                for (int lane = 0; lane < VL; lane++) sums[2 * tile] += total.scale[lane], sums[2 * tile + 1] += total.bias[lane];
            }
        if (grad_x) {
            const auto row = [&](int64_t i) -> const T* { return g + i * TILE; };
            pack_rows<T>(row, 0, count, 0, here, words_n, gradients + j0 / Word<T>::ks * MR);
        }
        if (grad_y) add_to_columns(i0, count, j0, here, g, packed_tile + thread * TILE * words_r);
    }

    void add_to_columns(int64_t i0, int64_t count, int64_t j0, int64_t here, const T* g, word_t<T>* packed) {
        const int64_t words = words_of<T>(count);
        constexpr int64_t ROWS = ROWS_AT_ONCE<T>;
        pack_block<T>({g, 1, TILE}, 0, here, count, packed);
        for (int64_t p = 0; p < ceil_div(D, NR); p++)
            for (int64_t j = 0; j < here; j += ROWS)
                block_into<T>(words, packed + j * words, words, x_columns + p * NR * words_r, width(p), int(std::min(ROWS, here - j)),
                              columns_of(p), grad_y + (j0 + j) * D + p * NR, D, i0 > 0);
        if ((ROUNDS || PACKS_UNITS<T>) && i0 + count == n)
            for (int64_t j = j0; j < j0 + here; j++)
                complete(grad_y + j * D, ROUNDS ? column_error[j] : 0.0f, mean_x, PACKS_UNITS<T> ? y_norms.inverse[j] : 1.0f);
    }

    // grad = (grad + error * mean) * factor: adds back the rounding error and applies the norm.
    void complete(float* grad, float error, const float* mean, float factor) const {
        for_vectors(D, [&](int64_t d, int lanes) {
            vf g = load(grad + d, lanes);
            if (ROUNDS) g += error * load(mean + d, lanes);
            store(grad + d, g * factor, lanes);
        });
    }

    // grad_rows = G y, in blocks of columns whose words stay in the cache.
    void multiply_rows(int64_t count) {
        constexpr int64_t PIECE = CHAIN<word_t<T>>, ROWS = ROWS_AT_ONCE<T>;
        const int64_t panels = ceil_div(D, NR), halves = threads > 1 ? 2 : 1, groups = std::min<int64_t>(panels,
            threads > 1 ? 2 * threads : 1);
        parallel(groups * halves, threads, [&](int64_t task, int) {
            const int64_t group = task / halves, half = task % halves, rows = ceil_div(count, ROWS);
            for (int64_t k = 0; k == 0 || k < words_n; k += PIECE)
                for (int64_t p = panels * group / groups; p < panels * (group + 1) / groups; p++)
                    for (int64_t m = rows * half / halves; m < rows * (half + 1) / halves; m++) {
                        const int64_t i = m * ROWS;
                        block_into<T>(std::min(PIECE, words_n - k), gradients + (i * words_n + k * MR), words_n,
                                      by_pair.panel(p) + k * width(p), width(p), int(std::min(ROWS, count - i)), columns_of(p), grad_rows + (i * D + p * NR), D, k > 0);
                    }
        });
    }

    void finish_row(int64_t i0, int64_t i) {
        float* grad = grad_rows + i * D;
        double error = 0.0;
        if (ROUNDS)
            for (int64_t tile = 0; tile < tiles; tile++) error += row_error[tile * R + i];
        complete(grad, float(error), mean_y, PACKS_UNITS<T> ? row[i].inverse : 1.0f);
        const T* from = x + (i0 + i) * x_stride;
        project_row(grad, from, float(norm_of(from, D)), D, grad_x + (i0 + i) * D);
    }
};

}  // namespace

// As forward, with r [2, n], c_max, c_log, column_weight [N] (null for sigmoid), row_weight scalar -> grad_x [n, D]; grad_y [N, D] float,
// for fixed norms of y; grad_scale, grad_bias double. grad_x and grad_y may be null.
template <class T>
void contrastive_loss_backward(
    const T* x, int64_t x_stride, const T* y, int64_t y_stride, const float* scale, const float* bias, bool sigmoid, int64_t offset,
    const float* r, const float* c_max, const float* c_log, const float* row_weight, const float* column_weight, T* grad_x, float* grad_y,
    double* grad_scale, double* grad_bias, int64_t n, int64_t N, int64_t D, int threads
) {
    const int64_t wide = round_up(N, NR);
    Buffer<float> padded(3 * wide);
    const float* from[3] = {c_max, c_log, column_weight};
    std::fill(padded.data(), padded + 3 * wide, 0.0f);
    if (!sigmoid)
        for (int which = 0; which < 3; which++) std::copy(from[which], from[which] + N, padded + which * wide);
    Backward<T> backward{x, x_stride, y, y_stride, *scale, bias ? *bias : 0.0f, sigmoid, offset, r, *row_weight, grad_x, grad_y,
                         n, N, D, threads};
    take_norms(x, x_stride, n, D, backward.x_norms, threads);
    take_norms(y, y_stride, N, D, backward.y_norms, threads);
    const Columns columns{backward.y_norms.inverse, backward.y_norms.left, backward.y_norms.left_low, backward.y_norms.norm, padded,
        padded + wide, padded + 2 * wide};
    backward.run(columns, grad_scale, grad_bias);
}
OV3_EXPORT(contrastive_loss_backward)

// grad [R, D] float for fixed norms, x [R, D] -> out [R, D], the gradient; out may alias grad.
template <class T>
void contrastive_loss_project(const float* grad, const T* x, int64_t x_stride, T* out, int64_t R, int64_t D, int threads) {
    parallel(ceil_div(R, 16), threads, [&](int64_t task, int) {
        for (int64_t i = task * 16; i < std::min(R, (task + 1) * 16); i++)
            project_row(grad + i * D, x + i * x_stride, float(norm_of(x + i * x_stride, D)), D, out + i * D);
    });
}
OV3_EXPORT(contrastive_loss_project)

// The gradients of contrastive_loss_alone_forward: r, c [2, N] as there -> grad_x, grad_y [N, D], each of which may be null; grad_scale,
// grad_bias scalars.
template <class T>
void contrastive_loss_alone_backward(
    const float* grad_loss, const T* x, int64_t x_stride, const T* y, int64_t y_stride, const float* scale, const float* bias, bool sigmoid,
    bool wide, const float* r, const float* c, T* grad_x, T* grad_y, float* grad_scale, float* grad_bias, int64_t N, int64_t D, int threads
) {
    if constexpr (!std::is_same<T, float>::value)
        if (wide) {
            Buffer<float> wide_x(N * D), wide_y(N * D), wide_grad_x(grad_x ? N * D : 0), wide_grad_y(grad_y ? N * D : 0);
            convert(x, x_stride, wide_x.data(), N, D, threads);
            convert(y, y_stride, wide_y.data(), N, D, threads);
            contrastive_loss_alone_backward<float>(
                grad_loss, wide_x, D, wide_y, D, scale, bias, sigmoid, wide, r, c, grad_x ? wide_grad_x.data() : nullptr,
                grad_y ? wide_grad_y.data() : nullptr, grad_scale, grad_bias, N, D, threads
            );
            if (grad_x) convert(wide_grad_x.data(), D, grad_x, N, D, threads);
            if (grad_y) convert(wide_grad_y.data(), D, grad_y, N, D, threads);
            return;
        }
    const float weight = *grad_loss * float(1.0 / double(N));
    Buffer<float> weights(N), for_fixed_norms(grad_y ? N * D : 0);
    std::fill(weights.data(), weights + N, weight);
    double by_scale, by_bias;
    contrastive_loss_backward(
        x, x_stride, y, y_stride, scale, bias, sigmoid, 0, r, c, c + N, &weight, weights.data(), grad_x,
        grad_y ? for_fixed_norms.data() : nullptr, &by_scale, &by_bias, N, N, D, threads
    );
    *grad_scale = float(by_scale), *grad_bias = float(by_bias);
    if (grad_y) contrastive_loss_project(for_fixed_norms.data(), y, y_stride, grad_y, N, D, threads);
}
OV3_EXPORT(contrastive_loss_alone_backward)
