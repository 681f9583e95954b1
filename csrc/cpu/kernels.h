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
