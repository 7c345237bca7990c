#include "bpe/unicode.h"

#include <cstring>

#include "bpe/unicode_data.h"

namespace fastformer::unicode {

namespace {

uint8_t flags_of_category(uint8_t category) {
    switch (category) {
        case Lu:
        case Lt: return kLetter | kUpper;
        case Ll: return kLetter | kLower;
        case Lm:
        case Lo: return kLetter;
        case Mn:
        case Mc:
        case Me: return kMark;
        case Nd:
        case Nl:
        case No: return kNumber;
        case Pc:
        case Pd:
        case Ps:
        case Pe:
        case Pi:
        case Pf:
        case Po:
        case Sm:
        case Sc:
        case Sk:
        case So: return kPunctSymbol;
        default: return 0;
    }
}

}  // namespace

Tables::Tables() {
    constexpr size_t kRuns = sizeof(kCategoryRuns) / sizeof(kCategoryRuns[0]);
    // Blocks of one content share a row; 128 rows hold what Unicode 16 needs with room to spare.
    size_t rows = 0, run = 0;
    auto end_of = [](size_t r) { return r + 1 < kRuns ? kCategoryRuns[r + 1] >> 5 : 0x110000u; };
    auto flags = [](size_t r) { return flags_of_category(kCategoryRuns[r] & 31); };
    uint8_t block[256];
    uint8_t uniform[256];  // the row of the block that holds one value all over, by value
    std::memset(uniform, 255, sizeof uniform);
    for (uint32_t base = 0; base < 0x110000; base += 256) {
        while (end_of(run) <= base) run++;
        bool one_run = end_of(run) >= base + 256;
        for (uint32_t i = base; i < base + 256;) {
            while (end_of(run) <= i) run++;
            uint32_t end = end_of(run) < base + 256 ? end_of(run) : base + 256;
            std::memset(block + (i - base), flags(run), end - i);
            i = end;
        }
        if (base < 0x10000) {
            std::memcpy(low + base, block, 256);
            continue;
        }
        size_t row = one_run ? uniform[block[0]] : 255;
        if (row == 255) {
            row = rows++;
            std::memcpy(high[row], block, 256);
            if (one_run) uniform[block[0]] = static_cast<uint8_t>(row);
        }
        high_index[(base >> 8) - 256] = static_cast<uint8_t>(row);
    }
    for (uint32_t point : kWhiteSpace) low[point] |= kSpace;
    low[size_t{'\r'}] |= kNewline;
    low[size_t{'\n'}] |= kNewline;
}

const Tables& tables() {
    static const Tables instance;
    return instance;
}

const Tables& deepseek_tables() {
    static const Tables instance = [] {
        Tables t = tables();
        for (uint8_t& flags : t.low) flags &= static_cast<uint8_t>(~(kUpper | kLower));
        for (auto& row : t.high)
            for (uint8_t& flags : row) flags &= static_cast<uint8_t>(~(kUpper | kLower));
        auto mark = [&](uint32_t point) { t.low[point] |= kUpper; };
        for (uint32_t point = 0x3040; point <= 0x30FF; point++) mark(point);
        for (uint32_t point = 0x4E00; point <= 0x9FA5; point++) mark(point);
        return t;
    }();
    return instance;
}

size_t valid_utf8_prefix(const uint8_t* p, size_t n) {
    size_t i = 0;
    auto tail = [&](size_t k) { return i + k < n && (p[i + k] & 0xC0) == 0x80; };
    while (i < n) {
        if (i + 8 <= n) {
            uint64_t word;
            std::memcpy(&word, p + i, 8);
            if ((word & 0x8080808080808080u) == 0) {
                i += 8;
                continue;
            }
        }
        uint8_t a = p[i];
        if (a < 0x80) {
            i += 1;
        } else if (a >= 0xC2 && a < 0xE0) {
            if (!tail(1)) return i;
            i += 2;
        } else if (a >= 0xE0 && a < 0xF0) {
            if (!tail(1) || !tail(2)) return i;
            if (a == 0xE0 && p[i + 1] < 0xA0) return i;   // overlong
            if (a == 0xED && p[i + 1] >= 0xA0) return i;  // surrogate
            i += 3;
        } else if (a >= 0xF0 && a < 0xF5) {
            if (!tail(1) || !tail(2) || !tail(3)) return i;
            if (a == 0xF0 && p[i + 1] < 0x90) return i;   // overlong
            if (a == 0xF4 && p[i + 1] >= 0x90) return i;  // past U+10FFFF
            i += 4;
        } else {
            return i;
        }
    }
    return n;
}

}  // namespace fastformer::unicode
