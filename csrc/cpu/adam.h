// apply for a rule without layers.
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
    alignas(64) float buffer[5][WIDE];
    for (int64_t first = job.part.lane_begin; first < job.part.lane_end; first += WIDE) {
        const int count = (int)smaller(WIDE, job.part.lane_end - first), padded = (int)round_up(count, Vec::lanes);
        const auto load = [&](void *base, int dtype, int stream) {
            return load_lanes(base, dtype, first, 1, count, padded, 0, buffer[stream]);
        };
        const float *grad = load(const_cast<void *>(step.grad), step.grad_dtype, 0);
        float *param = load(t.param, t.param_dtype, 1), *rms = load(t.rms, PYLO_FLOAT32, 2);
        float *momentum = load(t.momentum[0], PYLO_FLOAT32, 3);
        float *direction = t.direction ? buffer[4] : nullptr;
        for (int lane = 0; lane < padded; lane += Vec::lanes) {
            const Vec p = Vec::load(param + lane);
            const Vec g = seen_gradient(rule, step, Vec::load(grad + lane), p);
            Vec m = Vec::load(momentum + lane), r = Vec::load(rms + lane);
            const Vec proposed = adam_step(rule, step, g, m, r);
            m.store(momentum + lane);
            r.store(rms + lane);
            if (direction)
                proposed.store(direction + lane);
            else
                updated_param(step, p, proposed).store(param + lane);
        }
        store_lanes(t.momentum[0], PYLO_FLOAT32, first, 1, count, momentum);
        store_lanes(t.rms, PYLO_FLOAT32, first, 1, count, rms);
        if (direction)
            store_lanes(t.direction, PYLO_FLOAT32, first, 1, count, direction);
        else
            store_lanes(t.param, t.param_dtype, first, 1, count, param);
    }
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
