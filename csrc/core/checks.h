// What every library asks of a call, whatever its device: version, types, alignment, and the buffers of a step. The table
// of tensors, which changes rarely, is checked by itself (table.h).
#pragma once

#include "geometry.h"
#include "status.h"

namespace pylo {

inline bool aligned(const void *pointer, int64_t bytes) { return (uintptr_t)pointer % (uintptr_t)bytes == 0; }

inline bool known_dtype(int dtype) { return dtype == PYLO_FLOAT32 || dtype == PYLO_FLOAT16 || dtype == PYLO_BFLOAT16; }

inline int64_t itemsize(int dtype) { return dtype == PYLO_FLOAT32 ? 4 : 2; }

// Floats behind pylo_step.network, 0 for a geometry that the kernels do not evaluate.
inline int64_t network_floats(const pylo_rule &rule) {
    if (rule.layers < 1 || rule.layers > PYLO_MAX_LAYERS) return 0;
    int64_t inputs = PYLO_SLOTS, total = 0;
    for (int layer = 0; layer < rule.layers; ++layer) {
        const bool last = layer == rule.layers - 1;
        const int64_t width = rule.width[layer];
        if (width < (last ? 2 : 1) || width > (last ? 4 : PYLO_MAX_WIDTH)) return 0;
        total += (inputs + 1) * round_up(width, 4);
        inputs = width;
    }
    return total;
}

// Whether caller and library mean the same by a call. Its other fields may be read only after that.
template <class Call>
int check_version(const Call *call) {
    if (!call) return fail(PYLO_BAD_ARGUMENT, "call is null");
    if (call->abi_version != PYLO_ABI_VERSION || call->size != sizeof *call)
        return fail(PYLO_WRONG_ABI, "the library has interface version %u (struct of %u bytes), the caller %u (%u bytes)",
                    PYLO_ABI_VERSION, (unsigned)sizeof *call, call->abi_version, call->size);
    return PYLO_OK;
}

// The gradient of record `record`, of which `numel` elements are here.
inline int check_gradient(long long record, const pylo_step &step, int64_t numel) {
    if (!known_dtype(step.grad_dtype))
        return fail(PYLO_BAD_ARGUMENT, "tensor %lld: grad_dtype %d is unknown", record, step.grad_dtype);
    const int64_t size = itemsize(step.grad_dtype);
    if ((!step.grad && numel) || !aligned(step.grad, size))
        return fail(PYLO_BAD_ARGUMENT, "tensor %lld: grad is null or misaligned", record);
    if (step.grad_bytes < numel * size)
        return fail(PYLO_BAD_ARGUMENT, "tensor %lld: grad has %lld bytes, must have %lld", record,
                    (long long)step.grad_bytes, (long long)(numel * size));
    return PYLO_OK;
}

inline int check_network(long long record, const pylo_step &step, const pylo_rule &rule) {
    const int64_t bytes = network_floats(rule) * (int64_t)sizeof(float);
    if (!step.network || !aligned(step.network, sizeof(float)))
        return fail(PYLO_BAD_ARGUMENT, "tensor %lld: network is null or misaligned", record);
    if (step.network_bytes < bytes)
        return fail(PYLO_BAD_ARGUMENT, "tensor %lld: network has %lld bytes, must have %lld", record,
                    (long long)step.network_bytes, (long long)bytes);
    return PYLO_OK;
}

// The divisors of Adam's averages.
inline int check_corrections(long long record, const pylo_step &step) {
    if (step.momentum_correction > 0 && step.rms_correction > 0) return PYLO_OK;  // and not NaN
    return fail(PYLO_BAD_ARGUMENT, "tensor %lld: momentum_correction and rms_correction must be positive", record);
}

}  // namespace pylo
