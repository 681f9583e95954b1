// Parameter-shaped state as it is stored: floats, their upper halves, or codes with a scale for every block.
#pragma once

#include "kernels.h"
#include "storage.h"

#include "../core/stored.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

template <bool Square>
PYLO_FN Vec load_codes(const void *codes, int64_t i, float scale) {
    const Bits code = Square ? from_bytes((const uint8_t *)codes + i) : from_bytes((const int8_t *)codes + i);
    const Vec part = part_of<Square>(Square ? code : magnitude(code));
    return Square ? part * Vec(scale) : product_with_sign_of(of_bits(code), part, scale);
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
    for (; i + Vec::lanes <= count; i += Vec::lanes) load_codes<Square>(codes, first + i, scale).store(values + i);
    for (; i < count; ++i) values[i] = decoded<Square>(codes, first + i, scale);
}

template <bool Square>
PYLO_FN void decode(
    const pylo_stored &stored, const void *codes, const float *scales, const Run &run, Place<int64_t> place, float *values) {
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
PYLO_FN float *load_state(const Job &job, int which, const Run &run, const Place<int64_t> &place, float *buffer) {
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

PYLO_FN Place<int64_t> place_of(const Job &job, const Run &run) {
    return job.tensor->state_dtype == PYLO_INT8 ? Blocks(*job.stored).at(run.index) : Place<int64_t>{0, 0};
}

PYLO_FN float *load_state(const Job &job, int which, const Run &run, float *buffer) {
    return load_state(job, which, run, place_of(job, run), buffer);
}

// All states of a run that are not stored as floats. A function of its own, once for a tile: within a larger one compilers run
// out of registers, and out of those for floats too.
__attribute__((noinline)) void load_states(const Job &job, const Run &lanes, float *const (&buffers)[4]) {
    const Run run = lanes;
    const Place<int64_t> place = place_of(job, run);
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
