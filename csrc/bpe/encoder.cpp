#include "bpe/encoder.h"

#include <algorithm>
#include <stdexcept>

#include "bpe/joints.h"
#include "bpe/merge.h"
#include "bpe/trie.h"
#include "bpe/unicode.h"

namespace fastformer::bpe {

namespace {

constexpr int kValidBits = 16;
constexpr size_t kBatch = 16384;  // pretokens scanned at once; the scanners' window fits
constexpr size_t kAhead = 32;     // pretokens whose cache entries are fetched before the first is needed

// Whether the last two characters of p[0, n) may have three bytes each, so that a cut is worth looking for.
bool is_wide(const uint8_t* p, size_t n) { return n >= 6 && p[n - 3] >= 0xE0 && p[n - 6] >= 0xE0; }

// Appends what a cache entry holds.
void append(const uint32_t* ids, IdBuffer& out) {
    size_t count = (ids[0] >> kCountShift) + 1;
    uint32_t* to = out.room(count);
    std::copy_n(ids, count, to);
    to[0] &= kIdMask;
    out.add(count);
}

// Entries for `count` keys at a load of a half at most.
int table_bits(size_t count) {
    int bits = 10;
    while ((size_t{1} << bits) < 2 * count) bits++;
    return bits;
}

}  // namespace

Encoder::Encoder(const Vocab& vocab, Isa isa)
    : vocab_(vocab), isa_(isa), short_(table_bits(vocab.size())), middle_(8), long_(6) {
    seed();
}

// Most pretokens are one token; those need no encoding even once. Ranks stand for frequency, so of tokens that fall
// into one place the lower ones stay.
void Encoder::seed() {
    for (uint32_t token = static_cast<uint32_t>(vocab_.size()); token-- > 0;) {
        Span s = vocab_.bytes_of_token(token);
        if (s.size > ShortCache::Key::kBytes || !vocab_.is_piece(token)) continue;
        ShortCache::Key key = ShortCache::Key::of(s.data, s.size, s.size);
        uint32_t id = vocab_.external(token);
        short_.store(key, key.hash(), &id, 1);
    }
}

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

// Where the text from `at` on may be cut at the latest, `end` being the end of its pretoken.
size_t Encoder::next_cut(const uint8_t* text, size_t at, size_t end) const {
    const Joints& joints = vocab_.joints();
    uint32_t last = 0;
    while (at + 3 <= end) {
        uint8_t lead = text[at];
        if (lead < 0xE0) {
            last = 0;
            at += lead < 0x80 ? 1 : 2;
        } else if (lead >= 0xF0) {
            last = 0;
            at += 4;
        } else {
            uint32_t point = fastformer::unicode::decode(text + at).point;
            if (last && !joints.joined(last, point)) return at;
            last = point;
            at += 3;
        }
    }
    return end;
}

void Encoder::encode_pieces(const uint8_t* text, size_t n, const uint32_t* ends, size_t count, size_t start,
                            IdBuffer& out) {
    ShortCache::Key keys[kAhead];
    uint64_t hashes[kAhead];
    uint32_t stops[kAhead];
    for (size_t next = 0; next < count;) {
        size_t group = 0, at = start;
        for (; group < kAhead && next < count; group++) {
            size_t end = ends[next];
            if (is_wide(text + at, end - at)) end = next_cut(text, at, end);
            next += end == ends[next];
            size_t length = end - at;
            if (length <= ShortCache::Key::kBytes) {
                keys[group] = ShortCache::Key::of(text + at, length, n - at);
                hashes[group] = keys[group].hash();
                short_.prefetch(hashes[group]);
            }
            stops[group] = static_cast<uint32_t>(end);
            at = end;
        }
        // A byte gives at most one id; a hit writes all its entry has.
        uint32_t* to = out.room(at - start + LongCache::kIds);
        for (size_t i = 0; i < group; i++) {
            size_t end = stops[i], length = end - start;
            const uint8_t* p = text + start;
            size_t readable = n - start;
            start = end;
            if (length <= ShortCache::Key::kBytes) {
                if (const uint32_t* ids = short_.find(keys[i], hashes[i])) {
                    std::copy_n(ids, ShortCache::kIds, to);
                    to[0] &= kIdMask;
                    to += (ids[0] >> kCountShift) + 1;
                    continue;
                }
                if (!length) continue;
            }
            out.add(static_cast<size_t>(to - out.end()));
            if (length > LongCache::Key::kBytes)
                encode_piece(p, length, out);
            else if (length > MiddleCache::Key::kBytes)
                look_up(long_, p, length, readable, out);
            else if (length > ShortCache::Key::kBytes)
                look_up(middle_, p, length, readable, out);
            else
                encode_missed(keys[i], hashes[i], p, length, readable, out);
            to = out.room(at - end + LongCache::kIds);
        }
        out.add(static_cast<size_t>(to - out.end()));
    }
}

// A pretoken that the first cache would hold and does not. Where it has more ids than fit there, the second holds it.
void Encoder::encode_missed(const ShortCache::Key& key, uint64_t hash, const uint8_t* p, size_t n, size_t readable,
                            IdBuffer& out) {
    MiddleCache::Key wide;
    uint64_t wide_hash = 0;
    if (n > ShortCache::kIds) {
        wide = MiddleCache::Key::of(p, n, readable);
        wide_hash = wide.hash();
        if (const uint32_t* ids = middle_.find(wide, wide_hash)) return append(ids, out);
    }
    size_t made = encode_piece(p, n, out);
    if (made <= ShortCache::kIds)
        short_.store(key, hash, out.end() - made, made);
    else if (made <= MiddleCache::kIds)
        middle_.store(wide, wide_hash, out.end() - made, made);
}

// A pretoken that `cache` may hold; encoded and stored there if it does not.
template <typename AnyCache>
void Encoder::look_up(AnyCache& cache, const uint8_t* p, size_t n, size_t readable, IdBuffer& out) {
    typename AnyCache::Key key = AnyCache::Key::of(p, n, readable);
    uint64_t hash = key.hash();
    if (const uint32_t* ids = cache.find(key, hash)) {
        append(ids, out);
        return;
    }
    size_t made = encode_piece(p, n, out);
    if (made <= AnyCache::kIds) cache.store(key, hash, out.end() - made, made);
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
