// What is read and written of elements: gradient, parameter and state, a run of lanes at a time.
#pragma once

#include "formats.h"
#include "walk.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Some lanes of all streams of a record: in the tensors, or in copies where these are not floats without gaps.
template <bool Factored, int Capacity>
struct Window {
    const float *grad;
    float *param, *momentum[3], *rms, *diagonal[3];
    Run run;
    const bool moved;   // accumulators are those after the step
    const bool direct;  // all states are floats without gaps
    bool in_place;      // so are those of this run, which end with a vector: no copies

    PYLO_FN explicit Window(const Job &job, bool moved = false) : moved(moved), direct(has_direct_state(job)) {}

    PYLO_FN void load(const Job &job, const Run &lanes) {
        const pylo_tensor &t = *job.tensor;
        run = lanes;
        grad = run.load(job.step->grad, job.step->grad_dtype, buffer[0]);
        param = run.load(t.param, t.param_dtype, buffer[1]);
        // One question, where each state would ask several: those of a tile were 5 % of the time of a small network.
        in_place = direct && run.count == run.padded;
        if (in_place) {
            rms = (float *)t.rms + run.index;
            for (int k = 0; k < 3; ++k) {
                momentum[k] = (float *)t.momentum[k] + run.index;
                if constexpr (!Factored) diagonal[k] = t.diagonal[k] + run.index;
            }
            return;
        }
        rms = buffer[2];
        for (int k = 0; k < 3; ++k) momentum[k] = buffer[3 + k];
        if (t.state_dtype == PYLO_FLOAT32) {
            rms = t.rms ? run.load(t.rms, PYLO_FLOAT32, rms) : zeros(run, rms);
            for (int k = 0; k < 3; ++k)
                momentum[k] = t.momentum[k] ? run.load(t.momentum[k], PYLO_FLOAT32, momentum[k]) : zeros(run, momentum[k]);
        } else {
            load_states(job, run, {momentum[0], momentum[1], momentum[2], rms});
        }
        for (int k = 0; k < 3; ++k) {
            // 1 beyond the end: the inverse root of 0 may be infinite.
            if constexpr (!Factored) diagonal[k] = run.load(t.diagonal[k], PYLO_FLOAT32, buffer[6 + k], 1);
        }
    }

    // The same, of states that `move(gradients that the rule sees, memory for states)` moves on and leaves in this memory.
    template <class Move>
    PYLO_FN void load_moving(const Job &job, const pylo_rule &rule, const pylo_step &step, const Run &lanes, Move &&move) {
        const pylo_tensor &t = *job.tensor;
        run = lanes;
        in_place = false;
        const float *stored = run.load(step.grad, step.grad_dtype, buffer[0]);
        param = run.load(t.param, t.param_dtype, buffer[1]);
        grad = buffer[0];
        for (int lane = 0; lane < run.padded; lane += Vec::lanes)
            seen_gradient(rule, step, Vec::load(stored + lane), Vec::load(param + lane)).store(buffer[0] + lane);
        rms = t.rms ? buffer[2] : zeros(run, buffer[2]);
        for (int k = 0; k < 3; ++k) momentum[k] = t.momentum[k] ? buffer[3 + k] : zeros(run, buffer[3 + k]);
        move(grad, {momentum[0], momentum[1], momentum[2], rms});
    }

    PYLO_FN void prefetch(int lane) const {
        fetch(grad + lane);
        fetch(param + lane);
        fetch(rms + lane);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            fetch(momentum[k] + lane);
            if constexpr (!Factored) fetch(diagonal[k] + lane);
        }
    }

    // Asks for the states that follow in memory, where they are not floats: prefetch() is of copies then.
    PYLO_FN void prefetch_stored(const Job &job) const {
        const pylo_tensor &t = *job.tensor;
        if (t.state_dtype == PYLO_FLOAT32 || run.step != 1) return;
        const int64_t next = run.index + run.count;
        pylo::prefetch(t.rms, t.state_dtype, next, run.count);
        for (int k = 0; k < 3; ++k) pylo::prefetch(t.momentum[k], t.state_dtype, next, run.count);
    }

    // The element at a lane, accumulators updated if they are not yet. `Seen`: gradients are as the rule sees them.
    template <bool Seen = false>
    PYLO_FN Element<Vec> element(const pylo_rule &rule, const pylo_step &step, int lane) const {
        Element<Vec> x;
        x.param = Vec::load(param + lane);
        x.grad = Vec::load(grad + lane);
        if constexpr (!Seen) x.grad = seen_gradient(rule, step, x.grad, x.param);
        x.rms = Vec::load(rms + lane);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            x.momentum[k] = Vec::load(momentum[k] + lane);
            if constexpr (!Factored) x.diagonal[k] = Vec::load(diagonal[k] + lane);
        }
        if (!moved) accumulate<Factored>(rule, x);
        return x;
    }

    // Into the window; store_state() brings copies back to the tensors.
    PYLO_FN void keep_state(const Element<Vec> &x, int lane) {
        x.rms.store(rms + lane);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            x.momentum[k].store(momentum[k] + lane);
            if constexpr (!Factored) x.diagonal[k].store(diagonal[k] + lane);
        }
    }

    PYLO_FN void store_state(const Job &job) const {
        if (moved || in_place) return;
        const pylo_tensor &t = *job.tensor;
        if (t.rms) run.store(t.rms, PYLO_FLOAT32, rms);
        for (int k = 0; k < 3; ++k) {
            if (t.momentum[k]) run.store(t.momentum[k], PYLO_FLOAT32, momentum[k]);
            if constexpr (!Factored) run.store(t.diagonal[k], PYLO_FLOAT32, diagonal[k]);
        }
    }

    PYLO_FN void store_param(const Job &job) const {
        run.store(job.tensor->param, job.tensor->param_dtype, param);
    }

private:
    static bool has_direct_state(const Job &job) {
        const pylo_tensor &t = *job.tensor;
        const bool all_kept = t.rms && t.momentum[0] && t.momentum[1] && t.momentum[2];
        return all_kept && t.state_dtype == PYLO_FLOAT32 && job.geometry.lane_step == 1;
    }

    alignas(64) float buffer[Factored ? 6 : 9][Capacity];
};

// A channel of the statistic that varies along lanes, from `entry` on.
PYLO_FN float *lane_statistic(const Job &job, float *row, float *col, int k, int64_t entry) {
    const pylo_tensor &t = *job.tensor;
    return job.geometry.row_varies ? row + k * t.row_numel + entry : col + k * t.col_numel + entry;
}

PYLO_FN float fixed_statistic(const Job &job, const float *row, const float *col, int k, int64_t entry) {
    const pylo_tensor &t = *job.tensor;
    return job.geometry.row_varies ? col[k * t.col_numel + entry] : row[k * t.row_numel + entry];
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
