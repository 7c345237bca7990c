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
    return (first | second) ? ids : nullptr;
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
    static constexpr size_t kFew = 8;            // pretokens that are looked at one by one
    static constexpr size_t kMarks = 512;        // short texts that are looked up together
    static constexpr size_t kAhead = 8;          // texts asked for before the first is copied
    static constexpr uint32_t kElsewhere = 15;   // in place of a count
    static constexpr size_t kWindow = Lanes::kLongest;
    static constexpr int kValidBits = 12;

    // What a pretoken becomes: up to four ids, their count less one in the top bits of the first, or kElsewhere there,
    // then the place and the number of ids in `spill_`.
    struct Slot {
        uint32_t ids[ShortCache::kIds];
    };
    struct Batch {
        size_t size;
        const uint32_t* stops;  // where they begin, and where the last ends
        uint32_t own_stops[kBatch + 2];
        ShortKey keys[kBatch];
        const ShortLine* lines[kBatch];  // where the short cache may have them, until it is written to
        uint32_t long_ones[kBatch + 1];  // those that it cannot have, and then anything
    };
    // What is done about the part of a batch that begins with a pretoken that no cache holds.
    struct Work {
        size_t missed;
        bool grown;  // by a pretoken of uncommon length
        Slot slots[kBatch];
        uint32_t misses[kBatch];
        Lanes::Job jobs[kBatch];
        Lanes lanes;
        Batch batch;
    };
    // Pretokens still to be looked up, from `start` on.
    struct Stops {
        const uint32_t* stops;
        size_t count, done;
        uint32_t start;
        bool plain;  // none is empty
    };
    // Where texts that stand side by side end, and how many ids each became.
    struct Marks {
        uint32_t ends[kMarks];
        size_t size, next, before;
        uint32_t* counts;

        // Where the next text ends.
        size_t end() const { return next < size ? ends[next] : ~size_t{0}; }
        // The text from `at` on comes after `ids` ids.
        void pass(size_t at, size_t ids) {
            for (; next < size && ends[next] <= at; next++) {
                counts[next] = static_cast<uint32_t>(ids - before);
                before = ids;
            }
        }
    };

    void seed();
    void trim();
    void take(Batch& batch, const uint8_t* text, Stops& left) const;
    size_t cut(Batch& batch, const uint8_t* text, const uint32_t* ends, size_t count) const;
    void ask(Batch& batch, const uint8_t* text, size_t n) const;
    template <bool marked>
    size_t emit_found(const Batch& batch, const uint8_t* text, size_t n, IdBuffer& out, Marks* marks);
    const uint32_t* find(const Batch& batch, size_t i, const uint8_t* text, size_t n);
    void find_rest(const Batch& batch, size_t from, const uint8_t* text, size_t n);
    void merge_missed(const Batch& batch, const uint8_t* text, size_t n);
    void finish(const Batch& batch, size_t i, const uint8_t* text, size_t n, const uint32_t* ids, size_t count);
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
    std::unique_ptr<Work> work_;
    IdBuffer spill_, whole_;
    std::vector<uint8_t> joined_;  // short texts side by side
    std::vector<uint32_t> stops_, parts_;
    std::vector<uint64_t> valid_;  // left << 22 | right << 1 | whether the two may stand side by side
};

inline Coder::Coder(const Vocab& vocab)
    : vocab_(vocab), short_(table_bits(vocab.size())), middle_(7), long_(6), work_(new Work) {
    work_->grown = false;
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
            if (s.size > ShortKey::kBytes || !vocab_.is_piece(token)) continue;
            // Bytes that no text has mean something else in a key.
            if (*std::max_element(s.data, s.data + s.size) >= 0xFE) continue;
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
        Marks marks;
        marks.size = marks.next = 0;
        marks.before = out.size();
        marks.counts = counts.room(kMarks);
        size_t size = 0, pieces = 0;
        for (; i < count && marks.size < kMarks && texts[i].size <= std::min(kScanned / 4, kScanned - size); i++) {
            if (i + kAhead < count) fetch(texts[i + kAhead].data);
            std::copy_n(texts[i].data, texts[i].size, joined_.data() + size);
            size_t pos = size;
            size += texts[i].size;
            while (pos < size) pieces += scan(joined_.data(), size, pos, stops_.data() + 1 + pieces, kScanned - pieces);
            marks.ends[marks.size++] = static_cast<uint32_t>(size);
        }
        stops_[0] = 0;
        look_up(joined_.data(), size, stops_.data(), pieces, true, out, &marks);
        marks.pass(size, out.size());
        counts.add(marks.size);
    }
}

// A pretoken of megabytes leaves nothing of its size behind.
inline void Coder::trim() {
    constexpr size_t kKept = size_t{1} << 18;
    spill_.reset(kKept);
    whole_.reset(kKept);
    if (parts_.capacity() > kKept) std::vector<uint32_t>().swap(parts_);
}

}  // namespace fastformer::bpe::FASTFORMER_ISA
