/* plugins/cuda/cublaslt_proof.h - whether cuBLASLt does here what class P asks of it. */
#ifndef PLUGINS_CUDA_CUBLASLT_PROOF_H
#define PLUGINS_CUDA_CUBLASLT_PROOF_H

#include "plugins/cuda/cublaslt.h"

/* Rows of the proof; the room has space for them. */
#define CUDA_LT_PROOF_ROWS 320u

/* Multiplies random rows with the matrix: by the library together and in parts, whose bits must be
 * the same, and by product.cuh, within the tolerance. Writes room and inputs. 0: so it is; 1: it is
 * not, and why says it, or the log when a call has failed; -errno: the device fails. */
int cuda_lt_prove(struct cuda_context *c, const struct cuda_lt_room *room,
                  const struct cuda_inputs *inputs, struct cuda_lt_shape *shape,
                  const struct cuda_matrix *m, struct gqa_reason *why);

#endif
