// The .tiktoken format: one token a line, base64 and its rank.
#pragma once
#include <cstdint>
#include <vector>

#include "bpe/vocab.h"

namespace fastformer::bpe {

struct Ranks {
    std::vector<uint8_t> bytes;  // of all tokens
    std::vector<Span> tokens;    // in `bytes`
    std::vector<uint32_t> ids;
};

// Throws std::invalid_argument with the number of the line that is wrong and what is wrong with it.
Ranks read_ranks(const uint8_t* data, size_t n);

}  // namespace fastformer::bpe
