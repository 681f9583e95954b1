// Runs every stage on buffers of exactly the promised sizes, for many shapes, types, instruction sets and thread counts,
// and feeds the interface nonsense. Meant for a build with AddressSanitizer and UBSan, which turn any access beyond a
// buffer into a failure; by itself it checks that results do not depend on threads and that bad input is refused.
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pylo.h"

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            std::fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, pylo_last_error()); \
            std::exit(1);                                                                 \
        }                                                                                 \
    } while (0)

namespace {

uint32_t random_state = 1;
float uniform() {  // in [-1, 1)
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(random_state >> 8) / 8388608.0f - 1.0f;
}

// A heap block of exactly this many bytes: no slack for an overrun to hide in.
template <class T>
std::unique_ptr<T[]> block(int64_t count) {
    return std::unique_ptr<T[]>(new T[(size_t)count]());
}

// The same, entered into a table.
template <class T>
std::unique_ptr<T[]> block(int64_t count, T *&pointer, int64_t &bytes) {
    auto made = block<T>(count);
    pointer = made.get();
    bytes = count * (int64_t)sizeof(T);
    return made;
}

struct Shape {
    std::vector<int64_t> extent;
    int d0, d1;  // -1 for vectors
    std::vector<int> apart = {};  // axes over which features are not normalised together
};

struct Record {
    std::unique_ptr<float[]> state[8], row, col, row_scale, col_scale;
    std::unique_ptr<double[]> row_sums, col_sums, feature_sums, stat_squares, tensor_sums;
    std::unique_ptr<char[]> param, grad, direction;
    std::unique_ptr<float[]> direction_scale, scale[4];
    std::unique_ptr<char[]> stored[4];
    int64_t numel = 1, itemsize = 4, rows = 0, cols = 0, slices = 1;

    Record(const Shape &shape, int dtype, pylo_tensor &t, pylo_step &step) {
        t = {};
        t.rank = (int32_t)shape.extent.size();
        for (int axis = 0; axis < t.rank; ++axis) numel *= t.extent[axis] = shape.extent[(size_t)axis];
        t.numel = numel;
        t.param_dtype = step.grad_dtype = dtype;
        t.norm_slices = 1;
        for (auto axis = shape.apart.rbegin(); axis != shape.apart.rend(); ++axis) {
            t.norm_stride[*axis] = t.norm_slices;
            t.norm_slices *= t.extent[*axis];
        }
        t.d0_axis = shape.d0;
        t.d1_axis = shape.d1;
        const int64_t size = itemsize = dtype == PYLO_FLOAT32 ? 4 : 2;
        param = block<char>(numel * size);
        grad = block<char>(numel * size);
        for (int64_t i = 0; i < numel; ++i) {
            const float values[2] = {uniform() * 0.1f, uniform()};
            for (int k = 0; k < 2; ++k) {
                uint32_t bits;
                std::memcpy(&bits, &values[k], 4);
                const uint16_t half = (uint16_t)(dtype == PYLO_BFLOAT16 ? bits >> 16 : 0x2C00u + (bits >> 20 & 0xFFu));
                char *to = (k ? grad : param).get() + i * size;
                if (size == 4)
                    std::memcpy(to, &bits, 4);
                else
                    std::memcpy(to, &half, 2);
            }
        }
        t.param = param.get();
        step.grad = grad.get();
        t.param_bytes = step.grad_bytes = numel * size;
        for (int k = 0; k < 3; ++k) state[k] = block(numel, t.momentum[k], t.momentum_bytes[k]);
        state[3] = block(numel, t.rms, t.rms_bytes);
        slices = t.norm_slices;
        feature_sums = block(slices * PYLO_SLOTS, t.feature_sums, t.feature_sums_bytes);
        stat_squares = block(slices * PYLO_SLOTS, t.stat_squares, t.stat_squares_bytes);
        tensor_sums = block(PYLO_TENSOR_SUMS, t.tensor_sums, t.tensor_sums_bytes);
        if (shape.d0 < 0) {
            for (int k = 0; k < 3; ++k) state[4 + k] = block(numel, t.diagonal[k], t.diagonal_bytes[k]);
            return;
        }
        t.d0_extent = t.extent[shape.d0];
        t.d1_extent = t.extent[shape.d1];
        t.row_numel = rows = numel / t.d0_extent;
        t.col_numel = cols = numel / t.d1_extent;
        int64_t row = 1, column = 1;
        for (int axis = t.rank - 1; axis >= 0; --axis) {
            if (axis != shape.d0) t.row_stride[axis] = row, row *= t.extent[axis];
            if (axis != shape.d1) t.col_stride[axis] = column, column *= t.extent[axis];
        }
        t.d1_row_stride = t.row_stride[shape.d1];
        this->row = block(3 * t.row_numel, t.row, t.row_bytes);
        col = block(3 * t.col_numel, t.col, t.col_bytes);
        row_scale = block(3 * t.row_numel, t.row_scale, t.row_scale_bytes);
        col_scale = block(3 * t.col_numel, t.col_scale, t.col_scale_bytes);
        row_sums = block(t.row_numel, t.row_sums, t.row_sums_bytes);
        col_sums = block(t.col_numel, t.col_sums, t.col_sums_bytes);
    }
};

const std::vector<Shape> shapes = {
    {{1}, -1, -1},     {{7}, -1, -1},        {{100}, -1, -1},         {{33}, -1, -1},   {{1, 1}, 0, 1},
    {{1, 9}, 1, 0},    {{9, 1}, 0, 1},       {{32, 10}, 0, 1},        {{8, 8}, 0, 1},   {{7, 65}, 1, 0},
    {{3, 3, 3}, 2, 1}, {{16, 8, 9}, 0, 1},   {{5, 17, 3}, 1, 0},      {{17, 3, 4}, 0, 2}, {{2, 3, 10, 4, 6}, 2, 4},
    {{9, 9, 9}, 2, 1}, {{3, 2, 2, 5, 1, 6}, 5, 3},
};
// Convolutions whose features are normalised for every kernel position: lanes along either channel axis, or along a
// kernel axis, where every lane is in another slice.
const std::vector<Shape> sliced = {
    {{16, 8, 9}, 0, 1, {2}},      {{5, 17, 3}, 1, 0, {2}},      {{70, 3, 20}, 0, 2, {2}}, {{2, 3, 90}, 2, 1, {2}},
    {{3, 3, 8, 9}, 3, 2, {2, 3}}, {{1, 1, 7, 5}, 2, 3, {2, 3}}, {{40, 30}, 0, 1},
};
// More than one part in some stage: rows, lanes, and slices too many for tables at hand.
const std::vector<Shape> large = {{{70000}, -1, -1}, {{4000, 70}, 0, 1}, {{3, 800}, 1, 0}, {{20, 60, 18}, 1, 0}};

pylo_rule adam_rule() {
    pylo_rule rule = {};
    rule.momentum_keep[0] = 0.9f;
    rule.momentum_weight[0] = 0.1f;
    rule.rms_keep = 0.95f;
    rule.rms_weight = 0.05f;
    rule.adam_eps = 1e-8f;
    rule.adam_eps_root = 1e-10f;
    rule.grad_clip = 1000;
    rule.grad_limit = 1e14f;
    rule.measures = 1;
    return rule;
}

pylo_rule momentum_rule() {
    pylo_rule rule = adam_rule();
    rule.layers = PYLO_NESTEROV;
    rule.measures = 0;
    return rule;
}

pylo_rule a_rule(int hidden_layers, int width, uint32_t features) {
    pylo_rule rule = {};
    rule.features = features;
    rule.layers = hidden_layers + 1;
    for (int layer = 0; layer < hidden_layers; ++layer) rule.width[layer] = width;
    rule.width[hidden_layers] = 2 + width % 2;
    const float keep[3] = {0.9f, 0.99f, 0.999f};
    for (int k = 0; k < 3; ++k) {
        rule.momentum_keep[k] = rule.factored_keep[k] = keep[k];
        rule.momentum_weight[k] = rule.factored_weight[k] = 1 - keep[k];
    }
    rule.rms_keep = 0.999f;
    rule.rms_weight = 1 - rule.rms_keep;
    rule.rms_eps = rule.vector_momentum_eps = 1e-6f;
    rule.norm_eps = 1e-5f;
    rule.exp_mult = 1e-3f;
    rule.grad_clip = HUGE_VALF;
    rule.grad_limit = 1e14f;
    rule.measures = width % 2 ? 1 : PYLO_TENSOR_SUMS;
    return rule;
}

struct Table {
    pylo_rule rule;
    std::vector<pylo_tensor> tensors;
    std::vector<pylo_step> steps;
    std::vector<pylo_stored> stored;
    std::vector<Record> records;
    std::vector<double> grad_squares;
    std::unique_ptr<float[]> network;
    void *workspace = nullptr;
    pylo_call call = {};

    Table(const pylo_rule &rule, int dtype, int isa, int threads, const std::vector<Shape> &shapes = ::shapes)
        : rule(rule) {
        const int64_t network_floats = pylo_network_floats(&rule);
        CHECK(network_floats > 0 || rule.layers <= 0);
        random_state = 1;
        tensors.resize(shapes.size());
        steps.resize(shapes.size());
        grad_squares.resize(shapes.size());
        network = block<float>(network_floats);
        for (int64_t i = 0; i < network_floats; ++i) network[(size_t)i] = uniform() * 0.3f;
        for (size_t i = 0; i < shapes.size(); ++i) {
            records.emplace_back(shapes[i], dtype, tensors[i], steps[i]);
            steps[i].network = network.get();
            steps[i].network_bytes = network_floats * (int64_t)sizeof(float);
            steps[i].keep = 0.99f;
            steps[i].scale = steps[i].grad_scale = 1;
            steps[i].step_mult = 0.01f;
            steps[i].momentum_correction = steps[i].rms_correction = 0.5f;
            steps[i].momentum_weight = 0.3f;
            if (rule.layers <= 0) reduce_to_adam(i);
            steps[i].l2 = i % 2 ? 0.01f : 0;
            steps[i].flags = i % 3 ? PYLO_ZERO_NONFINITE : 0;
        }
        call.abi_version = PYLO_ABI_VERSION;
        call.size = sizeof call;
        call.rules = &this->rule;
        call.rule_count = 1;
        call.tensors = tensors.data();
        call.steps = steps.data();
        call.count = (int64_t)tensors.size();
        call.grad_squares = grad_squares.data();
        call.threads = threads;
        call.isa = isa;
    }
    ~Table() { std::free(workspace); }
    Table(const Table &) = delete;

    // Adam has no use for most buffers; it must not ask for them.
    void reduce_to_adam(size_t i) {
        pylo_tensor &t = tensors[i];
        const pylo_tensor old = t;
        t = {};
        t.param = old.param;
        t.param_bytes = old.param_bytes;
        t.param_dtype = old.param_dtype;
        t.momentum[0] = old.momentum[0];
        t.momentum_bytes[0] = old.momentum_bytes[0];
        t.rms = old.rms;
        t.rms_bytes = old.rms_bytes;
        t.tensor_sums = old.tensor_sums;
        t.tensor_sums_bytes = old.tensor_sums_bytes;
        t.extent[0] = t.numel = old.numel;
        t.rank = 1;
        t.d0_axis = t.d1_axis = -1;
        steps[i].network = nullptr;
        steps[i].network_bytes = 0;
    }

    // Has apply leave the steps in directions, which it then subtracts once they have scales.
    void leave_directions(int dtype) {
        for (size_t i = 0; i < records.size(); ++i) {
            pylo_tensor &t = tensors[i];
            Record &r = records[i];
            t.direction_dtype = dtype;
            t.direction_bytes = r.numel * (dtype == PYLO_FLOAT32 ? 4 : 2);
            r.direction = block<char>(t.direction_bytes);
            t.direction = r.direction.get();
            const int64_t slices = rule.layers > 0 ? t.norm_slices : 1;
            r.direction_scale = block<float>(slices);
            t.direction_scale_bytes = slices * (int64_t)sizeof(float);
            for (int64_t slice = 0; slice < slices; ++slice) r.direction_scale[(size_t)slice] = 1 + 0.25f * (float)slice;
        }
    }

    // Has momenta and second moments stored in few bits, but for those of vectors of a network.
    void store_as(int dtype) {
        stored.resize(records.size());
        for (size_t i = 0; i < records.size(); ++i) {
            pylo_tensor &t = tensors[i];
            Record &r = records[i];
            if (rule.layers > 0 && t.d0_axis < 0) continue;
            t.state_dtype = dtype;
            stored[i].row = r.numel / (t.rank > 1 ? t.extent[0] : 1);
            const int64_t scales = r.numel / stored[i].row * ((stored[i].row + PYLO_BLOCK - 1) / PYLO_BLOCK);
            for (int pair = 0; pair < 2; ++pair)
                for (int word = 0; word < 2; ++word) stored[i].noise[pair][word] = 0x9E3779B9u * (uint32_t)(4 * i + 2 * pair + word);
            for (int k = 0; k < 4; ++k) {
                void *state = k < 3 ? t.momentum[k] : t.rms;
                if (!state) continue;
                int64_t &bytes = k < 3 ? t.momentum_bytes[k] : t.rms_bytes;
                bytes = r.numel * (dtype == PYLO_INT8 ? 1 : 2);
                r.stored[k] = block<char>(bytes);
                (k < 3 ? t.momentum[k] : t.rms) = (float *)(void *)r.stored[k].get();
                if (dtype == PYLO_INT8) r.scale[k] = block(scales, stored[i].scale[k], stored[i].scale_bytes[k]);
            }
        }
        call.stored = stored.data();
    }

    // Whether directions are complete: apply subtracts them.
    void complete_directions(bool complete) {
        for (size_t i = 0; i < records.size(); ++i)
            tensors[i].direction_scale = complete ? records[i].direction_scale.get() : nullptr;
        CHECK(check() == PYLO_OK);
    }

    int check() {
        uint64_t token;
        int64_t bytes;
        if (int status = pylo_check(&call, &token, &bytes)) return status;
        std::free(workspace);
        CHECK(posix_memalign(&workspace, 64, (size_t)(bytes ? bytes : 64)) == 0);
        call.workspace = workspace;
        call.workspace_bytes = bytes;
        call.token = token;
        return PYLO_OK;
    }

    std::string bytes() const {
        std::string all;
        for (size_t i = 0; i < records.size(); ++i) {
            const Record &r = records[i];
            for (int k = 0; k < 4; ++k) {
                const int64_t stored_bytes = k < 3 ? tensors[i].momentum_bytes[k] : tensors[i].rms_bytes;
                if (r.stored[k]) all.append(r.stored[k].get(), (size_t)stored_bytes);
                if (r.scale[k]) all.append((const char *)r.scale[k].get(), (size_t)stored[i].scale_bytes[k]);
            }
            all.append(r.param.get(), (size_t)(r.numel * r.itemsize));
            for (const auto &state : r.state)
                if (state) all.append((const char *)state.get(), (size_t)r.numel * 4);
            if (r.row) all.append((const char *)r.row.get(), (size_t)r.rows * 12);
            if (r.col) all.append((const char *)r.col.get(), (size_t)r.cols * 12);
            all.append((const char *)r.feature_sums.get(), (size_t)r.slices * PYLO_SLOTS * 8);
            all.append((const char *)r.tensor_sums.get(), PYLO_TENSOR_SUMS * 8);
        }
        return all;
    }

    void run(int steps_to_take) {
        for (int i = 0; i < steps_to_take; ++i) {
            if (rule.measures) CHECK(pylo_cpu_measure(&call) == PYLO_OK);
            if (rule.layers > 0) {
                CHECK(pylo_cpu_collect(&call) == PYLO_OK);
                CHECK(pylo_cpu_prepare(&call) == PYLO_OK);
                CHECK(pylo_cpu_describe(&call) == PYLO_OK);
            }
            if (call.stored) CHECK(pylo_cpu_advance(&call) == PYLO_OK);
            CHECK(pylo_cpu_apply(&call) == PYLO_OK);
            if (!tensors[0].direction) continue;
            complete_directions(true);
            CHECK(pylo_cpu_apply(&call) == PYLO_OK);
            complete_directions(false);
        }
    }
};

constexpr uint32_t ALL = (1u << 30) - 1, SMALL_FC = ALL & ~(1u << 1) & ~(1u << 14);

// FNV-1a of all results, so that those of another machine can be compared.
uint64_t digest = 0xcbf29ce484222325u;
void add_to_digest(const std::string &bytes) {
    for (unsigned char byte : bytes) digest = (digest ^ byte) * 0x100000001b3u;
}

void results_do_not_depend_on_threads_or_vector_width(
    int dtype, const pylo_rule &rule, const std::vector<Shape> &shapes = ::shapes, int direction = -1,
    int state_dtype = PYLO_FLOAT32) {
    std::string with_fma;
    for (int isa = PYLO_BEST; isa <= PYLO_AVX512; ++isa) {
        if (isa != PYLO_BEST && !pylo_has_isa(isa)) continue;
        // The best one is what PYLO_BEST has run, but for AVX-512, which then mixes with AVX2.
        if (isa == pylo_best_isa() && isa != PYLO_AVX512) continue;
        std::string first;
        for (int threads : {1, 3}) {
            Table table(rule, dtype, isa, threads, shapes);
            if (direction >= 0) table.leave_directions(direction);
            if (state_dtype != PYLO_FLOAT32) table.store_as(state_dtype);
            CHECK(table.check() == PYLO_OK);
            table.run(2);
            const std::string now = table.bytes();
            if (first.empty()) first = now;
            CHECK(now == first);
            for (const Record &r : table.records)
                for (int64_t i = 0; i < r.slices * PYLO_SLOTS; ++i) CHECK(std::isfinite(r.feature_sums[(size_t)i]));
        }
        if (isa == PYLO_BASELINE && pylo_best_isa() != PYLO_BASELINE) continue;  // which has no multiply-adds
        if (with_fma.empty()) with_fma = first;
        CHECK(first == with_fma);
    }
    add_to_digest(with_fma);
}

template <class Damage>
void refused(
    int status, Damage &&damage, const pylo_rule &rule = a_rule(2, 8, SMALL_FC),
    const std::vector<Shape> &shapes = ::shapes) {
    Table table(rule, PYLO_FLOAT32, PYLO_BEST, 1, shapes);
    CHECK(table.check() == PYLO_OK);
    const std::string before = table.bytes();
    damage(table);
    const int got = table.check();
    if (got != PYLO_OK) {
        CHECK(got == status);
    } else {
        CHECK(pylo_cpu_apply(&table.call) == status);
        if (rule.layers && table.steps[0].network) CHECK(pylo_cpu_collect(&table.call) == status);
    }
    CHECK(std::strlen(pylo_last_error()) > 0);
    CHECK(table.bytes() == before);
}

// One byte less than a buffer must have, of every buffer that a table knows.
void buffers_that_are_too_small_are_refused() {
    constexpr int VECTOR = 2, MATRIX = 7;  // among the shapes
    for (int64_t pylo_tensor::*bytes :
         {&pylo_tensor::param_bytes, &pylo_tensor::rms_bytes, &pylo_tensor::row_bytes, &pylo_tensor::col_bytes,
          &pylo_tensor::row_scale_bytes, &pylo_tensor::col_scale_bytes, &pylo_tensor::row_sums_bytes,
          &pylo_tensor::col_sums_bytes, &pylo_tensor::feature_sums_bytes, &pylo_tensor::stat_squares_bytes,
          &pylo_tensor::tensor_sums_bytes})
        refused(PYLO_BAD_ARGUMENT, [&](Table &t) { t.tensors[MATRIX].*bytes -= 1; });
    for (int k = 0; k < 3; ++k) {
        refused(PYLO_BAD_ARGUMENT, [&](Table &t) { t.tensors[MATRIX].momentum_bytes[k] -= 1; });
        refused(PYLO_BAD_ARGUMENT, [&](Table &t) { t.tensors[VECTOR].diagonal_bytes[k] -= 1; });
    }
    for (int64_t pylo_tensor::*bytes : {&pylo_tensor::direction_bytes, &pylo_tensor::direction_scale_bytes})
        refused(PYLO_BAD_ARGUMENT, [&](Table &t) {
            t.leave_directions(PYLO_BFLOAT16);
            t.complete_directions(true);
            t.tensors[MATRIX].*bytes -= 1;
        });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[MATRIX].rms_bytes = -1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[MATRIX].grad_bytes -= 1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[MATRIX].grad_bytes = INT64_MIN; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[2].momentum_bytes[0] -= 1; }, adam_rule());
    Table table(a_rule(2, 8, SMALL_FC), PYLO_FLOAT32, PYLO_BEST, 1);
    CHECK(table.check() == PYLO_OK);
    table.steps[MATRIX].network_bytes -= 1;
    CHECK(pylo_cpu_apply(&table.call) == PYLO_BAD_ARGUMENT);
}

void nonsense_is_refused() {
    CHECK(pylo_cpu_apply(nullptr) == PYLO_BAD_ARGUMENT);
    refused(PYLO_WRONG_ABI, [](Table &t) { t.call.abi_version = 99; });
    refused(PYLO_WRONG_ABI, [](Table &t) { t.call.size = 8; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.call.tensors = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.call.count = -1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.call.count = INT64_MAX; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.call.steps = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.call.threads = 0; });
    refused(PYLO_NO_SUCH_ISA, [](Table &t) { t.call.isa = 77; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[3].grad = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[3].grad = (const char *)t.steps[3].grad + 1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[2].grad_dtype = 9; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].param = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].param = (char *)t.tensors[4].param + 2; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].param_dtype = -1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].row = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[1].diagonal[2] = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].rms = t.tensors[7].momentum[1]; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].rms = t.tensors[8].rms + 3; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].rank = 7; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].extent[0] = -1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].extent[0] = INT64_MAX / 2; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].extent[0] += 1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].extent[0] = t.tensors[7].d0_extent = 0; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].extent[1] = t.tensors[7].d1_extent = 0; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) {  // an empty box whose other axes are beyond counting
        t.tensors[2].rank = 3;
        t.tensors[2].extent[0] = 0;
        t.tensors[2].extent[1] = t.tensors[2].extent[2] = (int64_t)1 << 40;
    });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].d0_axis = 5; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].d1_axis = t.tensors[7].d0_axis; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].row_stride[1] = -1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].row_stride[1] = 1000; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].row_offset = 1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].row_numel += 1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[7].d1_row_stride = 0; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.rule.layers = 9; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.rule.width[0] = 65; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.rule.features |= 1u << 31; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.rule.grad_clip = NAN; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.rule.measures = 4; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.call.rules = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.call.rule_count = 0; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].rule = 1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].rule = -1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[0].network = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].row_sums = (double *)((char *)t.tensors[4].row_sums + 4); });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].row_scale = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].col_scale = t.tensors[4].col; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].feature_sums = nullptr; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].stat_squares = t.tensors[4].feature_sums + 1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].direction = t.tensors[4].param, t.tensors[4].direction_bytes = t.tensors[4].param_bytes; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].direction = t.tensors[5].rms, t.tensors[4].direction_bytes = t.tensors[4].param_bytes; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].norm_slices = 0; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].norm_offset = 1; });
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[1].norm_slices = 7; });
    const pylo_rule celo2 = a_rule(2, 8, ALL);
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[0].norm_slices = 8; }, celo2, sliced);
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[0].norm_stride[2] = -1; }, celo2, sliced);
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[0].norm_stride[1] = 9; }, celo2, sliced);
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[0].norm_slices = INT64_MAX; }, celo2, sliced);
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[2].momentum[0] = nullptr; }, adam_rule());
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[2].rms = t.tensors[2].momentum[0]; }, adam_rule());
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[2].d0_axis = 0; }, adam_rule());
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.rule.measures = PYLO_TENSOR_SUMS; }, adam_rule());
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[2].rms_correction = 0; }, adam_rule());
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[2].momentum_correction = NAN; }, adam_rule());
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[2].momentum_weight = 0; }, momentum_rule());
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[2].momentum_weight = NAN; }, momentum_rule());
    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.steps[2].momentum_weight = 1.5f; }, momentum_rule());

    buffers_that_are_too_small_are_refused();

    refused(PYLO_BAD_ARGUMENT, [](Table &t) { t.tensors[4].direction_dtype = 3; });

    // What only some stages ask for.
    Table directed(a_rule(2, 8, ALL), PYLO_FLOAT32, PYLO_BEST, 1);
    directed.leave_directions(PYLO_FLOAT32);
    directed.complete_directions(true);
    directed.tensors[3].direction = nullptr;
    CHECK(pylo_cpu_apply(&directed.call) == PYLO_UNCHECKED);
    CHECK(directed.check() == PYLO_BAD_ARGUMENT);
    Table adam(adam_rule(), PYLO_FLOAT32, PYLO_BEST, 1);
    CHECK(adam.check() == PYLO_OK);
    for (auto stage : {pylo_cpu_prepare, pylo_cpu_describe})
        CHECK(stage(&adam.call) == PYLO_BAD_ARGUMENT);
    adam.tensors[1].tensor_sums = nullptr;
    CHECK(adam.check() == PYLO_OK && pylo_cpu_measure(&adam.call) == PYLO_BAD_ARGUMENT);
    CHECK(pylo_cpu_collect(&adam.call) == PYLO_OK && pylo_cpu_apply(&adam.call) == PYLO_OK);
    Table unmeasured(adam_rule(), PYLO_FLOAT32, PYLO_BEST, 1);
    unmeasured.rule.measures = 0;
    CHECK(unmeasured.check() == PYLO_OK && pylo_cpu_measure(&unmeasured.call) == PYLO_BAD_ARGUMENT);
    CHECK(pylo_check(&adam.call, nullptr, nullptr) == PYLO_BAD_ARGUMENT);
    CHECK(pylo_check(nullptr, nullptr, nullptr) == PYLO_BAD_ARGUMENT);
    CHECK(pylo_network_floats(nullptr) == 0);
    CHECK(pylo_feature_name(-1) == nullptr && pylo_feature_name(PYLO_SLOTS) == nullptr);

    // Changed after the check.
    const pylo_rule rule = a_rule(2, 8, SMALL_FC);
    Table table(rule, PYLO_FLOAT32, PYLO_BEST, 1);
    CHECK(pylo_cpu_apply(&table.call) == PYLO_UNCHECKED);
    CHECK(table.check() == PYLO_OK);
    table.tensors[5].extent[0] += 1;
    CHECK(pylo_cpu_apply(&table.call) == PYLO_UNCHECKED);
    CHECK(table.check() == PYLO_BAD_ARGUMENT);
    table.tensors[5].extent[0] -= 1;
    CHECK(pylo_cpu_apply(&table.call) == PYLO_OK);
    table.call.workspace_bytes -= 1;
    CHECK(pylo_cpu_collect(&table.call) == PYLO_BAD_ARGUMENT);
    table.call.workspace = (char *)table.workspace + 8;
    CHECK(pylo_cpu_collect(&table.call) == PYLO_BAD_ARGUMENT);
    table.call.workspace = nullptr;
    CHECK(pylo_cpu_collect(&table.call) == PYLO_BAD_ARGUMENT);
    table.call.count = 0;
    CHECK(table.check() == PYLO_OK && pylo_cpu_apply(&table.call) == PYLO_OK);
}

// What is here of a tensor may be a corner of it, or nothing: then its buffers may be null.
void boxes_of_a_tensor_are_stepped(int isa) {
    Table table(a_rule(2, 8, ALL), PYLO_FLOAT32, isa, 2, {{{40, 30}, 0, 1}, {{16, 8, 9}, 0, 1, {2}}, {{9}, -1, -1}});
    pylo_tensor &matrix = table.tensors[0], &kernel = table.tensors[1], &vector = table.tensors[2];
    matrix.extent[0] = 7;
    matrix.extent[1] = 30 - 11;
    matrix.row_offset = 11;      // row (1, 30)
    matrix.col_offset = 40 - 7;  // col (40, 1)
    kernel.extent[2] = 4;
    kernel.row_offset = kernel.col_offset = kernel.norm_offset = 5;
    vector.extent[0] = 0;
    vector.param = nullptr;
    vector.rms = nullptr;
    for (int k = 0; k < 3; ++k) vector.momentum[k] = vector.diagonal[k] = nullptr;
    table.steps[2].grad = nullptr;
    CHECK(table.check() == PYLO_OK);
    table.run(2);
    for (int64_t i = 0; i < 40; ++i) CHECK((table.records[0].col_sums[(size_t)i] > 0) == (i >= 33));
    for (int64_t i = 0; i < 30; ++i) CHECK((table.records[0].row_sums[(size_t)i] > 0) == (i >= 11));
    for (int64_t i = 0; i < 9; ++i) CHECK((table.records[1].feature_sums[(size_t)(i * PYLO_SLOTS)] > 0) == (i >= 5));
    for (int slot = 0; slot < PYLO_SLOTS; ++slot) CHECK(table.records[2].feature_sums[(size_t)slot] == 0);
    kernel.norm_offset = 6;
    CHECK(table.check() == PYLO_BAD_ARGUMENT);
    kernel.norm_offset = 5;
    kernel.row_offset = 6;
    CHECK(table.check() == PYLO_BAD_ARGUMENT);
}

// A step that is left in `direction` is the one that would have been taken.
void directions_are_the_steps(const pylo_rule &rule, int isa, const std::vector<Shape> &shapes) {
    Table taken(rule, PYLO_FLOAT32, isa, 1, shapes), left(rule, PYLO_FLOAT32, isa, 1, shapes);
    left.leave_directions(PYLO_FLOAT32);
    for (size_t i = 0; i < shapes.size(); ++i) {
        taken.steps[i].keep = 0;
        taken.steps[i].scale = -1;
    }
    CHECK(taken.check() == PYLO_OK && left.check() == PYLO_OK);
    taken.run(1);
    left.run(1);
    for (size_t i = 0; i < shapes.size(); ++i) {
        const float *param = (const float *)taken.records[i].param.get();
        const float *direction = (const float *)left.records[i].direction.get();
        for (int64_t k = 0; k < taken.records[i].numel; ++k) CHECK(param[k] == direction[k]);
        CHECK(std::memcmp(taken.records[i].state[0].get(), left.records[i].state[0].get(), (size_t)left.records[i].numel * 4) == 0);
    }
}

// Every tensor of a table steps by its own rule, as it does in a table of that rule alone.
void rules_share_a_table(int isa) {
    const pylo_rule rules[] = {adam_rule(), a_rule(2, 8, ALL), momentum_rule()};
    constexpr size_t parts = sizeof rules / sizeof *rules;
    std::vector<std::unique_ptr<Table>> alone, shared;
    std::vector<pylo_tensor> tensors;
    std::vector<pylo_step> steps;
    for (size_t k = 0; k < parts; ++k) {
        for (auto *tables : {&alone, &shared}) tables->emplace_back(new Table(rules[k], PYLO_FLOAT32, isa, 2));
        for (pylo_tensor &t : shared[k]->tensors) t.rule = (int32_t)k, tensors.push_back(t);
        steps.insert(steps.end(), shared[k]->steps.begin(), shared[k]->steps.end());
        CHECK(alone[k]->check() == PYLO_OK);
        alone[k]->run(2);
    }
    Table joint(rules[0], PYLO_FLOAT32, isa, 2);
    auto squares = block<double>((int64_t)tensors.size());
    joint.call.rules = rules;
    joint.call.rule_count = (int64_t)parts;
    joint.call.tensors = tensors.data();
    joint.call.steps = steps.data();
    joint.call.count = (int64_t)tensors.size();
    joint.call.grad_squares = squares.get();
    CHECK(joint.check() == PYLO_OK);
    for (int step = 0; step < 2; ++step)
        for (auto stage : {pylo_cpu_measure, pylo_cpu_collect, pylo_cpu_prepare, pylo_cpu_describe, pylo_cpu_apply})
            CHECK(stage(&joint.call) == PYLO_OK);
    for (size_t k = 0; k < parts; ++k) CHECK(shared[k]->bytes() == alone[k]->bytes());
}

// A Python object with a tensor, and torch's functions about it, which are given the address of the object's second word.
struct Fake {
    void *type;
    Fake *tensor;
    float *data;
    int64_t shape[2], strides[2], bytes, offset, version;
    int32_t device[2], dtype;
    bool negated, broken;
};
Fake *fake(void *tensor) { return *(Fake **)tensor; }

const pylo_torch fake_torch = {
    offsetof(Fake, tensor),
    [](void *t, void **data) { return *data = fake(t)->data, (int32_t)fake(t)->broken; },
    [](void *t, int32_t *type) { return *type = fake(t)->device[0], 0; },
    [](void *t, int32_t *index) { return *index = fake(t)->device[1], 0; },
    [](void *t, int32_t *dtype) { return *dtype = fake(t)->dtype, 0; },
    [](void *, int64_t *rank) { return *rank = 2, 0; },
    [](void *t, int64_t **sizes) { return *sizes = fake(t)->shape, 0; },
    [](void *t, int64_t **strides) { return *strides = fake(t)->strides, 0; },
    [](void *t, int64_t *bytes) { return *bytes = fake(t)->bytes, 0; },
    [](void *t, int64_t *offset) { return *offset = fake(t)->offset, 0; },
    [](const void *t) { return (uint8_t)fake((void *)t)->negated; },
    [](const void *t) {
        if (fake((void *)t)->broken) throw 1;  // as torch does about tensors of inference mode
        ++fake((void *)t)->version;
    },
    [](void *dict, void *key) { return dict == key ? dict : nullptr; },
};

void memory_is_read_or_refused() {
    float data[16];
    const Fake first = {nullptr, nullptr, data, {3, 4}, {4, 1}, 64, 1, 0, {0, -1}, 6, false, false};
    const int count = 9;
    Fake tensors[count];
    void *objects[count];
    for (int i = 0; i < count; ++i) tensors[i] = first, tensors[i].tensor = &tensors[i], objects[i] = &tensors[i];
    tensors[1].data = data + 2;
    tensors[2].strides[0] = 1;
    tensors[3].dtype = 5;
    tensors[4].shape[1] = 3;
    tensors[5].negated = true;
    tensors[6].data = nullptr;
    tensors[7].device[1] = 0;
    tensors[8].device[0] = 1;
    auto found = block<pylo_memory>(count);
    CHECK(pylo_read_memory(&fake_torch, objects, found.get(), count) == PYLO_OK);
    for (int i = 0; i < count; ++i) {
        CHECK(found[i].address == (uint64_t)(uintptr_t)tensors[i].data && found[i].object == (uint64_t)(uintptr_t)objects[i]);
        CHECK(found[i].storage_bytes == 64 && found[i].storage_offset == 1);
        for (int k = 0; k < i; ++k) CHECK((found[i].format == found[k].format) == (i == 1 && k == 0));
    }
    CHECK(pylo_raise_versions(&fake_torch, objects, count) == PYLO_OK);
    for (const Fake &tensor : tensors) CHECK(tensor.version == 1);

    CHECK(pylo_read_memory(&fake_torch, nullptr, nullptr, 0) == PYLO_OK);
    CHECK(pylo_read_memory(nullptr, objects, found.get(), count) == PYLO_BAD_ARGUMENT);
    CHECK(pylo_read_memory(&fake_torch, nullptr, found.get(), count) == PYLO_BAD_ARGUMENT);
    CHECK(pylo_read_memory(&fake_torch, objects, nullptr, count) == PYLO_BAD_ARGUMENT);
    CHECK(pylo_read_memory(&fake_torch, objects, found.get(), -1) == PYLO_BAD_ARGUMENT);
    tensors[3].broken = true;
    CHECK(pylo_read_memory(&fake_torch, objects, found.get(), count) == PYLO_BAD_ARGUMENT);
    CHECK(pylo_raise_versions(&fake_torch, objects, count) == PYLO_BAD_ARGUMENT);
    objects[0] = nullptr;
    CHECK(pylo_read_memory(&fake_torch, objects, found.get(), count) == PYLO_BAD_ARGUMENT);

    void *owners[] = {&tensors[0], &tensors[1]}, *names[] = {&tensors[0], &tensors[1]};
    CHECK(pylo_has_entries(&fake_torch, owners, names, owners, 2) == 1);
    std::swap(names[0], names[1]);
    CHECK(pylo_has_entries(&fake_torch, owners, names, owners, 2) == 0);
}

}  // namespace

int main() {
    CHECK(pylo_abi_version() == PYLO_ABI_VERSION);
    CHECK(pylo_cpu_multiply_adds(-1) == 0 && pylo_cpu_multiply_adds(2) == 2 * pylo_cpu_multiply_adds(1));
    nonsense_is_refused();
    memory_is_read_or_refused();
    for (int dtype : {PYLO_FLOAT32, PYLO_FLOAT16, PYLO_BFLOAT16})
        results_do_not_depend_on_threads_or_vector_width(dtype, a_rule(2, 8, SMALL_FC));
    results_do_not_depend_on_threads_or_vector_width(PYLO_FLOAT32, a_rule(1, 4, ALL));
    results_do_not_depend_on_threads_or_vector_width(PYLO_FLOAT32, a_rule(3, 5, ALL));
    results_do_not_depend_on_threads_or_vector_width(PYLO_FLOAT32, a_rule(0, 3, ALL));
    for (int dtype : {PYLO_FLOAT32, PYLO_BFLOAT16})
        for (const auto *some : {&shapes, &sliced, &large})
            results_do_not_depend_on_threads_or_vector_width(dtype, a_rule(0, 2, ALL), *some, dtype);
    results_do_not_depend_on_threads_or_vector_width(PYLO_FLOAT32, a_rule(2, 64, SMALL_FC));
    results_do_not_depend_on_threads_or_vector_width(PYLO_FLOAT32, a_rule(1, 1, ALL), large);
    for (int dtype : {PYLO_FLOAT32, PYLO_BFLOAT16}) {
        results_do_not_depend_on_threads_or_vector_width(dtype, a_rule(2, 8, ALL), sliced);
        results_do_not_depend_on_threads_or_vector_width(dtype, adam_rule());
        results_do_not_depend_on_threads_or_vector_width(dtype, momentum_rule());
    }
    for (int state_dtype : {PYLO_BFLOAT16, PYLO_INT8})
        for (const auto *some : {&shapes, &large})
            for (const pylo_rule &rule : {a_rule(1, 4, ALL), adam_rule(), momentum_rule()})
                results_do_not_depend_on_threads_or_vector_width(PYLO_FLOAT32, rule, *some, -1, state_dtype);
    for (int isa = PYLO_BEST; isa <= PYLO_AVX512; ++isa) {
        if (isa != PYLO_BEST && !pylo_has_isa(isa)) continue;
        boxes_of_a_tensor_are_stepped(isa);
        rules_share_a_table(isa);
        directions_are_the_steps(a_rule(2, 8, ALL), isa, shapes);
        directions_are_the_steps(a_rule(2, 8, ALL), isa, sliced);
        directions_are_the_steps(a_rule(0, 2, ALL), isa, sliced);
        directions_are_the_steps(adam_rule(), isa, shapes);
        directions_are_the_steps(momentum_rule(), isa, shapes);
        if (isa != PYLO_BEST) std::printf("%d ", isa);  // what has been run
    }
    std::printf("ok %016llx\n", (unsigned long long)digest);
}
