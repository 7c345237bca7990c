#include "bpe/encoder.h"

#include <algorithm>
#include <stdexcept>

#include "bpe/merge.h"

namespace fastformer::bpe {

void Encoder::encode_prefix(Pattern pattern, const uint8_t* text, size_t n, size_t stop, IdBuffer& out) {
    if (n >= 0xFFFFFFFFu) throw std::invalid_argument("text: at most 4 GB in one call");
    constexpr size_t kBatch = 4096;
    ends_.resize(kBatch);
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
    if (!count) return;
    out.room(ends[count - 1] - start);  // a byte gives at most one id
    for (size_t i = 0; i < count; start = ends[i++]) {
        size_t length = ends[i] - start;
        if (length == 0) continue;
        if (length > kKeyBytes) {
            encode_piece(text + start, length, out);
            continue;
        }
        Key key = Cache::key(text + start, length, n - start);
        Entry& entry = cache_.entry(key);
        if (entry.key == key) {
            uint32_t* to = out.room(4);
            uint32_t id = entry.ids[0];
            to[0] = id & Cache::kIdMask;
            to[1] = entry.ids[1];
            to[2] = entry.ids[2];
            to[3] = entry.ids[3];
            out.add(id >> Cache::kCountShift);
            continue;
        }
        size_t made = encode_piece(text + start, length, out);
        if (made > 4) continue;
        entry.key = key;
        std::copy_n(out.data() + out.size() - made, made, entry.ids);
        entry.ids[0] |= static_cast<uint32_t>(made) << Cache::kCountShift;
    }
}

size_t Encoder::encode_piece(const uint8_t* p, size_t n, IdBuffer& out) {
    uint32_t whole = vocab_.find_piece(p, n);
    if (whole != kNone) {
        out.push(vocab_.external(whole));
        return 1;
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

}  // namespace fastformer::bpe
