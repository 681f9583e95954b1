// The stages for one instruction set; compiled once for each (CMakeLists.txt).
#include "apply.h"
#include "collect.h"
#include "describe.h"
#include "measure.h"
#include "peak.h"
#include "prepare.h"

namespace pylo {

extern const Kernels PYLO_KERNELS;
const Kernels PYLO_KERNELS = {collect, measure, prepare, describe, apply, multiply_adds};

}  // namespace pylo
