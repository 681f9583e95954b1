// Apply on tensor cores: a warp evaluates the network for 32 elements, hidden layers filled up to 32 units.
//
// Tensor cores multiply bfloat16 numbers and add in float32. A float32 number is split into the nearest bfloat16 and the
// nearest bfloat16 to what that leaves, 16 bits of significand together; of the four products of two such pairs, the
// product of the two small parts is left out.
//
// Elements are rows, units are columns. Rows of inputs reach the layout of the first operand through shared memory; the
// result of a layer already has the layout that the next one wants its operand in, two tiles of 8 units side by side.
#pragma once

#include "network.cuh"

namespace pylo {
inline namespace PYLO_ISA {

constexpr int TILES = TENSOR_WIDTH / 8;     // of units
constexpr int STEPS = TENSOR_WIDTH / 16;    // of inputs
constexpr int TILE_ROW = 40;                // bfloat16 numbers between rows: 8 rows are in different banks

// Weights as the second operand of `mma`: both parts for every lane.
struct Fragment {
    uint4 lane[WARP];  // first part of registers b0 and b1, second part of b0 and b1
};

struct TensorShared {
    Fragment first[STEPS][TILES], middle[PYLO_MAX_LAYERS - 2][STEPS][TILES], last[STEPS][1];
    float first_bias[TENSOR_WIDTH], middle_bias[PYLO_MAX_LAYERS - 2][TENSOR_WIDTH], last_bias[8];
    struct alignas(16) {
        uint16_t parts[2][WARP][TILE_ROW];
        float2 outputs[WARP];
    } warp[TENSOR_THREADS / WARP];
    Folded folded;
    Slice slice;
    Record record;
    pylo_step step;
    pylo_stored stored;
};

// Two numbers as two parts each.
__device__ __forceinline__ void split(float low, float high, uint32_t &large, uint32_t &small) {
    large = pack_bfloat16(low, high);
    small = pack_bfloat16(low - bits_to_float(large << 16), high - bits_to_float(large & 0xFFFF0000u));
}

// All threads of a block fill the fragments of a layer; weight(input, unit) is 0 outside.
template <int Columns, class Weight>
__device__ __forceinline__ void fill_fragments(Fragment (&fragments)[STEPS][Columns], Weight weight) {
    for (int i = (int)threadIdx.x; i < STEPS * Columns * WARP; i += TENSOR_THREADS) {
        const int lane = i % WARP, column = i / WARP % Columns, step = i / WARP / Columns;
        const int input = step * 16 + lane % 4 * 2, unit = column * 8 + lane / 4;
        uint4 parts;
        split(weight(input, unit), weight(input + 1, unit), parts.x, parts.z);
        split(weight(input + 8, unit), weight(input + 9, unit), parts.y, parts.w);
        fragments[step][column].lane[lane] = parts;
    }
}

// Inputs of 16 elements as the first operand of `mma`, both parts.
struct Operand {
    uint32_t large[STEPS][4], small[STEPS][4];
};

// sums (16 elements, 8 units each) of two operands.
template <int Columns>
__device__ __forceinline__ void multiply(
    const Operand (&x)[2], const Fragment (&fragments)[STEPS][Columns], const float *bias, float (&sums)[2][Columns][4]) {
    const int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int column = 0; column < Columns; ++column) {
        const float2 b = *(const float2 *)(bias + column * 8 + lane % 4 * 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sums[half][column][0] = sums[half][column][2] = b.x;
            sums[half][column][1] = sums[half][column][3] = b.y;
        }
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int column = 0; column < Columns; ++column) {
            const uint4 w = fragments[step][column].lane[lane];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                mma(sums[half][column], x[half].small[step], w.x, w.y);
                mma(sums[half][column], x[half].large[step], w.z, w.w);
                mma(sums[half][column], x[half].large[step], w.x, w.y);
            }
        }
}

__device__ __forceinline__ void split_relu(float low, float high, uint32_t &large, uint32_t &small) {
    split(at_least(0.0f, low), at_least(0.0f, high), large, small);
}

template <bool Plain, bool Factored>
__device__ __forceinline__ void apply_part_on_tensor_cores(const pylo_rule &rule, const FlatPart &part, TensorShared &shared) {
    const float *const network = shared.step.network;
    const int hidden = rule.layers - 1, thread = (int)threadIdx.x, lane = thread % WARP;
    shared.folded.template fill<Factored>(rule, shared.record.tensor, shared.slice);
    fill_fragments(shared.first, [&](int input, int unit) {
        return shared.folded.template weight<Factored>(rule, network, input, unit);
    });
    const PaddedLayer first(rule, network, 0), last(rule, network, hidden);
    if (thread < TENSOR_WIDTH) shared.first_bias[thread] = first.bias(thread);
    for (int n = 1; n < hidden; ++n) {
        const PaddedLayer layer(rule, network, n);
        fill_fragments(shared.middle[n - 1], [&](int input, int unit) { return layer.weight(input, unit); });
        if (thread < TENSOR_WIDTH) shared.middle_bias[n - 1][thread] = layer.bias(thread);
    }
    fill_fragments(shared.last, [&](int input, int unit) { return unit < 2 ? last.weight(input, unit) : 0.0f; });
    if (thread < 8) shared.last_bias[thread] = thread < 2 ? last.bias(thread) : 0.0f;
    __syncthreads();

    auto &tile = shared.warp[thread / WARP];
    const Index<Plain> end = (Index<Plain>)part.end;
    for (Index<Plain> base = (Index<Plain>)part.begin + thread / WARP * WARP; base < end; base += TENSOR_THREADS) {
        forget_memory();
        const Index<Plain> n = smaller(base + lane, end - 1);
        const Index<Plain> index = memory_index<Plain>(shared.record, shared.slice, n);
        const bool inside = base + lane < end;
        float param;
        {
            float x[2 * STEPS * 8] = {};
            const Element<float> element = load_moved<Factored, Plain>(rule, shared, index);
            param = element.param;
            inputs_of<Factored, Plain>(
                rule, shared.record, shared.slice, n, element, [&](int input, float value) { x[input] = value; });
            if (inside) store_state<Factored, Plain>(shared.record.tensor, element, index);
#pragma unroll
            for (int i = 0; i < TENSOR_WIDTH; i += 8) {
                uint4 large, small;
                split(x[i], x[i + 1], large.x, small.x);
                split(x[i + 2], x[i + 3], large.y, small.y);
                split(x[i + 4], x[i + 5], large.z, small.z);
                split(x[i + 6], x[i + 7], large.w, small.w);
                *(uint4 *)&tile.parts[0][lane][i] = large;
                *(uint4 *)&tile.parts[1][lane][i] = small;
            }
        }
        __syncwarp();
        Operand x[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int row = half * 16 + lane % 16, column = step * 16 + lane / 16 * 8;
                load_matrices(x[half].large[step], &tile.parts[0][row][column]);
                load_matrices(x[half].small[step], &tile.parts[1][row][column]);
            }
        float sums[2][TILES][4];
        multiply(x, shared.first, shared.first_bias, sums);
        for (int n = 1;; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int step = 0; step < STEPS; ++step)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float(&from)[4] = sums[half][2 * step + i / 2];
                        split_relu(from[i % 2 * 2], from[i % 2 * 2 + 1], x[half].large[step][i], x[half].small[step][i]);
                    }
            if (n == hidden) break;
            multiply(x, shared.middle[n - 1], shared.middle_bias[n - 1], sums);
        }
        float outputs[2][1][4];
        multiply(x, shared.last, shared.last_bias, outputs);
        if (lane % 4 == 0) {  // columns 0 and 1
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                tile.outputs[half * 16 + lane / 4] = make_float2(outputs[half][0][0], outputs[half][0][1]);
                tile.outputs[half * 16 + lane / 4 + 8] = make_float2(outputs[half][0][2], outputs[half][0][3]);
            }
        }
        __syncwarp();
        const float2 output = tile.outputs[lane];
        if (inside) finish_element<Plain>(rule, shared.record.tensor, shared.step, index, param, output.x, output.y);
    }
}

template <bool Plain>
__device__ __forceinline__ void apply_on_tensor_cores(const Arguments &arguments) {
    auto &shared = shared_memory<TensorShared>();
    const FlatPart part = arguments.applies[blockIdx.x];
    if (threadIdx.x == 0) {
        shared.slice = arguments.slices[part.slice];
        shared.record = arguments.records[part.record];
        shared.step = arguments.steps[part.record];
        shared.stored = arguments.stored[part.record];
    }
    __syncthreads();
    if (shared.record.tensor.d0_axis < 0)
        apply_part_on_tensor_cores<Plain, false>(arguments.rule, part, shared);
    else
        apply_part_on_tensor_cores<Plain, true>(arguments.rule, part, shared);
}

}  // namespace PYLO_ISA
}  // namespace pylo
