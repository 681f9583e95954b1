// Where Python's tensors are, read for many at once: neither Python's headers nor torch's are needed for it.
#include "../core/hash.h"
#include "../core/pylo.h"

namespace {

using pylo::mix;

// What DLPack 1.x says about a tensor, and its table of functions (https://dmlc.github.io/dlpack/latest/c_api.html).
struct Tensor {
    void *data;
    int32_t device_type, device_index;
    int32_t rank;
    uint8_t type_code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major, minor;
    const ExchangeApi *older;
    void (*other[3])(void);
    int (*read)(void *object, Tensor *tensor);  // dltensor_from_py_object_no_sync
};

uint64_t format_of(const Tensor &tensor) {
    uint64_t hash = mix((uint64_t)tensor.device_type << 32 | (uint32_t)tensor.device_index, (uint64_t)tensor.rank);
    hash = mix(hash, tensor.data != nullptr);
    hash = mix(hash, (uint64_t)tensor.type_code << 32 | (uint64_t)tensor.bits << 16 | tensor.lanes);
    for (int32_t axis = 0; axis < tensor.rank; ++axis)
        // Before DLPack 1.2, row-major tensors had no strides.
        hash = mix(mix(hash, (uint64_t)tensor.shape[axis]), tensor.strides ? (uint64_t)tensor.strides[axis] : ~0ull);
    return hash;
}

}  // namespace

extern "C" int32_t pylo_read_memory(
    const void *exchange_api, void *const *objects, int64_t count, pylo_memory *memory) {
    const ExchangeApi *api = (const ExchangeApi *)exchange_api;
    while (api && api->major != 1) api = api->older;
    if (!api || !api->read || count < 0 || (count && (!objects || !memory))) return PYLO_BAD_ARGUMENT;
    for (int64_t i = 0; i < count; ++i) {
        Tensor tensor = {};
        if (!objects[i] || api->read(objects[i], &tensor)) return PYLO_BAD_ARGUMENT;
        memory[i] = {(uint64_t)(uintptr_t)tensor.data + tensor.byte_offset, format_of(tensor), (uint64_t)(uintptr_t)objects[i]};
    }
    return PYLO_OK;
}
