// apply: accumulators and parameters, a tile of a few vectors at a time.
//
// Tiles go down a strip, not along a row: what lanes contribute to the first layer is then computed once for the strip,
// and the network is evaluated on whole registers.
#pragma once

#include "adam.h"
#include "evaluate.h"
#include "nesterov.h"
#include "panels.h"
#include "write.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Tiles between the one that is worked on and the one that is asked for.
constexpr int TILES_AHEAD = 2;

// One tile of V vectors; that at `next`, if not negative, will follow soon. `Sliced`: of a tensor with several slices
// over which features are normalised. `Units`: of every hidden layer if they are few, LINEAR if there is none, else 0.
template <bool Factored, bool Sliced, int Units, int V>
PYLO_FN void apply_tile(
    const Job &job, const pylo_rule &rule, const pylo_step &step, Workplace &work, Window<Factored, TILE> &window,
    const LaneTable *table, const Vec *fixed_scale, int64_t next) {
    const pylo_tensor &t = *job.tensor;
    const bool extra = has_extra(rule);
    prefetch_tile(job, next, 0);
    const auto visit = [&](int i, auto &&put) __attribute__((always_inline)) {
        const Element<Vec> x = window.element(rule, step, i * Vec::lanes);
        window.keep_state(x, i * Vec::lanes);
        Vec scale[3];
        if constexpr (Factored)
#pragma GCC unroll 3
            for (int k = 0; k < 3; ++k) scale[k] = fixed_scale[k] * Vec::load(table->scale[k] + i * Vec::lanes);
        features<Factored>(rule, extra, x, scale, [&](int channel, Vec f) __attribute__((always_inline)) {
            put(channel, Sliced ? f * Vec(table->element_scale[channel]) : f);
        });
    };
    Vec outputs[2][V];
    if constexpr (Units == LINEAR)
        evaluate_linear<Factored, V>(work, table, visit, outputs);
    else if constexpr (Units > 0)
        evaluate_narrow<Factored, V, Units>(job, work, table, next, visit, outputs);
    else
        evaluate<Factored, V>(job, work, table, next, visit, outputs);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        float *at = window.param + i * Vec::lanes;
        const Vec proposed = proposed_step(rule, step, outputs[0][i], outputs[1][i]);
        if (t.direction)
            proposed.store(work.a[0] + i * Vec::lanes);  // which no layer needs any more
        else
            updated_param(step, Vec::load(at), proposed).store(at);
    }
    window.store_state(job);
    if (t.direction)
        window.run.store(t.direction, t.direction_dtype, work.a[0]);
    else
        window.store_param(job);
}

template <bool Factored, bool Sliced, int Units, int V>
void apply_strip(const Job &job, Workplace &work, int64_t first, int count) {
    const pylo_tensor &t = *job.tensor;
    // Copies, as in adam().
    const pylo_rule rule = *job.rule;
    const pylo_step step = *job.step;
    const Geometry &g = job.geometry;
    const int64_t tables = g.slices < TABLES ? g.slices : 1;
    for (int64_t i = 0; i < tables; ++i) work.tables[i].slice = -1;  // not filled
    Window<Factored, TILE> window(job, is_moved(job));
    Position at(job, job.part.outer_begin), ahead = at;
    for (int i = 0; i < TILES_AHEAD; ++i) ahead.advance();
    for (int64_t outer = job.part.outer_begin; outer < job.part.outer_end; ++outer, at.advance(), ahead.advance()) {
        const bool foreseen = g.lane_step == 1 && outer + TILES_AHEAD < job.part.outer_end;
        LaneTable *table = nullptr;
        Vec fixed_scale[3];
        if constexpr (Factored) {
            table = &work.tables[tables > 1 ? at.slice : 0];
            if (table->slice != at.slice || table->norm != at.norm)
                fill_table<V>(job, work.network, at, first, count, *table);
            fill_fixed(job, at, *table, work);
            for (int k = 0; k < 3; ++k)
                fixed_scale[k] = Vec(fixed_statistic(job, t.row_scale, t.col_scale, k, at.fixed()));
        }
        window.load(job, Run(at.memory + first * g.lane_step, g.lane_step, count));
        const int64_t next = foreseen ? ahead.memory + first : -1;
        apply_tile<Factored, Sliced, Units, V>(job, rule, step, work, window, table, fixed_scale, next);
    }
}

template <bool Factored, bool Sliced, int Units>
void apply_strips(const Job &job, Workplace &work) {
    for (int64_t first = job.part.lane_begin; first < job.part.lane_end;) {
        const int64_t left = job.part.lane_end - first, vectors = (left + Vec::lanes - 1) / Vec::lanes;
        const int take = vectors == 4 ? 2 : (int)smaller(vectors, TILE_VECTORS);  // four are better halved
        const int count = (int)smaller(left, take * Vec::lanes);
        if (take == 3)
            apply_strip<Factored, Sliced, Units, 3>(job, work, first, count);
        else if (take == 2)
            apply_strip<Factored, Sliced, Units, 2>(job, work, first, count);
        else
            apply_strip<Factored, Sliced, Units, 1>(job, work, first, count);
        first += count;
    }
}

template <bool Factored, bool Sliced>
void apply_part(const Job &job, Workplace &work) {
    work.network.fold<Factored>(job);
    switch (narrow_units(*job.rule)) {
        case LINEAR:
            return apply_strips<Factored, Sliced, LINEAR>(job, work);
        case 4:
            return apply_strips<Factored, Sliced, 4>(job, work);
        case 8:
            return apply_strips<Factored, Sliced, 8>(job, work);
        default:
            return apply_strips<Factored, Sliced, 0>(job, work);
    }
}

void apply(const Job &job) {
    if (job.tensor->direction_scale) return write(job);
    if (job.rule->layers == 0) return adam(job);
    if (job.rule->layers == PYLO_NESTEROV) return nesterov(job);
    Workplace work;
    if (has_panels(*job.rule, *job.tensor, job.geometry))
        apply_panels(job, work);
    else if (job.tensor->d0_axis < 0)
        apply_part<false, false>(job, work);
    else if (job.tensor->norm_slices > 1)
        apply_part<true, true>(job, work);
    else
        apply_part<true, false>(job, work);
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
