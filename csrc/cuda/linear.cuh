// Apply for a network of one layer: its outputs are sums of features. Bound by memory.
#pragma once

#include "network.cuh"

namespace pylo {
inline namespace PYLO_ISA {

struct LinearShared {
    float2 weights[MAX_INPUTS];  // of direction and magnitude
    Folded folded;
    Slice slice;
    Record record;
    pylo_step step;
    pylo_stored stored;
};

template <bool Plain, bool Factored>
__device__ __forceinline__ void apply_part_linearly(const pylo_rule &rule, const FlatPart &part, LinearShared &shared) {
    constexpr uint32_t of_statistics = (1u << FACTORED_MOMENTUM) - (1u << ROW);
    const int thread = (int)threadIdx.x;
    const bool statistics = rule.features & of_statistics;
    shared.folded.template fill<Factored>(rule, shared.record.tensor, shared.slice);
    if (thread < MAX_INPUTS)
        shared.weights[thread] =
            make_float2(shared.folded.template weight<Factored>(rule, shared.step.network, thread, 0),
                        shared.folded.template weight<Factored>(rule, shared.step.network, thread, 1));
    const PaddedLayer layer(rule, shared.step.network, 0);
    const float2 bias = make_float2(layer.bias(0), layer.bias(1));
    __syncthreads();
    for (Index<Plain> n = (Index<Plain>)part.begin + thread; n < (Index<Plain>)part.end; n += SUM_THREADS) {
        forget_memory();
        const Index<Plain> index = memory_index<Plain>(shared.record, shared.slice, n);
        const Element<float> x = load_moved<Factored, Plain>(rule, shared, index);
        float direction = bias.x, magnitude = bias.y;
        const auto add = [&](int input, float value) {
            direction = madd(value, shared.weights[input].x, direction);
            magnitude = madd(value, shared.weights[input].y, magnitude);
        };
        inputs_of<Factored, Plain>(rule, shared.record, shared.slice, n, x, add, statistics);
        store_state<Factored, Plain>(shared.record.tensor, x, index);
        finish_element<Plain, true>(rule, shared.record.tensor, shared.step, index, x.param, direction, magnitude);
    }
}

// `Plain`, but steps may be left and tensors may have slices.
template <bool Plain>
__device__ __forceinline__ void apply_linearly(const Arguments &arguments) {
    auto &shared = shared_memory<LinearShared>();
    const FlatPart part = arguments.applies[blockIdx.x];
    if (threadIdx.x == 0) {
        shared.slice = arguments.slices[part.slice];
        shared.record = arguments.records[part.record];
        shared.step = arguments.steps[part.record];
        shared.stored = arguments.stored[part.record];
    }
    __syncthreads();
    if (shared.record.tensor.d0_axis < 0)
        apply_part_linearly<Plain, false>(arguments.rule, part, shared);
    else if (shared.record.sliced)
        apply_part_linearly<false, true>(arguments.rule, part, shared);
    else
        apply_part_linearly<Plain, true>(arguments.rule, part, shared);
}

}  // namespace PYLO_ISA
}  // namespace pylo
