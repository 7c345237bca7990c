// What each instruction set provides: one function that classifies a window.
#pragma once
#include <cstring>

#include "bpe/scan_mapped.h"

namespace fastformer::bpe::mapped {

#if defined(__x86_64__) && defined(__GNUC__)
void classify_avx512(const Tables& tables, const uint8_t* p, size_t n, const Set* sets, size_t count, Window& window);
void classify_avx2(const Tables& tables, const uint8_t* p, size_t n, const Set* sets, size_t count, Window& window);
#elif defined(__aarch64__) && defined(__GNUC__)
void classify_neon(const Tables& tables, const uint8_t* p, size_t n, const Set* sets, size_t count, Window& window);
#endif

}  // namespace fastformer::bpe::mapped
