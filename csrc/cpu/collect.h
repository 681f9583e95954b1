// collect: sums of squared gradients, of one stream and so bound by memory. Nothing but sums is written.
#pragma once

#include "elements.h"
#include "sums.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// partial[0] is the sum of squares of stored gradients; from partial[1] on, (slices, lanes), are those of the gradients
// that the rule reads, summed over the fixed axis. Their sums over lanes belong to this part alone and go to their place.
template <bool Factored>
void collect_part(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_step step = *job.step;
    const Geometry &g = job.geometry;
    double *fixed_sums = g.row_varies ? t.col_sums : t.row_sums;
    Sums<2> sums;
    alignas(64) float grads[WIDE], params[WIDE];
    for_runs(job, [&](const Position &at, int64_t first, const Run &run) __attribute__((always_inline)) {
        const float *grad = run.load(step.grad, step.grad_dtype, grads);
        const float *param = grad;  // anything that can be read: without l2 it is not used
        if (step.l2 != 0.0f) param = run.load(t.param, t.param_dtype, params);
        double *lane_sums = job.partial + 1 + at.slice * round_up(g.lanes, 16) + first;
#pragma GCC unroll 4
        for (int half = 0; half < 16; half += Vec::lanes) {
            auto running = sums.running(half);
            for (int lane = half; lane < run.padded; lane += 16) {
                const Vec raw = Vec::load(grad + lane);
                fetch(grad + lane + AHEAD);
                running.of[0] = madd(raw, raw, running.of[0]);
                if constexpr (Factored) {
                    const Vec x = seen_gradient(rule, step, raw, Vec::load(param + lane));
                    running.of[1] = madd(x, x, running.of[1]);
                    add_to(lane_sums + lane, x * x);
                }
            }
            sums.keep(running, half);
        }
        if constexpr (Factored) {
            sums.flush();  // what is constant along lanes gets the sum of every run
            fixed_sums[at.fixed()] += sums.total[1];
            sums.total[1] = 0;
        } else {
            sums.count(run.count);
        }
    });
    sums.flush();
    job.partial[0] = sums.total[0];
}

void collect(const Job &job) {
    if (job.tensor->d0_axis < 0)
        collect_part<false>(job);
    else
        collect_part<true>(job);
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
