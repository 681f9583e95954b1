/* C interface of the kernels for CUDA devices; structures and the order of the stages are those of ../core/pylo.h.
 *
 * The table of tensors stays on the host and names addresses of the device. pylo_cuda_plan() turns it into a plan, once
 * for many steps: plain bytes that the caller copies to the device. A stage takes the plan from both places and only
 * launches kernels: it allocates nothing, copies nothing and waits for nothing, so it may be captured in a graph. What
 * changes from step to step is a table of pylo_step, of which the caller keeps a copy on the device too.
 *
 * Every function returns a pylo_status or PYLO_DEVICE_ERROR; pylo_cuda_last_error() says why.
 */
#ifndef PYLO_CUDA_H
#define PYLO_CUDA_H

#include "../core/pylo.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PYLO_DEVICE_ERROR 100 /* CUDA refused a launch; what was launched before may have changed memory */

enum pylo_precision {
    PYLO_PRECISE = 0, /* networks on tensor cores where they are wide enough, each number as the sum of two bfloat16 */
    PYLO_EXACT = 1    /* networks in float32 throughout */
};

typedef struct pylo_cuda_call {
    uint32_t abi_version; /* PYLO_ABI_VERSION */
    uint32_t size;        /* sizeof(pylo_cuda_call) */
    const void *plan;         /* on the host, as pylo_cuda_plan() wrote it */
    const void *device_plan;  /* a copy, aligned to 16 bytes */
    const pylo_step *steps;   /* on the host, one per tensor: what is checked */
    const pylo_step *device_steps; /* a copy: what kernels read */
    double *grad_squares;     /* as in pylo_call, on the device */
    void *workspace;          /* on the device, aligned to 16 bytes; zeroed before the first stage, and then left alone */
    int64_t workspace_bytes;
    void *stream;             /* cudaStream_t */
    int32_t device;
    int32_t precision;
} pylo_cuda_call;

/* Message about the last failure in this thread; never null. */
PYLO_API const char *pylo_cuda_last_error(void);

PYLO_API uint32_t pylo_cuda_abi_version(void);

/* Validate rule and table as pylo_check() does, and tell the sizes of plan and workspace. Of `call` only the rule, the
 * tensors and their count are read. */
PYLO_API int32_t pylo_cuda_check(const pylo_call *call, int64_t *plan_bytes, int64_t *workspace_bytes);

/* Write the plan of a table that pylo_cuda_check() passes; `plan` is aligned to 16 bytes. */
PYLO_API int32_t pylo_cuda_plan(const pylo_call *call, void *plan, int64_t plan_bytes);

/* The stages. `collect` also does the work of `measure` if the rule asks for it. Two launches for collect, one for each
 * of the others, however many tensors there are. */
PYLO_API int32_t pylo_cuda_collect(const pylo_cuda_call *call);
PYLO_API int32_t pylo_cuda_prepare(const pylo_cuda_call *call);
PYLO_API int32_t pylo_cuda_describe(const pylo_cuda_call *call);
PYLO_API int32_t pylo_cuda_apply(const pylo_cuda_call *call);

#ifdef __cplusplus
}
#endif
#endif
