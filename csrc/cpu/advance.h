// advance: state that is not stored as floats moves on, block by block, before apply reads it.
//
// A stage of its own, since a scale belongs to a whole block, and apply takes elements in an order of its own. So steps are
// made of what is stored, as those of the reference are. Adam's, which takes them as they lie, has no need of it.
#pragma once

#include "moving.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// All states at once: what becomes of an element depends on no other.
__attribute__((noinline)) void advance_halves(
    const Job &job, const Moving (&by)[4], const Run &run, const float *grad, const uint32_t (&hashes)[2][BLOCK]) {
    uint16_t copies[4][BLOCK];
    const Halves<false, LOWER> first(job, by[0], run, copies[0]), second(job, by[1], run, copies[1]);
    const Halves<false, UPPER> third(job, by[2], run, copies[2]);
    const Halves<true, UPPER> square(job, by[3], run, copies[3]);
    for (int lane = 0; lane < run.padded; lane += Vec::lanes) {
        const Vec seen = Vec::load(grad + lane);
        const Bits hash = load_bits(hashes[0] + lane), other = load_bits(hashes[1] + lane);
        if (by[0].is_kept) first.move(lane, seen, hash);
        if (by[1].is_kept) second.move(lane, seen, other);
        if (by[2].is_kept) third.move(lane, seen, other);
        if (by[3].is_kept) square.move(lane, seen, hash);
    }
    first.store();
    second.store();
    third.store();
    square.store();
}

// All move on before any is encoded: until a scale is known, another state can move.
PYLO_FN void advance_codes(
    const Job &job, const Moving (&by)[4], const Run &run, int64_t block, const float *grad,
    const uint32_t (&hashes)[2][BLOCK]) {
    alignas(64) float values[4][BLOCK];
    uint8_t copies[4][BLOCK];
    Codes<false> first(job, by[0], run, block, copies[0]), second(job, by[1], run, block, copies[1]);
    Codes<false> third(job, by[2], run, block, copies[2]);
    Codes<true> square(job, by[3], run, block, copies[3]);
    if (by[0].is_kept) first.move(grad, values[0]);
    if (by[1].is_kept) second.move(grad, values[1]);
    if (by[2].is_kept) third.move(grad, values[2]);
    if (by[3].is_kept) square.move(grad, values[3]);
    if (by[0].is_kept) first.encode<LOWER>(values[0], hashes[0]);
    if (by[1].is_kept) second.encode<LOWER>(values[1], hashes[1]);
    if (by[2].is_kept) third.encode<UPPER>(values[2], hashes[1]);
    if (by[3].is_kept) square.encode<UPPER>(values[3], hashes[0]);
    first.store();
    second.store();
    third.store();
    square.store();
}

void advance(const Job &job) {
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_tensor &t = *job.tensor;
    if (rule.layers == 0) return;
    const bool is_network = rule.layers > 0;
    const float weight = job.step->momentum_weight;
    Moving by[4] = {{0, t.momentum[0] != nullptr, 1 - weight, weight}, {1}, {2}, {RMS_STATE}};  // Nesterov's has one
    if (is_network) {
        for (int k = 0; k < 3; ++k) by[k] = {k, t.momentum[k] != nullptr, rule.momentum_keep[k], rule.momentum_weight[k]};
        by[RMS_STATE] = {RMS_STATE, t.rms != nullptr, rule.rms_keep, rule.rms_weight};
    }
    alignas(64) uint32_t hashes[2][BLOCK] = {};
    for_blocks(job, false, [&](const Run &run, int64_t block, const float *grad) __attribute__((always_inline)) {
        const auto hash = [&](int pair) __attribute__((always_inline)) {
            make_hashes(job.stored->noise[pair], (uint64_t)(job.stored->first + run.index), run.padded, hashes[pair]);
        };
        if (by[0].is_kept || by[3].is_kept) hash(0);
        if (by[1].is_kept || by[2].is_kept) hash(1);
        if (t.state_dtype == PYLO_BFLOAT16)
            advance_halves(job, by, run, grad, hashes);
        else
            advance_codes(job, by, run, block, grad, hashes);
    });
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
