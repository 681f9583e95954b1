// measure and apply for a rule that is Nesterov's momentum: two streams to read, one or two to write.
#pragma once

#include "elements.h"
#include "sums.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Whether new gradients agree with the momentum of those before: sums of their products, and of the momentum's squares.
void measure_agreement(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_step step = *job.step;
    Sums<2> sums;
    alignas(64) float buffer[3][WIDE];
    for_runs(job, [&](const Position &, int64_t, const Run &run) __attribute__((always_inline)) {
        const float *grad = run.load(step.grad, step.grad_dtype, buffer[0]);
        const float *momentum = load_state(job, 0, run, buffer[1]);
        const float *param = grad;  // anything that can be read: without l2 it is not used
        if (step.l2 != 0.0f) param = run.load(t.param, t.param_dtype, buffer[2]);
#pragma GCC unroll 4
        for (int half = 0; half < 16; half += Vec::lanes) {
            auto running = sums.running(half);
            for (int lane = half; lane < run.padded; lane += 16) {
                fetch(grad + lane + AHEAD);
                fetch(momentum + lane + AHEAD);
                const Vec g = seen_gradient(rule, step, Vec::load(grad + lane), Vec::load(param + lane));
                const Vec m = Vec::load(momentum + lane);
                running.of[0] = madd(g, m, running.of[0]);
                running.of[1] = madd(m, m, running.of[1]);
            }
            sums.keep(running, half);
        }
        sums.count(run.count);
    });
    sums.flush();
    for (int i = 0; i < 2; ++i) job.partial[i] += sums.total[i];
}

void nesterov(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_step step = *job.step;
    const float keep = rule.momentum_keep[0], weight = rule.momentum_weight[0];
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
