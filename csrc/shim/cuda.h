// CUDA on a CPU, as far as the kernels of csrc/cuda use it: tests compile the same .cu files with a C++ compiler and run
// every kernel where there is no GPU.
//
// Blocks run one after the other. The threads of a block are fibers, which run until they wait: at a block's barrier or
// at an operation of a warp, which is carried out once, by the lane that comes last. A thread that would wait for ever,
// or waits elsewhere than the others, is an error that names both places; shared memory is filled with NaN before every
// block. The order of blocks and threads can be chosen, so that results which depend on it show.
//
// It cannot find races between threads, bank conflicts, or what a device's memory model allows and this one does not.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace shim {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 << 10, SHARED = 48 << 10;

struct Place {
    const char *file;
    int line;
    bool operator==(const Place &other) const { return line == other.line && !std::strcmp(file, other.file); }
    std::string text() const { return std::string(std::strrchr(file, '/') ? std::strrchr(file, '/') + 1 : file) + ":" + std::to_string(line); }
};

typedef void (*WarpOperation)(void *const *);  // on the operands of 32 lanes

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t first;
    jmp_buf again;
    enum { FRESH, READY, AT_BARRIER, AT_WARP, DONE } state;
    Place place;
    WarpOperation operation;
    void *operands;
};

struct Machine {
    std::vector<Fiber> fibers;
    unsigned threads = 0, running = 0, seed = 0;
    uint3 block = {0, 0, 0}, blocks = {1, 1, 1};
    std::function<void()> kernel;
    std::vector<char> shared = std::vector<char>(SHARED);
    jmp_buf scheduler;
    std::string error;
};

inline Machine &machine() {
    static thread_local Machine the_machine;
    return the_machine;
}

// The i-th of n in the chosen order: 0 ascending, 1 descending, otherwise a permutation.
inline unsigned in_order(unsigned seed, unsigned i, unsigned n) {
    if (seed == 0) return i;
    if (seed == 1) return n - 1 - i;
    uint64_t step = seed * 2654435761u % n | 1;
    for (;; step += 2) {
        uint64_t a = step, b = n;
        while (b) std::swap(a %= b, b);
        if (a == 1) break;
    }
    return (unsigned)(((uint64_t)i * step + seed) % n);
}

inline void enter() {
    Machine &m = machine();
    m.kernel();
    m.fibers[m.running].state = Fiber::DONE;
    _longjmp(m.scheduler, 1);
}

inline void run(unsigned thread) {
    Machine &m = machine();
    Fiber &f = m.fibers[thread];
    m.running = thread;
    if (_setjmp(m.scheduler)) return;
    if (f.state != Fiber::FRESH) _longjmp(f.again, 1);
    f.state = Fiber::READY;
    setcontext(&f.first);
}

inline void wait() {
    Machine &m = machine();
    if (!_setjmp(m.fibers[m.running].again)) _longjmp(m.scheduler, 1);
}

// Lets the fibers [first, end) go on if all of them wait in this state at the same place.
inline bool release(unsigned first, unsigned end, int state) {
    Machine &m = machine();
    for (unsigned i = first; i < end; ++i)
        if (m.fibers[i].state != state || !(m.fibers[i].place == m.fibers[first].place)) return false;
    if (state == Fiber::AT_WARP) {
        void *operands[WARP];
        for (unsigned i = 0; i < WARP; ++i) operands[i] = m.fibers[first + i].operands;
        m.fibers[first].operation(operands);
    }
    for (unsigned i = first; i < end; ++i) m.fibers[i].state = Fiber::READY;
    return true;
}

inline std::string whereabouts(unsigned thread) {
    const Fiber &f = machine().fibers[thread];
    const char *const doing = f.state == Fiber::DONE ? "has ended" : f.state == Fiber::AT_WARP ? "is in the warp operation at " : "waits at ";
    return "thread " + std::to_string(thread) + " " + doing + (f.state == Fiber::DONE ? "" : f.place.text());
}

inline void run_block() {
    Machine &m = machine();
    std::memset(m.shared.data(), 0xFF, m.shared.size());
    for (unsigned i = 0; i < m.threads; ++i) {
        Fiber &f = m.fibers[i];
        if (!f.stack) f.stack.reset(new char[STACK]);
        getcontext(&f.first);
        f.first.uc_stack.ss_sp = f.stack.get();
        f.first.uc_stack.ss_size = STACK;
        f.first.uc_link = nullptr;
        makecontext(&f.first, enter, 0);
        f.state = Fiber::FRESH;
    }
    for (;;) {
        bool moved = false, all_done = true;
        for (unsigned i = 0; i < m.threads; ++i) {
            const unsigned thread = in_order(m.seed, i, m.threads);
            Fiber &f = m.fibers[thread];
            if (f.state == Fiber::FRESH || f.state == Fiber::READY) run(thread), moved = true;
            all_done = all_done && f.state == Fiber::DONE;
        }
        if (all_done) return;
        for (unsigned first = 0; first < m.threads; first += WARP)
            moved = (m.threads % WARP == 0 && release(first, first + WARP, Fiber::AT_WARP)) || moved;
        moved = release(0, m.threads, Fiber::AT_BARRIER) || moved;
        if (moved) continue;
        unsigned odd = 1;
        while (odd + 1 < m.threads && m.fibers[odd].state == m.fibers[0].state && (m.fibers[0].state == Fiber::DONE || m.fibers[odd].place == m.fibers[0].place)) ++odd;
        m.error = "divergent barrier in block " + std::to_string(m.block.x) + ": " + whereabouts(0) + ", " + whereabouts(odd);
        return;
    }
}

inline void at_barrier(Place place) {
    Fiber &f = machine().fibers[machine().running];
    f.state = Fiber::AT_BARRIER;
    f.place = place;
    wait();
}

// Carries out `operation` on the operands that the 32 lanes of a warp bring.
inline void at_warp(unsigned mask, Place place, WarpOperation operation, void *operands) {
    if (mask != 0xFFFFFFFFu) std::fprintf(stderr, "%s: only whole warps\n", place.text().c_str()), std::abort();
    Fiber &f = machine().fibers[machine().running];
    f.state = Fiber::AT_WARP;
    f.place = place;
    f.operation = operation;
    f.operands = operands;
    wait();
}

template <class T>
struct Exchange {
    T value, result;
    unsigned from;
    static void carry_out(void *const *operands) {
        for (unsigned lane = 0; lane < WARP; ++lane) {
            Exchange &mine = *(Exchange *)operands[lane];
            mine.result = ((Exchange *)operands[mine.from % WARP])->value;
        }
    }
};

template <class T>
T exchange(unsigned mask, T value, unsigned from, Place place) {
    Exchange<T> x = {value, value, from};
    at_warp(mask, place, Exchange<T>::carry_out, &x);
    return x.result;
}

inline float bfloat16(unsigned bits) {
    const uint32_t word = bits << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

inline unsigned to_bfloat16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d (16, 8) = a (16, 16) times b (16, 8) plus c.
// By the fragments' owners: lane 4 g + t has rows g and g + 8, columns from 2 t on.
struct Mma {
    float *d;
    const unsigned *a, *b;
    static float half_of(const unsigned *registers, unsigned index, unsigned half) {
        return bfloat16(registers[index] >> (16 * half) & 0xFFFFu);
    }
    static void carry_out(void *const *operands) {
        float a[16][16], b[16][8];
        for (unsigned row = 0; row < 16; ++row)
            for (unsigned k = 0; k < 16; ++k) {
                const Mma &owner = *(const Mma *)operands[row % 8 * 4 + k % 8 / 2];
                a[row][k] = half_of(owner.a, row / 8 + k / 8 * 2, k % 2);
            }
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned column = 0; column < 8; ++column) {
                const Mma &owner = *(const Mma *)operands[column * 4 + k % 8 / 2];
                b[k][column] = half_of(owner.b, k / 8, k % 2);
            }
        for (unsigned row = 0; row < 16; ++row)
            for (unsigned column = 0; column < 8; ++column) {
                float &d = ((const Mma *)operands[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2];
                double sum = d;
                for (unsigned k = 0; k < 16; ++k) sum += (double)a[row][k] * (double)b[k][column];
                d = (float)sum;
            }
    }
};

// ldmatrix.sync.aligned.m8n8.x4: four 8 x 8 matrices of 16-bit numbers. Lane 8 i + r brings the address of row r of
// matrix i; of each matrix, lane 4 r + t gets the numbers 2 t and 2 t + 1 of row r.
struct LoadMatrices {
    unsigned *registers;
    const void *row;
    static void carry_out(void *const *operands) {
        for (unsigned lane = 0; lane < WARP; ++lane)
            for (unsigned i = 0; i < 4; ++i) {
                const char *row = (const char *)((const LoadMatrices *)operands[8 * i + lane / 4])->row;
                std::memcpy(&((LoadMatrices *)operands[lane])->registers[i], row + lane % 4 * 4, 4);
            }
    }
};

}  // namespace shim

// -- what CUDA calls them ------------------------------------------------------------------------------------------------

#define SHIM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define threadIdx (uint3{::shim::machine().running, 0, 0})
#define blockIdx (::shim::machine().block)
#define blockDim (uint3{::shim::machine().threads, 1, 1})
#define gridDim (::shim::machine().blocks)

inline void __syncthreads(SHIM_PLACE) { shim::at_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SHIM_PLACE) {
    shim::at_warp(mask, {file, line}, [](void *const *) {}, nullptr);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, SHIM_PLACE) {
    return shim::exchange(mask, value, (unsigned)lane, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, SHIM_PLACE) {
    return shim::exchange(mask, value, threadIdx.x % shim::WARP ^ (unsigned)lanes, {file, line});
}
inline void __threadfence() {}
inline int atomicAdd(int *address, int value) {
    const int old = *address;
    *address += value;
    return old;
}
inline double __ldcg(const double *address) { return *address; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }

typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
inline const char *cudaGetErrorString(cudaError_t) { return shim::machine().error.c_str(); }

// -- what the kernels call them (csrc/cuda/device.h) ---------------------------------------------------------------------

namespace pylo {

template <class T>
T &shared_memory() {
    static_assert(sizeof(T) <= shim::SHARED, "what every device has");
    return *(T *)shim::machine().shared.data();
}

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float from_bfloat16(uint16_t bits) { return shim::bfloat16(bits); }
inline uint16_t to_bfloat16(float x) { return (uint16_t)shim::to_bfloat16(x); }
inline float from_float16(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return (float)half;
}
inline uint16_t to_float16(float x) {
    const _Float16 half = (_Float16)x;
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline uint32_t pack_bfloat16(float low, float high) { return shim::to_bfloat16(high) << 16 | shim::to_bfloat16(low); }
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SHIM_PLACE) {
    const uint32_t b[2] = {b0, b1};
    shim::Mma operands = {d, a, b};
    shim::at_warp(0xFFFFFFFFu, {file, line}, shim::Mma::carry_out, &operands);
}
inline void load_matrices(uint32_t (&registers)[4], const void *row, SHIM_PLACE) {
    shim::LoadMatrices operands = {registers, row};
    shim::at_warp(0xFFFFFFFFu, {file, line}, shim::LoadMatrices::carry_out, &operands);
}
inline void forget_memory() {}
template <class T>
T *device(T *pointer) {
    return pointer;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
    shim::Machine &m = shim::machine();
    m.threads = threads;
    if (m.fibers.size() < m.threads) m.fibers.resize(m.threads);
    m.blocks = {blocks, 1, 1};
    m.kernel = [=] { kernel(arguments...); };
    m.error.clear();
    for (unsigned i = 0; i < m.blocks.x && m.error.empty(); ++i) {
        m.block.x = shim::in_order(m.seed, i, m.blocks.x);
        shim::run_block();
    }
    return m.error.empty() ? (int)cudaSuccess : (int)cudaErrorLaunchFailure;
}

}  // namespace pylo

// 0: blocks and threads in ascending order; 1: descending; else another order. Of this thread's later launches.
extern "C" __attribute__((visibility("default"), weak)) void shim_order(unsigned seed) { shim::machine().seed = seed; }
