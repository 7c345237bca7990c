// One pretoken at a time, of any length.
#pragma once
#include "bpe/coder.h"

namespace fastformer::bpe::FASTFORMER_ISA {

inline size_t Coder::encode_piece(const uint8_t* p, size_t n, IdBuffer& out) {
    if (!vocab_.monotone() || !vocab_.all_reachable()) {
        uint32_t whole = vocab_.find_piece(p, n);
        if (whole != kNone) {
            out.push(vocab_.external(whole));
            return 1;
        }
    }
    size_t before = out.size();
    if (vocab_.monotone() && n > kWindow) {
        merge_windows(p, n, out);
    } else {
        merge(p, n);
        std::copy(parts_.begin(), parts_.end(), out.room(parts_.size()));
        out.add(parts_.size());
    }
    for (size_t i = before; i < out.size(); i++) out.data()[i] = vocab_.external(out.data()[i]);
    return out.size() - before;
}

// Leaves the tokens of p[0, n) in `parts_`.
inline void Coder::merge(const uint8_t* p, size_t n) {
    if (n > Lanes::kLongest) {
        parts_.assign(p, p + n);
        merge_heap(vocab_.pairs(), parts_, [](uint32_t token) { return token; });
        return;
    }
    Lanes::Job job{p, static_cast<uint32_t>(n), 0};
    work_->lanes.run(vocab_.pairs(), &job, 1, [&](uint32_t, const uint32_t* tokens, size_t count) {
        parts_.assign(tokens, tokens + count);
    });
}

// The encoding is the one sequence of tokens of which every two neighbours stand side by side in an encoding of their
// own (shown for GitHub's `bpe` crate by Hendrik van Antwerpen and Alexander Neubeck). So a window is merged for
// itself, what lies in its last eighth is left to the next one, and only the seam needs a look; where the two do not
// fit, tokens are taken back and a window twice as long goes over the place. How far a merge can reach is bounded by
// the vocabulary (Berglund and van der Merwe, Formalizing BPE Tokenization, 2023), so time is linear. Appends the
// tokens' internal numbers.
inline void Coder::merge_windows(const uint8_t* p, size_t n, IdBuffer& out) {
    size_t bottom = out.size(), window = kWindow, pos = 0;
    size_t fitted = 0, patience = 16;  // windows in a row that fitted, after how many a smaller one is tried
    const uint8_t* merged = nullptr;  // what `parts_` are the tokens of, `size` bytes
    for (size_t size = 0; pos < n;) {
        size_t fresh = std::min(window, n - pos);
        // Long runs repeat themselves.
        if (!merged || fresh != size || std::memcmp(merged, p + pos, fresh) != 0) merge(p + pos, fresh);
        merged = p + pos;
        size = fresh;
        if (out.size() > bottom && !valid_pair(out.data()[out.size() - 1], parts_[0])) {
            for (size_t back = 0; back < window / 2 && out.size() > bottom;) {
                size_t length = vocab_.length(out.data()[out.size() - 1]);
                back += length;
                pos -= length;
                out.resize(out.size() - 1);
            }
            window *= 2;
            fitted = 0;
            patience *= 2;
            continue;
        }
        size_t settled = pos + size < n ? size - size / 8 : size, end = 0, count = 0;
        uint32_t* to = out.room(parts_.size());
        while (count < parts_.size()) {
            size_t next = end + vocab_.length(parts_[count]);
            if (next > settled && count) break;
            to[count] = parts_[count];
            count++;
            end = next;
        }
        out.add(count);
        pos += end;
        if (++fitted == patience && window > kWindow) {
            window /= 2;
            fitted = 0;
        }
    }
}

// Whether the encoding of the two tokens' bytes is the two tokens: undo merges from the latest on, on either side of
// the seam, and see whether one across the seam would have come before.
inline bool Coder::valid_pair(uint32_t left, uint32_t right) {
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

}  // namespace fastformer::bpe::FASTFORMER_ISA
