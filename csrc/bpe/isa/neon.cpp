// NEON: the flags of 16 ASCII bytes are two lookups in a 128-byte table.
#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>

#include "bpe/isa/isa.h"

#define FASTFORMER_ISA neon
#include "bpe/scan_mapped.h"

namespace fastformer::bpe::neon::mapped {

namespace {

// One bit for each of 64 bytes that are 0 or 255.
inline uint64_t bits_of(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t ab = vpaddq_u8(vandq_u8(a, bit), vandq_u8(b, bit));
    uint8x16_t cd = vpaddq_u8(vandq_u8(c, bit), vandq_u8(d, bit));
    ab = vpaddq_u8(ab, cd);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(ab, ab)), 0);
}

}  // namespace

template <Pattern pattern>
void classify(const Tables& tables, const uint8_t* p, size_t n, Window& window) {
    constexpr const Set* sets = kSets<pattern>;
    uint8x16x4_t low = vld1q_u8_x4(tables.low), high = vld1q_u8_x4(tables.low + 64);
    uint8_t tail[64];
    for (size_t at = 0; at < n; at += 64) {
        size_t left = n - at;
        const uint8_t* from = p + at;
        if (left < 64) {
            std::memset(tail, 0, 64);
            std::memcpy(tail, from, left);
            from = tail;
        }
        uint64_t valid = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
        uint8x16_t text[4], above[4];
        uint8_t fresh[64];
        for (int k = 0; k < 4; k++) {
            uint8x16_t bytes = text[k] = vld1q_u8(from + 16 * k);
            above[k] = vcgeq_u8(bytes, vdupq_n_u8(0x80));
            uint8x16_t flags = vqtbl4q_u8(low, bytes);
            vst1q_u8(fresh + 16 * k, vqtbx4q_u8(flags, high, vsubq_u8(bytes, vdupq_n_u8(64))));
        }
        uint64_t multi = bits_of(above[0], above[1], above[2], above[3]);
        auto equal = [&](uint8_t c) {
            uint8x16_t wanted = vdupq_n_u8(c);
            return bits_of(vceqq_u8(text[0], wanted), vceqq_u8(text[1], wanted), vceqq_u8(text[2], wanted),
                           vceqq_u8(text[3], wanted));
        };
        auto follows = [&](int k) { return vcltq_s8(vreinterpretq_s8_u8(text[k]), vdupq_n_s8(-64)); };
        window.tail[at / 64] = bits_of(follows(0), follows(1), follows(2), follows(3));
        window.newline[at / 64] = equal('\r') | equal('\n');
        window.blank[at / 64] = equal(' ');
        window.quote[at / 64] = equal('\'');
        window.slash[at / 64] = equal('/');
        // A character that began in the block before has left flags at the head of this one.
        uint64_t leading = static_cast<uint64_t>(std::countr_one(multi));
        for (size_t k = 0; k < leading && (from[k] & 0xC0) == 0x80; k++) fresh[k] = window.flags[at + k];
        std::memcpy(window.flags + at, fresh, 64);
        if (multi) classify_high<false>(tables, p, at, multi & ~window.tail[at / 64], window.flags);
        uint8x16_t flags[4];
        for (int k = 0; k < 4; k++) flags[k] = vld1q_u8(window.flags + at + 16 * k);
        auto any_of = [&](uint8_t set) {
            uint8x16_t mask = vdupq_n_u8(set);
            return bits_of(vtstq_u8(flags[0], mask), vtstq_u8(flags[1], mask), vtstq_u8(flags[2], mask),
                           vtstq_u8(flags[3], mask));
        };
        for (size_t k = 0; k < kMaxSets; k++) {
            uint64_t map = valid;
            if (sets[k].any) map &= any_of(sets[k].any);
            if (sets[k].none) map &= ~any_of(sets[k].none);
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

}  // namespace fastformer::bpe::neon::mapped

#include "bpe/isa/engine.h"
#endif
