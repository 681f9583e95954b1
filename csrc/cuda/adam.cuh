// Apply for a rule without layers: a few operations for each element, bound by memory.
#pragma once

#include "elements.cuh"

namespace pylo {
inline namespace PYLO_ISA {

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
        if (!Plain && t.direction)
            device((float *)t.direction)[i] = proposed;
        else
            write<Plain>(t.param, t.param_dtype, i, updated_param(step, param, proposed));
    }
}

}  // namespace PYLO_ISA
}  // namespace pylo
