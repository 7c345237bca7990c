// Large tables on huge pages where the system has them: they are read at random, and every page is a TLB entry.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#elif defined(_MSC_VER)
#include <intrin.h>
#endif

namespace fastformer::bpe {

// Asks for a cache line that will be read soon.
inline void fetch(const void* p) {
#if defined(_MSC_VER)
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#else
    __builtin_prefetch(p);
#endif
}

inline void* allocate_table(size_t bytes) {
    constexpr size_t kHugePage = size_t{2} << 20;
    size_t alignment = bytes >= kHugePage / 2 ? kHugePage : 64;
    if (bytes > PTRDIFF_MAX / 2) throw std::bad_alloc();
    bytes = (bytes + alignment - 1) / alignment * alignment;
#if defined(_WIN32)
    void* memory = _aligned_malloc(bytes, alignment);
#else
    void* memory = std::aligned_alloc(alignment, bytes);
#endif
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

inline void free_table(void* memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    std::free(memory);
#endif
}

template <typename T>
struct TableAllocator {
    using value_type = T;
    TableAllocator() = default;
    template <typename U>
    TableAllocator(const TableAllocator<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(allocate_table(n * sizeof(T))); }
    void deallocate(T* p, size_t) { free_table(p); }
    bool operator==(const TableAllocator&) const { return true; }
};

template <typename T>
using Table = std::vector<T, TableAllocator<T>>;

}  // namespace fastformer::bpe
