// State that is not stored as floats: its blocks, the noise by which it is rounded, and codes. The formulas are those of
// pylo_integrations/formats.py and rounding.py, operation by operation, each once for numbers and for vectors of them.
//
// Whoever includes it has declared what is done to bits of floats, for their type (cpu/bits.h, cuda/formats.cuh).
#pragma once

#include "formulas.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

constexpr int BLOCK = PYLO_BLOCK;

enum State { RMS_STATE = 3 };  // momenta are 0 to 2

PYLO_FN void *state_of(const pylo_tensor &t, int which) { return which == RMS_STATE ? t.rms : t.momentum[which]; }

// -- blocks ------------------------------------------------------------------------------------------------------------

// A block among those of a box, and how much of it lies from an element on.
template <class I>
struct Place {
    I block, left;
};

// Where blocks are in a box: a run of rows.
template <class I = int64_t>
struct Blocks {
    I row, per_row;

    PYLO_FN explicit Blocks(const pylo_stored &stored)
        : row((I)stored.row), per_row((I)((stored.row + BLOCK - 1) / BLOCK)) {}
    PYLO_FN Place<I> at(I element) const {
        if (row % BLOCK == 0) return {element / BLOCK, BLOCK - element % BLOCK};  // as nearly all are: no division
        const I number = element / row, column = element - number * row, block = column / BLOCK;
        const I end = (block + 1) * BLOCK;
        return {number * per_row + block, (end < row ? end : row) - column};
    }
    PYLO_FN I begin(I element) const {  // of the first block that begins there or later
        const Place<I> place = at(element);
        const I column = element % row;
        return column % BLOCK ? element + place.left : element;
    }
    PYLO_FN I before(I element) const {  // how many blocks begin before it
        const I number = element / row;
        return number * per_row + (element - number * row + BLOCK - 1) / BLOCK;
    }
    PYLO_FN I first(I block) const {  // element of a block
        const I number = block / per_row;
        return number * row + (block - number * per_row) * BLOCK;
    }
};

// -- noise -------------------------------------------------------------------------------------------------------------
//
// A hash of an element has the noise of two states, one in each half.

enum Half { LOWER = 0, UPPER = 16 };

PYLO_FN uint32_t half_mixed(uint32_t x) {
    x *= 0x45D9F3Bu;
    x = ((x >> 16) ^ x) * 0x45D9F3Bu;
    return (x >> 16) ^ x;
}
PYLO_FN uint32_t mixed(uint32_t x) { return half_mixed((x >> 16) ^ x); }

// Of bfloat16: what is added to the bits of a float before its lower half is dropped.
template <Half H, class V, class Bits>
PYLO_FN Bits half_noise(V x, Bits hash) {
    return where_finite(x, H == UPPER ? hash >> 16 : hash & 0xFFFFu);
}

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
template <bool Square, class Bits>
PYLO_FN auto part_of(Bits size) {
    const auto y = of_bits((size << Curve<Square>::SHIFT) + Curve<Square>::ONE);
    typedef decltype(of_bits(size)) V;
    constexpr float inverse = Curve<Square>::INVERSE;
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDACC__)
    return madd(y, V(inverse), V(-inverse));
#else
    return (y - V(1.0f)) * V(inverse);
#endif
}

// The scale of a block whose largest magnitude this is, and what numbers are multiplied by to be encoded: a little more than it
// should be, so that the largest number has the largest code whatever is rounded.
PYLO_FN float scale_of(float largest) { return largest < 0x1p-90f ? 0.0f : largest; }
template <bool Square>
PYLO_FN float unit_of(float scale) {
    return scale > 0 ? Curve<Square>::REACH / scale * (1 + 0x1p-22f) : 0.0f;
}

// (noise + 0.5) / 2^16 of the lowest bit that is kept of a code's float, less the bits of 1.
template <bool Square, Half H, class Bits>
PYLO_FN Bits code_noise(Bits hash) {
    constexpr int up = Curve<Square>::SHIFT - 16;
    constexpr uint32_t others = (1u << (up - 1)) - Curve<Square>::ONE;  // no bit of which is one of the noise
    static_assert((others & 0xFFFFu << up) == 0, "");
    return kept_beside(H == UPPER ? hash >> (16 - up) : hash << up, 0xFFFFu << up, others);
}

// The size of the code of a number times the block's unit. An average of squares that is not zero does not become zero.
template <bool Square, Half H, class V, class Bits>
PYLO_FN Bits encoded(V x, Bits hash) {
    const V y = (Square ? x : magnitude(x)) + V(1.0f);
    const Bits size = smaller_of((bits_of(y) + code_noise<Square, H>(hash)) >> Curve<Square>::SHIFT, Curve<Square>::TOP);
    return Square ? at_least_one_where(x, size) : size;
}

// -- averages that move on -----------------------------------------------------------------------------------------------

template <bool Square, class V>
PYLO_FN V moved_on(float keep, float weight, V old, V grad) {
    return ema(keep, weight, old, Square ? grad * grad : grad);
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
