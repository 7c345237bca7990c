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
#if defined(_MSC_VER) && defined(_M_ARM64)
    __prefetch(p);
#elif defined(_MSC_VER)
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#else
    __builtin_prefetch(p);
#endif
}

inline constexpr size_t kHugePage = size_t{2} << 20;

inline void* allocate_table(size_t bytes) {
    if (bytes > PTRDIFF_MAX / 2) throw std::bad_alloc();
#if defined(_WIN32)
    void* memory = _aligned_malloc(bytes, 64);
    if (!memory) throw std::bad_alloc();
#else
#if defined(__linux__)
    // By itself, so that it goes back to the system as soon as it is freed: malloc would keep what a grown cache leaves.
    if (bytes >= kHugePage / 2) {
        size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        void* place = mmap(nullptr, whole + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (place == MAP_FAILED) throw std::bad_alloc();
        char* first = static_cast<char*>(place);
        size_t skipped = -reinterpret_cast<uintptr_t>(first) % kHugePage;
        if (skipped) munmap(first, skipped);
        munmap(first + skipped + whole, kHugePage - skipped);
        madvise(first + skipped, whole, MADV_HUGEPAGE);
        return first + skipped;
    }
#endif
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) throw std::bad_alloc();
#endif
    return memory;
}

// `bytes` as at the allocation.
inline void free_table(void* memory, [[maybe_unused]] size_t bytes) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
#if defined(__linux__)
    if (bytes >= kHugePage / 2) {
        munmap(memory, (bytes + kHugePage - 1) / kHugePage * kHugePage);
        return;
    }
#endif
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
    void deallocate(T* p, size_t n) { free_table(p, n * sizeof(T)); }
    bool operator==(const TableAllocator&) const { return true; }
};

template <typename T>
using Table = std::vector<T, TableAllocator<T>>;

}  // namespace fastformer::bpe
