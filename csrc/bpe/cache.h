// What pretokens of up to 15 bytes became: 32-byte entries, one probe each, the newer replaces the older.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace fastformer::bpe {

// Up to 15 bytes, zero-padded, and the length in the last byte.
struct Key {
    uint64_t low, high;
    bool operator==(const Key& o) const { return low == o.low && high == o.high; }
};

inline constexpr size_t kKeyBytes = 15;

struct Entry {
    Key key;           // all zero: empty, as no pretoken has length 0
    uint32_t ids[4];   // the count of ids stands in the top bits of the first
};

class Cache {
  public:
    static constexpr int kBits = 20;  // 32 MB, touched only as far as it is used
    static constexpr uint32_t kCountShift = 29;
    static constexpr uint32_t kIdMask = (1u << kCountShift) - 1;

    // The key of the n <= 15 bytes at p, of which at least `readable` may be read.
    static Key key(const uint8_t* p, size_t n, size_t readable) {
        alignas(16) uint8_t bytes[16] = {};
        if (readable >= 16) {
            std::memcpy(bytes, p, 16);
            Key k;
            std::memcpy(&k, bytes, 16);
            uint64_t low_bits = n >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * n)) - 1;
            uint64_t high_bits = n <= 8 ? 0 : (uint64_t{1} << (8 * (n - 8))) - 1;
            return {k.low & low_bits, (k.high & high_bits) | static_cast<uint64_t>(n) << 56};
        }
        std::memcpy(bytes, p, n);
        bytes[15] = static_cast<uint8_t>(n);
        Key k;
        std::memcpy(&k, bytes, 16);
        return k;
    }
    Entry& entry(const Key& k) {
        if (!entries_) entries_.reset(static_cast<Entry*>(std::calloc(size_t{1} << kBits, sizeof(Entry))));
        if (!entries_) throw std::bad_alloc();
        uint64_t h = (k.low ^ (k.high * 0x9E3779B97F4A7C15u)) * 0xD6E8FEB86659FD93u;
        return entries_.get()[(h ^ h << 27) >> (64 - kBits)];
    }

  private:
    struct Free {
        void operator()(Entry* p) const { std::free(p); }
    };
    std::unique_ptr<Entry, Free> entries_;
};

}  // namespace fastformer::bpe
