// The table of tensors: whether it is in order, for kernels of any device. The CPU library has the code; that for CUDA
// asks it by pylo_check().
#pragma once

#include "pylo.h"

namespace pylo {

// What must hold before anything else of a call is read.
int check_header(const pylo_call *call);

// Rules and records: null, misaligned, overlapping and too small buffers, extents and strides that do not fit. Throws
// std::bad_alloc.
int check_table(const pylo_call &call);

// A hash of rules and records as they were checked: a stage compares it, so that a table is checked once and not at every
// step, and is never used after it has changed.
uint64_t token_of(const pylo_call &call);

}  // namespace pylo
