// describe: sums of squared features, for the normalisers of the network's inputs.
//
// Accumulators are updated in registers, forgotten, and updated once more in apply: multiplications cost less than to
// write four streams and to read them again.
#pragma once

#include "elements.h"
#include "sums.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// `Extra`: with the channels that only some rules read.
template <bool Factored, bool Extra>
void describe_part(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const Geometry &g = job.geometry;
    constexpr int channels = Extra ? Channels<Factored>::all : Channels<Factored>::common;
    const bool sliced = t.norm_slices > 1;
    Sums<channels> sums;
    Window<Factored, WIDE> window(job);
    alignas(64) float gathered[3][WIDE];
    const auto add_to_slice = [&](int64_t norm) {
        sums.flush();
        for (int channel = 0; channel < channels; ++channel) {
            job.partial[norm * SLOTS + Channels<Factored>::slot(channel)] += sums.total[channel];
            sums.total[channel] = 0;
        }
    };
    for_runs(job, [&](const Position &at, int64_t first, const Run &run) __attribute__((always_inline)) {
        window.load(job, run);
        window.prefetch_stored(job);
        const Run along(first * g.lane_stat_step, g.lane_stat_step, run.count);
        const float *lane_scale[3] = {};
        Vec fixed_scale[3];
        if constexpr (Factored)
            for (int k = 0; k < 3; ++k) {
                float *scale = lane_statistic(job, t.row_scale, t.col_scale, k, at.lane());
                lane_scale[k] = along.load(scale, PYLO_FLOAT32, gathered[k]);
                fixed_scale[k] = Vec(fixed_statistic(job, t.row_scale, t.col_scale, k, at.fixed()));
            }
        const auto describe = [&](int lane, auto &&put) __attribute__((always_inline)) {
            const Element<Vec> x = window.element(*job.rule, *job.step, lane);
            Vec scale[3];
            if constexpr (Factored)
#pragma GCC unroll 3
                for (int k = 0; k < 3; ++k) scale[k] = fixed_scale[k] * Vec::load(lane_scale[k] + lane);
            features<Factored>(*job.rule, Extra, x, scale, put);
        };
        const int whole = run.count / Vec::lanes * Vec::lanes;
#pragma GCC unroll 4
        for (int half = 0; half < 16; half += Vec::lanes) {
            auto running = sums.running(half);
            for (int lane = half; lane < whole; lane += 16) {
                window.prefetch(lane + AHEAD);
                describe(lane, [&](int channel, Vec f) __attribute__((always_inline)) {
                    running.of[channel] = madd(f, f, running.of[channel]);
                });
            }
            sums.keep(running, half);
        }
        if (whole < run.count)
            describe(whole, [&](int channel, Vec f) __attribute__((always_inline)) {
                sums.add_square(channel, whole, first_lanes(run.count - whole, f));
            });
        if (sliced)
            add_to_slice(at.norm);
        else
            sums.count(run.count);
    });
    if (!sliced) add_to_slice(0);
}

void describe(const Job &job) {
    const bool factored = job.tensor->d0_axis >= 0, extra = has_extra(*job.rule);
    if (factored)
        extra ? describe_part<true, true>(job) : describe_part<true, false>(job);
    else
        extra ? describe_part<false, true>(job) : describe_part<false, false>(job);
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
