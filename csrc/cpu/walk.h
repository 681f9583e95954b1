// Where the elements of a part are, in memory and in the statistics, and the runs in which kernels take them.
#pragma once

#include "../core/formulas.h"
#include "kernels.h"
#include "storage.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Lanes of a run where memory is the bottleneck: of nine streams it fits into a first-level cache.
constexpr int WIDE = 512;

// A position on the outer axes and what it means in memory and in the statistics. It takes divisions to find one, and
// additions to go on to the next.
struct Position {
    const Geometry *geometry;
    int64_t index[PYLO_MAX_RANK];
    int64_t memory, row, col, slice, norm;

    PYLO_FN Position(const Job &job, int64_t outer) : geometry(&job.geometry) {
        memory = slice = 0;
        row = job.tensor->row_offset;
        col = job.tensor->col_offset;
        norm = job.tensor->norm_offset + job.part.lane_begin * geometry->lane_norm_step;
        for (int axis = geometry->outer_axes - 1; axis >= 0; --axis) {
            index[axis] = outer % geometry->extent[axis];
            outer /= geometry->extent[axis];
            move(axis, index[axis]);
        }
    }

    PYLO_FN void move(int axis, int64_t by) {
        memory += by * geometry->step[axis];
        row += by * geometry->row_step[axis];
        col += by * geometry->col_step[axis];
        slice += by * geometry->slice_step[axis];
        norm += by * geometry->norm_step[axis];
    }

    PYLO_FN void advance() {
        for (int axis = geometry->outer_axes - 1; axis >= 0; --axis) {
            move(axis, 1);
            if (++index[axis] < geometry->extent[axis]) return;
            move(axis, -index[axis]);
            index[axis] = 0;
        }
    }

    // Entry of the statistic that is constant along lanes, and first entry of the one that varies.
    PYLO_FN int64_t fixed() const { return geometry->row_varies ? col : row; }
    PYLO_FN int64_t lane() const { return geometry->row_varies ? row : col; }
};

PYLO_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls visit(position, first lane, run) for all runs of a part, at most WIDE lanes each.
template <class Visit>
PYLO_FN void for_runs(const Job &job, Visit &&visit) {
    const Part &part = job.part;
    const int64_t step = job.geometry.lane_step;
    Position at(job, part.outer_begin);
    for (int64_t outer = part.outer_begin; outer < part.outer_end; ++outer, at.advance())
        for (int64_t first = part.lane_begin; first < part.lane_end; first += WIDE)
            visit(at, first, Run(at.memory + first * step, step, (int)smaller(WIDE, part.lane_end - first)));
}

// Lanes between what is read and what is asked for. The rows of a narrow box are runs too short for the hardware to
// foresee: on an Intel core, the stages before apply were bound by misses. Beyond the end of a buffer it does no harm: a
// fetch never faults.
constexpr int AHEAD = 256;

PYLO_FN void fetch(const float *stream) { __builtin_prefetch(stream); }

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
