// Makes the plan of a table (plan.h), on the host: which blocks of every kernel read what, and where they leave their sums.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../core/geometry.h"
#include "plan.h"

#ifndef PYLO_NARROW
// Fewer elements have indices of 32 bits, also where a block looks beyond the last one.
#define PYLO_NARROW (((int64_t)1 << 31) - 65536)
#endif

namespace pylo {
namespace {

// A reciprocal rounded up, by which n below 2^31 are divided exactly (Granlund and Montgomery, "Division by invariant
// integers using multiplication"): a device has no instruction for it, and every index is divided once for each axis.
Divisor divisor(int64_t n) {
    uint32_t shift = 0;
    while ((int64_t)1 << shift < n) ++shift;
    const uint64_t magic = ((uint64_t)1 << 32) * (((uint64_t)1 << shift) - (uint64_t)n) / (uint64_t)n + 1;
    return {(uint32_t)n, (uint32_t)magic, shift};
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
    std::vector<Section> sections;
    std::vector<Record> records;
    std::vector<Slice> slices;
    std::vector<MatrixPart> matrices;
    std::vector<FlatPart> measures, describes, advances, applies;
    std::vector<Merge> merges;
    std::vector<StatisticPart> statistics;
    Range updates = {};
    int64_t doubles = 0;  // of partial sums; those of one stage are forgotten in the next

    explicit Plan(const pylo_call &call) {
        int64_t numel = 0;
        for (int64_t i = 0; i < call.count; ++i) numel += local_numel(call.tensors[i]);
        // Enough blocks for a large device, but not so small that folding the network costs more than using it.
        const int64_t apply_part = std::min<int64_t>(std::max<int64_t>(divide_up(numel / 1024, 1024) * 1024, 2048), 16384);
        int64_t collect_slots = 0, prepare_slots = 0, describe_slots = 0;
        for (int64_t i = 0; i < call.rule_count; ++i) sections.push_back({call.rules[i], true, true, 0, {}, {}, {}});
        for (int64_t i = 0; i < call.count; ++i) {
            const pylo_tensor &t = call.tensors[i];
            Section &section = sections[(size_t)t.rule];
            const pylo_rule &rule = section.rule;
            Record r = {};
            r.tensor = t;
            r.numel = local_numel(t);
            r.wide = std::max({r.numel, 3 * t.row_numel, 3 * t.col_numel}) >= PYLO_NARROW;
            for (int axis = 0; axis < t.rank && !r.wide; ++axis)
                r.axis[axis] = {divisor(std::max<int64_t>(t.extent[axis], 1)), (int32_t)t.row_stride[axis], (int32_t)t.col_stride[axis]};
            int64_t next = 1;
            for (int axis = t.rank - 1; axis >= 0; --axis) r.step[axis] = next, next *= t.extent[axis];
            r.sliced = rule.layers > 0 && t.norm_slices > 1;
            for (int axis = 0; axis < t.rank && r.sliced; ++axis)
                if (t.norm_stride[axis] == 0) r.inner[r.inner_axes++] = axis;
            if (!is_update(t)) {
                section.plain =
                    section.plain && !r.wide && t.param_dtype == PYLO_FLOAT32 && t.state_dtype == PYLO_FLOAT32;
                section.in_place = section.in_place && !t.direction && !r.sliced;
            }
            record = (int32_t)i;
            collect(rule, r, collect_slots);
            if (t.state_dtype != PYLO_FLOAT32) cut(r.numel, [&](int64_t begin, int64_t end) {
                advances.push_back({begin, end, 0, record, 0});
            });
            if (t.d0_axis >= 0) prepare(r, prepare_slots);
            const size_t first = slices.size();
            const int64_t each = add_slices(r), present = (int64_t)(slices.size() - first);
            if (rule.layers > 0) describe(first, present, each, describe_slots);
            // Slices beside each other, since they share cache lines.
            for (int64_t begin = 0; begin < each; begin += apply_part)
                for (int64_t n = 0; n < present; ++n)
                    applies.push_back({begin, std::min(begin + apply_part, each), 0, record, (int32_t)(first + n)});
            if (rule.layers > 0) add_absent_slices(r, first, present, describe_slots);
            records.push_back(r);
        }
        doubles = std::max({collect_slots, prepare_slots, describe_slots});
        divide();
    }

private:
    int32_t record = 0;

    // Whether a tensor is stepped together with those of other rules, by few operations for each element.
    bool is_update(const pylo_tensor &t) const { return t.direction_scale || sections[(size_t)t.rule].rule.layers == 0; }

    // Orders parts by rule, and gives every section its own.
    void divide() {
        const auto rule_of = [&](const auto &part) { return (size_t)records[(size_t)part.record].tensor.rule; };
        const auto by_rule = [&](auto &parts, Range Section::*range) {
            std::stable_sort(parts.begin(), parts.end(), [&](auto &a, auto &b) { return rule_of(a) < rule_of(b); });
            for (size_t i = parts.size(); i-- > 0;) {
                Range &mine = sections[rule_of(parts[i])].*range;
                mine = {(int64_t)i, mine.count + 1};
            }
        };
        const auto has_section = [&](const FlatPart &part) { return !is_update(records[(size_t)part.record].tensor); };
        const auto end = std::stable_partition(applies.begin(), applies.end(), has_section);
        const std::vector<FlatPart> rest(end, applies.end());
        applies.erase(end, applies.end());
        by_rule(statistics, &Section::statistics);
        by_rule(describes, &Section::describes);
        by_rule(applies, &Section::applies);
        updates = {(int64_t)applies.size(), (int64_t)rest.size()};
        applies.insert(applies.end(), rest.begin(), rest.end());
    }

    // The slices that a box reaches into; returns how many elements each of them has there.
    int64_t add_slices(const Record &r) {
        const pylo_tensor &t = r.tensor;
        int64_t count = 1;
        for (int axis = 0; axis < t.rank && r.sliced; ++axis)
            if (t.norm_stride[axis]) count *= t.extent[axis];
        for (int64_t n = 0; n < count; ++n) {
            Slice slice = {0, t.row_offset, t.col_offset, r.sliced ? t.norm_offset : 0, 0, 0, 0};
            int64_t rest = n;
            for (int axis = t.rank - 1; axis >= 0 && r.sliced; --axis) {
                if (t.norm_stride[axis] == 0) continue;
                const int64_t i = rest % t.extent[axis];
                rest /= t.extent[axis];
                slice.memory += i * r.step[axis];
                slice.row += i * t.row_stride[axis];
                slice.col += i * t.col_stride[axis];
                slice.norm += i * t.norm_stride[axis];
            }
            slices.push_back(slice);
        }
        return count ? r.numel / count : 0;
    }

    void describe(size_t first, int64_t present, int64_t each, int64_t &slots) {
        const int64_t parts = std::max<int64_t>(divide_up(each, PART), 1);  // an empty one has sums as well
        for (int64_t n = 0; n < present; ++n) {
            Slice &slice = slices[first + (size_t)n];
            slice.describe_slot = slots + n * PYLO_SLOTS;
            slice.describe_step = present * PYLO_SLOTS;
            slice.describe_parts = parts;
        }
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t n = 0; n < present; ++n, slots += PYLO_SLOTS)
                describes.push_back({part * PART, std::min((part + 1) * PART, each), slots, record, (int32_t)(first + n)});
    }

    // A box without a slice has sums of it too, which are 0.
    void add_absent_slices(const Record &r, size_t first, int64_t present, int64_t &slots) {
        if (!r.sliced || present == r.tensor.norm_slices) return;
        std::vector<char> is_here((size_t)r.tensor.norm_slices);
        for (int64_t n = 0; n < present; ++n) is_here[(size_t)slices[first + (size_t)n].norm] = 1;
        for (int64_t norm = 0; norm < r.tensor.norm_slices; ++norm) {
            if (is_here[(size_t)norm]) continue;
            describes.push_back({0, 0, slots, record, (int32_t)slices.size()});
            slices.push_back({0, 0, 0, norm, slots, PYLO_SLOTS, 1});
            slots += PYLO_SLOTS;
        }
    }

    // Calls put(begin, end) for the parts of a tensor in the order of memory; returns how many they are.
    template <class Put>
    static int64_t cut(int64_t numel, Put put) {
        for (int64_t begin = 0; begin < numel; begin += PART) put(begin, std::min(begin + PART, numel));
        return divide_up(numel, PART);
    }

    void merge(double *result, int64_t result_step, int64_t count, int64_t first, int64_t step, int64_t terms, int64_t term_step) {
        for (int64_t i = 0; i < count; i += SUM_THREADS)
            merges.push_back({result ? result + i * result_step : nullptr, result_step, first + i * step, step, terms, term_step,
                              (int32_t)std::min<int64_t>(count - i, SUM_THREADS), record});
    }

    void collect(const pylo_rule &rule, const Record &r, int64_t &slots) {
        const pylo_tensor &t = r.tensor;
        const size_t before = matrices.size();
        if (t.d0_axis < 0) {
            for (int64_t first = 0; first < r.numel;) {  // a matrix with a short last row
                const int64_t rows = std::min<int64_t>((r.numel - first) / LANES, FLUSH);
                const int64_t lanes = rows ? LANES : r.numel - first, taken = std::max<int64_t>(rows, 1);
                matrices.push_back({first, LANES, 1, -1, -1, -1, (int32_t)taken, (int32_t)lanes, record, 0});
                first += taken * lanes;
            }
        } else {
            collect_factored(r, slots);
        }
        const int64_t parts = (int64_t)(matrices.size() - before);
        for (size_t i = before; i < matrices.size(); ++i) matrices[i].square_slot = slots + (int64_t)(i - before);
        merge(nullptr, 1, 1, slots, 1, parts, 1);
        slots += parts;
        if (const int sums = rule.measures) {
            const int64_t first = slots, count = cut(r.numel, [&](int64_t begin, int64_t end) {
                measures.push_back({begin, end, slots, record, 0});
                slots += sums;
            });
            merge(t.tensor_sums, 1, sums, first, 1, count, sums);
        }
    }

    void collect_factored(const Record &r, int64_t &slots) {
        const pylo_tensor &t = r.tensor;
        const bool whole = r.numel == t.numel;
        if (r.numel == 0) return matrices.push_back({0, 0, 0, -1, -1, -1, 0, 0, record, 1});
        const bool rows_vary = geometry(t).row_varies;  // along lanes
        const int lane = rows_vary ? t.d1_axis : t.d0_axis, down = rows_vary ? t.d0_axis : t.d1_axis;
        const int64_t lanes = t.extent[lane], rows = t.extent[down];
        const int64_t lanes_part = std::min(lanes, std::max<int64_t>(LANES, 65536 / rows / SUM_THREADS * SUM_THREADS));
        const int64_t rows_part = std::min<int64_t>(rows, std::min<int64_t>(std::max<int64_t>(65536 / lanes_part, FLUSH), ROWS));
        const int64_t lane_parts = divide_up(lanes, lanes_part), row_parts = divide_up(rows, rows_part);
        double *const lane_sums = rows_vary ? t.row_sums : t.col_sums, *const row_sums = rows_vary ? t.col_sums : t.row_sums;
        const int64_t lane_stride = (rows_vary ? t.row_stride : t.col_stride)[lane];
        const int64_t down_stride = (rows_vary ? t.col_stride : t.row_stride)[down];
        int64_t index[PYLO_MAX_RANK] = {};
        bool clears = !whole;
        for (;;) {  // the matrices of all slices
            int64_t memory = 0, row_entry = t.row_offset, col_entry = t.col_offset;
            for (int axis = 0; axis < t.rank; ++axis) {
                memory += index[axis] * r.step[axis];
                row_entry += index[axis] * t.row_stride[axis];
                col_entry += index[axis] * t.col_stride[axis];
            }
            const int64_t lane_slot = slots, row_slot = slots + row_parts * lanes;
            for (int64_t i = 0; i < row_parts; ++i)
                for (int64_t j = 0; j < lane_parts; ++j) {
                    const int64_t row = i * rows_part, first = j * lanes_part;
                    matrices.push_back({memory + row * r.step[down] + first * r.step[lane], r.step[down], r.step[lane], 0,
                                        row_slot + j * rows + row, lane_slot + i * lanes + first,
                                        (int32_t)std::min(rows_part, rows - row), (int32_t)std::min(lanes_part, lanes - first),
                                        record, clears});
                    clears = false;
                }
            slots += row_parts * lanes + lane_parts * rows;
            merge(lane_sums + (rows_vary ? row_entry : col_entry), lane_stride, lanes, lane_slot, 1, row_parts, lanes);
            merge(row_sums + (rows_vary ? col_entry : row_entry), down_stride, rows, row_slot, 1, lane_parts, rows);
            int axis = t.rank - 1;
            for (; axis >= 0; --axis) {
                if (axis == lane || axis == down) continue;
                if (++index[axis] < t.extent[axis]) break;
                index[axis] = 0;
            }
            if (axis < 0) return;
        }
    }

    void prepare(Record &r, int64_t &slots) {
        const pylo_tensor &t = r.tensor;
        const int64_t lines = t.row_numel / t.d1_extent;
        r.prepare_slot = slots;
        r.row_parts = (int32_t)divide_up(lines, LINES_PART);
        r.col_parts = (int32_t)divide_up(t.col_numel, STATISTICS_PART);
        for (int is_row = 1; is_row >= 0; --is_row) {
            const int64_t count = is_row ? lines : t.col_numel, size = is_row ? LINES_PART : STATISTICS_PART;
            for (int decay = 0; decay < 3; ++decay)
                for (int64_t first = 0; first < count; first += size, slots += 2)
                    statistics.push_back({first, std::min(first + size, count), slots, record, decay, is_row, 0});
        }
    }
};

// Writes header and tables behind each other, or, to no place, finds their size.
Header write_plan(const Plan &plan, char *to) {
    Header h = {};
    h.magic = MAGIC;
    h.updates = plan.updates;
    h.bytes = (int64_t)sizeof(Header);
    const auto put = [&](const auto &table, int64_t &offset, int64_t &count) {
        h.bytes = divide_up(h.bytes, 16) * 16;
        offset = h.bytes;
        count = (int64_t)table.size();
        const size_t bytes = table.size() * sizeof table[0];
        if (to && bytes) std::memcpy(to + offset, table.data(), bytes);
        h.bytes += (int64_t)bytes;
    };
    put(plan.sections, h.sections, h.section_count);
    put(plan.records, h.records, h.record_count);
    put(plan.slices, h.slices, h.slice_count);
    put(plan.matrices, h.matrices, h.matrix_count);
    put(plan.measures, h.measures, h.measure_count);
    put(plan.merges, h.merges, h.merge_count);
    put(plan.statistics, h.statistics, h.statistic_count);
    put(plan.describes, h.describes, h.describe_count);
    put(plan.advances, h.advances, h.advance_count);
    put(plan.applies, h.applies, h.apply_count);
    h.tickets = 0;
    h.partial = divide_up(std::max(h.record_count, h.slice_count) * (int64_t)sizeof(int32_t), 16) * 16;
    h.workspace_bytes = h.partial + plan.doubles * (int64_t)sizeof(double);
    if (to) std::memcpy(to, &h, sizeof h);
    return h;
}

}  // namespace
}  // namespace pylo
