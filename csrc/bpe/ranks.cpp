#include "bpe/ranks.h"

#include <array>
#include <stdexcept>
#include <string>

namespace fastformer::bpe {

namespace {

constexpr std::array<int8_t, 256> kDigits = [] {
    std::array<int8_t, 256> digits{};
    digits.fill(-1);
    const char* alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int8_t i = 0; i < 64; i++) digits[static_cast<uint8_t>(alphabet[i])] = i;
    return digits;
}();

// Writes what p[0, n) stands for to `to`, where there is room for 3 n / 4 bytes; returns its end, or null if that is no
// base64 of RFC 4648, with its padding.
uint8_t* decode(const uint8_t* p, size_t n, uint8_t* to) {
    if (n == 0 || n % 4 != 0) return nullptr;
    size_t padding = p[n - 1] != '=' ? 0 : p[n - 2] != '=' ? 1 : 2;
    int wrong = 0;
    for (size_t i = 0; i < n; i += 4) {
        size_t given = i + 4 == n ? 4 - padding : 4;
        uint32_t word = 0;
        for (size_t k = 0; k < 4; k++) {
            int digit = k < given ? kDigits[p[i + k]] : 0;
            wrong |= digit;
            word = word << 6 | (static_cast<uint32_t>(digit) & 63);
        }
        for (size_t k = 0; k < 3; k++) to[k] = static_cast<uint8_t>(word >> (16 - 8 * k));
        to += given - 1;
    }
    return wrong < 0 ? nullptr : to;
}

bool is_blank(uint8_t c) { return c == ' ' || c == '\t'; }

}  // namespace

Ranks read_ranks(const uint8_t* data, size_t n) {
    Ranks out;
    out.bytes.resize(n);  // more than base64 can stand for
    uint8_t* to = out.bytes.data();
    size_t line = 0;
    for (size_t i = 0; i < n;) {
        line++;
        const void* newline = std::memchr(data + i, '\n', n - i);
        size_t end = newline ? static_cast<size_t>(static_cast<const uint8_t*>(newline) - data) : n, next = end + 1;
        if (end > i && data[end - 1] == '\r') end--;
        size_t start = i, token = i;
        i = next;
        if (start == end) continue;
        while (token < end && !is_blank(data[token])) token++;
        size_t rank = token;
        while (rank < end && is_blank(data[rank])) rank++;
        uint64_t id = 0;
        size_t digit = rank;
        for (; digit < end && data[digit] >= '0' && data[digit] <= '9' && id < uint64_t{1} << 50; digit++)
            id = 10 * id + data[digit] - '0';
        uint8_t* to_end = decode(data + start, token - start, to);
        if (digit < end || digit == rank || !to_end)
            throw std::invalid_argument("line " + std::to_string(line) + ": needs a base64 token and a rank");
        if (id > kMaxId)
            throw std::invalid_argument("line " + std::to_string(line) + ": has the id " + std::to_string(id) +
                                        "; ids are integers from 0 to " + std::to_string(kMaxId));
        out.tokens.push_back({to, static_cast<size_t>(to_end - to)});
        to = to_end;
        out.ids.push_back(static_cast<uint32_t>(id));
    }
    return out;
}

}  // namespace fastformer::bpe
