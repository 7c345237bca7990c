// What pretokens became: keys of up to 15 bytes with 4 ids in lines of 64 bytes, of up to 31 bytes with 8 ids in lines of
// 128, of up to 63 bytes with 16 ids in lines of 256. A line has two places. Where both are taken, a key goes into the
// other line of the pair, which processors fetch along; where that is full too, the key stored first is dropped.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "bpe/memory.h"

namespace fastformer::bpe {

inline constexpr uint32_t kCountShift = 28;  // the count of ids less one stands in the top bits of the first
inline constexpr uint32_t kIdMask = (1u << kCountShift) - 1;

// Both halves of a product, folded: every bit of the factors reaches the top bits.
inline uint64_t mix(uint64_t a, uint64_t b) {
#if defined(__SIZEOF_INT128__)
    __extension__ using Wide = unsigned __int128;
    Wide product = static_cast<Wide>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
#else
    uint64_t h = a * 0x9E3779B97F4A7C15u;
    h = (h ^ h >> 32 ^ b) * 0xD6E8FEB86659FD93u;
    return (h ^ h >> 32) * 0x9E3779B97F4A7C15u;
#endif
}

// Up to 8 * words - 1 bytes, and 0xFF, which no UTF-8 holds, behind them. What is longer has no 0xFF in the end, so no
// entry's key.
template <size_t words>
struct Key {
    static constexpr size_t kBytes = 8 * words - 1;
    uint64_t word[words];

    bool operator==(const Key& o) const {
        uint64_t difference = 0;
        for (size_t i = 0; i < words; i++) difference |= word[i] ^ o.word[i];
        return difference == 0;
    }
    // The key of the n bytes at p, of which at least `readable` may be read.
    static Key of(const uint8_t* p, size_t n, size_t readable) {
        Key k;
        if (readable < 8 * words) {
            std::memset(&k, 0xFF, sizeof k);
            std::memcpy(&k, p, n);
        } else {
            std::memcpy(&k, p, sizeof k);
            // kOnes[8 * words - n] and what follows it have zeros for the first n bytes.
            const uint8_t* ones = kOnes.data() + 8 * words - std::min(n, 8 * words);
            for (size_t i = 0; i < words; i++) {
                uint64_t mask;
                std::memcpy(&mask, ones + 8 * i, 8);
                k.word[i] |= mask;
            }
        }
        return k;
    }

  private:
    static constexpr std::array<uint8_t, 16 * words> kOnes = [] {
        std::array<uint8_t, 16 * words> ones{};
        for (size_t i = 8 * words; i < 16 * words; i++) ones[i] = 0xFF;
        return ones;
    }();
};

struct MixHash {
    template <size_t words>
    static uint64_t of(const Key<words>& key) {
        uint64_t h = mix(key.word[0] ^ 0xA0761D6478BD642Fu, key.word[1] ^ 0xE7037ED1A0B428DBu);
        for (size_t i = 2; i < words; i += 2) h = mix(h ^ key.word[i], key.word[i + 1] ^ 0x8EBC6AF09C88C6E3u);
        return h;
    }
};

// Two keys, and up to max_ids ids of each: the count less one stands in the top bits of the first.
template <size_t words, size_t max_ids>
struct alignas(64) Line {
    Key<words> keys[2];
    uint32_t ids[2][max_ids];
};
using ShortKey = Key<2>;
using ShortLine = Line<2, 4>;

// Grows with use up to `1 << largest` lines, so that small texts touch little memory and any text a bounded amount.
template <size_t words, size_t max_ids, int largest, typename Hash>
class Cache {
  public:
    using Key = bpe::Key<words>;
    using Line = bpe::Line<words, max_ids>;
    static constexpr size_t kIds = max_ids;

    // Begins with `1 << bits` lines, at least 64.
    explicit Cache(int bits) { allocate(std::clamp(bits, 6, largest)); }

    // Where the lines are, until the next key is stored: for loops that keep it in registers.
    struct Place {
        const char* first;
        uint64_t mask;
        // The line that may hold a key.
        const Line* line(const Key& key) const { return reinterpret_cast<const Line*>(first + (Hash::of(key) & mask)); }
    };
    Place place() const { return {reinterpret_cast<const char*>(lines_.get()), mask_}; }
    const Line* line(const Key& key) const { return place().line(key); }
    void prefetch(const Key& key) const {
        const char* line = reinterpret_cast<const char*>(this->line(key));
        for (size_t k = 0; k < sizeof(Line); k += 64) fetch(line + k);
    }
    // The ids of a key, or null.
    const uint32_t* find(const Key& key) {
        const Line* at = line(key);
        // Which of the two it is nobody can predict, whether it is one of them nearly always.
        bool first = at->keys[0] == key, second = at->keys[1] == key;
        const uint32_t* ids = at->ids[first ? 0 : 1];
        return (first | second) ? ids : find_next_door(key);
    }
    // The same for a key that is not in its own line, into which it moves.
    const uint32_t* find_next_door(const Key& key) {
        size_t offset = Hash::of(key) & mask_;
        if (!get(overflowed_, offset)) return nullptr;
        Line &home = at(offset), &door = at(offset ^ sizeof(Line));
        for (size_t k = 0; k < 2; k++) {
            if (!(door.keys[k] == key)) continue;
            std::swap(door.keys[k], home.keys[1]);
            std::swap_ranges(door.ids[k], door.ids[k] + max_ids, home.ids[1]);
            return home.ids[1];
        }
        return nullptr;
    }
    // Stores 1 to max_ids ids.
    void store(const Key& key, const uint32_t* ids, size_t count) {
        if (find(key)) return;
        if (used_ > capacity_ && capacity_ < size_t{1} << largest) grow();
        uint32_t all[max_ids] = {};
        std::copy_n(ids, count, all);
        all[0] |= static_cast<uint32_t>(count - 1) << kCountShift;
        insert(key, all);
    }
    // Notes that a key has more ids than fit, and whether one of the key's line may be such.
    void pass_on(const Key& key) { set(passed_on_, Hash::of(key) & mask_); }
    bool passed_on(const Key& key) const { return get(passed_on_, Hash::of(key) & mask_); }

  private:
    // In an empty place's key every byte is this one, of which no UTF-8 has any.
    static constexpr uint8_t kEmpty = 0xFE;
    static bool empty(const Key& key) { return key.word[0] == 0x0101010101010101u * kEmpty; }
    struct Free {
        size_t bytes = 0;
        void operator()(Line* p) const { free_table(p, bytes); }
    };

    // One bit for each line.
    using Bits = std::vector<uint64_t>;
    static bool get(const Bits& bits, size_t offset) {
        size_t i = offset / sizeof(Line);
        return bits[i / 64] >> (i % 64) & 1;
    }
    static void set(Bits& bits, size_t offset) {
        size_t i = offset / sizeof(Line);
        bits[i / 64] |= uint64_t{1} << (i % 64);
    }
    Line& at(size_t offset) { return *reinterpret_cast<Line*>(reinterpret_cast<char*>(lines_.get()) + offset); }

    void allocate(int bits) {
        size_t bytes = sizeof(Line) << bits;
        void* memory = allocate_table(bytes);
        std::memset(memory, kEmpty, bytes);
        lines_ = {static_cast<Line*>(memory), Free{bytes}};
        capacity_ = size_t{1} << bits;
        mask_ = bytes - sizeof(Line);
        used_ = 0;
        bits_ = bits;
        overflowed_.assign(capacity_ / 64, 0);
        // Lines that once were one had one bit.
        size_t before = passed_on_.size();
        passed_on_.resize(capacity_ / 64);
        for (size_t i = before; before && i < passed_on_.size(); i++) passed_on_[i] = passed_on_[i % before];
    }
    void insert(const Key& key, const uint32_t* ids) {
        size_t offset = Hash::of(key) & mask_;
        Line* to = &at(offset);
        if (!empty(to->keys[1])) {
            Line& door = at(offset ^ sizeof(Line));
            if (empty(door.keys[1])) {
                set(overflowed_, offset);
                to = &door;
            }
        }
        used_ += empty(to->keys[1]);
        to->keys[1] = to->keys[0];
        to->keys[0] = key;
        std::copy_n(to->ids[0], max_ids, to->ids[1]);
        std::copy_n(ids, max_ids, to->ids[0]);
    }
    void grow() {
        std::unique_ptr<Line, Free> old = std::move(lines_);
        size_t count = capacity_;
        allocate(std::min(bits_ + 2, largest));
        for (size_t i = 0; i < count; i++)
            for (size_t k = 2; k-- > 0;)
                if (const Line& from = old.get()[i]; !empty(from.keys[k])) insert(from.keys[k], from.ids[k]);
    }

    std::unique_ptr<Line, Free> lines_;
    size_t used_ = 0, capacity_ = 0;
    uint64_t mask_ = 0;
    int bits_ = 0;
    Bits overflowed_, passed_on_;
};

using MiddleCache = Cache<4, 8, 17, MixHash>;   // 16 MB
using LongCache = Cache<8, 16, 15, MixHash>;    // 8 MB

}  // namespace fastformer::bpe
