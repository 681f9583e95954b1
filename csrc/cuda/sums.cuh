// The stages that sum. A block writes partial sums of its part to a place of their own; they are added up in a fixed order,
// by the next launch or by whichever block of a tensor ends last. No atomic operation touches a sum.
#pragma once

#include "elements.cuh"

namespace pylo {
inline namespace PYLO_ISA {

template <class T>
__device__ __forceinline__ T sum_of_warp(T x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
    return x;
}

// Of all threads, in every thread. `scratch` has a number per warp and may be used again at once.
__device__ __forceinline__ double sum_of_block(double x, double *scratch) {
    x = sum_of_warp(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < SUM_THREADS / WARP; ++warp) total += scratch[warp];
    return total;
}

// One block adds up partial sums; `put(i, sum)` is called for every i, each by one thread. Reads past the first-level
// cache, since other blocks of this launch may have written them.
template <class Put>
__device__ __forceinline__ void merge_partials(
    const double *partial, int count, int64_t step, int64_t terms, int64_t term_step, double *scratch, Put put) {
    int columns = 1;
    while (columns < count) columns *= 2;
    const int rows = SUM_THREADS / columns, column = (int)threadIdx.x % columns, row = (int)threadIdx.x / columns;
    double sum = 0;
    if (column < count)
        for (int64_t j = row; j < terms; j += rows) sum += __ldcg(partial + column * step + j * term_step);
    __syncthreads();
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (row == 0 && column < count) {
        for (int r = 1; r < rows; ++r) sum += scratch[r * columns + column];
        put(column, sum);
    }
}

struct MergeShared {
    double scratch[SUM_THREADS];
    int is_last;
};

// Whether this block is the last of `parts` to arrive; what the others wrote before is then visible to it.
__device__ __forceinline__ bool arrives_last(int32_t *ticket, int parts, MergeShared &shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.is_last = atomicAdd(ticket, 1) == parts - 1;
        if (shared.is_last) *ticket = 0;
    }
    __syncthreads();
    if (shared.is_last) __threadfence();
    return shared.is_last;
}

// -- collect and measure -------------------------------------------------------------------------------------------------

struct CollectShared {
    float row[SUM_THREADS / WARP][ROWS];
    double lane[SUM_THREADS / WARP][WARP];
    double scratch[SUM_THREADS / WARP];
};

// Warps stand side by side on the lanes as far as there are lanes, and below each other on the rows.
__device__ __forceinline__ void collect_part(const Arguments &arguments, const MatrixPart &part, CollectShared &shared) {
    const pylo_tensor &t = arguments.records[part.record].tensor;
    const pylo_step &step = arguments.steps[part.record];
    const pylo_rule rule = arguments.sections[t.rule].rule;  // a copy, which no store can be thought to change
    const int warps = SUM_THREADS / WARP, warp = (int)threadIdx.x / WARP, thread = (int)threadIdx.x % WARP;
    int across = 1;
    while (across < warps && across * WARP < part.lanes) across *= 2;
    const int down = warps / across, x = warp % across, y = warp / across;
    const bool factored = part.row_slot >= 0;
    if (part.clears) {
        for (int64_t i = threadIdx.x; i < t.row_numel; i += SUM_THREADS) t.row_sums[i] = 0;
        for (int64_t i = threadIdx.x; i < t.col_numel; i += SUM_THREADS) t.col_sums[i] = 0;
    }
    if (factored)
        for (int i = (int)threadIdx.x; i < warps * ROWS; i += SUM_THREADS) shared.row[i / ROWS][i % ROWS] = 0;
    __syncthreads();
    double squares = 0;
    for (int strip = 0; strip < part.lanes; strip += across * WARP) {
        const int lane = strip + x * WARP + thread;
        const bool inside = lane < part.lanes;
        double lane_total = 0;
        for (int first = y; first < part.rows; first += FLUSH * down) {
            const int end = smaller(first + FLUSH * down, part.rows);
            float lane_sum = 0, raw_sum = 0;
            for (int row = first; row < end; row += down) {
                float raw = 0, seen = 0;
                if (inside) {
                    const int64_t index = part.memory + row * part.row_step + lane * part.lane_step;
                    raw = read(step.grad, step.grad_dtype, index);
                    const float param = step.l2 != 0.0f ? read(t.param, t.param_dtype, index) : 0.0f;
                    seen = seen_gradient(rule, step, raw, param);
                }
                raw_sum = madd(raw, raw, raw_sum);
                if (!factored) continue;
                lane_sum = madd(seen, seen, lane_sum);
                const float of_row = sum_of_warp(seen * seen);
                if (thread == 0) shared.row[x][row] += of_row;
            }
            squares += (double)raw_sum;
            lane_total += (double)lane_sum;
        }
        if (!factored) continue;
        shared.lane[warp][thread] = lane_total;
        __syncthreads();
        if (y == 0 && inside) {
            for (int other = 1; other < down; ++other) lane_total += shared.lane[other * across + x][thread];
            arguments.partial[part.lane_slot + lane] = lane_total;
        }
        __syncthreads();
    }
    if (factored)
        for (int row = (int)threadIdx.x; row < part.rows; row += SUM_THREADS) {
            double total = 0;
            for (int i = 0; i < across; ++i) total += (double)shared.row[i][row];
            arguments.partial[part.row_slot + row] = total;
        }
    squares = sum_of_block(squares, shared.scratch);
    if (threadIdx.x == 0) arguments.partial[part.square_slot] = squares;
}

// Sums over parameter and state as they are: p^2, m (3), r, m^2 (3), r^2, or the first alone. In double precision: a
// variance is the difference of two of them, which must vanish where all elements are equal.
template <bool All>
__device__ __forceinline__ void measure_part(const Arguments &arguments, const FlatPart &part, CollectShared &shared) {
    const Record &record = arguments.records[part.record];
    const pylo_stored &stored = arguments.stored[part.record];
    const pylo_tensor &t = record.tensor;
    double sums[PYLO_TENSOR_SUMS] = {};
    for (int64_t i = part.begin + threadIdx.x; i < part.end; i += SUM_THREADS) {
        const double p = (double)read(t.param, t.param_dtype, i);
        sums[0] = madd(p, p, sums[0]);
        if constexpr (All) {
            const int64_t block = block_of(record, stored, i);
            const float states[4] = {load_state<0>(t, stored, i, block), load_state<1>(t, stored, i, block),
                                     load_state<2>(t, stored, i, block), load_state<RMS_STATE>(t, stored, i, block)};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const double x = (double)states[k];
                sums[1 + k] += x;
                sums[5 + k] = madd(x, x, sums[5 + k]);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < (All ? PYLO_TENSOR_SUMS : 1); ++k) {
        const double total = sum_of_block(sums[k], shared.scratch);
        if (threadIdx.x == 0) arguments.partial[part.slot + k] = total;
    }
}

__device__ __forceinline__ void collect(const Arguments &arguments) {
    auto &shared = shared_memory<CollectShared>();
    const int number = (int)blockIdx.x - arguments.matrix_count;
    if (number < 0) return collect_part(arguments, arguments.matrices[blockIdx.x], shared);
    const FlatPart &part = arguments.measures[number];
    if (arguments.sections[arguments.records[part.record].tensor.rule].rule.measures == 1)
        measure_part<false>(arguments, part, shared);
    else
        measure_part<true>(arguments, part, shared);
}

__device__ __forceinline__ void merge(const Arguments &arguments) {
    auto &shared = shared_memory<MergeShared>();
    const Merge &merge = arguments.merges[blockIdx.x];
    double *const result = merge.result ? merge.result : arguments.grad_squares + merge.record;
    merge_partials(arguments.partial + merge.first, merge.count, merge.step, merge.terms, merge.term_step, shared.scratch,
                   [&](int i, double sum) { result[i * merge.result_step] = sum; });
}

// -- prepare -------------------------------------------------------------------------------------------------------------

// Factored state of a part, and sums of squares of the features that it is.
__device__ __forceinline__ void prepare_part(const Arguments &arguments, const StatisticPart &part, MergeShared &shared) {
    const pylo_tensor &t = arguments.records[part.record].tensor;
    const int k = part.decay;
    const float keep = arguments.rule.factored_keep[k], weight = arguments.rule.factored_weight[k];
    double squares = 0, inverse_squares = 0;
    const auto update = [&](float *statistic, const double *sums, int64_t entry, double extent) {
        const float x = ema(keep, weight, statistic[entry], (float)mean_square(sums[entry], extent));
        const float inverse = inverse_statistic(x);
        squares = madd((double)x, (double)x, squares);
        inverse_squares = madd((double)inverse, (double)inverse, inverse_squares);
        return statistic[entry] = x;
    };
    if (!part.is_row) {
        float *const col = t.col + k * t.col_numel, *const scale = t.col_scale + k * t.col_numel;
        for (int64_t i = part.begin + threadIdx.x; i < part.end; i += SUM_THREADS)
            scale[i] = col_scale(update(col, t.col_sums, i, (double)t.d1_extent));
    } else {
        float *const row = t.row + k * t.row_numel, *const scale = t.row_scale + k * t.row_numel;
        const int64_t along = t.d1_extent, step = t.d1_row_stride;
        for (int64_t line = part.begin; line < part.end; ++line) {
            const int64_t start = line / step * along * step + line % step;
            double sum = 0;
            for (int64_t i = threadIdx.x; i < along; i += SUM_THREADS)
                sum += (double)update(row, t.row_sums, start + i * step, (double)t.d0_extent);
            const float mean = (float)(sum_of_block(sum, shared.scratch) / (double)along);
            for (int64_t i = threadIdx.x; i < along; i += SUM_THREADS)
                scale[start + i * step] = row_scale(row[start + i * step], mean);
        }
    }
    squares = sum_of_block(squares, shared.scratch);
    inverse_squares = sum_of_block(inverse_squares, shared.scratch);
    if (threadIdx.x == 0) {
        arguments.partial[part.slot] = squares;
        arguments.partial[part.slot + 1] = inverse_squares;
    }
}

__device__ __forceinline__ void prepare(const Arguments &arguments) {
    auto &shared = shared_memory<MergeShared>();
    const StatisticPart &part = arguments.statistics[blockIdx.x];
    prepare_part(arguments, part, shared);
    const Record &record = arguments.records[part.record];
    const pylo_tensor &t = record.tensor;
    if (!arrives_last(arguments.tickets + part.record, 3 * (record.row_parts + record.col_parts), shared)) return;
    if (record.sliced) return;  // the caller has their means
    int64_t slot = record.prepare_slot;
    for (int statistic = 0; statistic < 2; ++statistic) {  // row, col
        const int parts_each = statistic ? record.col_parts : record.row_parts;
        const double numel = (double)(statistic ? t.col_numel : t.row_numel);
        for (int k = 0; k < 3; ++k) {
            double *const to = t.stat_squares + (statistic ? COL : ROW) + k;
            merge_partials(arguments.partial + slot, 2, 1, parts_each, 2, shared.scratch,
                           [&](int i, double sum) { to[i * (INVERSE_ROW - ROW)] = sum / numel; });
            slot += 2 * parts_each;
        }
    }
}

// -- describe ------------------------------------------------------------------------------------------------------------

struct DescribeShared {
    float sums[SUM_THREADS / WARP][Channels<false>::all];
    double slots[SLOTS];
    MergeShared merge;
};

template <bool Factored, bool Plain>
__device__ __forceinline__ void describe_part(const Arguments &arguments, const FlatPart &part, DescribeShared &shared) {
    constexpr int channels = Channels<Factored>::all;
    const Record &record = arguments.records[part.record];
    const Slice &slice = arguments.slices[part.slice];
    const pylo_step &step = arguments.steps[part.record];
    const pylo_stored &stored = arguments.stored[part.record];
    const bool extra = has_extra(arguments.rule);
    float sums[channels] = {};
    for (Index<Plain> i = (Index<Plain>)part.begin + (int)threadIdx.x; i < (Index<Plain>)part.end; i += SUM_THREADS) {
        const Index<Plain> index = memory_index<Plain>(record, slice, i);
        const Element<float> x = load_element<Factored, Plain>(arguments.rule, record, step, stored, index, false);
        float scale[3] = {};
        if constexpr (Factored) load_scales(record.tensor, entry_of<Plain>(record, slice, i), scale);
        features<Factored>(arguments.rule, extra, x, scale, [&](int channel, float f) {
            sums[channel] = madd(f, f, sums[channel]);
        });
    }
#pragma unroll
    for (int channel = 0; channel < channels; ++channel) {
        const float sum = sum_of_warp(sums[channel]);
        if (threadIdx.x % WARP == 0) shared.sums[threadIdx.x / WARP][channel] = sum;
    }
    if (threadIdx.x < SLOTS) shared.slots[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x < channels) {
        double total = 0;
        for (int warp = 0; warp < SUM_THREADS / WARP; ++warp) total += (double)shared.sums[warp][threadIdx.x];
        shared.slots[Channels<Factored>::slot((int)threadIdx.x)] = total;
    }
    __syncthreads();
    if (threadIdx.x < SLOTS) arguments.partial[part.slot + threadIdx.x] = shared.slots[threadIdx.x];
}

template <bool Plain>
__device__ __forceinline__ void describe(const Arguments &arguments) {
    auto &shared = shared_memory<DescribeShared>();
    const FlatPart &part = arguments.describes[blockIdx.x];
    const Record &record = arguments.records[part.record];
    if (record.tensor.d0_axis < 0)
        describe_part<false, Plain>(arguments, part, shared);
    else if (record.sliced)
        describe_part<true, false>(arguments, part, shared);
    else
        describe_part<true, Plain>(arguments, part, shared);
    const Slice &slice = arguments.slices[part.slice];
    if (!arrives_last(arguments.tickets + part.slice, (int)slice.describe_parts, shared.merge)) return;
    merge_partials(arguments.partial + slice.describe_slot, SLOTS, 1, slice.describe_parts, slice.describe_step,
                   shared.merge.scratch,
                   [&](int slot, double sum) { record.tensor.feature_sums[slice.norm * SLOTS + slot] = sum; });
}

}  // namespace PYLO_ISA
}  // namespace pylo
