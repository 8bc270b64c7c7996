/* tools/convert/convert.h - a checkpoint with fewer KV heads.
 *
 * Goes through the tensors in the order of the file, a row of every head of a group at a time. With
 * GROUP_SIMILAR query heads are moved beside those with which they are to share: rows of q, columns
 * of the output, sinks. That alone changes nothing of what the model computes. */
#ifndef TOOLS_CONVERT_CONVERT_H
#define TOOLS_CONVERT_CONVERT_H

#include "tools/convert/heads.h"

struct convert_options {
    uint32_t n_kv_heads; /* to be left */
    enum pool_kind pool;
    enum group_kind group;
    uint64_t seed; /* of POOL_RANDOM */
    /* All matrices are written as this; NULL: they keep their types, and what is pooled becomes F16
     * where its own cannot be written. */
    const struct fmt_type_info *type;
    void (*progress)(void *arg, uint64_t done_bytes, uint64_t total_bytes);
    void *progress_arg;
};

struct convert_layer {
    struct pool_loss k, v;
};

/* Writes the converted checkpoint to path. layers: (n_layers of the shape), filled.
 * -EINVAL, -ENOTSUP: it cannot be done right, and the sentence says why. */
int convert_checkpoint(const struct checkpoint *c, const char *path,
                       const struct convert_options *options, struct convert_layer *layers,
                       struct fmt_error *err);

#endif
