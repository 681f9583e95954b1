/* C interface of what the host does for the kernels on CUDA devices; structures and the order of the stages are those of
 * ../core/pylo.h. It is part of the CPU library and calls nothing of CUDA: kernels are launched by the caller.
 *
 * The table of tensors stays on the host and names addresses of the device. pylo_cuda_plan() turns it into a plan, once
 * for many steps: plain bytes that the caller copies to the device. pylo_cuda_launches_of() then tells which kernels a stage
 * launches. What changes from step to step are tables of pylo_step and pylo_stored, of which the caller keeps copies on the device
 * too.
 *
 * Every function returns a pylo_status; pylo_last_error() says why.
 */
#ifndef PYLO_CUDA_H
#define PYLO_CUDA_H

#include "../core/pylo.h"

#ifdef __cplusplus
extern "C" {
#endif

enum pylo_precision {
    PYLO_PRECISE = 0, /* networks on tensor cores where they are wide enough, each number as the sum of two bfloat16 */
    PYLO_EXACT = 1    /* networks in float32 throughout */
};

/* The stages. `collect` also does the work of `measure` if the rule asks for it. */
enum pylo_cuda_stage {
    PYLO_CUDA_COLLECT = 0,
    PYLO_CUDA_PREPARE = 1,
    PYLO_CUDA_DESCRIBE = 2,
    PYLO_CUDA_ADVANCE = 3, /* of all rules: state that is not in float32 moves on here and nowhere else */
    PYLO_CUDA_APPLY = 4
};

typedef struct pylo_cuda_call {
    uint32_t abi_version; /* PYLO_ABI_VERSION */
    uint32_t size;        /* sizeof(pylo_cuda_call) */
    const void *plan;         /* on the host, as pylo_cuda_plan() wrote it */
    const void *device_plan;  /* a copy, aligned to 16 bytes */
    const pylo_step *steps;   /* on the host, one per tensor: what is checked */
    const pylo_step *device_steps; /* a copy: what kernels read */
    const pylo_stored *stored;     /* likewise, whatever state is stored in */
    const pylo_stored *device_stored;
    double *grad_squares;     /* as in pylo_call, on the device */
    void *workspace;          /* on the device, aligned to 16 bytes; zeroed before the first stage, and then left alone */
    int64_t workspace_bytes;
    int32_t stage;
    int32_t precision;
} pylo_cuda_call;

#define PYLO_CUDA_MOST_KERNELS 9
#define PYLO_CUDA_ARGUMENTS 256

/* A kernel to be launched, in one dimension, without dynamic shared memory. */
typedef struct pylo_cuda_launch {
    const char *kernel; /* the name in kernels.inc; the function is called pylo_<kernel> */
    uint32_t blocks, threads;
    uint64_t arguments[PYLO_CUDA_ARGUMENTS / 8]; /* these bytes are its one parameter */
} pylo_cuda_launch;

typedef struct pylo_cuda_kernels {
    const char *name[PYLO_CUDA_MOST_KERNELS];
    int64_t count;
} pylo_cuda_kernels;

/* Validate rules and table as pylo_check() does, and tell the sizes of plan and workspace. Of `call` only rules, tensors and
 * their counts are read. */
PYLO_API int32_t pylo_cuda_check(const pylo_call *call, int64_t *plan_bytes, int64_t *workspace_bytes);

/* Write the plan of a table that pylo_cuda_check() passes; `plan` is aligned to 16 bytes. */
PYLO_API int32_t pylo_cuda_plan(const pylo_call *call, void *plan, int64_t plan_bytes);

/* The kernels that stages of one of a call's rules may launch, by their names, for who loads them beforehand. */
PYLO_API int32_t pylo_cuda_kernels_of(const pylo_call *call, int64_t rule, int32_t precision, pylo_cuda_kernels *kernels);

/* What a stage launches, one after the other: two kernels for collect, one for each of the others, however many tensors there
 * are; none where there is nothing to do. Those but collect's are one for every rule that has the stage, and apply's one more
 * for all that needs no network: Adam's steps, whatever their rules, and directions that are complete. So there is room for
 * all in rule_count + 1. Kernels allocate nothing and wait for nothing, so launches may be captured in a graph. */
PYLO_API int32_t pylo_cuda_launches_of(const pylo_cuda_call *call, pylo_cuda_launch *launches, int64_t room, int64_t *count);

#ifdef __cplusplus
}
#endif
#endif
