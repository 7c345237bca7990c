#include "bpe/image.h"

#include <algorithm>
#include <stdexcept>

namespace fastformer::bpe {

namespace {

constexpr uint64_t kVersion = 0x0001'4D49'4550'4246;  // "FBPEIM" and a number, to be raised with every change

uint64_t checksum(const uint8_t* p, size_t n) {
    uint64_t h[4] = {n, 1, 2, 3}, word;
    size_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (size_t k = 0; k < 4; k++) {
            std::memcpy(&word, p + i + 8 * k, 8);
            h[k] = (h[k] ^ word) * 0x9E3779B97F4A7C15u;
            h[k] ^= h[k] >> 29;
        }
    uint64_t all = hash_bytes(p + i, n - i);
    for (uint64_t lane : h) all = (all ^ lane) * 0xD6E8FEB86659FD93u + 1;
    return all;
}

struct Writer {
    std::vector<uint8_t> bytes;
    void number(uint64_t x) { append(&x, sizeof x); }
    template <typename V>
    void array(const V& v) {
        number(v.size());
        append(v.data(), v.size() * sizeof v[0]);
        bytes.resize((bytes.size() + 7) / 8 * 8);
    }
    void append(const void* from, size_t size) {
        size_t before = bytes.size();
        bytes.resize(before + size);
        if (size) std::memcpy(bytes.data() + before, from, size);
    }
};

[[noreturn]] void damaged() { throw std::invalid_argument("the vocabulary's image is damaged or cut off"); }

struct Reader {
    const uint8_t* p;
    const uint8_t* end;
    uint64_t number() {
        if (end - p < 8) damaged();
        uint64_t x;
        std::memcpy(&x, p, 8);
        p += 8;
        return x;
    }
    template <typename V>
    void array(V& v) {
        uint64_t count = number(), left = static_cast<uint64_t>(end - p);
        if (count > left / sizeof v[0]) damaged();
        v.resize(count);
        if (count) std::memcpy(static_cast<void*>(v.data()), p, count * sizeof v[0]);
        size_t bytes = (count * sizeof v[0] + 7) / 8 * 8;
        if (bytes > left) damaged();
        p += bytes;
    }
};

}  // namespace

// The vocabulary's own parts, to read and to write.
struct Image {
    template <typename V, typename Visit>
    static void visit(V& vocab, Visit visit) {
        visit(vocab.blob_);
        visit(vocab.by_id_);
        visit(vocab.external_);
        visit(vocab.left_);
        visit(vocab.right_);
        visit(vocab.index_);
        visit(vocab.pairs_.slots_);
        visit(vocab.pairs_.filter_);
    }
    static uint64_t flags(const Vocab& v) { return v.whole_piece_; }
    // Every number that is used as an index must be one.
    static bool sound(const Vocab& v) {
        size_t n = v.external_.size(), slots = v.pairs_.slots_.size();
        auto power = [](size_t x) { return x && (x & (x - 1)) == 0; };
        if (n < 256 || n >= kMaxTokens || v.left_.size() != n || v.right_.size() != n || v.by_id_.size() > kMaxId + size_t{1} ||
            !power(slots) || slots < 16 || slots <= n || v.pairs_.filter_.size() != slots / 8 || !power(v.index_.size()) ||
            v.index_.size() <= n)
            return false;
        size_t bad = 0, used = 0, indexed = 0;
        for (const auto& place : v.by_id_) bad += place.length > v.blob_.size() || place.offset > v.blob_.size() - place.length;
        if (bad) return false;
        for (uint32_t k = 0; k < n; k++) bad += v.external_[k] >= v.by_id_.size();
        if (bad) return false;
        for (uint32_t k = 0; k < n; k++) {
            bad += v.by_id_[v.external_[k]].length == 0;
            bad += k < 256 && (v.by_id_[v.external_[k]].length != 1);
            bad += (v.left_[k] == kNone) != (v.right_[k] == kNone);
            bad += v.left_[k] != kNone && (v.left_[k] >= n || v.right_[k] >= n || k < 256);
            if (bad) return false;
            auto length = [&](uint32_t token) { return size_t{v.by_id_[v.external_[token]].length}; };
            if (v.left_[k] != kNone && length(v.left_[k]) + length(v.right_[k]) != length(k)) return false;
        }
        for (uint64_t slot : v.pairs_.slots_) {
            if (slot == ~uint64_t{0}) continue;
            used++;
            bad += (slot & (kMaxTokens - 1)) >= n;
        }
        for (uint64_t entry : v.index_) {
            if (entry == ~uint64_t{0}) continue;
            indexed++;
            bad += static_cast<uint32_t>(entry) >= n;
        }
        return !bad && used < slots && indexed < v.index_.size();
    }
    static void finish(Vocab& v, uint64_t flags) {
        v.whole_piece_ = flags & 1;
        v.pairs_.adopt();
        v.longest_ = 1;
        for (uint32_t k = 256; k < v.size(); k++) {
            v.longest_ = std::max<size_t>(v.longest_, v.by_id_[v.external_[k]].length);
            if (v.left_[k] < 256 && v.right_[k] < 256) v.pairs_.of_bytes_[v.left_[k] << 8 | v.right_[k]] = k;
        }
        v.derive();
    }
};

std::vector<uint8_t> write_image(const Vocab& vocab) {
    Writer to;
    to.number(kVersion);
    to.number(0);
    to.number(Image::flags(vocab));
    Image::visit(vocab, [&](const auto& part) { to.array(part); });
    uint64_t sum = checksum(to.bytes.data() + 16, to.bytes.size() - 16);
    std::memcpy(to.bytes.data() + 8, &sum, 8);
    return std::move(to.bytes);
}

void read_image(Vocab& vocab, const uint8_t* data, size_t n) {
    Reader from{data, data + n};
    if (from.number() != kVersion)
        throw std::invalid_argument("the vocabulary's image is of another version; make it anew from the tokenizer's file");
    if (from.number() != checksum(data + 16, n - 16)) damaged();
    uint64_t flags = from.number();
    Image::visit(vocab, [&](auto& part) { from.array(part); });
    if (from.p != from.end || !Image::sound(vocab)) damaged();
    Image::finish(vocab, flags);
}

}  // namespace fastformer::bpe
