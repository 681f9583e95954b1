// apply for a rule that is Nesterov's momentum: two streams to read, one or two to write.
#pragma once

#include "elements.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

void nesterov(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_step step = *job.step;
    const float weight = step.momentum_weight, keep = 1 - weight;
    const bool moved = is_moved(job);
    alignas(64) float buffer[4][WIDE];
    for_runs(job, [&](const Position &, int64_t, const Run &run) __attribute__((always_inline)) {
        const float *grad = run.load(step.grad, step.grad_dtype, buffer[0]);
        float *momentum = load_state(job, 0, run, buffer[1]);
        float *direction = t.direction ? buffer[3] : nullptr;
        float *param = nullptr;
        if (!direction || step.l2 != 0.0f) param = run.load(t.param, t.param_dtype, buffer[2]);
        for (int lane = 0; lane < run.padded; lane += Vec::lanes) {
            const Vec p = param ? Vec::load(param + lane) : Vec(0.0f);
            const Vec g = seen_gradient(rule, step, Vec::load(grad + lane), p);
            const Vec old = Vec::load(momentum + lane), m = moved ? old : ema(keep, weight, old, g);
            const Vec proposed = Vec(step.step_mult) * ema(keep, weight, m, g);
            m.store(momentum + lane);
            if (direction)
                proposed.store(direction + lane);
            else
                updated_param(step, p, proposed).store(param + lane);
        }
        if (!moved) run.store(t.momentum[0], PYLO_FLOAT32, momentum);
        if (direction)
            run.store(t.direction, t.direction_dtype, direction);
        else
            run.store(t.param, t.param_dtype, param);
    });
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
