// The encoder of one instruction set (isa/isa.h): text is cut into pretokens, a batch of them is looked up in the
// caches, and what no cache holds is merged.
#pragma once
#include "bpe/cache.h"
#include "bpe/joints.h"
#include "bpe/lanes.h"

namespace fastformer::bpe::FASTFORMER_ISA {

#if !defined(FASTFORMER_ISA_PROBE)
using ShortHash = MixHash;

// The key of the n bytes at p, of which at least `readable` may be read; of more than fit, one that no entry has.
inline ShortKey short_key(const uint8_t* p, size_t n, size_t readable) { return ShortKey::of(p, n, readable); }

// The ids beside the key in a line, or null. Which of the two it is nobody can predict, whether it is one of them nearly
// always.
inline const uint32_t* probe(const ShortLine* line, const ShortKey& key) {
    bool first = line->keys[0] == key, second = line->keys[1] == key;
    const uint32_t* ids = line->ids[first ? 0 : 1];
    return first | second ? ids : nullptr;
}
#endif
// Writes all four of the ids, whatever their count, and returns where they end.
inline uint32_t* put(const uint32_t* ids, uint32_t* to) {
    size_t count = (ids[0] >> kCountShift) + 1;
    uint32_t four[4];
    std::memcpy(four, ids, sizeof four);
    for (uint32_t& id : four) id &= kIdMask;
    std::memcpy(to, four, sizeof four);
    return to + count;
}

using ShortCache = Cache<2, 4, 19, ShortHash>;  // 32 MB

class Coder final : public Encoder {
  public:
    explicit Coder(const Vocab& vocab);

    void encode_prefix(Pattern pattern, const uint8_t* text, size_t n, size_t stop, IdBuffer& out) override;
    void encode_pieces(const uint8_t* text, size_t n, const uint32_t* ends, size_t count, size_t start,
                       IdBuffer& out) override;
    void encode_many(Pattern pattern, const Span* texts, size_t count, IdBuffer& out, IdBuffer& counts) override;
    size_t encode_piece(const uint8_t* p, size_t n, IdBuffer& out) override;

  private:
    static constexpr size_t kScanned = 8192;     // pretokens scanned at once; the scanners' window fits
    static constexpr size_t kBatch = 128;        // pretokens whose cache entries are fetched before the first is needed
    static constexpr size_t kMarks = 512;        // short texts that are looked up together
    static constexpr uint32_t kElsewhere = 15;   // in place of a count
    static constexpr size_t kWindow = Lanes::kLongest;
    static constexpr int kValidBits = 12;

    // What a pretoken becomes: up to four ids, their count less one in the top bits of the first, or kElsewhere there,
    // then the place and the number of ids in `spill_`.
    struct Slot {
        uint32_t ids[ShortCache::kIds];
    };
    struct Batch {
        size_t size, missed;
        bool grown;  // by a pretoken of uncommon length
        const uint32_t* stops;  // where they begin, and where the last ends
        uint32_t own_stops[kBatch + 2];
        ShortKey keys[kBatch];
        const ShortLine* lines[kBatch];  // where the short cache may have them; until it is written to
        Slot slots[kBatch];
        uint32_t long_ones[kBatch + 1], misses[kBatch];
        Lanes::Job jobs[kBatch];
        Lanes lanes;
    };
    // Where texts that stand side by side end, and how many ids each became.
    struct Marks {
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

    void seed();
    void trim();
    size_t cut(Batch& batch, const uint8_t* text, const uint32_t* ends, size_t count) const;
    void ask(Batch& batch, const uint8_t* text, size_t n);
    template <bool marked>
    size_t emit_found(const Batch& batch, const uint8_t* text, size_t n, IdBuffer& out, Marks* marks);
    const uint32_t* find(const Batch& batch, size_t i, const uint8_t* text, size_t n);
    void find_rest(Batch& batch, size_t from, const uint8_t* text, size_t n);
    void merge_missed(Batch& batch, const uint8_t* text, size_t n);
    void finish(Batch& batch, size_t i, const uint8_t* text, size_t n, const uint32_t* ids, size_t count);
    void spill(Slot& slot, const uint32_t* ids, size_t count);
    void emit_rest(const Batch& batch, size_t from, IdBuffer& out, Marks* marks);
    void look_up(const uint8_t* text, size_t n, const uint32_t* stops, size_t count, bool plain, IdBuffer& out,
                 Marks* marks);
    void merge(const uint8_t* p, size_t n);
    void merge_windows(const uint8_t* p, size_t n, IdBuffer& out);
    bool valid_pair(uint32_t left, uint32_t right);

    // Lines for `count` keys at a load of a half at most; the cache grows fourfold where text brings as many again.
    static int table_bits(size_t count) {
        int bits = 9;
        while ((size_t{1} << bits) < count) bits++;
        return bits;
    }

    const Vocab& vocab_;
    ShortCache short_;
    MiddleCache middle_;
    LongCache long_;
    std::unique_ptr<Batch> batch_;
    IdBuffer spill_, whole_;
    std::vector<uint8_t> joined_;  // short texts side by side
    std::vector<uint32_t> stops_, parts_;
    std::vector<uint64_t> valid_;  // left << 22 | right << 1 | whether the two may stand side by side
};

inline Coder::Coder(const Vocab& vocab)
    : vocab_(vocab), short_(table_bits(vocab.size())), middle_(7), long_(6), batch_(new Batch) {
    batch_->grown = false;
    seed();
}

// Most pretokens are one token; those need no encoding even once. Ranks stand for frequency, so of tokens that fall
// into one place the lower ones stay.
inline void Coder::seed() {
    constexpr uint32_t kStep = 64;
    ShortKey keys[kStep];
    uint32_t ids[kStep];
    for (uint32_t token = static_cast<uint32_t>(vocab_.size()); token > 0;) {
        uint32_t group = 0;
        while (token > 0 && group < kStep) {
            Span s = vocab_.bytes_of_token(--token);
            // Bytes that no text has mean something else in a key.
            if (s.size > ShortKey::kBytes || !vocab_.is_piece(token) || *std::max_element(s.data, s.data + s.size) >= 0xFE) continue;
            keys[group] = short_key(s.data, s.size, vocab_.readable(s));
            short_.prefetch(keys[group]);
            ids[group++] = vocab_.external(token);
        }
        for (uint32_t i = 0; i < group; i++) short_.store(keys[i], &ids[i], 1);
    }
}

inline void Coder::encode_prefix(Pattern pattern, const uint8_t* text, size_t n, size_t stop, IdBuffer& out) {
    if (n >= 0xFFFFFFFFu) throw std::invalid_argument("text: at most 4 GB in one call");
    if (stops_.empty()) stops_.resize(kScanned + 1);
    Scanner::Function scan = scanner(pattern);
    for (size_t pos = 0; pos < stop;) {
        stops_[0] = static_cast<uint32_t>(pos);
        size_t count = scan(text, n, pos, stops_.data() + 1, kScanned);
        while (pos > stop && count && stops_[count] > stop) count--;
        look_up(text, n, stops_.data(), count, true, out, nullptr);
    }
}

inline void Coder::encode_pieces(const uint8_t* text, size_t n, const uint32_t* ends, size_t count, size_t start,
                                 IdBuffer& out) {
    if (stops_.empty()) stops_.resize(kScanned + 1);
    stops_[0] = static_cast<uint32_t>(start);
    for (size_t done = 0; done < count;) {
        size_t some = std::min(count - done, kScanned);
        std::copy_n(ends + done, some, stops_.data() + 1);
        look_up(text, n, stops_.data(), some, false, out, nullptr);
        stops_[0] = stops_[some];
        done += some;
    }
}

inline void Coder::encode_many(Pattern pattern, const Span* texts, size_t count, IdBuffer& out, IdBuffer& counts) {
    if (stops_.empty()) stops_.resize(kScanned + 1);
    if (joined_.empty()) joined_.resize(kScanned);
    Scanner::Function scan = scanner(pattern);
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
        size_t size = 0, pieces = 0;
        for (; i < count && marks.size < kMarks && texts[i].size <= std::min(kScanned / 4, kScanned - size); i++) {
            std::copy_n(texts[i].data, texts[i].size, joined_.data() + size);
            size_t pos = size;
            size += texts[i].size;
            while (pos < size) pieces += scan(joined_.data(), size, pos, stops_.data() + 1 + pieces, kScanned - pieces);
            marks.ends[marks.size++] = static_cast<uint32_t>(size);
        }
        stops_[0] = 0;
        look_up(joined_.data(), size, stops_.data(), pieces, true, out, &marks);
        marks.pass(size, out.size());
    }
}

// Whether two characters of three bytes may stand side by side in text[begin, end).
inline bool is_wide(const uint8_t* text, size_t begin, size_t end) {
    uint8_t highest = 0;
    for (size_t i = begin; i + 3 < end; i++) highest = std::max(highest, std::min(text[i], text[i + 3]));
    return highest >= 0xE0;
}

// Appends the ids of the `count` pretokens that end at stops[1], stops[2], …, the first of which begins at stops[0];
// `plain`: none is empty.
inline void Coder::look_up(const uint8_t* text, size_t n, const uint32_t* stops, size_t count, bool plain, IdBuffer& out,
                           Marks* marks) {
    if (!count) return;
    Batch& batch = *batch_;
    uint32_t start = stops[0];
    for (size_t done = 0; done < count; start = batch.stops[batch.size]) {
        size_t next = std::min(kBatch, count - done);
        if (plain && start == stops[done] && !is_wide(text, start, stops[done + next])) {
            batch.stops = stops + done;
            batch.size = next;
            done += next;
        } else {
            batch.own_stops[0] = start;
            batch.stops = batch.own_stops;
            done += cut(batch, text, stops + 1 + done, count - done);
        }
        ask(batch, text, n);
        size_t found = marks ? emit_found<true>(batch, text, n, out, marks) : emit_found<false>(batch, text, n, out, marks);
        if (found == batch.size) continue;
        find_rest(batch, found, text, n);
        merge_missed(batch, text, n);
        emit_rest(batch, found, out, marks);
        if (std::exchange(batch.grown, false)) trim();
    }
}

// A pretoken of megabytes leaves nothing of its size behind.
inline void Coder::trim() {
    constexpr size_t kKept = size_t{1} << 18;
    spill_.reset(kKept);
    whole_.reset(kKept);
    if (parts_.capacity() > kKept) std::vector<uint32_t>().swap(parts_);
}

// Fills the batch with pretokens from own_stops[0] on, cut between characters of three bytes that no token joins. Returns
// how many of the `ends` are in it to the last byte.
inline size_t Coder::cut(Batch& batch, const uint8_t* text, const uint32_t* ends, size_t count) const {
    const Joints& joints = vocab_.joints();
    size_t size = 0, next = 0, at = batch.own_stops[0];
    while (size < kBatch && next < count) {
        size_t begin = at, end = ends[next];
        // Whether the last two characters may have three bytes each: a cut is worth looking for.
        if (end >= at + 6 && text[end - 1] >= 0x80 && text[end - 3] >= 0xE0 && text[end - 6] >= 0xE0) {
            uint32_t last = 0;
            while (at + 3 <= end && size < kBatch) {
                uint8_t lead = text[at];
                if (lead >= 0xE0 && lead < 0xF0) {
                    uint32_t point = (lead & 15u) << 12 | (text[at + 1] & 63u) << 6 | (text[at + 2] & 63u);
                    batch.own_stops[size + 1] = static_cast<uint32_t>(at);
                    size += last && !joints.joined(last, point);
                    last = point;
                    at += 3;
                } else {
                    last = 0;
                    at += lead < 0x80 ? 1 : lead < 0xE0 ? 2 : 4;
                }
            }
            if (size == kBatch) break;
        }
        batch.own_stops[size + 1] = static_cast<uint32_t>(end);
        size += end != begin;
        at = end;
        next++;
    }
    batch.size = size;
    return next;
}

// The keys of the batch; asks for their places in the caches.
inline void Coder::ask(Batch& batch, const uint8_t* text, size_t n) {
    const uint32_t* stops = batch.stops;
    ShortKey* keys = batch.keys;
    const ShortLine** lines = batch.lines;
    size_t size = batch.size, longs = 0, at = stops[0];
    const ShortCache::Place place = short_.place();
    for (size_t i = 0; i < size; i++) {
        size_t next = stops[i + 1], length = next - at;
        batch.long_ones[longs] = static_cast<uint32_t>(i);
        longs += length > ShortKey::kBytes;
        ShortKey key = short_key(text + at, length, n - at);
        const ShortLine* line = place.line(key);
        keys[i] = key;
        lines[i] = line;
        fetch(line);
        at = next;
    }
    for (size_t k = 0; k < longs; k++) {
        size_t i = batch.long_ones[k], begin = stops[i], length = stops[i + 1] - begin;
        if (length <= MiddleCache::Key::kBytes)
            middle_.prefetch(MiddleCache::Key::of(text + begin, length, n - begin));
        else if (length <= LongCache::Key::kBytes)
            long_.prefetch(LongCache::Key::of(text + begin, length, n - begin));
    }
}

// The ids of pretoken i, which is not in its line of the short cache, or null. What has more ids than fit beside a key of
// its length is held by the next larger cache.
inline const uint32_t* Coder::find(const Batch& batch, size_t i, const uint8_t* text, size_t n) {
    size_t start = batch.stops[i], length = batch.stops[i + 1] - start;
    const uint32_t* ids = nullptr;
    if (length <= ShortKey::kBytes) {
        ids = short_.find_next_door(batch.keys[i]);
        if (ids || !short_.passed_on(batch.keys[i])) return ids;
    }
    if (length <= MiddleCache::Key::kBytes) {
        MiddleCache::Key key = MiddleCache::Key::of(text + start, length, n - start);
        ids = middle_.find(key);
        if (ids || !middle_.passed_on(key)) return ids;
    }
    return length <= LongCache::Key::kBytes ? long_.find(LongCache::Key::of(text + start, length, n - start)) : nullptr;
}

// Appends the ids of the batch up to the first pretoken that no cache holds, and returns its place.
template <bool marked>
size_t Coder::emit_found(const Batch& batch, const uint8_t* text, size_t n, IdBuffer& out, Marks* marks) {
    uint32_t* first = out.room(LongCache::kIds * batch.size);
    uint32_t* to = first;
    size_t i = 0, size = batch.size, before = out.size();
    for (; i < size; i++) {
        if constexpr (marked) marks->pass(batch.stops[i], before + static_cast<size_t>(to - first));
        const uint32_t* ids = probe(batch.lines[i], batch.keys[i]);
        if (ids) [[likely]] {
            to = put(ids, to);
            continue;
        }
        ids = find(batch, i, text, n);
        if (!ids) break;
        uint32_t count = (ids[0] >> kCountShift) + 1;
        std::copy_n(ids, count, to);
        to[0] &= kIdMask;
        to += count;
    }
    out.add(static_cast<size_t>(to - first));
    return i;
}

// Looks up what the batch holds from `from` on; what no cache holds goes to the list of the missed.
inline void Coder::find_rest(Batch& batch, size_t from, const uint8_t* text, size_t n) {
    size_t missed = 0;
    spill_.resize(0);
    for (size_t i = from; i < batch.size; i++) {
        if (const uint32_t* ids = probe(batch.lines[i], batch.keys[i])) {
            std::memcpy(&batch.slots[i], ids, sizeof(Slot));
        } else if ((ids = find(batch, i, text, n))) {
            size_t count = (ids[0] >> kCountShift) + 1;
            spill(batch.slots[i], ids, count);
            spill_.data()[spill_.size() - count] &= kIdMask;
        } else {
            batch.misses[missed++] = static_cast<uint32_t>(i);
        }
    }
    batch.missed = missed;
}

inline void Coder::merge_missed(Batch& batch, const uint8_t* text, size_t n) {
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
inline void Coder::finish(Batch& batch, size_t i, const uint8_t* text, size_t n, const uint32_t* ids, size_t count) {
    size_t start = batch.stops[i], length = batch.stops[i + 1] - start;
    if (count <= ShortCache::kIds) {
        std::copy_n(ids, count, batch.slots[i].ids);
        batch.slots[i].ids[0] |= static_cast<uint32_t>(count - 1) << kCountShift;
    } else {
        spill(batch.slots[i], ids, count);
    }
    if (length <= ShortKey::kBytes) {
        if (count <= ShortCache::kIds) return short_.store(batch.keys[i], ids, count);
        short_.pass_on(batch.keys[i]);
    }
    if (length <= MiddleCache::Key::kBytes) {
        MiddleCache::Key key = MiddleCache::Key::of(text + start, length, n - start);
        if (count <= MiddleCache::kIds) return middle_.store(key, ids, count);
        middle_.pass_on(key);
    }
    if (length <= LongCache::Key::kBytes && count <= LongCache::kIds)
        long_.store(LongCache::Key::of(text + start, length, n - start), ids, count);
}

inline void Coder::spill(Slot& slot, const uint32_t* ids, size_t count) {
    slot.ids[0] = kElsewhere << kCountShift;
    slot.ids[1] = static_cast<uint32_t>(spill_.size());
    slot.ids[2] = static_cast<uint32_t>(count);
    std::copy_n(ids, count, spill_.room(count));
    spill_.add(count);
}

// Appends the ids of the batch from `from` on and, with `marks`, tells where texts end among them.
inline void Coder::emit_rest(const Batch& batch, size_t from, IdBuffer& out, Marks* marks) {
    uint32_t* to = out.room(ShortCache::kIds * batch.size + spill_.size());
    for (size_t i = from; i < batch.size; i++) {
        if (marks) marks->pass(batch.stops[i], out.size() + static_cast<size_t>(to - out.end()));
        const Slot& slot = batch.slots[i];
        uint32_t count = (slot.ids[0] >> kCountShift) + 1;
        if (count <= ShortCache::kIds) {
            to = put(slot.ids, to);
        } else {
            to = std::copy_n(spill_.data() + slot.ids[1], slot.ids[2], to);
        }
    }
    out.add(static_cast<size_t>(to - out.end()));
}

}  // namespace fastformer::bpe::FASTFORMER_ISA
