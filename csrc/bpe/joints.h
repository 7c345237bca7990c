// Between which characters of three bytes a merge can reach at all. Long runs of Chinese, Japanese or Korean are one
// pretoken, yet few neighbours among their characters stand side by side in any token; where none has them, the
// pretoken may be cut and its parts encoded each for itself, since every merge across the cut would make a token that
// holds both sides of it.
#pragma once
#include <cstdint>
#include <vector>

#include "bpe/vocab.h"

namespace fastformer::bpe {

class Joints {
  public:
    explicit Joints(const Vocab& vocab);

    // Whether some token holds the end of `left` and the beginning of `right`, code points of three bytes each. May
    // say so of neighbours that none holds.
    bool joined(uint32_t left, uint32_t right) const {
        // Both are looked at, since nobody can predict what the first will say.
        uint64_t h = pair_hash(left, right);
        uint32_t part = part_of(left, right);
        return (pairs_[h >> 6] >> (h & 63) | parts_[part >> 6] >> (part & 63)) & 1;
    }

  private:
    static constexpr int kPairBits = 19;
    static uint64_t pair_hash(uint32_t left, uint32_t right) {
        return (uint64_t{left} << 16 | right) * 0x9E3779B97F4A7C15u >> (64 - kPairBits);
    }
    // The last byte of the one, the first two of the other: what tokens know that hold a character in part.
    static uint32_t part_of(uint32_t left, uint32_t right) { return (left & 63) << 10 | right >> 6; }

    std::vector<uint64_t> pairs_, parts_;
};

}  // namespace fastformer::bpe
