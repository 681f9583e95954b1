// The plan of a step: tensors and parts of them, a part for every block of every kernel. Made once on the host, read on
// the device. How a tensor is cut into parts for a sum depends on that tensor alone, so neither does the sum's rounding.
#pragma once

#include "../core/pylo.h"

namespace pylo {

constexpr int WARP = 32;
constexpr int SUM_THREADS = 256;     // of a block of every kernel but apply of hidden layers
constexpr int LANES = 1024;          // of a part of a matrix at most: neighbours in a row
constexpr int ROWS = 512;            // of a part of a matrix at most
constexpr int FLUSH = 64;            // numbers that are added in single precision
constexpr int PART = FLUSH * SUM_THREADS;  // elements of a part of a tensor
constexpr int STATISTICS_PART = 2048;      // entries of a part of a statistic
constexpr int LINES_PART = 64;             // lines of a part of `row`
constexpr int EXACT_THREADS = 128;         // of a block of apply, in float32
constexpr int TENSOR_THREADS = 128;        // and on tensor cores,
constexpr int TENSOR_WIDTH = 32;           // where hidden layers are filled up to as many units

// n / divisor for n below 2^31, without a division.
struct Divisor {
    uint32_t divisor, magic, shift;
};

struct Axis {
    Divisor extent;
    int32_t row_stride, col_stride;  // of narrow tensors
};

struct Record {
    pylo_tensor tensor;
    Axis axis[PYLO_MAX_RANK];
    int64_t step[PYLO_MAX_RANK];      // between neighbours in memory
    int64_t numel;                    // of the box
    int64_t prepare_slot;             // first partial sum, in doubles
    int32_t wide;                     // whether indices need 64 bits
    int32_t row_parts, col_parts;     // of prepare, for each of the three decays
    int32_t sliced;                   // whether there are several slices over which features are normalised
    int32_t inner[PYLO_MAX_RANK];     // the axes within such a slice, slowest first
    int32_t inner_axes, unused;
};

// The elements of a box that are normalised together: in all but convolutions and stacks of matrices, all of them.
struct Slice {
    int64_t memory, row, col;  // of its first element, and of that one's entries
    int64_t norm;              // its number in the whole tensor
    int64_t describe_slot, describe_step;  // first partial sum, and distance of the next part's, in doubles
    int64_t describe_parts;
};

// Elements of a slice in the order of memory.
struct FlatPart {
    int64_t begin, end, slot;
    int32_t record, slice;
};

// Part of a matrix: one factored axis are its rows, the other its lanes. Squares are summed along both.
struct MatrixPart {
    int64_t memory, row_step, lane_step;
    int64_t square_slot, row_slot, lane_slot;  // for one sum, a sum per row, a sum per lane; -1 for none
    int32_t rows, lanes, record;
    int32_t clears;  // whether to zero the sums of the whole tensor, of which the box has only some
};

// Entries of `col`, or lines of `row` along d1, for one decay.
struct StatisticPart {
    int64_t begin, end, slot;
    int32_t record, decay, is_row, unused;
};

// Sums of partial sums: result[i * result_step] = sum over j < terms of partial[first + i * step + j * term_step].
// Without a result it is grad_squares[record].
struct Merge {
    double *result;
    int64_t result_step, first, step, terms, term_step;
    int32_t count, record;  // at most SUM_THREADS
};

// Some of the parts of a kernel.
struct Range {
    int64_t first, count;
};

// A rule, and what of the plan kernels of its own step. Those of Adam, and of directions that are complete, have none.
struct Section {
    pylo_rule rule;
    int32_t plain;     // whether tensors and boxes are, see elements.cuh
    int32_t in_place;  // whether they are whole slices and are updated where they are
    int32_t unused;
    Range statistics, describes, applies;
};

// Begin of the plan. Offsets are bytes from here.
struct Header {
    uint64_t magic;
    int64_t bytes, workspace_bytes;
    int64_t tickets, partial;  // offsets in the workspace
    int64_t sections, records, slices, matrices, measures, merges, statistics, describes, advances, applies;
    int64_t section_count, record_count, slice_count, matrix_count, measure_count, merge_count, statistic_count,
        describe_count, advance_count, apply_count;
    Range updates;  // of `applies`: those that are in no section
};

constexpr uint64_t MAGIC = 0x70796C6F00000000u + PYLO_ABI_VERSION;

// What every kernel gets. `rule` and the parts are those of a launch; what is launched for all rules at once looks them up.
struct Arguments {
    pylo_rule rule;
    int32_t matrix_count;
    const Section *sections;  // one per rule
    const Record *records;
    const Slice *slices;
    const pylo_step *steps;
    const pylo_stored *stored;
    double *partial, *grad_squares;
    int32_t *tickets;  // one per slice, the first ones also one per record: parts that have ended; 0 between launches
    const MatrixPart *matrices;
    const FlatPart *measures;
    const Merge *merges;
    const StatisticPart *statistics;
    const FlatPart *describes, *advances, *applies;
};

// The host's compiler lays them out, the device's reads them: both must come to the same sizes.
static_assert(sizeof(Record) == 840 && sizeof(Section) == 176 && sizeof(Slice) == 56 && sizeof(FlatPart) == 32 && sizeof(MatrixPart) == 64, "");
static_assert(sizeof(StatisticPart) == 40 && sizeof(Merge) == 56 && sizeof(Arguments) == 240, "");

}  // namespace pylo
