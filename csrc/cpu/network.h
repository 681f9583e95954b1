// The network as one part of a tensor needs it: folded once, used for tens of thousands of elements.
#pragma once

#include "../core/network.h"
#include "elements.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

constexpr int MAX_CHANNELS = Channels<false>::all;

// Slot of one of the six channels of row or col: three of the statistic, three of its inverse root.
PYLO_FN int statistic_slot(bool of_row, int k) { return (k < 3 ? ROW : INVERSE_ROW - 3) + k + (of_row ? 0 : 3); }

PYLO_FN float element_scale(const Job &job, int slot, int64_t norm) {
    const pylo_tensor &t = *job.tensor;
    return normaliser(*job.rule, t.feature_sums[norm * SLOTS + slot] / (double)(t.numel / t.norm_slices));
}

PYLO_FN float statistic_scale(const Job &job, int slot, int64_t norm) {
    return normaliser(*job.rule, job.tensor->stat_squares[norm * SLOTS + slot]);
}

// The normalisers are folded into the first layer, whose inputs are split into channels of elements, of the statistic
// along lanes and of the fixed one: a row or a column contributes to many elements what it contributes once. If there are
// several slices, each with normalisers of its own, then features are multiplied by them instead. Units beyond the first
// layer's have weight 0, since vectors read beyond them.
struct Network {
    int layers, channels;
    int width[PYLO_MAX_LAYERS], padded[PYLO_MAX_LAYERS];
    alignas(64) float element[MAX_CHANNELS][PYLO_MAX_WIDTH];
    alignas(64) float lane[6][PYLO_MAX_WIDTH], fixed[6][PYLO_MAX_WIDTH];
    alignas(64) float bias[PYLO_MAX_WIDTH];
    const float *weights[PYLO_MAX_LAYERS], *biases[PYLO_MAX_LAYERS];  // of the later layers, as they are

    template <bool Factored>
    void fold(const Job &job) {
        const pylo_rule &rule = *job.rule;
        const pylo_tensor &t = *job.tensor;
        layers = rule.layers;
        channels = has_extra(rule) ? Channels<Factored>::all : Channels<Factored>::common;
        for (int n = 0; n < layers; ++n) {
            const Layer layer(rule, job.step->network, n);
            width[n] = layer.outputs;
            padded[n] = layer.step;
            weights[n] = layer.weights;
            biases[n] = layer.biases;
        }
        for (int n = 0; n < PYLO_MAX_WIDTH; ++n) bias[n] = n < padded[0] ? biases[0][n] : 0;
        for (int channel = 0; channel < channels; ++channel) {
            const int slot = Channels<Factored>::slot(channel);
            const float scale = t.norm_slices > 1 ? 1.0f : element_scale(job, slot, 0);
            fold_slot(rule, slot, scale, element[channel]);
            if (!Factored && has_twin(slot)) {
                float other[PYLO_MAX_WIDTH];
                fold_slot(rule, slot + COL - ROW, scale, other);
                for (int n = 0; n < PYLO_MAX_WIDTH; ++n) element[channel][n] += other[n];
            }
        }
        if constexpr (Factored)
            for (int k = 0; k < 6; ++k) {
                const int row = statistic_slot(true, k), col = statistic_slot(false, k);
                const float row_scale = t.norm_slices > 1 ? 1.0f : statistic_scale(job, row, 0);
                const float col_scale = t.norm_slices > 1 ? 1.0f : statistic_scale(job, col, 0);
                fold_slot(rule, row, row_scale, job.geometry.row_varies ? lane[k] : fixed[k]);
                fold_slot(rule, col, col_scale, job.geometry.row_varies ? fixed[k] : lane[k]);
            }
    }

private:
    void fold_slot(const pylo_rule &rule, int slot, float scale, float *to) const {
        const bool used = rule.features >> slot & 1;
        const float *from = weights[0] + slot * padded[0];
        for (int n = 0; n < padded[0]; ++n) to[n] = used ? from[n] * scale : 0;
        for (int n = padded[0]; n < PYLO_MAX_WIDTH; ++n) to[n] = 0;
    }
};

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
