#include "bpe/trie.h"

#include <stdexcept>

namespace fastformer::bpe {

void Trie::reserve(size_t edges) {
    int bits = 8;
    while (3 * (size_t{1} << bits) < 4 * edges + 4) bits++;
    filter_.assign((size_t{1} << bits) / 16, 0);
    Table<Edge> old(size_t{1} << bits, Edge{0, kNone});
    old.swap(edges_);
    mask_ = edges_.size() - 1;
    shift_ = 64 - bits;
    used_ = 0;
    for (const Edge& e : old)
        if (e.node != kNone) insert(e.key >> 8, static_cast<uint8_t>(e.key), e.node);
}

void Trie::insert(uint32_t parent, uint8_t byte, uint32_t node) {
    if (4 * (used_ + 1) > 3 * edges_.size()) reserve(edges_.size());
    uint32_t key = parent << 8 | byte;
    uint64_t h = hash(key), bit = h >> (shift_ - 2);
    filter_[bit >> 6] |= uint64_t{1} << (bit & 63);
    size_t i = h >> shift_;
    while (edges_[i].node != kNone) i = (i + 1) & mask_;
    edges_[i] = {key, node};
    used_++;
}

void Trie::build(const Vocab& vocab, const std::vector<uint32_t>& tokens) {
    tokens_ = static_cast<uint32_t>(vocab.size());
    pairs_.assign(65536, kNone);
    prefix_.assign(vocab.size(), kNone);
    edges_.clear();
    reserve(vocab.size() * 2);
    uint32_t next = tokens_;
    for (uint32_t token : tokens) {
        Span s = vocab.bytes_of_token(token);
        if (s.size == 1) continue;
        uint32_t best = s.data[0];
        if (s.size == 2) {
            pairs_[s.data[0] << 8 | s.data[1]] = token;
            prefix_[token] = best;
            continue;
        }
        uint32_t& first = pairs_[s.data[0] << 8 | s.data[1]];
        if (first == kNone) first = next++;
        uint32_t node = first;
        for (size_t i = 2; i < s.size; i++) {
            if (node < tokens_) best = node;
            // Shorter tokens stand already, so the last byte makes a fresh node, which is the token.
            uint32_t to = child(node, s.data[i]);
            if (to == kNone) {
                to = i + 1 == s.size ? token : next++;
                insert(node, s.data[i], to);
            }
            node = to;
        }
        prefix_[token] = best;
    }
    if (next >= 1u << 24) throw std::invalid_argument("the vocabulary's tokens are too long and too different to index");
    mark_leaves(next);
    characters_.resize(65536);
    for (uint32_t point = 0; point < 65536; point++) {
        uint8_t c[3] = {static_cast<uint8_t>(0xE0 | point >> 12), static_cast<uint8_t>(0x80 | (point >> 6 & 63)),
                        static_cast<uint8_t>(0x80 | (point & 63))};
        uint32_t node = pairs_[c[0] << 8 | c[1]], best = (node & ~kLeaf) < tokens_ ? node & ~kLeaf : c[0];
        if (!(node & kLeaf)) node = child(node, c[2]);
        else node = kNone;
        if ((node & ~kLeaf) < tokens_) best = node & ~kLeaf;
        characters_[point] = {node, best};
    }
}

void Trie::mark_leaves(uint32_t nodes) {
    std::vector<bool> parent(nodes, false);
    for (const Edge& e : edges_)
        if (e.node != kNone) parent[e.key >> 8] = true;
    for (Edge& e : edges_)
        if (e.node != kNone && !parent[e.node]) e.node |= kLeaf;
    for (uint32_t& node : pairs_)
        if (node != kNone && !parent[node]) node |= kLeaf;
}

}  // namespace fastformer::bpe
