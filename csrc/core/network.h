// The network behind pylo_step.network: where its layers lie, and what is folded into the first one. An input of the
// network is a feature times its normaliser; features are many and weights few, so kernels multiply weights instead.
#pragma once

#include "formulas.h"

namespace pylo {
inline namespace PYLO_ISA {

// A layer as it is stored: weights (inputs, step), then biases (step), where step is the outputs rounded up to 4.
struct Layer {
    const float *weights, *biases;
    int inputs, outputs, step;

    PYLO_FN Layer(const pylo_rule &rule, const float *network, int layer) {
        int before = SLOTS;
        for (int i = 0;; ++i) {
            outputs = rule.width[i];
            inputs = before;
            step = (outputs + 3) / 4 * 4;
            weights = network;
            biases = network + inputs * step;
            if (i == layer) return;
            network = biases + step;
            before = outputs;
        }
    }
};

// What a feature of this mean square is multiplied by.
PYLO_FN float normaliser(const pylo_rule &rule, double mean_of_squares) {
    return (float)inverse_root(mean_of_squares + (double)rule.norm_eps);
}

// Whether an unfactored tensor reads the same number at `slot` and at `slot + COL - ROW`: its row and col are one moment.
// Its weights are added, so the network has one input for both.
PYLO_FN bool has_twin(int slot) {
    return (slot >= ROW && slot < COL) || (slot >= INVERSE_ROW && slot < INVERSE_COL);
}

}  // namespace PYLO_ISA
}  // namespace pylo
