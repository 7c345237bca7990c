#include "bpe/encoder.h"

#include <algorithm>
#include <stdexcept>

#include "bpe/merge.h"
#include "bpe/trie.h"

namespace fastformer::bpe {

namespace {

constexpr int kValidBits = 16;
constexpr size_t kBatch = 16384;  // pretokens scanned at once; the scanners' window fits
constexpr size_t kAhead = 32;     // pretokens whose cache entries are fetched before the first is needed

// Which cache: text beyond Latin has about half an id a byte, so it outgrows an entry's ids before its bytes.
bool is_short(const uint8_t* p, size_t n) { return n <= 9 || (n <= ShortCache::Key::kBytes && p[n - 1] < 0x80); }
bool is_middle(const uint8_t* p, size_t n) { return n <= 18 || (n <= MiddleCache::Key::kBytes && p[n - 1] < 0x80); }

}  // namespace

Encoder::Encoder(const Vocab& vocab, Isa isa) : vocab_(vocab), isa_(isa) {}

void Encoder::encode_prefix(Pattern pattern, const uint8_t* text, size_t n, size_t stop, IdBuffer& out) {
    if (n >= 0xFFFFFFFFu) throw std::invalid_argument("text: at most 4 GB in one call");
    if (ends_.empty()) ends_.resize(kBatch);
    Scanner::Function scan = Scanner::get(pattern, isa_);
    for (size_t pos = 0; pos < stop;) {
        size_t start = pos;
        size_t count = scan(text, n, pos, ends_.data(), kBatch);
        while (pos > stop && count && ends_[count - 1] > stop) count--;
        encode_pieces(text, n, ends_.data(), count, start, out);
    }
}

void Encoder::encode_pieces(const uint8_t* text, size_t n, const uint32_t* ends, size_t count, size_t start,
                            IdBuffer& out) {
    ShortCache::Key keys[kAhead];
    uint64_t hashes[kAhead];
    for (size_t low = 0; low < count; low += kAhead) {
        size_t group = std::min(kAhead, count - low), at = start;
        for (size_t i = 0; i < group; i++) {
            size_t end = ends[low + i], length = end - at;
            if (is_short(text + at, length)) {
                keys[i] = ShortCache::Key::of(text + at, length, n - at);
                hashes[i] = keys[i].hash();
                short_.prefetch(hashes[i]);
            }
            at = end;
        }
        // A byte gives at most one id; a hit writes all its entry has.
        uint32_t* to = out.room(at - start + LongCache::kIds);
        for (size_t i = 0; i < group; i++) {
            size_t end = ends[low + i], length = end - start;
            const uint8_t* p = text + start;
            start = end;
            if (!is_short(p, length)) {
                size_t readable = n - (end - length);
                to = is_middle(p, length) ? look_up(middle_, p, length, readable, to, at - end, out)
                                                        : look_up(long_, p, length, readable, to, at - end, out);
                continue;
            }
            if (const uint32_t* ids = short_.find(keys[i], hashes[i])) {
                std::copy_n(ids, ShortCache::kIds, to);
                to[0] &= kIdMask;
                to += (ids[0] >> kCountShift) + 1;
                continue;
            }
            if (!length) continue;
            out.add(static_cast<size_t>(to - out.end()));
            size_t made = encode_piece(p, length, out);
            to = out.room(at - end + LongCache::kIds);
            if (made <= ShortCache::kIds) short_.store(keys[i], hashes[i], to - made, made);
        }
        out.add(static_cast<size_t>(to - out.end()));
    }
}

// A pretoken too long for the first cache; `room` bytes of text follow it in the group.
template <typename AnyCache>
uint32_t* Encoder::look_up(AnyCache& cache, const uint8_t* p, size_t n, size_t readable, uint32_t* to, size_t room,
                           IdBuffer& out) {
    typename AnyCache::Key key{};
    uint64_t hash = 0;
    bool fits = n <= AnyCache::Key::kBytes;
    if (fits) {
        key = AnyCache::Key::of(p, n, readable);
        hash = key.hash();
        if (const uint32_t* ids = cache.find(key, hash)) {
            std::copy_n(ids, AnyCache::kIds, to);
            to[0] &= kIdMask;
            return to + (ids[0] >> kCountShift) + 1;
        }
    }
    out.add(static_cast<size_t>(to - out.end()));
    size_t made = encode_piece(p, n, out);
    to = out.room(room + LongCache::kIds);
    if (fits && made <= AnyCache::kIds) cache.store(key, hash, to - made, made);
    return to;
}

size_t Encoder::encode_piece(const uint8_t* p, size_t n, IdBuffer& out) {
    if (!vocab_.monotone() || !vocab_.all_reachable()) {
        uint32_t whole = vocab_.find_piece(p, n);
        if (whole != kNone) {
            out.push(vocab_.external(whole));
            return 1;
        }
    }
    if (vocab_.monotone()) {
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
