// The parts that are compiled for each instruction set, at the end of its file.
#pragma once
#if defined(FASTFORMER_ISA_SCALAR)
#include "bpe/scan_scalar.h"
#else
#include "bpe/scan_bits.h"
#endif
#include "bpe/coder_look_up.h"
#include "bpe/coder_pieces.h"

namespace fastformer::bpe::FASTFORMER_ISA {

Scanner::Function scanner(Pattern pattern) {
#if defined(FASTFORMER_ISA_SCALAR)
    using namespace scalar;
#else
    using namespace mapped;
#endif
    switch (pattern) {
        case Pattern::kGpt2: return scan<Pattern::kGpt2>;
        case Pattern::kCl100k: return scan<Pattern::kCl100k>;
        case Pattern::kO200k: return scan<Pattern::kO200k>;
        case Pattern::kLlama3: return scan<Pattern::kLlama3>;
        case Pattern::kQwen2: return scan<Pattern::kQwen2>;
        case Pattern::kDeepseek: return scan<Pattern::kDeepseek>;
        default: return scalar::scan<Pattern::kWhole>;
    }
}

void merge(const PairTable& pairs, const MergeJob* jobs, size_t count, MergeDone done, void* context) {
    Lanes lanes;
    lanes.run(pairs, jobs, count, [&](uint32_t index, const uint32_t* tokens, size_t n) { done(context, index, tokens, n); });
}

std::unique_ptr<Encoder> encoder(const Vocab& vocab) { return std::make_unique<Coder>(vocab); }

}  // namespace fastformer::bpe::FASTFORMER_ISA
