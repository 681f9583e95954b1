// What the library and the kernels of one instruction set know of each other: a unit of work, and the table of stages.
#pragma once

#include "../core/geometry.h"

namespace pylo {

// A part of a record, the unit of work: outer indices and lanes from begin to end. How a record is cut depends on the
// record alone, never on threads or instruction set, so neither do sums over parts.
struct Part {
    int64_t record, outer_begin, outer_end, lane_begin, lane_end, slot;
};

// What a kernel needs to know about the call besides the part. `partial` is the part's own scratch for sums.
struct Job {
    const pylo_rule *rule;
    const pylo_tensor *tensor;
    const pylo_step *step;
    const pylo_stored *stored;  // null if there is none
    Geometry geometry;
    Part part;
    double *partial;
};

constexpr int LINEAR = -1;

// Units of every hidden layer if they are so few that registers hold them, else 0; LINEAR if there is no such layer.
static inline int narrow_units(const pylo_rule &rule) {
    if (rule.layers == 1) return LINEAR;
    for (int layer = 1; layer < rule.layers - 1; ++layer)
        if (rule.width[layer] != rule.width[0]) return 0;
    return rule.layers > 1 && (rule.width[0] == 4 || rule.width[0] == 8) ? rule.width[0] : 0;
}

// Whether apply takes a record row by row (panels.h).
static inline bool has_panels(const pylo_rule &rule, const pylo_tensor &t, const Geometry &g) {
    return t.d0_axis >= 0 && t.norm_slices <= 1 && g.slices == 1 && narrow_units(rule) != 0;
}

// Whether its state, in a format, then moves on there and not in advance: where blocks are pieces of a row.
static inline bool moves_in_apply(const pylo_rule &rule, const pylo_tensor &t, const pylo_stored *stored, const Geometry &g) {
    if (!stored || t.state_dtype == PYLO_FLOAT32 || !has_panels(rule, t, g) || g.lane_step != 1) return false;
    const bool of_whole_blocks = g.lanes % PYLO_BLOCK == 0 && stored->row % g.lanes == 0;
    return t.state_dtype != PYLO_INT8 || of_whole_blocks || stored->row == g.lanes;
}

// One instruction set's kernels.
struct Kernels {
    void (*collect)(const Job &);
    void (*measure)(const Job &);
    void (*prepare)(const Job &);
    void (*describe)(const Job &);
    void (*advance)(const Job &);
    void (*apply)(const Job &);
    int64_t (*multiply_adds)(int64_t rounds);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace pylo
