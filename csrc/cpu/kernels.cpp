// The stages for one instruction set; compiled once for each (CMakeLists.txt). Nothing from the C++ library: its
// inline functions would be compiled for this instruction set and merged with those of others.
#include "../core/formulas.h"
#include "../core/geometry.h"
#include "storage.h"

namespace pylo {
inline namespace PYLO_ISA {
namespace {

constexpr int WIDE = 512;                    // lanes of a tile where memory is the bottleneck
constexpr int TILE_VECTORS = 3;              // x 4 units: 12 accumulators, the best blocking measured for 16 and 32 registers
constexpr int TILE = TILE_VECTORS * Vec::lanes;
constexpr int TABLES = 16;                   // slices whose lane statistics are kept at hand
constexpr int MAX_CHANNELS = Channels<false>::all;

// -- walking ------------------------------------------------------------------------------------------------------------

// A position on the outer axes and what it means in memory and in the statistics.
struct Position {
    const Geometry *geometry;
    int64_t index[PYLO_MAX_RANK];
    int64_t memory, row, col, slice, norm;

    PYLO_FN Position(const Job &job, int64_t outer) : geometry(&job.geometry) {
        memory = slice = 0;
        row = job.tensor->row_offset;
        col = job.tensor->col_offset;
        norm = job.tensor->norm_offset + job.part.lane_begin * geometry->lane_norm_step;
        for (int axis = geometry->outer_axes - 1; axis >= 0; --axis) {
            index[axis] = outer % geometry->extent[axis];
            outer /= geometry->extent[axis];
            move(axis, index[axis]);
        }
    }

    PYLO_FN void move(int axis, int64_t by) {
        memory += by * geometry->step[axis];
        row += by * geometry->row_step[axis];
        col += by * geometry->col_step[axis];
        slice += by * geometry->slice_step[axis];
        norm += by * geometry->norm_step[axis];
    }

    PYLO_FN void advance() {
        for (int axis = geometry->outer_axes - 1; axis >= 0; --axis) {
            move(axis, 1);
            if (++index[axis] < geometry->extent[axis]) return;
            move(axis, -index[axis]);
            index[axis] = 0;
        }
    }

    // Entry of the statistic that is constant along lanes, and first entry of the one that varies.
    PYLO_FN int64_t fixed() const { return geometry->row_varies ? col : row; }
    PYLO_FN int64_t lane() const { return geometry->row_varies ? row : col; }
};

PYLO_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int AHEAD = 256;
constexpr int TILES_AHEAD = 2;

PYLO_FN void fetch(const float *stream) { __builtin_prefetch(stream); }

// -- streams ------------------------------------------------------------------------------------------------------------

PYLO_FN Vec read_gradient(const Job &job, Vec grad, Vec param) {
    const pylo_step &step = *job.step;
    if (step.flags & PYLO_ZERO_NONFINITE) grad = zero_beyond(grad, Vec(job.rule->grad_limit));
    grad = grad * Vec(step.grad_scale);
    if (step.l2 != 0.0f) grad = madd(param, Vec(step.l2), grad);
    return clip_gradient(*job.rule, grad);
}

// Some lanes of all streams of a record.
template <bool Factored, int Capacity>
struct Window {
    const float *grad;
    float *param, *momentum[3], *rms, *diagonal[3];
    int count, padded;
    int64_t index, step;

    PYLO_FN void load(const Job &job, int64_t at, int lanes) {
        const pylo_tensor &t = *job.tensor;
        const int end = (int)round_up(lanes, Vec::lanes);
        count = lanes, padded = end, index = at, step = job.geometry.lane_step;
        grad = load_lanes(const_cast<void *>(job.step->grad), job.step->grad_dtype, at, step, lanes, end, 0, buffer[0]);
        param = load_lanes(t.param, t.param_dtype, at, step, lanes, end, 0, buffer[1]);
        rms = load_lanes(t.rms, PYLO_FLOAT32, at, step, lanes, end, 0, buffer[2]);
        for (int k = 0; k < 3; ++k) {
            momentum[k] = load_lanes(t.momentum[k], PYLO_FLOAT32, at, step, lanes, end, 0, buffer[3 + k]);
            if constexpr (!Factored)
                diagonal[k] = load_lanes(t.diagonal[k], PYLO_FLOAT32, at, step, lanes, end, 1, buffer[6 + k]);
        }
    }

    PYLO_FN void prefetch(int lane) const {
        fetch(grad + lane);
        fetch(param + lane);
        fetch(rms + lane);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            fetch(momentum[k] + lane);
            if constexpr (!Factored) fetch(diagonal[k] + lane);
        }
    }

    // The element at a lane, accumulators updated.
    PYLO_FN Element<Vec> element(const Job &job, int lane) const {
        Element<Vec> x;
        x.param = Vec::load(param + lane);
        x.grad = read_gradient(job, Vec::load(grad + lane), x.param);
        x.rms = Vec::load(rms + lane);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            x.momentum[k] = Vec::load(momentum[k] + lane);
            if constexpr (!Factored) x.diagonal[k] = Vec::load(diagonal[k] + lane);
        }
        accumulate<Factored>(*job.rule, x);
        return x;
    }

    PYLO_FN void keep_state(const Element<Vec> &x, int lane) {
        x.rms.store(rms + lane);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
            x.momentum[k].store(momentum[k] + lane);
            if constexpr (!Factored) x.diagonal[k].store(diagonal[k] + lane);
        }
    }

    PYLO_FN void store_state(const Job &job) const {
        const pylo_tensor &t = *job.tensor;
        store_lanes(t.rms, PYLO_FLOAT32, index, step, count, rms);
        for (int k = 0; k < 3; ++k) {
            store_lanes(t.momentum[k], PYLO_FLOAT32, index, step, count, momentum[k]);
            if constexpr (!Factored) store_lanes(t.diagonal[k], PYLO_FLOAT32, index, step, count, diagonal[k]);
        }
    }

    PYLO_FN void store_param(const Job &job) const {
        store_lanes(job.tensor->param, job.tensor->param_dtype, index, step, count, param);
    }

private:
    alignas(64) float buffer[Factored ? 6 : 9][Capacity];
};

// -- sums ---------------------------------------------------------------------------------------------------------------

// Sums of N channels. Element i always goes to lane i % 16, in single precision for at most `LIMIT` rounds, so the
// result is the same for every vector width and as good as double precision.
template <int N>
struct Sums {
    static constexpr int LIMIT = 64;
    alignas(64) float lane[N][16] = {};
    double total[N] = {};
    int rounds = 0;

    PYLO_FN void add_square(int channel, int lane_index, Vec x) {
        float *at = lane[channel] + (lane_index & 15);
        madd(x, x, Vec::load(at)).store(at);
    }

    // All channels of the lanes that a vector from `lane_index` on goes to, to be added to in registers.
    struct Running {
        Vec of[N];
    };
    PYLO_FN Running running(int lane_index) const {
        Running sums;
#pragma GCC unroll 32
        for (int channel = 0; channel < N; ++channel) sums.of[channel] = Vec::load(lane[channel] + (lane_index & 15));
        return sums;
    }
    PYLO_FN void keep(const Running &sums, int lane_index) {
#pragma GCC unroll 32
        for (int channel = 0; channel < N; ++channel) sums.of[channel].store(lane[channel] + (lane_index & 15));
    }

    // To be called after every run of lanes; `count` is its length.
    PYLO_FN void count(int64_t lanes) {
        rounds += (int)((lanes + 15) / 16);
        if (rounds >= LIMIT) flush();
    }

    void flush() {
        for (int channel = 0; channel < N; ++channel) {
            total[channel] += reduce(lane[channel]);
            for (int i = 0; i < 16; ++i) lane[channel][i] = 0;
        }
        rounds = 0;
    }

    static PYLO_FN double reduce(const float *x) {
        double sum[8];
        for (int i = 0; i < 8; ++i) sum[i] = (double)x[i] + (double)x[i + 8];
        for (int half = 4; half; half /= 2)
            for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
        return sum[0];
    }
};

PYLO_FN Vec first_lanes(int count, Vec x) {  // the others are 0
    alignas(64) float values[Vec::lanes];
    x.store(values);
    for (int i = count; i < Vec::lanes; ++i) values[i] = 0;
    return Vec::load(values);
}

// -- collect ------------------------------------------------------------------------------------------------------------

// partial[0] is the sum of squares of stored gradients; from partial[1] on, (slices, lanes), are those of the gradients
// that the rule reads, summed over the fixed axis. Their sums over lanes belong to this part alone and go to their place.
template <bool Factored>
void collect_part(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const Geometry &g = job.geometry;
    const Part &part = job.part;
    double *fixed_sums = g.row_varies ? t.col_sums : t.row_sums;
    Sums<2> sums;
    alignas(64) float grads[WIDE], params[WIDE];
    Position at(job, part.outer_begin);
    for (int64_t outer = part.outer_begin; outer < part.outer_end; ++outer, at.advance()) {
        for (int64_t first = part.lane_begin; first < part.lane_end; first += WIDE) {
            const int count = (int)smaller(WIDE, part.lane_end - first), padded = (int)round_up(count, Vec::lanes);
            const int64_t index = at.memory + first * g.lane_step;
            const float *grad = load_lanes(
                const_cast<void *>(job.step->grad), job.step->grad_dtype, index, g.lane_step, count, padded, 0, grads);
            const float *param = grad;
            if (job.step->l2 != 0.0f)
                param = load_lanes(t.param, t.param_dtype, index, g.lane_step, count, padded, 0, params);
            double *lane_sums = job.partial + 1 + at.slice * round_up(g.lanes, 16) + first;
#pragma GCC unroll 4
            for (int half = 0; half < 16; half += Vec::lanes) {
                auto running = sums.running(half);
                for (int lane = half; lane < padded; lane += 16) {
                    const Vec raw = Vec::load(grad + lane);
                    fetch(grad + lane + AHEAD);
                    running.of[0] = madd(raw, raw, running.of[0]);
                    if constexpr (Factored) {
                        const Vec x = read_gradient(job, raw, Vec::load(param + lane));
                        running.of[1] = madd(x, x, running.of[1]);
                        add_to(lane_sums + lane, x * x);
                    }
                }
                sums.keep(running, half);
            }
            if constexpr (Factored) {
                sums.flush();
                fixed_sums[at.fixed()] += sums.total[1];
                sums.total[1] = 0;
            } else {
                sums.count(count);
            }
        }
    }
    sums.flush();
    job.partial[0] = sums.total[0];
}

void collect(const Job &job) {
    if (job.tensor->d0_axis < 0)
        collect_part<false>(job);
    else
        collect_part<true>(job);
}

// -- measure ------------------------------------------------------------------------------------------------------------

// Sums over the state before the step: p^2, m (3), r, m^2 (3), r^2. In double precision throughout: a variance is the
// difference of two of them, which must vanish where all elements are equal.
//
// Value i of a run goes to element i % 16 of sums, and its square to that of squares.
template <bool Plain>
PYLO_FN void add_to_sums(const float *values, int padded, double *sums, double *squares) {
#pragma GCC unroll 4
    for (int half = 0; half < 16; half += Vec::lanes) {
        Doubles sum = {}, square = Doubles::load(squares + half);
        if constexpr (Plain) sum = Doubles::load(sums + half);
        for (int i = half; i < padded; i += 16) {
            const Doubles x = Doubles::of(values + i);
            fetch(values + i + AHEAD);
            if constexpr (Plain) sum.add(x);
            square.add_product(x, x);
        }
        square.store(squares + half);
        if constexpr (Plain) sum.store(sums + half);
    }
}

template <bool All>
void measure_part(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const Geometry &g = job.geometry;
    const Part &part = job.part;
    constexpr int count_of_sums = All ? PYLO_TENSOR_SUMS : 1;
    alignas(64) double sums[count_of_sums][16] = {};
    alignas(64) float buffer[WIDE];
    Position at(job, part.outer_begin);
    for (int64_t outer = part.outer_begin; outer < part.outer_end; ++outer, at.advance()) {
        for (int64_t first = part.lane_begin; first < part.lane_end; first += WIDE) {
            const int count = (int)smaller(WIDE, part.lane_end - first), padded = (int)round_up(count, Vec::lanes);
            const int64_t index = at.memory + first * g.lane_step;
            const auto load = [&](void *base, int dtype) {
                return load_lanes(base, dtype, index, g.lane_step, count, padded, 0, buffer);
            };
            add_to_sums<false>(load(t.param, t.param_dtype), padded, nullptr, sums[0]);
            if constexpr (All) {
                for (int k = 0; k < 3; ++k)
                    add_to_sums<true>(load(t.momentum[k], PYLO_FLOAT32), padded, sums[1 + k], sums[5 + k]);
                add_to_sums<true>(load(t.rms, PYLO_FLOAT32), padded, sums[4], sums[8]);
            }
        }
    }
    for (int i = 0; i < count_of_sums; ++i)
        for (double x : sums[i]) job.partial[i] += x;
}

void measure(const Job &job) {
    if (job.rule->measures == 1)
        measure_part<false>(job);
    else
        measure_part<true>(job);
}

// -- prepare ------------------------------------------------------------------------------------------------------------

// Mean of the squares of f(values), in eight interleaved sums so that additions overlap.
template <class F>
double mean_of_squares(const float *values, int64_t count, F f) {
    double sum[8] = {};
    for (int64_t first = 0; first < count; first += 8)
        for (int64_t i = first; i < smaller(first + 8, count); ++i) {
            const float x = f(values[i]);
            sum[i - first] += (double)x * (double)x;
        }
    double total = 0;
    for (double part : sum) total += part;
    return total / (double)count;
}

void update_statistic(const Job &job, float *statistic, const double *sums, int64_t numel, int64_t extent) {
    const pylo_rule &rule = *job.rule;
    for (int k = 0; k < 3; ++k) {
        float *channel = statistic + k * numel;
        const float keep = rule.factored_keep[k], weight = rule.factored_weight[k];
        for (int64_t i = 0; i < numel; ++i)
            channel[i] = ema(keep, weight, channel[i], (float)mean_square(sums[i], (double)extent));
    }
}

void prepare(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    if (t.d0_axis < 0) return;
    update_statistic(job, t.row, t.row_sums, t.row_numel, t.d0_extent);
    update_statistic(job, t.col, t.col_sums, t.col_numel, t.d1_extent);
    const auto identity = [](float x) { return x; };
    const auto inverse = [](float x) { return inverse_statistic(x); };
    const int64_t along = t.d1_extent, step = t.d1_row_stride, before = t.row_numel / (along * step);
    for (int k = 0; k < 3; ++k) {
        const float *row = t.row + k * t.row_numel, *col = t.col + k * t.col_numel;
        float *scale = t.row_scale + k * t.row_numel;
        for (int64_t outer = 0; outer < before; ++outer)
            for (int64_t inner = 0; inner < step; ++inner) {
                const int64_t start = outer * along * step + inner;
                double sum = 0;
                for (int64_t i = 0; i < along; ++i) sum += (double)row[start + i * step];
                const float mean = (float)(sum / (double)along);
                for (int64_t i = 0; i < along; ++i) scale[start + i * step] = row_scale(row[start + i * step], mean);
            }
        for (int64_t i = 0; i < t.col_numel; ++i) t.col_scale[k * t.col_numel + i] = col_scale(col[i]);
        if (t.norm_slices > 1) continue;
        t.stat_squares[ROW + k] = mean_of_squares(row, t.row_numel, identity);
        t.stat_squares[COL + k] = mean_of_squares(col, t.col_numel, identity);
        t.stat_squares[INVERSE_ROW + k] = mean_of_squares(row, t.row_numel, inverse);
        t.stat_squares[INVERSE_COL + k] = mean_of_squares(col, t.col_numel, inverse);
    }
}

// -- scales and statistics of lanes --------------------------------------------------------------------------------------

// A channel of the statistic that varies along lanes, from `entry` on.
PYLO_FN float *lane_statistic(const Job &job, float *row, float *col, int k, int64_t entry) {
    const pylo_tensor &t = *job.tensor;
    return job.geometry.row_varies ? row + k * t.row_numel + entry : col + k * t.col_numel + entry;
}

PYLO_FN float fixed_statistic(const Job &job, const float *row, const float *col, int k, int64_t entry) {
    const pylo_tensor &t = *job.tensor;
    return job.geometry.row_varies ? col[k * t.col_numel + entry] : row[k * t.row_numel + entry];
}

PYLO_FN bool has_extra(const pylo_rule &rule) { return rule.features >> CLIPPED_GRAD & 1 || rule.features >> GRAD_OVER_RMS & 1; }

// -- describe -----------------------------------------------------------------------------------------------------------

// `Extra`: with the channels that only some rules read.
template <bool Factored, bool Extra>
void describe_part(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const Geometry &g = job.geometry;
    const Part &part = job.part;
    constexpr int channels = Extra ? Channels<Factored>::all : Channels<Factored>::common;
    const bool sliced = t.norm_slices > 1;
    Sums<channels> sums;
    Window<Factored, WIDE> window;
    alignas(64) float gathered[3][WIDE];
    const auto add_to_slice = [&](int64_t norm) {
        sums.flush();
        for (int channel = 0; channel < channels; ++channel) {
            job.partial[norm * SLOTS + Channels<Factored>::slot(channel)] += sums.total[channel];
            sums.total[channel] = 0;
        }
    };
    Position at(job, part.outer_begin);
    for (int64_t outer = part.outer_begin; outer < part.outer_end; ++outer, at.advance()) {
        for (int64_t first = part.lane_begin; first < part.lane_end; first += WIDE) {
            const int count = (int)smaller(WIDE, part.lane_end - first);
            window.load(job, at.memory + first * g.lane_step, count);
            const float *lane_scale[3] = {};
            Vec fixed_scale[3];
            if constexpr (Factored)
                for (int k = 0; k < 3; ++k) {
                    float *scale = lane_statistic(job, t.row_scale, t.col_scale, k, at.lane());
                    lane_scale[k] = load_lanes(
                        scale, PYLO_FLOAT32, first * g.lane_stat_step, g.lane_stat_step, count, window.padded, 0,
                        gathered[k]);
                    fixed_scale[k] = Vec(fixed_statistic(job, t.row_scale, t.col_scale, k, at.fixed()));
                }
            const auto describe = [&](int lane, auto &&put) __attribute__((always_inline)) {
                const Element<Vec> x = window.element(job, lane);
                Vec scale[3];
                if constexpr (Factored)
#pragma GCC unroll 3
                    for (int k = 0; k < 3; ++k) scale[k] = fixed_scale[k] * Vec::load(lane_scale[k] + lane);
                features<Factored>(*job.rule, Extra, x, scale, put);
            };
            const int whole = count / Vec::lanes * Vec::lanes;
#pragma GCC unroll 4
            for (int half = 0; half < 16; half += Vec::lanes) {
                auto running = sums.running(half);
                for (int lane = half; lane < whole; lane += 16) {
                    window.prefetch(lane + AHEAD);
                    describe(lane, [&](int channel, Vec f) __attribute__((always_inline)) {
                        running.of[channel] = madd(f, f, running.of[channel]);
                    });
                }
                sums.keep(running, half);
            }
            if (whole < count)
                describe(whole, [&](int channel, Vec f) __attribute__((always_inline)) {
                    sums.add_square(channel, whole, first_lanes(count - whole, f));
                });
            if (sliced)
                add_to_slice(at.norm);
            else
                sums.count(count);
        }
    }
    if (!sliced) add_to_slice(0);
}

void describe(const Job &job) {
    const bool factored = job.tensor->d0_axis >= 0, extra = has_extra(*job.rule);
    if (factored)
        extra ? describe_part<true, true>(job) : describe_part<true, false>(job);
    else
        extra ? describe_part<false, true>(job) : describe_part<false, false>(job);
}

// -- the network --------------------------------------------------------------------------------------------------------

// Slot of one of the six channels of row or col: three of the statistic, three of its inverse root.
PYLO_FN int statistic_slot(bool of_row, int k) { return (k < 3 ? ROW : INVERSE_ROW - 3) + k + (of_row ? 0 : 3); }

// What normalises a feature in slice `norm`.
PYLO_FN float normaliser(const Job &job, double mean_of_squares) {
    return (float)inverse_root(mean_of_squares + (double)job.rule->norm_eps);
}

PYLO_FN float element_scale(const Job &job, int slot, int64_t norm) {
    const pylo_tensor &t = *job.tensor;
    return normaliser(job, t.feature_sums[norm * SLOTS + slot] / (double)(t.numel / t.norm_slices));
}

PYLO_FN float statistic_scale(const Job &job, int slot, int64_t norm) {
    return normaliser(job, job.tensor->stat_squares[norm * SLOTS + slot]);
}

// The network as one tensor needs it: the normalisers are folded into the first layer, whose inputs are split into
// channels of elements, of the statistic along lanes and of the fixed one. If there are several slices, each with
// normalisers of its own, then features are multiplied by them instead.
struct Network {
    int layers, channels;
    int width[PYLO_MAX_LAYERS], padded[PYLO_MAX_LAYERS];
    alignas(64) float element[MAX_CHANNELS][PYLO_MAX_WIDTH];
    alignas(64) float lane[6][PYLO_MAX_WIDTH], fixed[6][PYLO_MAX_WIDTH];
    alignas(64) float bias[PYLO_MAX_WIDTH];
    const float *weights[PYLO_MAX_LAYERS], *biases[PYLO_MAX_LAYERS];  // of the later layers, as they are

    template <bool Factored>
    void fold(const Job &job) {
        const pylo_rule &rule = *job.rule;
        const pylo_tensor &t = *job.tensor;
        layers = rule.layers;
        channels = has_extra(rule) ? Channels<Factored>::all : Channels<Factored>::common;
        const float *next = job.step->network;
        int inputs = SLOTS;
        for (int layer = 0; layer < layers; ++layer) {
            width[layer] = rule.width[layer];
            padded[layer] = (int)round_up(width[layer], 4);
            weights[layer] = next;
            biases[layer] = next + inputs * padded[layer];
            next += (inputs + 1) * padded[layer];
            inputs = width[layer];
        }
        for (int n = 0; n < PYLO_MAX_WIDTH; ++n) bias[n] = n < padded[0] ? biases[0][n] : 0;
        for (int channel = 0; channel < channels; ++channel) {
            const int slot = Channels<Factored>::slot(channel);
            const float scale = t.norm_slices > 1 ? 1.0f : element_scale(job, slot, 0);
            fold_slot(rule, slot, scale, element[channel]);
            const int twin = slot == ROW || slot == ROW + 1 || slot == ROW + 2                         ? slot + 3
                             : slot == INVERSE_ROW || slot == INVERSE_ROW + 1 || slot == INVERSE_ROW + 2 ? slot + 3
                                                                                                         : -1;
            if (!Factored && twin >= 0) {
                float other[PYLO_MAX_WIDTH];
                fold_slot(rule, twin, scale, other);
                for (int n = 0; n < PYLO_MAX_WIDTH; ++n) element[channel][n] += other[n];
            }
        }
        if constexpr (Factored)
            for (int k = 0; k < 6; ++k) {
                const int row = statistic_slot(true, k), col = statistic_slot(false, k);
                const float row_scale = t.norm_slices > 1 ? 1.0f : statistic_scale(job, row, 0);
                const float col_scale = t.norm_slices > 1 ? 1.0f : statistic_scale(job, col, 0);
                fold_slot(rule, row, row_scale, job.geometry.row_varies ? lane[k] : fixed[k]);
                fold_slot(rule, col, col_scale, job.geometry.row_varies ? fixed[k] : lane[k]);
            }
    }

    // Units of every hidden layer if they are so few that registers hold them, else 0.
    int narrow() const {
        for (int layer = 1; layer < layers - 1; ++layer)
            if (width[layer] != width[0]) return 0;
        return width[0] == 4 || width[0] == 8 ? width[0] : 0;
    }

private:
    void fold_slot(const pylo_rule &rule, int slot, float scale, float *to) const {
        const bool used = rule.features >> slot & 1;
        const float *from = weights[0] + slot * padded[0];
        for (int n = 0; n < padded[0]; ++n) to[n] = used ? from[n] * scale : 0;
        for (int n = padded[0]; n < PYLO_MAX_WIDTH; ++n) to[n] = 0;
    }
};

// acc[j][i] += sum over inputs of weights[input][j] * in[input][i]
template <int V, int Units>
PYLO_FN void multiply(const float *in, int inputs, const float *weights, int64_t weights_step, Vec (&acc)[Units][V]) {
#pragma GCC unroll 2
    for (int k = 0; k < inputs; ++k) {
        Vec x[V];
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) x[i] = Vec::load(in + (k * V + i) * Vec::lanes);
#pragma GCC unroll 8
        for (int j = 0; j < Units; ++j) {
            const Vec weight(weights[k * weights_step + j]);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) acc[j][i] = madd(x[i], weight, acc[j][i]);
        }
    }
}

// A hidden layer, `Units` at a time. A unit starts from its bias and, if there is one, its row of `table`. Not inlined:
// a call costs nothing beside the work, and every kernel would have its own copies.
template <int V, int Units>
__attribute__((noinline)) void relu_units(
    const float *in, int inputs, const float *weights, int64_t weights_step, int outputs, const float *bias,
    const float (*table)[TILE], float *out) {
    for (int unit = 0; unit < outputs; unit += Units) {
        Vec acc[Units][V];
#pragma GCC unroll 8
        for (int j = 0; j < Units; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) acc[j][i] = Vec(bias[unit + j]);
        if (table)
#pragma GCC unroll 8
            for (int j = 0; j < Units; ++j)
#pragma GCC unroll 4
                for (int i = 0; i < V; ++i) acc[j][i] = acc[j][i] + Vec::load(table[unit + j] + i * Vec::lanes);
        multiply<V, Units>(in, inputs, weights + unit, weights_step, acc);
#pragma GCC unroll 8
        for (int j = 0; j < Units; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) at_least(Vec(0.0f), acc[j][i]).store(out + ((unit + j) * V + i) * Vec::lanes);
    }
}

template <int V>
PYLO_FN void relu_layer(
    const float *in, int inputs, const float *weights, int64_t weights_step, int outputs, const float *bias,
    const float (*table)[TILE], float *out) {
    // Few vectors, or 32 registers, leave most of them idle: take twice the units.
    constexpr int most = V < 2 || PYLO_LANES == 16 ? 8 : 4;
    if (outputs % most == 0)
        relu_units<V, most>(in, inputs, weights, weights_step, outputs, bias, table, out);
    else
        relu_units<V, 4>(in, inputs, weights, weights_step, outputs, bias, table, out);
}

// -- apply --------------------------------------------------------------------------------------------------------------

// What the statistic that varies along lanes contributes to a tile, for one slice.
struct LaneTable {
    int64_t slice, norm;
    float element_scale[MAX_CHANNELS], fixed_scale[6];  // normalisers, if there are several slices of them
    alignas(64) float scale[3][TILE];
    alignas(64) float preactivation[PYLO_MAX_WIDTH][TILE];
};

struct Workplace {
    Network network;
    LaneTable tables[TABLES];
    alignas(64) float fixed_preactivation[PYLO_MAX_WIDTH];
    alignas(64) float a[PYLO_MAX_WIDTH][TILE], b[PYLO_MAX_WIDTH][TILE];
};

template <int V>
void fill_table(const Job &job, const Network &network, const Position &at, int64_t first, int count, LaneTable &table) {
    const pylo_tensor &t = *job.tensor;
    const int64_t step = job.geometry.lane_stat_step;
    alignas(64) float statistics[6][V * Vec::lanes];
    float lane_scale[6] = {1, 1, 1, 1, 1, 1};
    table.norm = at.norm;
    if (t.norm_slices > 1) {
        for (int channel = 0; channel < network.channels; ++channel)
            table.element_scale[channel] = element_scale(job, Channels<true>::slot(channel), at.norm);
        for (int k = 0; k < 6; ++k) {
            lane_scale[k] = statistic_scale(job, statistic_slot(job.geometry.row_varies, k), at.norm);
            table.fixed_scale[k] = statistic_scale(job, statistic_slot(!job.geometry.row_varies, k), at.norm);
        }
    }
    for (int k = 0; k < 3; ++k) {
        const float *value = lane_statistic(job, t.row, t.col, k, at.lane());
        const float *scale = lane_statistic(job, t.row_scale, t.col_scale, k, at.lane());
        for (int i = 0; i < V * Vec::lanes; ++i) {
            const bool inside = i < count;
            const float x = inside ? value[(first + i) * step] : 0.0f;
            statistics[k][i] = x * lane_scale[k];
            statistics[3 + k][i] = inverse_statistic(x) * lane_scale[3 + k];
            table.scale[k][i] = inside ? scale[(first + i) * step] : 0.0f;
        }
    }
    for (int unit = 0; unit < network.padded[0]; ++unit)
        for (int i = 0; i < V; ++i) {
            Vec sum(network.bias[unit]);
            for (int k = 0; k < 6; ++k)
                sum = madd(Vec::load(statistics[k] + i * Vec::lanes), Vec(network.lane[k][unit]), sum);
            sum.store(table.preactivation[unit] + i * Vec::lanes);
        }
    table.slice = at.slice;
}

void fill_fixed(const Job &job, const Position &at, const LaneTable &table, Workplace &work) {
    const pylo_tensor &t = *job.tensor;
    const Network &network = work.network;
    float statistics[6];
    for (int k = 0; k < 3; ++k) {
        statistics[k] = fixed_statistic(job, t.row, t.col, k, at.fixed());
        statistics[3 + k] = inverse_statistic(statistics[k]);
    }
    if (t.norm_slices > 1)
        for (int k = 0; k < 6; ++k) statistics[k] *= table.fixed_scale[k];
    for (int unit = 0; unit < network.padded[0]; unit += Vec::lanes) {
        Vec sum(0.0f);
        for (int k = 0; k < 6; ++k) sum = madd(Vec(statistics[k]), Vec::load(network.fixed[k] + unit), sum);
        sum.store(work.fixed_preactivation + unit);
    }
}

// The tile is 3 cache lines of each stream: too short a run for the hardware to foresee, so ask for the next one.
PYLO_FN void prefetch(const void *base, int dtype, int64_t index) {
    const char *line = (const char *)base + index * (dtype == PYLO_FLOAT32 ? 4 : 2);
    const int bytes = TILE * (dtype == PYLO_FLOAT32 ? 4 : 2);
    for (int offset = 0; offset < bytes; offset += 64) __builtin_prefetch(line + offset);
}

// A third of the streams at a time: a core waits where more lines are asked for at once than it can have on their way.
PYLO_FN void prefetch_tile(const Job &job, int64_t index, int third) {
    const pylo_tensor &t = *job.tensor;
    if (index < 0) return;
    switch (third) {
        case 0:
            prefetch(job.step->grad, job.step->grad_dtype, index);
            return prefetch(t.param, t.param_dtype, index);
        case 1:
            prefetch(t.rms, PYLO_FLOAT32, index);
            return prefetch(t.momentum[0], PYLO_FLOAT32, index);
        case 2:
            prefetch(t.momentum[1], PYLO_FLOAT32, index);
            return prefetch(t.momentum[2], PYLO_FLOAT32, index);
    }
}

// Outputs of the network for one tile, whose features `visit(i, put)` makes for the i-th vector. Layers go through memory.
template <bool Factored, int V, class Visit>
PYLO_FN void evaluate(
    const Job &job, Workplace &work, const LaneTable *table, int64_t next, Visit &&visit, Vec (&outputs)[2][V]) {
    const Network &network = work.network;
    float *in = work.a[0], *out = work.b[0];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i)
        visit(i, [&](int channel, Vec f) __attribute__((always_inline)) { f.store(in + (channel * V + i) * Vec::lanes); });
    prefetch_tile(job, next, 1);
    relu_layer<V>(in, network.channels, network.element[0], PYLO_MAX_WIDTH, network.padded[0],
                  Factored ? work.fixed_preactivation : network.bias, Factored ? table->preactivation : nullptr, out);
    prefetch_tile(job, next, 2);
    int layer = 1;
    for (; layer < network.layers - 1; ++layer) {
        float *swap = in;
        in = out;
        out = swap;
        relu_layer<V>(in, network.width[layer - 1], network.weights[layer], network.padded[layer], network.padded[layer],
                      network.biases[layer], nullptr, out);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) outputs[j][i] = Vec(network.biases[layer][j]);
    multiply<V, 2>(out, network.width[layer - 1], network.weights[layer], network.padded[layer], outputs);
}

// The same for a network whose hidden layers all have as many units as registers hold: nothing goes through memory.
template <bool Factored, int V, int Units, class Visit>
PYLO_FN void evaluate_narrow(
    const Job &job, Workplace &work, const LaneTable *table, int64_t next, Visit &&visit, Vec (&outputs)[2][V]) {
    const Network &network = work.network;
    const int last = network.layers - 1;
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        Vec units[Units];
#pragma GCC unroll 8
        for (int j = 0; j < Units; ++j) {
            units[j] = Vec(Factored ? work.fixed_preactivation[j] : network.bias[j]);
            if constexpr (Factored) units[j] = units[j] + Vec::load(table->preactivation[j] + i * Vec::lanes);
        }
        visit(i, [&](int channel, Vec f) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int j = 0; j < Units; ++j) units[j] = madd(f, Vec(network.element[channel][j]), units[j]);
        });
        for (int layer = 1; layer < last; ++layer) {
            const float *weights = network.weights[layer], *bias = network.biases[layer];
            Vec following[Units];
#pragma GCC unroll 8
            for (int j = 0; j < Units; ++j) following[j] = Vec(bias[j]);
#pragma GCC unroll 8
            for (int k = 0; k < Units; ++k) {
                const Vec x = at_least(Vec(0.0f), units[k]);
#pragma GCC unroll 8
                for (int j = 0; j < Units; ++j) following[j] = madd(x, Vec(weights[k * Units + j]), following[j]);
            }
#pragma GCC unroll 8
            for (int j = 0; j < Units; ++j) units[j] = following[j];
        }
        const float *weights = network.weights[last], *bias = network.biases[last];
        outputs[0][i] = Vec(bias[0]);
        outputs[1][i] = Vec(bias[1]);
#pragma GCC unroll 8
        for (int k = 0; k < Units; ++k) {
            const Vec x = at_least(Vec(0.0f), units[k]);
            outputs[0][i] = madd(x, Vec(weights[k * 4]), outputs[0][i]);
            outputs[1][i] = madd(x, Vec(weights[k * 4 + 1]), outputs[1][i]);
        }
        if (i < 2) prefetch_tile(job, next, 1 + i);
    }
}

// One tile of V vectors; that at `next`, if not negative, will follow soon. `Sliced`: of a tensor with several slices
// over which features are normalised. `Units`: of every hidden layer if they are few, else 0.
template <bool Factored, bool Sliced, int Units, int V>
PYLO_FN void apply_tile(
    const Job &job, Workplace &work, Window<Factored, TILE> &window, const LaneTable *table, const Vec *fixed_scale,
    int64_t next) {
    const pylo_tensor &t = *job.tensor;
    const pylo_step &step = *job.step;
    const bool extra = has_extra(*job.rule);
    prefetch_tile(job, next, 0);
    const auto visit = [&](int i, auto &&put) __attribute__((always_inline)) {
        const Element<Vec> x = window.element(job, i * Vec::lanes);
        window.keep_state(x, i * Vec::lanes);
        Vec scale[3];
        if constexpr (Factored)
#pragma GCC unroll 3
            for (int k = 0; k < 3; ++k) scale[k] = fixed_scale[k] * Vec::load(table->scale[k] + i * Vec::lanes);
        features<Factored>(*job.rule, extra, x, scale, [&](int channel, Vec f) __attribute__((always_inline)) {
            put(channel, Sliced ? f * Vec(table->element_scale[channel]) : f);
        });
    };
    Vec outputs[2][V];
    if constexpr (Units > 0)
        evaluate_narrow<Factored, V, Units>(job, work, table, next, visit, outputs);
    else
        evaluate<Factored, V>(job, work, table, next, visit, outputs);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        float *at = window.param + i * Vec::lanes;
        const Vec proposed = Vec(step.step_mult) * proposed_step(outputs[0][i], outputs[1][i], job.rule->exp_mult);
        if (t.direction)
            proposed.store(work.a[0] + i * Vec::lanes);
        else
            madd(Vec(-step.scale), proposed, Vec(step.keep) * Vec::load(at)).store(at);
    }
    window.store_state(job);
    if (t.direction)
        store_lanes(t.direction, PYLO_FLOAT32, window.index, window.step, window.count, work.a[0]);
    else
        window.store_param(job);
}

template <bool Factored, bool Sliced, int Units, int V>
void apply_strip(const Job &job, Workplace &work, int64_t first, int count) {
    const pylo_tensor &t = *job.tensor;
    const Geometry &g = job.geometry;
    const int64_t tables = g.slices < TABLES ? g.slices : 1;
    for (int64_t i = 0; i < tables; ++i) work.tables[i].slice = -1;
    Window<Factored, TILE> window;
    Position at(job, job.part.outer_begin), ahead = at;
    for (int i = 0; i < TILES_AHEAD; ++i) ahead.advance();
    for (int64_t outer = job.part.outer_begin; outer < job.part.outer_end; ++outer, at.advance(), ahead.advance()) {
        const bool foreseen = g.lane_step == 1 && outer + TILES_AHEAD < job.part.outer_end;
        LaneTable *table = nullptr;
        Vec fixed_scale[3];
        if constexpr (Factored) {
            table = &work.tables[tables > 1 ? at.slice : 0];
            if (table->slice != at.slice || table->norm != at.norm)
                fill_table<V>(job, work.network, at, first, count, *table);
            fill_fixed(job, at, *table, work);
            for (int k = 0; k < 3; ++k)
                fixed_scale[k] = Vec(fixed_statistic(job, t.row_scale, t.col_scale, k, at.fixed()));
        }
        window.load(job, at.memory + first * g.lane_step, count);
        apply_tile<Factored, Sliced, Units, V>(job, work, window, table, fixed_scale, foreseen ? ahead.memory + first : -1);
    }
}

template <bool Factored, bool Sliced, int Units>
void apply_strips(const Job &job, Workplace &work) {
    for (int64_t first = job.part.lane_begin; first < job.part.lane_end;) {
        const int64_t left = job.part.lane_end - first, vectors = (left + Vec::lanes - 1) / Vec::lanes;
        const int take = vectors == 4 ? 2 : (int)smaller(vectors, TILE_VECTORS);  // four are better halved
        const int count = (int)smaller(left, take * Vec::lanes);
        if (take == 3)
            apply_strip<Factored, Sliced, Units, 3>(job, work, first, count);
        else if (take == 2)
            apply_strip<Factored, Sliced, Units, 2>(job, work, first, count);
        else
            apply_strip<Factored, Sliced, Units, 1>(job, work, first, count);
        first += count;
    }
}

template <bool Factored, bool Sliced>
void apply_part(const Job &job, Workplace &work) {
    work.network.fold<Factored>(job);
    switch (work.network.narrow()) {
        case 4:
            return apply_strips<Factored, Sliced, 4>(job, work);
        case 8:
            return apply_strips<Factored, Sliced, 8>(job, work);
        default:
            return apply_strips<Factored, Sliced, 0>(job, work);
    }
}

void adam(const Job &job) {
    const pylo_tensor &t = *job.tensor;
    const pylo_step &step = *job.step;
    alignas(64) float buffer[5][WIDE];
    for (int64_t first = job.part.lane_begin; first < job.part.lane_end; first += WIDE) {
        const int count = (int)smaller(WIDE, job.part.lane_end - first), padded = (int)round_up(count, Vec::lanes);
        const auto load = [&](void *base, int dtype, int stream) {
            return load_lanes(base, dtype, first, 1, count, padded, 0, buffer[stream]);
        };
        const float *grad = load(const_cast<void *>(step.grad), step.grad_dtype, 0);
        float *param = load(t.param, t.param_dtype, 1), *rms = load(t.rms, PYLO_FLOAT32, 2);
        float *momentum = load(t.momentum[0], PYLO_FLOAT32, 3);
        float *direction = t.direction ? buffer[4] : nullptr;
        for (int lane = 0; lane < padded; lane += Vec::lanes) {
            const Vec p = Vec::load(param + lane);
            const Vec g = read_gradient(job, Vec::load(grad + lane), p);
            Vec m = Vec::load(momentum + lane), r = Vec::load(rms + lane);
            const Vec proposed = Vec(step.step_mult) * adam_step(*job.rule, step, g, m, r);
            m.store(momentum + lane);
            r.store(rms + lane);
            if (direction)
                proposed.store(direction + lane);
            else
                madd(Vec(-step.scale), proposed, Vec(step.keep) * p).store(param + lane);
        }
        store_lanes(t.momentum[0], PYLO_FLOAT32, first, 1, count, momentum);
        store_lanes(t.rms, PYLO_FLOAT32, first, 1, count, rms);
        if (direction)
            store_lanes(t.direction, PYLO_FLOAT32, first, 1, count, direction);
        else
            store_lanes(t.param, t.param_dtype, first, 1, count, param);
    }
}

void apply(const Job &job) {
    if (job.rule->layers == 0) return adam(job);
    Workplace work;
    if (job.tensor->d0_axis < 0)
        apply_part<false, false>(job, work);
    else if (job.tensor->norm_slices > 1)
        apply_part<true, true>(job, work);
    else
        apply_part<true, false>(job, work);
}

// -- the peak of a core -------------------------------------------------------------------------------------------------

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

extern const Kernels PYLO_KERNELS;
const Kernels PYLO_KERNELS = {collect, measure, prepare, describe, apply, multiply_adds};

}  // namespace pylo
