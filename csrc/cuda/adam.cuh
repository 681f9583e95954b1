// Apply for rules without layers, and write: a few operations for each element, bound by memory.
#pragma once

#include "elements.cuh"

namespace pylo {
inline namespace PYLO_ISA {

// `Plain`: also that parameters are updated in place.
template <bool Plain>
__device__ __forceinline__ void apply_adam(const Arguments &arguments) {
    const FlatPart part = arguments.applies[blockIdx.x];
    const pylo_tensor &t = arguments.records[part.record].tensor;
    const pylo_step step = arguments.steps[part.record];
    for (Index<Plain> i = (Index<Plain>)part.begin + (int)threadIdx.x; i < (Index<Plain>)part.end; i += SUM_THREADS) {
        const float param = read<Plain>(t.param, t.param_dtype, i);
        const float grad = seen_gradient<Plain>(arguments.rule, step, read<Plain>(step.grad, step.grad_dtype, i), param);
        float momentum = device(t.momentum[0])[i], rms = device(t.rms)[i];
        const float proposed = adam_step(arguments.rule, step, grad, momentum, rms);
        device(t.momentum[0])[i] = momentum;
        device(t.rms)[i] = rms;
        finish<Plain>(t, step, i, param, proposed);
    }
}

// Nesterov's momentum; what is left as a direction needs no parameter.
template <bool Plain>
__device__ __forceinline__ void apply_nesterov(const Arguments &arguments) {
    const FlatPart part = arguments.applies[blockIdx.x];
    const pylo_tensor &t = arguments.records[part.record].tensor;
    const pylo_step step = arguments.steps[part.record];
    const float keep = arguments.rule.momentum_keep[0], weight = arguments.rule.momentum_weight[0];
    const bool needs_param = !t.direction || (!Plain && step.l2 != 0.0f);
    for (Index<Plain> i = (Index<Plain>)part.begin + (int)threadIdx.x; i < (Index<Plain>)part.end; i += SUM_THREADS) {
        const float param = needs_param ? read<Plain>(t.param, t.param_dtype, i) : 0.0f;
        const float grad = seen_gradient<Plain>(arguments.rule, step, read<Plain>(step.grad, step.grad_dtype, i), param);
        const float momentum = ema(keep, weight, device(t.momentum[0])[i], grad);
        device(t.momentum[0])[i] = momentum;
        finish<Plain, true>(t, step, i, param, step.step_mult * ema(keep, weight, momentum, grad));
    }
}

// Parameters from directions, which whoever finished them has left where apply put them.
__device__ __forceinline__ void write_directions(const Arguments &arguments) {
    const FlatPart part = arguments.applies[blockIdx.x];
    const Record &record = arguments.records[part.record];
    const Slice slice = arguments.slices[part.slice];
    const pylo_tensor &t = record.tensor;
    const pylo_step step = arguments.steps[part.record];
    const float scale = device(t.direction_scale)[slice.norm];
    for (int64_t n = part.begin + (int)threadIdx.x; n < part.end; n += SUM_THREADS) {
        const int64_t i = memory_index<false>(record, slice, n);
        const float direction = scale * read(t.direction, t.direction_dtype, i);
        write<false>(t.param, t.param_dtype, i, updated_param(step, read(t.param, t.param_dtype, i), direction));
    }
}

}  // namespace PYLO_ISA
}  // namespace pylo
