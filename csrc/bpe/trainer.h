// Learning merges. The result is that of Hugging Face's BpeTrainer over the ByteLevel alphabet, merge for merge:
// the most frequent pair first, of equals the one with the smaller ids.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe/scanner.h"

namespace fastformer::bpe {

// Distinct pretokens and how often each was seen.
class WordCounts {
  public:
    WordCounts();
    void add(const uint8_t* p, size_t n, int64_t count);
    void add_text(Pattern pattern, Isa isa, const uint8_t* text, size_t n);
    void merge(const WordCounts& other);
    size_t size() const { return words_.size(); }
    std::string_view word(size_t i) const { return {arena_.data() + words_[i].offset, words_[i].length}; }
    int64_t count(size_t i) const { return words_[i].count; }

  private:
    struct Word {
        size_t offset;
        uint32_t length;
        int64_t count;
    };
    void rehash(size_t capacity);
    std::string arena_;
    std::vector<Word> words_;
    std::vector<uint64_t> index_;  // high half of the hash << 32 | word
    std::vector<uint32_t> ends_;
};

struct TrainOptions {
    size_t vocab_size;
    int64_t min_frequency;
    size_t max_token_length;  // in bytes
    // What the special tokens are as byte strings, by id from 0 on; empty where a merge can never spell them.
    std::vector<std::string> specials;
};

struct TrainResult {
    struct Merge {
        uint32_t left, right, merged;
    };
    std::vector<std::string> tokens;  // by id: specials, the 256 bytes in ByteLevel order, merges
    std::vector<Merge> merges;
};

// `progress(done)` is called now and then with the size of the vocabulary; false stops the training.
TrainResult train(const WordCounts& words, const TrainOptions& options, const std::function<bool(size_t)>& progress);

}  // namespace fastformer::bpe
