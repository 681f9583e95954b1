// The C interface for CUDA devices: the plan of a table, and the launches of every stage. What does not depend on the
// device is left to the CPU library: the checks of rule and table.
#include <algorithm>
#include <new>

#include "../core/checks.h"
#include "exact.cuh"
#include "planner.h"
#include "pylo_cuda.h"
#include "sums.cuh"
#include "tensor_cores.cuh"

static_assert(sizeof(pylo_cuda_call) == 80, "");  // other languages mirror it

namespace {

using namespace pylo;

// Calls use(plan) with the plan of a table that is in order.
template <class Use>
int with_plan(const pylo_call *call, Use use) {
    uint64_t token;
    int64_t bytes;
    if (int status = pylo_check(call, &token, &bytes)) return fail(status, "%s", pylo_last_error());
    if (call->rule->layers == 0) return fail(PYLO_BAD_ARGUMENT, "rule: there are no CUDA kernels for Adam");
    for (int64_t i = 0; i < call->count; ++i)
        if (call->tensors[i].norm_slices != 1)
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: the CUDA kernels normalise features over whole tensors", (long long)i);
    try {
        const Plan plan(*call);
        if (plan.matrices.size() + plan.measures.size() > INT32_MAX || plan.merges.size() > INT32_MAX ||
            plan.applies.size() > INT32_MAX || plan.statistics.size() > INT32_MAX || call->count > INT32_MAX)
            return fail(PYLO_BAD_ARGUMENT, "the tensors are too many or too large for one call");
        return use(plan);
    } catch (const std::bad_alloc &) {
        return fail(PYLO_OUT_OF_MEMORY, "out of memory for the plan");
    }
}

// -- stages --------------------------------------------------------------------------------------------------------------

int check_call(const pylo_cuda_call *call, bool reads_networks) {
    if (int status = check_version(call)) return status;
    if (!call->plan || !aligned(call->plan, 16) || ((const Header *)call->plan)->magic != MAGIC)
        return fail(PYLO_BAD_ARGUMENT, "plan is not what pylo_cuda_plan() wrote");
    const Header &plan = *(const Header *)call->plan;
    if (plan.record_count == 0) return PYLO_OK;
    if (!call->device_plan || !aligned(call->device_plan, 16))
        return fail(PYLO_BAD_ARGUMENT, "device_plan is null or not aligned to 16 bytes");
    if (!call->workspace || !aligned(call->workspace, 16))
        return fail(PYLO_BAD_ARGUMENT, "workspace is null or not aligned to 16 bytes");
    if (call->workspace_bytes < plan.workspace_bytes)
        return fail(PYLO_BAD_ARGUMENT, "workspace_bytes is %lld, must be at least %lld", (long long)call->workspace_bytes,
                    (long long)plan.workspace_bytes);
    if (call->precision != PYLO_PRECISE && call->precision != PYLO_EXACT)
        return fail(PYLO_BAD_ARGUMENT, "precision %d is unknown", call->precision);
    if (!call->grad_squares || !aligned(call->grad_squares, sizeof(double)))
        return fail(PYLO_BAD_ARGUMENT, "grad_squares is null or misaligned");
    if (!call->steps || !call->device_steps || !aligned(call->device_steps, 8))
        return fail(PYLO_BAD_ARGUMENT, "steps or device_steps is null or misaligned");
    const Record *records = (const Record *)((const char *)call->plan + plan.records);
    for (int64_t i = 0; i < plan.record_count; ++i) {
        const pylo_step &step = call->steps[i];
        if (int status = check_gradient(i, step, records[i].numel)) return status;
        if (reads_networks)
            if (int status = check_network(i, step, plan.rule)) return status;
        if (plan.rule.measures && !records[i].tensor.tensor_sums)
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: tensor_sums is null", (long long)i);
    }
    return PYLO_OK;
}

bool is_plain(const pylo_cuda_call &call) {
    const Header &plan = *(const Header *)call.plan;
    return plan.plain && std::all_of(call.steps, call.steps + plan.record_count, [](const pylo_step &step) {
               return step.grad_dtype == PYLO_FLOAT32 && step.l2 == 0.0f && !(step.flags & PYLO_ZERO_NONFINITE);
           });
}

// Calls run(header, arguments, table) on the device of the call; table(offset) is a table of the plan there.
template <class Run>
int on_device(const pylo_cuda_call *call, bool reads_networks, Run run) {
    if (int status = check_call(call, reads_networks)) return status;
    const Header &plan = *(const Header *)call->plan;
    if (plan.record_count == 0) return PYLO_OK;
    int before;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != call->device) error = cudaSetDevice(call->device);
    if (error != cudaSuccess)
        return fail(PYLO_DEVICE_ERROR, "device %d cannot be used: %s", call->device, cudaGetErrorString(error));
    const char *const tables = (const char *)call->device_plan;
    char *const workspace = (char *)call->workspace;
    const Arguments arguments = {plan.rule,
                                 (const Record *)(tables + plan.records),
                                 call->device_steps,
                                 (double *)(workspace + plan.partial),
                                 call->grad_squares,
                                 (int32_t *)(workspace + plan.tickets)};
    error = run(plan, arguments, [&](int64_t offset) { return tables + offset; });
    if (before != call->device) cudaSetDevice(before);
    return error == cudaSuccess ? (int)PYLO_OK : fail(PYLO_DEVICE_ERROR, "a launch failed: %s", cudaGetErrorString(error));
}

template <int Width, int Elements, bool Plain>
cudaError_t apply_exactly(const Header &plan, const Arguments &arguments, const FlatPart *parts, cudaStream_t stream) {
    static_assert(sizeof(ExactShared<Width>) <= 48 << 10, "what every device has");
    return launch(exact_kernel<Width, Elements, Plain>, plan.apply_count, EXACT_THREADS, sizeof(ExactShared<Width>), stream,
                  arguments, parts);
}

cudaError_t apply(const pylo_cuda_call &call, bool plain, const Header &plan, const Arguments &arguments, const FlatPart *parts) {
    const cudaStream_t stream = (cudaStream_t)call.stream;
    const int width = *std::max_element(plan.rule.width, plan.rule.width + plan.rule.layers - 1);
    static_assert(sizeof(TensorShared) <= 48 << 10, "what every device has");
    if (call.precision == PYLO_PRECISE && width > 8 && width <= TENSOR_WIDTH)
        return launch(plain ? tensor_core_kernel<true> : tensor_core_kernel<false>, plan.apply_count, TENSOR_THREADS,
                      sizeof(TensorShared), stream, arguments, parts);
    // The widths of published theta have a kernel for plain calls.
    if (width <= 4) return (plain ? apply_exactly<4, 2, true> : apply_exactly<4, 2, false>)(plan, arguments, parts, stream);
    if (width <= 16) return apply_exactly<16, 2, false>(plan, arguments, parts, stream);
    if (width <= 32) return (plain ? apply_exactly<32, 2, true> : apply_exactly<32, 2, false>)(plan, arguments, parts, stream);
    return apply_exactly<64, 1, false>(plan, arguments, parts, stream);
}

}  // namespace

extern "C" {

uint32_t pylo_cuda_abi_version(void) { return PYLO_ABI_VERSION; }

const char *pylo_cuda_last_error(void) { return message; }

int32_t pylo_cuda_check(const pylo_call *call, int64_t *plan_bytes, int64_t *workspace_bytes) {
    if (!plan_bytes || !workspace_bytes) return fail(PYLO_BAD_ARGUMENT, "plan_bytes or workspace_bytes is null");
    return with_plan(call, [&](const Plan &plan) {
        const Header header = write_plan(plan, *call->rule, nullptr);
        *plan_bytes = header.bytes;
        *workspace_bytes = header.workspace_bytes;
        return (int)PYLO_OK;
    });
}

int32_t pylo_cuda_plan(const pylo_call *call, void *to, int64_t plan_bytes) {
    if (!to || !aligned(to, 16)) return fail(PYLO_BAD_ARGUMENT, "plan is null or not aligned to 16 bytes");
    return with_plan(call, [&](const Plan &plan) {
        const int64_t bytes = write_plan(plan, *call->rule, nullptr).bytes;
        if (plan_bytes < bytes)
            return fail(PYLO_BAD_ARGUMENT, "plan_bytes is %lld, must be at least %lld", (long long)plan_bytes, (long long)bytes);
        write_plan(plan, *call->rule, (char *)to);
        return (int)PYLO_OK;
    });
}

int32_t pylo_cuda_collect(const pylo_cuda_call *call) {
    return on_device(call, false, [&](const Header &plan, const Arguments &arguments, auto table) {
        const cudaStream_t stream = (cudaStream_t)call->stream;
        const cudaError_t error = launch(
            collect_kernel, plan.matrix_count + plan.measure_count, SUM_THREADS, sizeof(CollectShared), stream, arguments,
            (const MatrixPart *)table(plan.matrices), plan.matrix_count, (const FlatPart *)table(plan.measures));
        if (error != cudaSuccess) return error;
        return launch(merge_kernel, plan.merge_count, SUM_THREADS, sizeof(MergeShared), stream, arguments,
                      (const Merge *)table(plan.merges));
    });
}

int32_t pylo_cuda_prepare(const pylo_cuda_call *call) {
    return on_device(call, false, [&](const Header &plan, const Arguments &arguments, auto table) {
        return launch(prepare_kernel, plan.statistic_count, SUM_THREADS, sizeof(MergeShared), (cudaStream_t)call->stream,
                      arguments, (const StatisticPart *)table(plan.statistics));
    });
}

int32_t pylo_cuda_describe(const pylo_cuda_call *call) {
    return on_device(call, false, [&](const Header &plan, const Arguments &arguments, auto table) {
        return launch(is_plain(*call) ? describe_kernel<true> : describe_kernel<false>, plan.describe_count, SUM_THREADS,
                      sizeof(DescribeShared), (cudaStream_t)call->stream, arguments, (const FlatPart *)table(plan.describes));
    });
}

int32_t pylo_cuda_apply(const pylo_cuda_call *call) {
    return on_device(call, true, [&](const Header &plan, const Arguments &arguments, auto table) {
        return apply(*call, is_plain(*call), plan, arguments, (const FlatPart *)table(plan.applies));
    });
}

}  // extern "C"
