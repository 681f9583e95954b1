// Which instruction set's kernels run.
#pragma once

#include "kernels.h"

namespace pylo {

// Null if `isa` was not compiled in, or does not run on this machine.
const Kernels *kernels_of(int isa);

// What PYLO_BEST stands for.
int best_isa();

// The kernels for one record of a call that asks for `isa`.
const Kernels *kernels_for(int isa, const Geometry &geometry);

}  // namespace pylo
