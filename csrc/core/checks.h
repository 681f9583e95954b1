// What every library asks of a call, whatever its device: version, types, alignment, and the buffers of a step. The table
// of tensors, which changes rarely, is checked by itself (table.h).
#pragma once

#include "geometry.h"
#include "status.h"

namespace pylo {

inline bool aligned(const void *pointer, int64_t bytes) { return (uintptr_t)pointer % (uintptr_t)bytes == 0; }

inline bool known_dtype(int dtype) { return dtype == PYLO_FLOAT32 || dtype == PYLO_FLOAT16 || dtype == PYLO_BFLOAT16; }

inline int64_t itemsize(int dtype) { return dtype == PYLO_FLOAT32 ? 4 : dtype == PYLO_INT8 ? 1 : 2; }

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

// How the state of record `record` is stored, of which `numel` elements are here.
inline int check_stored(long long record, const pylo_tensor &t, const pylo_stored *stored, const pylo_rule &rule, int64_t numel) {
    if (t.state_dtype == PYLO_FLOAT32 || numel == 0) return PYLO_OK;
    if (!stored) return fail(PYLO_BAD_ARGUMENT, "tensor %lld: stored is null, and state_dtype is %d", record, t.state_dtype);
    if (stored->first < 0 || stored->first > t.numel - numel || stored->row < 1 || numel % stored->row)
        return fail(PYLO_BAD_ARGUMENT, "tensor %lld: first and row are not those of a run of rows", record);
    if (t.state_dtype != PYLO_INT8) return PYLO_OK;
    const int64_t scales = numel / stored->row * ((stored->row + PYLO_BLOCK - 1) / PYLO_BLOCK);
    for (int k = 0; k < 4; ++k) {
        const bool is_kept = k == 3 ? rule.layers != PYLO_NESTEROV && t.rms : (k == 0 || rule.layers > 0) && t.momentum[k];
        if (!is_kept) continue;
        if (!stored->scale[k] || !aligned(stored->scale[k], sizeof(float)))
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: scale %d is null or misaligned", record, k);
        if (stored->scale_bytes[k] < scales * (int64_t)sizeof(float))
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: scale %d has %lld bytes, must have %lld", record, k,
                        (long long)stored->scale_bytes[k], (long long)(scales * (int64_t)sizeof(float)));
    }
    return PYLO_OK;
}

// The divisors of Adam's averages.
inline int check_corrections(long long record, const pylo_step &step) {
    if (step.momentum_correction > 0 && step.rms_correction > 0) return PYLO_OK;  // and not NaN
    return fail(PYLO_BAD_ARGUMENT, "tensor %lld: momentum_correction and rms_correction must be positive", record);
}

// The weight of PYLO_NESTEROV.
inline int check_weight(long long record, const pylo_step &step) {
    if (step.momentum_weight > 0 && step.momentum_weight <= 1) return PYLO_OK;  // and not NaN
    return fail(PYLO_BAD_ARGUMENT, "tensor %lld: momentum_weight must be above 0 and at most 1", record);
}

// That no rule of a call has a network.
inline int fail_without_layers() {
    return fail(PYLO_BAD_ARGUMENT, "rules: without layers there is no such stage, only collect, measure and apply");
}

// What else apply needs of a step, by the kind of rule.
inline int check_for_apply(long long record, const pylo_step &step, const pylo_rule &rule) {
    if (rule.layers == PYLO_NESTEROV) return check_weight(record, step);
    return rule.layers ? check_network(record, step, rule) : check_corrections(record, step);
}

}  // namespace pylo
