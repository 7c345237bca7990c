// Pretokens to ids: the caches are asked for a batch of them, so that memory has time to answer, then looked at; what none
// of them holds is merged.
#pragma once
#include "bpe/coder.h"

namespace fastformer::bpe::FASTFORMER_ISA {

// Appends the ids of the `count` pretokens that end at stops[1], stops[2], …, the first of which begins at stops[0];
// `plain`: none is empty.
inline void Coder::look_up(const uint8_t* text, size_t n, const uint32_t* stops, size_t count, bool plain, IdBuffer& out,
                           Marks* marks) {
    if (!count) return;
    Batch& batch = work_->batch;
    Stops left{stops, count, 0, stops[0], plain};
    for (take(batch, text, left); batch.size; take(batch, text, left)) {
        ask(batch, text, n);
        size_t found = marks ? emit_found<true>(batch, text, n, out, marks) : emit_found<false>(batch, text, n, out, marks);
        if (found == batch.size) continue;
        find_rest(batch, found, text, n);
        merge_missed(batch, text, n);
        emit_rest(batch, found, out, marks);
        if (std::exchange(work_->grown, false)) trim();
    }
}

// Whether two characters of three bytes may stand side by side in text[begin, end).
inline bool is_wide(const uint8_t* text, size_t begin, size_t end) {
    uint8_t highest = 0;
    for (size_t i = begin; i + 3 < end; i++) highest = std::max(highest, std::min(text[i], text[i + 3]));
    return highest >= 0xE0;
}

// Fills the batch with the next pretokens; leaves it empty where there are none.
inline void Coder::take(Batch& batch, const uint8_t* text, Stops& left) const {
    size_t next = std::min(kBatch, left.count - left.done);
    const uint32_t* stops = left.stops + left.done;
    // A look at the whole of a few pretokens costs more than one at each.
    if (next >= kFew && left.plain && left.start == stops[0] && !is_wide(text, left.start, stops[next])) {
        batch.stops = stops;
        batch.size = next;
        left.done += next;
    } else {
        batch.own_stops[0] = left.start;
        batch.stops = batch.own_stops;
        left.done += cut(batch, text, stops + 1, left.count - left.done);
    }
    left.start = batch.stops[batch.size];
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
                if ((lead & 0xF0) == 0xE0) [[likely]] {
                    uint32_t point = (lead & 15u) << 12 | (text[at + 1] & 63u) << 6 | (text[at + 2] & 63u);
                    batch.own_stops[size + 1] = static_cast<uint32_t>(at);
                    size += static_cast<size_t>(last != 0) & static_cast<size_t>(!joints.joined(last, point));
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

// Makes the keys of the batch and asks for their places in the caches.
inline void Coder::ask(Batch& batch, const uint8_t* text, size_t n) const {
    const uint32_t* stops = batch.stops;
    ShortKey* keys = batch.keys;
    const ShortLine** lines = batch.lines;
    const ShortCache::Place place = short_.place();
    size_t size = batch.size, longs = 0, at = stops[0];
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
    size_t before = out.size(), size = batch.size, i = 0;
    [[maybe_unused]] size_t end = marked ? marks->end() : 0;
    for (; i < size; i++) {
        // A loop without a call, so that all it needs stays in registers.
        for (; i < size; i++) {
            if constexpr (marked)
                if (batch.stops[i] >= end) [[unlikely]] {
                    marks->pass(batch.stops[i], before + static_cast<size_t>(to - first));
                    end = marks->end();
                }
            const uint32_t* ids = probe(batch.lines[i], batch.keys[i]);
            if (!ids) [[unlikely]] break;
            to = put(ids, to);
        }
        if (i == size) break;
        const uint32_t* ids = find(batch, i, text, n);
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
inline void Coder::find_rest(const Batch& batch, size_t from, const uint8_t* text, size_t n) {
    size_t missed = 0;
    spill_.resize(0);
    for (size_t i = from; i < batch.size; i++) {
        if (const uint32_t* ids = probe(batch.lines[i], batch.keys[i])) {
            std::memcpy(&work_->slots[i], ids, sizeof(Slot));
        } else if ((ids = find(batch, i, text, n))) {
            size_t count = (ids[0] >> kCountShift) + 1;
            spill(work_->slots[i], ids, count);
            spill_.data()[spill_.size() - count] &= kIdMask;
        } else {
            work_->misses[missed++] = static_cast<uint32_t>(i);
        }
    }
    work_->missed = missed;
}

inline void Coder::merge_missed(const Batch& batch, const uint8_t* text, size_t n) {
    size_t jobs = 0;
    bool ask_whole = !vocab_.monotone() || !vocab_.all_reachable();
    for (size_t k = 0; k < work_->missed; k++) {
        uint32_t i = work_->misses[k], start = batch.stops[i], length = batch.stops[i + 1] - start;
        uint32_t whole = ask_whole ? vocab_.find_piece(text + start, length) : kNone;
        if (whole != kNone) {
            uint32_t id = vocab_.external(whole);
            finish(batch, i, text, n, &id, 1);
        } else if (length <= Lanes::kLongest) {
            work_->jobs[jobs++] = {text + start, length, i};
        } else {
            whole_.resize(0);
            encode_piece(text + start, length, whole_);
            finish(batch, i, text, n, whole_.data(), whole_.size());
            work_->grown |= length > kScanned;
        }
    }
    work_->lanes.run(vocab_.pairs(), work_->jobs, jobs, [&](uint32_t i, uint32_t* tokens, size_t count) {
        for (size_t k = 0; k < count; k++) tokens[k] = vocab_.external(tokens[k]);
        finish(batch, i, text, n, tokens, count);
    });
}

// Notes what pretoken i became, here and in the cache that can hold it.
inline void Coder::finish(const Batch& batch, size_t i, const uint8_t* text, size_t n, const uint32_t* ids, size_t count) {
    size_t start = batch.stops[i], length = batch.stops[i + 1] - start;
    if (count <= ShortCache::kIds) {
        std::copy_n(ids, count, work_->slots[i].ids);
        work_->slots[i].ids[0] |= static_cast<uint32_t>(count - 1) << kCountShift;
    } else {
        spill(work_->slots[i], ids, count);
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
        const Slot& slot = work_->slots[i];
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
