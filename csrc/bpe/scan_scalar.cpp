#include "bpe/scan_scalar.h"

namespace fastformer::bpe {

namespace {

template <Pattern pattern>
size_t scan(const uint8_t* text, size_t n, size_t& pos, uint32_t* ends, size_t capacity) {
    scalar::Text x{text, n, pattern == Pattern::kDeepseek ? unicode::deepseek_tables() : unicode::tables()};
    size_t i = pos, count = 0;
    while (i < n && count < capacity) {
        i = scalar::next<pattern>(x, i);
        ends[count++] = static_cast<uint32_t>(i);
    }
    pos = i;
    return count;
}

}  // namespace

Isa best_isa() { return Isa::kScalar; }

Scanner::Function Scanner::get(Pattern pattern, Isa) {
    switch (pattern) {
        case Pattern::kGpt2: return scan<Pattern::kGpt2>;
        case Pattern::kCl100k: return scan<Pattern::kCl100k>;
        case Pattern::kO200k: return scan<Pattern::kO200k>;
        case Pattern::kLlama3: return scan<Pattern::kLlama3>;
        case Pattern::kQwen2: return scan<Pattern::kQwen2>;
        case Pattern::kDeepseek: return scan<Pattern::kDeepseek>;
        default: return scan<Pattern::kWhole>;
    }
}

}  // namespace fastformer::bpe
