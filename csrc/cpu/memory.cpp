// What torch knows of many tensors, asked at once: neither Python's headers nor torch's are needed for it.
#include "../core/hash.h"
#include "../core/pylo.h"

namespace {

using pylo::mix;

// A Python object's tensor, as torch's functions take it: the address of its only member.
void *handle(const pylo_torch &torch, void *object) { return (char *)object + torch.member; }

bool read(const pylo_torch &torch, void *object, pylo_memory &memory) {
    void *tensor = handle(torch, object), *data = nullptr;
    int32_t device = 0, index = 0, dtype = 0;
    int64_t rank = 0, *shape = nullptr, *strides = nullptr;
    if (torch.data_ptr(tensor, &data) || torch.device_type(tensor, &device) || torch.device_index(tensor, &index) ||
        torch.dtype(tensor, &dtype) || torch.dim(tensor, &rank) || torch.sizes(tensor, &shape) ||
        torch.strides(tensor, &strides) || torch.storage_size(tensor, &memory.storage_bytes) ||
        torch.storage_offset(tensor, &memory.storage_offset))
        return false;
    uint64_t hash = mix((uint64_t)device << 32 | (uint32_t)index, (uint64_t)dtype << 32 | (uint32_t)rank);
    hash = mix(hash, (data != nullptr) * 2 + (torch.is_neg(tensor) != 0));
    for (int64_t axis = 0; axis < rank; ++axis) hash = mix(mix(hash, (uint64_t)shape[axis]), (uint64_t)strides[axis]);
    memory.address = (uint64_t)(uintptr_t)data, memory.object = (uint64_t)(uintptr_t)object, memory.format = hash;
    return true;
}

}  // namespace

extern "C" int32_t pylo_has_entries(
    const pylo_torch *torch, void *const *owners, void *const *names, void *const *objects, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (torch->dict_get(owners[i], names[i]) != objects[i]) return 0;
    return 1;
}

extern "C" int32_t pylo_read_memory(
    const pylo_torch *torch, void *const *objects, pylo_memory *memory, int64_t count) {
    if (!torch || count < 0 || (count && (!objects || !memory))) return PYLO_BAD_ARGUMENT;
    try {
        for (int64_t i = 0; i < count; ++i)
            if (!objects[i] || !read(*torch, objects[i], memory[i])) return PYLO_BAD_ARGUMENT;
    } catch (...) {
        return PYLO_BAD_ARGUMENT;
    }
    return PYLO_OK;
}

extern "C" int32_t pylo_raise_versions(const pylo_torch *torch, void *const *objects, int64_t count) {
    try {
        for (int64_t i = 0; i < count; ++i) torch->bump_version(handle(*torch, objects[i]));
    } catch (...) {  // one has no version, as those of inference mode
        return PYLO_BAD_ARGUMENT;
    }
    return PYLO_OK;
}
