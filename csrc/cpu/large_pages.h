// Large pages for memory that products stream through: fewer misses of the address cache, longer runs of prefetching.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace longcat {

// A hint, of use only before the memory is first written.
inline void prefer_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
    (void)data, (void)bytes;
}

}  // namespace longcat
