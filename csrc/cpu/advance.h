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
    Moving moving[3];
    int momenta = 0;
    for (int k = 0; k < (is_network ? 3 : 1); ++k) {
        const float weight = is_network ? rule.momentum_weight[k] : job.step->momentum_weight;
        if (t.momentum[k]) moving[momenta++] = {k, is_network ? rule.momentum_keep[k] : 1 - weight, weight};
    }
    const bool has_rms = is_network && t.rms;
    const Moving square = {RMS_STATE, rule.rms_keep, rule.rms_weight};
    alignas(64) float values[4][BLOCK];
    alignas(64) uint32_t hashes[2][BLOCK];
    uint8_t copies[4][BLOCK];
    for_blocks(job, false, [&](const Run &run, int64_t block, const float *grad) __attribute__((always_inline)) {
        const auto hash = [&](int pair) __attribute__((always_inline)) {
            make_hashes(job.stored->noise[pair], (uint64_t)(job.stored->first + run.index), run.padded, hashes[pair]);
        };
        if (has_rms || t.momentum[0]) hash(0);
        if (is_network && (t.momentum[1] || t.momentum[2])) hash(1);
        // act(i, hashes, half of them) for all momenta
        const auto each = [&](auto &&act) __attribute__((always_inline)) {
            for (int i = 0; i < momenta; ++i)
                if (moving[i].state == 2)
                    act(i, hashes[1], In<UPPER>{});
                else
                    act(i, hashes[moving[i].state], In<LOWER>{});
        };
        if (t.state_dtype == PYLO_BFLOAT16) {
            if (has_rms) move_halves<true, UPPER>(job, square, run, grad, hashes[0], values[3]);
            return each([&](int i, const uint32_t *noise, auto half) __attribute__((always_inline)) {
                move_halves<false, decltype(half)::value>(job, moving[i], run, grad, noise, values[i]);
            });
        }
        // All move on before any is encoded: until a scale is known, another state can move.
        Codes<true> squares;
        Codes<false> codes[3];
        if (has_rms) (squares = Codes<true>(job, square, run, block, copies[3])).move(grad, values[3]);
        for (int i = 0; i < momenta; ++i)
            (codes[i] = Codes<false>(job, moving[i], run, block, copies[i])).move(grad, values[i]);
        if (has_rms) squares.encode<UPPER>(values[3], hashes[0]);
        each([&](int i, const uint32_t *noise, auto half) __attribute__((always_inline)) {
            codes[i].encode<decltype(half)::value>(values[i], noise);
        });
        if (has_rms) squares.store();
        for (int i = 0; i < momenta; ++i) codes[i].store();
    });
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
