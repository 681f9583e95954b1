// A call cut into parts for threads, and the partial sums of parts added up.
//
// Every part sums into scratch of its own. When all have ended, those of a record are added in the order of its parts.
// So a sum does not depend on which thread made which part, nor on how many threads there are.
#pragma once

#include <vector>

#include "kernels.h"

namespace pylo {

enum Stage { COLLECT, MEASURE, PREPARE, DESCRIBE, ADVANCE, APPLY };

struct Plan {
    std::vector<Geometry> geometries;
    std::vector<Part> parts;
    std::vector<int64_t> first_part;  // of every record, and the end
    int64_t doubles = 0;              // of scratch
};

// Whether a stage has something to do with the tensors of a rule.
bool is_in(Stage stage, const pylo_rule &rule);

// Throws std::bad_alloc.
Plan make_plan(Stage stage, const pylo_call &call);

// Doubles of scratch that each part of a record needs.
int64_t partial_doubles(Stage stage, const pylo_tensor &t, const Geometry &geometry);

// Doubles of scratch that suffice for every stage.
int64_t workspace_doubles(const pylo_call &call);

// Before the parts of collect: they add to sums of the whole tensor, of which the box may hold only some.
void clear_sums(const pylo_tensor &t);

// After the parts of a stage that sums: the sums of record `i`.
void merge(Stage stage, const pylo_call &call, const Plan &plan, const double *scratch, int64_t i);

}  // namespace pylo
