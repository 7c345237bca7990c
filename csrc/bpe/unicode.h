// Character classes for the pre-tokenizers, one byte of flags a code point.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastformer::unicode {

enum Flag : uint8_t {
    kLetter = 1,       // \p{L}
    kNumber = 2,       // \p{N}
    kSpace = 4,        // \s, the White_Space property
    kMark = 8,         // \p{M}
    kUpper = 16,       // \p{Lu} \p{Lt}
    kLower = 32,       // \p{Ll}
    kPunctSymbol = 64, // \p{P} \p{S}
    kNewline = 128,    // CR, LF
};

struct Tables {
    uint8_t low[0x10000];     // the Basic Multilingual Plane, direct
    uint8_t high_index[4096]; // blocks of 256 code points above it
    uint8_t high[128][256];
    Tables();
};

const Tables& tables();

// The same, but for DeepSeek's pre-tokenizer: kUpper marks U+4E00–9FA5 and U+3040–30FF, kLower nothing.
const Tables& deepseek_tables();

inline uint8_t flags_of(const Tables& t, uint32_t point) {
    return point < 0x10000 ? t.low[point] : t.high[t.high_index[(point >> 8) - 256]][point & 255];
}

// One decoded character. The input must be valid UTF-8.
struct Char {
    uint32_t point;
    uint32_t length;
};

inline Char decode(const uint8_t* p) {
    uint32_t a = p[0];
    if (a < 0x80) return {a, 1};
    if (a < 0xE0) return {(a & 31) << 6 | (p[1] & 63u), 2};
    if (a < 0xF0) return {(a & 15) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u), 3};
    return {(a & 7) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u), 4};
}

// Length of the longest prefix that is valid UTF-8 (n when all of it is).
size_t valid_utf8_prefix(const uint8_t* p, size_t n);

}  // namespace fastformer::unicode
