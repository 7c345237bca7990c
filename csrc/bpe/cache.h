// What pretokens became: keys of up to 15 bytes with 4 ids in entries of 32 bytes, of up to 31 bytes with 8 ids in
// entries of 64, of up to 63 bytes with 16 ids in entries of 128. Two entries may hold a key; of the two, the one
// stored earlier goes first.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>

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

// Up to 8 * words - 1 bytes, zero-padded, and the length in the last byte.
template <size_t words>
struct Key {
    static constexpr size_t kBytes = 8 * words - 1;
    uint64_t word[words];

    bool operator==(const Key& o) const {
        uint64_t difference = 0;
        for (size_t i = 0; i < words; i++) difference |= word[i] ^ o.word[i];
        return difference == 0;
    }
    bool empty() const { return word[words - 1] == 0; }  // no pretoken has length 0
    // No pretoken's key.
    static Key none() {
        Key k{};
        k.word[words - 1] = ~uint64_t{0};
        return k;
    }
    // The key of the n bytes at p, of which at least `readable` may be read.
    static Key of(const uint8_t* p, size_t n, size_t readable) {
        Key k;
        if (readable < 8 * words) {
            std::memset(&k, 0, sizeof k);
            std::memcpy(&k, p, n);
        } else {
            std::memcpy(&k, p, sizeof k);
            // kOnes[8 * words - n] and what follows it have ones for the first n bytes.
            for (size_t i = 0; i < words; i++) {
                uint64_t mask;
                std::memcpy(&mask, kOnes.data() + 8 * words - n + 8 * i, 8);
                k.word[i] &= mask;
            }
        }
        k.word[words - 1] |= static_cast<uint64_t>(n) << 56;
        return k;
    }
    uint64_t hash() const {
        uint64_t h = mix(word[0] ^ 0xA0761D6478BD642Fu, word[1] ^ 0xE7037ED1A0B428DBu);
        for (size_t i = 2; i < words; i += 2) h = mix(h ^ word[i], word[i + 1] ^ 0x8EBC6AF09C88C6E3u);
        return h;
    }

  private:
    static constexpr std::array<uint8_t, 16 * words> kOnes = [] {
        std::array<uint8_t, 16 * words> ones{};
        for (size_t i = 0; i < 8 * words; i++) ones[i] = 0xFF;
        return ones;
    }();
};

// Grows with use up to `1 << largest` entries, so that small texts touch little memory and any text a bounded amount.
template <size_t words, size_t max_ids, int largest>
class Cache {
  public:
    using Key = bpe::Key<words>;
    static constexpr size_t kIds = max_ids;
    struct Entry {
        Key key;
        uint32_t ids[max_ids];
    };

    // Begins with `1 << bits` entries, or the most there may be.
    explicit Cache(int bits) { allocate(std::min(bits, largest)); }
    void prefetch(uint64_t hash) const {
        const Entry* e = line(hash);
        fetch(e);
        if constexpr (sizeof(Entry) > 32) fetch(e + 1);
    }

    // The two entries that may hold a key.
    const Entry* line(uint64_t hash) const { return entries_.get() + (hash >> shift_ << 1); }
    // The ids of a key, or null.
    const uint32_t* find(const Key& key, uint64_t hash) const {
        const Entry* e = line(hash);
        // Which of the two it is nobody can predict, whether it is one of them nearly always.
        bool first = e[0].key == key, second = e[1].key == key;
        const uint32_t* ids = first ? e[0].ids : e[1].ids;
        return first | second ? ids : nullptr;
    }
    // Stores 1 to max_ids ids.
    void store(const Key& key, uint64_t hash, const uint32_t* ids, size_t count) {
        if (used_ * 2 > capacity_ && capacity_ < size_t{1} << largest) grow();
        Entry* e = entries_.get() + (hash >> shift_ << 1);
        if (e[0].key == key) return;
        used_ += e[1].key.empty();
        e[1] = e[0];
        e[0].key = key;
        std::copy_n(ids, count, e[0].ids);
        std::fill(e[0].ids + count, e[0].ids + max_ids, 0);
        e[0].ids[0] |= static_cast<uint32_t>(count - 1) << kCountShift;
    }

  private:
    struct Free {
        void operator()(Entry* p) const { free_table(p); }
    };

    void allocate(int bits) {
        size_t bytes = sizeof(Entry) << bits;
        void* memory = allocate_table(bytes);
        std::memset(memory, 0, bytes);
        entries_.reset(static_cast<Entry*>(memory));
        capacity_ = size_t{1} << bits;
        shift_ = 64 - (bits - 1);
        used_ = 0;
        bits_ = bits;
    }
    void grow() {
        std::unique_ptr<Entry, Free> old = std::move(entries_);
        size_t count = capacity_;
        allocate(std::min(bits_ + 2, largest));
        for (size_t i = 0; i < count; i++) {
            const Entry& from = old.get()[i];
            if (from.key.empty()) continue;
            Entry* e = entries_.get() + (from.key.hash() >> shift_ << 1);
            used_ += e[1].key.empty();
            e[1] = e[0];
            e[0] = from;
        }
    }

    std::unique_ptr<Entry, Free> entries_;
    size_t used_ = 0, capacity_ = 0;
    int shift_ = 63, bits_ = 0;
};

using ShortCache = Cache<2, 4, 20>;    // 32 bytes each, 32 MB
using MiddleCache = Cache<4, 8, 18>;   // 64 bytes each, 16 MB
using LongCache = Cache<8, 16, 16>;    // 128 bytes each, 8 MB

}  // namespace fastformer::bpe
