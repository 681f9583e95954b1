// The host's part of the kernels on CUDA devices: the plan of a table, and what every stage launches. Compiled into the CPU
// library, so that whoever has that needs no compiler for CUDA.
#include <algorithm>
#include <cstring>
#include <new>

#include "../core/checks.h"
#include "planner.h"
#include "pylo_cuda.h"

// Other languages mirror them.
static_assert(sizeof(pylo_cuda_call) == 88, "");
static_assert(sizeof(pylo_cuda_launch) == 272, "");
static_assert(sizeof(pylo_cuda_kernels) == 80, "");

namespace {

using namespace pylo;

static_assert(sizeof(Arguments) <= PYLO_CUDA_ARGUMENTS, "");

struct Kernel {
    const char *name;
    uint32_t threads;
};

namespace kernels {
#define PYLO_KERNEL(name, threads, ...) constexpr Kernel name = {#name, threads};
#include "kernels.inc"
#undef PYLO_KERNEL
}  // namespace kernels

// Calls use(plan) with the plan of a table that is in order.
template <class Use>
int with_plan(const pylo_call *call, Use use) {
    uint64_t token;
    int64_t bytes;
    if (int status = pylo_check(call, &token, &bytes)) return status;
    try {
        const Plan plan(*call);
        if (plan.matrices.size() + plan.measures.size() > INT32_MAX || plan.merges.size() > INT32_MAX ||
            plan.applies.size() > INT32_MAX || plan.advances.size() > INT32_MAX || plan.describes.size() > INT32_MAX || plan.slices.size() > INT32_MAX ||
            plan.statistics.size() > INT32_MAX || call->count > INT32_MAX)
            return fail(PYLO_BAD_ARGUMENT, "the tensors are too many or too large for one call");
        return use(plan);
    } catch (const std::bad_alloc &) {
        return fail(PYLO_OUT_OF_MEMORY, "out of memory for the plan");
    }
}

int check_precision(int32_t precision) {
    if (precision == PYLO_PRECISE || precision == PYLO_EXACT) return PYLO_OK;
    return fail(PYLO_BAD_ARGUMENT, "precision %d is unknown", precision);
}

const Section *sections_of(const Header &plan) { return (const Section *)((const char *)&plan + plan.sections); }

const Record *records_of(const Header &plan) { return (const Record *)((const char *)&plan + plan.records); }

// What a stage needs of a record and its step beyond pylo_check().
int check_step(const pylo_cuda_call &call, const pylo_rule &rule, const Record &record, int64_t i) {
    const pylo_step &step = call.steps[i];
    const pylo_tensor &t = record.tensor;
    if (call.stage == PYLO_CUDA_APPLY && t.direction_scale) return PYLO_OK;
    if (int status = check_gradient(i, step, record.numel)) return status;
    if (int status = check_stored(i, t, &call.stored[i], rule, record.numel)) return status;
    if (rule.measures && !t.tensor_sums) return fail(PYLO_BAD_ARGUMENT, "tensor %lld: tensor_sums is null", (long long)i);
    if (call.stage == PYLO_CUDA_ADVANCE && rule.layers == PYLO_NESTEROV) return check_weight(i, step);
    if (call.stage != PYLO_CUDA_APPLY) return PYLO_OK;
    if (t.direction && t.direction_dtype != PYLO_FLOAT32)
        return fail(PYLO_BAD_ARGUMENT, "tensor %lld: the CUDA kernels leave directions in float32", (long long)i);
    return check_for_apply(i, step, rule);
}

int check_call(const pylo_cuda_call *call) {
    if (int status = check_version(call)) return status;
    if (!call->plan || !aligned(call->plan, 16) || ((const Header *)call->plan)->magic != MAGIC)
        return fail(PYLO_BAD_ARGUMENT, "plan is not what pylo_cuda_plan() wrote");
    const Header &plan = *(const Header *)call->plan;
    if (call->stage < PYLO_CUDA_COLLECT || call->stage > PYLO_CUDA_APPLY)
        return fail(PYLO_BAD_ARGUMENT, "stage %d is unknown", call->stage);
    const Section *const sections = sections_of(plan);
    if ((call->stage == PYLO_CUDA_PREPARE || call->stage == PYLO_CUDA_DESCRIBE) &&
        std::none_of(sections, sections + plan.section_count, [](const Section &section) { return section.rule.layers > 0; }))
        return fail_without_layers();
    if (plan.record_count == 0) return PYLO_OK;
    if (!call->device_plan || !aligned(call->device_plan, 16))
        return fail(PYLO_BAD_ARGUMENT, "device_plan is null or not aligned to 16 bytes");
    if (!call->workspace || !aligned(call->workspace, 16))
        return fail(PYLO_BAD_ARGUMENT, "workspace is null or not aligned to 16 bytes");
    if (call->workspace_bytes < plan.workspace_bytes)
        return fail(PYLO_BAD_ARGUMENT, "workspace_bytes is %lld, must be at least %lld", (long long)call->workspace_bytes,
                    (long long)plan.workspace_bytes);
    if (int status = check_precision(call->precision)) return status;
    if (!call->grad_squares || !aligned(call->grad_squares, sizeof(double)))
        return fail(PYLO_BAD_ARGUMENT, "grad_squares is null or misaligned");
    if (!call->steps || !call->device_steps || !aligned(call->device_steps, 8))
        return fail(PYLO_BAD_ARGUMENT, "steps or device_steps is null or misaligned");
    if (!call->stored || !call->device_stored || !aligned(call->device_stored, 8))
        return fail(PYLO_BAD_ARGUMENT, "stored or device_stored is null or misaligned");
    const Record *records = records_of(plan);
    for (int64_t i = 0; i < plan.record_count; ++i)
        if (int status = check_step(*call, sections[records[i].tensor.rule].rule, records[i], i)) return status;
    return PYLO_OK;
}

// Whether all tensors of a rule are.
bool is_plain(const pylo_cuda_call &call, const Header &plan, int64_t rule) {
    const Record *const records = records_of(plan);
    for (int64_t i = 0; i < plan.record_count; ++i) {
        const pylo_step &step = call.steps[i];
        const bool plain = step.grad_dtype == PYLO_FLOAT32 && step.l2 == 0.0f && !(step.flags & PYLO_ZERO_NONFINITE);
        if (records[i].tensor.rule == rule && !plain) return false;
    }
    return sections_of(plan)[rule].plain;
}

Kernel apply_kernel(const pylo_rule &rule, int32_t precision, bool plain, bool in_place) {
    if (rule.layers == PYLO_NESTEROV) return plain ? kernels::apply_nesterov_plain : kernels::apply_nesterov;
    if (rule.layers == 1) return plain ? kernels::apply_linear_plain : kernels::apply_linear;
    plain = plain && in_place;
    const int width = *std::max_element(rule.width, rule.width + rule.layers - 1);
    if (precision == PYLO_PRECISE && width > 8 && width <= TENSOR_WIDTH)
        return plain ? kernels::apply_tensor_cores_plain : kernels::apply_tensor_cores;
    if (width <= 4) return plain ? kernels::apply_4_plain : kernels::apply_4;
    if (width <= 8) return kernels::apply_8;
    if (width <= 16) return kernels::apply_16;
    if (width <= 32) return plain ? kernels::apply_32_plain : kernels::apply_32;
    return kernels::apply_64;
}

// What launches over all tensors get.
Arguments arguments_of(const pylo_cuda_call &call, const Header &plan) {
    const char *const tables = (const char *)call.device_plan;
    char *const workspace = (char *)call.workspace;
    Arguments arguments = {};
    arguments.matrix_count = (int32_t)plan.matrix_count;
    arguments.sections = (const Section *)(tables + plan.sections);
    arguments.records = (const Record *)(tables + plan.records);
    arguments.slices = (const Slice *)(tables + plan.slices);
    arguments.steps = call.device_steps;
    arguments.stored = call.device_stored;
    arguments.partial = (double *)(workspace + plan.partial);
    arguments.grad_squares = call.grad_squares;
    arguments.tickets = (int32_t *)(workspace + plan.tickets);
    arguments.matrices = (const MatrixPart *)(tables + plan.matrices);
    arguments.measures = (const FlatPart *)(tables + plan.measures);
    arguments.merges = (const Merge *)(tables + plan.merges);
    arguments.statistics = (const StatisticPart *)(tables + plan.statistics);
    arguments.describes = (const FlatPart *)(tables + plan.describes);
    arguments.advances = (const FlatPart *)(tables + plan.advances);
    arguments.applies = (const FlatPart *)(tables + plan.applies);
    return arguments;
}

}  // namespace

extern "C" {

int32_t pylo_cuda_check(const pylo_call *call, int64_t *plan_bytes, int64_t *workspace_bytes) {
    if (!plan_bytes || !workspace_bytes) return fail(PYLO_BAD_ARGUMENT, "plan_bytes or workspace_bytes is null");
    return with_plan(call, [&](const Plan &plan) {
        const Header header = write_plan(plan, nullptr);
        *plan_bytes = header.bytes;
        *workspace_bytes = header.workspace_bytes;
        return (int)PYLO_OK;
    });
}

int32_t pylo_cuda_plan(const pylo_call *call, void *to, int64_t plan_bytes) {
    if (!to || !aligned(to, 16)) return fail(PYLO_BAD_ARGUMENT, "plan is null or not aligned to 16 bytes");
    return with_plan(call, [&](const Plan &plan) {
        const int64_t bytes = write_plan(plan, nullptr).bytes;
        if (plan_bytes < bytes)
            return fail(PYLO_BAD_ARGUMENT, "plan_bytes is %lld, must be at least %lld", (long long)plan_bytes, (long long)bytes);
        write_plan(plan, (char *)to);
        return (int)PYLO_OK;
    });
}

int32_t pylo_cuda_kernels_of(const pylo_call *call, int64_t number, int32_t precision, pylo_cuda_kernels *to) {
    if (int status = check_version(call)) return status;
    if (number < 0 || number >= call->rule_count || !to) return fail(PYLO_BAD_ARGUMENT, "kernels is null, or there is no such rule");
    const pylo_rule *const rule = &call->rules[number];
    if (rule->layers > 0 ? network_floats(*rule) == 0 : rule->layers < PYLO_NESTEROV)
        return fail(PYLO_BAD_ARGUMENT, "rule: its network is not one that the kernels evaluate");
    if (int status = check_precision(precision)) return status;
    to->count = 0;
    const auto add = [&](const Kernel &kernel) {
        if (std::find(to->name, to->name + to->count, kernel.name) == to->name + to->count) to->name[to->count++] = kernel.name;
    };
    for (const Kernel &kernel : {kernels::collect, kernels::merge, kernels::update}) add(kernel);
    if (rule->layers > 0)
        for (const Kernel &kernel : {kernels::prepare, kernels::describe, kernels::describe_plain}) add(kernel);
    const auto moves = [&](const pylo_tensor &t) { return t.rule == number && t.state_dtype != PYLO_FLOAT32; };
    if (std::any_of(call->tensors, call->tensors + call->count, moves)) add(kernels::advance);
    for (const bool plain : {false, true})
        if (rule->layers) add(apply_kernel(*rule, precision, plain, plain));
    return PYLO_OK;
}

int32_t pylo_cuda_launches_of(const pylo_cuda_call *call, pylo_cuda_launch *launches, int64_t room, int64_t *count) {
    if (!launches || !count) return fail(PYLO_BAD_ARGUMENT, "launches or count is null");
    if (int status = check_call(call)) return status;
    const Header &plan = *(const Header *)call->plan;
    if (room <= plan.section_count)
        return fail(PYLO_BAD_ARGUMENT, "room is %lld, must be at least %lld", (long long)room, (long long)plan.section_count + 1);
    *count = 0;
    if (plan.record_count == 0) return PYLO_OK;
    Arguments arguments = arguments_of(*call, plan);
    const auto launch = [&](const Kernel &kernel, int64_t blocks) {
        if (!blocks) return;
        pylo_cuda_launch &next = launches[(*count)++] = {kernel.name, (uint32_t)blocks, kernel.threads, {}};
        std::memcpy(next.arguments, &arguments, sizeof arguments);
    };
    if (call->stage == PYLO_CUDA_COLLECT) {
        launch(kernels::collect, plan.matrix_count + plan.measure_count);
        launch(kernels::merge, plan.merge_count);
        return PYLO_OK;
    }
    if (call->stage == PYLO_CUDA_ADVANCE) {
        launch(kernels::advance, plan.advance_count);
        return PYLO_OK;
    }
    const Arguments all = arguments;
    for (int64_t i = 0; i < plan.section_count; ++i) {
        const Section &section = sections_of(plan)[i];
        if (section.rule.layers == 0) continue;
        const bool plain = is_plain(*call, plan, i);
        arguments.rule = section.rule;
        arguments.statistics = all.statistics + section.statistics.first;
        arguments.describes = all.describes + section.describes.first;
        arguments.applies = all.applies + section.applies.first;
        if (call->stage == PYLO_CUDA_PREPARE)
            launch(kernels::prepare, section.statistics.count);
        else if (call->stage == PYLO_CUDA_DESCRIBE)
            launch(plain ? kernels::describe_plain : kernels::describe, section.describes.count);
        else if (section.applies.count)
            launch(apply_kernel(section.rule, call->precision, plain, section.in_place), section.applies.count);
    }
    if (call->stage != PYLO_CUDA_APPLY) return PYLO_OK;
    arguments = all;
    arguments.applies += plan.updates.first;
    launch(kernels::update, plan.updates.count);
    return PYLO_OK;
}

}  // extern "C"
