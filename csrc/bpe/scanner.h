// Pre-tokenizers: where one pretoken ends and the next begins.
//
// Each pattern is a hand-written equivalent of one published regular expression. The scalar scanner is the oracle; the
// vectorised ones must give the same boundaries on every valid UTF-8 input.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastformer::bpe {

enum class Pattern : int {
    kGpt2 = 0,
    kCl100k = 1,
    kO200k = 2,
    kLlama3 = 3,
    kQwen2 = 4,
    kDeepseek = 5,
    kWhole = 6,  // no splitting: the text is one pretoken
    kCount = 7,
};

enum class Isa : int { kScalar = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3 };

// The best instruction set that this build and this machine have.
Isa best_isa();
bool has_isa(Isa isa);

struct Scanner {
    // Appends the ends of the pretokens from `pos` on, as offsets from `text`, at most `capacity` of them; returns how
    // many, and moves `pos` to the last of them. `text[0, n)` is valid UTF-8, `pos` a pretoken boundary, n < 2^32.
    using Function = size_t (*)(const uint8_t* text, size_t n, size_t& pos, uint32_t* ends, size_t capacity);
    static Function get(Pattern pattern, Isa isa);
};

}  // namespace fastformer::bpe
