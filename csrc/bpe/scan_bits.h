// The boundaries of a whole window by arithmetic on bit maps, 64 bytes of text in a word: whether a pretoken begins at
// a character follows from the classes of its neighbours nearly everywhere. The bytes of a character carry its class,
// so "the character before" is a shift by one; `tail` tells the bytes that begin none. Words that hold what does not
// follow so (has_hard), and the end of the window, are walked pretoken by pretoken by the functions of scan_scalar.h.
#pragma once
#include "bpe/scan_mapped.h"

namespace fastformer::bpe::FASTFORMER_ISA::mapped {

template <Pattern pattern>
class Boundaries {
  public:
    Boundaries(const Reader<pattern>& reader, size_t size) : x_(reader), w_(reader.w), size_(size) {}

    // Writes the ends of the pretokens of the window, which begins at one; returns how many, the last in `last`.
    size_t find(uint32_t* ends, size_t& last) {
        size_t words = (size_ + 63) / 64;
        std::memset(starts_, 0, (words + 1) * sizeof starts_[0]);
        starts_[0] = 1;
        // The last word is walked where the text goes on behind the window.
        bool whole = w_.end == x_.n;
        size_t known = whole ? words : words - 1;
        uint64_t keep = ~uint64_t{0};
        for (size_t i = 0; i < known;) {
            if (i + 1 < words ? word<false>(i, keep) : word<true>(i, keep & (~uint64_t{0} >> (-size_ & 63)))) {
                keep = ~uint64_t{0};
                i++;
                continue;
            }
            size_t from = trusted(64 * i), pos = walk(from, 64 * (i + 1)) - w_.base;
            if (pos >= size_) return flatten(ends, last = w_.base + pos, words);
            // What stands before a boundary has no say in what comes after it.
            i = pos / 64;
            keep = ~uint64_t{0} << (pos & 63);
            before_ = {};
        }
        if (whole) return flatten(ends, last = w_.end, words);
        size_t begin = 64 * (words - 1);
        return flatten(ends, last = walk(trusted(begin), size_), words);
    }

  private:
    static constexpr bool kIsGpt2 = pattern == Pattern::kGpt2, kIsO200k = pattern == Pattern::kO200k;
    static constexpr size_t kDigits = pattern == Pattern::kQwen2 ? 1 : kIsGpt2 ? 0 : 3;  // in a pretoken; 0: any number

    // The word before, in so far as the next one asks.
    struct Before {
        uint64_t letter = 0, number = 0, space = 0, punct = 0, newline = 0, blank = 0, lower = 0, other = 0;
        uint64_t punct_start = 0, groups = 0, clear = 0;
        uint64_t in_character = 0, in_lines = 0;  // carries: a character that is a prefix, newlines that belong to one
    };

    static uint64_t shifted(uint64_t now, uint64_t before, int by = 1) { return now << by | before >> (64 - by); }

    // Marks the starts in word i, of the bits in `keep` only. False where they do not follow from bits. `ends`: the text
    // ends in this word.
    template <bool ends>
    bool word(size_t i, uint64_t keep) {
        uint64_t space = map(kSpaceMap, i) & keep, punct = map(kPunctMap, i) & keep, tail = w_.tail[i] & keep;
        uint64_t newline = w_.newline[i] & keep, blank = w_.blank[i] & keep;
        uint64_t letter, number, upper = 0, lower = 0, other = 0;
        if constexpr (kIsO200k) {
            uint64_t not_lower = map(0, i) & keep, not_upper = map(1, i) & keep, word = not_lower | not_upper;
            if (word & punct) return false;  // marks are both
            letter = word;
            number = ~(space | punct | letter) & keep;
            upper = letter & ~not_upper;
            lower = letter & ~not_lower;
            other = letter & ~upper & ~lower;
            if (upper & shifted(other, before_.other)) return false;
        } else {
            letter = map(0, i) & keep;
            number = map(3, i) & keep;
        }
        if (space & tail) return false;
        if (kDigits > 1 && (number & tail)) return false;
        uint64_t next_space = space >> 1 | map(kSpaceMap, i + 1) << 63;
        // White space that ends the text is one pretoken.
        if constexpr (ends) next_space |= uint64_t{1} << ((size_ - 1) & 63);
        uint64_t after_letter = shifted(letter, before_.letter), after_punct = shifted(punct, before_.punct);
        uint64_t after_blank = shifted(blank, before_.blank), after_space = shifted(space, before_.space);
        uint64_t other_space = space & ~newline;
        uint64_t punct_start = punct & ~tail & ~after_punct & ~after_blank;
        uint64_t starts = punct_start | (space & ~after_space);
        uint64_t in_character = 0, in_lines = 0, groups = 0, clear = 0;
        if constexpr (kIsGpt2) {
            uint64_t after_number = shifted(number, before_.number);
            starts |= ((letter & ~after_letter) | (number & ~after_number)) & ~tail & ~after_blank;
            starts |= space & ~next_space;
        } else {
            // A character in front of letters, where it is a pretoken's first, belongs to them.
            uint64_t follow = shifted(punct_start, before_.punct_start) | before_.in_character;
            uint64_t past = tail + follow;
            in_character = past < follow;
            uint64_t after_other = shifted(other_space, before_.space & ~before_.newline);
            starts |= letter & ~tail & ~after_letter & ~after_other & ~(past & ~tail);
            if constexpr (kIsO200k) starts |= upper & ~tail & shifted(lower, before_.lower);
            groups = numbers(number, tail);
            starts |= groups;
            // Newlines after punctuation belong to it; what white space follows them is a new pretoken.
            uint64_t first = newline & (after_punct | before_.in_lines), past_lines = newline + first;
            in_lines = past_lines < newline;
            uint64_t absorbed = newline & ~past_lines;
            uint64_t behind = (past_lines & ~newline) | (before_.in_lines & ~newline);
            if (kIsO200k && (behind & w_.slash[i])) return false;
            starts &= ~absorbed;
            starts |= behind & space;
            // After the last newline of white space a new pretoken begins, and another at its last character.
            uint64_t indent = other_space & shifted(newline, before_.newline);
            for (uint64_t line = newline & after_other; line; line &= line - 1) {
                uint64_t below = ~other_space & ((line & -line) - 1);
                int begin = 64 - std::countl_zero(below);
                if (begin == 0 && (before_.space & ~before_.newline) >> 63) return false;
                indent &= ~(uint64_t{1} << begin);
            }
            starts |= indent | (other_space & ~next_space);
        }
        uint64_t quotes = punct_start & w_.quote[i] & (letter >> 1 | map(0, i + 1) << 63);
        if constexpr (kIsO200k) quotes = w_.quote[i] & after_letter & keep;
        starts &= ~before_.clear;
        starts_[i] |= starts;
        if (quotes) clear = contractions(i, quotes);
        // One by one: a copy of the whole would read in wide words what was just written in narrow ones.
        before_.letter = letter, before_.number = number, before_.space = space, before_.punct = punct;
        before_.newline = newline, before_.blank = blank, before_.lower = lower, before_.other = other;
        before_.punct_start = punct_start, before_.groups = groups, before_.clear = clear;
        before_.in_character = in_character, before_.in_lines = in_lines;
        return true;
    }

    // Where pretokens of digits begin.
    uint64_t numbers(uint64_t number, uint64_t tail) const {
        if constexpr (kDigits == 1) return number & ~tail;
        uint64_t one = shifted(number, before_.number), first = number & ~one;
        uint64_t fourth = number & one & shifted(number, before_.number, 2) & shifted(number, before_.number, 3);
        uint64_t groups = first | (before_.groups >> 61 & fourth);
        if (fourth)
            for (uint64_t more; (more = groups << 3 & fourth & ~groups);) groups |= more;
        return groups;
    }

    // Contractions at the apostrophes of word i. They end where no other rule sees a start, and for GPT-2 and o200k
    // begin or hold one that is none; returns which in the next word are none.
    uint64_t contractions(size_t i, uint64_t quotes) {
        uint64_t clear = 0;
        for (; quotes; quotes &= quotes - 1) {
            size_t at = 64 * i + static_cast<size_t>(std::countr_zero(quotes));
            if (kIsO200k && at == contraction_end_) continue;
            size_t length = scalar::contraction<!kIsGpt2>(x_, w_.base + at);
            if (!length) continue;
            contraction_end_ = at + length;
            if constexpr (kIsGpt2 || kIsO200k)
                for (size_t k = kIsGpt2 ? at + 1 : at; k < at + length; k++) {
                    starts_[k / 64] &= ~(uint64_t{1} << (k & 63));
                    if (k / 64 > i) clear |= uint64_t{1} << (k & 63);
                }
            set(at + length);
        }
        return clear;
    }

    // The last start from which on to walk if the bits are known up to `limit`: white space and contractions look
    // ahead. Starts behind it are taken back.
    size_t trusted(size_t limit) {
        size_t at = limit > 4 ? limit - 4 : 0, space = limit;
        while (space > 0 && (map(kSpaceMap, (space - 1) / 64) >> ((space - 1) & 63) & 1)) space--;
        if (space < at) at = space;
        for (size_t i = at / 64;; i--) {
            uint64_t low = starts_[i];
            if (i == at / 64) low &= ~uint64_t{0} >> (63 - (at & 63));
            if (!low) {
                starts_[i] = 0;
                continue;
            }
            starts_[i] = low;
            for (size_t k = at / 64 + 1; k <= limit / 64; k++) starts_[k] = 0;
            return 64 * i + 63 - static_cast<size_t>(std::countl_zero(low));
        }
    }

    // From one start on to the first at or after `to`, in the window or not; returns where that is in the text.
    size_t walk(size_t from, size_t to) {
        size_t pos = w_.base + from;
        do {
            pos = scalar::next<pattern>(x_, pos);
            set(pos - w_.base);
        } while (pos < w_.base + to && pos < x_.n);
        return pos;
    }

    void set(size_t at) {
        if (at < size_) starts_[at / 64] |= uint64_t{1} << (at & 63);
    }

    size_t flatten(uint32_t* ends, size_t last, size_t words) {
        uint32_t* to = ends;
        starts_[0] &= ~uint64_t{1};
        // There is room for as many ends as the window has bytes.
        size_t i = 0;
        for (; i < size_ / 64; i++) to = places(starts_[i], static_cast<uint32_t>(w_.base + 64 * i), to);
        for (uint64_t bits = i < words ? starts_[i] : 0; bits; bits &= bits - 1)
            *to++ = static_cast<uint32_t>(w_.base + 64 * i) + static_cast<uint32_t>(std::countr_zero(bits));
        *to++ = static_cast<uint32_t>(last);
        return static_cast<size_t>(to - ends);
    }

    static constexpr size_t kPunctMap = kIsO200k ? 2 : 1, kSpaceMap = kIsO200k ? 3 : 2;
    uint64_t map(size_t set, size_t i) const { return w_.maps[set][i]; }

    const Reader<pattern>& x_;
    const Window& w_;
    size_t size_;
    Before before_;
    size_t contraction_end_ = 0;
    uint64_t starts_[kWords + 1];
};

// Texts too short for a window to pay.
inline constexpr size_t kScalar = 48;

template <Pattern pattern>
size_t scan(const uint8_t* text, size_t n, size_t& pos, uint32_t* ends, size_t capacity) {
    size_t count = 0, i = pos;
    if (n - i < kScalar) return scalar::scan<pattern>(text, n, pos, ends, capacity);
    thread_local Window window;
    const Tables& tables = pattern == Pattern::kDeepseek ? deepseek_tables() : unicode::tables();
    // A window may end in as many pretokens as it has bytes; the first always fits what callers give.
    while (i < n && (capacity - count >= kWindow || count == 0)) {
        size_t end = n - i > kWindow ? i + kWindow : n;
        if (end - i > capacity - count) end = i + (capacity - count);
        while (end < n && end > i && (text[end] & 0xC0) == 0x80) end--;
        window.base = i;
        window.end = end;
        classify<pattern>(tables, text + i, end - i, window);
        Reader<pattern> x{{text, n, tables}, window};
        if constexpr (pattern == Pattern::kDeepseek) {
            do {
                i = scalar::next<pattern>(x, i);
                ends[count++] = static_cast<uint32_t>(i);
            } while (i < end && count < capacity);
        } else {
            count += Boundaries<pattern>(x, end - i).find(ends + count, i);
        }
        if (count == capacity) break;
    }
    pos = i;
    return count;
}

}  // namespace fastformer::bpe::FASTFORMER_ISA::mapped
