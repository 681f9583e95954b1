// measure: sums over the state before the step.
#pragma once

#include "elements.h"
#include "nesterov.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Sums over the state before the step: p^2, m (3), r, m^2 (3), r^2. In double precision throughout: a variance is the
// difference of two of them, which must vanish where all elements are equal.
//
// Value i of a run goes to element i % 16 of sums, and its square to that of squares. A whole run ahead is asked for: whether the
// hardware foresees these reads depends on where the linker puts the loop. With AHEAD the stage took 1.2 to 2.1 ms of a step of velo.
template <bool Plain>
PYLO_FN void add_to_sums(const float *values, int padded, double *sums, double *squares) {
#pragma GCC unroll 4
    for (int half = 0; half < 16; half += Vec::lanes) {
        Doubles sum = {}, square = Doubles::load(squares + half);
        if constexpr (Plain) sum = Doubles::load(sums + half);
        for (int i = half; i < padded; i += 16) {
            const Doubles x = Doubles::of(values + i);
            fetch(values + i + WIDE);
            if constexpr (Plain) sum.add(x);
            square.add_product(x, x);
        }
        square.store(squares + half);
        if constexpr (Plain) sum.store(sums + half);
    }
}

template <bool All>
void measure_part(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    constexpr int count_of_sums = All ? PYLO_TENSOR_SUMS : 1;
    alignas(64) double sums[count_of_sums][16] = {};
    alignas(64) float buffer[WIDE];
    for_runs(job, [&](const Position &, int64_t, const Run &run) __attribute__((always_inline)) {
        add_to_sums<false>(run.load(t.param, t.param_dtype, buffer), run.padded, nullptr, sums[0]);
        if constexpr (All) {
            for (int k = 0; k < 3; ++k)
                add_to_sums<true>(load_state(job, k, run, buffer), run.padded, sums[1 + k], sums[5 + k]);
            add_to_sums<true>(load_state(job, RMS_STATE, run, buffer), run.padded, sums[4], sums[8]);
        }
    });
    for (int i = 0; i < count_of_sums; ++i)
        for (double x : sums[i]) job.partial[i] += x;
}

void measure(const Job &job) {
    if (job.rule->measures == 1)
        measure_part<false>(job);
    else
        measure_part<true>(job);
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
