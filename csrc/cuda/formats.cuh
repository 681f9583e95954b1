// State as it is stored: floats, bfloat16, or codes with a scale for every block.
#pragma once

#include "device.h"

#include "../core/scalar.h"

namespace pylo {
inline namespace PYLO_ISA {

// What core/stored.h needs of a number's bits.
__device__ __forceinline__ uint32_t bits_of(float x) { return float_to_bits(x); }
__device__ __forceinline__ float of_bits(uint32_t bits) { return bits_to_float(bits); }
__device__ __forceinline__ uint32_t smaller_of(uint32_t a, uint32_t b) { return a < b ? a : b; }
__device__ __forceinline__ uint32_t kept_beside(uint32_t bits, uint32_t mask, uint32_t others) { return (bits & mask) | others; }
__device__ __forceinline__ uint32_t where_finite(float x, uint32_t bits) {
    return (bits_of(x) & 0x7FFFFFFFu) < 0x7F800000u ? bits : 0u;
}
__device__ __forceinline__ uint32_t at_least_one_where(float x, uint32_t number) { return x != 0.0f && number == 0u ? 1u : number; }
__device__ __forceinline__ float magnitude(float x) { return of_bits(bits_of(x) & 0x7FFFFFFFu); }
__device__ __forceinline__ float with_sign_of(float sign, float size) { return of_bits((bits_of(sign) & 0x80000000u) | bits_of(size)); }

}  // namespace PYLO_ISA
}  // namespace pylo

#include "../core/stored.h"
#include "plan.h"

namespace pylo {
inline namespace PYLO_ISA {

// Whether a record's state moves on in `advance`, and apply only reads it. `Plain` state is float32.
template <bool Plain = false>
__device__ __forceinline__ bool is_moved(const pylo_tensor &t) {
    return !Plain && t.state_dtype != PYLO_FLOAT32;
}

// The block of an element of a record. Indices of 32 bits spare a division of 64.
__device__ __forceinline__ int64_t block_of(const Record &record, const pylo_stored &stored, int64_t index) {
    if (record.tensor.state_dtype != PYLO_INT8) return 0;
    return record.wide ? Blocks<>(stored).at(index).block : (int64_t)Blocks<uint32_t>(stored).at((uint32_t)index).block;
}

// A code as a part of its block's scale.
template <bool Square>
__device__ __forceinline__ float load_code(const void *codes, int64_t index) {
    if constexpr (Square) return part_of<true>((uint32_t)device((const uint8_t *)codes)[index]);
    const int code = device((const int8_t *)codes)[index];
    return with_sign_of(of_bits((uint32_t)code), part_of<false>((uint32_t)(code < 0 ? -code : code)));
}

// State `Which` of an element that is in a block; 0 if it is not kept.
template <int Which, bool Plain = false>
__device__ __forceinline__ float load_state(
    const pylo_tensor &t, const pylo_stored &stored, int64_t index, int64_t block) {
    const void *const state = state_of(t, Which);
    if (!state) return 0;
    if (!is_moved<Plain>(t)) return device((const float *)state)[index];
    if (t.state_dtype == PYLO_BFLOAT16) return from_bfloat16(device((const uint16_t *)state)[index]);
    return load_code<Which == RMS_STATE>(state, index) * device((const float *)stored.scale[Which])[block];
}

}  // namespace PYLO_ISA
}  // namespace pylo
