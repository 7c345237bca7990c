// A byte-level BPE vocabulary, prepared for encoding.
//
// Tokens carry two numbers. The external id is what the user sees. The internal number orders tokens by merge rank
// (the 256 bytes first), so that a pair table from two numbers to one is all that merging needs: the merged token is
// its own rank. One pair a token suffices: a merge that makes token t within a text happens undisturbed by t's
// neighbours, hence as it does when the bytes of t stand alone, and there the last two parts are always the same.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "bpe/memory.h"

namespace fastformer::bpe {

inline constexpr uint32_t kNone = 0xFFFFFFFF;
inline constexpr uint32_t kMaxTokens = 1u << 21;    // internal numbers fit 21 bits, three of them one word
inline constexpr uint32_t kMaxId = (1u << 28) - 1;  // external ids leave four bits free in a cache entry

struct Span {
    const uint8_t* data;
    size_t size;
};

class Joints;

class PairTable {
  public:
    void reserve(size_t count);
    void insert(uint32_t left, uint32_t right, uint32_t merged);
    uint32_t find(uint32_t left, uint32_t right) const {
        uint64_t key = static_cast<uint64_t>(left) << 21 | right;
        // Most pairs do not merge; a bit map eight times the table's length says so of nine in ten without touching it.
        uint64_t bit = (key * kHash) >> (shift_ - 3);
        if (!(filter_[bit >> 6] >> (bit & 63) & 1)) return kNone;
        for (size_t i = slot(key);; i = (i + 1) & mask_) {
            uint64_t entry = slots_[i];
            if (entry >> 21 == key) return static_cast<uint32_t>(entry & (kMaxTokens - 1));
            if (entry == kEmpty) return kNone;
        }
    }
    // The same for two bytes.
    uint32_t of_bytes(uint8_t left, uint8_t right) const { return of_bytes_[left << 8 | right]; }
    void prefetch(uint32_t left, uint32_t right) const {
        uint64_t h = (static_cast<uint64_t>(left) << 21 | right) * kHash;
        fetch(&filter_[h >> (shift_ - 3) >> 6]);
        fetch(&slots_[h >> shift_]);
    }

  private:
    friend struct Image;
    // Takes over `slots_` and `filter_` as they are.
    void adopt();
    static constexpr uint64_t kEmpty = ~uint64_t{0};
    static constexpr uint64_t kHash = 0x9E3779B97F4A7C15u;
    size_t slot(uint64_t key) const { return (key * kHash) >> shift_; }
    Table<uint64_t> slots_, filter_;
    Table<uint32_t> of_bytes_;
    size_t mask_ = 0;
    int shift_ = 63;
};

class Vocab {
  public:
    // One merge of a Hugging Face model: indices into the token list; its position in the list is its rank.
    struct Merge {
        uint32_t left, right, merged;
    };
    Vocab() = default;
    Vocab(const Vocab&) = delete;
    Vocab& operator=(const Vocab&) = delete;

    // `ids[i]` is the external id of `tokens[i]`. Without merges (tiktoken) the id is the rank and any two tokens
    // whose concatenation is a token merge. `whole_piece`: a pretoken that is a token is that token, merges or not.
    // Throws std::invalid_argument with a sentence about what is wrong.
    void build(const std::vector<Span>& tokens, const std::vector<uint32_t>& ids, const std::vector<Merge>* merges,
               bool whole_piece);

    // An id that decodes to `bytes` and that no text encodes to. An ordinary token of that id stays what it is.
    void add_special(uint32_t id, Span bytes);

    // The bytes of an external id; size 0: no such id.
    Span bytes_of(uint32_t id) const {
        if (id >= by_id_.size()) return {nullptr, 0};
        return {blob_.data() + by_id_[id].offset, by_id_[id].length};
    }
    size_t id_limit() const { return by_id_.size(); }
    // Bytes of the ids in all, or the place of the first that is none in `bad`.
    size_t measure(const uint32_t* ids, size_t count, size_t& bad) const;
    // Writes the bytes of valid ids to `to`, which has room for just `size` bytes, their number.
    void decode(const uint32_t* ids, size_t count, uint8_t* to, size_t size) const;
    uint32_t external(uint32_t token) const { return external_[token]; }
    const uint32_t* external() const { return external_.data(); }
    uint32_t byte_token(uint8_t byte) const { return byte; }
    const PairTable& pairs() const { return pairs_; }
    size_t size() const { return external_.size(); }
    size_t longest() const { return longest_; }
    // Every token's rank is above its parts': then neighbours alone tell whether an encoding is one.
    bool monotone() const { return monotone_; }
    bool reachable(uint32_t token) const { return token < 256 || left_[token] != kNone; }
    uint32_t left(uint32_t token) const { return left_[token]; }
    uint32_t right(uint32_t token) const { return right_[token]; }

    size_t length(uint32_t token) const {
        return lengths_[token] != 0xFFFF ? lengths_[token] : by_id_[external_[token]].length;
    }
    // Whether every token can be made by merging.
    bool all_reachable() const { return all_reachable_; }
    const Joints& joints() const { return *joints_; }

    // Internal number of the token with these bytes, or kNone.
    uint32_t find(const uint8_t* p, size_t n) const;
    // Internal number of the token that a pretoken of these bytes is as a whole, or kNone.
    uint32_t find_piece(const uint8_t* p, size_t n) const {
        uint32_t token = n <= longest_ ? find(p, n) : kNone;
        return token != kNone && is_piece(token) ? token : kNone;
    }
    // Whether a pretoken of the token's bytes is the token.
    bool is_piece(uint32_t token) const { return whole_piece_ || reachable(token); }
    // How many bytes may be read from a token's first on.
    size_t readable(Span token) const { return static_cast<size_t>(blob_.data() + blob_.size() - token.data); }
    Span bytes_of_token(uint32_t token) const { return bytes_of(external_[token]); }

  private:
    friend struct Image;
    struct Place {
        uint32_t offset, length;
    };
    void number_tokens(const std::vector<Span>& tokens, const std::vector<uint32_t>& order);
    void index_bytes();
    void split_by_ranks(const std::vector<Span>& tokens, const std::vector<uint32_t>& order,
                        const std::vector<uint32_t>& by_length);
    std::vector<uint32_t> rank_by_merges(const std::vector<Span>& tokens, const std::vector<uint32_t>& order,
                                         const std::vector<uint32_t>& by_length, const std::vector<Merge>& merges);
    void derive();
    bool ids_are_dense() const { return by_id_.size() <= size() * 4 + (size_t{1} << 20); }
    void derive_inline();
    void put_inline(uint32_t id);

    // A token's bytes beside their number: what decoding copies, one cache line a token; empty where ids are too far apart.
    struct Inline {
        uint8_t bytes[15], size;
    };
    static constexpr uint8_t kOutside = 255;

    std::vector<uint8_t> blob_;
    Table<Inline> inline_;        // by id; size 0: no such id
    std::vector<uint8_t> sizes_;  // the same sizes, for a quick sum
    std::vector<Place> by_id_;
    std::vector<uint32_t> external_, left_, right_;
    std::vector<uint16_t> lengths_;  // the longest of all as the highest number; longer ones are looked up
    std::shared_ptr<const Joints> joints_;
    std::vector<uint64_t> index_;  // hash of bytes: high half of the hash << 32 | internal number
    PairTable pairs_;
    size_t longest_ = 0;
    bool whole_piece_ = false, monotone_ = false, all_reachable_ = false;
};

inline uint64_t hash_bytes(const uint8_t* p, size_t n) {
    uint64_t h = n * 0x9E3779B97F4A7C15u;
    auto mix = [&](uint64_t word) {
        h = (h ^ word) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    };
    uint64_t word;
    for (; n >= 8; p += 8, n -= 8) {
        std::memcpy(&word, p, 8);
        mix(word);
    }
    if (n) {
        word = 0;
        std::memcpy(&word, p, n);
        mix(word);
    }
    return h * 0x9E3779B97F4A7C15u;
}

}  // namespace fastformer::bpe
