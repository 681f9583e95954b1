// Apply in float32: a thread evaluates the network for a few elements, with weights that all threads read from the same
// places in shared memory.
#pragma once

#include "network.cuh"

namespace pylo {
inline namespace PYLO_ISA {

// Hidden layers are filled up to `Width` units with zeros.
template <int Width>
struct ExactShared {
    alignas(16) float first[MAX_INPUTS][Width];
    alignas(16) float first_bias[Width];
    alignas(16) float middle[PYLO_MAX_LAYERS - 2][Width + 1][Width];  // the last row is the bias
    alignas(16) float last[Width + 1][2];
    Folded folded;
    Slice slice;
    Record record;
    pylo_step step;
    pylo_stored stored;
};

// Between loads of unrolled loops: a compiler that may move all of them compares each with every other one, and of a width
// of 64 there are so many that it takes three quarters of a minute. For sm_80 and sm_90 the machine code is the same.
template <int Width>
__device__ __forceinline__ void spare_compiler() {
    if constexpr (Width >= 64) forget_memory();
}

template <int Width>
__device__ __forceinline__ void add_product(float x, const float *weights, float (&sums)[Width]) {
#pragma unroll
    for (int unit = 0; unit < Width; unit += 4) {
        const float4 w = *(const float4 *)(weights + unit);
        sums[unit] = madd(x, w.x, sums[unit]);
        sums[unit + 1] = madd(x, w.y, sums[unit + 1]);
        sums[unit + 2] = madd(x, w.z, sums[unit + 2]);
        sums[unit + 3] = madd(x, w.w, sums[unit + 3]);
    }
}

template <int Width, int Elements, bool Plain, bool Factored>
__device__ __forceinline__ void apply_part_exactly(const pylo_rule &rule, const FlatPart &part, ExactShared<Width> &shared) {
    const float *const network = shared.step.network;
    const int hidden = rule.layers - 1, thread = (int)threadIdx.x;
    shared.folded.template fill<Factored>(rule, shared.record.tensor, shared.slice);
    for (int i = thread; i < MAX_INPUTS * Width; i += EXACT_THREADS)
        shared.first[i / Width][i % Width] = shared.folded.template weight<Factored>(rule, network, i / Width, i % Width);
    const PaddedLayer first(rule, network, 0), last(rule, network, hidden);
    for (int i = thread; i < Width; i += EXACT_THREADS) shared.first_bias[i] = first.bias(i);
    for (int n = 1; n < hidden; ++n) {
        const PaddedLayer layer(rule, network, n);
        for (int i = thread; i < (Width + 1) * Width; i += EXACT_THREADS)
            shared.middle[n - 1][i / Width][i % Width] =
                i / Width < Width ? layer.weight(i / Width, i % Width) : layer.bias(i % Width);
    }
    for (int i = thread; i < (Width + 1) * 2; i += EXACT_THREADS)
        shared.last[i / 2][i % 2] = i / 2 < Width ? last.weight(i / 2, i % 2) : last.bias(i % 2);
    __syncthreads();

    constexpr int inputs = Inputs<Factored>::all;
    const Index<Plain> end = (Index<Plain>)part.end;
    for (Index<Plain> base = (Index<Plain>)part.begin; base < end; base += EXACT_THREADS * Elements) {
        forget_memory();
        float x[Elements][inputs] = {}, a[Elements][Width], param[Elements];
#pragma unroll
        for (int e = 0; e < Elements; ++e) {
            const Index<Plain> wanted = base + e * EXACT_THREADS + thread, n = smaller(wanted, end - 1);
            const Index<Plain> index = memory_index<Plain>(shared.record, shared.slice, n);
            const Element<float> element = load_moved<Factored, Plain>(rule, shared, index);
            param[e] = element.param;
            inputs_of<Factored, Plain>(rule, shared.record, shared.slice, n, element, [&](int input, float value) {
                x[e][input] = value;
            });
            if (wanted < end) store_state<Factored, Plain>(shared.record.tensor, element, index);
#pragma unroll
            for (int unit = 0; unit < Width; ++unit) a[e][unit] = shared.first_bias[unit];
        }
#pragma unroll
        for (int input = 0; input < inputs; ++input) {
            spare_compiler<Width>();
#pragma unroll
            for (int e = 0; e < Elements; ++e) add_product(x[e][input], shared.first[input], a[e]);
        }
        for (int n = 1; n < hidden; ++n) {
            float b[Elements][Width];
#pragma unroll
            for (int e = 0; e < Elements; ++e)
#pragma unroll
                for (int unit = 0; unit < Width; ++unit) b[e][unit] = shared.middle[n - 1][Width][unit];
#pragma unroll
            for (int input = 0; input < Width; ++input) {
                spare_compiler<Width>();
#pragma unroll
                for (int e = 0; e < Elements; ++e)
                    add_product(at_least(0.0f, a[e][input]), shared.middle[n - 1][input], b[e]);
            }
#pragma unroll
            for (int e = 0; e < Elements; ++e)
#pragma unroll
                for (int unit = 0; unit < Width; ++unit) a[e][unit] = b[e][unit];
        }
#pragma unroll
        for (int e = 0; e < Elements; ++e) {
            float direction = shared.last[Width][0], magnitude = shared.last[Width][1];
#pragma unroll
            for (int input = 0; input < Width; ++input) {
                const float h = at_least(0.0f, a[e][input]);
                direction = madd(h, shared.last[input][0], direction);
                magnitude = madd(h, shared.last[input][1], magnitude);
            }
            const Index<Plain> n = base + e * EXACT_THREADS + thread;
            if (n < end)
                finish_element<Plain>(rule, shared.record.tensor, shared.step, memory_index<Plain>(shared.record, shared.slice, n),
                                      param[e], direction, magnitude);
        }
    }
}

template <int Width, int Elements, bool Plain>
__device__ __forceinline__ void apply_exactly(const Arguments &arguments) {
    auto &shared = shared_memory<ExactShared<Width>>();
    const FlatPart part = arguments.applies[blockIdx.x];
    if (threadIdx.x == 0) {
        shared.slice = arguments.slices[part.slice];
        shared.record = arguments.records[part.record];
        shared.step = arguments.steps[part.record];
        shared.stored = arguments.stored[part.record];
    }
    __syncthreads();
    if (shared.record.tensor.d0_axis < 0)
        apply_part_exactly<Width, Elements, Plain, false>(arguments.rule, part, shared);
    else
        apply_part_exactly<Width, Elements, Plain, true>(arguments.rule, part, shared);
}

}  // namespace PYLO_ISA
}  // namespace pylo
