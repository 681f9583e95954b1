// apply for small networks: rows one after the other, as many lanes of each at a time as a block of codes has.
//
// What is done once for each tile of a strip is a large share of the whole where a network takes little time: the fixed
// statistic's contribution and the decoding of states. Here the first is made once for a row's lanes, and states move on a
// block at a time and are not decoded again.
#pragma once

#include "advance.h"
#include "evaluate.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// One vector of a row, at `lane` of the window and `vector` of the table.
template <int Units>
PYLO_FN void apply_vector(
    const Job &job, const pylo_rule &rule, const pylo_step &step, Workplace &work, Window<true, PANEL> &window,
    const LaneTable &table, const Vec *fixed_scale, bool moves, int lane, int vector, float *direction) {
    const auto visit = [&](int, auto &&put) __attribute__((always_inline)) {
        Element<Vec> x;
        if (moves) {
            x = window.template element<true>(rule, step, lane);
        } else {
            x = window.element(rule, step, lane);
            window.keep_state(x, lane);
        }
        Vec scale[3];
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) scale[k] = fixed_scale[k] * Vec::load(table.scale[k] + vector * Vec::lanes);
        features<true>(rule, has_extra(rule), x, scale, put);
    };
    Vec outputs[2][1];
    if constexpr (Units == LINEAR)
        evaluate_linear<true, 1>(work, &table, visit, outputs, vector);
    else
        evaluate_narrow<true, 1, Units>(job, work, &table, -1, visit, outputs, vector);
    const Vec proposed = proposed_step(rule, step, outputs[0][0], outputs[1][0]);
    if (direction)
        proposed.store(direction + lane);
    else
        updated_param(step, Vec::load(window.param + lane), proposed).store(window.param + lane);
}

template <int Units>
void apply_panel(const Job &job, Workplace &work, int64_t first, int count) {
    const pylo_tensor &t = *job.tensor;
    // Copies, as in adam().
    const pylo_rule rule = *job.rule;
    const pylo_step step = *job.step;
    const Geometry &g = job.geometry;
    const bool moves = moves_in_apply(rule, t, job.stored, g);
    Window<true, PANEL> window(job, is_moved(job));
    Averages averages(job);
    alignas(64) float buffer[PANEL];
    float *const direction = t.direction ? buffer : nullptr;
    Position at(job, job.part.outer_begin), ahead = at;
    for (int tile = 0; tile * TILE < count; ++tile)
        fill_table<TILE_VECTORS>(job, work.network, at, first + tile * TILE, count - tile * TILE, work.tables[tile]);
    ahead.advance();
    for (int64_t outer = job.part.outer_begin; outer < job.part.outer_end; ++outer, at.advance(), ahead.advance()) {
        fill_fixed(job, at, work.tables[0], work);
        Vec fixed_scale[3];
        for (int k = 0; k < 3; ++k) fixed_scale[k] = Vec(fixed_statistic(job, t.row_scale, t.col_scale, k, at.fixed()));
        const Run run(at.memory + first * g.lane_step, g.lane_step, count);
        if (moves)
            window.load_moving(job, rule, step, run, [&](const float *grad, float *const (&values)[4])
                                                         __attribute__((always_inline)) {
                averages.move<true>(run, place_of(job, run).block, grad, values);
            });
        else
            window.load(job, run);
        const bool foreseen = g.lane_step == 1 && outer + 1 < job.part.outer_end;
        int64_t next = foreseen ? ahead.memory + first : -1;
        const LaneTable *table = work.tables;
        for (int tile = 0; tile < run.padded; tile += TILE, ++table, next += foreseen ? TILE : 0)
            for (int vector = 0; vector < TILE_VECTORS; ++vector) {
                const int lane = tile + vector * Vec::lanes;
                if (lane >= run.padded) break;
                prefetch_tile(job, next, vector);
                apply_vector<Units>(job, rule, step, work, window, *table, fixed_scale, moves, lane, vector, direction);
            }
        window.store_state(job);
        if (direction)
            run.store(t.direction, t.direction_dtype, direction);
        else
            window.store_param(job);
    }
}

template <int Units>
void apply_panels(const Job &job, Workplace &work) {
    for (int64_t first = job.part.lane_begin; first < job.part.lane_end; first += PANEL)
        apply_panel<Units>(job, work, first, (int)smaller(PANEL, job.part.lane_end - first));
}

void apply_panels(const Job &job, Workplace &work) {
    work.network.fold<true>(job);
    switch (narrow_units(*job.rule)) {
        case LINEAR:
            return apply_panels<LINEAR>(job, work);
        case 4:
            return apply_panels<4>(job, work);
        default:
            return apply_panels<8>(job, work);
    }
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
