// Scanning with the help of SIMD: a window of text is classified first, 64 bytes at a time, into one byte of flags per
// byte of text and one bit map per set of characters that the pattern runs over. The patterns of scan_scalar.h then
// find the ends of runs in the maps. What reaches past the window is read as the scalar scanner reads it.
#pragma once
#include <bit>
#include <cstring>

#include "bpe/scan_scalar.h"

namespace fastformer::bpe::FASTFORMER_ISA::mapped {

using namespace unicode;

// A set of characters: those with any flag of `any` (all, if 0) and none of `none`.
struct Set {
    uint8_t any, none;
    constexpr bool operator==(const Set&) const = default;
};

inline constexpr size_t kWindow = 8192;
inline constexpr size_t kWords = kWindow / 64;
inline constexpr size_t kMaxSets = 4;

struct Window {
    size_t base = 0, end = 0;  // text[base, end) is classified
    uint8_t flags[kWindow + 64];
    uint64_t maps[kMaxSets][kWords + 1];  // one zero word behind the last
    // Single bytes: those that begin no character, CR and LF, ' ', the apostrophe, '/'.
    uint64_t tail[kWords], newline[kWords], blank[kWords], quote[kWords], slash[kWords];
};

// The flags of the characters whose first bytes are those of `leads` among the 64 at `at`, none of them ASCII. With
// `spill` up to three bytes behind a character are written too, for the caller to write after it.
template <bool spill>
void classify_high(const Tables& tables, const uint8_t* p, size_t at, uint64_t leads, uint8_t* flags) {
    for (; leads; leads &= leads - 1) {
        size_t i = at + static_cast<size_t>(std::countr_zero(leads));
        Char c = decode(p + i);
        uint32_t f = flags_of(tables, c.point) * 0x01010101u;
        std::memcpy(flags + i, &f, spill ? 4 : c.length);
    }
}

template <Pattern pattern>
constexpr Set kSets[kMaxSets] = {{kLetter, 0}, {0, kSpace | kLetter | kNumber}, {kSpace, 0}, {kNumber, 0}};
template <>
inline constexpr Set kSets<Pattern::kO200k>[kMaxSets] = {
    {kLetter | kMark, kLower}, {kLetter | kMark, kUpper}, {0, kSpace | kLetter | kNumber}, {kSpace, 0}};
template <>
inline constexpr Set kSets<Pattern::kDeepseek>[kMaxSets] = {
    {kLetter | kMark, kUpper}, {kPunctSymbol, kUpper}, {kSpace, 0}, {kNumber, 0}};

template <Pattern pattern>
struct Reader : scalar::Text {
    const Window& w;

    uint8_t at(size_t i, size_t& length) const {
        if (i >= w.end) return scalar::Text::at(i, length);
        uint8_t a = p[i];
        length = a < 0x80 ? 1 : a < 0xE0 ? 2 : a < 0xF0 ? 3 : 4;
        return w.flags[i - w.base];
    }
    template <uint8_t any, uint8_t none = 0>
    size_t run(size_t i) const {
        constexpr size_t set = [] {
            size_t k = 0;
            while (!(kSets<pattern>[k] == Set{any, none})) k++;
            return k;
        }();
        if (i < w.end) {
            const uint64_t* map = w.maps[set];
            size_t r = i - w.base, word = r >> 6;
            uint64_t zeros = ~map[word] >> (r & 63);
            if (zeros) {
                r += static_cast<size_t>(std::countr_zero(zeros));
            } else {
                while (map[++word] == ~uint64_t{0}) {}
                r = word << 6 | static_cast<size_t>(std::countr_zero(~map[word]));
            }
            i = w.base + r;
            if (i < w.end) return i;
        }
        return scalar::Text::run<any, none>(i);
    }
    // At most `limit` characters: short, so one after the other.
    template <uint8_t any>
    size_t run(size_t i, size_t limit) const {
        size_t length;
        while (i < n && limit-- && (at(i, length) & any)) i += length;
        return i;
    }
};

}  // namespace fastformer::bpe::FASTFORMER_ISA::mapped
