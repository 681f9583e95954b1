// Parameter-shaped state as it is stored: floats, their upper halves, or codes with a scale for every block. The formulas
// are those of pylo_integrations/formats.py, operation by operation.
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
PYLO_FN void decode(const pylo_stored &stored, const void *codes, const float *scales, const Run &run, float *values) {
    const Blocks blocks(stored);
    if (run.step == 1) {
        for (int first = 0; first < run.count;) {
            const int64_t element = run.index + first;
            const int64_t left = run.count - first, here = blocks.end(element) - element;
            const int count = (int)(here < left ? here : left);
            const float scale = scales[blocks.of(element)];
            for (int i = 0; i < count; ++i) values[first + i] = decoded<Square>(code_at<Square>(codes, element + i)) * scale;
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

// Noise of 16 bits for `count` elements of the whole tensor from `first` on.
PYLO_FN void make_noise(const uint32_t (&keys)[2], uint64_t first, int count, uint32_t *noise) {
    for (int done = 0; done < count;) {  // once, but where the upper word changes
        const uint32_t low = (uint32_t)(first + (uint64_t)done), high = (uint32_t)((first + (uint64_t)done) >> 32) ^ keys[1];
        const uint64_t left = (uint64_t)1 << 32;
        const int here = (uint64_t)low + (uint64_t)(count - done) > left ? (int)(left - low) : count - done;
        for (int i = 0; i < here; ++i) noise[done + i] = mixed(mixed((low + (uint32_t)i) ^ keys[0]) ^ high) & 0xFFFFu;
        done += here;
    }
}

// -- encoding ----------------------------------------------------------------------------------------------------------

PYLO_FN void encode_halves(const float *values, const uint32_t *noise, int count, uint16_t *to) {
    for (int i = 0; i < count; ++i) {
        const uint32_t bits = to_bits(values[i]);
        const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
        const uint32_t kept = bits >> 16 | (bits & 0x7FFFFFu ? 0x40u : 0u);  // infinity, or a quiet NaN
        to[i] = (uint16_t)(finite ? (bits + noise[i]) >> 16 : kept);
    }
}

// Largest magnitude of a block, NaN if there is one: these are ordered as integers.
PYLO_FN float largest_magnitude(const float *values, int count) {
    uint32_t most = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t size = to_bits(values[i]) & 0x7FFFFFFFu;
        most = size > most ? size : most;
    }
    const float scale = from_bits(most);
    return scale < 0x1p-90f ? 0.0f : scale;
}

PYLO_FN float whole_part(float x) { return (float)(int)x; }  // of small numbers that are not negative

template <bool Square>
PYLO_FN int encoded(float part, float chance) {
    if constexpr (Square) {
        const float above = part > 0 ? part : 0.0f;
        const float lower = whole_part(root(root(above)) * 255.0f);
        const float low = lower * lower / 65025.0f, high = (lower + 1) * (lower + 1) / 65025.0f;
        const float code = lower + ((part - low * low) / (high * high - low * low) > chance ? 1.0f : 0.0f);
        const float least = part > 0 ? 1.0f : 0.0f, most = code < 255.0f ? code : 255.0f;
        return (int)(most > least ? most : least);
    }
    const float distance = __builtin_fabsf(part) * 16129.0f;
    const float lower = whole_part(root(distance));
    const float code = lower + ((distance - lower * lower) / (lower + lower + 1) > chance ? 1.0f : 0.0f);
    const int size = (int)(code < 127.0f ? code : 127.0f);
    return part < 0 ? -size : size;
}

template <bool Square>
PYLO_FN void encode_codes(const float *values, const uint32_t *noise, int count, void *codes, float &scale) {
    scale = largest_magnitude(values, count);
    const float unit = scale > 0 ? scale : __builtin_inff();
    for (int i = 0; i < count; ++i) {
        const float part = values[i] / unit;
        const int code = encoded<Square>(part == part ? part : 0.0f, ((float)noise[i] + 0.5f) / 65536.0f);
        if constexpr (Square)
            ((uint8_t *)codes)[i] = (uint8_t)code;
        else
            ((int8_t *)codes)[i] = (int8_t)code;
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
    float &scale = stored.scale[which][Blocks(stored).of(block.index)];
    char *codes = (char *)state_of(t, which) + block.index;
    if (which == RMS_STATE)
        encode_codes<true>(values, noise, block.count, codes, scale);
    else
        encode_codes<false>(values, noise, block.count, codes, scale);
}

// Whether advance() has moved a record's state on, so that apply only reads it.
PYLO_FN bool is_moved(const Job &job) { return job.tensor->state_dtype != PYLO_FLOAT32; }

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
