// The patterns, one function each, over any reader of text. With Text, which looks at one character after another, they
// are the scalar scanner; scan_mapped.h gives them a reader that has classified a window of text before. Compiled for
// each instruction set (isa/isa.h).
#pragma once
#include <type_traits>

#include "bpe/scanner.h"
#include "bpe/unicode.h"

namespace fastformer::bpe::FASTFORMER_ISA::scalar {

using namespace unicode;

struct Text {
    const uint8_t* p;
    size_t n;
    const Tables& t;

    // Flags of the character at i, and its length.
    uint8_t at(size_t i, size_t& length) const {
        uint8_t a = p[i];
        if (a < 0x80) {
            length = 1;
            return t.low[a];
        }
        Char c = decode(p + i);
        length = c.length;
        return flags_of(t, c.point);
    }
    // End of the run of characters with any flag of `any` and none of `none`, from i on; at most `limit` characters.
    template <uint8_t any, uint8_t none = 0>
    size_t run(size_t i, size_t limit = ~size_t{0}) const {
        size_t length;
        while (i < n && limit--) {
            uint8_t f = at(i, length);
            if ((f & none) || (any && !(f & any))) break;
            i += length;
        }
        return i;
    }
    // End of a run of ASCII bytes from `set`.
    template <typename Set>
    size_t bytes(size_t i, Set set) const {
        while (i < n && set(p[i])) i++;
        return i;
    }
};

inline uint8_t lower(uint8_t c) { return c >= 'A' && c <= 'Z' ? c | 32 : c; }

// Length of 's 't 're 've 'm 'll 'd at i, or 0. Under (?i) the long s (U+017F) folds to s, as both references have it.
template <bool ignore_case, typename X>
size_t contraction(const X& x, size_t i) {
    if (i + 1 >= x.n || x.p[i] != '\'') return 0;
    uint8_t a = ignore_case ? lower(x.p[i + 1]) : x.p[i + 1];
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if (i + 2 >= x.n) return 0;
    uint8_t b = ignore_case ? lower(x.p[i + 2]) : x.p[i + 2];
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    if (ignore_case && a == 0xC5 && b == 0xBF) return 3;
    return 0;
}

// \s+(?!\S)|\s+ : all but the last character of a run that something follows, unless that would be nothing.
template <typename X>
size_t white_space(const X& x, size_t i) {
    size_t end = x.template run<kSpace>(i);
    if (end == x.n) return end;
    size_t last = end - 1;
    while ((x.p[last] & 0xC0) == 0x80) last--;
    return last > i ? last : end;
}

// \s*[\r\n]+|\s+(?!\S)|\s+ ; with `end_first`, \s+$ is tried before all of them. `stop`: where the pattern sees the end
// of the text.
template <bool end_first, typename X>
size_t white_space_lines(const X& x, size_t i, size_t end, size_t stop) {
    if (end_first && end == stop) return end;
    for (size_t j = end; j > i; j--)
        if (x.p[j - 1] == '\n' || x.p[j - 1] == '\r') return j;
    if (end == stop) return end;
    size_t last = end - 1;
    while ((x.p[last] & 0xC0) == 0x80) last--;
    return last > i ? last : end;
}

template <typename X>
size_t gpt2(const X& x, size_t i) {
    if (size_t k = contraction<false>(x, i)) return i + k;
    size_t length;
    size_t j = x.p[i] == ' ' && i + 1 < x.n ? i + 1 : i;
    uint8_t f = x.at(j, length);
    if (f & kLetter) return x.template run<kLetter>(j + length);
    if (f & kNumber) return x.template run<kNumber>(j + length);
    if (!(f & kSpace)) return x.template run<0, kSpace | kLetter | kNumber>(j + length);
    return white_space(x, i);
}

// cl100k, Llama 3 and Qwen 2 differ in how many digits make a piece and in white space at the end of the text.
template <size_t digits, bool end_first, typename X>
size_t cl100k(const X& x, size_t i) {
    if (size_t k = contraction<true>(x, i)) return i + k;
    size_t length, next_length;
    uint8_t f = x.at(i, length);
    if (f & kLetter) return x.template run<kLetter>(i + length);
    if (f & kNumber) return x.template run<kNumber>(i + length, digits - 1);
    size_t j = i + length;
    if (!(f & kNewline) && j < x.n && (x.at(j, next_length) & kLetter)) return x.template run<kLetter>(j + next_length);
    if (x.p[i] == ' ' && j < x.n) {
        uint8_t g = x.at(j, next_length);
        if (!(g & (kSpace | kLetter | kNumber))) {
            j = x.template run<0, kSpace | kLetter | kNumber>(j + next_length);
            return x.bytes(j, [](uint8_t c) { return c == '\r' || c == '\n'; });
        }
    }
    if (!(f & kSpace)) {
        j = x.template run<0, kSpace | kLetter | kNumber>(j);
        return x.bytes(j, [](uint8_t c) { return c == '\r' || c == '\n'; });
    }
    return white_space_lines<end_first>(x, i, x.template run<kSpace>(i), x.n);
}

// The word alternatives of o200k from i, without the optional first character: [upper other]*[lower other]+, else
// [upper other]+[lower other]*. Returns 0 where neither matches; `second` asks for the second form.
template <typename X>
size_t o200k_word(const X& x, size_t i, bool second) {
    size_t j = x.template run<kLetter | kMark, kLower>(i);
    if (second) return j > i ? j : 0;
    size_t end = x.template run<kLetter | kMark, kUpper>(j);
    if (end > j) return end;
    // Nothing lower after the upper run: the run gives characters back until one that is in both sets ends the word.
    while (j > i) {
        size_t last = j - 1, length;
        while ((x.p[last] & 0xC0) == 0x80) last--;
        if (!(x.at(last, length) & kUpper)) return j;
        j = last;
    }
    return 0;
}

template <typename X>
size_t o200k(const X& x, size_t i) {
    size_t length;
    uint8_t f = x.at(i, length);
    bool prefix = !(f & (kNewline | kLetter | kNumber));
    for (int form = 0; form < 2; form++) {
        bool second = form == 1;
        size_t end = prefix ? o200k_word(x, i + length, second) : 0;
        if (!end && (f & (kLetter | kMark))) end = o200k_word(x, i, second);
        if (end) return end + contraction<true>(x, end);
    }
    if (f & kNumber) return x.template run<kNumber>(i + length, 2);
    size_t j = x.p[i] == ' ' ? i + 1 : i, next_length;
    if (j < x.n && !(x.at(j, next_length) & (kSpace | kLetter | kNumber))) {
        j = x.template run<0, kSpace | kLetter | kNumber>(j + next_length);
        return x.bytes(j, [](uint8_t c) { return c == '\r' || c == '\n' || c == '/'; });
    }
    return white_space_lines<false>(x, i, x.template run<kSpace>(i), x.n);
}

// DeepSeek splits numbers off first, then runs of its CJK range, then cuts every segment that is left, the CJK ones
// too, by a third expression, which sees a segment's end as the end of the text. Its tables (deepseek_tables) mark the
// CJK range with kUpper, which the expressions do not ask for. 0: no alternative matches at i.
template <bool cjk, typename X>
size_t deepseek_word(const X& x, size_t i) {
    auto letter = [](uint8_t c) { return static_cast<uint8_t>((c | 32) - 'a') < 26; };
    auto here = [&](size_t j, uint8_t any) {
        size_t length;
        if (j >= x.n) return false;
        uint8_t g = x.at(j, length);
        return (g & any) && cjk == static_cast<bool>(g & kUpper);
    };
    auto run = [&](size_t j, auto any) {
        constexpr uint8_t flags = decltype(any)::value;
        if constexpr (!cjk) return x.template run<flags, kUpper>(j);
        for (size_t length; here(j, flags); j += length) x.at(j, length);
        return j;
    };
    using LetterMark = std::integral_constant<uint8_t, kLetter | kMark>;
    using Punctuation = std::integral_constant<uint8_t, kPunctSymbol>;
    size_t length;
    uint8_t f = x.at(i, length);
    size_t j = i + length;
    if (length == 1 && (f & kPunctSymbol) && j < x.n && letter(x.p[j])) return x.bytes(j, letter);
    if (!(f & (kNewline | kPunctSymbol | kLetter)) && here(j, kLetter | kMark)) return run(j, LetterMark{});
    if (f & (kLetter | kMark)) return run(j, LetterMark{});
    size_t k = x.p[i] == ' ' ? j : i;
    if (here(k, kPunctSymbol)) {
        k = run(k, Punctuation{});
        return cjk ? k : x.bytes(k, [](uint8_t c) { return c == '\r' || c == '\n'; });
    }
    if (!(f & kSpace)) return 0;
    size_t end = x.template run<kSpace>(i);
    bool ends = end < x.n && (x.at(end, length) & (kNumber | kUpper));
    return white_space_lines<false>(x, i, end, ends ? end : x.n);
}

template <typename X>
size_t deepseek(const X& x, size_t i) {
    size_t length;
    uint8_t f = x.at(i, length);
    if (f & kNumber) return x.template run<kNumber>(i + length, 2);
    bool cjk = f & kUpper;
    // What no alternative matches stays together up to the next match or the end of the segment.
    for (size_t j = i; j < x.n; j += length) {
        f = x.at(j, length);
        if ((f & kNumber) || cjk != static_cast<bool>(f & kUpper)) return j;
        size_t end = cjk ? deepseek_word<true>(x, j) : deepseek_word<false>(x, j);
        if (end) return j == i ? end : j;
    }
    return x.n;
}

template <Pattern pattern, typename X>
size_t next(const X& x, size_t i) {
    if constexpr (pattern == Pattern::kGpt2) return gpt2(x, i);
    if constexpr (pattern == Pattern::kCl100k) return cl100k<3, true>(x, i);
    if constexpr (pattern == Pattern::kLlama3) return cl100k<3, false>(x, i);
    if constexpr (pattern == Pattern::kQwen2) return cl100k<1, false>(x, i);
    if constexpr (pattern == Pattern::kO200k) return o200k(x, i);
    if constexpr (pattern == Pattern::kDeepseek) return deepseek(x, i);
    return x.n;
}

template <Pattern pattern>
size_t scan(const uint8_t* text, size_t n, size_t& pos, uint32_t* ends, size_t capacity) {
    Text x{text, n, pattern == Pattern::kDeepseek ? deepseek_tables() : tables()};
    size_t i = pos, count = 0;
    while (i < n && count < capacity) {
        i = next<pattern>(x, i);
        ends[count++] = static_cast<uint32_t>(i);
    }
    pos = i;
    return count;
}

}  // namespace fastformer::bpe::FASTFORMER_ISA::scalar
