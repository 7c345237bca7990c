// The choice of a scanner at run time, by the processor's own word (cpuid) and the operating system's (xgetbv).
#include "bpe/scanner.h"

#include "bpe/isa/isa.h"
#include "bpe/scan_bits.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace fastformer::bpe {

namespace {

template <Pattern pattern>
size_t scan_scalar(const uint8_t* text, size_t n, size_t& pos, uint32_t* ends, size_t capacity) {
    const auto& tables = pattern == Pattern::kDeepseek ? unicode::deepseek_tables() : unicode::tables();
    scalar::Text x{text, n, tables};
    size_t i = pos, count = 0;
    while (i < n && count < capacity) {
        i = scalar::next<pattern>(x, i);
        ends[count++] = static_cast<uint32_t>(i);
    }
    pos = i;
    return count;
}

Isa detect() {
#if defined(__x86_64__) && defined(__GNUC__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27)) || !(c & (1u << 28))) return Isa::kScalar;
    unsigned state, high;
    __asm__ volatile("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::kScalar;
    bool avx2 = b & (1u << 5);
    bool avx512 = (b & (1u << 16)) && (b & (1u << 30)) && (c & (1u << 1)) && (state & 0xE0) == 0xE0;
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
    if (pattern == Pattern::kWhole) return scan_scalar<Pattern::kWhole>;
#if defined(__x86_64__) && defined(__GNUC__)
    if (isa == Isa::kAvx512) return mapped::get<mapped::classify_avx512>(pattern);
    if (isa == Isa::kAvx2) return mapped::get<mapped::classify_avx2>(pattern);
#elif defined(__aarch64__) && defined(__GNUC__)
    if (isa == Isa::kNeon) return mapped::get<mapped::classify_neon>(pattern);
#endif
    switch (pattern) {
        case Pattern::kGpt2: return scan_scalar<Pattern::kGpt2>;
        case Pattern::kCl100k: return scan_scalar<Pattern::kCl100k>;
        case Pattern::kO200k: return scan_scalar<Pattern::kO200k>;
        case Pattern::kLlama3: return scan_scalar<Pattern::kLlama3>;
        case Pattern::kQwen2: return scan_scalar<Pattern::kQwen2>;
        default: return scan_scalar<Pattern::kDeepseek>;
    }
}

}  // namespace fastformer::bpe
