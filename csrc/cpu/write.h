// apply of directions that are complete: whoever finished them has left them where apply put them.
#pragma once

#include "elements.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

void write(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const pylo_step step = *job.step;  // a copy, as in adam()
    alignas(64) float params[WIDE], directions[WIDE];
    for_runs(job, [&](const Position &at, int64_t, const Run &run) __attribute__((always_inline)) {
        float *param = run.load(t.param, t.param_dtype, params);
        const float *direction = run.load(t.direction, t.direction_dtype, directions);
        const Vec scale(t.direction_scale[at.norm]);
        for (int lane = 0; lane < run.padded; lane += Vec::lanes) {
            fetch(param + lane + AHEAD);
            updated_param(step, Vec::load(param + lane), scale * Vec::load(direction + lane)).store(param + lane);
        }
        run.store(t.param, t.param_dtype, param);
    });
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
