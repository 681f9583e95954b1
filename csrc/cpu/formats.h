// Parameter-shaped state as it is stored: floats, their upper halves, or codes with a scale for every block. The formulas
// are those of pylo_integrations/formats.py, operation by operation.
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
        if (row % BLOCK == 0) return {element / BLOCK, BLOCK - element % BLOCK};  // as nearly all are: no division
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

// A code is what is left of the bits of a float y = 1 + |x| * REACH / scale when its lower ones, SHIFT many, are rounded off,
// less what is left of 1.
template <bool Square>
struct Curve {
    static constexpr int SHIFT = Square ? 19 : 18, TOP = Square ? 255 : 127;
    static constexpr uint32_t ONE = 0x3F800000;
    static constexpr float REACH = Square ? 63487.0f : 14.75f, INVERSE = 1 / REACH;  // whose product is 1
};

// What a code's size stands for, as a part of its block's scale: (y - 1) / REACH. The difference is exact, so a multiply-add
// that rounds once gives the same.
template <bool Square>
PYLO_FN Vec part_of(Bits size) {
    constexpr float inverse = Curve<Square>::INVERSE;
    const Vec y = of_bits((size << Curve<Square>::SHIFT) + Curve<Square>::ONE);
#if defined(__FMA__) || defined(__aarch64__)
    return madd(y, Vec(inverse), Vec(-inverse));
#else
    return (y - Vec(1.0f)) * Vec(inverse);
#endif
}

template <bool Square>
PYLO_FN Vec load_codes(const void *codes, int64_t i) {
    const Bits code = Square ? from_bytes((const uint8_t *)codes + i) : from_bytes((const int8_t *)codes + i);
    const Bits size = Square ? code : magnitude(code);
    const Vec part = part_of<Square>(size);
    return Square ? part : with_sign_of(of_bits(code), part);
}

template <bool Square>
PYLO_FN float decoded(const void *codes, int64_t i, float scale) {
    const int code = Square ? ((const uint8_t *)codes)[i] : ((const int8_t *)codes)[i], size = code < 0 ? -code : code;
    const float y = from_bits(((uint32_t)size << Curve<Square>::SHIFT) + Curve<Square>::ONE);
    const float number = (y - 1.0f) * Curve<Square>::INVERSE * scale;
    return code < 0 ? -number : number;
}

template <bool Square>
PYLO_FN void decode_codes(const void *codes, int64_t first, int count, float scale, float *values) {
    int i = 0;
    for (; i + Vec::lanes <= count; i += Vec::lanes) (load_codes<Square>(codes, first + i) * Vec(scale)).store(values + i);
    for (; i < count; ++i) values[i] = decoded<Square>(codes, first + i, scale);
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
        values[i] = decoded<Square>(codes, element, scales[blocks.at(element).block]);
    }
}

PYLO_FN float *zeros(const Run &run, float *buffer) {  // of a state that is not kept
    for (int i = 0; i < run.padded; ++i) buffer[i] = 0;
    return buffer;
}

// A run of a state as floats, as Run::load() gives them. `place` is that of its first element, to find which takes a division.
PYLO_FN float *load_state(const Job &job, int which, const Run &run, const Place &place, float *buffer) {
    const pylo_tensor &t = *job.tensor;
    const void *state = state_of(t, which);
    if (!state) return zeros(run, buffer);
    if (t.state_dtype != PYLO_INT8) return run.load(state, t.state_dtype, buffer);
    if (which == RMS_STATE)
        decode<true>(*job.stored, state, job.stored->scale[which], run, place, buffer);
    else
        decode<false>(*job.stored, state, job.stored->scale[which], run, place, buffer);
    for (int i = run.count; i < run.padded; ++i) buffer[i] = 0;
    return buffer;
}

PYLO_FN Place place_of(const Job &job, const Run &run) {
    return job.tensor->state_dtype == PYLO_INT8 ? Blocks(*job.stored).at(run.index) : Place{0, 0};
}

PYLO_FN float *load_state(const Job &job, int which, const Run &run, float *buffer) {
    return load_state(job, which, run, place_of(job, run), buffer);
}

// All states of a run that are not stored as floats. A function of its own, once for a tile: within a larger one compilers run
// out of registers, and out of those for floats too.
__attribute__((noinline)) void load_states(const Job &job, const Run &lanes, float *const (&buffers)[4]) {
    const Run run = lanes;
    const Place place = place_of(job, run);
    load_state(job, 0, run, place, buffers[0]);
    load_state(job, 1, run, place, buffers[1]);
    load_state(job, 2, run, place, buffers[2]);
    load_state(job, RMS_STATE, run, place, buffers[RMS_STATE]);
}

// Whether a record's state has moved on before apply, which only reads it then.
PYLO_FN bool is_moved(const Job &job) { return job.tensor->state_dtype != PYLO_FLOAT32; }

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
