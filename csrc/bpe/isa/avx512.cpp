// AVX-512 (BW, VBMI, VBMI2): the flags of 64 ASCII bytes are one permutation of a 128-byte table, a map is one test.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "bpe/isa/isa.h"

#define FASTFORMER_ISA avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt")
#endif
#include "bpe/scan_mapped.h"

namespace fastformer::bpe::avx512::mapped {

template <Pattern pattern>
void classify(const Tables& tables, const uint8_t* p, size_t n, Window& window) {
    constexpr const Set* sets = kSets<pattern>;
    const __m512i low = _mm512_loadu_si512(tables.low), high = _mm512_loadu_si512(tables.low + 64);
    for (size_t at = 0; at < n; at += 64) {
        size_t left = n - at;
        __mmask64 valid = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
        __m512i bytes = _mm512_maskz_loadu_epi8(valid, p + at);
        __mmask64 multi = _mm512_movepi8_mask(bytes);
        __m512i flags = _mm512_permutex2var_epi8(low, bytes, high);
        __mmask64 tail = window.tail[at / 64] = _mm512_cmplt_epi8_mask(bytes, _mm512_set1_epi8(-64));
        // A character may begin in the block before: its flags are there already.
        if (multi) {
            classify_high<true>(tables, p, at, multi & ~tail, window.flags);
            _mm512_mask_storeu_epi8(window.flags + at, valid & ~multi, flags);
            flags = _mm512_loadu_si512(window.flags + at);
        } else {
            _mm512_storeu_si512(window.flags + at, flags);
        }
        for (size_t k = 0; k < kMaxSets; k++) {
            __mmask64 map = valid;
            if (sets[k].any)
                map = _mm512_mask_test_epi8_mask(map, flags, _mm512_set1_epi8(static_cast<char>(sets[k].any)));
            if (sets[k].none)
                map = _mm512_mask_testn_epi8_mask(map, flags, _mm512_set1_epi8(static_cast<char>(sets[k].none)));
            window.maps[k][at / 64] = map;
        }
        auto equal = [&](char c) { return _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(c)); };
        window.newline[at / 64] = equal('\r') | equal('\n');
        window.blank[at / 64] = equal(' ');
        window.quote[at / 64] = equal('\'');
        window.slash[at / 64] = equal('/');
    }
    for (size_t k = 0; k < kMaxSets; k++) window.maps[k][(n + 63) / 64] = 0;
}

// Appends `base` plus the places of the bits; there is room for 64.
inline uint32_t* places(uint64_t bits, uint32_t base, uint32_t* to) {
    alignas(64) static constexpr uint8_t kOrder[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    alignas(64) uint8_t packed[64];
    _mm512_store_si512(packed, _mm512_maskz_compress_epi8(bits, _mm512_load_si512(kOrder)));
    __m512i first = _mm512_set1_epi32(static_cast<int>(base));
    auto put = [&](size_t k) {
        __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(packed + k));
        _mm512_storeu_si512(to + k, _mm512_add_epi32(first, _mm512_maskz_cvtepu8_epi32(0xFFFF, part)));
    };
    size_t count = static_cast<size_t>(std::popcount(bits));
    put(0);
    put(16);
    if (count > 32) {
        put(32);
        put(48);
    }
    return to + count;
}

}  // namespace fastformer::bpe::avx512::mapped

namespace fastformer::bpe::avx512 {

// The key of the n bytes at p; of more than fit, one that no entry has. No byte behind them is read.
inline ShortCache::Key short_key(const uint8_t* p, size_t n, size_t) {
    constexpr size_t kLast = ShortCache::Key::kBytes;
    __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(_bzhi_u32(0xFFFF, static_cast<uint32_t>(n))), p);
    bytes = _mm_mask_set1_epi8(bytes, __mmask16{1} << kLast, static_cast<char>(n <= kLast ? n : 255));
    ShortCache::Key key;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(&key), bytes);
    return key;
}

// The ids beside the key in a line of two entries, or null: one comparison for the line.
inline const uint32_t* probe(const ShortCache::Entry* line, const ShortCache::Key& key) {
    static_assert(sizeof *line == 32 && offsetof(ShortCache::Entry, ids) == 16);
    __m512i wanted = _mm512_maskz_broadcast_i32x4(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(&key)));
    uint32_t same = _mm512_cmpeq_epi64_mask(wanted, _mm512_loadu_si512(line));
    same &= same >> 1 & 0x11;  // both halves of the key, of the first or of the second entry
    if (!same) return nullptr;
    return reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint64_t*>(line) + std::countr_zero(same) + 2);
}

}  // namespace fastformer::bpe::avx512

#define FASTFORMER_ISA_PROBE
#include "bpe/isa/engine.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
