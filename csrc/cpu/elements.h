// What is read and written of elements: gradient, parameter and state, a run of lanes at a time.
#pragma once

#include "storage.h"
#include "walk.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Some lanes of all streams of a record.
template <bool Factored, int Capacity>
struct Window {
    const float *grad;
    float *param, *momentum[3], *rms, *diagonal[3];
    int count, padded;
    int64_t index, step;

    PYLO_FN void load(const Job &job, int64_t at, int lanes) {
        const pylo_tensor &t = *job.tensor;
        const int end = (int)round_up(lanes, Vec::lanes);
        count = lanes, padded = end, index = at, step = job.geometry.lane_step;
        grad = load_lanes(const_cast<void *>(job.step->grad), job.step->grad_dtype, at, step, lanes, end, 0, buffer[0]);
        param = load_lanes(t.param, t.param_dtype, at, step, lanes, end, 0, buffer[1]);
        rms = load_lanes(t.rms, PYLO_FLOAT32, at, step, lanes, end, 0, buffer[2]);
        for (int k = 0; k < 3; ++k) {
            momentum[k] = load_lanes(t.momentum[k], PYLO_FLOAT32, at, step, lanes, end, 0, buffer[3 + k]);
            if constexpr (!Factored)
                diagonal[k] = load_lanes(t.diagonal[k], PYLO_FLOAT32, at, step, lanes, end, 1, buffer[6 + k]);
        }
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

    // The element at a lane, accumulators updated.
    PYLO_FN Element<Vec> element(const Job &job, int lane) const {
        Element<Vec> x;
        x.param = Vec::load(param + lane);
        x.grad = seen_gradient(*job.rule, *job.step, Vec::load(grad + lane), x.param);
        x.rms = Vec::load(rms + lane);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            x.momentum[k] = Vec::load(momentum[k] + lane);
            if constexpr (!Factored) x.diagonal[k] = Vec::load(diagonal[k] + lane);
        }
        accumulate<Factored>(*job.rule, x);
        return x;
    }

    PYLO_FN void keep_state(const Element<Vec> &x, int lane) {
        x.rms.store(rms + lane);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            x.momentum[k].store(momentum[k] + lane);
            if constexpr (!Factored) x.diagonal[k].store(diagonal[k] + lane);
        }
    }

    PYLO_FN void store_state(const Job &job) const {
        const pylo_tensor &t = *job.tensor;
        store_lanes(t.rms, PYLO_FLOAT32, index, step, count, rms);
        for (int k = 0; k < 3; ++k) {
            store_lanes(t.momentum[k], PYLO_FLOAT32, index, step, count, momentum[k]);
            if constexpr (!Factored) store_lanes(t.diagonal[k], PYLO_FLOAT32, index, step, count, diagonal[k]);
        }
    }

    PYLO_FN void store_param(const Job &job) const {
        store_lanes(job.tensor->param, job.tensor->param_dtype, index, step, count, param);
    }

private:
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
