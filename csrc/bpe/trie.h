// All tokens that merging can make, as a trie: the longest token at a place in one walk.
#pragma once
#include <cstdint>
#include <vector>

#include "bpe/memory.h"
#include "bpe/vocab.h"

namespace fastformer::bpe {

// Nodes are numbered so that a token's node is the token; nodes between come after them. Edges from the root's
// children on stand in one hash table, the first two bytes in a direct one, characters of three bytes in another.
class Trie {
  public:
    // `tokens` are internal numbers in the order of their lengths.
    void build(const Vocab& vocab, const std::vector<uint32_t>& tokens);

    // The longest token that p[0, n) begins with; n > 0.
    uint32_t longest(const uint8_t* p, size_t n) const {
        if (n < 2) return p[0];
        Start s;
        size_t i = 2;
        if (p[0] >= 0xE0 && p[0] < 0xF0 && n >= 3 && (p[1] & 0xC0) == 0x80 && (p[2] & 0xC0) == 0x80) {
            s = characters_[(p[0] & 15) << 12 | (p[1] & 63) << 6 | (p[2] & 63)];
            i = 3;
        } else {
            uint32_t node = pairs_[p[0] << 8 | p[1]];
            s = {node, (node & ~kLeaf) < tokens_ ? node & ~kLeaf : p[0]};
        }
        // A leaf and an absent node alike have the top bit.
        while (!(s.node & kLeaf) && i < n) {
            s.node = child(s.node, p[i++]);
            if ((s.node & ~kLeaf) < tokens_) s.best = s.node & ~kLeaf;
        }
        return s.best;
    }
    // The longest token that is a proper prefix of this one, kNone for single bytes.
    uint32_t prefix(uint32_t token) const { return prefix_[token]; }

  private:
    static constexpr uint32_t kLeaf = 0x80000000;  // marks a node without children
    struct Edge {
        uint32_t key, node;  // key: parent << 8 | byte; an absent edge leads to kNone
    };
    // Where the walk stands after the first character.
    struct Start {
        uint32_t node, best;
    };

    static uint64_t hash(uint32_t key) { return key * uint64_t{0x9E3779B97F4A7C15}; }
    uint32_t child(uint32_t parent, uint8_t byte) const {
        uint32_t key = parent << 8 | byte;
        uint64_t h = hash(key), bit = h >> (shift_ - 2);
        // Every walk ends at an edge that is not there; a bit map four times the table's length mostly says so.
        if (!(filter_[bit >> 6] >> (bit & 63) & 1)) return kNone;
        for (size_t i = h >> shift_;; i = (i + 1) & mask_) {
            if (edges_[i].node == kNone) return kNone;
            if (edges_[i].key == key) return edges_[i].node;
        }
    }
    void insert(uint32_t parent, uint8_t byte, uint32_t node);
    void reserve(size_t edges);

    void mark_leaves(uint32_t nodes);

    Table<Edge> edges_;
    Table<uint64_t> filter_;
    Table<Start> characters_;  // by code point, of three bytes each
    Table<uint32_t> pairs_, prefix_;
    size_t mask_ = 0, used_ = 0;
    int shift_ = 0;
    uint32_t tokens_ = 0;
};

}  // namespace fastformer::bpe
