// prepare: factored state and its inverse roots, from complete sums. State of rows and columns is whole wherever a box of
// the tensor is, so this stage is the same whatever the box.
#pragma once

#include "walk.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Mean of the squares of f(values), in eight interleaved sums so that additions overlap.
template <class F>
double mean_of_squares(const float *values, int64_t count, F f) {
    double sum[8] = {};
    for (int64_t first = 0; first < count; first += 8)
        for (int64_t i = first; i < smaller(first + 8, count); ++i) {
            const float x = f(values[i]);
            sum[i - first] += (double)x * (double)x;
        }
    double total = 0;
    for (double part : sum) total += part;
    return total / (double)count;
}

void update_statistic(const Job &job, float *statistic, const double *sums, int64_t numel, int64_t extent) {
    const pylo_rule &rule = *job.rule;
    for (int k = 0; k < 3; ++k) {
        float *channel = statistic + k * numel;
        const float keep = rule.factored_keep[k], weight = rule.factored_weight[k];
        for (int64_t i = 0; i < numel; ++i)
            channel[i] = ema(keep, weight, channel[i], (float)mean_square(sums[i], (double)extent));
    }
}

void prepare(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    if (t.d0_axis < 0) return;
    update_statistic(job, t.row, t.row_sums, t.row_numel, t.d0_extent);
    update_statistic(job, t.col, t.col_sums, t.col_numel, t.d1_extent);
    const auto identity = [](float x) { return x; };
    const auto inverse = [](float x) { return inverse_statistic(x); };
    const int64_t along = t.d1_extent, step = t.d1_row_stride, before = t.row_numel / (along * step);
    for (int k = 0; k < 3; ++k) {
        const float *row = t.row + k * t.row_numel, *col = t.col + k * t.col_numel;
        float *scale = t.row_scale + k * t.row_numel;
        for (int64_t outer = 0; outer < before; ++outer)
            for (int64_t inner = 0; inner < step; ++inner) {
                const int64_t start = outer * along * step + inner;
                double sum = 0;
                for (int64_t i = 0; i < along; ++i) sum += (double)row[start + i * step];
                const float mean = (float)(sum / (double)along);
                for (int64_t i = 0; i < along; ++i) scale[start + i * step] = row_scale(row[start + i * step], mean);
            }
        for (int64_t i = 0; i < t.col_numel; ++i) t.col_scale[k * t.col_numel + i] = col_scale(col[i]);
        if (t.norm_slices > 1) continue;
        t.stat_squares[ROW + k] = mean_of_squares(row, t.row_numel, identity);
        t.stat_squares[COL + k] = mean_of_squares(col, t.col_numel, identity);
        t.stat_squares[INVERSE_ROW + k] = mean_of_squares(row, t.row_numel, inverse);
        t.stat_squares[INVERSE_COL + k] = mean_of_squares(col, t.col_numel, inverse);
    }
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
