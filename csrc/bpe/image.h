// A vocabulary as one block of bytes, so that the next process need not build it: little-endian, with a version, sizes
// and a checksum, all of them checked on reading.
#pragma once
#include <cstdint>
#include <vector>

#include "bpe/vocab.h"

namespace fastformer::bpe {

std::vector<uint8_t> write_image(const Vocab& vocab);

// Fills an empty vocabulary. Throws std::invalid_argument for what is damaged, cut off or of another version.
void read_image(Vocab& vocab, const uint8_t* data, size_t n);

}  // namespace fastformer::bpe
