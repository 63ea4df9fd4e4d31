// Loops over independent tasks on OpenMP's thread pool, shared with PyTorch so that the two never compete.
//
// No result depends on which thread runs a task or on the number of threads: a task writes only what no other task reads or writes, and sums
// over tasks are taken afterwards in task order. So there are no data races either.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "memory.h"
#include "tiles.h"

namespace ov3 {

// The thread may use tiles within this scope. Threads are shared with PyTorch's libraries, which configure and release tiles on their own.
struct TileScope {
#if defined(OV3_TILES)
    TileScope() { Tiles::configure(TileConfig::full()); }
    ~TileScope() { Tiles::release(); }
    TileScope(const TileScope&) = delete;
#endif
};

// Calls body(task, thread), thread < threads.
template <class Body>
inline void parallel(int64_t tasks, int threads, const Body& body) {
    if (tasks < threads) threads = int(tasks);
    if (threads <= 1) {
        [[maybe_unused]] const TileScope tiles;
        for (int64_t task = 0; task < tasks; task++) body(task, 0);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] const TileScope tiles;
        const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) body(task, thread);
    }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised memory on separate cache lines.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, round_up(size * sizeof(T) + 64, 64)))) {
        if (!data_) throw std::bad_alloc();
        expect_writes(data_, size);
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() { return data_; }
    operator const T*() const { return data_; }
    T* data() { return data_; }

  private:
    T* data_;
};

}  // namespace ov3
