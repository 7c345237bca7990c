// Merging many short pretokens side by side. One pretoken's merges wait for one another and each for memory; those of
// several pretokens do not, so the lanes take turns and every look-up has been fetched by the time its lane is back.
// Compiled for each instruction set (isa/isa.h).
#pragma once
#include <bit>

#include "bpe/merge.h"

namespace fastformer::bpe::FASTFORMER_ISA {

class Lanes {
  public:
    static constexpr size_t kLongest = kScanLimit;
    using Job = MergeJob;

    // Calls `done(index, tokens, count)` for every job, in any order.
    template <typename Done>
    void run(const PairTable& pairs, const Job* jobs, size_t count, Done done) {
        size_t next = 0, busy = 0;
        for (; busy < kLanes && next < count; busy++) lanes_[busy].begin(pairs, jobs[next++]);
        for (size_t i = 0; busy; i = i + 1 < busy ? i + 1 : 0) {
            // After the last lane was closed, `i` may point behind the others.
            Lane& lane = lanes_[i < busy ? i : 0];
            if (lane.step(pairs)) continue;
            uint32_t tokens[kLongest];
            size_t made = 0;
            for (uint64_t alive = lane.alive; alive; alive &= alive - 1) tokens[made++] = lane.token[std::countr_zero(alive)];
            done(lane.index, tokens, made);
            if (next < count)
                lane.begin(pairs, jobs[next++]);
            else if (--busy)
                lane = lanes_[busy];
        }
    }

  private:
    static constexpr size_t kLanes = 12;
    static constexpr int32_t kNever = 0x7FFFFFFF;

    struct Lane {
        uint32_t token[kLongest];  // by the byte it begins at
        int32_t order[kLongest];   // merged token << 6 | position, of the pair that begins there
        uint64_t alive;            // the positions where tokens begin
        uint32_t merged, index;    // where the last merge was
        uint32_t span;             // positions in use, rounded up to 16, 32 or 64
        bool fresh;

        void begin(const PairTable& pairs, const Job& job) {
            index = job.index;
            alive = ~uint64_t{0} >> (64 - job.size);
            fresh = true;
            span = job.size <= 16 ? 16 : job.size <= 32 ? 32 : 64;
            for (size_t i = 0; i < span; i++) order[i] = kNever;
            for (uint32_t i = 0; i < job.size; i++) token[i] = job.data[i];
            for (uint32_t i = 0; i + 1 < job.size; i++) order[i] = entry(pairs.of_bytes(job.data[i], job.data[i + 1]), i);
        }
        // One merge; false where there is none left.
        bool step(const PairTable& pairs) {
            if (!fresh) {
                uint32_t at = merged;
                uint64_t low = alive & before(at), high = alive & ~before(at + 1);
                if (high) order[at] = entry(pairs.find(token[at], token[std::countr_zero(high)]), at);
                if (low) {
                    uint32_t left = 63 - static_cast<uint32_t>(std::countl_zero(low));
                    order[left] = entry(pairs.find(token[left], token[at]), left);
                }
            }
            int32_t best = kNever;
            for (size_t i = 0; i < 16; i++) best = order[i] < best ? order[i] : best;
            for (size_t k = 16; k < span; k += 16)
                for (size_t i = k; i < k + 16; i++) best = order[i] < best ? order[i] : best;
            if (best == kNever) return false;
            fresh = false;
            uint32_t at = merged = static_cast<uint32_t>(best) & 63;
            uint64_t low = alive & before(at), high = alive & ~before(at + 1);
            uint32_t gone = static_cast<uint32_t>(std::countr_zero(high));
            token[at] = static_cast<uint32_t>(best) >> 6;
            alive &= ~(uint64_t{1} << gone);
            order[at] = order[gone] = kNever;
            high &= high - 1;
            if (high) pairs.prefetch(token[at], token[std::countr_zero(high)]);
            if (low) pairs.prefetch(token[63 - std::countl_zero(low)], token[at]);
            return true;
        }
        // Bits of the positions before `at`, which may be 64.
        static uint64_t before(uint32_t at) { return at < 64 ? (uint64_t{1} << at) - 1 : ~uint64_t{0}; }
        static int32_t entry(uint32_t made, uint32_t at) {
            return made == kNone ? kNever : static_cast<int32_t>(made << 6 | at);
        }
    };

    Lane lanes_[kLanes];
};

}  // namespace fastformer::bpe::FASTFORMER_ISA
