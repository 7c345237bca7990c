// AVX-512 (BW, VBMI, VBMI2): the flags of 64 ASCII bytes are one permutation of a 128-byte table, a map is one test.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "bpe/isa/isa.h"

#define FASTFORMER_ISA avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,aes,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,aes,bmi,bmi2,popcnt")
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

// Two rounds of AES: every bit of the key reaches every bit of the hash.
struct ShortHash {
    static uint64_t of(const ShortKey& key) {
        const __m128i round = _mm_set_epi64x(0x243F6A8885A308D3, 0x13198A2E03707344);
        __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&key));
        h = _mm_aesenc_si128(_mm_aesenc_si128(h, round), round);
        return static_cast<uint64_t>(_mm_cvtsi128_si64(h));
    }
};

// The key of the n bytes at p; of more than fit, one that no entry has. No byte behind them is read.
inline ShortKey short_key(const uint8_t* p, size_t n, size_t) {
    auto mask = static_cast<__mmask16>(_bzhi_u32(0xFFFF, static_cast<uint32_t>(std::min<size_t>(n, 16))));
    ShortKey key;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(&key), _mm_mask_loadu_epi8(_mm_set1_epi8(-1), mask, p));
    return key;
}

// The ids beside the key in a line, or null: one comparison for both keys.
inline const uint32_t* probe(const ShortLine* line, const ShortKey& key) {
    static_assert(offsetof(ShortLine, ids) == 32);
    // Where the ids are by which halves of the keys are the same; 0: neither key.
    alignas(16) static constexpr uint8_t kIds[16] = {0, 0, 0, 32, 0, 0, 0, 32, 0, 0, 0, 32, 48, 48, 48, 32};
    __m256i wanted = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&key)));
    __m256i keys = _mm256_load_si256(reinterpret_cast<const __m256i*>(line));
    size_t at = kIds[_mm256_cmpeq_epi64_mask(wanted, keys)];
    return at ? reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(line) + at) : nullptr;
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
