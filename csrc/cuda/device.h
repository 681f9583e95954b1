// All that the kernels know of CUDA beside the language: instructions that it has no functions for. nvcc and NVRTC compile
// it without any of CUDA's headers, which not every installation has; a C++ compiler gets the emulation of csrc/shim in
// its place.
#pragma once

#include <stdint.h>

#ifndef __CUDACC__
#include "../shim/cuda.h"
#else

namespace pylo {

// A T in the shared memory of a block.
template <class T>
__device__ __forceinline__ T &shared_memory() {
    static_assert(sizeof(T) <= 48 << 10, "what every device has");
    __shared__ __align__(16) char memory[sizeof(T)];
    return *(T *)memory;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float from_bfloat16(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
__device__ __forceinline__ uint16_t to_bfloat16(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ float from_float16(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ __forceinline__ uint16_t to_float16(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Two numbers rounded to bfloat16 in one register.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// d (16, 8) += a (16, 16) times b (16, 8), spread over the lanes of a warp as PTX documents it for m16n8k16.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices from shared memory; lane 8 i + r brings the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void *row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
}

// A pointer into device memory; the compiler cannot know that of one that was itself read from memory.
template <class T>
__device__ __forceinline__ T *device(T *pointer) {
    __builtin_assume(__isGlobal(pointer));
    return pointer;
}

// Without it the compiler keeps what a loop reads of shared memory in registers, more than there are.
__device__ __forceinline__ void forget_memory() { asm volatile("" ::: "memory"); }

}  // namespace pylo

#endif
