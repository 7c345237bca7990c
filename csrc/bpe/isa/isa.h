// What each instruction set provides, compiled for it: scanners, an encoder, merging of many tokens side by side. The
// headers that do the work stand in a namespace of the instruction set, so that the linker never takes one's function for
// another's; what is included here is compiled for any processor.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "bpe/cache.h"
#include "bpe/encoder.h"
#include "bpe/joints.h"
#include "bpe/merge.h"
#include "bpe/scanner.h"
#include "bpe/unicode.h"
#include "bpe/vocab.h"

namespace fastformer::bpe {

namespace portable {
Scanner::Function scanner(Pattern pattern);
std::unique_ptr<Encoder> encoder(const Vocab& vocab);
void merge(const PairTable& pairs, const MergeJob* jobs, size_t count, MergeDone done, void* context);
}  // namespace portable
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
Scanner::Function scanner(Pattern pattern);
std::unique_ptr<Encoder> encoder(const Vocab& vocab);
void merge(const PairTable& pairs, const MergeJob* jobs, size_t count, MergeDone done, void* context);
}  // namespace avx2
namespace avx512 {
Scanner::Function scanner(Pattern pattern);
std::unique_ptr<Encoder> encoder(const Vocab& vocab);
void merge(const PairTable& pairs, const MergeJob* jobs, size_t count, MergeDone done, void* context);
}  // namespace avx512
#elif defined(__aarch64__) && defined(__GNUC__)
namespace neon {
Scanner::Function scanner(Pattern pattern);
std::unique_ptr<Encoder> encoder(const Vocab& vocab);
void merge(const PairTable& pairs, const MergeJob* jobs, size_t count, MergeDone done, void* context);
}  // namespace neon
#endif

}  // namespace fastformer::bpe
