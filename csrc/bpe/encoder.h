// Text to ids. One Encoder serves one thread at a time; it owns the caches.
#pragma once
#include "bpe/buffer.h"
#include "bpe/cache.h"
#include "bpe/scanner.h"
#include "bpe/vocab.h"

namespace fastformer::bpe {

class Encoder {
  public:
    Encoder(const Vocab& vocab, Isa isa);
    ~Encoder();

    // Appends the ids of text[0, n), which is valid UTF-8 of less than 4 GB.
    void encode(Pattern pattern, const uint8_t* text, size_t n, IdBuffer& out) {
        encode_prefix(pattern, text, n, n, out);
    }
    // Appends the ids of the pretokens of text[0, n) that begin before `stop`, which is a pretoken boundary.
    void encode_prefix(Pattern pattern, const uint8_t* text, size_t n, size_t stop, IdBuffer& out);
    // Appends the ids of the pretokens of text that end at `ends[0, count)`, the first of which begins at `start`.
    void encode_pieces(const uint8_t* text, size_t n, const uint32_t* ends, size_t count, size_t start, IdBuffer& out);
    // Appends the ids of all the texts, which are valid UTF-8, and to `counts` how many each has.
    void encode_many(Pattern pattern, const Span* texts, size_t count, IdBuffer& out, IdBuffer& counts);
    // A buffer for the caller's use, so that short calls need not allocate one.
    IdBuffer& scratch() {
        scratch_.resize(0);
        return scratch_;
    }
    // Appends the ids of one pretoken of any bytes; returns how many.
    size_t encode_piece(const uint8_t* p, size_t n, IdBuffer& out);

  private:
    // What a batch of pretokens becomes: up to four ids, their count less one in the top bits of the first, or
    // kElsewhere there, then the place and the number of ids in `spill_`.
    struct Slot {
        uint32_t ids[ShortCache::kIds];
    };
    struct Batch;
    struct Marks;

    void seed();
    void trim();
    size_t next_cut(const uint8_t* text, size_t at, size_t end) const;
    size_t gather(Batch& batch, const uint8_t* text, size_t n, const uint32_t* ends, size_t count, size_t start);
    void find(Batch& batch, const uint8_t* text, size_t n);
    void merge_missed(Batch& batch, const uint8_t* text, size_t n);
    void finish(Batch& batch, size_t i, const uint8_t* text, size_t n, const uint32_t* ids, size_t count);
    void spill(Slot& slot, const uint32_t* ids, size_t count);
    void emit(const Batch& batch, IdBuffer& out, Marks* marks);
    size_t longest_match(const uint8_t* p, size_t n, uint32_t* to);
    bool valid_pair(uint32_t left, uint32_t right);

    const Vocab& vocab_;
    Isa isa_;
    ShortCache short_;
    MiddleCache middle_;
    LongCache long_;
    std::unique_ptr<Batch> batch_;
    IdBuffer spill_, whole_, scratch_;
    std::vector<uint8_t> joined_;  // short texts side by side
    std::vector<uint32_t> ends_, parts_;
    std::vector<uint64_t> open_;   // bit i: an encoding of the rest from i on may still exist
    std::vector<uint64_t> valid_;  // left << 22 | right << 1 | whether the two may stand side by side
};

}  // namespace fastformer::bpe
