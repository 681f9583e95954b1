// Single instructions and collective operations in kernels of their own, called from Python: by the emulation to test
// it, by a device to test that the emulation does what the device does. Every function returns 0, or what went wrong.
#include "../../../csrc/cuda/device.h"

#include <cstdio>
#include <cstring>

using namespace pylo;

namespace {

// Memory that kernels and host share.
template <class T>
struct Shared {
    T *data;
    explicit Shared(size_t count) {
#ifdef __CUDACC__
        cudaMallocManaged(&data, count * sizeof(T));
#else
        data = new T[count];
#endif
        memset(data, 0, count * sizeof(T));
    }
    ~Shared() {
#ifdef __CUDACC__
        cudaFree(data);
#else
        delete[] data;
#endif
    }
};

#ifdef __CUDACC__
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
    kernel<<<blocks, threads>>>(arguments...);
    return cudaGetLastError();
}
#endif

template <class T, int Count>
struct Array {
    T item[Count];
};

char message[512];

const char *outcome(cudaError_t error) {
#ifdef __CUDACC__
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
#endif
    if (error == cudaSuccess) return nullptr;
    snprintf(message, sizeof message, "%s", cudaGetErrorString(error));
    return message;
}

__global__ void mma_kernel(const uint32_t *a, const uint32_t *b, float *d) {
    const int lane = (int)threadIdx.x;
    uint32_t mine[4];
    float sums[4];
    for (int i = 0; i < 4; ++i) mine[i] = a[lane * 4 + i], sums[i] = d[lane * 4 + i];
    mma(sums, mine, b[lane * 2], b[lane * 2 + 1]);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

__global__ void load_matrices_kernel(const uint4 *rows, uint32_t *registers) {
    uint4 *const shared = shared_memory<Array<uint4, 32>>().item;
    const int lane = (int)threadIdx.x;
    shared[lane] = rows[lane];
    __syncwarp();
    uint32_t mine[4];
    load_matrices(mine, &shared[lane]);
    for (int i = 0; i < 4; ++i) registers[lane * 4 + i] = mine[i];
}

__global__ void halves_kernel(const float *x, int count, uint16_t *bfloat16, uint16_t *float16, uint32_t *packed) {
    for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x) {
        bfloat16[i] = to_bfloat16(x[i]);
        float16[i] = to_float16(x[i]);
        packed[i] = pack_bfloat16(x[i], -x[i]);
    }
}

// Sums of blocks by shuffles, shared memory and barriers.
__global__ void sum_kernel(const float *x, int count, double *sums) {
    double *const shared = shared_memory<Array<double, 8>>().item;
    double sum = 0;
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += (int)(gridDim.x * blockDim.x)) sum += (double)x[i];
    for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) sum += shared[warp];
        sums[blockIdx.x] = sum;
    }
}

__global__ void faulty_kernel(int fault, float *out) {
    float *const shared = shared_memory<Array<float, 64>>().item;
    if (fault == 1) {  // two barriers that are not one
        if (threadIdx.x < 40)
            __syncthreads();
        else
            __syncthreads();
    } else if (fault == 2) {  // one thread never comes
        if (threadIdx.x == 3) return;
        __syncthreads();
    } else if (fault == 3) {  // half a warp
        if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
    }
    out[threadIdx.x] = shared[threadIdx.x];  // which nobody wrote
}

}  // namespace

#define PROBE extern "C" __attribute__((visibility("default"))) const char *

PROBE probe_mma(const uint32_t *a, const uint32_t *b, float *d) {
    Shared<uint32_t> x(128), y(64);
    Shared<float> sums(128);
    memcpy(x.data, a, 512), memcpy(y.data, b, 256), memcpy(sums.data, d, 512);
    const char *error = outcome(launch(mma_kernel, 1, 32, (const uint32_t *)x.data, (const uint32_t *)y.data, sums.data));
    memcpy(d, sums.data, 512);
    return error;
}

PROBE probe_load_matrices(const void *rows, uint32_t *registers) {
    Shared<uint4> from(32);
    Shared<uint32_t> to(128);
    memcpy(from.data, rows, 512);
    const char *error = outcome(launch(load_matrices_kernel, 1, 32, (const uint4 *)from.data, to.data));
    memcpy(registers, to.data, 512);
    return error;
}

PROBE probe_halves(const float *x, int count, uint16_t *bfloat16, uint16_t *float16, uint32_t *packed) {
    Shared<float> from((size_t)count);
    Shared<uint16_t> b((size_t)count), h((size_t)count);
    Shared<uint32_t> p((size_t)count);
    memcpy(from.data, x, (size_t)count * 4);
    const char *error = outcome(launch(halves_kernel, 1, 64, (const float *)from.data, count, b.data, h.data, p.data));
    memcpy(bfloat16, b.data, (size_t)count * 2), memcpy(float16, h.data, (size_t)count * 2), memcpy(packed, p.data, (size_t)count * 4);
    return error;
}

PROBE probe_sum(const float *x, int count, int blocks, double *sums) {
    Shared<float> from((size_t)count);
    Shared<double> to((size_t)blocks);
    memcpy(from.data, x, (size_t)count * 4);
    const char *error = outcome(launch(sum_kernel, (unsigned)blocks, 256, (const float *)from.data, count, to.data));
    memcpy(sums, to.data, (size_t)blocks * 8);
    return error;
}

PROBE probe_fault(int fault, float *out) {
    Shared<float> to(64);
    const char *error = outcome(launch(faulty_kernel, 3, 64, fault, to.data));
    memcpy(out, to.data, 256);
    return error;
}
