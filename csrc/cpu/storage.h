// Reading and writing runs of lanes: steps in memory, half precision, and ends that are no whole vector.
#pragma once

#include <string.h>

#include "../core/geometry.h"
#include "bits.h"

namespace pylo {
inline namespace PYLO_ISA {

PYLO_FN float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

PYLO_FN uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

PYLO_FN float from_bfloat16(uint16_t half) { return from_bits((uint32_t)half << 16); }

PYLO_FN uint16_t to_bfloat16(float x) {  // to nearest, ties to even
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(x != x ? (bits >> 16) | 0x40u : rounded);
}

PYLO_FN float from_float16(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7FFFu;
    if (rest >= 0x7C00u) return from_bits(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
    // 2^112 moves the exponent bias from 15 to 127, and normalises subnormals on the way.
    return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));
#endif
}

PYLO_FN uint16_t to_float16(float x) {  // to nearest, ties to even
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (size >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);  // 65520 and more round to infinity
    if (size < 0x38800000u)  // subnormal: adding 0.5 lets the hardware round at 2^-24
        return (uint16_t)(sign | (to_bits(from_bits(size) + 0.5f) - 0x3F000000u));
    return (uint16_t)(sign | (size - 0x38000000u + 0xFFFu + (size >> 13 & 1u)) >> 13);
#endif
}

PYLO_FN int size_of(int dtype) { return dtype == PYLO_FLOAT32 ? 4 : dtype == PYLO_INT8 ? 1 : 2; }

// Asks for `count` elements that will be read soon. Beyond the end of a buffer it does no harm: a fetch never faults.
PYLO_FN void prefetch(const void *base, int dtype, int64_t index, int count) {
    if (!base) return;
    const char *first = (const char *)base + index * size_of(dtype), *last = first + count * size_of(dtype) - 1;
    for (const char *line = first; line < last; line += 64) __builtin_prefetch(line);
    __builtin_prefetch(last);  // which is in a line of its own where the first does not begin one
}

// A run of lanes in memory: `count` from `index` on, `step` apart. Kernels work on whole vectors, which take `padded` of
// them, and never on memory beyond the run: where it ends within a vector, they have a copy.
struct Run {
    int64_t index, step;
    int count, padded;

    PYLO_FN Run() {}
    PYLO_FN Run(int64_t index, int64_t step, int count)
        : index(index), step(step), count(count), padded((int)round_up(count, Vec::lanes)) {}

    // As floats without gaps, those from `count` to `padded` being `fill`: in place if they are stored like that, else
    // copied to `buffer`.
    PYLO_FN float *load(const void *base, int dtype, float *buffer, float fill = 0) const {
        if (dtype == PYLO_FLOAT32) {
            float *from = (float *)base + index;
            if (step == 1 && count == padded) return from;
            if (step == 1)
                memcpy(buffer, from, (size_t)count * sizeof(float));
            else
                for (int i = 0; i < count; ++i) buffer[i] = from[i * step];
        } else {
            const uint16_t *from = (const uint16_t *)base + index;
            int i = 0;
            if (dtype == PYLO_BFLOAT16 && step == 1)
                for (; i + Vec::lanes <= count; i += Vec::lanes) from_halves(from + i).store(buffer + i);
            if (dtype == PYLO_BFLOAT16)
                for (; i < count; ++i) buffer[i] = from_bfloat16(from[i * step]);
            else
                for (; i < count; ++i) buffer[i] = from_float16(from[i * step]);
        }
        for (int i = count; i < padded; ++i) buffer[i] = fill;
        return buffer;
    }

    // The way back: nothing to do for values that were changed in place.
    PYLO_FN void store(void *base, int dtype, const float *values) const {
        if (dtype == PYLO_FLOAT32) {
            float *to = (float *)base + index;
            if (values == to) return;
            for (int i = 0; i < count; ++i) to[i * step] = values[i];
        } else {
            uint16_t *to = (uint16_t *)base + index;
            if (dtype == PYLO_BFLOAT16)
                for (int i = 0; i < count; ++i) to[i * step] = to_bfloat16(values[i]);
            else
                for (int i = 0; i < count; ++i) to[i * step] = to_float16(values[i]);
        }
    }
};

}  // namespace PYLO_ISA
}  // namespace pylo
