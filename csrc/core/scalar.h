// The operations that core formulas need of a number, for float and double; a SIMD type brings its own (cpu/simd.h).
//
// Multiply-adds are explicit and -ffp-contract is off, so every instruction set with FMA rounds alike: a run gives the
// same bits on AVX2, AVX-512 and NEON machines. Included once per instruction set, in a namespace of its own: a
// function compiled for AVX-512 must never be the one that the linker keeps for a baseline machine.
#pragma once

#include <stdint.h>

#ifndef PYLO_ISA
#error "define PYLO_ISA, the namespace of what is compiled for one instruction set"
#endif

#ifdef __CUDACC__
#define PYLO_FN __device__ __forceinline__
#else
#define PYLO_FN inline __attribute__((always_inline))
#endif

namespace pylo {
inline namespace PYLO_ISA {

#ifdef __CUDACC__

PYLO_FN float root(float x) { return sqrtf(x); }
PYLO_FN double root(double x) { return sqrt(x); }
PYLO_FN float madd(float a, float b, float c) { return fmaf(a, b, c); }
PYLO_FN double madd(double a, double b, double c) { return fma(a, b, c); }
PYLO_FN float exponential(float x) { return expf(x); }

// One instruction, within 2 units in the last place. All arguments are sums with a positive constant far from denormal.
PYLO_FN float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Maximum and minimum that pass NaN on.
PYLO_FN float at_least(float bound, float x) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(bound), "f"(x));
    return y;
}
PYLO_FN float at_most(float bound, float x) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(bound), "f"(x));
    return y;
}

// x where |x| <= limit, else 0; also for NaN.
PYLO_FN float zero_beyond(float x, float limit) { return fabsf(x) <= limit ? x : 0.0f; }

#else

PYLO_FN float root(float x) { return __builtin_sqrtf(x); }
PYLO_FN double root(double x) { return __builtin_sqrt(x); }

#if defined(__FMA__) || defined(__aarch64__)
PYLO_FN float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PYLO_FN double madd(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else  // the library function would be a hundred times slower
PYLO_FN float madd(float a, float b, float c) { return a * b + c; }
PYLO_FN double madd(double a, double b, double c) { return a * b + c; }
#endif

// Like torch's clamp_min and clamp_max these pass NaN on; the bound comes first.
PYLO_FN float at_least(float bound, float x) { return bound > x ? bound : x; }
PYLO_FN double at_least(double bound, double x) { return bound > x ? bound : x; }
PYLO_FN float at_most(float bound, float x) { return bound < x ? bound : x; }
PYLO_FN double at_most(double bound, double x) { return bound < x ? bound : x; }

// x where |x| <= limit, else 0; also for NaN.
PYLO_FN float zero_beyond(float x, float limit) { return __builtin_fabsf(x) <= limit ? x : 0.0f; }

PYLO_FN float exponential(float x) { return __builtin_expf(x); }
PYLO_FN double exponential(double x) { return __builtin_exp(x); }

#endif

}  // namespace PYLO_ISA
}  // namespace pylo
