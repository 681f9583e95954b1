/* C interface of the native kernels: one call per stage for all tensors of an optimizer step.
 *
 * The stages are those of the reference rule (docs/architecture.md); sums leave one stage and enter the next, so that
 * a sharded run can complete them in between:
 *
 *   collect   sums of squared gradients along the factored axes; sum of all squared gradients
 *   measure   sums over parameter and state as they are before the step, for rules that ask for them
 *   prepare   factored state and its inverse roots, from complete sums
 *   describe  sums of squared features; nothing is written but the sums
 *   advance   accumulators, of tensors whose state is not stored in float32; apply may do it instead
 *   apply     accumulators, but for those, and parameters, from complete sums; or the step, as a direction; or, of a
 *             direction that the caller has finished and scaled, parameters
 *
 * Tensors of all rules of a step are one table, and a stage passes over those whose rule has no use for it. A rule of one
 * layer is linear: its only layer makes the outputs of features.
 *
 * A rule without layers is Adam, and one of PYLO_NESTEROV layers is momentum: they need no sums of features, so there is
 * no prepare and no describe, and collect only sums all squared gradients.
 *
 * Every function returns a pylo_status and, unless it is PYLO_OK, has changed nothing; pylo_last_error() then says
 * which argument was wrong. All memory belongs to the caller. Structs have no padding; zero their reserved fields.
 */
#ifndef PYLO_H
#define PYLO_H

#include <stdint.h>

#if defined(__CUDACC_RTC__)
#define PYLO_API
#elif defined(_WIN32)
#define PYLO_API __declspec(dllexport)
#else
#define PYLO_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define PYLO_ABI_VERSION 11u
#define PYLO_MAX_RANK 6   /* axes of a record, after neighbours of equal role were merged */
#define PYLO_SLOTS 30     /* feature channels, see pylo_feature_name() */
#define PYLO_MAX_LAYERS 4 /* three hidden layers and the output; at least the output */
#define PYLO_MAX_WIDTH 64 /* units of a hidden layer */
#define PYLO_NESTEROV (-1) /* layers of a rule whose step is Nesterov's momentum */
#define PYLO_BLOCK 256 /* elements of a row with one scale, of state stored in PYLO_INT8 */
#define PYLO_TENSOR_SUMS 9 /* p^2, m (3), r, m^2 (3), r^2 of parameter, momenta and second moment */

enum pylo_status {
    PYLO_OK = 0,
    PYLO_WRONG_ABI = 1,
    PYLO_BAD_ARGUMENT = 2,
    PYLO_UNCHECKED = 3, /* the table is not the one that pylo_check() passed */
    PYLO_NO_SUCH_ISA = 4,
    PYLO_OUT_OF_MEMORY = 5
};

enum pylo_dtype { PYLO_FLOAT32 = 0, PYLO_FLOAT16 = 1, PYLO_BFLOAT16 = 2, PYLO_INT8 = 3 /* state only */ };

enum pylo_isa { PYLO_BEST = 0, PYLO_BASELINE = 1, PYLO_AVX2 = 2, PYLO_AVX512 = 3 };

enum pylo_flags { PYLO_ZERO_NONFINITE = 1 /* read gradients that are not finite, or larger than the limit, as 0 */ };

/* One box of one tensor: its buffers and axes. Fixed from step to step. Adam needs param, momentum[0] and rms only.
 *
 * Parameter, gradient and the parameter-shaped state share one dense layout: axes are listed from the slowest to the
 * fastest. Factored state belongs to the whole tensor; `row` has no d0 axis and `col` no d1 axis, and an element's
 * entry is offset + sum(index[a] * stride[a]) with stride 0 along the missing axis. A box may be empty, extent 0: then
 * its parameter-shaped buffers may be null, and only prepare has something to do.
 *
 * Of every buffer the table also says how many bytes there are. A caller takes that from the memory that it has, not
 * from the shape that the memory should have: pylo_check() compares the two. */
typedef struct pylo_tensor {
    void *param;
    float *momentum[3];   /* of the type that state_dtype says, as is rms; null if the network reads nothing of it */
    float *rms;
    float *diagonal[3];   /* full-size second moments of an unfactored tensor, else null */
    float *row, *col;     /* (3, row_numel) and (3, col_numel); null if unfactored, as are the next four */
    float *row_scale;     /* like row: written by prepare, read by describe and apply */
    float *col_scale;
    double *row_sums;     /* (row_numel): written by collect, read by prepare */
    double *col_sums;
    double *feature_sums; /* (norm_slices, PYLO_SLOTS): written by describe, read by apply */
    double *stat_squares; /* (norm_slices, PYLO_SLOTS): mean squares of row and column features, for apply; written by
                           * prepare if norm_slices is 1, else by the caller */
    double *tensor_sums;  /* (PYLO_TENSOR_SUMS), written by measure; null if rule.measures is 0 */
    void *direction;      /* null, or where apply leaves the step instead of updating the parameter */
    float *direction_scale; /* null, or (norm_slices): apply updates the parameter by direction_scale * direction and
                             * reads or writes nothing else */
    int64_t extent[PYLO_MAX_RANK];
    int64_t row_stride[PYLO_MAX_RANK];
    int64_t col_stride[PYLO_MAX_RANK];
    int64_t row_offset, col_offset;
    int64_t row_numel, col_numel;
    int64_t d0_extent, d1_extent; /* of the whole tensor */
    int64_t d1_row_stride;        /* distance of neighbours along d1 in row */
    int64_t numel;                /* of the whole tensor */
    int64_t norm_stride[PYLO_MAX_RANK]; /* features are normalised over the axes where this is 0; an element belongs to */
    int64_t norm_offset;                /* slice offset + sum(index[a] * stride[a]) */
    int64_t norm_slices;                /* of the whole tensor; 1 if it is normalised as one */
    int32_t rank;
    int32_t d0_axis, d1_axis; /* -1 if unfactored */
    int32_t param_dtype, direction_dtype;
    int32_t state_dtype; /* of momentum and rms: float32, or of a matrix bfloat16 or PYLO_INT8, see pylo_stored */
    int32_t rule;        /* its number among those of the call */
    int32_t reserved;
    int64_t param_bytes, momentum_bytes[3], rms_bytes, diagonal_bytes[3];
    int64_t row_bytes, col_bytes, row_scale_bytes, col_scale_bytes, row_sums_bytes, col_sums_bytes;
    int64_t feature_sums_bytes, stat_squares_bytes, tensor_sums_bytes, direction_bytes;
    int64_t direction_scale_bytes;
} pylo_tensor;

/* How the state of a pylo_tensor is stored whose state_dtype is not float32; all of it may change from step to step. The
 * box is then a run of elements of the whole tensor in row-major order, dense and in that order in memory. */
typedef struct pylo_stored {
    float *scale[4];        /* of momentum and rms, one for every block; null unless PYLO_INT8 */
    int64_t scale_bytes[4];
    int64_t first;          /* element of the whole tensor at which the box begins */
    int64_t row;            /* elements of a row of the box; its last block may be shorter */
    uint32_t noise[2][2];   /* keys of the noise by which momentum[0] and rms are rounded; and momentum[1] and [2] */
} pylo_stored;

/* What changes from step to step, one per pylo_tensor: param <- keep * param - scale * step. */
typedef struct pylo_step {
    const void *grad;
    const float *network; /* per layer: weights (inputs, outputs rounded up to 4), then biases; slots are inputs.
                           * Null for Adam */
    int64_t grad_bytes, network_bytes;
    float keep, scale;
    float step_mult;  /* factor on the step */
    float grad_scale; /* factor on the gradient: sign and clipping */
    float l2;         /* multiple of the parameter added to the gradient */
    float momentum_correction, rms_correction; /* divisors of Adam's averages: 1 - beta^t, or 1 for none */
    float momentum_weight; /* of PYLO_NESTEROV: weight of the gradient in momentum and, beside it, in the step, in (0, 1] */
    int32_t grad_dtype;
    int32_t flags;
} pylo_step;

/* The rule. An exponential moving average is  keep * old + weight * new. */
typedef struct pylo_rule {
    uint32_t features;               /* bit i: the network reads slot i */
    int32_t layers;                  /* weight matrices; 0 for Adam, or PYLO_NESTEROV */
    int32_t width[PYLO_MAX_LAYERS];  /* outputs of each; those of the last are direction, magnitude, ... */
    float momentum_keep[3], momentum_weight[3];
    float factored_keep[3], factored_weight[3];
    float rms_keep, rms_weight;
    float rms_eps;                   /* added to the second moment before its inverse root */
    float vector_momentum_eps;       /* added to diagonal before the inverse root that scales momentum */
    float norm_eps;                  /* added to the mean square of a feature */
    float exp_mult;                  /* step = direction * exp(magnitude * exp_mult) */
    float grad_clip;                 /* bound on gradient elements, infinity for none */
    float grad_limit;                /* largest gradient element that PYLO_ZERO_NONFINITE keeps */
    float adam_eps, adam_eps_root;   /* step = m / (sqrt(r + eps_root) + eps), m and r corrected */
    int32_t measures;                /* how many of the PYLO_TENSOR_SUMS measure makes: 1 or all, 0 if it is not called, as for
                                      * PYLO_NESTEROV */
} pylo_rule;

typedef struct pylo_call {
    uint32_t abi_version; /* PYLO_ABI_VERSION */
    uint32_t size;        /* sizeof(pylo_call) */
    const pylo_rule *rules;
    int64_t rule_count;
    const pylo_tensor *tensors;
    const pylo_step *steps;
    const pylo_stored *stored; /* one per tensor; may be null if all state is float32 */
    int64_t count;
    double *grad_squares; /* (count): written by collect, sums of squares of the gradients as they are stored */
    void *workspace;      /* aligned to 64 bytes */
    int64_t workspace_bytes;
    uint64_t token; /* from pylo_check() */
    int32_t threads;
    int32_t isa;
} pylo_call;

/* What is asked of torch and Python about tensors: a place in tensors' Python objects, and functions. Those of torch take
 * the address of that place, where its at::Tensor is, and but for the last two return 0 or an error. */
typedef struct pylo_torch {
    int64_t member; /* in bytes */
    int32_t (*data_ptr)(void *tensor, void **data);
    int32_t (*device_type)(void *tensor, int32_t *type);
    int32_t (*device_index)(void *tensor, int32_t *index);
    int32_t (*dtype)(void *tensor, int32_t *dtype);
    int32_t (*dim)(void *tensor, int64_t *rank);
    int32_t (*sizes)(void *tensor, int64_t **sizes);
    int32_t (*strides)(void *tensor, int64_t **strides);
    int32_t (*storage_size)(void *tensor, int64_t *bytes);
    int32_t (*storage_offset)(void *tensor, int64_t *elements);
    uint8_t (*is_neg)(const void *tensor); /* a bool */
    void (*bump_version)(const void *tensor);
    void *(*dict_get)(void *dict, void *key); /* PyDict_GetItem */
} pylo_torch;

/* Where a tensor is: its address, the Python object, a word that is equal for tensors of equal device, type, shape and
 * strides which both have memory or both have not and are lazily negated or not; and the storage that it is in. */
typedef struct pylo_memory {
    uint64_t address, object, format;
    int64_t storage_bytes, storage_offset; /* the latter in elements */
} pylo_memory;

PYLO_API uint32_t pylo_abi_version(void);

/* Of the next three the caller holds the interpreter's lock, and a failure leaves no message.
 *
 * Read where `count` tensors are, given as their Python objects; those before a failure are written. */
PYLO_API int32_t pylo_read_memory(const pylo_torch *torch, void *const *objects, pylo_memory *memory, int64_t count);

/* Whether (1 or 0) each of `count` dictionaries has the given object under the given name. */
PYLO_API int32_t pylo_has_entries(
    const pylo_torch *torch, void *const *owners, void *const *names, void *const *objects, int64_t count);

/* Tell autograd that tensors have been written to; those before a failure have been. */
PYLO_API int32_t pylo_raise_versions(const pylo_torch *torch, void *const *objects, int64_t count);

/* Message about the last failure in this thread; never null. */
PYLO_API const char *pylo_last_error(void);

/* Name of a feature channel ("momentum_over_rms"; channels of one feature share its name), null beyond PYLO_SLOTS. */
PYLO_API const char *pylo_feature_name(int32_t slot);

/* The instruction set in use for PYLO_BEST, and whether another is compiled in and runs on this machine. */
PYLO_API int32_t pylo_best_isa(void);
PYLO_API int32_t pylo_has_isa(int32_t isa);

/* Number of floats behind pylo_step.network; 0 if the geometry is not supported. */
PYLO_API int64_t pylo_network_floats(const pylo_rule *rule);

/* Validate rules and table: null, misaligned, overlapping and too small buffers, extents that do not fit. Ignores `steps`,
 * `stored`, `token` and the workspace. On success `token` receives what the stages ask for; it covers rules and table, so any change of
 * them needs another check. `workspace_bytes` receives what the stages need. */
PYLO_API int32_t pylo_check(const pylo_call *call, uint64_t *token, int64_t *workspace_bytes);

/* The stages. Results do not depend on `threads`. */
PYLO_API int32_t pylo_cpu_collect(const pylo_call *call);
PYLO_API int32_t pylo_cpu_measure(const pylo_call *call);
PYLO_API int32_t pylo_cpu_prepare(const pylo_call *call);
PYLO_API int32_t pylo_cpu_describe(const pylo_call *call);
PYLO_API int32_t pylo_cpu_advance(const pylo_call *call);
PYLO_API int32_t pylo_cpu_apply(const pylo_call *call);

/* Run a loop of nothing but independent multiply-adds in the registers of one thread and return how many it made: what
 * that takes tells what share of a core's arithmetic the stages reach. */
PYLO_API int64_t pylo_cpu_multiply_adds(int64_t rounds);

#ifdef __cplusplus
}
#endif
#endif
