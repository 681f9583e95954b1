// A line of kernels.inc as a kernel, under a name that drivers can look up.
#pragma once

#include "adam.cuh"
#include "advance.cuh"
#include "exact.cuh"
#include "linear.cuh"
#include "sums.cuh"
#include "tensor_cores.cuh"

#define PYLO_KERNEL(name, threads, ...)                                                          \
    extern "C" __global__ void __launch_bounds__(pylo::threads) pylo_##name(pylo::Arguments arguments) { \
        pylo::__VA_ARGS__(arguments);                                                            \
    }
