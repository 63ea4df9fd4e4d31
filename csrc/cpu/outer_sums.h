// Weight gradients: C[m, n] = sum_r a[r, m] b[r, n] over many rows r.
//
// Rows are processed in chunks, so that neither operand is ever packed in full, and rows computed on the fly (noise, patches, an
// activation's derivative) are needed only a chunk at a time. C is kept in fp32 between chunks; the chunk size is fixed, and so is the
// order of additions.
#pragma once

#include "rows.h"

namespace ov3 {

constexpr int64_t CHUNK_ROWS = 2048;
constexpr int64_t STRIP_ROWS = 64;  // rows of b packed at a time; a multiple of a word's ks

template <class T>
class OuterSums {
  public:
    // R: total number of rows.
    OuterSums(int64_t R, int64_t M, int64_t N, int threads)
        : M(M), N(N), threads_(threads), several_(R > CHUNK_ROWS), b_(std::min(R, CHUNK_ROWS), N),
          block_(block_rows<T>(std::max<int64_t>(M, 1), std::min(R, CHUNK_ROWS))), sums_(several_ ? M * b_.panels() * NR : 0),
          a_(block_ * b_.words * threads), c_(block_ * NR * threads) {}

    // The next chunk, with rows counted from its start: row_a(r) points to a's row r; strip_b(r, rows, thread) returns rows [r, r + rows)
    // of b as a Matrix over columns (in the thread's workspace, if they are computed). All chunks but the last have CHUNK_ROWS rows. With the
    // last one, every block of C goes to store(m, rows, n, columns, values, ld), values[ld * row + column].
    template <class RowA, class StripB, class Store>
    void add(int64_t rows, bool last, const RowA& row_a, const StripB& strip_b, const Store& store) {
        parallel(ceil_div(rows, STRIP_ROWS), threads_, [&](int64_t strip, int thread) {
            const int64_t start = strip * STRIP_ROWS, count = std::min(STRIP_ROWS, rows - start);
            const Matrix<T> b = strip_b(start, count, thread);
            for (int64_t p = 0; p < b_.panels(); p++) {
                word_t<T>* dst = b_.panel(p) + start / Word<T>::ks * b_.width(p);
                pack_panel<T>(b, p * NR, b_.columns(p), 0, count, b_.width(p), dst);
            }
        });
        if (M == 0 || N == 0) return;
        const int64_t blocks = ceil_div(M, block_), words = words_of<T>(rows);
        const int64_t groups = blocks >= 2 * threads_ ? 1 : std::min<int64_t>(b_.panels(), ceil_div(2 * threads_, blocks));
        parallel(blocks * groups, threads_, [&](int64_t task, int thread) {
            const int64_t m0 = task / groups * block_, group = task % groups, count = std::min(block_, M - m0);
            word_t<T>* a = a_.data() + block_ * b_.words * thread;
            pack_columns<T>(row_a, 0, rows, m0, count, a);
            for (int64_t p = b_.panels() * group / groups; p < b_.panels() * (group + 1) / groups; p++) {
                float* c = c_.data() + block_ * NR * thread;
                for (int64_t k = 0; k == 0 || k < words; k += CHAIN<word_t<T>>) {
                    const int64_t deep = std::min(CHAIN<word_t<T>>, words - k);
                    micro_rows(b_.width(p) / VL, count, deep, a + k * MR, words, b_.panel(p) + k * b_.width(p), b_.width(p), c, NR, k > 0);
                }
                // Each block of C's sums is stored contiguously, row by row.
                if (several_) add_to_sums(c, sums_.data() + (m0 * b_.panels() + p * count) * NR, count * NR, last);
                if (last) store(m0, count, p * NR, b_.columns(p), c, NR);
            }
        });
        started_ = true;
    }

    // All chunks, for rows that are in memory.
    template <class RowA, class StripB, class Store>
    void add_all(int64_t R, const RowA& row_a, const StripB& strip_b, const Store& store) {
        for (int64_t r0 = 0; r0 == 0 || r0 < R; r0 += CHUNK_ROWS)
            add(
                std::min(CHUNK_ROWS, R - r0), r0 + CHUNK_ROWS >= R, [&](int64_t r) { return row_a(r0 + r); },
                [&](int64_t r, int64_t rows, int thread) { return strip_b(r0 + r, rows, thread); }, store
            );
    }

    const int64_t M, N;

  private:
    // Adds c to the sums or, with the last chunk, the sums to c.
    void add_to_sums(float* c, float* sums, int64_t n, bool last) const {
        float* out = last ? c : sums;
        for (int64_t i = 0; i < n; i += VL) store(out + i, started_ ? load(sums + i) + load(c + i) : load(c + i));
    }

    const int threads_;
    const bool several_;
    bool started_ = false;
    Packed<T> b_;
    const int64_t block_;
    Buffer<float> sums_;
    Buffer<word_t<T>> a_;
    Buffer<float> c_;
};

// strip_b for rows in memory with one stride.
template <class T>
inline auto plain_strips(const T* data, int64_t stride) {
    return [=](int64_t r0, int64_t, int) { return Matrix<T>{data + r0 * stride, 1, stride}; };
}

// Stores a block of C: out[m, n], with row stride `width`.
template <class T>
inline auto store_block(T* out, int64_t width) {
    return [=](int64_t m, int64_t rows, int64_t n, int columns, const float* values, int64_t ld) {
        for (int64_t i = 0; i < rows; i++)
            for_vectors(columns, [&](int64_t j, int lanes) { store(out + (m + i) * width + n + j, load(values + i * ld + j, lanes),
                lanes); });
    };
}

// Stores a block of C transposed: out[n, m], with row stride `width`.
template <class T>
inline auto store_transposed(T* out, int64_t width) {
    return [=](int64_t m, int64_t rows, int64_t n, int columns, const float* values, int64_t ld) {
        for (int64_t i = 0; i < rows; i += VL)
            for (int j = 0; j < columns; j += VL) {
                const int deep = int(std::min<int64_t>(VL, rows - i)), wide = std::min(VL, columns - j);
                vf x[VL];
                for (int k = 0; k < VL; k++) x[k] = k < deep ? load(values + (i + k) * ld + j, wide) : vf{};
                transpose(x);
                for (int k = 0; k < wide; k++) store(out + (n + j + k) * width + m + i, x[k], deep);
            }
    };
}

}  // namespace ov3
