// One pretoken at a time, of any length: by merging, or where it is long by longest matches.
#include <algorithm>

#include "bpe/encoder.h"
#include "bpe/merge.h"
#include "bpe/trie.h"

namespace fastformer::bpe {

namespace {

constexpr int kValidBits = 16;
constexpr size_t kMerged = 512;  // bytes of a pretoken for which merging beats making the trie

}  // namespace

size_t Encoder::encode_piece(const uint8_t* p, size_t n, IdBuffer& out) {
    if (!vocab_.monotone() || !vocab_.all_reachable()) {
        uint32_t whole = vocab_.find_piece(p, n);
        if (whole != kNone) {
            out.push(vocab_.external(whole));
            return 1;
        }
    }
    if (vocab_.monotone() && n > kMerged) {
        uint32_t* to = out.room(n);
        size_t count = longest_match(p, n, to);
        for (size_t i = 0; i < count; i++) to[i] = vocab_.external(to[i]);
        out.add(count);
        return count;
    }
    auto rank = [](uint32_t token) { return token; };
    size_t count;
    if (n <= kScanLimit) {
        parts_.resize(kScanLimit);
        std::copy(p, p + n, parts_.begin());
        count = merge_scan(vocab_.pairs(), parts_.data(), n, rank);
    } else {
        parts_.assign(p, p + n);
        count = merge_heap(vocab_.pairs(), parts_, rank);
    }
    uint32_t* to = out.room(count);
    for (size_t i = 0; i < count; i++) to[i] = vocab_.external(parts_[i]);
    out.add(count);
    return count;
}

// The encoding is the one sequence of tokens of which every two neighbours stand side by side in an encoding of their
// own. Longest tokens first, it is found with little backtracking; no position is given up twice, so time is linear
// (the algorithm of GitHub's `bpe` crate, by Hendrik van Antwerpen and Alexander Neubeck).
size_t Encoder::longest_match(const uint8_t* p, size_t n, uint32_t* to) {
    const Trie& trie = vocab_.trie();
    uint32_t token = trie.longest(p, n);
    if (vocab_.length(token) == n) {
        to[0] = token;
        return 1;
    }
    open_.assign((n + 64) / 64, ~uint64_t{0});
    size_t count = 0, pos = 0;
    for (;;) {
        size_t end = pos + vocab_.length(token);
        if ((open_[end >> 6] >> (end & 63) & 1) && (count == 0 || valid_pair(to[count - 1], token))) {
            to[count++] = token;
            pos = end;
            if (pos == n) return count;
            token = trie.longest(p + pos, n - pos);
            continue;
        }
        uint32_t shorter = trie.prefix(token);
        if (shorter != kNone) {
            token = shorter;
            continue;
        }
        open_[pos >> 6] &= ~(uint64_t{1} << (pos & 63));
        token = to[--count];
        pos -= vocab_.length(token);
    }
}

// Whether the encoding of the two tokens' bytes is the two tokens: undo merges from the latest on, on either side of
// the seam, and see whether one across the seam would have come before.
bool Encoder::valid_pair(uint32_t left, uint32_t right) {
    if (valid_.empty()) valid_.assign(size_t{1} << kValidBits, ~uint64_t{0});
    uint64_t key = static_cast<uint64_t>(left) << 21 | right;
    uint64_t& known = valid_[key * 0x9E3779B97F4A7C15u >> (64 - kValidBits)];
    if (known >> 1 == key) return known & 1;
    const PairTable& pairs = vocab_.pairs();
    uint32_t limit = kNone;
    bool valid;
    for (;;) {
        uint32_t merged = pairs.find(left, right);
        if (merged != kNone && merged < limit) {
            valid = false;
            break;
        }
        // Of equal ranks the left one merged first, so the right one is undone first.
        if (left > right || right < 256) {
            if (left < 256) {
                valid = true;
                break;
            }
            limit = left;
            left = vocab_.right(left);
        } else {
            limit = right + 1;
            right = vocab_.left(right);
        }
    }
    known = key << 1 | valid;
    return valid;
}

}  // namespace fastformer::bpe
