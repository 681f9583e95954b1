// The C interface on a CPU: what a call must bring, and its parts on threads.
#include <algorithm>
#include <new>

#include "../core/checks.h"
#include "../core/table.h"
#include "dispatch.h"
#include "parts.h"

namespace {

using namespace pylo;

bool reads_steps(Stage stage) { return stage != MEASURE && stage != PREPARE; }

// What a stage needs of step `i` beyond pylo_check().
int check_step(Stage stage, const pylo_call &call, int64_t i) {
    const long long record = i;
    const pylo_tensor &t = call.tensors[i];
    const pylo_rule &rule = call.rules[t.rule];
    if (!is_in(stage, rule) || (stage == APPLY && t.direction_scale)) return PYLO_OK;
    if (stage == MEASURE && !t.tensor_sums) return fail(PYLO_BAD_ARGUMENT, "tensor %lld: tensor_sums is null", record);
    if (stage != COLLECT && stage != PREPARE)
        if (int status = check_stored(record, t, call.stored ? &call.stored[i] : nullptr, rule, local_numel(t))) return status;
    if (!reads_steps(stage)) return PYLO_OK;
    const pylo_step &step = call.steps[i];
    if (int status = check_gradient(record, step, local_numel(t))) return status;
    return stage == APPLY ? check_for_apply(record, step, rule) : PYLO_OK;
}

// What a stage needs beyond pylo_check().
int check_stage(Stage stage, const pylo_call &call) {
    if (token_of(call) != call.token)
        return fail(PYLO_UNCHECKED, "rules or tensors are not those that pylo_check() passed: check them again");
    if (call.threads < 1) return fail(PYLO_BAD_ARGUMENT, "threads must be positive, is %d", call.threads);
    if (!kernels_of(call.isa == PYLO_BEST ? best_isa() : call.isa))
        return fail(PYLO_NO_SUCH_ISA, "instruction set %d is not available here", call.isa);
    const pylo_rule *const end = call.rules + call.rule_count;
    if (std::none_of(call.rules, end, [&](const pylo_rule &rule) { return is_in(stage, rule); }))
        return stage == MEASURE ? fail(PYLO_BAD_ARGUMENT, "rules: measures is 0, so there is nothing to measure")
                                : fail_without_layers();
    if (call.count == 0) return PYLO_OK;
    if (!call.workspace || !aligned(call.workspace, 64))
        return fail(PYLO_BAD_ARGUMENT, "workspace is null or not aligned to 64 bytes");
    if (reads_steps(stage) && !call.steps) return fail(PYLO_BAD_ARGUMENT, "steps is null");
    if (stage == COLLECT && (!call.grad_squares || !aligned(call.grad_squares, sizeof(double))))
        return fail(PYLO_BAD_ARGUMENT, "grad_squares is null or misaligned");
    for (int64_t i = 0; i < call.count; ++i)
        if (int status = check_step(stage, call, i)) return status;
    return PYLO_OK;
}

int run(Stage stage, void (*Kernels::*kernel)(const Job &), const pylo_call *call_pointer) {
    if (int status = check_header(call_pointer)) return status;
    const pylo_call &call = *call_pointer;
    if (int status = check_stage(stage, call)) return status;
    if (call.count == 0) return PYLO_OK;
    try {
        const Plan plan = make_plan(stage, call);
        if (plan.doubles > call.workspace_bytes / (int64_t)sizeof(double))
            return fail(PYLO_BAD_ARGUMENT, "workspace_bytes is %lld, must be at least %lld",
                        (long long)call.workspace_bytes, (long long)(plan.doubles * (int64_t)sizeof(double)));
        double *scratch = (double *)call.workspace;
        const int64_t parts = (int64_t)plan.parts.size();
        const bool merges = stage == COLLECT || stage == DESCRIBE || stage == MEASURE;
        // From here on nothing allocates and nothing throws: an exception could not leave the threads' region. Each loop
        // ends where all threads have ended it, so sums are cleared before parts add to them, and merged after that.
#pragma omp parallel num_threads(call.threads)
        {
            if (stage == COLLECT) {
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < call.count; ++i) clear_sums(call.tensors[i]);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < parts; ++i) {
                const Part &part = plan.parts[(size_t)i];
                const pylo_tensor &t = call.tensors[part.record];
                const Geometry &g = plan.geometries[(size_t)part.record];
                double *partial = scratch + part.slot;
                std::fill_n(partial, partial_doubles(stage, t, g), 0.0);
                const pylo_step *step = call.steps ? &call.steps[part.record] : nullptr;
                const pylo_stored *stored = call.stored ? &call.stored[part.record] : nullptr;
                (kernels_for(call.isa, g)->*kernel)({&call.rules[t.rule], &t, step, stored, g, part, partial});
            }
            if (merges) {
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < call.count; ++i) merge(stage, call, plan, scratch, i);
            }
        }
    } catch (const std::bad_alloc &) {
        return fail(PYLO_OUT_OF_MEMORY, "out of memory for the list of parts");
    }
    return PYLO_OK;
}

}  // namespace

extern "C" {

uint32_t pylo_abi_version(void) { return PYLO_ABI_VERSION; }

const char *pylo_last_error(void) { return message; }

const char *pylo_feature_name(int32_t slot) {
    static const char *const names[PYLO_SLOTS] = {
        "grad", "clipped_grad", "param", "momentum", "momentum", "momentum", "rms", "momentum_over_rms",
        "momentum_over_rms", "momentum_over_rms", "inverse_rms", "factored_grad", "factored_grad", "factored_grad",
        "grad_over_rms", "row", "row", "row", "col", "col", "col", "inverse_row", "inverse_row", "inverse_row",
        "inverse_col", "inverse_col", "inverse_col", "factored_momentum", "factored_momentum", "factored_momentum"};
    return slot >= 0 && slot < PYLO_SLOTS ? names[slot] : nullptr;
}

int32_t pylo_best_isa(void) { return best_isa(); }

int32_t pylo_has_isa(int32_t isa) { return kernels_of(isa) != nullptr; }

int64_t pylo_network_floats(const pylo_rule *rule) { return rule ? pylo::network_floats(*rule) : 0; }

int32_t pylo_check(const pylo_call *call, uint64_t *token, int64_t *workspace_bytes) {
    if (int status = check_header(call)) return status;
    if (!token || !workspace_bytes) return fail(PYLO_BAD_ARGUMENT, "token or workspace_bytes is null");
    try {
        if (int status = check_table(*call)) return status;
    } catch (const std::bad_alloc &) {
        return fail(PYLO_OUT_OF_MEMORY, "out of memory for the list of buffers");
    }
    *token = token_of(*call);
    *workspace_bytes = workspace_doubles(*call) * (int64_t)sizeof(double);
    return PYLO_OK;
}

int32_t pylo_cpu_collect(const pylo_call *call) { return run(COLLECT, &Kernels::collect, call); }
int32_t pylo_cpu_measure(const pylo_call *call) { return run(MEASURE, &Kernels::measure, call); }
int32_t pylo_cpu_prepare(const pylo_call *call) { return run(PREPARE, &Kernels::prepare, call); }
int32_t pylo_cpu_describe(const pylo_call *call) { return run(DESCRIBE, &Kernels::describe, call); }
int32_t pylo_cpu_advance(const pylo_call *call) { return run(ADVANCE, &Kernels::advance, call); }
int32_t pylo_cpu_apply(const pylo_call *call) { return run(APPLY, &Kernels::apply, call); }
int64_t pylo_cpu_multiply_adds(int64_t rounds) { return kernels_of(best_isa())->multiply_adds(std::max<int64_t>(rounds, 0)); }

}  // extern "C"
