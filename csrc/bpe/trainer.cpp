#include "bpe/trainer.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <unordered_map>

#include "bpe/vocab.h"

namespace fastformer::bpe {

WordCounts::WordCounts() { rehash(1 << 12); }

void WordCounts::rehash(size_t capacity) {
    index_.assign(capacity, ~uint64_t{0});
    for (size_t w = 0; w < words_.size(); w++) {
        auto s = word(w);
        uint64_t h = hash_bytes(reinterpret_cast<const uint8_t*>(s.data()), s.size());
        size_t i = h & (capacity - 1);
        while (index_[i] != ~uint64_t{0}) i = (i + 1) & (capacity - 1);
        index_[i] = (h >> 32) << 32 | w;
    }
}

void WordCounts::add(const uint8_t* p, size_t n, int64_t count) {
    uint64_t h = hash_bytes(p, n);
    size_t mask = index_.size() - 1, i = h & mask;
    for (; index_[i] != ~uint64_t{0}; i = (i + 1) & mask) {
        if (index_[i] >> 32 != h >> 32) continue;
        Word& w = words_[static_cast<uint32_t>(index_[i])];
        if (w.length == n && std::memcmp(arena_.data() + w.offset, p, n) == 0) {
            w.count += count;
            return;
        }
    }
    if (words_.size() >= kNone) throw std::length_error("more than 4 billion distinct words");
    index_[i] = (h >> 32) << 32 | words_.size();
    words_.push_back({arena_.size(), static_cast<uint32_t>(n), count});
    arena_.append(reinterpret_cast<const char*>(p), n);
    if (words_.size() * 2 > index_.size()) rehash(index_.size() * 2);
}

void WordCounts::add_text(Pattern pattern, Isa isa, const uint8_t* text, size_t n) {
    if (n >= kNone) throw std::invalid_argument("text: at most 4 GB in one piece");
    ends_.resize(16384);
    Scanner::Function scan = Scanner::get(pattern, isa);
    for (size_t pos = 0; pos < n;) {
        size_t start = pos, count = scan(text, n, pos, ends_.data(), ends_.size());
        for (size_t i = 0; i < count; start = ends_[i++]) add(text + start, ends_[i] - start, 1);
    }
}

void WordCounts::merge(const WordCounts& other) {
    for (size_t i = 0; i < other.size(); i++) {
        auto s = other.word(i);
        add(reinterpret_cast<const uint8_t*>(s.data()), s.size(), other.count(i));
    }
}

namespace {

// The order of the bytes by their ByteLevel character: printable Latin-1 stands for itself, the others follow U+0100.
std::vector<uint8_t> byte_level_order() {
    std::vector<uint8_t> printable, rest;
    for (int b = 0; b < 256; b++)
        ((b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE ? printable : rest)
            .push_back(static_cast<uint8_t>(b));
    printable.insert(printable.end(), rest.begin(), rest.end());
    return printable;
}

// By pair: its signed count, and the list of words that the step `step` began for it.
class Pairs {
  public:
    struct Slot {
        uint64_t pair = kEmpty;
        int64_t count = 0;
        uint32_t list = 0, step = 0;
    };

    Pairs() : slots_(1 << 16) {}
    Slot& operator[](uint64_t pair) {
        if (used_ * 4 >= slots_.size() * 3) grow();
        Slot& s = find(pair);
        if (s.pair == kEmpty) {
            s.pair = pair;
            used_++;
        }
        return s;
    }

  private:
    static constexpr uint64_t kEmpty = ~uint64_t{0};
    Slot& find(uint64_t pair) {
        size_t mask = slots_.size() - 1;
        uint64_t h = pair * 0x9E3779B97F4A7C15u;
        size_t i = (h ^ h >> 32) & mask;
        while (slots_[i].pair != kEmpty && slots_[i].pair != pair) i = (i + 1) & mask;
        return slots_[i];
    }
    void grow() {
        std::vector<Slot> old(slots_.size() * 2);
        old.swap(slots_);
        for (const Slot& s : old)
            if (s.pair != kEmpty) find(s.pair) = s;
    }
    std::vector<Slot> slots_;
    size_t used_ = 0;
};

struct Candidate {
    int64_t count;
    uint64_t pair;
    uint32_t places;
    bool operator<(const Candidate& o) const { return count != o.count ? count < o.count : pair > o.pair; }
};

uint64_t pair_of(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) << 32 | b; }

class Learner {
  public:
    Learner(const WordCounts& words, const TrainOptions& options, TrainResult& result)
        : words_(words), options_(options), result_(result) {}

    void run(const std::function<bool(size_t)>& progress) {
        alphabet();
        split_words();
        count_pairs();
        while (size_ < options_.vocab_size && !queue_.empty()) {
            Candidate top = queue_.top();
            queue_.pop();
            int64_t now = pairs_[top.pair].count;
            if (top.count != now) {
                top.count = now;
                if (now > 0) queue_.push(top);
                continue;
            }
            if (top.count < 1 || top.count < options_.min_frequency) break;
            step(top);
            if ((result_.merges.size() & 255) == 0 && !progress(size_)) throw std::runtime_error("stopped");
        }
    }

  private:
    struct Place {
        size_t offset;
        uint32_t length;
    };

    void alphabet() {
        for (const std::string& s : options_.specials) {
            if (!s.empty()) known_.emplace(s, static_cast<uint32_t>(result_.tokens.size()));
            result_.tokens.push_back(s);
        }
        for (uint8_t byte : byte_level_order()) {
            std::string s(1, static_cast<char>(byte));
            auto [it, fresh] = known_.emplace(s, static_cast<uint32_t>(result_.tokens.size()));
            if (fresh) result_.tokens.push_back(s);
            byte_id_[byte] = it->second;
        }
        size_ = result_.tokens.size();
        length_.assign(size_, 1);
    }

    void split_words() {
        places_.reserve(words_.size());
        for (size_t w = 0; w < words_.size(); w++) {
            auto s = words_.word(w);
            places_.push_back({symbols_.size(), static_cast<uint32_t>(s.size())});
            for (char c : s) symbols_.push_back(byte_id_[static_cast<uint8_t>(c)]);
        }
    }

    void count_pairs() {
        for (uint32_t w = 0; w < places_.size(); w++) {
            const uint32_t* s = symbols_.data() + places_[w].offset;
            for (uint32_t i = 0; i + 1 < places_[w].length; i++) see(pair_of(s[i], s[i + 1]), w, words_.count(w));
        }
        offer();
    }

    // Counts a pair of word w, and remembers that it is there.
    void see(uint64_t pair, uint32_t w, int64_t count) {
        Pairs::Slot& slot = pairs_[pair];
        slot.count += count;
        if (slot.step != step_) {
            slot.step = step_;
            slot.list = static_cast<uint32_t>(lists_.size());
            lists_.emplace_back();
            seen_.push_back(pair);
        }
        auto& list = lists_[slot.list];
        if (list.empty() || list.back() != w) list.push_back(w);
    }

    // Puts the pairs that this step saw into the queue.
    void offer() {
        for (uint64_t pair : seen_) {
            const Pairs::Slot& slot = pairs_[pair];
            if (slot.count > 0) queue_.push({slot.count, pair, slot.list});
        }
        seen_.clear();
        step_++;
    }

    void step(const Candidate& top) {
        uint32_t a = static_cast<uint32_t>(top.pair >> 32), b = static_cast<uint32_t>(top.pair);
        std::string bytes = result_.tokens[a] + result_.tokens[b];
        auto [it, fresh] = known_.emplace(bytes, static_cast<uint32_t>(result_.tokens.size()));
        uint32_t made = it->second;
        if (fresh) {
            result_.tokens.push_back(bytes);
            length_.push_back(length_[a] + length_[b]);
            size_++;
        }
        result_.merges.push_back({a, b, made});
        uint32_t made_length = length_[a] + length_[b];

        std::vector<uint32_t> where = std::move(lists_[top.places]);
        lists_[top.places] = {};
        for (size_t k = 0; k < where.size(); k++) {
            // Words lie apart; the next ones are on their way while this one is rewritten.
            if (k + 12 < where.size()) fetch(&places_[where[k + 12]]);
            if (k + 4 < where.size()) fetch(symbols_.data() + places_[where[k + 4]].offset);
            uint32_t w = where[k];
            int64_t count = words_.count(w);
            uint32_t* s = symbols_.data() + places_[w].offset;
            uint32_t n = places_[w].length, out = 0;
            for (uint32_t i = 0; i < n; i++) {
                if (s[i] != a || i + 1 >= n || s[i + 1] != b) {
                    s[out++] = s[i];
                    continue;
                }
                if (out > 0) {
                    pairs_[pair_of(s[out - 1], a)].count -= count;
                    if (length_[s[out - 1]] + made_length < options_.max_token_length) see(pair_of(s[out - 1], made), w, count);
                }
                if (i + 2 < n) {
                    pairs_[pair_of(b, s[i + 2])].count -= count;
                    if (length_[s[i + 2]] + made_length < options_.max_token_length) see(pair_of(made, s[i + 2]), w, count);
                }
                s[out++] = made;
                i++;
            }
            places_[w].length = out;
        }
        offer();
    }

    const WordCounts& words_;
    const TrainOptions& options_;
    TrainResult& result_;
    std::unordered_map<std::string, uint32_t> known_;
    uint32_t byte_id_[256] = {};
    size_t size_ = 0;
    std::vector<uint32_t> length_;  // of each id, as the trainer of reference counts it: specials are 1 long
    std::vector<uint32_t> symbols_;
    std::vector<Place> places_;
    Pairs pairs_;
    std::vector<uint64_t> seen_;  // in this step
    uint32_t step_ = 1;
    std::vector<std::vector<uint32_t>> lists_;
    std::priority_queue<Candidate> queue_;
};

}  // namespace

TrainResult train(const WordCounts& words, const TrainOptions& options, const std::function<bool(size_t)>& progress) {
    TrainResult result;
    Learner(words, options, result).run(progress);
    return result;
}

}  // namespace fastformer::bpe
