// apply for a rule without layers: a few operations for each element, bound by memory.
#pragma once

#include "elements.h"
#include "moving.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Of state that is not stored as floats: a block moves on, and the step is made of what is stored of it.
void adam_in_blocks(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const pylo_rule rule = *job.rule;  // copies, as below
    const pylo_step step = *job.step;
    const Moving first = {0, true, rule.momentum_keep[0], rule.momentum_weight[0]};
    const Moving second = {RMS_STATE, true, rule.rms_keep, rule.rms_weight};
    alignas(64) float buffer[2][BLOCK], momentum[BLOCK], rms[BLOCK];
    alignas(64) uint32_t hashes[BLOCK];
    uint8_t copies[2][BLOCK];
    uint16_t halves[2][BLOCK];
    for_blocks(job, !t.direction, [&](const Run &run, int64_t block, const float *grad) __attribute__((always_inline)) {
        make_hashes(job.stored->noise[0], (uint64_t)(job.stored->first + run.index), run.padded, hashes);
        float *param = nullptr, *direction = t.direction ? buffer[1] : nullptr;
        if (!direction) param = run.load(t.param, t.param_dtype, buffer[0]);
        const auto step_by = [=](int lane, Vec m, Vec divisor) __attribute__((always_inline)) {
            const Vec proposed = adam_quotient(step, m, divisor);
            if (direction)
                proposed.store(direction + lane);
            else
                updated_param(step, Vec::load(param + lane), proposed).store(param + lane);
        };
        // The root in one loop and the division in the next: between what is stored and the step of an element is a long way, and
        // with both on it processors found too few elements at once to keep busy with. That took a fifth of the time of codes
        // and a tenth of that of halves.
        if (t.state_dtype == PYLO_BFLOAT16) {
            const Halves<false, LOWER> one(job, first, run, halves[0]);
            const Halves<true, UPPER> other(job, second, run, halves[1]);
            for (int lane = 0; lane < run.padded; lane += Vec::lanes)
                adam_divisor(rule, step, other.move(lane, Vec::load(grad + lane), load_bits(hashes + lane))).store(rms + lane);
            for (int lane = 0; lane < run.padded; lane += Vec::lanes)
                step_by(lane, one.move(lane, Vec::load(grad + lane), load_bits(hashes + lane)), Vec::load(rms + lane));
            one.store();
            other.store();
        } else {
            Codes<false> one(job, first, run, block, copies[0]);
            Codes<true> other(job, second, run, block, copies[1]);
            other.move(grad, rms);
            one.move(grad, momentum);
            float *const divisors = rms;  // in place
            other.encode<UPPER>(rms, hashes, [=](int lane, Vec r) __attribute__((always_inline)) {
                adam_divisor(rule, step, r).store(divisors + lane);
            });
            one.encode<LOWER>(momentum, hashes, [=](int lane, Vec m) __attribute__((always_inline)) {
                step_by(lane, m, Vec::load(divisors + lane));
            });
            one.store();
            other.store();
        }
        if (direction)
            run.store(t.direction, t.direction_dtype, direction);
        else
            run.store(t.param, t.param_dtype, param);
    });
}

void adam(const Job &job) {
    if (is_moved(job)) return adam_in_blocks(job);
    const pylo_tensor &t = *job.tensor;
    // Copies: of what pointers lead to, the compiler could not know that no store changes it, and would read every number
    // again for every vector.
    const pylo_rule rule = *job.rule;
    const pylo_step step = *job.step;
    alignas(64) float buffer[5][WIDE];
    for_runs(job, [&](const Position &, int64_t, const Run &run) __attribute__((always_inline)) {
        float *param = run.load(t.param, t.param_dtype, buffer[1]), *rms = run.load(t.rms, PYLO_FLOAT32, buffer[2]);
        float *momentum = run.load(t.momentum[0], PYLO_FLOAT32, buffer[3]);
        const float *grad = run.load(step.grad, step.grad_dtype, buffer[0]);
        float *direction = t.direction ? buffer[4] : nullptr;
        for (int lane = 0; lane < run.padded; lane += Vec::lanes) {
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
        run.store(t.momentum[0], PYLO_FLOAT32, momentum);
        run.store(t.rms, PYLO_FLOAT32, rms);
        if (direction)
            run.store(t.direction, t.direction_dtype, direction);
        else
            run.store(t.param, t.param_dtype, param);
    });
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
