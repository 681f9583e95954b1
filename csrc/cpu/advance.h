// advance: state that is not stored as floats moves on, block by block, before apply reads it.
//
// A stage of its own, since a scale belongs to a whole block, and apply takes elements in an order of its own. So steps are
// made of what is stored, as those of the reference are.
#pragma once

#include "../core/formulas.h"
#include "formats.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Parts are runs of elements of the box: each has the blocks that begin in it.
void advance(const Job &job) {
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_step step = *job.step;
    const pylo_tensor &t = *job.tensor;
    const Blocks blocks(*job.stored);
    alignas(64) float buffer[4][BLOCK];
    const int momenta = rule.layers > 0 ? 3 : 1;
    const auto move = [&](int which, const Run &run, const float *values, float keep, float weight)
                          __attribute__((always_inline)) {
        const float *state = load_state(job, which, run, buffer[2]);
        for (int lane = 0; lane < run.padded; lane += Vec::lanes)
            ema(keep, weight, Vec::load(state + lane), Vec::load(values + lane)).store(buffer[2] + lane);
        store_block(job, which, run, buffer[2]);
    };
    for (int64_t first = blocks.begin(job.part.lane_begin), end; first < job.part.lane_end; first = end) {
        end = blocks.end(first);
        const Run run(first, 1, (int)(end - first));
        const float *stored = run.load(step.grad, step.grad_dtype, buffer[0]);
        const float *param = stored;  // anything that can be read: without l2 it is not used
        if (step.l2 != 0.0f) param = run.load(t.param, t.param_dtype, buffer[1]);
        float *grad = buffer[3];
        for (int lane = 0; lane < run.padded; lane += Vec::lanes)
            seen_gradient(rule, step, Vec::load(stored + lane), Vec::load(param + lane)).store(grad + lane);
        if (rule.layers == PYLO_NESTEROV) {
            move(0, run, grad, 1 - step.momentum_weight, step.momentum_weight);
            continue;
        }
        for (int k = 0; k < momenta; ++k) move(k, run, grad, rule.momentum_keep[k], rule.momentum_weight[k]);
        for (int lane = 0; lane < run.padded; lane += Vec::lanes) {
            const Vec g = Vec::load(grad + lane);
            (g * g).store(grad + lane);
        }
        move(RMS_STATE, run, grad, rule.rms_keep, rule.rms_weight);
    }
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
