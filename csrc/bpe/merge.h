// The definition of BPE: of all neighbouring pairs that merge, take the one of lowest rank, the leftmost of equals.
#pragma once
#include <algorithm>
#include <functional>
#include <queue>

#include "bpe/vocab.h"

namespace fastformer::bpe {

inline constexpr size_t kScanLimit = 64;

// Bytes to merge beside others (lanes.h): at least one, at most kScanLimit. `index` is the caller's.
struct MergeJob {
    const uint8_t* data;
    uint32_t size, index;
};
using MergeDone = void (*)(void* context, uint32_t index, const uint32_t* tokens, size_t count);

// Calls `done` with the tokens of every job, in any order; by the best instruction set there is.
void merge_side_by_side(const PairTable& pairs, const MergeJob* jobs, size_t count, MergeDone done, void* context);

// Merges n <= kScanLimit tokens in place by scanning for the lowest rank; returns how many are left. `rank` maps a
// merged token to its rank.
template <typename Rank>
size_t merge_scan(const PairTable& pairs, uint32_t* tokens, size_t n, Rank rank) {
    uint32_t merged[kScanLimit];
    for (size_t i = 0; i + 1 < n; i++) merged[i] = pairs.find(tokens[i], tokens[i + 1]);
    while (n > 1) {
        size_t best = 0;
        uint32_t lowest = kNone;
        for (size_t i = 0; i + 1 < n; i++) {
            uint32_t r = merged[i] == kNone ? kNone : rank(merged[i]);
            if (r < lowest) {
                lowest = r;
                best = i;
            }
        }
        if (lowest == kNone) break;
        tokens[best] = merged[best];
        n--;
        for (size_t i = best + 1; i < n; i++) tokens[i] = tokens[i + 1];
        for (size_t i = best + 1; i + 1 < n; i++) merged[i] = merged[i + 1];
        if (best > 0) merged[best - 1] = pairs.find(tokens[best - 1], tokens[best]);
        if (best + 1 < n) merged[best] = pairs.find(tokens[best], tokens[best + 1]);
    }
    return n;
}

// The same for any length, in O(n log n).
template <typename Rank>
size_t merge_heap(const PairTable& pairs, std::vector<uint32_t>& tokens, Rank rank) {
    struct Node {
        uint32_t token;
        size_t previous, next;
    };
    struct Candidate {
        uint32_t rank, merged;
        size_t at;
        uint32_t left, right;
        bool operator>(const Candidate& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
    };
    constexpr size_t kEnd = ~size_t{0};
    size_t n = tokens.size();
    std::vector<Node> nodes(n);
    for (size_t i = 0; i < n; i++) nodes[i] = {tokens[i], i ? i - 1 : kEnd, i + 1 < n ? i + 1 : kEnd};
    std::vector<Candidate> initial;
    auto candidate = [&](size_t i, auto&& push) {
        if (i == kEnd || nodes[i].next == kEnd) return;
        uint32_t left = nodes[i].token, right = nodes[nodes[i].next].token, merged = pairs.find(left, right);
        if (merged != kNone) push(Candidate{rank(merged), merged, i, left, right});
    };
    for (size_t i = 0; i < n; i++) candidate(i, [&](Candidate c) { initial.push_back(c); });
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>{}, std::move(initial));
    while (!queue.empty()) {
        Candidate c = queue.top();
        queue.pop();
        Node& node = nodes[c.at];
        // Absorbed nodes carry kNone, so a stale candidate never matches.
        if (node.token != c.left || node.next == kEnd || nodes[node.next].token != c.right) continue;
        Node& gone = nodes[node.next];
        node.token = c.merged;
        node.next = gone.next;
        gone.token = kNone;
        if (node.next != kEnd) nodes[node.next].previous = c.at;
        candidate(node.previous, [&](Candidate next) { queue.push(next); });
        candidate(c.at, [&](Candidate next) { queue.push(next); });
    }
    size_t out = 0;
    if (n)
        for (size_t i = 0; i != kEnd; i = nodes[i].next) tokens[out++] = nodes[i].token;
    tokens.resize(out);
    return out;
}

}  // namespace fastformer::bpe
