// The network's outputs for a tile: nearly all arithmetic of a step. Its sums run over inputs in a fixed order, with one
// lane of a vector for each element, so a result does not depend on how many lanes there are.
#pragma once

#include "workplace.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// acc[j][i] += sum over inputs of weights[input][j] * in[input][i]
template <int V, int Units>
PYLO_FN void multiply(const float *in, int inputs, const float *weights, int64_t weights_step, Vec (&acc)[Units][V]) {
#pragma GCC unroll 2
    for (int k = 0; k < inputs; ++k) {
        Vec x[V];
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) x[i] = Vec::load(in + (k * V + i) * Vec::lanes);
#pragma GCC unroll 8
        for (int j = 0; j < Units; ++j) {
            const Vec weight(weights[k * weights_step + j]);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) acc[j][i] = madd(x[i], weight, acc[j][i]);
        }
    }
}

// A hidden layer, `Units` at a time. A unit starts from its bias and, if there is one, its row of `table`. Not inlined:
// a call costs nothing beside the work, and every kernel would have its own copies.
template <int V, int Units>
__attribute__((noinline)) void relu_units(
    const float *in, int inputs, const float *weights, int64_t weights_step, int outputs, const float *bias,
    const float (*table)[TILE], float *out) {
    for (int unit = 0; unit < outputs; unit += Units) {
        Vec acc[Units][V];
#pragma GCC unroll 8
        for (int j = 0; j < Units; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) acc[j][i] = Vec(bias[unit + j]);
        if (table)
#pragma GCC unroll 8
            for (int j = 0; j < Units; ++j)
#pragma GCC unroll 4
                for (int i = 0; i < V; ++i) acc[j][i] = acc[j][i] + Vec::load(table[unit + j] + i * Vec::lanes);
        multiply<V, Units>(in, inputs, weights + unit, weights_step, acc);
#pragma GCC unroll 8
        for (int j = 0; j < Units; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) at_least(Vec(0.0f), acc[j][i]).store(out + ((unit + j) * V + i) * Vec::lanes);
    }
}

template <int V>
PYLO_FN void relu_layer(
    const float *in, int inputs, const float *weights, int64_t weights_step, int outputs, const float *bias,
    const float (*table)[TILE], float *out) {
    // Few vectors, or 32 registers, leave most of them idle: take twice the units.
    constexpr int most = V < 2 || PYLO_LANES == 16 ? 8 : 4;
    if (outputs % most == 0)
        relu_units<V, most>(in, inputs, weights, weights_step, outputs, bias, table, out);
    else
        relu_units<V, 4>(in, inputs, weights, weights_step, outputs, bias, table, out);
}

// The tile is 3 cache lines of each stream: too short a run for the hardware to foresee, so ask for the next one. A third of
// the streams at a time: a core waits where more lines are asked for at once than it can have on their way.
PYLO_FN void prefetch_tile(const Job &job, int64_t index, int third) {
    const pylo_tensor &t = *job.tensor;
    if (index < 0) return;
    switch (third) {
        case 0:
            prefetch(job.step->grad, job.step->grad_dtype, index, TILE);
            return prefetch(t.param, t.param_dtype, index, TILE);
        case 1:
            prefetch(t.rms, t.state_dtype, index, TILE);
            return prefetch(t.momentum[0], t.state_dtype, index, TILE);
        case 2:
            prefetch(t.momentum[1], t.state_dtype, index, TILE);
            return prefetch(t.momentum[2], t.state_dtype, index, TILE);
    }
}

// Outputs of the network for one tile, whose features `visit(i, put)` makes for the i-th vector. Layers go through memory.
template <bool Factored, int V, class Visit>
PYLO_FN void evaluate(
    const Job &job, Workplace &work, const LaneTable *table, int64_t next, Visit &&visit, Vec (&outputs)[2][V]) {
    const Network &network = work.network;
    float *in = work.a[0], *out = work.b[0];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i)
        visit(i, [&](int channel, Vec f) __attribute__((always_inline)) { f.store(in + (channel * V + i) * Vec::lanes); });
    prefetch_tile(job, next, 1);
    relu_layer<V>(in, network.channels, network.element[0], PYLO_MAX_WIDTH, network.padded[0],
                  Factored ? work.fixed_preactivation : network.bias, Factored ? table->preactivation : nullptr, out);
    prefetch_tile(job, next, 2);
    int layer = 1;
    for (; layer < network.layers - 1; ++layer) {
        float *swap = in;
        in = out;
        out = swap;
        relu_layer<V>(in, network.width[layer - 1], network.weights[layer], network.padded[layer], network.padded[layer],
                      network.biases[layer], nullptr, out);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) outputs[j][i] = Vec(network.biases[layer][j]);
    multiply<V, 2>(out, network.width[layer - 1], network.weights[layer], network.padded[layer], outputs);
}

// The same for a network whose hidden layers all have as many units as registers hold: nothing goes through memory. Its
// first sums are in the order in which features are made, so only the rule may decide which of the two is taken. `begin`: the
// first of the table's vectors.
template <bool Factored, int V, int Units, class Visit>
PYLO_FN void evaluate_narrow(
    const Job &job, Workplace &work, const LaneTable *table, int64_t next, Visit &&visit, Vec (&outputs)[2][V],
    int begin = 0) {
    const Network &network = work.network;
    const int last = network.layers - 1;
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        Vec units[Units];
#pragma GCC unroll 8
        for (int j = 0; j < Units; ++j) {
            units[j] = Vec(Factored ? work.fixed_preactivation[j] : network.bias[j]);
            if constexpr (Factored) units[j] = units[j] + Vec::load(table->preactivation[j] + (begin + i) * Vec::lanes);
        }
        visit(i, [&](int channel, Vec f) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int j = 0; j < Units; ++j) units[j] = madd(f, Vec(network.element[channel][j]), units[j]);
        });
        for (int layer = 1; layer < last; ++layer) {
            const float *weights = network.weights[layer], *bias = network.biases[layer];
            Vec following[Units];
#pragma GCC unroll 8
            for (int j = 0; j < Units; ++j) following[j] = Vec(bias[j]);
#pragma GCC unroll 8
            for (int k = 0; k < Units; ++k) {
                const Vec x = at_least(Vec(0.0f), units[k]);
#pragma GCC unroll 8
                for (int j = 0; j < Units; ++j) following[j] = madd(x, Vec(weights[k * Units + j]), following[j]);
            }
#pragma GCC unroll 8
            for (int j = 0; j < Units; ++j) units[j] = following[j];
        }
        const float *weights = network.weights[last], *bias = network.biases[last];
        outputs[0][i] = Vec(bias[0]);
        outputs[1][i] = Vec(bias[1]);
#pragma GCC unroll 8
        for (int k = 0; k < Units; ++k) {
            const Vec x = at_least(Vec(0.0f), units[k]);
            outputs[0][i] = madd(x, Vec(weights[k * 4]), outputs[0][i]);
            outputs[1][i] = madd(x, Vec(weights[k * 4 + 1]), outputs[1][i]);
        }
        if (i < 2) prefetch_tile(job, next, 1 + i);
    }
}

// The same without hidden layers: both outputs are sums of features. Nothing but memory takes time.
template <bool Factored, int V, class Visit>
PYLO_FN void evaluate_linear(
    Workplace &work, const LaneTable *table, Visit &&visit, Vec (&outputs)[2][V], int begin = 0) {
    const Network &network = work.network;
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            outputs[j][i] = Vec(Factored ? work.fixed_preactivation[j] : network.bias[j]);
            if constexpr (Factored) outputs[j][i] = outputs[j][i] + Vec::load(table->preactivation[j] + (begin + i) * Vec::lanes);
        }
        visit(i, [&](int channel, Vec f) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) outputs[j][i] = madd(f, Vec(network.element[channel][j]), outputs[j][i]);
        });
    }
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
