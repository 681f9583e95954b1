// The C interface on a CPU: checks, choice of instruction set, and the cut of a call into parts for threads.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"

// Other languages mirror these; a change needs a new PYLO_ABI_VERSION.
static_assert(sizeof(pylo_tensor) == 576, "");
static_assert(sizeof(pylo_step) == 72, "");
static_assert(sizeof(pylo_rule) == 116, "");
static_assert(sizeof(pylo_call) == 80, "");

namespace {

using pylo::Geometry;
using pylo::Job;
using pylo::Kernels;
using pylo::Part;
using pylo::round_up;

thread_local char message[512] = "";

// Formats the message of pylo_last_error() and returns the status.
__attribute__((format(printf, 2, 3))) int fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    std::vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

// -- instruction sets ---------------------------------------------------------------------------------------------------

const Kernels *kernels_of(int isa) {
    switch (isa) {
        case PYLO_BASELINE:
            return &pylo::kernels_baseline;
#if defined(__x86_64__)
        case PYLO_AVX2:
            return __builtin_cpu_supports("x86-64-v3") ? &pylo::kernels_avx2 : nullptr;
        case PYLO_AVX512:
            return __builtin_cpu_supports("x86-64-v4") ? &pylo::kernels_avx512 : nullptr;
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

// The kernels for one record. Those of AVX-512 and AVX2 give the same bits, so a run of few lanes may take the narrower
// vectors if they leave fewer lanes idle.
const Kernels *kernels_for(int isa, const Geometry &g) {
    if (isa != PYLO_BEST) return kernels_of(isa);
    const bool narrow = best_isa() == PYLO_AVX512 && g.lanes < 64 && round_up(g.lanes, 8) < round_up(g.lanes, 16);
    return kernels_of(narrow ? (int)PYLO_AVX2 : best_isa());
}

// -- checks -------------------------------------------------------------------------------------------------------------

// Four interleaved multiplicative hashes over 64-bit words. It guards against mistakes, not against malice.
uint64_t hash(uint64_t seed, const void *data, size_t bytes) {
    const char *from = (const char *)data;
    uint64_t h[4] = {seed, seed ^ 0x9E3779B97F4A7C15u, seed + 0xBF58476D1CE4E5B9u, ~seed};
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        std::memcpy(&word, from + i, std::min<size_t>(8, bytes - i));
        uint64_t &x = h[i / 8 % 4];
        x = (x ^ word) * 0x9FB21C651E98DF25u;
        x ^= x >> 32;
    }
    uint64_t all = bytes;
    for (uint64_t x : h) all = (all ^ x) * 0xD6E8FEB86659FD93u, all ^= all >> 32;
    return all;
}

uint64_t token_of(const pylo_call &call) {
    const uint64_t rule = hash(PYLO_ABI_VERSION, call.rule, sizeof *call.rule);
    return hash(rule, call.tensors, (size_t)call.count * sizeof *call.tensors);
}

bool aligned(const void *pointer, size_t bytes) { return (uintptr_t)pointer % bytes == 0; }

int itemsize(int dtype) { return dtype == PYLO_FLOAT32 ? 4 : 2; }

bool known_dtype(int dtype) { return dtype == PYLO_FLOAT32 || dtype == PYLO_FLOAT16 || dtype == PYLO_BFLOAT16; }

struct Span {
    uintptr_t begin, end;
    int64_t record;
    const char *name;
    bool written;
    bool operator<(const Span &other) const { return begin < other.begin; }
};

// Checks one record and appends its buffers to `spans`.
class RecordCheck {
public:
    RecordCheck(const pylo_tensor &tensor, bool adam, int64_t record, std::vector<Span> &spans)
        : t_(tensor), adam_(adam), record_(record), spans_(spans) {}

    int run() {
        if (t_.rank < 1 || t_.rank > PYLO_MAX_RANK)
            return bad("rank", "must be 1 to %d, is %d", PYLO_MAX_RANK, t_.rank);
        if (!known_dtype(t_.param_dtype)) return bad("param_dtype", "%d is unknown", t_.param_dtype);
        int64_t local = 1;
        for (int axis = 0; axis < t_.rank; ++axis) {
            if (t_.extent[axis] < 0) return bad("extent", "of axis %d must not be negative", axis);
            if (t_.extent[axis] > 0 && local > INT64_MAX / 64 / t_.extent[axis])
                return bad("extent", "the tensor is too large");
            local *= t_.extent[axis];
        }
        if (t_.numel < 1 || t_.numel < local) return bad("numel", "is smaller than the box of %lld elements", (long long)local);
        if (int status = buffer("param", t_.param, t_.param_bytes, local, (size_t)itemsize(t_.param_dtype))) return status;
        if (int status = buffer("rms", t_.rms, t_.rms_bytes, local, sizeof(float))) return status;
        for (int k = 0; k < (adam_ ? 1 : 3); ++k)
            if (int status = buffer("momentum", t_.momentum[k], t_.momentum_bytes[k], local, sizeof(float))) return status;
        if (t_.tensor_sums)
            if (int status = buffer("tensor_sums", t_.tensor_sums, t_.tensor_sums_bytes, PYLO_TENSOR_SUMS, sizeof(double))) return status;
        if (t_.direction)
            if (int status = buffer("direction", t_.direction, t_.direction_bytes, local, sizeof(float))) return status;
        if (adam_) return t_.d0_axis == -1 && t_.d1_axis == -1 ? PYLO_OK : bad("d0_axis", "and d1_axis must be -1 for Adam");
        if (int status = slices()) return status;
        const int64_t sums = t_.norm_slices * PYLO_SLOTS;
        if (int status = buffer("feature_sums", t_.feature_sums, t_.feature_sums_bytes, sums, sizeof(double))) return status;
        if (int status = buffer("stat_squares", t_.stat_squares, t_.stat_squares_bytes, sums, sizeof(double))) return status;
        return t_.d0_axis < 0 ? unfactored(local) : factored();
    }

private:
    int unfactored(int64_t local) {
        if (t_.d0_axis != -1 || t_.d1_axis != -1) return bad("d0_axis", "and d1_axis must both be -1 or neither");
        if (t_.norm_slices != 1) return bad("norm_slices", "must be 1 without d0_axis");
        for (int k = 0; k < 3; ++k)
            if (int status = buffer("diagonal", t_.diagonal[k], t_.diagonal_bytes[k], local, sizeof(float))) return status;
        return PYLO_OK;
    }

    int factored() {
        if (t_.d0_axis >= t_.rank || t_.d1_axis < 0 || t_.d1_axis >= t_.rank || t_.d0_axis == t_.d1_axis)
            return bad("d0_axis", "and d1_axis must be two of the %d axes", t_.rank);
        if (t_.d0_extent < t_.extent[t_.d0_axis] || t_.d1_extent < t_.extent[t_.d1_axis])
            return bad("d0_extent", "and d1_extent must cover the box");
        if (int status = statistic("row", t_.row_stride, t_.d0_axis, t_.row_offset, t_.row_numel)) return status;
        if (int status = statistic("col", t_.col_stride, t_.d1_axis, t_.col_offset, t_.col_numel)) return status;
        if (t_.d1_row_stride < 1 || t_.d1_extent > t_.row_numel / t_.d1_row_stride ||
            t_.row_numel % (t_.d1_extent * t_.d1_row_stride) != 0)
            return bad("d1_row_stride", "times d1_extent must divide row_numel");
        const int64_t row = t_.row_numel, col = t_.col_numel;
        if (int status = buffer("row", t_.row, t_.row_bytes, 3 * row, sizeof(float))) return status;
        if (int status = buffer("col", t_.col, t_.col_bytes, 3 * col, sizeof(float))) return status;
        if (int status = buffer("row_scale", t_.row_scale, t_.row_scale_bytes, 3 * row, sizeof(float))) return status;
        if (int status = buffer("col_scale", t_.col_scale, t_.col_scale_bytes, 3 * col, sizeof(float))) return status;
        if (int status = buffer("row_sums", t_.row_sums, t_.row_sums_bytes, row, sizeof(double))) return status;
        return buffer("col_sums", t_.col_sums, t_.col_sums_bytes, col, sizeof(double));
    }

    // Whether every element's entry lies inside a statistic that lacks the axis `missing`.
    int statistic(const char *name, const int64_t *stride, int missing, int64_t offset, int64_t numel) {
        if (stride[missing] != 0) return bad(name, "must have stride 0 along axis %d", missing);
        return entries(name, stride, offset, numel);
    }

    int slices() {
        if (int status = entries("norm_slices", t_.norm_stride, t_.norm_offset, t_.norm_slices)) return status;
        return t_.numel % t_.norm_slices == 0 ? PYLO_OK : bad("norm_slices", "must divide numel");
    }

    int entries(const char *name, const int64_t *stride, int64_t offset, int64_t numel) {
        if (numel < 1 || numel > INT64_MAX / 512) return bad(name, "must have a positive number of entries");
        if (offset < 0 || offset >= numel) return bad(name, "the offset lies outside");
        int64_t last = offset;
        for (int axis = 0; axis < t_.rank; ++axis) {
            const int64_t steps = std::max<int64_t>(t_.extent[axis] - 1, 0);
            if (stride[axis] < 0 || (steps > 0 && stride[axis] > (numel - 1 - last) / steps))
                return bad(name, "axis %d leaves its %lld entries", axis, (long long)numel);
            last += steps * stride[axis];
        }
        return PYLO_OK;
    }

    // Needs `count` numbers of `size` bytes at `pointer`, where there are `bytes`.
    int buffer(const char *name, const void *pointer, int64_t bytes, int64_t count, size_t size) {
        if (count == 0) return PYLO_OK;
        if (!pointer) return bad(name, "is null");
        if (!aligned(pointer, size)) return bad(name, "is not aligned to %d bytes", (int)size);
        if (bytes / (int64_t)size < count)
            return bad(name, "has %lld bytes, must have %lld", (long long)bytes, (long long)count * (long long)size);
        const uintptr_t begin = (uintptr_t)pointer;
        if ((uint64_t)count * size > UINTPTR_MAX - begin) return bad(name, "wraps around the address space");
        spans_.push_back({begin, begin + (uintptr_t)count * size, record_, name, true});
        return PYLO_OK;
    }

    __attribute__((format(printf, 3, 4))) int bad(const char *field, const char *format, ...) {
        char text[256];
        va_list args;
        va_start(args, format);
        std::vsnprintf(text, sizeof text, format, args);
        va_end(args);
        return fail(PYLO_BAD_ARGUMENT, "tensor %lld: %s %s", (long long)record_, field, text);
    }

    const pylo_tensor &t_;
    const bool adam_;
    const int64_t record_;
    std::vector<Span> &spans_;
};

int check_header(const pylo_call *call) {
    if (!call) return fail(PYLO_BAD_ARGUMENT, "call is null");
    if (call->abi_version != PYLO_ABI_VERSION || call->size != sizeof *call)
        return fail(PYLO_WRONG_ABI, "the library has interface version %u (struct of %u bytes), the caller %u (%u bytes)",
                    PYLO_ABI_VERSION, (unsigned)sizeof *call, call->abi_version, call->size);
    if (call->count < 0) return fail(PYLO_BAD_ARGUMENT, "count is negative");
    if (call->count > INT64_MAX / (int64_t)sizeof(pylo_tensor)) return fail(PYLO_BAD_ARGUMENT, "count is too large");
    if (!call->rule || (call->count && !call->tensors)) return fail(PYLO_BAD_ARGUMENT, "rule or tensors is null");
    return PYLO_OK;
}

int check_rule(const pylo_rule &rule) {
    const bool adam = rule.layers == 0;
    if (!adam && pylo::network_floats(rule) == 0)
        return fail(PYLO_BAD_ARGUMENT,
                    "rule: %d layers; there may be 2 to %d, hidden ones of 1 to %d units and 2 to 4 outputs", rule.layers,
                    PYLO_MAX_LAYERS, PYLO_MAX_WIDTH);
    if (rule.features >> PYLO_SLOTS) return fail(PYLO_BAD_ARGUMENT, "rule: features names slots beyond %d", PYLO_SLOTS);
    if (rule.measures != 0 && rule.measures != 1 && (rule.measures != PYLO_TENSOR_SUMS || adam))
        return fail(PYLO_BAD_ARGUMENT, "rule: measures must be 0, 1 or, but for Adam, %d", PYLO_TENSOR_SUMS);
    if (!(rule.grad_clip > 0)) return fail(PYLO_BAD_ARGUMENT, "rule: grad_clip must be positive, or infinity for none");
    return PYLO_OK;
}

int check_overlaps(std::vector<Span> &spans) {
    std::sort(spans.begin(), spans.end());
    for (size_t i = 1; i < spans.size(); ++i) {
        const Span &a = spans[i - 1], &b = spans[i];
        if (b.begin < a.end)
            return fail(PYLO_BAD_ARGUMENT, "%s of tensor %lld overlaps %s of tensor %lld", a.name, (long long)a.record,
                        b.name, (long long)b.record);
    }
    return PYLO_OK;
}

// -- parts --------------------------------------------------------------------------------------------------------------

enum Stage { COLLECT, MEASURE, PREPARE, DESCRIBE, APPLY };

// Doubles of scratch that each part of a record needs.
int64_t partial_doubles(Stage stage, const pylo_tensor &t, const Geometry &g) {
    switch (stage) {
        case COLLECT:
            return 1 + (t.d0_axis < 0 ? 0 : g.slices * round_up(g.lanes, 16));
        case MEASURE:
            return PYLO_TENSOR_SUMS;
        case DESCRIBE:
            return t.norm_slices * PYLO_SLOTS;
        default:
            return 0;
    }
}

// Calls cut(outer_begin, outer_end, lane_begin, lane_end) for every part of a record.
template <class Cut>
void cut_record(Stage stage, const pylo_tensor &t, const Geometry &g, Cut &&cut) {
    if (stage == PREPARE) return cut(0, 1, 0, 1);  // the statistics of a whole tensor, whatever the box
    if (pylo::local_numel(t) == 0) return;
    int64_t lanes = g.lanes, outer = g.outer;
    switch (stage) {
        case COLLECT:
            // A part sums whole runs of lanes, and has sums per lane of its own: at most one for 64 elements.
            if (t.d0_axis < 0)
                lanes = std::min<int64_t>(lanes, 1 << 18);
            else
                outer = std::max<int64_t>((1 << 18) / g.lanes, 64 * g.slices);
            break;
        case PREPARE:
            break;
        case MEASURE:
        case DESCRIBE:
            lanes = std::min<int64_t>(lanes, stage == DESCRIBE && g.lane_norm_step ? 1 : 1 << 16);
            outer = (1 << 16) / lanes;
            // Each part has sums of its own for all slices.
            if (stage == DESCRIBE && t.norm_slices > 1) outer = std::max(outer, 512 * t.norm_slices / lanes);
            break;
        case APPLY:
            // Many rows of few lanes, so that what lanes contribute to the network is computed once for many rows.
            lanes = std::min<int64_t>(lanes, t.d0_axis < 0 ? 1 << 15 : g.lane_norm_step ? 1 : 768);
            outer = std::max<int64_t>((1 << 16) / lanes, 1);
            break;
    }
    outer = std::min(std::max<int64_t>(outer, 1), g.outer);
    for (int64_t first = 0; first < g.outer; first += outer)
        for (int64_t lane = 0; lane < g.lanes; lane += lanes)
            cut(first, std::min(first + outer, g.outer), lane, std::min(lane + lanes, g.lanes));
}

struct Plan {
    std::vector<Geometry> geometries;
    std::vector<Part> parts;
    std::vector<int64_t> first_part;  // of every record, and the end
    int64_t doubles = 0;              // of scratch
};

Plan make_plan(Stage stage, const pylo_call &call) {
    Plan plan;
    plan.geometries.reserve((size_t)call.count);
    plan.first_part.reserve((size_t)call.count + 1);
    for (int64_t i = 0; i < call.count; ++i) {
        const pylo_tensor &t = call.tensors[i];
        const Geometry g = pylo::geometry(t);
        const int64_t each = partial_doubles(stage, t, g);
        plan.geometries.push_back(g);
        plan.first_part.push_back((int64_t)plan.parts.size());
        cut_record(stage, t, g, [&](int64_t outer_begin, int64_t outer_end, int64_t lane_begin, int64_t lane_end) {
            plan.parts.push_back({i, outer_begin, outer_end, lane_begin, lane_end, plan.doubles});
            plan.doubles += each;
        });
    }
    plan.first_part.push_back((int64_t)plan.parts.size());
    return plan;
}

int64_t workspace_doubles(const pylo_call &call) {
    int64_t most = 0;
    for (Stage stage : {COLLECT, MEASURE, DESCRIBE}) {
        int64_t total = 0;
        for (int64_t i = 0; i < call.count; ++i) {
            const Geometry g = pylo::geometry(call.tensors[i]);
            const int64_t each = partial_doubles(stage, call.tensors[i], g);
            cut_record(stage, call.tensors[i], g, [&](int64_t, int64_t, int64_t, int64_t) { total += each; });
        }
        most = std::max(most, total);
    }
    return most;
}

// What a stage needs beyond pylo_check().
int check_stage(Stage stage, const pylo_call &call) {
    if (token_of(call) != call.token)
        return fail(PYLO_UNCHECKED, "rule or tensors are not those that pylo_check() passed: check them again");
    if (call.threads < 1) return fail(PYLO_BAD_ARGUMENT, "threads must be positive, is %d", call.threads);
    if (!kernels_of(call.isa == PYLO_BEST ? best_isa() : call.isa))
        return fail(PYLO_NO_SUCH_ISA, "instruction set %d is not available here", call.isa);
    const bool adam = call.rule->layers == 0;
    if (adam && (stage == PREPARE || stage == DESCRIBE))
        return fail(PYLO_BAD_ARGUMENT, "rule: Adam has no such stage, only collect, measure and apply");
    if (call.count == 0) return PYLO_OK;
    if (!call.workspace || !aligned(call.workspace, 64))
        return fail(PYLO_BAD_ARGUMENT, "workspace is null or not aligned to 64 bytes");
    const bool reads_steps = stage == COLLECT || stage == DESCRIBE || stage == APPLY;
    if (reads_steps && !call.steps) return fail(PYLO_BAD_ARGUMENT, "steps is null");
    if (stage == COLLECT && (!call.grad_squares || !aligned(call.grad_squares, sizeof(double))))
        return fail(PYLO_BAD_ARGUMENT, "grad_squares is null or misaligned");
    const int64_t network_bytes = pylo::network_floats(*call.rule) * (int64_t)sizeof(float);
    for (int64_t i = 0; i < call.count; ++i) {
        const long long record = i;
        if (stage == MEASURE && !call.tensors[i].tensor_sums)
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: tensor_sums is null", record);
        if (!reads_steps) continue;
        const pylo_step &step = call.steps[i];
        if (!known_dtype(step.grad_dtype))
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: grad_dtype %d is unknown", record, step.grad_dtype);
        const int64_t numel = pylo::local_numel(call.tensors[i]), grad_bytes = numel * itemsize(step.grad_dtype);
        if ((!step.grad && numel) || !aligned(step.grad, (size_t)itemsize(step.grad_dtype)))
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: grad is null or misaligned", record);
        if (step.grad_bytes < grad_bytes)
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: grad has %lld bytes, must have %lld", record,
                        (long long)step.grad_bytes, (long long)grad_bytes);
        if (stage == APPLY && adam && !(step.momentum_correction > 0 && step.rms_correction > 0))
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: momentum_correction and rms_correction must be positive", record);
        if (stage == APPLY && !adam && (!step.network || !aligned(step.network, sizeof(float))))
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: network is null or misaligned", record);
        if (stage == APPLY && !adam && step.network_bytes < network_bytes)
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: network has %lld bytes, must have %lld", record,
                        (long long)step.network_bytes, (long long)network_bytes);
    }
    return PYLO_OK;
}

// -- merging partial sums -------------------------------------------------------------------------------------------------

void clear_sums(const pylo_tensor &t) {
    if (t.d0_axis < 0) return;
    std::fill_n(t.row_sums, t.row_numel, 0.0);
    std::fill_n(t.col_sums, t.col_numel, 0.0);
}

// Adds the sums per lane of a record's parts, part after part.
void merge_lanes(const pylo_tensor &t, const Geometry &g, const double *partial) {
    double *sums = g.row_varies ? t.row_sums : t.col_sums;
    const int64_t *steps = g.row_varies ? g.row_step : g.col_step;
    const int64_t run = round_up(g.lanes, 16);
    for (int64_t slice = 0; slice < g.slices; ++slice) {
        int64_t entry = g.row_varies ? t.row_offset : t.col_offset, rest = slice;
        for (int axis = 0; axis < g.outer_axes; ++axis)
            if (g.slice_step[axis]) {
                entry += rest / g.slice_step[axis] * steps[axis];
                rest %= g.slice_step[axis];
            }
        for (int64_t lane = 0; lane < g.lanes; ++lane)
            sums[entry + lane * g.lane_stat_step] += partial[slice * run + lane];
    }
}

void merge(Stage stage, const pylo_call &call, const Plan &plan, const double *scratch, int64_t i) {
    const pylo_tensor &t = call.tensors[i];
    const int64_t first = plan.first_part[(size_t)i], end = plan.first_part[(size_t)i + 1];
    double *sums = stage == DESCRIBE ? t.feature_sums : stage == MEASURE ? t.tensor_sums : nullptr;
    const int64_t count = stage == DESCRIBE || stage == MEASURE ? partial_doubles(stage, t, plan.geometries[(size_t)i]) : 0;
    std::fill_n(sums, count, 0.0);
    if (stage == COLLECT) call.grad_squares[i] = 0;
    for (int64_t part = first; part < end; ++part) {
        const double *partial = scratch + plan.parts[(size_t)part].slot;
        for (int64_t k = 0; k < count; ++k) sums[k] += partial[k];
        if (stage != COLLECT) continue;
        call.grad_squares[i] += partial[0];
        if (t.d0_axis >= 0) merge_lanes(t, plan.geometries[(size_t)i], partial + 1);
    }
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
                (kernels_for(call.isa, g)->*kernel)({call.rule, &t, call.steps ? &call.steps[part.record] : nullptr, g, part, partial});
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
    if (int status = check_rule(*call->rule)) return status;
    try {
        std::vector<Span> spans;
        spans.reserve((size_t)call->count * 12);
        for (int64_t i = 0; i < call->count; ++i)
            if (int status = RecordCheck(call->tensors[i], call->rule->layers == 0, i, spans).run()) return status;
        if (int status = check_overlaps(spans)) return status;
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
int32_t pylo_cpu_apply(const pylo_call *call) { return run(APPLY, &Kernels::apply, call); }
int64_t pylo_cpu_multiply_adds(int64_t rounds) { return kernels_of(best_isa())->multiply_adds(std::max<int64_t>(rounds, 0)); }

}  // extern "C"
