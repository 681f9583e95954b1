// State in a format that moves on, block by block, and is rounded.
//
// Loops over a block are functions of their own: codes are bytes, which may be anything's, and in a larger function compilers
// read all that is constant again after each store. A call costs nothing beside 256 elements.
#pragma once

#include "formats.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// -- noise -------------------------------------------------------------------------------------------------------------

// Of elements that share all but the lowest 16 bits of their numbers, so what these are mixed with is the same for all.
__attribute__((noinline)) void mix(uint32_t key, uint32_t other, uint32_t first, int count, uint32_t *__restrict hashes) {
    key ^= (first ^ key) >> 16;
    for (int i = 0; i < count; ++i) hashes[i] = half_mixed((first + (uint32_t)i) ^ key) + other;
}

// Of `count` elements of the whole tensor from `first` on.
PYLO_FN void make_hashes(const uint32_t (&keys)[2], uint64_t first, int count, uint32_t *hashes) {
    for (int done = 0; done < count;) {  // once, but where the upper bits change
        const uint64_t at = first + (uint64_t)done, left = ((uint64_t)1 << 16) - (at & 0xFFFFu);
        const int here = left < (uint64_t)(count - done) ? (int)left : count - done;
        mix(keys[0] ^ mixed((uint32_t)(at >> 32)), keys[1], (uint32_t)at, here, hashes + done);
        done += here;
    }
}

// -- averages that move on -----------------------------------------------------------------------------------------------

// A state of a record, and how it moves on.
struct Moving {
    int state;
    bool is_kept = false;
    float keep = 1, weight = 0;
};

// In bfloat16, of a block. `copy` is for those of a block that ends within a vector: nothing beyond it may be written.
template <bool Square, Half H>
class Halves {
public:
    PYLO_FN Halves(const Job &job, const Moving &by, const Run &run, uint16_t (&copy)[BLOCK])
        : keep(by.keep), weight(by.weight), count(run.count), padded(by.is_kept ? run.padded : run.count) {
        if (!by.is_kept) return;
        stored = halves = (uint16_t *)state_of(*job.tensor, by.state) + run.index;
        if (count == padded) return;
        halves = (uint16_t *)memcpy(copy, stored, (size_t)count * sizeof *copy);
        memset(copy + count, 0, (size_t)(padded - count) * sizeof *copy);
    }

    // Returns what is stored. A NaN is that of arithmetic, whose upper half is one too.
    PYLO_FN Vec move(int lane, Vec grad, Bits hash) const {
        const Vec moved = moved_on<Square>(keep, weight, from_halves(halves + lane), grad);
        const Bits rounded = bits_of(moved) + half_noise<H>(moved, hash);
        store_halves(rounded, halves + lane);
        return of_bits(rounded & 0xFFFF0000u);
    }

    PYLO_FN void store() const {
        if (count < padded) memcpy(stored, halves, (size_t)count * sizeof *halves);
    }

private:
    uint16_t *stored = nullptr, *halves = nullptr;
    float keep, weight;
    int count, padded;
};

// Of codes, not encoded yet. Returns the largest magnitude, NaN if there is one: these are ordered as integers.
template <bool Square>
__attribute__((noinline)) float move_codes(
    const void *codes, const float *grad, int padded, float scale, float keep, float weight, float *values) {
    Bits most = {};
    for (int i = 0; i < padded; i += Vec::lanes) {
        const Vec moved = moved_on<Square>(keep, weight, load_codes<Square>(codes, i, scale), Vec::load(grad + i));
        moved.store(values + i);
        most = larger_of(most, bits_of(magnitude(moved)));
    }
    return from_bits(largest_of(most));
}

// -- encoding ----------------------------------------------------------------------------------------------------------

// The codes of a block, which moves on and is encoded then. `copy` is for those of a block that ends within
// a vector: nothing beyond it may be written.
template <bool Square>
class Codes {
public:
    PYLO_FN Codes(const Job &job, const Moving &by, const Run &run, int64_t block, uint8_t (&copy)[BLOCK])
        : by(by), count(run.count), padded(run.padded) {
        if (!by.is_kept) return;
        stored = codes = (uint8_t *)state_of(*job.tensor, by.state) + run.index;
        stored_scale = job.stored->scale[by.state] + block;
        scale = *stored_scale;
        if (count == padded) return;
        codes = (uint8_t *)memcpy(copy, stored, (size_t)count);
        memset(copy + count, 0, (size_t)(padded - count));
    }

    PYLO_FN void move(const float *grad, float *values) {
        scale = scale_of(move_codes<Square>(codes, grad, padded, scale, by.keep, by.weight, values));
        unit = unit_of<Square>(scale);
    }

    // Calls then(lane, what is stored).
    template <Half H, class Then>
    __attribute__((noinline)) void encode(const float *values, const uint32_t *hashes, const Then &then) const {
        const Codes own = *this;  // copies, which no store to bytes can change
        const Then next = then;
        int lane = 0;
        for (; lane + 4 * Vec::lanes <= own.padded; lane += 4 * Vec::lanes) {
            Bits numbers[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int at = lane + i * Vec::lanes;
                next(at, own.template encode<H>(Vec::load(values + at), load_bits(hashes + at), numbers[i]));
            }
            store_bytes<!Square>(numbers, own.codes + lane);
        }
        for (; lane < own.padded; lane += Vec::lanes) {
            Bits number;
            next(lane, own.template encode<H>(Vec::load(values + lane), load_bits(hashes + lane), number));
            store_bytes(number, own.codes + lane);
        }
    }

    PYLO_FN void store() const {
        if (!by.is_kept) return;
        if (count < padded) memcpy(stored, codes, (size_t)count);
        *stored_scale = scale;
    }

private:
    template <Half H>
    PYLO_FN Vec encode(Vec value, Bits hash, Bits &code) const {
        const Vec x = value * Vec(unit);
        const Bits size = encoded<Square, H>(x, hash);
        code = Square ? size : with_sign_of(x, size);
        const Vec part = part_of<Square>(size);
        return Square ? part * Vec(scale) : product_with_sign_of(x, part, scale);
    }

    Moving by;
    uint8_t *stored = nullptr, *codes = nullptr;
    float *stored_scale = nullptr, scale = 0, unit = 0;
    int count, padded;
};

// Calls visit(run, number of the block, gradient that the rule sees) for the blocks that begin in a part, which is a run of
// elements of the box. `reads_param`: so does visit.
template <class Visit>
PYLO_FN void for_blocks(const Job &job, bool reads_param, Visit &&visit) {
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_step step = *job.step;
    const pylo_tensor &t = *job.tensor;
    const Blocks blocks(*job.stored);
    alignas(64) float buffer[3][BLOCK];
    for (int64_t first = blocks.begin(job.part.lane_begin); first < job.part.lane_end;) {
        const Place<int64_t> place = blocks.at(first);
        const Run run(first, 1, (int)place.left);
        const float *stored = run.load(step.grad, step.grad_dtype, buffer[0]);
        const float *param = stored;  // anything that can be read: without l2 it is not used
        if (step.l2 != 0.0f) param = run.load(t.param, t.param_dtype, buffer[1]);
        for (int lane = 0; lane < run.padded; lane += Vec::lanes)
            seen_gradient(rule, step, Vec::load(stored + lane), Vec::load(param + lane)).store(buffer[2] + lane);
        first += place.left;
        // The hardware foresees neither so many streams nor how long the arithmetic of a block takes: half of the time
        // that codes took to move on was measured to be waiting for them.
        prefetch(step.grad, step.grad_dtype, first, BLOCK);
        if (reads_param) prefetch(t.param, t.param_dtype, first, BLOCK);
        for (int which = 0; which <= RMS_STATE; ++which) prefetch(state_of(t, which), t.state_dtype, first, BLOCK);
        visit(run, place.block, (const float *)buffer[2]);
    }
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
