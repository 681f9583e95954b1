// Parameter-shaped state as it is stored: floats, their upper halves, or codes with a scale for every block. The formulas
// are those of pylo_integrations/formats.py, operation by operation.
//
// Loops over a block are functions of their own, without branches and with pointers that are told to be distinct: codes are
// bytes, which may be anything's, and in a larger function compilers give up on vectors. A call costs nothing beside 256
// elements.
#pragma once

#include "../core/formulas.h"
#include "kernels.h"
#include "storage.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

constexpr int BLOCK = PYLO_BLOCK;

enum State { RMS_STATE = 3 };  // momenta are 0 to 2

PYLO_FN void *state_of(const pylo_tensor &t, int which) { return which == RMS_STATE ? t.rms : t.momentum[which]; }

// A block among those of a box, and how much of it lies from an element on.
struct Place {
    int64_t block, left;
};

// Where blocks are in a box: a run of rows.
struct Blocks {
    int64_t row, per_row;

    PYLO_FN explicit Blocks(const pylo_stored &stored)
        : row(stored.row), per_row((stored.row + BLOCK - 1) / BLOCK) {}
    PYLO_FN Place at(int64_t element) const {
        const int64_t number = element / row, column = element - number * row, block = column / BLOCK;
        const int64_t end = (block + 1) * BLOCK;
        return {number * per_row + block, (end < row ? end : row) - column};
    }
    PYLO_FN int64_t begin(int64_t element) const {  // of the first block that begins there or later
        const Place place = at(element);
        const int64_t column = element % row;
        return column % BLOCK ? element + place.left : element;
    }
};

// -- codes -------------------------------------------------------------------------------------------------------------

// Products of the largest codes and these are exactly 1.
constexpr float SIGNED = 1.0f / 16129.0f, SQUARE = 1.0f / 65025.0f;

template <bool Square>
PYLO_FN float decoded(int code) {
    if constexpr (Square) {
        const float square = (float)(code * code) * SQUARE;
        return square * square;
    }
    return (float)(code * (code < 0 ? -code : code)) * SIGNED;
}

template <bool Square>
PYLO_FN int code_at(const void *codes, int64_t element) {
    return Square ? (int)((const uint8_t *)codes)[element] : (int)((const int8_t *)codes)[element];
}

template <bool Square>
PYLO_FN void decode_codes(const void *codes, int64_t first, int count, float scale, float *values) {
    int i = 0;
    for (; i + Vec::lanes <= count; i += Vec::lanes) {
        Vec curve;
        if constexpr (Square) {
            const Vec code = from_bytes((const uint8_t *)codes + first + i), square = code * code * Vec(SQUARE);
            curve = square * square;
        } else {
            const Vec code = from_bytes((const int8_t *)codes + first + i);
            curve = code * at_least(code, Vec(0.0f) - code) * Vec(SIGNED);
        }
        (curve * Vec(scale)).store(values + i);
    }
    for (; i < count; ++i) values[i] = decoded<Square>(code_at<Square>(codes, first + i)) * scale;
}

template <bool Square>
PYLO_FN void decode(
    const pylo_stored &stored, const void *codes, const float *scales, const Run &run, Place place, float *values) {
    const Blocks blocks(stored);
    if (run.step == 1) {
        for (int first = 0;;) {
            const int count = (int)(place.left < run.count - first ? place.left : run.count - first);
            decode_codes<Square>(codes, run.index + first, count, scales[place.block], values + first);
            first += count;
            if (first == run.count) return;
            place = blocks.at(run.index + first);
        }
    }
    for (int i = 0; i < run.count; ++i) {
        const int64_t element = run.index + i * run.step;
        values[i] = decoded<Square>(code_at<Square>(codes, element)) * scales[blocks.at(element).block];
    }
}

// Of the first element of a run, for load_state(): to find it takes a division.
PYLO_FN Place place_of(const Job &job, const Run &run) {
    return job.tensor->state_dtype == PYLO_INT8 ? Blocks(*job.stored).at(run.index) : Place{0, 0};
}

// A run of a state as floats, as Run::load() gives them; zeros of one that is not kept.
PYLO_FN float *load_state(const Job &job, int which, const Run &run, const Place &place, float *buffer) {
    const pylo_tensor &t = *job.tensor;
    if (!state_of(t, which)) {
        for (int i = 0; i < run.padded; ++i) buffer[i] = 0;
        return buffer;
    }
    if (t.state_dtype != PYLO_INT8) return run.load(state_of(t, which), t.state_dtype, buffer);
    if (which == RMS_STATE)
        decode<true>(*job.stored, t.rms, job.stored->scale[which], run, place, buffer);
    else
        decode<false>(*job.stored, t.momentum[which], job.stored->scale[which], run, place, buffer);
    for (int i = run.count; i < run.padded; ++i) buffer[i] = 0;
    return buffer;
}

PYLO_FN float *load_state(const Job &job, int which, const Run &run, float *buffer) {
    return load_state(job, which, run, place_of(job, run), buffer);
}

// -- noise -------------------------------------------------------------------------------------------------------------
//
// A hash of an element has the noise of two states, one in each half.

enum Half { LOWER = 0, UPPER = 16 };

template <Half H>
struct In {
    static constexpr Half value = H;
};

PYLO_FN uint32_t mixed(uint32_t x) {
    x = ((x >> 16) ^ x) * 0x45D9F3Bu;
    x = ((x >> 16) ^ x) * 0x45D9F3Bu;
    return (x >> 16) ^ x;
}

__attribute__((noinline)) void mix(uint32_t key, uint32_t other, uint32_t first, int count, uint32_t *__restrict hashes) {
    for (int i = 0; i < count; ++i) hashes[i] = mixed((first + (uint32_t)i) ^ key) ^ other;
}

// Of `count` elements of the whole tensor from `first` on.
PYLO_FN void make_hashes(const uint32_t (&keys)[2], uint64_t first, int count, uint32_t *hashes) {
    for (int done = 0; done < count;) {  // once, but where the upper word changes
        const uint64_t at = first + (uint64_t)done, left = ((uint64_t)1 << 32) - (at & 0xFFFFFFFFu);
        const int here = left < (uint64_t)(count - done) ? (int)left : count - done;
        mix(keys[0] ^ mixed((uint32_t)(at >> 32)), keys[1], (uint32_t)at, here, hashes + done);
        done += here;
    }
}

template <Half H>
PYLO_FN uint32_t noise_of(uint32_t hash) {
    return hash >> H & 0xFFFFu;
}

// -- averages that move on -----------------------------------------------------------------------------------------------

template <bool Square>
PYLO_FN float moved_on(float keep, float weight, float old, float grad) {
    return ema(keep, weight, old, Square ? grad * grad : grad);
}

// In bfloat16; `values` become what is stored.
template <bool Square, Half H>
__attribute__((noinline)) void move_halves(
    const float *__restrict grad, const uint32_t *__restrict hashes, int count, float keep, float weight,
    uint16_t *__restrict state, float *__restrict values) {
    for (int i = 0; i < count; ++i) {
        const uint32_t bits = to_bits(moved_on<Square>(keep, weight, from_bfloat16(state[i]), grad[i]));
        const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
        const uint32_t kept = bits >> 16 | (bits & 0x7FFFFFu ? 0x40u : 0u);  // infinity, or a quiet NaN
        const uint32_t half = finite ? (bits + noise_of<H>(hashes[i])) >> 16 : kept;
        state[i] = (uint16_t)half;
        values[i] = from_bits(half << 16);
    }
}

// Of codes, not encoded yet.
template <bool Square>
__attribute__((noinline)) void move_codes(
    const void *codes, int64_t first, const float *__restrict grad, int count, float scale, float keep, float weight,
    float *__restrict values) {
    for (int i = 0; i < count; ++i) {
        const float old = decoded<Square>(code_at<Square>(codes, first + i)) * scale;
        values[i] = moved_on<Square>(keep, weight, old, grad[i]);
    }
}

// -- encoding ----------------------------------------------------------------------------------------------------------

// Largest magnitude of a block, NaN if there is one: these are ordered as integers.
__attribute__((noinline)) float largest_magnitude(const float *values, int count) {
    uint32_t most = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t size = to_bits(values[i]) & 0x7FFFFFFFu;
        most = size > most ? size : most;
    }
    const float scale = from_bits(most);
    return scale < 0x1p-90f ? 0.0f : scale;
}

PYLO_FN float whole_part(float x) { return (float)(int)x; }  // of small numbers that are not negative

// The code of a number times encode_codes()' unit.
template <bool Square>
PYLO_FN int encoded(float x, float chance) {
    if constexpr (Square) {
        const float size = x > 0 ? x : 0.0f;
        const float lower = whole_part(root(root(size))), upper = lower + 1;
        const float low = lower * lower * (lower * lower), high = upper * upper * (upper * upper);
        const float code = lower + (size - low > chance * (high - low) ? 1.0f : 0.0f);
        const float least = x > 0 ? 1.0f : 0.0f, most = code < 255.0f ? code : 255.0f;
        return (int)(most > least ? most : least);
    }
    const float size = __builtin_fabsf(x);
    const float lower = whole_part(root(size));
    const float code = lower + (size - lower * lower > chance * (2 * lower + 1) ? 1.0f : 0.0f);
    return (int)__builtin_copysignf(code < 127.0f ? code : 127.0f, x);
}

template <bool Square, Half H>
__attribute__((noinline)) void encode_codes(
    const float *__restrict values, const uint32_t *__restrict hashes, int count, float unit, int8_t *__restrict codes) {
    for (int i = 0; i < count; ++i) {
        const float chance = ((float)(int)noise_of<H>(hashes[i]) + 0.5f) * 0x1p-16f;
        codes[i] = (int8_t)encoded<Square>(values[i] * unit, chance);
    }
}

// A block of a state moves on by the gradient that the rule sees; `values` become what is stored of it if `Read`.
template <bool Square, Half H, bool Read>
PYLO_FN void move_block(
    const Job &job, int which, const Run &run, int64_t block, const float *grad, const uint32_t *hashes, float keep,
    float weight, float *values) {
    void *state = state_of(*job.tensor, which);
    if (job.tensor->state_dtype == PYLO_BFLOAT16)
        return move_halves<Square, H>(grad, hashes, run.count, keep, weight, (uint16_t *)state + run.index, values);
    float &scale = job.stored->scale[which][block];
    move_codes<Square>(state, run.index, grad, run.count, scale, keep, weight, values);
    scale = largest_magnitude(values, run.count);
    // A little more than it should be, so that the largest number has the largest code whatever is rounded.
    const float unit = scale > 0 ? (Square ? 65025.0f * 65025.0f : 16129.0f) / scale * (1 + 0x1p-22f) : 0.0f;
    encode_codes<Square, H>(values, hashes, run.count, unit, (int8_t *)state + run.index);
    if constexpr (Read) decode_codes<Square>(state, run.index, run.count, scale, values);
}

// Calls visit(run, number of the block, gradient that the rule sees) for the blocks that begin in a part, which is a run of
// elements of the box.
template <class Visit>
PYLO_FN void for_blocks(const Job &job, Visit &&visit) {
    const pylo_rule rule = *job.rule;  // copies, as in adam()
    const pylo_step step = *job.step;
    const pylo_tensor &t = *job.tensor;
    const Blocks blocks(*job.stored);
    alignas(64) float buffer[3][BLOCK];
    for (int64_t first = blocks.begin(job.part.lane_begin); first < job.part.lane_end;) {
        const Place place = blocks.at(first);
        const Run run(first, 1, (int)place.left);
        const float *stored = run.load(step.grad, step.grad_dtype, buffer[0]);
        const float *param = stored;  // anything that can be read: without l2 it is not used
        if (step.l2 != 0.0f) param = run.load(t.param, t.param_dtype, buffer[1]);
        for (int lane = 0; lane < run.padded; lane += Vec::lanes)
            seen_gradient(rule, step, Vec::load(stored + lane), Vec::load(param + lane)).store(buffer[2] + lane);
        visit(run, place.block, (const float *)buffer[2]);
        first += place.left;
    }
}

// Whether a record's state has moved on before apply, which only reads it then.
PYLO_FN bool is_moved(const Job &job) { return job.tensor->state_dtype != PYLO_FLOAT32; }

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
