// advance: state that is not stored as floats moves on, block by block, before apply reads it.
//
// A stage of its own, since a scale belongs to a whole block, and apply takes elements in an order of its own. So steps are
// made of what is stored, as those of the reference are. Adam's, which takes them as they lie, has no need of it.
#pragma once

#include "formats.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

void advance(const Job &job) {
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_tensor &t = *job.tensor;
    if (rule.layers == 0) return;
    const bool is_network = rule.layers > 0;
    alignas(64) float values[BLOCK];
    alignas(64) uint32_t hashes[BLOCK];
    for_blocks(job, [&](const Run &run, int64_t block, const float *grad) __attribute__((always_inline)) {
        const auto hash = [&](int pair) __attribute__((always_inline)) {
            make_hashes(job.stored->noise[pair], (uint64_t)(job.stored->first + run.index), run.count, hashes);
        };
        const auto momentum = [&](int k, auto half) __attribute__((always_inline)) {
            const float weight = is_network ? rule.momentum_weight[k] : job.step->momentum_weight;
            const float keep = is_network ? rule.momentum_keep[k] : 1 - weight;
            move_block<false, decltype(half)::value, false>(job, k, run, block, grad, hashes, keep, weight, values);
        };
        const bool has_rms = is_network && t.rms;
        if (t.momentum[0] || has_rms) hash(0);
        if (t.momentum[0]) momentum(0, In<LOWER>{});
        if (has_rms)
            move_block<true, UPPER, false>(job, RMS_STATE, run, block, grad, hashes, rule.rms_keep, rule.rms_weight, values);
        if (!is_network || !(t.momentum[1] || t.momentum[2])) return;
        hash(1);
        if (t.momentum[1]) momentum(1, In<LOWER>{});
        if (t.momentum[2]) momentum(2, In<UPPER>{});
    });
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
