// advance: state that is not stored as floats moves on, before apply reads it. Of all rules, Adam's and momentum too.
//
// A warp has a block, 8 elements in each lane, so the block's largest magnitude needs no shared memory and nobody waits for
// another warp.
#pragma once

#include "elements.cuh"

namespace pylo {
inline namespace PYLO_ISA {

constexpr int EACH = BLOCK / WARP;  // elements of a lane, WARP apart

__device__ __forceinline__ uint32_t largest_of_warp(uint32_t x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes; lanes /= 2) {
        const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
        x = other > x ? other : x;
    }
    return x;
}

// What a lane has of a block of a record: the elements first + i * WARP, of which `count` are in the block.
struct BlockPart {
    int64_t block, first;
    int count;
    float grad[EACH];
    uint32_t hash[EACH];

    __device__ __forceinline__ bool has(int i) const { return i * WARP < count; }
    __device__ __forceinline__ int64_t at(int i) const { return first + i * WARP; }

    // Noise of two states, of the elements as they are numbered in the whole tensor.
    __device__ __forceinline__ void fill_hashes(const pylo_stored &stored, int pair) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const uint64_t element = (uint64_t)(stored.first + at(i));
            const uint32_t upper = mixed((uint32_t)(element >> 32));
            hash[i] = mixed((uint32_t)element ^ upper ^ stored.noise[pair][0]) + stored.noise[pair][1];
        }
    }
};

// One state of a block, which moves on and is stored. All lanes of a warp are here.
template <int Which, Half H>
__device__ __forceinline__ void move_state(
    const pylo_tensor &t, const pylo_stored &stored, float keep, float weight, const BlockPart &mine) {
    constexpr bool square = Which == RMS_STATE;
    if (t.state_dtype == PYLO_BFLOAT16) {
        uint16_t *const halves = device((uint16_t *)state_of(t, Which));
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (!mine.has(i)) continue;
            const float moved = moved_on<square>(keep, weight, from_bfloat16(halves[mine.at(i)]), mine.grad[i]);
            halves[mine.at(i)] = (uint16_t)((bits_of(moved) + half_noise<H>(moved, mine.hash[i])) >> 16);
        }
        return;
    }
    uint8_t *const codes = device((uint8_t *)state_of(t, Which));
    float *const stored_scale = device(stored.scale[Which]) + mine.block;
    const float old_scale = *stored_scale;
    float moved[EACH];
    uint32_t largest = 0;  // magnitudes are ordered as integers, and NaN is the largest
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (!mine.has(i)) continue;
        moved[i] = moved_on<square>(keep, weight, load_code<square>(codes, mine.at(i)) * old_scale, mine.grad[i]);
        const uint32_t size = bits_of(magnitude(moved[i]));
        largest = size > largest ? size : largest;
    }
    const float scale = scale_of(of_bits(largest_of_warp(largest))), unit = unit_of<square>(scale);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (!mine.has(i)) continue;
        const float x = moved[i] * unit;
        const uint32_t size = encoded<square, H>(x, mine.hash[i]);
        codes[mine.at(i)] = (uint8_t)(!square && bits_of(x) >> 31 ? 0u - size : size);
    }
    if (threadIdx.x % WARP == 0) *stored_scale = scale;
}

__device__ __forceinline__ void advance(const Arguments &arguments) {
    const FlatPart part = arguments.advances[blockIdx.x];
    const pylo_tensor t = arguments.records[part.record].tensor;  // copies, which no store can be thought to change
    const pylo_stored stored = arguments.stored[part.record];
    const pylo_step step = arguments.steps[part.record];
    const pylo_rule rule = arguments.sections[t.rule].rule;
    const bool has_network = rule.layers > 0, is_momentum = rule.layers == PYLO_NESTEROV;
    const float keep = is_momentum ? 1 - step.momentum_weight : rule.momentum_keep[0];
    const float weight = is_momentum ? step.momentum_weight : rule.momentum_weight[0];
    const Blocks<> blocks(stored);
    const int64_t end = blocks.before(part.end);
    for (int64_t block = blocks.before(part.begin) + threadIdx.x / WARP; block < end; block += SUM_THREADS / WARP) {
        const int lane = (int)threadIdx.x % WARP;
        const int64_t first = blocks.first(block);
        BlockPart mine;
        mine.block = block;
        mine.first = first + lane;
        mine.count = (int)blocks.at(first).left - lane;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (!mine.has(i)) continue;
            const float param = step.l2 != 0.0f ? read(t.param, t.param_dtype, mine.at(i)) : 0.0f;
            mine.grad[i] = seen_gradient(rule, step, read(step.grad, step.grad_dtype, mine.at(i)), param);
        }
        mine.fill_hashes(stored, 0);
        if (t.momentum[0]) move_state<0, LOWER>(t, stored, keep, weight, mine);
        if (!is_momentum && t.rms) move_state<RMS_STATE, UPPER>(t, stored, rule.rms_keep, rule.rms_weight, mine);
        if (!has_network) continue;
        mine.fill_hashes(stored, 1);
        if (t.momentum[1]) move_state<1, LOWER>(t, stored, rule.momentum_keep[1], rule.momentum_weight[1], mine);
        if (t.momentum[2]) move_state<2, UPPER>(t, stored, rule.momentum_keep[2], rule.momentum_weight[2], mine);
    }
}

}  // namespace PYLO_ISA
}  // namespace pylo
