// apply for a rule without layers: a few operations for each element, bound by memory.
#pragma once

#include "elements.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

void adam(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    // Copies: of what pointers lead to, the compiler could not know that no store changes it, and would read every number
    // again for every vector.
    const pylo_rule rule = *job.rule;
    const pylo_step step = *job.step;
    const bool moved = is_moved(job);
    alignas(64) float buffer[5][WIDE];
    for_runs(job, [&](const Position &, int64_t, const Run &run) __attribute__((always_inline)) {
        float *param = run.load(t.param, t.param_dtype, buffer[1]), *rms = load_state(job, RMS_STATE, run, buffer[2]);
        float *momentum = load_state(job, 0, run, buffer[3]);
        const float *grad = moved ? param : run.load(step.grad, step.grad_dtype, buffer[0]);  // no more needed then
        float *direction = t.direction ? buffer[4] : nullptr;
        for (int lane = 0; lane < run.padded; lane += Vec::lanes) {
            const Vec p = Vec::load(param + lane);
            const Vec g = seen_gradient(rule, step, Vec::load(grad + lane), p);
            Vec m = Vec::load(momentum + lane), r = Vec::load(rms + lane);
            const Vec proposed = adam_step(rule, step, g, m, r, moved);
            m.store(momentum + lane);
            r.store(rms + lane);
            if (direction)
                proposed.store(direction + lane);
            else
                updated_param(step, p, proposed).store(param + lane);
        }
        if (!moved) {
            run.store(t.momentum[0], PYLO_FLOAT32, momentum);
            run.store(t.rms, PYLO_FLOAT32, rms);
        }
        if (direction)
            run.store(t.direction, t.direction_dtype, direction);
        else
            run.store(t.param, t.param_dtype, param);
    });
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
