#include "bpe/vocab.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <string>

#include "bpe/joints.h"
#include "bpe/merge.h"

namespace fastformer::bpe {

void PairTable::reserve(size_t count) {
    int bits = 4;
    while ((size_t{1} << bits) < count + count / 4) bits++;
    slots_.assign(size_t{1} << bits, kEmpty);
    filter_.assign((size_t{1} << bits) / 8, 0);
    of_bytes_.assign(65536, kNone);
    mask_ = slots_.size() - 1;
    shift_ = 64 - bits;
}

void PairTable::adopt() {
    of_bytes_.assign(65536, kNone);
    mask_ = slots_.size() - 1;
    shift_ = 64 - std::countr_zero(slots_.size());
}

void PairTable::insert(uint32_t left, uint32_t right, uint32_t merged) {
    uint64_t key = static_cast<uint64_t>(left) << 21 | right;
    size_t i = slot(key);
    while (slots_[i] != kEmpty && slots_[i] >> 21 != key) i = (i + 1) & mask_;
    slots_[i] = key << 21 | merged;
    if (left < 256 && right < 256) of_bytes_[left << 8 | right] = merged;
    uint64_t bit = (key * kHash) >> (shift_ - 3);
    filter_[bit >> 6] |= uint64_t{1} << (bit & 63);
}

uint32_t Vocab::find(const uint8_t* p, size_t n) const {
    uint64_t h = hash_bytes(p, n);
    size_t mask = index_.size() - 1;
    for (size_t i = h & mask;; i = (i + 1) & mask) {
        uint64_t entry = index_[i];
        if (entry == ~uint64_t{0}) return kNone;
        if (entry >> 32 != h >> 32) continue;
        uint32_t token = static_cast<uint32_t>(entry);
        Span s = bytes_of_token(token);
        if (s.size == n && std::memcmp(s.data, p, n) == 0) return token;
    }
}

void Vocab::add_special(uint32_t id, Span bytes) {
    if (id > kMaxId) throw std::invalid_argument("token id " + std::to_string(id) + " is above the limit of 268435455");
    if (id >= by_id_.size()) by_id_.resize(id + size_t{1}, {0, 0});
    if (by_id_[id].length) return;
    by_id_[id] = {static_cast<uint32_t>(blob_.size()), static_cast<uint32_t>(bytes.size)};
    blob_.insert(blob_.end(), bytes.data, bytes.data + bytes.size);
    if (!ids_are_dense()) {
        inline_.clear();
    } else if (!inline_.empty()) {
        inline_.resize(by_id_.size(), Inline{{}, 0});
        sizes_.resize(by_id_.size(), 0);
        put_inline(id);
    }
}

void Vocab::derive_inline() {
    if (!ids_are_dense()) return;
    inline_.assign(by_id_.size(), Inline{{}, 0});
    sizes_.assign(by_id_.size(), 0);
    for (uint32_t id = 0; id < by_id_.size(); id++)
        if (by_id_[id].length) put_inline(id);
}

void Vocab::put_inline(uint32_t id) {
    Span s = bytes_of(id);
    sizes_[id] = s.size <= sizeof Inline::bytes ? static_cast<uint8_t>(s.size) : kOutside;
    inline_[id].size = sizes_[id];
    if (sizes_[id] != kOutside) std::copy_n(s.data, s.size, inline_[id].bytes);
}

size_t Vocab::measure(const uint32_t* ids, size_t count, size_t& bad) const {
    size_t total = 0;
    if (inline_.empty()) {
        for (bad = 0; bad < count && bytes_of(ids[bad]).size; bad++) total += bytes_of(ids[bad]).size;
        return total;
    }
    for (size_t i = 0; i < count; i++) {
        uint8_t size = ids[i] < sizes_.size() ? sizes_[ids[i]] : 0;
        if (size == 0) {
            bad = i;
            return total;
        }
        total += size != kOutside ? size : by_id_[ids[i]].length;
    }
    bad = count;
    return total;
}

void Vocab::decode(const uint32_t* ids, size_t count, uint8_t* to, size_t size) const {
    const uint8_t* end = to + size;
    size_t i = 0;
    // All 16 bytes of an entry at a time, as long as they fit.
    for (; !inline_.empty() && i < count && end - to >= 16; i++) {
        const Inline& token = inline_[ids[i]];
        if (token.size == kOutside) {
            Span s = bytes_of(ids[i]);
            to = std::copy_n(s.data, s.size, to);
            continue;
        }
        std::memcpy(to, &token, sizeof token);
        to += token.size;
    }
    for (; i < count; i++) {
        Span s = bytes_of(ids[i]);
        to = std::copy_n(s.data, s.size, to);
    }
}

// Lays out the bytes and gives tokens[order[k]] the internal number k.
void Vocab::number_tokens(const std::vector<Span>& tokens, const std::vector<uint32_t>& order) {
    std::vector<uint32_t> external(order.size());
    for (size_t k = 0; k < order.size(); k++) external[k] = external_[order[k]];
    external_ = std::move(external);
    for (size_t k = 0; k < order.size(); k++) {
        const Span& s = tokens[order[k]];
        if (by_id_[external_[k]].length)
            throw std::invalid_argument("the vocabulary gives the id " + std::to_string(external_[k]) + " to two tokens");
        by_id_[external_[k]] = {static_cast<uint32_t>(blob_.size()), static_cast<uint32_t>(s.size)};
        blob_.insert(blob_.end(), s.data, s.data + s.size);
    }
}

void Vocab::index_bytes() {
    constexpr uint32_t kStep = 16;  // places asked for before the first is looked at
    size_t capacity = 16;
    while (capacity < 2 * size()) capacity *= 2;
    index_.assign(capacity, ~uint64_t{0});
    uint64_t hashes[kStep];
    for (uint32_t first = 0; first < size(); first += kStep) {
        uint32_t last = std::min<uint32_t>(first + kStep, static_cast<uint32_t>(size()));
        for (uint32_t token = first; token < last; token++) {
            Span s = bytes_of_token(token);
            hashes[token - first] = hash_bytes(s.data, s.size);
            fetch(&index_[hashes[token - first] & (capacity - 1)]);
        }
        for (uint32_t token = first; token < last; token++) {
            Span s = bytes_of_token(token);
            uint64_t h = hashes[token - first];
            size_t i = h & (capacity - 1);
            for (; index_[i] != ~uint64_t{0}; i = (i + 1) & (capacity - 1)) {
                if (index_[i] >> 32 != h >> 32) continue;
                Span other = bytes_of_token(static_cast<uint32_t>(index_[i]));
                if (other.size == s.size && std::memcmp(other.data, s.data, s.size) == 0)
                    throw std::invalid_argument("the vocabulary holds the same token twice, as ids " +
                                                std::to_string(external_[static_cast<uint32_t>(index_[i])]) + " and " +
                                                std::to_string(external_[token]));
            }
            index_[i] = (h >> 32) << 32 | token;
        }
    }
}

void Vocab::build(const std::vector<Span>& tokens, const std::vector<uint32_t>& ids, const std::vector<Merge>* merges,
                  bool whole_piece) {
    size_t n = tokens.size();
    if (n >= kMaxTokens) throw std::invalid_argument("the vocabulary has " + std::to_string(n) + " tokens; the limit is 2097151");
    whole_piece_ = whole_piece;
    external_ = ids;
    size_t id_limit = 0, total = 0;
    uint32_t byte_index[256];
    std::fill(byte_index, byte_index + 256, kNone);
    for (size_t i = 0; i < n; i++) {
        if (ids[i] > kMaxId) throw std::invalid_argument("token id " + std::to_string(ids[i]) + " is above the limit of 268435455");
        if (tokens[i].size == 0) throw std::invalid_argument("token id " + std::to_string(ids[i]) + " is empty");
        id_limit = std::max<size_t>(id_limit, ids[i] + size_t{1});
        longest_ = std::max(longest_, tokens[i].size);
        total += tokens[i].size;
        if (tokens[i].size == 1) byte_index[tokens[i].data[0]] = static_cast<uint32_t>(i);
    }
    if (total > 0xFFFFFFFFu) throw std::invalid_argument("the tokens hold more than 4 GB of bytes");
    for (int byte = 0; byte < 256; byte++)
        if (byte_index[byte] == kNone)
            throw std::invalid_argument("the vocabulary lacks a token for the byte " + std::to_string(byte) +
                                        ", so it cannot encode every text");

    // Provisional numbers: by id without merges, else by first merge; what nothing makes comes last.
    std::vector<uint64_t> rank_of(n, ~uint64_t{0} >> 1);
    if (merges)
        for (size_t m = merges->size(); m-- > 0;) rank_of[(*merges)[m].merged] = m;
    else
        for (size_t i = 0; i < n; i++) rank_of[i] = ids[i];
    std::vector<uint32_t> order(byte_index, byte_index + 256);
    order.reserve(n);
    for (uint32_t i = 0; i < n; i++)
        if (tokens[i].size > 1) order.push_back(i);
    if (order.size() != n) throw std::invalid_argument("the vocabulary holds the same single byte twice");
    auto by_rank = [&](uint32_t a, uint32_t b) { return rank_of[a] < rank_of[b]; };
    if (!std::is_sorted(order.begin() + 256, order.end(), by_rank)) std::stable_sort(order.begin() + 256, order.end(), by_rank);
    // Shorter tokens first: how t's bytes merge depends on shorter tokens only.
    std::vector<uint32_t> by_length(n - 256), next(longest_ + 2, 0);
    for (size_t k = 256; k < n; k++) next[tokens[order[k]].size + 1]++;
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (uint32_t k = 256; k < n; k++) by_length[next[tokens[order[k]].size]++] = k;
    left_.assign(n, kNone);
    right_.assign(n, kNone);
    pairs_.reserve(n);
    if (merges) {
        order = rank_by_merges(tokens, order, by_length, *merges);
    } else {
        split_by_ranks(tokens, order, by_length);
    }
    by_id_.assign(id_limit, {0, 0});
    blob_.reserve(total);
    number_tokens(tokens, order);
    index_bytes();
    derive();
}

// Without merges a token's number is its rank. Tokens of one length do not depend on one another, so they are merged
// side by side.
void Vocab::split_by_ranks(const std::vector<Span>& tokens, const std::vector<uint32_t>& order,
                           const std::vector<uint32_t>& by_length) {
    std::vector<MergeJob> jobs;
    std::vector<uint32_t> made, parts;
    auto close = [&](uint32_t token, const uint32_t* parts, size_t count) {
        if (count != 2) return;
        left_[token] = parts[0];
        right_[token] = parts[1];
        made.push_back(token);
    };
    for (size_t i = 0; i < by_length.size();) {
        size_t length = tokens[order[by_length[i]]].size;
        jobs.clear();
        made.clear();
        for (; i < by_length.size() && tokens[order[by_length[i]]].size == length; i++) {
            const Span& s = tokens[order[by_length[i]]];
            if (length <= kScanLimit) {
                jobs.push_back({s.data, static_cast<uint32_t>(s.size), by_length[i]});
                continue;
            }
            parts.assign(s.data, s.data + s.size);
            size_t count = merge_heap(pairs_, parts, [](uint32_t token) { return token; });
            close(by_length[i], parts.data(), count);
        }
        auto done = [](void* context, uint32_t token, const uint32_t* parts, size_t count) {
            (*static_cast<decltype(close)*>(context))(token, parts, count);
        };
        merge_side_by_side(pairs_, jobs.data(), jobs.size(), done, &close);
        for (uint32_t token : made) pairs_.insert(left_[token], right_[token], token);
    }
}

// Of the merges that make a token, the one that counts is the one that merging its bytes ends with; its rank is the
// token's. Returns the order of the tokens by those ranks, and renumbers what was found accordingly.
std::vector<uint32_t> Vocab::rank_by_merges(const std::vector<Span>& tokens, const std::vector<uint32_t>& order,
                                            const std::vector<uint32_t>& by_length, const std::vector<Merge>& merges) {
    size_t n = tokens.size();
    struct Way {
        uint32_t left, right, rank;
    };
    std::vector<uint32_t> number(n), first(n + 1, 0);
    for (uint32_t k = 0; k < n; k++) number[order[k]] = k;
    for (const Merge& m : merges) first[number[m.merged] + 1]++;
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<Way> ways(merges.size());
    std::vector<uint32_t> fill(first.begin(), first.end() - 1);
    for (uint32_t r = 0; r < merges.size(); r++) {
        const Merge& m = merges[r];
        ways[fill[number[m.merged]]++] = {number[m.left], number[m.right], r};
    }
    std::vector<uint32_t> rank(n), parts;
    std::iota(rank.begin(), rank.end(), 0);
    for (uint32_t k = 256; k < n; k++) rank[k] = first[k] < first[k + 1] ? 256 + ways[first[k]].rank : kNone - 1;
    auto rank_function = [&](uint32_t token) { return rank[token]; };
    for (uint32_t k : by_length) {
        if (first[k] == first[k + 1]) continue;
        const Span& s = tokens[order[k]];
        parts.assign(s.data, s.data + s.size);
        size_t count = s.size <= kScanLimit ? merge_scan(pairs_, parts.data(), parts.size(), rank_function)
                                            : merge_heap(pairs_, parts, rank_function);
        if (count != 2) continue;
        bool made = false;
        // A pair that the list holds twice has the rank of its last place, as in Hugging Face's loader.
        for (uint32_t w = first[k]; w < first[k + 1]; w++)
            if (ways[w].left == parts[0] && ways[w].right == parts[1]) {
                rank[k] = 256 + ways[w].rank;
                made = true;
            }
        if (!made) continue;
        left_[k] = parts[0];
        right_[k] = parts[1];
        pairs_.insert(parts[0], parts[1], k);
    }
    std::vector<uint32_t> by_rank(n), final_number(n), final_order(n), left(n, kNone), right(n, kNone);
    std::iota(by_rank.begin(), by_rank.end(), 0);
    std::stable_sort(by_rank.begin() + 256, by_rank.end(), [&](uint32_t a, uint32_t b) { return rank[a] < rank[b]; });
    for (uint32_t k = 0; k < n; k++) final_number[by_rank[k]] = k;
    pairs_.reserve(n);
    for (uint32_t k = 0; k < n; k++) {
        uint32_t old = by_rank[k];
        final_order[k] = order[old];
        if (left_[old] == kNone) continue;
        left[k] = final_number[left_[old]];
        right[k] = final_number[right_[old]];
        pairs_.insert(left[k], right[k], k);
    }
    left_ = std::move(left);
    right_ = std::move(right);
    return final_order;
}

// What follows from the rest: properties, lengths, and where runs of wide characters may be cut.
void Vocab::derive() {
    size_t n = size();
    monotone_ = true;
    all_reachable_ = true;
    for (uint32_t k = 256; k < n; k++) {
        if (left_[k] == kNone) {
            all_reachable_ = false;
            continue;
        }
        if (left_[k] >= k || right_[k] >= k) monotone_ = false;
    }
    lengths_.resize(n);
    for (uint32_t k = 0; k < n; k++) lengths_[k] = static_cast<uint16_t>(std::min<size_t>(bytes_of_token(k).size, 0xFFFF));
    joints_ = std::make_shared<Joints>(*this);
    derive_inline();
}

}  // namespace fastformer::bpe
