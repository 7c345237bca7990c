// The choice of an instruction set at run time, by the processor's own word (cpuid) and the operating system's (xgetbv).
#include "bpe/scanner.h"

#include "bpe/isa/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace fastformer::bpe {

namespace {

Isa detect() {
#if defined(__x86_64__) && defined(__GNUC__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27)) || !(c & (1u << 28))) return Isa::kScalar;
    bool aes = c & (1u << 25);
    unsigned state, high;
    __asm__ volatile("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::kScalar;
    // With AVX2 came BMI and BMI2, on some virtual machines without.
    bool avx2 = (b & (1u << 5)) && (b & (1u << 3)) && (b & (1u << 8));
    // F, BW, VL, VBMI, VBMI2, AES, and the registers.
    bool avx512 = avx2 && aes && (b & (1u << 16)) && (b & (1u << 30)) && (b & (1u << 31)) && (c & (1u << 1)) && (c & (1u << 6)) &&
                  (state & 0xE0) == 0xE0;
    return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
#elif defined(__aarch64__) && defined(__GNUC__)
    return Isa::kNeon;
#else
    return Isa::kScalar;
#endif
}

}  // namespace

Isa best_isa() {
    static const Isa isa = detect();
    return isa;
}

bool has_isa(Isa isa) {
#if defined(__aarch64__)
    return isa == Isa::kScalar || isa == best_isa();
#else
    return isa == Isa::kScalar || (isa != Isa::kNeon && isa <= best_isa());
#endif
}

Scanner::Function Scanner::get(Pattern pattern, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (isa == Isa::kAvx512) return avx512::scanner(pattern);
    if (isa == Isa::kAvx2) return avx2::scanner(pattern);
#elif defined(__aarch64__) && defined(__GNUC__)
    if (isa == Isa::kNeon) return neon::scanner(pattern);
#endif
    return portable::scanner(pattern);
}

std::unique_ptr<Encoder> Encoder::make(const Vocab& vocab, Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (isa == Isa::kAvx512) return avx512::encoder(vocab);
    if (isa == Isa::kAvx2) return avx2::encoder(vocab);
#elif defined(__aarch64__) && defined(__GNUC__)
    if (isa == Isa::kNeon) return neon::encoder(vocab);
#endif
    return portable::encoder(vocab);
}

void merge_side_by_side(const PairTable& pairs, const MergeJob* jobs, size_t count, MergeDone done, void* context) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (best_isa() == Isa::kAvx512) return avx512::merge(pairs, jobs, count, done, context);
    if (best_isa() == Isa::kAvx2) return avx2::merge(pairs, jobs, count, done, context);
#elif defined(__aarch64__) && defined(__GNUC__)
    if (best_isa() == Isa::kNeon) return neon::merge(pairs, jobs, count, done, context);
#endif
    portable::merge(pairs, jobs, count, done, context);
}

}  // namespace fastformer::bpe
