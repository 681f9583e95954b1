// Nothing but multiply-adds in registers: what a core could reach.
#pragma once

#include "simd.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

int64_t multiply_adds(int64_t rounds) {
    constexpr int chains = 12;  // two units of latency 4 need 8
    Vec sums[chains];
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sums[i] = Vec((float)i);
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int i = 0; i < chains; ++i) sums[i] = madd(sums[i], Vec(0.5f), Vec(0.25f));
#pragma GCC unroll 12
    for (int i = 1; i < chains; ++i) sums[0] = sums[0] + sums[i];
    float total[Vec::lanes];
    sums[0].store(total);
    asm volatile("" : : "r"(total) : "memory");  // or the loop would be left out
    return rounds * chains * Vec::lanes;
}

}  // namespace
}  // namespace PYLO_ISA
}  // namespace pylo
