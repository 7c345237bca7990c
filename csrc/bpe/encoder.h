// Text to ids. One Encoder serves one thread at a time; it owns the caches.
#pragma once
#include <memory>

#include "bpe/buffer.h"
#include "bpe/scanner.h"
#include "bpe/vocab.h"

namespace fastformer::bpe {

class Encoder {
  public:
    // Compiled for the instruction set.
    static std::unique_ptr<Encoder> make(const Vocab& vocab, Isa isa);
    virtual ~Encoder() = default;

    // Appends the ids of text[0, n), which is valid UTF-8 of less than 4 GB.
    void encode(Pattern pattern, const uint8_t* text, size_t n, IdBuffer& out) {
        encode_prefix(pattern, text, n, n, out);
    }
    // Appends the ids of the pretokens of text[0, n) that begin before `stop`, which is a pretoken boundary.
    virtual void encode_prefix(Pattern pattern, const uint8_t* text, size_t n, size_t stop, IdBuffer& out) = 0;
    // Appends the ids of the pieces of text that end at `ends[0, count)`, the first of which begins at `start`.
    virtual void encode_pieces(const uint8_t* text, size_t n, const uint32_t* ends, size_t count, size_t start,
                               IdBuffer& out) = 0;
    // Appends the ids of all the texts, which are valid UTF-8, and to `counts` how many each has.
    virtual void encode_many(Pattern pattern, const Span* texts, size_t count, IdBuffer& out, IdBuffer& counts) = 0;
    // Appends the ids of one pretoken of any bytes; returns how many.
    virtual size_t encode_piece(const uint8_t* p, size_t n, IdBuffer& out) = 0;

    // A buffer for the caller's use, so that short calls need not allocate one.
    IdBuffer& scratch() {
        scratch_.resize(0);
        return scratch_;
    }

  private:
    IdBuffer scratch_;
};

}  // namespace fastformer::bpe
