// advance: state that is not stored as floats moves on, block by block, before apply reads it.
//
// A stage of its own where a block's elements are not neighbours in the order in which apply takes them; elsewhere apply does it
// for a run at a time. So steps are made of what is stored, as those of the reference are. Adam's, which takes them as they
// lie, has no need of it.
#pragma once

#include "moving.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// All states at once: what becomes of an element depends on no other. `Returns`: what is stored too, as floats.
template <bool Returns>
__attribute__((noinline)) void advance_halves(
    const Job &job, const Moving (&by)[4], const Run &run, const float *grad, const uint32_t (&hashes)[2][BLOCK],
    float *const (&values)[4]) {
    uint16_t copies[4][BLOCK];
    const Halves<false, LOWER> first(job, by[0], run, copies[0]), second(job, by[1], run, copies[1]);
    const Halves<false, UPPER> third(job, by[2], run, copies[2]);
    const Halves<true, UPPER> square(job, by[3], run, copies[3]);
    const auto move = [&](int which, const auto &halves, int lane, Vec seen, Bits hash) __attribute__((always_inline)) {
        if (!by[which].is_kept) return;
        const Vec stored = halves.move(lane, seen, hash);
        if constexpr (Returns) stored.store(values[which] + lane);
    };
    for (int lane = 0; lane < run.padded; lane += Vec::lanes) {
        const Vec seen = Vec::load(grad + lane);
        const Bits hash = load_bits(hashes[0] + lane), other = load_bits(hashes[1] + lane);
        move(0, first, lane, seen, hash);
        move(1, second, lane, seen, other);
        move(2, third, lane, seen, other);
        move(3, square, lane, seen, hash);
    }
    first.store();
    second.store();
    third.store();
    square.store();
}

// All move on before any is encoded: until a scale is known, another state can move.
template <bool Returns>
PYLO_FN void advance_codes(
    const Job &job, const Moving (&by)[4], const Run &run, int64_t block, const float *grad,
    const uint32_t (&hashes)[2][BLOCK], float *const (&values)[4]) {
    uint8_t copies[4][BLOCK];
    Codes<false> first(job, by[0], run, block, copies[0]), second(job, by[1], run, block, copies[1]);
    Codes<false> third(job, by[2], run, block, copies[2]);
    Codes<true> square(job, by[3], run, block, copies[3]);
    const auto into = [](float *to) {
        return [to](int lane, Vec stored) __attribute__((always_inline)) {
            if constexpr (Returns) stored.store(to + lane);
        };
    };
    if (by[0].is_kept) first.move(grad, values[0]);
    if (by[1].is_kept) second.move(grad, values[1]);
    if (by[2].is_kept) third.move(grad, values[2]);
    if (by[3].is_kept) square.move(grad, values[3]);
    if (by[0].is_kept) first.encode<LOWER>(values[0], hashes[0], into(values[0]));
    if (by[1].is_kept) second.encode<LOWER>(values[1], hashes[1], into(values[1]));
    if (by[2].is_kept) third.encode<UPPER>(values[2], hashes[1], into(values[2]));
    if (by[3].is_kept) square.encode<UPPER>(values[3], hashes[0], into(values[3]));
    first.store();
    second.store();
    third.store();
    square.store();
}

// The states of a record with layers, and how they move on from block to block.
class Averages {
public:
    explicit Averages(const Job &job) : job(job) {
        const pylo_rule &rule = *job.rule;
        const pylo_tensor &t = *job.tensor;
        const float weight = job.step->momentum_weight;
        by[0] = {0, t.momentum[0] != nullptr, 1 - weight, weight};  // Nesterov's has one
        if (rule.layers < 0) return;
        for (int k = 0; k < 3; ++k) by[k] = {k, t.momentum[k] != nullptr, rule.momentum_keep[k], rule.momentum_weight[k]};
        by[RMS_STATE] = {RMS_STATE, t.rms != nullptr, rule.rms_keep, rule.rms_weight};
    }

    // A block, or with bfloat16 any run of as many elements at most. `values` is memory for them; afterwards, with `Returns`,
    // states that are kept are there as they are stored.
    template <bool Returns>
    PYLO_FN void move(const Run &run, int64_t block, const float *grad, float *const (&values)[4]) {
        const auto hash = [&](int pair) __attribute__((always_inline)) {
            make_hashes(job.stored->noise[pair], (uint64_t)(job.stored->first + run.index), run.padded, hashes[pair]);
        };
        if (by[0].is_kept || by[3].is_kept) hash(0);
        if (by[1].is_kept || by[2].is_kept) hash(1);
        if (job.tensor->state_dtype == PYLO_BFLOAT16)
            advance_halves<Returns>(job, by, run, grad, hashes, values);
        else
            advance_codes<Returns>(job, by, run, block, grad, hashes, values);
    }

private:
    const Job &job;
    Moving by[4] = {{0}, {1}, {2}, {RMS_STATE}};
    alignas(64) uint32_t hashes[2][BLOCK] = {};
};

void advance(const Job &job) {
    if (job.rule->layers == 0) return;
    Averages averages(job);
    alignas(64) float values[4][BLOCK];
    for_blocks(job, false, [&](const Run &run, int64_t block, const float *grad) __attribute__((always_inline)) {
        averages.move<false>(run, block, grad, {values[0], values[1], values[2], values[3]});
    });
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
