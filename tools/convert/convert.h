/* tools/convert/convert.h - a checkpoint with fewer KV heads.
 *
 * Goes through the tensors in the order of the file, a row of every head of a group at a time. With
 * GROUP_SIMILAR query heads are moved beside those with which they are to share: rows of q, columns
 * of the output, sinks. That alone, and alignment alone, change nothing of what is computed. */
#ifndef TOOLS_CONVERT_CONVERT_H
#define TOOLS_CONVERT_CONVERT_H

#include "tools/convert/alignment.h"

struct convert_options {
    uint32_t n_kv_heads; /* to be left */
    enum pool_kind pool;
    enum group_kind group;
    uint64_t seed; /* of POOL_RANDOM */
    /* Heads are turned towards their group's mean first, by what they made of a text: K, V or both
     * (enum align_parts). NULL: they are pooled as they are. */
    const struct calibration *calibration;
    unsigned align;
    bool keep_heads; /* only that: nothing is pooled, and the model computes what it did */
    /* All matrices are written as this; NULL: they keep their types, and what is pooled becomes F16
     * where its own cannot be written. */
    const struct fmt_type_info *type;
    void (*progress)(void *arg, uint64_t done_bytes, uint64_t total_bytes);
    void *progress_arg;
};

/* What is lost of the projections; with calibration, of the text's K and V instead, and what would
 * have been lost without alignment. */
struct convert_layer {
    struct pool_loss k, v, k_before, v_before;
};

/* Writes the converted checkpoint to path. layers: (n_layers of the shape), filled.
 * -EINVAL, -ENOTSUP: it cannot be done right, and the sentence says why. */
int convert_checkpoint(const struct checkpoint *c, const char *path,
                       const struct convert_options *options, struct convert_layer *layers,
                       struct fmt_error *err);

#endif
