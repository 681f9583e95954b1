// The network as one slice needs it: normalisers folded into the first layer. Every block of apply folds its own, into
// shared memory.
#pragma once

#include "elements.cuh"

#include "../core/network.h"

namespace pylo {
inline namespace PYLO_ISA {

// Inputs of the network, numbered without gaps; those that only some rules read are the last two.
template <bool Factored>
struct Inputs;

template <>
struct Inputs<true> {
    static constexpr int common = Channels<true>::common + 12, all = common + 2;
    static __device__ __forceinline__ int slot(int input) {
        constexpr int elements = Channels<true>::common;
        if (input < elements) return Channels<true>::slot(input);
        if (input >= common) return Channels<true>::slot(input - common + elements);
        return input - elements + ROW;  // row, col, inverse_row and inverse_col follow each other
    }
};

template <>
struct Inputs<false> {
    static constexpr int common = Channels<false>::common, all = Channels<false>::all;
    static __device__ __forceinline__ int slot(int input) { return Channels<false>::slot(input); }
};

static_assert(COL == ROW + 3 && INVERSE_ROW == COL + 3 && INVERSE_COL == INVERSE_ROW + 3, "");
constexpr int MAX_INPUTS = Inputs<true>::all;
static_assert(Inputs<false>::all <= MAX_INPUTS, "");

// Calls put(input, value) for every input of element n, but for the last two if the rule does not read them, and for those
// of rows and columns without `statistics`.
template <bool Factored, bool Plain, class Put>
__device__ __forceinline__ void inputs_of(
    const pylo_rule &rule, const Record &record, const Slice &slice, Index<Plain> n, const Element<float> &x, Put &&put,
    bool statistics = true) {
    constexpr int elements = Channels<Factored>::common;
    float scale[3] = {};
    if constexpr (Factored) {
        const pylo_tensor &t = record.tensor;
        const Entry<Plain> entry = entry_of<Plain>(record, slice, n);
        load_scales(t, entry, scale);
#pragma unroll
        for (int k = 0; k < 3 && statistics; ++k) {
            const float row = row_entry(t.row, t, k, entry), col = col_entry(t.col, t, k, entry);
            put(elements + k, row);
            put(elements + 3 + k, col);
            put(elements + 6 + k, inverse_statistic(row));
            put(elements + 9 + k, inverse_statistic(col));
        }
    }
    features<Factored>(rule, has_extra(rule), x, scale, [&](int channel, float value) {
        put(channel < elements ? channel : channel - elements + Inputs<Factored>::common, value);
    });
}

// Weights of the first layer for one slice.
struct Folded {
    float scale[MAX_INPUTS];  // of every input

    template <bool Factored>
    __device__ __forceinline__ void fill(const pylo_rule &rule, const pylo_tensor &t, const Slice &slice) {
        const int input = (int)threadIdx.x;
        if (input < Inputs<Factored>::all) {
            const int slot = Inputs<Factored>::slot(input);
            const bool statistic = Factored && slot >= ROW && slot < FACTORED_MOMENTUM;
            const int64_t at = slice.norm * SLOTS + slot;
            const double mean = statistic ? t.stat_squares[at] : t.feature_sums[at] / (double)(t.numel / t.norm_slices);
            scale[input] = normaliser(rule, mean);
        }
        __syncthreads();
    }

    template <bool Factored>
    __device__ __forceinline__ float weight(const pylo_rule &rule, const float *network, int input, int unit) const {
        if (input >= Inputs<Factored>::all || unit >= rule.width[0]) return 0;
        const int slot = Inputs<Factored>::slot(input), step = (rule.width[0] + 3) / 4 * 4;
        float sum = rule.features >> slot & 1 ? network[slot * step + unit] * scale[input] : 0.0f;
        if (!Factored && has_twin(slot) && rule.features >> (slot + COL - ROW) & 1)
            sum += network[(slot + COL - ROW) * step + unit] * scale[input];
        return sum;
    }
};

// A later layer, or the biases of the first, with zeros beyond it.
struct PaddedLayer : Layer {
    using Layer::Layer;

    __device__ __forceinline__ float weight(int input, int unit) const {
        return input < inputs && unit < outputs ? weights[input * step + unit] : 0.0f;
    }
    __device__ __forceinline__ float bias(int unit) const { return unit < outputs ? biases[unit] : 0.0f; }
};

// An element with its accumulators as they are after the step. `Shared` has what a block of apply needs of its part.
template <bool Factored, bool Plain, class Shared>
__device__ __forceinline__ Element<float> load_moved(const pylo_rule &rule, const Shared &shared, Index<Plain> index) {
    constexpr bool direct = Plain || !Factored;
    return load_element<Factored, Plain>(
        rule, shared.record, shared.step, shared.stored, index, is_moved<direct>(shared.record.tensor));
}

template <bool Plain, bool MayLeave = !Plain>
__device__ __forceinline__ void finish_element(
    const pylo_rule &rule, const pylo_tensor &t, const pylo_step &step, Index<Plain> index, float param, float direction,
    float magnitude) {
    finish<Plain, MayLeave>(t, step, index, param, proposed_step(rule, step, direction, magnitude));
}

}  // namespace PYLO_ISA
}  // namespace pylo
