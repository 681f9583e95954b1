#define PYLO_ISA table  // formulas.h knows what is made of which state
#include "table.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "formulas.h"
#include "hash.h"

// Other languages mirror these; a change needs a new PYLO_ABI_VERSION.
static_assert(sizeof(pylo_tensor) == 608, "");
static_assert(sizeof(pylo_step) == 72, "");
static_assert(sizeof(pylo_rule) == 116, "");
static_assert(sizeof(pylo_call) == 96, "");
static_assert(sizeof(pylo_stored) == 96, "");

namespace pylo {
namespace {

// Bounds that leave room for what is computed of counts: bytes of an element, three channels and PYLO_SLOTS sums.
constexpr int64_t MOST_ELEMENTS = INT64_MAX / 64, MOST_ENTRIES = INT64_MAX / 512;

// The bytes of one buffer. All of them are written by some stage, so no two may share any.
struct Span {
    uintptr_t begin, end;
    int64_t record;
    const char *name;
    bool operator<(const Span &other) const { return begin < other.begin; }
};

// Checks one record and appends its buffers to `spans`.
class RecordCheck {
public:
    // The rule of the tensor must be one of the call's.
    RecordCheck(const pylo_call &call, int64_t record, std::vector<Span> &spans)
        : t_(call.tensors[record]), rule_(call.rules[t_.rule]), layers_(rule_.layers), record_(record), spans_(spans) {}

    int run() {
        if (t_.rank < 1 || t_.rank > PYLO_MAX_RANK)
            return bad("rank", "must be 1 to %d, is %d", PYLO_MAX_RANK, t_.rank);
        if (!known_dtype(t_.param_dtype)) return bad("param_dtype", "%d is unknown", t_.param_dtype);
        int64_t local = 1, counted = 1;  // counted: without empty axes, as others multiply extents in another order
        for (int axis = 0; axis < t_.rank; ++axis) {
            if (t_.extent[axis] < 0) return bad("extent", "of axis %d must not be negative", axis);
            const int64_t extent = std::max<int64_t>(t_.extent[axis], 1);
            if (counted > MOST_ELEMENTS / extent) return bad("extent", "the tensor is too large");
            counted *= extent;
            local *= t_.extent[axis];
        }
        if (t_.numel < 1 || t_.numel < local) return bad("numel", "is smaller than the box of %lld elements", (long long)local);
        if (int status = buffer("param", t_.param, t_.param_bytes, local, itemsize(t_.param_dtype))) return status;
        if (t_.state_dtype != PYLO_FLOAT32 && t_.state_dtype != PYLO_BFLOAT16 && t_.state_dtype != PYLO_INT8)
            return bad("state_dtype", "%d is unknown", t_.state_dtype);
        if (t_.state_dtype != PYLO_FLOAT32 && layers_ > 0 && t_.d0_axis < 0)
            return bad("state_dtype", "must be float32 of an unfactored tensor");
        const int64_t size = itemsize(t_.state_dtype);
        if (layers_ != PYLO_NESTEROV && !may_lack(t_.rms, reads_rms(rule_)))
            if (int status = buffer("rms", t_.rms, t_.rms_bytes, local, size)) return status;
        for (int k = 0; k < (layers_ > 0 ? 3 : 1); ++k)
            if (!may_lack(t_.momentum[k], reads_momentum(rule_, k)))
                if (int status = buffer("momentum", t_.momentum[k], t_.momentum_bytes[k], local, size)) return status;
        if (t_.tensor_sums)
            if (int status = buffer("tensor_sums", t_.tensor_sums, t_.tensor_sums_bytes, PYLO_TENSOR_SUMS)) return status;
        if (!known_dtype(t_.direction_dtype)) return bad("direction_dtype", "%d is unknown", t_.direction_dtype);
        if (t_.direction)
            if (int status = buffer("direction", t_.direction, t_.direction_bytes, local, itemsize(t_.direction_dtype)))
                return status;
        if (layers_ <= 0 && (t_.d0_axis != -1 || t_.d1_axis != -1))
            return bad("d0_axis", "and d1_axis must be -1 for a rule without layers");
        if (layers_ > 0)
            if (int status = slices()) return status;
        const int64_t slices = layers_ > 0 ? t_.norm_slices : 1;
        if (t_.direction_scale && !t_.direction && local) return bad("direction", "is null, but has a direction_scale");
        if (t_.direction_scale)
            if (int status = buffer("direction_scale", t_.direction_scale, t_.direction_scale_bytes, slices)) return status;
        if (layers_ <= 0) return t_.norm_offset == 0 ? PYLO_OK : bad("norm_offset", "must be 0 for a rule without layers");
        const int64_t sums = t_.norm_slices * PYLO_SLOTS;
        if (int status = buffer("feature_sums", t_.feature_sums, t_.feature_sums_bytes, sums)) return status;
        if (int status = buffer("stat_squares", t_.stat_squares, t_.stat_squares_bytes, sums)) return status;
        return t_.d0_axis < 0 ? unfactored(local) : factored();
    }

private:
    // Whether a state is not there that no weight of the network reads.
    bool may_lack(const void *state, bool is_read) const {
        return !state && layers_ > 0 && !is_read && rule_.measures != PYLO_TENSOR_SUMS;
    }

    int unfactored(int64_t local) {
        if (t_.d0_axis != -1 || t_.d1_axis != -1) return bad("d0_axis", "and d1_axis must both be -1 or neither");
        if (t_.norm_slices != 1) return bad("norm_slices", "must be 1 without d0_axis");
        for (int k = 0; k < 3; ++k)
            if (int status = buffer("diagonal", t_.diagonal[k], t_.diagonal_bytes[k], local)) return status;
        return PYLO_OK;
    }

    int factored() {
        if (t_.d0_axis >= t_.rank || t_.d1_axis < 0 || t_.d1_axis >= t_.rank || t_.d0_axis == t_.d1_axis)
            return bad("d0_axis", "and d1_axis must be two of the %d axes", t_.rank);
        if (t_.d0_extent < std::max<int64_t>(t_.extent[t_.d0_axis], 1) ||
            t_.d1_extent < std::max<int64_t>(t_.extent[t_.d1_axis], 1))
            return bad("d0_extent", "and d1_extent must be positive and cover the box");
        if (int status = statistic("row", t_.row_stride, t_.d0_axis, t_.row_offset, t_.row_numel)) return status;
        if (int status = statistic("col", t_.col_stride, t_.d1_axis, t_.col_offset, t_.col_numel)) return status;
        if (t_.d1_row_stride < 1 || t_.d1_extent > t_.row_numel / t_.d1_row_stride ||
            t_.row_numel % (t_.d1_extent * t_.d1_row_stride) != 0)
            return bad("d1_row_stride", "times d1_extent must divide row_numel");
        const int64_t row = t_.row_numel, col = t_.col_numel;
        if (int status = buffer("row", t_.row, t_.row_bytes, 3 * row)) return status;
        if (int status = buffer("col", t_.col, t_.col_bytes, 3 * col)) return status;
        if (int status = buffer("row_scale", t_.row_scale, t_.row_scale_bytes, 3 * row)) return status;
        if (int status = buffer("col_scale", t_.col_scale, t_.col_scale_bytes, 3 * col)) return status;
        if (int status = buffer("row_sums", t_.row_sums, t_.row_sums_bytes, row)) return status;
        return buffer("col_sums", t_.col_sums, t_.col_sums_bytes, col);
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

    // Whether every element's entry is one of `numel`, in numbers that cannot overflow.
    int entries(const char *name, const int64_t *stride, int64_t offset, int64_t numel) {
        if (numel < 1 || numel > MOST_ENTRIES) return bad(name, "must have a positive number of entries");
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

    template <class Number>
    int buffer(const char *name, const Number *pointer, int64_t bytes, int64_t count) {
        return buffer(name, pointer, bytes, count, sizeof(Number));
    }

    // Needs `count` numbers of `size` bytes at `pointer`, where there are `bytes`.
    int buffer(const char *name, const void *pointer, int64_t bytes, int64_t count, int64_t size) {
        if (count == 0) return PYLO_OK;
        if (!pointer) return bad(name, "is null");
        if (!aligned(pointer, size)) return bad(name, "is not aligned to %d bytes", (int)size);
        if (bytes / size < count)
            return bad(name, "has %lld bytes, must have %lld", (long long)bytes, (long long)(count * size));
        const uintptr_t begin = (uintptr_t)pointer;
        if ((uintptr_t)(count * size) > UINTPTR_MAX - begin) return bad(name, "wraps around the address space");
        spans_.push_back({begin, begin + (uintptr_t)(count * size), record_, name});
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
    const pylo_rule &rule_;
    const int layers_;
    const int64_t record_;
    std::vector<Span> &spans_;
};

int check_rule(const pylo_rule &rule) {
    const bool adam = rule.layers == 0, nesterov = rule.layers == PYLO_NESTEROV;
    if (!adam && !nesterov && network_floats(rule) == 0)
        return fail(PYLO_BAD_ARGUMENT,
                    "rule: %d layers; there may be 1 to %d, hidden ones of 1 to %d units and 2 to 4 outputs", rule.layers,
                    PYLO_MAX_LAYERS, PYLO_MAX_WIDTH);
    if (rule.features >> PYLO_SLOTS) return fail(PYLO_BAD_ARGUMENT, "rule: features names slots beyond %d", PYLO_SLOTS);
    if (nesterov && rule.measures != 0) return fail(PYLO_BAD_ARGUMENT, "rule: measures must be 0 for momentum");
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

}  // namespace

int check_header(const pylo_call *call) {
    if (int status = check_version(call)) return status;
    if (call->count < 0) return fail(PYLO_BAD_ARGUMENT, "count is negative");
    if (call->count > INT64_MAX / (int64_t)sizeof(pylo_tensor)) return fail(PYLO_BAD_ARGUMENT, "count is too large");
    if (call->rule_count < 1 || call->rule_count > INT32_MAX)
        return fail(PYLO_BAD_ARGUMENT, "rule_count is %lld, must be positive", (long long)call->rule_count);
    if (!call->rules || (call->count && !call->tensors)) return fail(PYLO_BAD_ARGUMENT, "rules or tensors is null");
    return PYLO_OK;
}

int check_table(const pylo_call &call) {
    for (int64_t rule = 0; rule < call.rule_count; ++rule)
        if (int status = check_rule(call.rules[rule])) return status;
    std::vector<Span> spans;
    spans.reserve((size_t)call.count * 12);  // about what a matrix has
    for (int64_t i = 0; i < call.count; ++i) {
        const int32_t rule = call.tensors[i].rule;
        if (rule < 0 || rule >= call.rule_count)
            return fail(PYLO_BAD_ARGUMENT, "tensor %lld: rule %d is none of the call's", (long long)i, rule);
        if (int status = RecordCheck(call, i, spans).run()) return status;
    }
    return check_overlaps(spans);
}

uint64_t token_of(const pylo_call &call) {
    const uint64_t rules = hash(PYLO_ABI_VERSION, call.rules, (size_t)call.rule_count * sizeof *call.rules);
    return hash(rules, call.tensors, (size_t)call.count * sizeof *call.tensors);
}

}  // namespace pylo
