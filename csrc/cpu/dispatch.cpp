#include "dispatch.h"

#include <initializer_list>

namespace pylo {

const Kernels *kernels_of(int isa) {
    switch (isa) {
        case PYLO_BASELINE:
            return &kernels_baseline;
#if defined(__x86_64__)
        case PYLO_AVX2:
            return __builtin_cpu_supports("x86-64-v3") ? &kernels_avx2 : nullptr;
#if !PYLO_WITHOUT_AVX512
        case PYLO_AVX512:
            return __builtin_cpu_supports("x86-64-v4") ? &kernels_avx512 : nullptr;
#endif
#endif
        default:
            return nullptr;
    }
}

int best_isa() {
    static const int best = [] {
        for (int isa : {PYLO_AVX512, PYLO_AVX2})
            if (kernels_of(isa)) return isa;
        return (int)PYLO_BASELINE;
    }();
    return best;
}

const Kernels *kernels_for(int isa, const Geometry &g) {
    if (isa != PYLO_BEST) return kernels_of(isa);
    // Those of AVX-512 and AVX2 give the same bits, so a run of few lanes may take the narrower vectors if they leave
    // fewer lanes idle.
    const bool narrow = best_isa() == PYLO_AVX512 && g.lanes < 64 && round_up(g.lanes, 8) < round_up(g.lanes, 16);
    return kernels_of(narrow ? (int)PYLO_AVX2 : best_isa());
}

}  // namespace pylo
