// Huge pages for large results.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ov3 {

// Requests huge pages for a result about to be written: fresh memory otherwise costs a page fault per 4 KB, which takes
// longer than the writes. Does nothing if the memory is already mapped (judging by its last page) or the system has no huge pages, since
// the request costs as much as writing a few megabytes.
inline void expect_bytes(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = uintptr_t(1) << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / PAGE * PAGE;
    if (!data || bytes <= 0 || first >= last) return;
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(last - 4096), 4096, &resident) == 0 && (resident & 1)) return;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// The same for n values.
template <class T>
inline void expect_writes(T* data, int64_t n) { expect_bytes(data, n * int64_t(sizeof(T))); }

}  // namespace ov3
