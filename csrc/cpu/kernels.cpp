// The stages for one instruction set; compiled once for each (CMakeLists.txt).
//
// Of the headers below two things are asked. They use nothing from the C++ library: its inline functions would be compiled
// for this instruction set and merged with those of others, and a baseline machine would run AVX-512. And what they define
// stays in this file, in anonymous namespaces: then the compiler inlines and specialises without copies for anyone else.
#include "advance.h"
#include "apply.h"
#include "collect.h"
#include "describe.h"
#include "measure.h"
#include "peak.h"
#include "prepare.h"

namespace pylo {

extern const Kernels PYLO_KERNELS;
const Kernels PYLO_KERNELS = {collect, measure, prepare, describe, advance, apply, multiply_adds};

}  // namespace pylo
