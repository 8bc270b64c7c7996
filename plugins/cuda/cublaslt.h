/* plugins/cuda/cublaslt.h - rows of prompts by cuBLASLt, where open() is asked for it.
 *
 *   cublaslt=on     rows of class P meet matrices of F16 and BF16 (F32, which is F16 here) by it
 *   cublaslt=off    they do not
 *   cublaslt=auto   the default: off, until run-on-gpu.sh has told on which devices it wins
 *
 * The library is opened when a context wants it; without it, "on" is refused and nothing else
 * changes. It wants plain matrices: a product's weight is unpacked into scratch memory first, 4
 * bytes for each value, and the rows are rounded to halves. Then one call for each run of
 * neighbouring rows of class P. All other rows go the way of product.cuh and keep their bits.
 *
 * Numerics of class P are its own then: activations of one half where product.cuh has two, float32
 * sums. Relative to the root mean square of the results, roundings of the activations are 2^-9 /
 * sqrt(3) = 1.1e-3 for BF16 and an eighth for F16, and six times that at worst
 * (CUDA_LT_TOLERANCE_*). The program's numerics have the library's version in them.
 *
 * How many rows a call has must not change a row's bits, and it takes no matter how many, since
 * "from 256 on" would be a bit that depends on chunks. cuBLASLt promises nothing of the kind. So a
 * shape has one algorithm for all numbers of rows, without split sums, and before a shape is used
 * it is proven on the device (cublaslt_proof.h): rows together and in parts give the same bits, and
 * product.cuh's results within the tolerance. A shape that fails, then or in a step, is logged and
 * multiplied by product.cuh from there on. */
#ifndef PLUGINS_CUDA_CUBLASLT_H
#define PLUGINS_CUDA_CUBLASLT_H

#include "plugins/cuda/products.h"

/* The number of rows that algorithms are chosen for. Unmeasured: prompts come in chunks of 512 to
 * some thousands. */
#define CUDA_LT_ROWS_TYPICAL 2048u
/* What the library is lent; NVIDIA advises so much for Hopper. */
#define CUDA_LT_WORKSPACE_BYTES (32u << 20)

#define CUDA_LT_TOLERANCE_BF16 1e-2f
#define CUDA_LT_TOLERANCE_F16  1.5e-3f

/* A program's numerics are its own version plus so many times the library's. */
#define CUDA_LT_NUMERICS 100u

enum cuda_lt_wish { CUDA_LT_AUTO, CUDA_LT_OFF, CUDA_LT_ON };

/* The library, of a context. */
struct cuda_lt;
/* A type and two dimensions, and whether and how the library multiplies them; the library's. */
struct cuda_lt_shape;

/* Scratch memory of a program's products. */
struct cuda_lt_room {
    struct cuda_buffer weight;    /* (n_outputs, n_inputs) halves: the largest */
    struct cuda_buffer rows;      /* (max rows, n_inputs) halves */
    struct cuda_buffer scales;    /* (max rows) */
    struct cuda_buffer workspace; /* CUDA_LT_WORKSPACE_BYTES */
};

/* Rows of a product: float32, `stride` floats apart. */
struct cuda_lt_rows {
    const float *src; /* (n_rows, n_inputs), on the device */
    uint64_t src_stride;
    uint32_t n_rows;
};

/* -ENOTSUP where this was built without its header, -ENODEV where there is no library or it cannot
 * be used; reason says so. */
int cuda_lt_create(struct cuda_context *c, struct cuda_lt **ret, struct gqa_reason *reason);
void cuda_lt_destroy(struct cuda_lt *lt);
/* As cublasLtGetVersion() has it: 10000 times the major version and so on. */
uint32_t cuda_lt_version(const struct cuda_lt *lt);

/* Room for a matrix and so many rows of it; call it for all before the first product. Nothing for
 * types that the library does not multiply. */
int cuda_lt_reserve(struct cuda_context *c, struct cuda_lt_room *room, const struct cuda_matrix *m,
                    uint32_t max_rows);
void cuda_lt_room_finish(struct cuda_context *c, struct cuda_lt_room *room);

/* The shape of a matrix whose results are dst_stride floats apart, from an address that is a
 * multiple of 16; NULL: it is not for the library. Proven when it is asked for first: room and
 * inputs, which are reserved, are written. 0, or -errno where the device fails. */
int cuda_lt_find(struct cuda_context *c, const struct cuda_lt_room *room,
                 const struct cuda_inputs *inputs, const struct cuda_matrix *m, uint64_t dst_stride,
                 struct cuda_lt_shape **ret);

/* Rounds rows to a kind's halves, for the products that follow. */
int cuda_lt_round(struct cuda_context *c, const struct cuda_lt_room *room,
                  enum cuda_input_kind kind, uint32_t n_inputs, const struct cuda_lt_rows *rows);
/* dst (n_rows, outputs of m), dst_stride apart = the rounded rows x m^T + bias. 1: the library has
 * failed, which is logged once; from now on the shape is not multiplied by it. */
int cuda_lt_multiply(struct cuda_context *c, const struct cuda_lt_room *room,
                     struct cuda_lt_shape *shape, const struct cuda_matrix *m, uint32_t n_rows,
                     float *dst, uint64_t dst_stride);
/* Whether it still is. */
bool cuda_lt_works(const struct cuda_lt_shape *shape);

#endif
