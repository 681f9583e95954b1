// The axes of a record as the kernels walk them.
//
// One factored axis is the *lane* axis: vectors run along it, with a step in memory if it is not the fastest axis. The
// remaining axes, in memory order, are the *outer* axes, counted by one flat index. Among them is the other factored
// axis; the rest number the *slices*, each a matrix with row and column statistics of its own. A vector or scalar is all
// lanes. Of row and col, the one without the lane axis is constant along lanes (`fixed`); the other varies (`lane`).
#pragma once

#include "pylo.h"

// Functions here are static: see scalar.h on what must not be merged by the linker.

namespace pylo {

struct Geometry {
    int64_t lanes, lane_step;       // extent and distance in memory
    int64_t lane_stat_step;         // distance in the statistic that varies along lanes
    bool row_varies;                // whether that is row
    int outer_axes;
    int64_t outer, slices;          // products of extents
    int64_t extent[PYLO_MAX_RANK];  // of the outer axes
    int64_t step[PYLO_MAX_RANK], row_step[PYLO_MAX_RANK], col_step[PYLO_MAX_RANK], slice_step[PYLO_MAX_RANK];
    int64_t norm_step[PYLO_MAX_RANK];  // in slices over which features are normalised
    int64_t lane_norm_step;            // not 0 if every lane is in another such slice: then parts have one lane
};

static inline int64_t local_numel(const pylo_tensor &t) {
    int64_t numel = 1;
    for (int axis = 0; axis < t.rank; ++axis) numel *= t.extent[axis];
    return numel;
}

// Waste of cutting `extent` lanes into vectors of 16, and of gathering lanes that are not neighbours. Lanes that are
// `split` over slices are taken one by one. Of 16 on every machine: geometry decides in which order sums are made.
static inline double lane_cost(int64_t extent, int64_t step, bool split) {
    if (split && extent > 1) return 16.0 * 1.4;
    return (double)((extent + 15) / 16 * 16) / (double)(extent ? extent : 1) * (step == 1 ? 1.0 : 1.4);
}

static inline Geometry geometry(const pylo_tensor &t) {
    Geometry g = {};
    int64_t step[PYLO_MAX_RANK];
    int64_t next = 1;
    for (int axis = t.rank - 1; axis >= 0; --axis) {
        step[axis] = next;
        next *= t.extent[axis];
    }
    if (t.d0_axis < 0 || next == 0) {
        g.lanes = next;
        g.lane_step = g.outer = g.slices = 1;
        return g;
    }
    const int d0 = t.d0_axis, d1 = t.d1_axis;
    const double cost0 = lane_cost(t.extent[d0], step[d0], t.norm_stride[d0] != 0);
    const double cost1 = lane_cost(t.extent[d1], step[d1], t.norm_stride[d1] != 0);
    const bool take_d0 = cost0 < cost1 || (cost0 == cost1 && step[d0] < step[d1]);
    const int lane = take_d0 ? d0 : d1;
    g.lanes = t.extent[lane];
    g.lane_step = step[lane];
    g.row_varies = lane == d1;  // row keeps d1
    g.lane_norm_step = t.norm_stride[lane];
    g.lane_stat_step = g.row_varies ? t.row_stride[lane] : t.col_stride[lane];
    g.outer = g.slices = 1;
    for (int axis = t.rank - 1; axis >= 0; --axis) {
        if (axis == lane) continue;
        g.outer *= t.extent[axis];
        if (axis != d0 && axis != d1) g.slices *= t.extent[axis];
    }
    int64_t slice_step = g.slices;
    for (int axis = 0; axis < t.rank; ++axis) {
        if (axis == lane) continue;
        const int i = g.outer_axes++;
        g.extent[i] = t.extent[axis];
        g.step[i] = step[axis];
        g.row_step[i] = t.row_stride[axis];
        g.col_step[i] = t.col_stride[axis];
        g.norm_step[i] = t.norm_stride[axis];
        if (axis != d0 && axis != d1) g.slice_step[i] = slice_step /= t.extent[axis];
    }
    return g;
}

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace pylo
