#include "bpe/joints.h"

namespace fastformer::bpe {

namespace {

bool leads_three(uint8_t byte) { return byte >= 0xE0 && byte < 0xF0; }
bool follows(uint8_t byte) { return (byte & 0xC0) == 0x80; }
uint32_t point(const uint8_t* p) { return (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u); }

}  // namespace

Joints::Joints(const Vocab& vocab) : pairs_(size_t{1} << (kPairBits - 6)), parts_(1 << 10) {
    for (uint32_t token = 256; token < vocab.size(); token++) {
        Span s = vocab.bytes_of_token(token);
        for (size_t i = 1; i < s.size; i++) {
            if (!leads_three(s.data[i]) || !follows(s.data[i - 1])) continue;
            size_t tail = 1;  // bytes before i that follow a lead byte
            while (tail < i && follows(s.data[i - tail - 1])) tail++;
            bool begins_within = tail == i;
            // Valid text has a character of three bytes to the left of i only where the token says nothing else.
            if (begins_within ? tail > 2 : tail != 2 || !leads_three(s.data[i - 3])) continue;
            uint32_t low = s.data[i - 1] & 63;
            if (!begins_within && i + 3 <= s.size) {
                uint64_t h = pair_hash(point(s.data + i - 3), point(s.data + i));
                pairs_[h >> 6] |= uint64_t{1} << (h & 63);
                continue;
            }
            uint32_t first = (s.data[i] & 15u) << 6, second = i + 1 < s.size ? s.data[i + 1] & 63u : 0;
            for (uint32_t x = second; x < (i + 1 < s.size ? second + 1 : 64); x++) {
                uint32_t part = low << 10 | first | x;
                parts_[part >> 6] |= uint64_t{1} << (part & 63);
            }
        }
    }
}

}  // namespace fastformer::bpe
