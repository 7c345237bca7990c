// AVX2: a 16-byte shuffle for each high nibble that ASCII has.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "bpe/isa/isa.h"

#define FASTFORMER_ISA avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif
#include "bpe/scan_mapped.h"

namespace fastformer::bpe::avx2::mapped {

namespace {

inline __m256i ascii_flags(const Tables& tables, __m256i bytes) {
    // Bytes above ASCII have bit 7 set, for which a shuffle gives 0.
    __m256i row = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(7));
    __m256i out = _mm256_setzero_si256();
    for (int k = 0; k < 8; k++) {
        __m256i table = _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(tables.low + 16 * k)));
        __m256i here = _mm256_cmpeq_epi8(row, _mm256_set1_epi8(static_cast<char>(k)));
        // The index of a shuffle is the low nibble and bit 7.
        out = _mm256_or_si256(out, _mm256_and_si256(here, _mm256_shuffle_epi8(table, bytes)));
    }
    return out;
}

inline uint32_t none_of(__m256i flags, uint8_t bits) {
    __m256i found = _mm256_and_si256(flags, _mm256_set1_epi8(static_cast<char>(bits)));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(found, _mm256_setzero_si256())));
}

struct SingleBytes {
    uint64_t tail, newline, blank, quote, slash;
};

inline uint64_t equal(__m256i bytes, char c) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(c))));
}

inline void find_single(__m256i bytes, int shift, SingleBytes& to) {
    __m256i tail = _mm256_cmpgt_epi8(_mm256_set1_epi8(-64), bytes);
    to.tail |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(tail))) << shift;
    to.newline |= (equal(bytes, '\r') | equal(bytes, '\n')) << shift;
    to.blank |= equal(bytes, ' ') << shift;
    to.quote |= equal(bytes, '\'') << shift;
    to.slash |= equal(bytes, '/') << shift;
}

}  // namespace

template <Pattern pattern>
void classify(const Tables& tables, const uint8_t* p, size_t n, Window& window) {
    constexpr const Set* sets = kSets<pattern>;
    alignas(32) uint8_t tail[64];
    for (size_t at = 0; at < n; at += 64) {
        size_t left = n - at;
        const uint8_t* from = p + at;
        if (left < 64) {
            std::memset(tail, 0, 64);
            std::memcpy(tail, from, left);
            from = tail;
        }
        uint64_t valid = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1, multi = 0;
        SingleBytes single{};
        alignas(32) uint8_t fresh[64];
        for (int h = 0; h < 2; h++) {
            __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * h));
            multi |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes))) << (32 * h);
            _mm256_store_si256(reinterpret_cast<__m256i*>(fresh + 32 * h), ascii_flags(tables, bytes));
            find_single(bytes, 32 * h, single);
        }
        window.tail[at / 64] = single.tail;
        window.newline[at / 64] = single.newline;
        window.blank[at / 64] = single.blank;
        window.quote[at / 64] = single.quote;
        window.slash[at / 64] = single.slash;
        // A character that began in the block before has left flags at the head of this one.
        uint64_t leading = static_cast<uint64_t>(std::countr_one(multi));
        for (size_t k = 0; k < leading && (from[k] & 0xC0) == 0x80; k++) fresh[k] = window.flags[at + k];
        std::memcpy(window.flags + at, fresh, 64);
        if (multi) classify_high<false>(tables, p, at, multi & ~single.tail, window.flags);
        __m256i flags[2];
        for (int h = 0; h < 2; h++)
            flags[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window.flags + at + 32 * h));
        for (size_t k = 0; k < kMaxSets; k++) {
            uint64_t map = valid;
            if (sets[k].none)
                map &= none_of(flags[0], sets[k].none) | static_cast<uint64_t>(none_of(flags[1], sets[k].none)) << 32;
            if (sets[k].any)
                map &= ~(none_of(flags[0], sets[k].any) | static_cast<uint64_t>(none_of(flags[1], sets[k].any)) << 32);
            window.maps[k][at / 64] = map;
        }
    }
    for (size_t k = 0; k < kMaxSets; k++) window.maps[k][(n + 63) / 64] = 0;
}

// Appends `base` plus the places of the bits; there is room for 64. Eight at a time: how many there are nobody can
// predict.
inline uint32_t* places(uint64_t bits, uint32_t base, uint32_t* to) {
    size_t count = static_cast<size_t>(std::popcount(bits));
    for (size_t k = 0; k < count; k += 8)
        for (size_t j = k; j < k + 8; j++, bits &= bits - 1) to[j] = base + static_cast<uint32_t>(std::countr_zero(bits));
    return to + count;
}

}  // namespace fastformer::bpe::avx2::mapped

#include "bpe/isa/engine.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
