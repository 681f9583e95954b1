// Apply for a network of one layer: its outputs are sums of features. Bound by memory.
#pragma once

#include "network.cuh"

namespace pylo {
inline namespace PYLO_ISA {

struct LinearShared {
    float2 weights[MAX_INPUTS];  // of direction and magnitude
    Folded folded;
};

template <bool Plain, bool Factored>
__device__ __forceinline__ void apply_part_linearly(
    const pylo_rule &rule, const Record &record, const Slice &slice, const pylo_step &step, const FlatPart &part,
    LinearShared &shared) {
    const int thread = (int)threadIdx.x;
    shared.folded.template fill<Factored>(rule, record.tensor, slice);
    if (thread < MAX_INPUTS)
        shared.weights[thread] = make_float2(shared.folded.template weight<Factored>(rule, step.network, thread, 0),
                                             shared.folded.template weight<Factored>(rule, step.network, thread, 1));
    const PaddedLayer layer(rule, step.network, 0);
    const float2 bias = make_float2(layer.bias(0), layer.bias(1));
    __syncthreads();
    for (Index<Plain> n = (Index<Plain>)part.begin + thread; n < (Index<Plain>)part.end; n += SUM_THREADS) {
        const Index<Plain> index = memory_index<Plain, Factored>(record, slice, n);
        const Element<float> x = load_element<Factored, Plain>(rule, record.tensor, step, index);
        float direction = bias.x, magnitude = bias.y;
        inputs_of<Factored, Plain, true>(rule, record, slice, n, x, [&](int input, float value) {
            direction = madd(value, shared.weights[input].x, direction);
            magnitude = madd(value, shared.weights[input].y, magnitude);
        });
        store_state<Factored, Plain>(record.tensor, x, index);
        finish_element<Plain, true>(rule, record.tensor, step, index, x.param, direction, magnitude);
    }
}

// `Plain`, but steps may be left and tensors may have slices.
template <bool Plain>
__device__ __forceinline__ void apply_linearly(const Arguments &arguments) {
    auto &shared = shared_memory<LinearShared>();
    const FlatPart part = arguments.applies[blockIdx.x];
    const Record &record = arguments.records[part.record];
    const Slice slice = arguments.slices[part.slice];
    const pylo_step step = arguments.steps[part.record];
    if (record.tensor.d0_axis < 0)
        apply_part_linearly<Plain, false>(arguments.rule, record, slice, step, part, shared);
    else
        apply_part_linearly<Plain, true>(arguments.rule, record, slice, step, part, shared);
}

}  // namespace PYLO_ISA
}  // namespace pylo
