// AVX-512 (BW, VBMI): the flags of 64 ASCII bytes are one permutation of a 128-byte table, a map is one test.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "bpe/isa/isa.h"

namespace fastformer::bpe::mapped {

__attribute__((target("avx512f,avx512bw,avx512vbmi"))) void classify_avx512(const Tables& tables, const uint8_t* p,
                                                                           size_t n, const Set* sets, size_t count,
                                                                           Window& window) {
    const __m512i low = _mm512_loadu_si512(tables.low), high = _mm512_loadu_si512(tables.low + 64);
    for (size_t at = 0; at < n; at += 64) {
        size_t left = n - at;
        __mmask64 valid = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
        __m512i bytes = _mm512_maskz_loadu_epi8(valid, p + at);
        __mmask64 multi = _mm512_movepi8_mask(bytes);
        __m512i flags = _mm512_permutex2var_epi8(low, bytes, high);
        __mmask64 tail = window.tail[at / 64] = _mm512_cmplt_epi8_mask(bytes, _mm512_set1_epi8(-64));
        // A character may begin in the block before: its flags are there already.
        if (multi) classify_high<true>(tables, p, at, multi & ~tail, window.flags);
        _mm512_mask_storeu_epi8(window.flags + at, valid & ~multi, flags);
        flags = _mm512_loadu_si512(window.flags + at);
        for (size_t k = 0; k < count; k++) {
            __mmask64 map = sets[k].any ? _mm512_test_epi8_mask(flags, _mm512_set1_epi8(static_cast<char>(sets[k].any)))
                                        : ~__mmask64{0};
            map &= _mm512_testn_epi8_mask(flags, _mm512_set1_epi8(static_cast<char>(sets[k].none)));
            window.maps[k][at / 64] = map & valid;
        }
        auto equal = [&](char c) __attribute__((target("avx512f,avx512bw"))) {
            return _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(c));
        };
        window.newline[at / 64] = equal('\r') | equal('\n');
        window.blank[at / 64] = equal(' ');
        window.quote[at / 64] = equal('\'');
        window.slash[at / 64] = equal('/');
    }
    for (size_t k = 0; k < count; k++) window.maps[k][(n + 63) / 64] = 0;
}

}  // namespace fastformer::bpe::mapped
#endif
