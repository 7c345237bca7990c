#include "bpe/encoder.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "bpe/joints.h"
#include "bpe/lanes.h"
#include "bpe/merge.h"
#include "bpe/trie.h"
#include "bpe/unicode.h"

namespace fastformer::bpe {

namespace {

constexpr int kValidBits = 16;
constexpr size_t kScanned = 16384;   // pretokens scanned at once; the scanners' window fits
constexpr size_t kBatch = 192;       // pretokens whose cache entries are fetched before the first is needed
constexpr size_t kMarks = 512;       // short texts that are looked up together
constexpr size_t kMerged = 512;      // bytes of a pretoken for which merging beats making the trie
constexpr uint32_t kElsewhere = 15;  // in place of a count

// Whether the last two characters of the n bytes before `end` may have three bytes each, so that a cut is worth looking for.
bool is_wide(const uint8_t* end, size_t n) { return end[-1] >= 0x80 && n >= 6 && end[-3] >= 0xE0 && end[-6] >= 0xE0; }

// Entries for `count` keys at a load of a quarter at most: two of three that meet push out one, every time anew.
int table_bits(size_t count) {
    int bits = 10;
    while ((size_t{1} << bits) < 4 * count) bits++;
    return bits;
}

}  // namespace

struct Encoder::Batch {
    size_t size, missed;
    bool grown;  // by a pretoken of uncommon length
    uint32_t stops[kBatch + 1];
    ShortCache::Key keys[kBatch];
    uint64_t hashes[kBatch];
    Slot slots[kBatch];
    uint32_t misses[kBatch];
    Lanes::Job jobs[kBatch];
    Lanes lanes;
};

// Where texts that stand side by side end, and how many ids each became.
struct Encoder::Marks {
    uint32_t ends[kMarks];
    size_t size, next, before;
    IdBuffer& counts;

    // The text from `at` on comes after `ids` ids.
    void pass(size_t at, size_t ids) {
        for (; next < size && ends[next] <= at; next++) {
            counts.push(static_cast<uint32_t>(ids - before));
            before = ids;
        }
    }
};

Encoder::Encoder(const Vocab& vocab, Isa isa)
    : vocab_(vocab), isa_(isa), short_(table_bits(vocab.size())), middle_(8), long_(6), batch_(new Batch{}) {
    seed();
}

Encoder::~Encoder() = default;

// Most pretokens are one token; those need no encoding even once. Ranks stand for frequency, so of tokens that fall
// into one place the lower ones stay.
void Encoder::seed() {
    constexpr uint32_t kStep = 64;
    ShortCache::Key keys[kStep];
    uint64_t hashes[kStep];
    uint32_t ids[kStep];
    for (uint32_t token = static_cast<uint32_t>(vocab_.size()); token > 0;) {
        uint32_t group = 0;
        while (token > 0 && group < kStep) {
            Span s = vocab_.bytes_of_token(--token);
            if (s.size > ShortCache::Key::kBytes || !vocab_.is_piece(token)) continue;
            keys[group] = ShortCache::Key::of(s.data, s.size, vocab_.readable(s));
            hashes[group] = keys[group].hash();
            short_.prefetch(hashes[group]);
            ids[group++] = vocab_.external(token);
        }
        for (uint32_t i = 0; i < group; i++) short_.store(keys[i], hashes[i], &ids[i], 1);
    }
}

void Encoder::encode_prefix(Pattern pattern, const uint8_t* text, size_t n, size_t stop, IdBuffer& out) {
    if (n >= 0xFFFFFFFFu) throw std::invalid_argument("text: at most 4 GB in one call");
    if (ends_.empty()) ends_.resize(kScanned);
    Scanner::Function scan = Scanner::get(pattern, isa_);
    for (size_t pos = 0; pos < stop;) {
        size_t start = pos;
        size_t count = scan(text, n, pos, ends_.data(), kScanned);
        while (pos > stop && count && ends_[count - 1] > stop) count--;
        encode_pieces(text, n, ends_.data(), count, start, out);
    }
}

// A pretoken of megabytes leaves nothing of its size behind.
void Encoder::trim() {
    constexpr size_t kKept = size_t{1} << 18;
    spill_.reset(kKept);
    whole_.reset(kKept);
    if (parts_.capacity() > kKept) std::vector<uint32_t>().swap(parts_);
    if (open_.capacity() > kKept) std::vector<uint64_t>().swap(open_);
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
    Batch& batch = *batch_;
    for (size_t done = 0; done < count; start = batch.stops[batch.size]) {
        done += gather(batch, text, n, ends + done, count - done, start);
        find(batch, text, n);
        if (batch.missed) merge_missed(batch, text, n);
        emit(batch, out, nullptr);
        if (std::exchange(batch.grown, false)) trim();
    }
}

void Encoder::encode_many(Pattern pattern, const Span* texts, size_t count, IdBuffer& out, IdBuffer& counts) {
    if (ends_.empty()) ends_.resize(kScanned);
    if (joined_.empty()) joined_.resize(kScanned);
    Scanner::Function scan = Scanner::get(pattern, isa_);
    size_t i = 0;
    while (i < count) {
        if (texts[i].size > kScanned / 4) {
            size_t before = out.size();
            encode(pattern, texts[i].data, texts[i].size, out);
            counts.push(static_cast<uint32_t>(out.size() - before));
            i++;
            continue;
        }
        // As many as fit side by side; each is scanned as a text of its own, all are looked up together.
        Marks marks{{}, 0, 0, out.size(), counts};
        size_t size = 0, pieces = 0, start = 0;
        for (; i < count && marks.size < kMarks && texts[i].size <= std::min(kScanned / 4, kScanned - size); i++) {
            std::copy_n(texts[i].data, texts[i].size, joined_.data() + size);
            size_t pos = size;
            size += texts[i].size;
            while (pos < size) pieces += scan(joined_.data(), size, pos, ends_.data() + pieces, kScanned - pieces);
            marks.ends[marks.size++] = static_cast<uint32_t>(size);
        }
        for (size_t done = 0; done < pieces; start = batch_->stops[batch_->size]) {
            done += gather(*batch_, joined_.data(), size, ends_.data() + done, pieces - done, start);
            find(*batch_, joined_.data(), size);
            if (batch_->missed) merge_missed(*batch_, joined_.data(), size);
            emit(*batch_, out, &marks);
        }
        marks.pass(size, out.size());
    }
}

// Fills the batch with pretokens from `start` on, cut where they can be, and asks for their places in the caches.
// Returns how many of the `ends` are in it to the last byte.
size_t Encoder::gather(Batch& batch, const uint8_t* text, size_t n, const uint32_t* ends, size_t count, size_t start) {
    size_t size = 0, next = 0, at = start;
    while (size < kBatch && next < count) {
        size_t end = ends[next++];
        if (end > at && is_wide(text + end, end - at)) {
            size_t cut = next_cut(text, at, end);
            next -= cut != end;
            end = cut;
        }
        size_t length = end - at;
        batch.stops[size] = static_cast<uint32_t>(at);
        if (length <= ShortCache::Key::kBytes) {
            batch.keys[size] = ShortCache::Key::of(text + at, length, n - at);
            batch.hashes[size] = batch.keys[size].hash();
            short_.prefetch(batch.hashes[size]);
        } else if (length <= MiddleCache::Key::kBytes) {
            middle_.prefetch(MiddleCache::Key::of(text + at, length, n - at).hash());
        } else if (length <= LongCache::Key::kBytes) {
            long_.prefetch(LongCache::Key::of(text + at, length, n - at).hash());
        }
        size += length > 0;
        at = end;
    }
    batch.stops[size] = static_cast<uint32_t>(at);
    batch.size = size;
    return next;
}

// Looks the batch up; what no cache holds goes to the list of the missed.
void Encoder::find(Batch& batch, const uint8_t* text, size_t n) {
    size_t missed = 0;
    spill_.resize(0);
    for (size_t i = 0; i < batch.size; i++) {
        size_t start = batch.stops[i], length = batch.stops[i + 1] - start;
        if (length <= ShortCache::Key::kBytes) {
            if (const uint32_t* ids = short_.find(batch.keys[i], batch.hashes[i])) {
                std::memcpy(&batch.slots[i], ids, sizeof(Slot));
                continue;
            }
        }
        // What has more ids than fit beside a key of its length is held by the next larger cache.
        const uint32_t* ids = nullptr;
        if (length <= MiddleCache::Key::kBytes && length > ShortCache::kIds) {
            MiddleCache::Key key = MiddleCache::Key::of(text + start, length, n - start);
            ids = middle_.find(key, key.hash());
        }
        if (!ids && length <= LongCache::Key::kBytes && length > MiddleCache::kIds) {
            LongCache::Key key = LongCache::Key::of(text + start, length, n - start);
            ids = long_.find(key, key.hash());
        }
        if (ids) {
            size_t count = (ids[0] >> kCountShift) + 1;
            spill(batch.slots[i], ids, count);
            spill_.data()[spill_.size() - count] &= kIdMask;
        } else {
            batch.misses[missed++] = static_cast<uint32_t>(i);
        }
    }
    batch.missed = missed;
}

void Encoder::merge_missed(Batch& batch, const uint8_t* text, size_t n) {
    size_t jobs = 0;
    bool ask_whole = !vocab_.monotone() || !vocab_.all_reachable();
    for (size_t k = 0; k < batch.missed; k++) {
        uint32_t i = batch.misses[k], start = batch.stops[i], length = batch.stops[i + 1] - start;
        uint32_t whole = ask_whole ? vocab_.find_piece(text + start, length) : kNone;
        if (whole != kNone) {
            uint32_t id = vocab_.external(whole);
            finish(batch, i, text, n, &id, 1);
        } else if (length <= Lanes::kLongest) {
            batch.jobs[jobs++] = {text + start, length, i};
        } else {
            whole_.resize(0);
            encode_piece(text + start, length, whole_);
            finish(batch, i, text, n, whole_.data(), whole_.size());
            batch.grown |= length > kScanned;
        }
    }
    batch.lanes.run(vocab_.pairs(), batch.jobs, jobs, [&](uint32_t i, uint32_t* tokens, size_t count) {
        for (size_t k = 0; k < count; k++) tokens[k] = vocab_.external(tokens[k]);
        finish(batch, i, text, n, tokens, count);
    });
}

// Notes what pretoken i became, here and in the cache that can hold it.
void Encoder::finish(Batch& batch, size_t i, const uint8_t* text, size_t n, const uint32_t* ids, size_t count) {
    size_t start = batch.stops[i], length = batch.stops[i + 1] - start;
    if (count <= ShortCache::kIds) {
        std::copy_n(ids, count, batch.slots[i].ids);
        batch.slots[i].ids[0] |= static_cast<uint32_t>(count - 1) << kCountShift;
    } else {
        spill(batch.slots[i], ids, count);
    }
    if (length <= ShortCache::Key::kBytes && count <= ShortCache::kIds) {
        short_.store(batch.keys[i], batch.hashes[i], ids, count);
    } else if (length <= MiddleCache::Key::kBytes && count <= MiddleCache::kIds) {
        MiddleCache::Key key = MiddleCache::Key::of(text + start, length, n - start);
        middle_.store(key, key.hash(), ids, count);
    } else if (length <= LongCache::Key::kBytes && count <= LongCache::kIds) {
        LongCache::Key key = LongCache::Key::of(text + start, length, n - start);
        long_.store(key, key.hash(), ids, count);
    }
}

void Encoder::spill(Slot& slot, const uint32_t* ids, size_t count) {
    slot.ids[0] = kElsewhere << kCountShift;
    slot.ids[1] = static_cast<uint32_t>(spill_.size());
    slot.ids[2] = static_cast<uint32_t>(count);
    std::copy_n(ids, count, spill_.room(count));
    spill_.add(count);
}

// Appends the ids of the batch and, with `marks`, tells where texts end among them.
void Encoder::emit(const Batch& batch, IdBuffer& out, Marks* marks) {
    // A slot is written whole, whatever its count.
    uint32_t* to = out.room(ShortCache::kIds * batch.size + spill_.size());
    for (size_t i = 0; i < batch.size; i++) {
        if (marks) marks->pass(batch.stops[i], out.size() + static_cast<size_t>(to - out.end()));
        const Slot& slot = batch.slots[i];
        uint32_t count = (slot.ids[0] >> kCountShift) + 1;
        if (count <= ShortCache::kIds) {
            uint64_t low, high;
            std::memcpy(&low, slot.ids, 8);
            std::memcpy(&high, slot.ids + 2, 8);
            low &= ~(uint64_t{0xF} << kCountShift);
            std::memcpy(to, &low, 8);
            std::memcpy(to + 2, &high, 8);
            to += count;
        } else {
            to = std::copy_n(spill_.data() + slot.ids[1], slot.ids[2], to);
        }
    }
    out.add(static_cast<size_t>(to - out.end()));
}

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
