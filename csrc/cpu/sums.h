// Sums that are the same for every vector width, in the registers of a loop.
#pragma once

#include "simd.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

// Sums of N channels. Element i always goes to lane i % 16, in single precision for at most `LIMIT` rounds, so the
// result is the same for every vector width and as good as double precision.
template <int N>
struct Sums {
    static constexpr int LIMIT = 64;
    alignas(64) float lane[N][16] = {};
    double total[N] = {};
    int rounds = 0;

    PYLO_FN void add_square(int channel, int lane_index, Vec x) {
        float *at = lane[channel] + (lane_index & 15);
        madd(x, x, Vec::load(at)).store(at);
    }

    // All channels of the lanes that a vector from `lane_index` on goes to, to be added to in registers.
    struct Running {
        Vec of[N];
    };
    PYLO_FN Running running(int lane_index) const {
        Running sums;
#pragma GCC unroll 32
        for (int channel = 0; channel < N; ++channel) sums.of[channel] = Vec::load(lane[channel] + (lane_index & 15));
        return sums;
    }
    PYLO_FN void keep(const Running &sums, int lane_index) {
#pragma GCC unroll 32
        for (int channel = 0; channel < N; ++channel) sums.of[channel].store(lane[channel] + (lane_index & 15));
    }

    // To be called after every run of lanes; `count` is its length.
    PYLO_FN void count(int64_t lanes) {
        rounds += (int)((lanes + 15) / 16);
        if (rounds >= LIMIT) flush();
    }

    void flush() {
        for (int channel = 0; channel < N; ++channel) {
            total[channel] += reduce(lane[channel]);
            for (int i = 0; i < 16; ++i) lane[channel][i] = 0;
        }
        rounds = 0;
    }

    static PYLO_FN double reduce(const float *x) {
        double sum[8];
        for (int i = 0; i < 8; ++i) sum[i] = (double)x[i] + (double)x[i + 8];
        for (int half = 4; half; half /= 2)
            for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
        return sum[0];
    }
};

// Zeros in place of the others: features of lanes beyond the end are not 0, though gradients and parameters are.
PYLO_FN Vec first_lanes(int count, Vec x) {
    alignas(64) float values[Vec::lanes];
    x.store(values);
    for (int i = count; i < Vec::lanes; ++i) values[i] = 0;
    return Vec::load(values);
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
