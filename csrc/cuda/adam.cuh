// Apply for rules without layers, and for directions that are complete: a few operations for each element, bound by memory.
#pragma once

#include "elements.cuh"

namespace pylo {
inline namespace PYLO_ISA {

// Nesterov's momentum; what is left as a direction needs no parameter.
template <bool Plain>
__device__ __forceinline__ void apply_nesterov(const Arguments &arguments) {
    const FlatPart part = arguments.applies[blockIdx.x];
    const Record &record = arguments.records[part.record];
    const pylo_tensor &t = record.tensor;
    const pylo_step step = arguments.steps[part.record];
    const pylo_stored &stored = arguments.stored[part.record];
    const bool moved = is_moved<Plain>(t);
    const float weight = step.momentum_weight, keep = 1 - weight;
    const bool needs_param = !t.direction || (!Plain && step.l2 != 0.0f);
    for (Index<Plain> i = (Index<Plain>)part.begin + (int)threadIdx.x; i < (Index<Plain>)part.end; i += SUM_THREADS) {
        const float param = needs_param ? read<Plain>(t.param, t.param_dtype, i) : 0.0f;
        const float grad = seen_gradient<Plain>(arguments.rule, step, read<Plain>(step.grad, step.grad_dtype, i), param);
        const int64_t block = Plain ? 0 : block_of(record, stored, i);
        float momentum = load_state<0, Plain>(t, stored, i, block);
        if (!moved) device(t.momentum[0])[i] = momentum = ema(keep, weight, momentum, grad);
        finish<Plain, true>(t, step, i, param, step.step_mult * ema(keep, weight, momentum, grad));
    }
}

// `Plain`: indices of 32 bits, parameters of float32, one slice.
template <bool Plain>
__device__ __forceinline__ void write_part(const Record &record, const Slice &slice, const pylo_step &step, const FlatPart &part) {
    const pylo_tensor &t = record.tensor;
    void *const param = t.param;
    const void *const directions = t.direction;
    const int param_dtype = t.param_dtype, dtype = t.direction_dtype;
    const float scale = device(t.direction_scale)[slice.norm];
    for (Index<Plain> n = (Index<Plain>)part.begin + (int)threadIdx.x; n < (Index<Plain>)part.end; n += SUM_THREADS) {
        const Index<Plain> i = memory_index<Plain>(record, slice, n);
        float direction;
        if (Plain && dtype == PYLO_FLOAT32)
            direction = read<Plain>(directions, dtype, i);
        else
            direction = read<false>(directions, dtype, i);
        write<Plain>(param, param_dtype, i, updated_param(step, read<Plain>(param, param_dtype, i), scale * direction));
    }
}

// Adam's step. `Plain`: also that parameters are updated in place.
template <bool Plain>
__device__ __forceinline__ void adam_part(
    const pylo_rule &rule, const Record &record, const pylo_step &step, const pylo_stored &stored, const FlatPart &part) {
    const pylo_tensor &t = record.tensor;
    const bool moved = is_moved<Plain>(t);
    for (Index<Plain> i = (Index<Plain>)part.begin + (int)threadIdx.x; i < (Index<Plain>)part.end; i += SUM_THREADS) {
        const float param = read<Plain>(t.param, t.param_dtype, i);
        const int64_t block = Plain ? 0 : block_of(record, stored, i);
        float grad = 0, momentum = load_state<0, Plain>(t, stored, i, block), rms = load_state<RMS_STATE, Plain>(t, stored, i, block);
        if (!moved) grad = seen_gradient<Plain>(rule, step, read<Plain>(step.grad, step.grad_dtype, i), param);
        const float proposed = adam_step(rule, step, grad, momentum, rms, moved);
        if (!moved) {
            device(t.momentum[0])[i] = momentum;
            device(t.rms)[i] = rms;
        }
        finish<Plain>(t, step, i, param, proposed);
    }
}

// Of all rules: parameters from directions that are complete, where apply or whoever finished them has left them; and the
// steps of Adam, which wait for nothing but gradients and so come with them, in one launch. A block does one or the other.
__device__ __forceinline__ void update(const Arguments &arguments) {
    const FlatPart part = arguments.applies[blockIdx.x];
    const Record &record = arguments.records[part.record];
    const pylo_tensor &t = record.tensor;
    const pylo_step step = arguments.steps[part.record];
    const bool is_float = !record.wide && t.param_dtype == PYLO_FLOAT32;
    if (t.direction_scale) {
        const Slice slice = arguments.slices[part.slice];
        if (is_float && !record.sliced)
            write_part<true>(record, slice, step, part);
        else
            write_part<false>(record, slice, step, part);
        return;
    }
    const pylo_rule rule = arguments.sections[t.rule].rule;  // copies, as in collect_part()
    const pylo_stored &stored = arguments.stored[part.record];
    const bool as_given = step.grad_dtype == PYLO_FLOAT32 && step.l2 == 0.0f && !(step.flags & PYLO_ZERO_NONFINITE);
    if (is_float && as_given && !t.direction && !is_moved(t))
        adam_part<true>(rule, record, step, stored, part);
    else
        adam_part<false>(rule, record, step, stored, part);
}

}  // namespace PYLO_ISA
}  // namespace pylo
