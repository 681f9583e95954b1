// Elements of a tensor on the device: where they are, and what is read and written of them.
//
// `Plain` stands for what nearly every call is: float32 throughout, indices of 32 bits, gradients used as they are but
// for their scale, parameters updated in place. It spares the tests for anything else in the inner loops.
#pragma once

#define PYLO_ISA isa_cuda
#include "device.h"

#ifdef __CUDACC__
#pragma nv_diag_suppress 1675  // GCC's pragma for unrolling: this compiler unrolls short loops anyway
#endif
#include "../core/formulas.h"
#include "formats.cuh"

namespace pylo {
inline namespace PYLO_ISA {

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
    return a < b ? a : b;
}

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divisor &by) { return (__umulhi(n, by.magic) + n) >> by.shift; }

template <bool Plain>
struct IndexOf {
    typedef int64_t type;
};
template <>
struct IndexOf<true> {
    typedef int32_t type;
};
template <bool Plain>
using Index = typename IndexOf<Plain>::type;

// Entries of an element in the statistics.
template <bool Plain>
struct Entry {
    Index<Plain> row, col;
};

// An index without the axis that is the fastest in it.
template <bool Plain>
__device__ __forceinline__ Index<Plain> slower_index(const Record &record, int axis, Index<Plain> index) {
    if (Plain || !record.wide) return (Index<Plain>)divide((uint32_t)index, record.axis[axis].extent);
    return index / (Index<Plain>)record.tensor.extent[axis];
}

template <bool Plain>
__device__ __forceinline__ Entry<Plain> locate(const Record &record, Index<Plain> index) {
    const pylo_tensor &t = record.tensor;
    if (Plain || !record.wide) {
        uint32_t rest = (uint32_t)index;
        int32_t row = (int32_t)t.row_offset, col = (int32_t)t.col_offset;
#pragma unroll 1
        for (int axis = t.rank - 1; axis > 0; --axis) {
            const Axis &a = record.axis[axis];
            const uint32_t slower = divide(rest, a.extent);
            const int32_t i = (int32_t)(rest - slower * a.extent.divisor);
            row += i * a.row_stride;
            col += i * a.col_stride;
            rest = slower;
        }
        row += (int32_t)rest * record.axis[0].row_stride;
        col += (int32_t)rest * record.axis[0].col_stride;
        return {row, col};
    }
    int64_t row = t.row_offset, col = t.col_offset, rest = index;
#pragma unroll 1
    for (int axis = t.rank - 1; axis >= 0; --axis) {
        const int64_t i = rest % t.extent[axis];
        rest /= t.extent[axis];
        row += i * t.row_stride[axis];
        col += i * t.col_stride[axis];
    }
    return {(Index<Plain>)row, (Index<Plain>)col};
}

// Where element n of a slice is in memory. `Plain` has no slices but whole tensors.
template <bool Plain>
__device__ __forceinline__ Index<Plain> memory_index(const Record &record, const Slice &slice, Index<Plain> n) {
    if (Plain || !record.sliced) return n;
    Index<Plain> memory = (Index<Plain>)slice.memory, rest = n;
#pragma unroll 1
    for (int j = record.inner_axes - 1; j >= 0; --j) {
        const int axis = record.inner[j];
        const Index<Plain> slower = slower_index<Plain>(record, axis, rest);
        memory += (rest - slower * (Index<Plain>)record.tensor.extent[axis]) * (Index<Plain>)record.step[axis];
        rest = slower;
    }
    return memory;
}

// The same for the element's entries.
template <bool Plain>
__device__ __forceinline__ Entry<Plain> entry_of(const Record &record, const Slice &slice, Index<Plain> n) {
    if (Plain || !record.sliced) return locate<Plain>(record, n);
    const pylo_tensor &t = record.tensor;
    Index<Plain> row = (Index<Plain>)slice.row, col = (Index<Plain>)slice.col, rest = n;
#pragma unroll 1
    for (int j = record.inner_axes - 1; j >= 0; --j) {
        const int axis = record.inner[j];
        const Index<Plain> slower = slower_index<Plain>(record, axis, rest);
        const Index<Plain> i = rest - slower * (Index<Plain>)t.extent[axis];
        row += i * (Index<Plain>)t.row_stride[axis];
        col += i * (Index<Plain>)t.col_stride[axis];
        rest = slower;
    }
    return {row, col};
}

template <bool Plain = false>
__device__ __forceinline__ float read(const void *base, int dtype, Index<Plain> index) {
    if (Plain || dtype == PYLO_FLOAT32) return device((const float *)base)[index];
    const uint16_t bits = device((const uint16_t *)base)[index];
    return dtype == PYLO_BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}

template <bool Plain>
__device__ __forceinline__ void write(void *base, int dtype, Index<Plain> index, float x) {
    if (Plain || dtype == PYLO_FLOAT32)
        device((float *)base)[index] = x;
    else
        device((uint16_t *)base)[index] = dtype == PYLO_BFLOAT16 ? to_bfloat16(x) : to_float16(x);
}

// An element with its accumulators updated, if they are not yet: `moved`.
template <bool Factored, bool Plain>
__device__ __forceinline__ Element<float> load_element(
    const pylo_rule &rule, const Record &record, const pylo_step &step, const pylo_stored &stored, Index<Plain> index,
    bool moved) {
    const pylo_tensor &t = record.tensor;
    Element<float> x;
    x.param = read<Plain>(t.param, t.param_dtype, index);
    x.grad = seen_gradient<Plain>(rule, step, read<Plain>(step.grad, step.grad_dtype, index), x.param);
    constexpr bool direct = Plain || !Factored;  // state of vectors is in float32
    const int64_t block = direct ? 0 : block_of(record, stored, index);
    x.rms = load_state<RMS_STATE, direct>(t, stored, index, block);
    x.momentum[0] = load_state<0, direct>(t, stored, index, block);
    x.momentum[1] = load_state<1, direct>(t, stored, index, block);
    x.momentum[2] = load_state<2, direct>(t, stored, index, block);
#pragma unroll
    for (int k = 0; k < 3; ++k)
        if constexpr (!Factored) x.diagonal[k] = device(t.diagonal[k])[index];
    if (!moved) accumulate<Factored>(rule, x);
    return x;
}

template <bool Factored, bool Plain>
__device__ __forceinline__ void store_state(const pylo_tensor &t, const Element<float> &x, Index<Plain> index) {
    if (is_moved<Plain || !Factored>(t)) return;
    if (t.rms) device(t.rms)[index] = x.rms;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        if (t.momentum[k]) device(t.momentum[k])[index] = x.momentum[k];
        if constexpr (!Factored) device(t.diagonal[k])[index] = x.diagonal[k];
    }
}

// What one element becomes. `MayLeave`: whether steps may be left instead of updating the parameter.
template <bool Plain, bool MayLeave = !Plain>
__device__ __forceinline__ void finish(
    const pylo_tensor &t, const pylo_step &step, Index<Plain> index, float param, float proposed) {
    if (MayLeave && t.direction)
        device((float *)t.direction)[index] = proposed;
    else
        write<Plain>(t.param, t.param_dtype, index, updated_param(step, param, proposed));
}

// One of three channels of a statistic.
template <bool Plain>
__device__ __forceinline__ float row_entry(const float *statistic, const pylo_tensor &t, int k, const Entry<Plain> &entry) {
    return device(statistic)[k * (Index<Plain>)t.row_numel + entry.row];
}
template <bool Plain>
__device__ __forceinline__ float col_entry(const float *statistic, const pylo_tensor &t, int k, const Entry<Plain> &entry) {
    return device(statistic)[k * (Index<Plain>)t.col_numel + entry.col];
}

// Products of row and column scales.
template <bool Plain>
__device__ __forceinline__ void load_scales(const pylo_tensor &t, const Entry<Plain> &entry, float (&scale)[3]) {
#pragma unroll
    for (int k = 0; k < 3; ++k) scale[k] = row_entry(t.row_scale, t, k, entry) * col_entry(t.col_scale, t, k, entry);
}

}  // namespace PYLO_ISA
}  // namespace pylo
