// A vector's bits, and narrow numbers: widened when they are read, their lower bits kept when they are written.
#pragma once

#include "simd.h"

namespace pylo {
inline namespace PYLO_ISA {

#if PYLO_LANES > 1
typedef uint32_t Bits __attribute__((vector_size(PYLO_LANES * 4)));
typedef int32_t Whole __attribute__((vector_size(PYLO_LANES * 4)));
#else
typedef uint32_t Bits;
typedef int32_t Whole;
#endif

PYLO_FN Bits bits_of(Vec x) {
    Bits bits;
    __builtin_memcpy(&bits, &x.raw, sizeof bits);
    return bits;
}

PYLO_FN Vec of_bits(Bits bits) {
    Vec x;
    __builtin_memcpy(&x.raw, &bits, sizeof bits);
    return x;
}

PYLO_FN Bits load_bits(const uint32_t *p) {
    Bits bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return bits;
}

// All bits of the lanes where a < b, of numbers below 2^31.
PYLO_FN Bits where_less(Bits a, uint32_t b) {
#if PYLO_LANES > 1
    return (Bits)((Whole)a < (Whole)(Bits{} + b));
#else
    return a < b ? ~0u : 0u;
#endif
}

PYLO_FN Bits larger_of(Bits a, Bits b) { return a > b ? a : b; }
#if PYLO_LANES > 1
PYLO_FN Bits smaller_of(Bits a, uint32_t b) { return a < b ? a : Bits{} + b; }
#else
PYLO_FN Bits smaller_of(Bits a, uint32_t b) { return a < b ? a : b; }
#endif
PYLO_FN float magnitude(float x) { return __builtin_fabsf(x); }
PYLO_FN Vec magnitude(Vec x) { return of_bits(bits_of(x) & 0x7FFFFFFFu); }
PYLO_FN Vec with_sign_of(Vec sign, Vec size) { return of_bits((bits_of(sign) & 0x80000000u) | bits_of(size)); }

// Of whole numbers with a sign: their magnitudes, and these with the sign of a float.
PYLO_FN Bits magnitude(Bits number) {
#if PYLO_LANES == 16
    return (Bits)_mm512_abs_epi32((__m512i)number);
#elif PYLO_LANES == 8
    return (Bits)_mm256_abs_epi32((__m256i)number);
#else
    const Bits negative = (Bits)((Whole)number >> 31);
    return (number ^ negative) - negative;
#endif
}
PYLO_FN Bits with_sign_of(Vec sign, Bits size) {
    const Bits negative = (Bits)((Whole)bits_of(sign) >> 31);
    return (size ^ negative) - negative;
}

// Compilers that are left to it make a long way of widening and narrowing.

PYLO_FN Vec from_halves(const uint16_t *p) {  // bfloat16
#if PYLO_LANES == 16
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif PYLO_LANES == 8
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
#elif defined(__SSE2__)
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)p)));
#elif PYLO_LANES == 4
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
#else
    return of_bits((uint32_t)*p << 16);
#endif
}

// The upper halves of lanes.
PYLO_FN void store_halves(Bits numbers, uint16_t *p) {
#if PYLO_LANES == 16
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)numbers, 16)));
#elif PYLO_LANES == 8
    const __m256i halves = _mm256_srli_epi32((__m256i)numbers, 16);
    const __m128i upper = _mm256_extracti128_si256(halves, 1);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(halves), upper));
#elif defined(__SSE2__)
    const __m128i halves = _mm_srai_epi32((__m128i)numbers, 16);  // signed, as packing takes them
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi32(halves, halves));
#elif PYLO_LANES == 4
    vst1_u16(p, vshrn_n_u32(numbers, 16));
#else
    *p = (uint16_t)(numbers >> 16);
#endif
}

#if PYLO_LANES == 16
PYLO_FN Bits from_bytes(const int8_t *p) { return (Bits)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
PYLO_FN Bits from_bytes(const uint8_t *p) { return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
PYLO_FN void store_bytes(Bits numbers, uint8_t *p) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)numbers));
}
#elif PYLO_LANES == 8
PYLO_FN Bits from_bytes(const int8_t *p) { return (Bits)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
PYLO_FN Bits from_bytes(const uint8_t *p) { return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
PYLO_FN void store_bytes(Bits numbers, uint8_t *p) {
    const __m256i bytes = (__m256i)(numbers & 0xFFu);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(halves, halves));
}
#else
template <class Byte>
PYLO_FN Bits from_bytes(const Byte *p) {
    uint32_t wide[PYLO_LANES];
    for (int i = 0; i < PYLO_LANES; ++i) wide[i] = (uint32_t)(int32_t)p[i];
    return load_bits(wide);
}
PYLO_FN void store_bytes(Bits numbers, uint8_t *p) {
    uint32_t wide[PYLO_LANES];
    __builtin_memcpy(wide, &numbers, sizeof numbers);
    for (int i = 0; i < PYLO_LANES; ++i) p[i] = (uint8_t)wide[i];
}
#endif

}  // namespace PYLO_ISA
}  // namespace pylo
