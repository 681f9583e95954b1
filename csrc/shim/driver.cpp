// CUDA's driver (libcuda) for the emulation: the functions that pylo_integrations/ops/driver.py calls, with kernels of
// csrc/cuda in the place of those in a module. There is one device, which is this CPU.
#include "../cuda/kernels.cuh"

#include "../cuda/kernels.inc"
#undef PYLO_KERNEL

namespace {

struct Kernel {
    const char *name;
    void (*function)(pylo::Arguments);
};

#define PYLO_KERNEL(name, ...) {"pylo_" #name, pylo_##name},
const Kernel kernels[] = {
#include "../cuda/kernels.inc"
};

enum { SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500, LAUNCH_FAILED = 719 };
thread_local int contexts = 0;  // that were pushed
int primary, module;            // what their addresses stand for

}  // namespace

#define DRIVER extern "C" __attribute__((visibility("default"))) int

DRIVER cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
DRIVER cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
DRIVER cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : NO_DEVICE; }
DRIVER cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &primary, device ? NO_DEVICE : SUCCESS; }
DRIVER cuCtxPushCurrent_v2(void *context) { return context == &primary ? ++contexts, SUCCESS : INVALID_CONTEXT; }
DRIVER cuCtxPopCurrent_v2(void **context) { return *context = &primary, contexts ? --contexts, SUCCESS : INVALID_CONTEXT; }
DRIVER cuModuleLoadData(void **loaded, const void *image) {
    if (!contexts) return INVALID_CONTEXT;
    return *loaded = &module, image ? SUCCESS : INVALID_VALUE;
}
DRIVER cuModuleGetFunction(const void **function, void *from, const char *name) {
    if (from != &module) return INVALID_VALUE;
    for (const Kernel &kernel : kernels)
        if (!std::strcmp(kernel.name, name)) return *function = &kernel, SUCCESS;
    return NOT_FOUND;
}
DRIVER cuLaunchKernel(
    const void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
    unsigned shared_bytes, void *stream, void **parameters, void **extra) {
    if (!contexts) return INVALID_CONTEXT;
    if (!x || y != 1 || z != 1 || threads_y != 1 || threads_z != 1 || shared_bytes || stream || extra) return INVALID_VALUE;
    const Kernel *const kernel = (const Kernel *)function;
    return pylo::launch(kernel->function, x, threads, *(const pylo::Arguments *)parameters[0]) ? LAUNCH_FAILED : SUCCESS;
}
DRIVER cuGetErrorString(int error, const char **text) {
    const char *const known = error == LAUNCH_FAILED ? shim::machine().error.c_str() : error == INVALID_VALUE ? "invalid argument"
        : error == NO_DEVICE ? "no CUDA-capable device is detected" : error == INVALID_CONTEXT ? "invalid device context"
        : error == NOT_FOUND ? "named symbol not found" : "unknown error";
    return *text = known, SUCCESS;
}
