// What apply keeps at hand, and what row and column statistics contribute to the network's first layer.
#pragma once

#include "network.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

constexpr int TILE_VECTORS = 3;  // x 4 units: 12 accumulators, the best blocking measured for 16 and 32 registers
constexpr int TILE = TILE_VECTORS * Vec::lanes;

// Slices whose tables are kept. Memory is walked in order, which passes through the slices of a convolution again and
// again; 16 tables are enough for kernels of 3 x 3 and fit into a second-level cache.
constexpr int TABLES = 16;

constexpr int PANEL = BLOCK, PANEL_TILES = (PANEL + TILE - 1) / TILE;  // lanes of a panel (panels.h)

// What the statistic that varies along lanes contributes to a tile, for one slice.
struct LaneTable {
    int64_t slice, norm;
    float element_scale[MAX_CHANNELS], fixed_scale[6];  // normalisers, if there are several slices of them
    alignas(64) float scale[3][TILE];
    alignas(64) float preactivation[PYLO_MAX_WIDTH][TILE];
};

// A quarter of a megabyte with the widest vectors, on the stack of each thread: a stage allocates nothing.
struct Workplace {
    Network network;
    LaneTable tables[PANEL_TILES > TABLES ? PANEL_TILES : TABLES];  // of slices, or of a panel's tiles
    alignas(64) float fixed_preactivation[PYLO_MAX_WIDTH];
    alignas(64) float a[PYLO_MAX_WIDTH][TILE], b[PYLO_MAX_WIDTH][TILE];
};

// Once for every strip and slice.
template <int V>
void fill_table(const Job &job, const Network &network, const Position &at, int64_t first, int count, LaneTable &table) {
    const pylo_tensor &t = *job.tensor;
    const int64_t step = job.geometry.lane_stat_step;
    alignas(64) float statistics[6][V * Vec::lanes];
    float lane_scale[6] = {1, 1, 1, 1, 1, 1};
    table.norm = at.norm;
    if (t.norm_slices > 1) {
        for (int channel = 0; channel < network.channels; ++channel)
            table.element_scale[channel] = element_scale(job, Channels<true>::slot(channel), at.norm);
        for (int k = 0; k < 6; ++k) {
            lane_scale[k] = statistic_scale(job, statistic_slot(job.geometry.row_varies, k), at.norm);
            table.fixed_scale[k] = statistic_scale(job, statistic_slot(!job.geometry.row_varies, k), at.norm);
        }
    }
    for (int k = 0; k < 3; ++k) {
        const float *value = lane_statistic(job, t.row, t.col, k, at.lane());
        const float *scale = lane_statistic(job, t.row_scale, t.col_scale, k, at.lane());
        for (int i = 0; i < V * Vec::lanes; ++i) {
            const bool inside = i < count;
            const float x = inside ? value[(first + i) * step] : 0.0f;
            statistics[k][i] = x * lane_scale[k];
            statistics[3 + k][i] = inverse_statistic(x) * lane_scale[3 + k];
            table.scale[k][i] = inside ? scale[(first + i) * step] : 0.0f;
        }
    }
    for (int unit = 0; unit < network.padded[0]; ++unit)
        for (int i = 0; i < V; ++i) {
            Vec sum(network.bias[unit]);
            for (int k = 0; k < 6; ++k)
                sum = madd(Vec::load(statistics[k] + i * Vec::lanes), Vec(network.lane[k][unit]), sum);
            sum.store(table.preactivation[unit] + i * Vec::lanes);
        }
    table.slice = at.slice;
}

// What the statistic that is constant along lanes contributes: once for every tile.
void fill_fixed(const Job &job, const Position &at, const LaneTable &table, Workplace &work) {
    const pylo_tensor &t = *job.tensor;
    const Network &network = work.network;
    float statistics[6];
    for (int k = 0; k < 3; ++k) {
        statistics[k] = fixed_statistic(job, t.row, t.col, k, at.fixed());
        statistics[3 + k] = inverse_statistic(statistics[k]);
    }
    if (t.norm_slices > 1)
        for (int k = 0; k < 6; ++k) statistics[k] *= table.fixed_scale[k];
    for (int unit = 0; unit < network.padded[0]; unit += Vec::lanes) {
        Vec sum(0.0f);
        for (int k = 0; k < 6; ++k) sum = madd(Vec(statistics[k]), Vec::load(network.fixed[k] + unit), sum);
        sum.store(work.fixed_preactivation + unit);
    }
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
