// Vec: the widest vector of floats of the instruction set that this file is compiled for.
//
// A struct around the raw vector, so that overloads are found by argument-dependent lookup. Three traps of GCC 12, each
// measured to cost a factor of 1.2 to 2: broadcasting as `vector{} + x` is a real addition (of a signed zero);
// `a > b ? a : b` on vectors becomes a compare and a masked move; arrays of vectors stay in memory unless the loops
// over them carry `#pragma GCC unroll`.
#pragma once

#include "../core/scalar.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pylo {
inline namespace PYLO_ISA {

#if defined(__AVX512F__)
#define PYLO_LANES 16
typedef __m512 RawVec;
typedef __m512i RawInt;
#define PYLO_MM(op) _mm512_##op
#elif defined(__AVX2__)
#define PYLO_LANES 8
typedef __m256 RawVec;
typedef __m256i RawInt;
#define PYLO_MM(op) _mm256_##op
#elif defined(__SSE2__)
#define PYLO_LANES 4
typedef __m128 RawVec;
typedef __m128i RawInt;
#define PYLO_MM(op) _mm_##op
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define PYLO_LANES 4
typedef float32x4_t RawVec;
#else
#define PYLO_LANES 1
typedef float RawVec;
#endif

struct Vec {
    static constexpr int lanes = PYLO_LANES;
    RawVec raw;

    PYLO_FN Vec() {}
#if PYLO_LANES > 1
    PYLO_FN Vec(RawVec v) : raw(v) {}
#endif
#if defined(__SSE2__)
    PYLO_FN explicit Vec(float x) : raw(PYLO_MM(set1_ps)(x)) {}
    static PYLO_FN Vec load(const float *p) { return PYLO_MM(loadu_ps)(p); }
    PYLO_FN void store(float *p) const { PYLO_MM(storeu_ps)(p, raw); }
#elif PYLO_LANES == 4
    PYLO_FN explicit Vec(float x) : raw(vdupq_n_f32(x)) {}
    static PYLO_FN Vec load(const float *p) { return vld1q_f32(p); }
    PYLO_FN void store(float *p) const { vst1q_f32(p, raw); }
#else
    PYLO_FN Vec(float x) : raw(x) {}
    static PYLO_FN Vec load(const float *p) { return *p; }
    PYLO_FN void store(float *p) const { *p = raw; }
#endif
};

PYLO_FN Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
PYLO_FN Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
PYLO_FN Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
PYLO_FN Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
PYLO_FN Vec operator-(Vec a) { return -a.raw; }

#if defined(__SSE2__)

PYLO_FN Vec root(Vec x) { return PYLO_MM(sqrt_ps)(x.raw); }
#if defined(__FMA__)
PYLO_FN Vec madd(Vec a, Vec b, Vec c) { return PYLO_MM(fmadd_ps)(a.raw, b.raw, c.raw); }
#else
PYLO_FN Vec madd(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
// max and min return their second operand if either is NaN.
PYLO_FN Vec at_least(Vec bound, Vec x) { return PYLO_MM(max_ps)(bound.raw, x.raw); }
PYLO_FN Vec at_most(Vec bound, Vec x) { return PYLO_MM(min_ps)(bound.raw, x.raw); }

// x where |x| <= limit, else 0; also for NaN.
PYLO_FN Vec zero_beyond(Vec x, Vec limit) {
#if PYLO_LANES == 16
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x.raw), limit.raw, _CMP_LE_OQ), x.raw);
#elif PYLO_LANES == 8
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.raw);
    return _mm256_and_ps(_mm256_cmp_ps(size, limit.raw, _CMP_LE_OQ), x.raw);
#else
    const __m128 size = _mm_andnot_ps(_mm_set1_ps(-0.0f), x.raw);
    return _mm_and_ps(_mm_cmple_ps(size, limit.raw), x.raw);
#endif
}

// p * 2^n in two steps, so that neither factor overflows before the product does; `rounded` is n + 1.5 * 2^23.
PYLO_FN Vec times_power_of_two(Vec p, Vec rounded) {
#if PYLO_LANES == 16
    const RawInt n = _mm512_sub_epi32(_mm512_castps_si512(rounded.raw), _mm512_set1_epi32(0x4B400000));
    const RawInt half = _mm512_srai_epi32(n, 1), rest = _mm512_sub_epi32(n, half), bias = _mm512_set1_epi32(127);
    const Vec a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(half, bias), 23));
    const Vec b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(rest, bias), 23));
#elif PYLO_LANES == 8
    const RawInt n = _mm256_sub_epi32(_mm256_castps_si256(rounded.raw), _mm256_set1_epi32(0x4B400000));
    const RawInt half = _mm256_srai_epi32(n, 1), rest = _mm256_sub_epi32(n, half), bias = _mm256_set1_epi32(127);
    const Vec a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const Vec b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
#else
    const RawInt n = _mm_sub_epi32(_mm_castps_si128(rounded.raw), _mm_set1_epi32(0x4B400000));
    const RawInt half = _mm_srai_epi32(n, 1), rest = _mm_sub_epi32(n, half), bias = _mm_set1_epi32(127);
    const Vec a = _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(half, bias), 23));
    const Vec b = _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(rest, bias), 23));
#endif
    return p * a * b;
}

#elif PYLO_LANES == 4  // NEON; its max and min pass NaN on

PYLO_FN Vec root(Vec x) { return vsqrtq_f32(x.raw); }
PYLO_FN Vec madd(Vec a, Vec b, Vec c) { return vfmaq_f32(c.raw, a.raw, b.raw); }
PYLO_FN Vec at_least(Vec bound, Vec x) { return vmaxq_f32(bound.raw, x.raw); }
PYLO_FN Vec at_most(Vec bound, Vec x) { return vminq_f32(bound.raw, x.raw); }
PYLO_FN Vec zero_beyond(Vec x, Vec limit) {
    const uint32x4_t keep = vcleq_f32(vabsq_f32(x.raw), limit.raw);
    return vreinterpretq_f32_u32(vandq_u32(keep, vreinterpretq_u32_f32(x.raw)));
}
PYLO_FN Vec times_power_of_two(Vec p, Vec rounded) {
    const int32x4_t n = vsubq_s32(vreinterpretq_s32_f32(rounded.raw), vdupq_n_s32(0x4B400000));
    const int32x4_t half = vshrq_n_s32(n, 1), rest = vsubq_s32(n, half), bias = vdupq_n_s32(127);
    const Vec a = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
    const Vec b = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23));
    return p * a * b;
}

#else

PYLO_FN Vec root(Vec x) { return root(x.raw); }
PYLO_FN Vec madd(Vec a, Vec b, Vec c) { return madd(a.raw, b.raw, c.raw); }
PYLO_FN Vec at_least(Vec bound, Vec x) { return at_least(bound.raw, x.raw); }
PYLO_FN Vec at_most(Vec bound, Vec x) { return at_most(bound.raw, x.raw); }
PYLO_FN Vec zero_beyond(Vec x, Vec limit) { return zero_beyond(x.raw, limit.raw); }
PYLO_FN Vec times_power_of_two(Vec p, Vec rounded) {
    return p * Vec(__builtin_ldexpf(1.0f, (int)(rounded.raw - 12582912.0f)));
}

#endif

// As many numbers in double precision as a vector has lanes.
struct Doubles {
#if PYLO_LANES > 1
    typedef double Raw __attribute__((vector_size(PYLO_LANES * 4)));
    typedef float Floats __attribute__((vector_size(PYLO_LANES * 2)));
    static constexpr int lanes = PYLO_LANES / 2;
#else
    typedef double Raw;
    typedef float Floats;
    static constexpr int lanes = 1;
#endif
    static constexpr int parts = PYLO_LANES / lanes;
    Raw part[parts];

    static PYLO_FN Doubles load(const double *p) {
        Doubles x;
#pragma GCC unroll 2
        for (int i = 0; i < parts; ++i) __builtin_memcpy(&x.part[i], p + i * lanes, sizeof(Raw));
        return x;
    }
    PYLO_FN void store(double *p) const {
#pragma GCC unroll 2
        for (int i = 0; i < parts; ++i) __builtin_memcpy(p + i * lanes, &part[i], sizeof(Raw));
    }
    static PYLO_FN Doubles of(const float *p) {
        Doubles x;
#pragma GCC unroll 2
        for (int i = 0; i < parts; ++i) {
            Floats narrow;
            __builtin_memcpy(&narrow, p + i * lanes, sizeof narrow);
#if PYLO_LANES > 1
            x.part[i] = __builtin_convertvector(narrow, Raw);
#else
            x.part[i] = narrow;
#endif
        }
        return x;
    }
    PYLO_FN void add(const Doubles &x) {
#pragma GCC unroll 2
        for (int i = 0; i < parts; ++i) part[i] = part[i] + x.part[i];
    }
    PYLO_FN void add_product(const Doubles &x, const Doubles &y) {
#pragma GCC unroll 2
        for (int i = 0; i < parts; ++i) part[i] = part[i] + x.part[i] * y.part[i];
    }
};

// sums[i] += x[i]
PYLO_FN void add_to(double *sums, Vec x) {
    alignas(64) float values[PYLO_LANES];
    x.store(values);
    Doubles total = Doubles::load(sums);
    total.add(Doubles::of(values));
    total.store(sums);
}

// exp by 2^n exp(r), |r| <= ln(2)/2: 1 ulp; overflows to infinity, underflows to 0 and passes NaN on.
PYLO_FN Vec exponential(Vec x) {
    x = at_most(Vec(89.0f), at_least(Vec(-104.0f), x));
    const Vec rounded = madd(x, Vec(1.44269504f), Vec(12582912.0f));
    const Vec n = rounded - Vec(12582912.0f);
    const Vec r = madd(n, Vec(-1.42860677e-6f), madd(n, Vec(-0.693145752f), x));  // ln(2) in two pieces
    Vec p = madd(r, Vec(1.9875691500e-4f), Vec(1.3981999507e-3f));
    p = madd(p, r, Vec(8.3334519073e-3f));
    p = madd(p, r, Vec(4.1665795894e-2f));
    p = madd(p, r, Vec(1.6666665459e-1f));
    p = madd(p, r, Vec(5.0000001201e-1f));
    p = madd(p, r * r, r + Vec(1.0f));
    return times_power_of_two(p, rounded);
}

}  // namespace PYLO_ISA
}  // namespace pylo
