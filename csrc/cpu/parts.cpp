#include "parts.h"

#include <algorithm>

namespace pylo {
namespace {

struct Size {
    int64_t outer, lanes;
};

// Of a part of a stage that computes little.
Size size_of_stream(const Geometry &g, bool by_slice) {
    const int64_t lanes = std::min<int64_t>(g.lanes, by_slice && g.lane_norm_step ? 1 : 1 << 16);
    return {(1 << 16) / lanes, lanes};
}

// How large a part is at most: large enough that what is done once for each does not count, small enough that threads
// share a tensor evenly.
Size part_size(Stage stage, const pylo_tensor &t, const Geometry &g) {
    switch (stage) {
        case COLLECT:
            // A part sums whole runs of lanes, and has sums per lane of its own: at most one for 64 elements.
            if (t.d0_axis < 0) return {1, 1 << 18};
            return {std::max<int64_t>((1 << 18) / g.lanes, 64 * g.slices), g.lanes};
        case MEASURE:
        case DESCRIBE: {
            const Size size = size_of_stream(g, stage == DESCRIBE);
            // Each part has sums of its own for all slices.
            if (stage == MEASURE || t.norm_slices <= 1) return size;
            return {std::max(size.outer, 512 * t.norm_slices / size.lanes), size.lanes};
        }
        case APPLY: {
            if (t.direction_scale) return size_of_stream(g, true);
            // Many rows of few lanes, so that what lanes contribute to the network is computed once for many rows. 768
            // is a multiple of every instruction set's tile: only the last part of a row has an end that is none.
            const int64_t most = t.d0_axis < 0 ? 1 << 15 : g.lane_norm_step ? 1 : 768, lanes = std::min(g.lanes, most);
            return {(1 << 16) / lanes, lanes};
        }
        case ADVANCE:
            return {1, 1 << 15};
        case PREPARE:
            break;
    }
    return {1, 1};
}

// Calls cut(outer_begin, outer_end, lane_begin, lane_end) for every part of a record.
template <class Cut>
void cut_record(Stage stage, const pylo_rule &rule, const pylo_tensor &t, const Geometry &g, Cut &&cut) {
    if (!is_in(stage, rule)) return;
    if (stage == PREPARE) return cut(0, 1, 0, 1);  // the statistics of a whole tensor, whatever the box
    if (local_numel(t) == 0 || (stage == ADVANCE && t.state_dtype == PYLO_FLOAT32)) return;
    const Size size = part_size(stage, t, g);
    for (int64_t first = 0; first < g.outer; first += size.outer)
        for (int64_t lane = 0; lane < g.lanes; lane += size.lanes)
            cut(first, std::min(first + size.outer, g.outer), lane, std::min(lane + size.lanes, g.lanes));
}

// Blocks are runs of elements as they are in memory, whatever their axes.
Geometry geometry_for(Stage stage, const pylo_tensor &t) {
    if (stage != ADVANCE) return geometry(t);
    Geometry flat = {};
    flat.lanes = local_numel(t);
    flat.lane_step = flat.outer = flat.slices = 1;
    return flat;
}

// Adds the sums per lane of a record's parts, part after part.
void merge_lanes(const pylo_tensor &t, const Geometry &g, const double *partial) {
    double *sums = g.row_varies ? t.row_sums : t.col_sums;
    const int64_t *steps = g.row_varies ? g.row_step : g.col_step;
    const int64_t run = round_up(g.lanes, 16);
    for (int64_t slice = 0; slice < g.slices; ++slice) {
        int64_t entry = g.row_varies ? t.row_offset : t.col_offset, rest = slice;
        for (int axis = 0; axis < g.outer_axes; ++axis)
            if (g.slice_step[axis]) {
                entry += rest / g.slice_step[axis] * steps[axis];
                rest %= g.slice_step[axis];
            }
        for (int64_t lane = 0; lane < g.lanes; ++lane)
            sums[entry + lane * g.lane_stat_step] += partial[slice * run + lane];
    }
}

}  // namespace

bool is_in(Stage stage, const pylo_rule &rule) {
    if (stage == MEASURE) return rule.measures;
    return (stage != PREPARE && stage != DESCRIBE) || rule.layers > 0;
}

int64_t partial_doubles(Stage stage, const pylo_tensor &t, const Geometry &g) {
    switch (stage) {
        case COLLECT:
            return 1 + (t.d0_axis < 0 ? 0 : g.slices * round_up(g.lanes, 16));
        case MEASURE:
            return PYLO_TENSOR_SUMS;
        case DESCRIBE:
            return t.norm_slices * PYLO_SLOTS;
        default:
            return 0;
    }
}

Plan make_plan(Stage stage, const pylo_call &call) {
    Plan plan;
    plan.geometries.reserve((size_t)call.count);
    plan.first_part.reserve((size_t)call.count + 1);
    plan.parts.reserve((size_t)call.count);  // small tensors have one each
    for (int64_t i = 0; i < call.count; ++i) {
        const pylo_tensor &t = call.tensors[i];
        plan.geometries.push_back(geometry_for(stage, t));
        const Geometry &g = plan.geometries.back();
        const int64_t each = partial_doubles(stage, t, g);
        plan.first_part.push_back((int64_t)plan.parts.size());
        const pylo_stored *stored = call.stored ? &call.stored[i] : nullptr;
        if (stage == ADVANCE && moves_in_apply(call.rules[t.rule], t, stored, geometry_for(APPLY, t))) continue;
        cut_record(stage, call.rules[t.rule], t, g, [&](int64_t outer_begin, int64_t outer_end, int64_t lane_begin, int64_t lane_end) {
            plan.parts.push_back({i, outer_begin, outer_end, lane_begin, lane_end, plan.doubles});
            plan.doubles += each;
        });
    }
    plan.first_part.push_back((int64_t)plan.parts.size());
    return plan;
}

int64_t workspace_doubles(const pylo_call &call) {
    int64_t most = 0;
    for (Stage stage : {COLLECT, MEASURE, DESCRIBE}) {
        int64_t total = 0;
        for (int64_t i = 0; i < call.count; ++i) {
            const pylo_tensor &t = call.tensors[i];
            const Geometry g = geometry(t);
            const int64_t each = partial_doubles(stage, t, g);
            cut_record(stage, call.rules[t.rule], t, g, [&](int64_t, int64_t, int64_t, int64_t) { total += each; });
        }
        most = std::max(most, total);
    }
    return most;
}

void clear_sums(const pylo_tensor &t) {
    if (t.d0_axis < 0) return;
    std::fill_n(t.row_sums, t.row_numel, 0.0);
    std::fill_n(t.col_sums, t.col_numel, 0.0);
}

void merge(Stage stage, const pylo_call &call, const Plan &plan, const double *scratch, int64_t i) {
    const pylo_tensor &t = call.tensors[i];
    if (!is_in(stage, call.rules[t.rule])) return;
    const int64_t first = plan.first_part[(size_t)i], end = plan.first_part[(size_t)i + 1];
    double *sums = stage == DESCRIBE ? t.feature_sums : stage == MEASURE ? t.tensor_sums : nullptr;
    const int64_t count = stage == DESCRIBE || stage == MEASURE ? partial_doubles(stage, t, plan.geometries[(size_t)i]) : 0;
    std::fill_n(sums, count, 0.0);
    if (stage == COLLECT) call.grad_squares[i] = 0;
    for (int64_t part = first; part < end; ++part) {
        const double *partial = scratch + plan.parts[(size_t)part].slot;
        for (int64_t k = 0; k < count; ++k) sums[k] += partial[k];
        if (stage != COLLECT) continue;
        call.grad_squares[i] += partial[0];
        if (t.d0_axis >= 0) merge_lanes(t, plan.geometries[(size_t)i], partial + 1);
    }
}

}  // namespace pylo
