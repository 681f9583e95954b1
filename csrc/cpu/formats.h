// Parameter-shaped state as it is stored: floats, their upper halves, or codes with a scale for every block. The formulas
// are those of pylo_integrations/formats.py, operation by operation.
//
// Loops over a block are functions of their own, without branches and with pointers that are told to be distinct: codes are
// bytes, which may be anything's, and in a larger function compilers give up on vectors. A call costs nothing beside 256
// elements.
#pragma once

#include "kernels.h"
#include "storage.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

constexpr int BLOCK = PYLO_BLOCK;

enum State { RMS_STATE = 3 };  // momenta are 0 to 2

PYLO_FN void *state_of(const pylo_tensor &t, int which) { return which == RMS_STATE ? t.rms : t.momentum[which]; }

// Where blocks are in a box: a run of rows.
struct Blocks {
    int64_t row, per_row;

    PYLO_FN explicit Blocks(const pylo_stored &stored)
        : row(stored.row), per_row((stored.row + BLOCK - 1) / BLOCK) {}
    PYLO_FN int64_t of(int64_t element) const { return element / row * per_row + element % row / BLOCK; }
    PYLO_FN int64_t end(int64_t element) const {  // of the block of an element
        const int64_t column = element % row, next = (column / BLOCK + 1) * BLOCK;
        return element - column + (next < row ? next : row);
    }
    PYLO_FN int64_t begin(int64_t element) const {  // of the first block that begins there or later
        return element % row % BLOCK ? end(element) : element;
    }
};

// -- codes -------------------------------------------------------------------------------------------------------------

template <bool Square>
PYLO_FN float decoded(int code) {
    if constexpr (Square) {
        const float square = (float)(code * code) / 65025.0f;
        return square * square;
    }
    return (float)(code * (code < 0 ? -code : code)) / 16129.0f;
}

template <bool Square>
PYLO_FN int code_at(const void *codes, int64_t element) {
    return Square ? (int)((const uint8_t *)codes)[element] : (int)((const int8_t *)codes)[element];
}

template <bool Square>
__attribute__((noinline)) void decode_codes(const void *codes, int64_t first, int count, float scale, float *__restrict values) {
    for (int i = 0; i < count; ++i) values[i] = decoded<Square>(code_at<Square>(codes, first + i)) * scale;
}

template <bool Square>
PYLO_FN void decode(const pylo_stored &stored, const void *codes, const float *scales, const Run &run, float *values) {
    const Blocks blocks(stored);
    if (run.step == 1) {
        for (int first = 0; first < run.count;) {
            const int64_t element = run.index + first;
            const int64_t left = run.count - first, here = blocks.end(element) - element;
            const int count = (int)(here < left ? here : left);
            decode_codes<Square>(codes, element, count, scales[blocks.of(element)], values + first);
            first += count;
        }
        return;
    }
    for (int i = 0; i < run.count; ++i) {
        const int64_t element = run.index + i * run.step;
        values[i] = decoded<Square>(code_at<Square>(codes, element)) * scales[blocks.of(element)];
    }
}

// A run of a state as floats, as Run::load() gives them.
PYLO_FN float *load_state(const Job &job, int which, const Run &run, float *buffer) {
    const pylo_tensor &t = *job.tensor;
    if (t.state_dtype != PYLO_INT8) return run.load(state_of(t, which), t.state_dtype, buffer);
    if (which == RMS_STATE)
        decode<true>(*job.stored, t.rms, job.stored->scale[which], run, buffer);
    else
        decode<false>(*job.stored, t.momentum[which], job.stored->scale[which], run, buffer);
    for (int i = run.count; i < run.padded; ++i) buffer[i] = 0;
    return buffer;
}

// -- noise -------------------------------------------------------------------------------------------------------------

PYLO_FN uint32_t mixed(uint32_t x) {
    x = ((x >> 16) ^ x) * 0x45D9F3Bu;
    x = ((x >> 16) ^ x) * 0x45D9F3Bu;
    return (x >> 16) ^ x;
}

__attribute__((noinline)) void mix(uint32_t key, uint32_t other, uint32_t first, int count, uint32_t *__restrict noise) {
    for (int i = 0; i < count; ++i) noise[i] = mixed(mixed((first + (uint32_t)i) ^ key) ^ other) & 0xFFFFu;
}

// Noise of 16 bits for `count` elements of the whole tensor from `first` on.
PYLO_FN void make_noise(const uint32_t (&keys)[2], uint64_t first, int count, uint32_t *noise) {
    for (int done = 0; done < count;) {  // once, but where the upper word changes
        const uint64_t at = first + (uint64_t)done, left = ((uint64_t)1 << 32) - (at & 0xFFFFFFFFu);
        const int here = left < (uint64_t)(count - done) ? (int)left : count - done;
        mix(keys[0], (uint32_t)(at >> 32) ^ keys[1], (uint32_t)at, here, noise + done);
        done += here;
    }
}

// -- encoding ----------------------------------------------------------------------------------------------------------

__attribute__((noinline)) void encode_halves(
    const float *__restrict values, const uint32_t *__restrict noise, int count, uint16_t *__restrict to) {
    for (int i = 0; i < count; ++i) {
        const uint32_t bits = to_bits(values[i]);
        const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
        const uint32_t kept = bits >> 16 | (bits & 0x7FFFFFu ? 0x40u : 0u);  // infinity, or a quiet NaN
        to[i] = (uint16_t)(finite ? (bits + noise[i]) >> 16 : kept);
    }
}

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

// The code of a number of magnitude at most 1, which nothing rounds beyond the largest.
template <bool Square>
PYLO_FN int encoded(float part, float chance) {
    if constexpr (Square) {
        const float above = part > 0 ? part : 0.0f;
        const float lower = whole_part(root(root(above)) * 255.0f);
        const float low = lower * lower / 65025.0f, high = (lower + 1) * (lower + 1) / 65025.0f;
        const float code = lower + ((part - low * low) / (high * high - low * low) > chance ? 1.0f : 0.0f);
        const float least = part > 0 ? 1.0f : 0.0f;
        return (int)(code > least ? code : least);
    }
    const float distance = __builtin_fabsf(part) * 16129.0f;
    const float lower = whole_part(root(distance));
    const float code = lower + ((distance - lower * lower) / (lower + lower + 1) > chance ? 1.0f : 0.0f);
    return (int)__builtin_copysignf(code, part);
}

template <bool Square>
__attribute__((noinline)) void encode_codes(
    const float *__restrict values, const uint32_t *__restrict noise, int count, float unit, int8_t *__restrict codes) {
    for (int i = 0; i < count; ++i) {
        const float part = values[i] / unit;
        const int code = encoded<Square>(part, ((float)(int)noise[i] + 0.5f) / 65536.0f);
        codes[i] = (int8_t)code;
    }
}

// The way back, of a whole block.
PYLO_FN void store_block(const Job &job, int which, const Run &block, const float *values) {
    const pylo_tensor &t = *job.tensor;
    const pylo_stored &stored = *job.stored;
    alignas(64) uint32_t noise[BLOCK];
    make_noise(stored.noise[which], (uint64_t)(stored.first + block.index), block.count, noise);
    if (t.state_dtype == PYLO_BFLOAT16)
        return encode_halves(values, noise, block.count, (uint16_t *)state_of(t, which) + block.index);
    const float scale = largest_magnitude(values, block.count), unit = scale > 0 ? scale : __builtin_inff();
    stored.scale[which][Blocks(stored).of(block.index)] = scale;
    int8_t *codes = (int8_t *)state_of(t, which) + block.index;
    if (which == RMS_STATE)
        encode_codes<true>(values, noise, block.count, unit, codes);
    else
        encode_codes<false>(values, noise, block.count, unit, codes);
}

// Whether advance() has moved a record's state on, so that apply only reads it.
PYLO_FN bool is_moved(const Job &job) { return job.tensor->state_dtype != PYLO_FLOAT32; }

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
