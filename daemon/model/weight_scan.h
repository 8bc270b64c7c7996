/* daemon/model/weight_scan.h - weights that are no numbers, found while a file is read.
 *
 * One infinity or NaN among the weights makes every logit a NaN, long after it could be named. A
 * load reads every byte of a file once; the scan looks at the bytes as they pass. */
#ifndef DAEMON_MODEL_WEIGHT_SCAN_H
#define DAEMON_MODEL_WEIGHT_SCAN_H

#include "format/gguf.h"
#include "format/types.h"

struct weight_scan {
    const struct gguf *g;
    uint32_t file;
    const struct gguf_tensor **tensors; /* of this file, by their place in it */
    size_t n_tensors, next;             /* next: the first that has not passed whole */
    uint8_t carry[FMT_MAX_BLOCK_BYTES]; /* the start of a block whose end is still to come */
    size_t carry_bytes;
    struct fmt_error *err;
};

/* For one of the gguf's files. -ENOMEM. */
int weight_scan_init(struct weight_scan *s, const struct gguf *g, uint32_t file,
                     struct fmt_error *err);
void weight_scan_finish(struct weight_scan *s);

/* The file's next bytes, in order and without gaps, in pieces of any size. -EINVAL with a sentence
 * that names file, tensor and value. */
int weight_scan_bytes(struct weight_scan *s, uint64_t offset, const void *data, size_t bytes);

#endif
