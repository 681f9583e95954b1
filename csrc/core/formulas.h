// The mathematics of the learned rules, each formula once, for any numeric type V (docs/mathematics.md; rules/features.py).
#pragma once

#include "pylo.h"
#include "scalar.h"

namespace pylo {
inline namespace PYLO_ISA {

// Slots: the channels of the published feature lists in one fixed order. A rule reads a subset.
enum Slot {
    GRAD = 0,
    CLIPPED_GRAD = 1,
    PARAM = 2,
    MOMENTUM = 3,
    RMS = 6,
    MOMENTUM_OVER_RMS = 7,
    INVERSE_RMS = 10,
    FACTORED_GRAD = 11,
    GRAD_OVER_RMS = 14,
    ROW = 15,
    COL = 18,
    INVERSE_ROW = 21,
    INVERSE_COL = 24,
    FACTORED_MOMENTUM = 27,
    SLOTS = 30
};
static_assert(SLOTS == PYLO_SLOTS, "");

template <class V>
PYLO_FN V inverse_root(V x) {
    return V(1.0f) / root(x);
}

template <class V>
PYLO_FN V ema(float keep, float weight, V old, V value) {
    return madd(V(keep), old, V(weight) * value);
}

// -- factored second moments: O(rows + columns) ----------------------------------------------------------------------

template <class V>
PYLO_FN V mean_square(V sum, V count) {
    return sum / count + V(1e-30f);
}

template <class V>
PYLO_FN V row_scale(V row, V mean_row) {
    return inverse_root(at_least(V(1e-9f), row / (mean_row + V(1e-9f))));
}

template <class V>
PYLO_FN V col_scale(V col) {
    return inverse_root(at_least(V(1e-9f), col));
}

template <class V>
PYLO_FN V inverse_statistic(V second_moment) {  // the features inverse_row and inverse_col
    return inverse_root(second_moment + V(1e-8f));
}

// -- state that some weight reads: what is not read need not be there, and counts as zero --------------------------------

PYLO_FN bool reads_momentum(const pylo_rule &rule, int k) {
    return rule.features & (1u << (MOMENTUM + k) | 1u << (MOMENTUM_OVER_RMS + k) | 1u << (FACTORED_MOMENTUM + k));
}

PYLO_FN bool reads_rms(const pylo_rule &rule) {
    return rule.features & (1u << RMS | 7u << MOMENTUM_OVER_RMS | 1u << INVERSE_RMS | 1u << GRAD_OVER_RMS);
}

// -- the accumulators of one element ---------------------------------------------------------------------------------

template <class V>
struct Element {
    V grad, param, momentum[3], rms, diagonal[3];
};

template <class V>
PYLO_FN V clip_gradient(const pylo_rule &rule, V grad) {
    return at_most(V(rule.grad_clip), at_least(V(-rule.grad_clip), grad));
}

// The gradient as the rule reads it. `Plain`: of a step that only scales it.
template <bool Plain = false, class V>
PYLO_FN V seen_gradient(const pylo_rule &rule, const pylo_step &step, V grad, V param) {
    if (!Plain && step.flags & PYLO_ZERO_NONFINITE) grad = zero_beyond(grad, V(rule.grad_limit));
    grad = grad * V(step.grad_scale);
    if (!Plain && step.l2 != 0.0f) grad = madd(param, V(step.l2), grad);
    return clip_gradient(rule, grad);
}

template <bool Factored, class V>
PYLO_FN void accumulate(const pylo_rule &rule, Element<V> &x) {
    const V square = x.grad * x.grad;
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) x.momentum[k] = ema(rule.momentum_keep[k], rule.momentum_weight[k], x.momentum[k], x.grad);
    x.rms = ema(rule.rms_keep, rule.rms_weight, x.rms, square);
    if constexpr (!Factored) {
        const V q = square + V(1e-30f);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k)
            x.diagonal[k] = ema(rule.factored_keep[k], rule.factored_weight[k], x.diagonal[k], q);
    }
}

// -- features that differ from element to element ----------------------------------------------------------------------
//
// They are numbered without gaps, the two that only some rules read last, so that a network evaluates no channel that
// it does not read. Row and column features are constant along an axis and enter the network as pre-activations.

template <bool Factored>
struct Channels;

template <>
struct Channels<true> {
    static constexpr int common = 16, all = 18;
    static PYLO_FN int slot(int channel) {
        constexpr signed char slots[all] = {0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 27, 28, 29, 1, 14};
        return slots[channel];
    }
};

template <>
struct Channels<false> {  // row and col are the same full-size moment: its channels carry the weights of both
    static constexpr int common = 22, all = 24;
    static PYLO_FN int slot(int channel) {
        constexpr signed char slots[all] = {0,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12,
                                            13, 27, 28, 29, 15, 16, 17, 21, 22, 23, 1,  14};
        return slots[channel];
    }
};

// Whether the rule reads the channels that only some rules read.
PYLO_FN bool has_extra(const pylo_rule &rule) {
    return rule.features >> CLIPPED_GRAD & 1 || rule.features >> GRAD_OVER_RMS & 1;
}

// Calls put(channel, value) for every channel. `scale` is the product of row and column scales, unused for vectors.
template <bool Factored, class V, class Put>
PYLO_FN void features(const pylo_rule &rule, bool extra, const Element<V> &x, const V *scale, Put &&put) {
    const V inverse_rms = inverse_root(x.rms + V(rule.rms_eps));
    put(0, x.grad);
    put(1, x.param);
    put(5, x.rms);
    put(9, inverse_rms);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
        put(2 + k, x.momentum[k]);
        put(6 + k, x.momentum[k] * inverse_rms);
        if constexpr (Factored) {
            put(10 + k, x.grad * scale[k]);
            put(13 + k, x.momentum[k] * scale[k]);
        } else {
            const V d = x.diagonal[k];
            put(10 + k, x.grad * inverse_root(at_least(V(1e-9f), d + V(1e-9f))));
            put(13 + k, x.momentum[k] * inverse_root(d + V(rule.vector_momentum_eps)));
            put(16 + k, d);
            put(19 + k, inverse_statistic(d));
        }
    }
    if (extra) {
        put(Channels<Factored>::common, at_most(V(0.1f), at_least(V(-0.1f), x.grad)));
        put(Channels<Factored>::common + 1, x.grad * inverse_rms);
    }
}

// -- the step ----------------------------------------------------------------------------------------------------------

template <class V>
PYLO_FN V proposed_step(const pylo_rule &rule, const pylo_step &step, V direction, V magnitude) {
    return V(step.step_mult) * (direction * exponential(magnitude * V(rule.exp_mult)));
}

// Quotients of what all elements share; the last one takes a division for each.
template <class V>
PYLO_FN V adam_divisor(const pylo_rule &rule, const pylo_step &step, V rms) {
    return root(madd(rms, V(1.0f / step.rms_correction), V(rule.adam_eps_root))) + V(rule.adam_eps);
}

template <class V>
PYLO_FN V adam_quotient(const pylo_step &step, V momentum, V divisor) {
    return V(step.step_mult / step.momentum_correction) * momentum / divisor;
}

template <class V>
PYLO_FN V adam_step(const pylo_rule &rule, const pylo_step &step, V grad, V &momentum, V &rms, bool moved = false) {
    if (!moved) {
        momentum = ema(rule.momentum_keep[0], rule.momentum_weight[0], momentum, grad);
        rms = ema(rule.rms_keep, rule.rms_weight, rms, grad * grad);
    }
    return adam_quotient(step, momentum, adam_divisor(rule, step, rms));
}

template <class V>
PYLO_FN V updated_param(const pylo_step &step, V param, V proposed) {
    return madd(V(-step.scale), proposed, V(step.keep) * param);
}

}  // namespace PYLO_ISA
}  // namespace pylo
