// Cross-entropy of a linear head: logits z_tv = <h_t, w_v> in chunks of tokens, transposed, with one token per lane of the softmax.
//
// For a chunk of R tokens: tiles of vocabulary x tokens, whose exponentials relative to the running maximum are kept; these are then overwritten by
// the gradients G_vt with respect to the logits, followed by G^T w and G h. If gradients are computed in the forward, nothing is computed twice: three products.
// 16-bit weights accumulate their gradient in 24 bits: the upper 16 in the result, the lower 8 in a separate buffer.
#include <type_traits>

#include "export.h"
#include "softmax.h"

using namespace ov3;

namespace {

template <class T>
constexpr int64_t CHUNK = sizeof(T) == 2 ? 528 : 384;  // tokens at a time, for which V * CHUNK elements are kept
constexpr int64_t TILE = 192;                          // most classes per task
constexpr int64_t L2_WORDS = 1 << 18;

template <class T>
struct Head {
    static constexpr int64_t R = CHUNK<T>, ROWS = ROWS_AT_ONCE<T>;
    static constexpr bool NARROW = !std::is_same<T, float>::value;

    const T* h;
    int64_t h_stride;
    const T* w;
    int64_t w_stride;
    const int64_t* labels;
    const int64_t* tokens;  // positions of the rows of h that are not ignored
    int64_t count, V, D;
    bool gradients;
    T* grad_h;  // rows as in h, with stride D; or null
    T* grad_w;  // or null
    int threads;

    // With few classes, smaller tasks, to balance the threads.
    const int64_t tile_classes = std::clamp<int64_t>(round_up(ceil_div(V, 32), ROWS), ROWS, TILE);
    const int64_t words_d = words_of<T>(D), words_r = words_of<T>(R), tiles = ceil_div(V, tile_classes), wide = round_up(R, NR);
    const int64_t panels_d = ceil_div(D, NR), room = std::min(R, round_up(std::max<int64_t>(count, 1), NR));
    Buffer<T> rows{room * D};                                             // chunk of h
    Buffer<word_t<T>> by_width{words_d * wide};                           // chunk of h for the logits
    Buffer<word_t<T>> by_token{grad_w ? words_r * round_up(D, VL) : 0};   // chunk of h for the gradient of w
    Buffer<T> kept{gradients ? V * room : 0};                             // [V][room]
    const bool in_parts = NARROW && count > R;                            // grad_w is summed over chunks
    Buffer<uint8_t> lower{grad_w && in_parts ? V * D : 0};                // lower bits of grad_w
    Buffer<float> grad_rows{grad_h ? room * D : 0};
    Buffer<float> tile_m{tiles * wide}, tile_l{tiles * wide};              // per tile: maximum, and sum of exponentials relative to it
    Buffer<float> own{wide}, upstream{wide}, top{wide}, log_sum{wide};
    // Per thread:
    Buffer<word_t<T>> a{threads * TILE * words_d};
    Buffer<word_t<T>> a_tokens{grad_w ? threads * TILE * words_r : 0};
    Buffer<float> products{threads * TILE * NR};
    static constexpr int64_t PIECE = CHAIN<word_t<T>> < 256 ? CHAIN<word_t<T>> : 256;
    // Words of classes at a time in the gradient of h: all of them where they fit in the L2 cache.
    const int64_t all_classes = words_of<T>(V), rows_of_piece = round_up(room, MR) + round_up(D, VL);
    const int64_t piece = all_classes * rows_of_piece <= L2_WORDS ? std::max(all_classes, PIECE) : PIECE;
    Buffer<word_t<T>> a_classes{grad_h ? round_up(room, MR) * piece : 0};
    Buffer<word_t<T>> b_classes{grad_h ? piece * round_up(D, VL) : 0};

    int width(int64_t panel) const { return int(std::min<int64_t>(NR, round_up(D - panel * NR, VL))); }
    int columns_of(int64_t panel) const { return int(std::min<int64_t>(NR, D - panel * NR)); }

    void take_chunk(int64_t t0, int64_t here) {
        const int64_t panels = ceil_div(here, NR), first = tokens[t0];
        const bool in_place = tokens[t0 + here - 1] - first == here - 1;
        const T* chunk = in_place ? h + first * h_stride : rows;
        const int64_t stride = in_place ? h_stride : D;
        if (!in_place)
            parallel(ceil_div(here, 16), threads, [&](int64_t task, int) {
                for (int64_t t = task * 16; t < std::min(here, (task + 1) * 16); t++) {
                    const T* row = h + tokens[t0 + t] * h_stride;
                    std::copy(row, row + D, rows + t * D);
                }
            });
        parallel(panels + (grad_w ? panels_d : 0), threads, [&](int64_t p, int) {
            if (p < panels) {
                const int64_t n = std::min<int64_t>(NR, here - p * NR);
                pack_panel<T>({chunk, stride, 1}, p * NR, int(n), 0, D, int(round_up(n, VL)), by_width + p * NR * words_d);
            } else {
                p -= panels;
                pack_panel<T>({chunk, 1, stride}, p * NR, columns_of(p), 0, here, width(p), by_token + p * NR * words_r);
            }
        });
    }

    // Logits are exponentiated, so their errors matter: for small widths, short chains of additions.
    const int64_t chain = std::min<int64_t>(CHAIN<word_t<T>>, std::max<int64_t>(16, round_up(ceil_div(words_d, 4), Word<T>::whole)));

    // Logits of one tile: take(first class in the tile, token, vectors, classes, c).
    template <class Take>
    void logits(int64_t here, int64_t tile, int thread, const Take& take) {
        const int64_t v0 = tile * tile_classes, classes = std::min(tile_classes, V - v0);
        word_t<T>* packed = a + thread * TILE * words_d;
        float* c = products + thread * TILE * NR;
        pack_block<T>({w, w_stride, 1}, v0, classes, D, packed);
        for (int64_t t = 0; t < here; t += NR) {
            const int n = int(std::min<int64_t>(NR, round_up(here - t, VL)));
            for (int64_t k = 0; k == 0 || k < words_d; k += chain)
                micro_rows(n / VL, classes, std::min(chain, words_d - k), packed + k * MR, words_d, by_width + t * words_d + k * n, n, c, NR,
                           k > 0);
            for (int j = 0; j < n; j += VL) take(v0, classes, t + j, int(std::min<int64_t>(VL, here - t - j)), c + j);
        }
    }

    // Maxima and sums of one tile, and, if kept, the exponentials.
    void exponentials(int64_t t0, int64_t here, int64_t tile, int thread) {
        logits(here, tile, thread, [&](int64_t v0, int64_t classes, int64_t t, int lanes, float* c) {
            vf highest = splat(LOWEST);
            for (int64_t v = 0; v < classes; v++) highest = max(highest, load(c + v * NR));
            vd sums = {};
            for (int64_t first = 0; first < classes; first += 4) {
                vf few = {};
                for (int64_t v = first; v < std::min(classes, first + 4); v++) {
                    const vf e = exp_below(load(c + v * NR) - highest);
                    few += e;
                    if (gradients) store(kept + (v0 + v) * room + t, e, lanes);
                }
                sums += __builtin_convertvector(few, vd);
            }
            store(tile_m + tile * wide + t, highest);
            store(tile_l + tile * wide + t, __builtin_convertvector(sums, vf));
            for (int lane = 0; lane < lanes; lane++) {
                const int64_t label = labels[tokens[t0 + t + lane]] - v0;
                if (label >= 0 && label < classes) own[t + lane] = c[label * NR + lane];
            }
        });
    }

    void log_sums(int64_t t0, int64_t here, float* nll, float* lse, int64_t lse_stride) {
        parallel(ceil_div(here, NR), threads, [&](int64_t task, int) {
            for (int64_t t = task * NR; t < std::min(here, (task + 1) * NR); t += VL) {
                vf highest = splat(LOWEST);
                for (int64_t tile = 0; tile < tiles; tile++) highest = max(highest, load(tile_m + tile * wide + t));
                vd sums = {};
                for (int64_t tile = 0; tile < tiles; tile++) {
                    const vf scale = exp_below(load(tile_m + tile * wide + t) - highest);
                    sums += __builtin_convertvector(load(tile_l + tile * wide + t), vd) * __builtin_convertvector(scale, vd);
                }
                for (int64_t i = t; i < std::min(here, t + VL); i++) {
                    const int64_t at = tokens[t0 + i];
                    top[i] = highest[i - t], log_sum[i] = float(std::log(sums[i - t]));
                    nll[at] = (top[i] - own[i]) + log_sum[i];
                    if (lse) lse[at] = top[i], lse[lse_stride + at] = log_sum[i];
                }
            }
        });
    }

    // kept: exponentials -> gradients, for an upstream gradient common to all tokens.
    void scale_kept(int64_t t0, int64_t here, int64_t tile, float factor) {
        const int64_t v0 = tile * tile_classes, classes = std::min(tile_classes, V - v0);
        float* scale = tile_m + tile * wide;
        for_vectors(here, [&](int64_t t, int lanes) {
            store(scale + t, exp_below((load(scale + t, lanes) - load(top + t, lanes)) - load(log_sum + t, lanes)) * factor, lanes);
        });
        for (int64_t v = v0; v < v0 + classes; v++)
            for_vectors(here, [&](int64_t t, int lanes) {
                T* at = kept + v * room + t;
                store(at, load(at, lanes) * load(scale + t, lanes), lanes);
            });
        for (int64_t t = 0; t < here; t++) {
            const int64_t label = labels[tokens[t0 + t]] - v0;
            if (label < 0 || label >= classes) continue;
            // In float, before 1 - small is rounded to 1.
            const float p = exp_below(splat((own[t] - top[t]) - log_sum[t]))[0];
            kept[(v0 + label) * room + t] = from_float<T>((p - 1.0f) * factor);
        }
    }

    // The same directly from logits, given their log-sums and an upstream gradient per token.
    void gradients_of_tile(int64_t t0, int64_t here, int64_t tile, int thread) {
        logits(here, tile, thread, [&](int64_t v0, int64_t classes, int64_t t, int lanes, float* c) {
            const vf highest = load(top + t), log = load(log_sum + t), up = load(upstream + t);
            for (int64_t v = 0; v < classes; v++) store(c + v * NR, exp_below((load(c + v * NR) - highest) - log));
            for (int lane = 0; lane < lanes; lane++) {
                const int64_t label = labels[tokens[t0 + t + lane]] - v0;
                if (label >= 0 && label < classes) c[label * NR + lane] -= 1.0f;
            }
            for (int64_t v = 0; v < classes; v++) store(kept + (v0 + v) * room + t, load(c + v * NR) * up, lanes);
        });
    }

    // grad_w += G h of one tile.
    void add_to_weight(int64_t t0, int64_t here, int64_t tile, int thread) {
        const int64_t v0 = tile * tile_classes, classes = std::min(tile_classes, V - v0), words = words_of<T>(here);
        word_t<T>* packed = a_tokens + thread * TILE * words_r;
        pack_block<T>({kept, room, 1}, v0, classes, here, packed);
        for (int64_t v = 0; v < classes; v += ROWS)
            for (int64_t p = 0; p < panels_d; p++) {
                const int n = int(std::min(ROWS, classes - v));
                const int64_t at = (v0 + v) * D + p * NR;
                const word_t<T>*from = packed + v * words, *b = by_token + p * NR * words_r;
                if constexpr (NARROW) add_narrow(words, from, b, width(p), n, columns_of(p), grad_w + at, lower + at, t0 > 0);
                else block_into<T>(words, from, words, b, width(p), n, columns_of(p), grad_w + at, D, t0 > 0);
            }
        if constexpr (NARROW)
            if (in_parts && t0 + here == count)
                for_vectors(classes * D, [&](int64_t i, int lanes) {
                    store(grad_w + v0 * D + i, join(grad_w + v0 * D + i, lower + v0 * D + i, lanes), lanes);
                });
    }

    typedef uint8_t vu8 __attribute__((vector_size(VL)));

    // Floats whose upper 16 bits are at `up` and the next 8 at `low`.
    static vf join(const T* up, const uint8_t* low, int lanes) {
        vu8 bits = {};
        copy_lanes<1>(&bits, low, lanes);
        return bit_cast<vf>(bit_cast<vu>(load(up, lanes)) | (__builtin_convertvector(bits, vu) << 8));
    }
    // x rounded to 24 bits, in two parts. NaN is truncated, since a carry could turn it into a number.
    static void part(vf x, T* up, uint8_t* low, int lanes) {
        const vu bits = bit_cast<vu>(x) + (x == x ? vu{} + 0x80u : vu{});
        const vu16 upper = __builtin_convertvector(bits >> 16, vu16);
        const vu8 lower = __builtin_convertvector(bits >> 8, vu8);
        copy_lanes<2>(up, &upper, lanes);
        copy_lanes<1>(low, &lower, lanes);
    }
    template <int BYTES>
    static void copy_lanes(void* to, const void* from, int lanes) {
        if (lanes == VL) std::memcpy(to, from, VL * BYTES);
        else std::memcpy(to, from, lanes * BYTES);
    }

    void add_narrow(
        int64_t words, const word_t<T>* from, const word_t<T>* b, int width, int n, int columns, T* up, uint8_t* low, bool accumulate
    ) {
        float c[ROWS * NR];
        if (accumulate)
            for (int i = 0; i < n; i++)
                for (int j = 0; j < columns; j += 32) __builtin_prefetch(up + i * D + j, 1), __builtin_prefetch(low + i * D + j, 1);
        for (int64_t k = 0; k == 0 || k < words; k += CHAIN<word_t<T>>)
            micro_rows(width / VL, n, std::min(CHAIN<word_t<T>>, words - k), from + k * MR, words, b + k * width, width, c, NR, k > 0);
        for (int i = 0; i < n; i++)
            for_vectors(columns, [&](int64_t j, int lanes) {
                const int64_t at = i * D + j;
                const vf x = load(c + i * NR + j, lanes);
                if (!in_parts) return store(up + at, x, lanes);
                part(accumulate ? join(up + at, low + at, lanes) + x : x, up + at, low + at, lanes);
            });
    }

    // grad_rows = G^T w in blocks of classes, whose words all threads share.
    void multiply_rows(int64_t here) {
        const int64_t most = piece * Word<T>::ks;
        constexpr int64_t STRIP = 64;  // tokens packed at a time: one or two cache lines of their row
        const int64_t groups = ceil_div(here, ROWS), halves = threads > 1 ? 2 : 1, parts = std::min<int64_t>(panels_d,
            2 * threads - (threads == 1)), strips = ceil_div(here, STRIP);
        for (int64_t v = 0; v < V; v += most) {
            const int64_t classes = std::min(most, V - v), words = words_of<T>(classes);
            parallel(strips + panels_d, threads, [&](int64_t task, int) {
                if (task < strips) {
                    const int64_t t = task * STRIP;
                    pack_block<T>({kept + v * room, 1, room}, t, std::min(STRIP, here - t), classes, a_classes + t * words);
                } else {
                    const int64_t p = task - strips;
                    pack_panel<T>({w + v * w_stride, 1, w_stride}, p * NR, columns_of(p), 0, classes, width(p), b_classes + p * NR * words);
                }
            });
            parallel(parts * halves, threads, [&](int64_t task, int) {
                const int64_t part = task / halves, half = task % halves;
                for (int64_t p = panels_d * part / parts; p < panels_d * (part + 1) / parts; p++)
                    for (int64_t m = groups * half / halves; m < groups * (half + 1) / halves; m++) {
                        const int64_t t = m * ROWS;
                        block_into<T>(words, a_classes + t * words, words, b_classes + p * NR * words, width(p),
                                      int(std::min(ROWS, here - t)), columns_of(p), grad_rows + (t * D + p * NR), D, v > 0);
                    }
            });
        }
    }

    void finish_rows(int64_t t0, int64_t here) {
        parallel(ceil_div(here, 16), threads, [&](int64_t task, int) {
            for (int64_t t = task * 16; t < std::min(here, (task + 1) * 16); t++) {
                T* out = grad_h + tokens[t0 + t] * D;
                for_vectors(D, [&](int64_t d, int lanes) { store(out + d, load(grad_rows + t * D + d, lanes), lanes); });
            }
        });
    }

    void rest_of_gradients(int64_t t0, int64_t here) {
        if (!grad_h) return;
        multiply_rows(here);
        finish_rows(t0, here);
    }

    // nll [T] and lse [2, T] (or null) of the tokens that are not ignored; gradients for an upstream gradient of `factor` each.
    void forward(float* nll, float* lse, int64_t lse_stride, float factor) {
        for (int64_t t0 = 0; t0 < count; t0 += R) {
            const int64_t here = std::min(R, count - t0);
            take_chunk(t0, here);
            parallel(tiles, threads, [&](int64_t tile, int thread) { exponentials(t0, here, tile, thread); });
            log_sums(t0, here, nll, lse, lse_stride);
            if (!gradients) continue;
            parallel(tiles, threads, [&](int64_t tile, int thread) {
                scale_kept(t0, here, tile, factor);
                if (grad_w) add_to_weight(t0, here, tile, thread);
            });
            rest_of_gradients(t0, here);
        }
    }

    void backward(const float* grad_nll, const float* lse, int64_t lse_stride) {
        for (int64_t t0 = 0; t0 < count; t0 += R) {
            const int64_t here = std::min(R, count - t0);
            take_chunk(t0, here);
            for (int64_t t = 0; t < here; t++) {
                const int64_t at = tokens[t0 + t];
                top[t] = lse[at], log_sum[t] = lse[lse_stride + at], upstream[t] = grad_nll[at];
            }
            parallel(tiles, threads, [&](int64_t tile, int thread) {
                gradients_of_tile(t0, here, tile, thread);
                if (grad_w) add_to_weight(t0, here, tile, thread);
            });
            rest_of_gradients(t0, here);
        }
    }
};

}  // namespace

// h [T, D], w [V, D] with row strides, labels [T], tokens [count]: the positions that are not ignored -> nll [T], lse [2, T] there.
template <class T>
void linear_cross_entropy_forward(
    const T* h, int64_t h_stride, const T* w, int64_t w_stride, const int64_t* labels, const int64_t* tokens, float* nll, float* lse,
    int64_t count, int64_t rows, int64_t V, int64_t D, int threads
) {
    Head<T> head{h, h_stride, w, w_stride, labels, tokens, count, V, D, false, nullptr, nullptr, threads};
    head.forward(nll, lse, rows, 0.0f);
}
OV3_EXPORT(linear_cross_entropy_forward)

// The same, grad_nll [T] and lse [2, T] -> grad_h [T, D] at those positions and grad_w [V, D], each of which may be null; count > 0.
template <class T>
void linear_cross_entropy_backward(
    const T* h, int64_t h_stride, const T* w, int64_t w_stride, const int64_t* labels, const int64_t* tokens, const float* grad_nll,
    const float* lse, T* grad_h, T* grad_w, int64_t count, int64_t rows, int64_t V, int64_t D, int threads
) {
    Head<T> head{h, h_stride, w, w_stride, labels, tokens, count, V, D, true, grad_h, grad_w, threads};
    head.backward(grad_nll, lse, rows);
}
OV3_EXPORT(linear_cross_entropy_backward)

// Forward and backward in one: labels [T] that are in [0, V) or ignore_index -> the loss, the sum over those that count or their mean,
// and its gradients grad_h [T, D] and grad_w [V, D], each of which may be null. Refused where a label is another.
template <class T>
void linear_cross_entropy_total(
    const T* h, int64_t h_stride, const T* w, int64_t w_stride, const int64_t* labels, int64_t ignore_index, bool mean, float* loss,
    T* grad_h, T* grad_w, int64_t rows, int64_t V, int64_t D, int threads
) {
    Buffer<int64_t> tokens(rows);
    int64_t count = 0;
    for (int64_t t = 0; t < rows; t++) {
        if (labels[t] == ignore_index) continue;
        if (labels[t] < 0 || labels[t] >= V) throw Refused();
        tokens[count++] = t;
    }
    if (grad_h && count < rows) std::fill(grad_h, grad_h + rows * D, T());
    if (grad_w && count == 0) std::fill(grad_w, grad_w + V * D, T());
    const double factor = mean ? 1.0 / double(std::max<int64_t>(count, 1)) : 1.0;
    Buffer<float> nll(rows);
    if (count > 0) {
        Head<T> head{h, h_stride, w, w_stride, labels, tokens, count, V, D, grad_h || grad_w, grad_h, grad_w, threads};
        head.forward(nll, nullptr, 0, float(factor));
    }
    double total = 0.0;
    for (int64_t i = 0; i < count; i++) total += nll[tokens[i]];
    *loss = float(total * factor);
}
OV3_EXPORT(linear_cross_entropy_total)
