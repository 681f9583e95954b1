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

// In intrinsics, as of the conditions below GCC makes compares and masked moves where vectors are wide, and each constant anew.
#if PYLO_LANES >= 8
PYLO_FN Bits larger_of(Bits a, Bits b) { return (Bits)PYLO_MM(max_epu32)((RawInt)a, (RawInt)b); }
PYLO_FN Bits smaller_of(Bits a, uint32_t b) { return (Bits)PYLO_MM(min_epu32)((RawInt)a, PYLO_MM(set1_epi32)((int)b)); }
#else
PYLO_FN Bits larger_of(Bits a, Bits b) { return a > b ? a : b; }
PYLO_FN Bits smaller_of(Bits a, uint32_t b) {
    const Bits bound = Bits{} + b;
    return a < bound ? a : bound;
}
#endif

// Of all lanes. By way of memory, with AVX2 GCC stores parts and reads a whole, for which processors wait: of Adam with codes
// that was 4 %.
PYLO_FN uint32_t largest_of(Bits bits) {
#if PYLO_LANES == 8
    const __m256i whole = (__m256i)bits;
    __m128i most = _mm_max_epu32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4E));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xB1)));
#else
    uint32_t numbers[PYLO_LANES], most = 0;
    __builtin_memcpy(numbers, &bits, sizeof bits);
    for (uint32_t number : numbers) most = number > most ? number : most;
    return most;
#endif
}

// (bits & mask) | others
PYLO_FN Bits kept_beside(Bits bits, uint32_t mask, uint32_t others) {
#if PYLO_LANES == 16
    return (Bits)_mm512_ternarylogic_epi32((__m512i)bits, _mm512_set1_epi32((int)mask), _mm512_set1_epi32((int)others), 0xEA);
#else
    return (bits & mask) | others;
#endif
}

// Zero where x is not finite.
PYLO_FN Bits where_finite(Vec x, Bits bits) {
#if PYLO_LANES == 16
    const __mmask16 not_finite = _mm512_fpclass_ps_mask(x.raw, 0x99);  // NaN, quiet or not, and infinity of either sign
    return (Bits)_mm512_mask_mov_epi32((__m512i)bits, not_finite, _mm512_setzero_si512());
#elif PYLO_LANES > 1
    return bits & (Bits)((Whole)(bits_of(x) & 0x7FFFFFFFu) < (Whole)(Bits{} + 0x7F800000u));
#else
    return (bits_of(x) & 0x7FFFFFFFu) < 0x7F800000u ? bits : 0u;
#endif
}

// At least 1 where x, which is not negative, is not zero.
PYLO_FN Bits at_least_one_where(Vec x, Bits numbers) {
#if PYLO_LANES == 16
    const __mmask16 some = _mm512_test_epi32_mask(_mm512_castps_si512(x.raw), _mm512_castps_si512(x.raw));
    return (Bits)_mm512_mask_max_epu32((__m512i)numbers, some, (__m512i)numbers, _mm512_set1_epi32(1));
#else
    return larger_of(numbers, smaller_of(bits_of(x), 1u));
#endif
}

PYLO_FN float magnitude(float x) { return __builtin_fabsf(x); }
PYLO_FN Vec magnitude(Vec x) { return of_bits(bits_of(x) & 0x7FFFFFFFu); }
PYLO_FN Vec with_sign_of(Vec sign, Vec size) { return of_bits((bits_of(sign) & 0x80000000u) | bits_of(size)); }

// A size times a factor, with a sign. Where one instruction chooses between the factor and its negative, they are two for all.
PYLO_FN Vec product_with_sign_of(Vec sign, Vec size, float factor) {
#if PYLO_LANES == 8
    return size * Vec(_mm256_blendv_ps(Vec(factor).raw, Vec(-factor).raw, sign.raw));
#else
    return with_sign_of(sign, size * Vec(factor));
#endif
}

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
// Where the float is zero, so is the number.
PYLO_FN Bits with_sign_of(Vec sign, Bits size) {
#if PYLO_LANES == 8
    return (Bits)_mm256_sign_epi32((__m256i)size, _mm256_castps_si256(sign.raw));  // one instruction, and 0 where its sign is
#elif PYLO_LANES == 16
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(sign.raw));
    return (Bits)_mm512_mask_sub_epi32((__m512i)size, negative, _mm512_setzero_si512(), (__m512i)size);
#else
    const Bits negative = (Bits)((Whole)bits_of(sign) >> 31);
    return (size ^ negative) - negative;
#endif
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
// The lower bytes of four vectors, of numbers that a byte holds, with their signs if `Signed`.
template <bool Signed>
PYLO_FN void store_bytes(const Bits (&numbers)[4], uint8_t *p) {
    const auto halves = [&](int i) __attribute__((always_inline)) {
        const __m256i a = (__m256i)numbers[i], b = (__m256i)numbers[i + 1];
        return Signed ? _mm256_packs_epi32(a, b) : _mm256_packus_epi32(a, b);
    };
    const __m256i first = halves(0), second = halves(2);
    const __m256i bytes = Signed ? _mm256_packs_epi16(first, second) : _mm256_packus_epi16(first, second);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing keeps to halves of a register
    _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(bytes, order));
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

#if PYLO_LANES != 8
template <bool Signed>
PYLO_FN void store_bytes(const Bits (&numbers)[4], uint8_t *p) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store_bytes(numbers[i], p + i * PYLO_LANES);
}
#endif

}  // namespace PYLO_ISA
}  // namespace pylo
