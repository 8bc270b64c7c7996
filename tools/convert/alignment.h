/* tools/convert/alignment.h - rotations that bring the heads of a group together before they are
 * pooled, without changing what the model computes.
 *
 * Heads are comparable only up to a rotation (arXiv 2412.20677): V of a head may be turned by any
 * orthogonal q when the output's columns are turned with it; K after RoPE by an angle in each pair
 * of dimensions that RoPE turns, when the queries are turned with it. Each head of a group is
 * turned towards the first one, by what they made of a calibration text, then towards the group's
 * mean, again and again until nothing is gained. (From the mean of heads as they are, as the paper
 * begins, the rounds can end where heads that are turned copies of one are still apart.) */
#ifndef TOOLS_CONVERT_ALIGNMENT_H
#define TOOLS_CONVERT_ALIGNMENT_H

#include "tools/convert/calibration.h"
#include "tools/convert/heads.h"

#define ALIGN_ROUNDS_MAX 100
#define ALIGN_GAIN_LEAST 1e-5

enum align_parts { ALIGN_K = 1, ALIGN_V = 2 };

/* Of one layer. */
struct alignment {
    const struct ck_shape *shape;
    unsigned parts;
    double *v;      /* (n_kv_heads, v_dim, v_dim): a head's q, v becomes v q */
    double *angles; /* (n_kv_heads, n_rot / 2): of pairs of k and of its queries */
    /* What the mean loses of the text's K and V: of heads as they were, and as they are turned. */
    struct pool_loss k_loss_before, k_loss, v_loss_before, v_loss;
};

/* Whether K can be turned: the pairs that RoPE turns must be known, and no norm may stand between
 * the projection and them. -ENOTSUP. */
int alignment_check(const struct checkpoint *c, unsigned parts, struct fmt_error *err);

/* Finds the rotations of a layer for given groups. */
int alignment_init(struct alignment *a, const struct calibration *cal, const struct ck_shape *shape,
                   uint32_t layer, unsigned parts, const struct head_groups *groups,
                   struct fmt_error *err);
void alignment_finish(struct alignment *a); /* zeroed is legal */

/* How much heads have in common once they are aligned with each other, pair by pair: gram
 * (n_kv_heads, n_kv_heads), K and V with equal weight. */
int alignment_gram(const struct calibration *cal, const struct ck_shape *shape, uint32_t layer,
                   unsigned parts, double *gram, struct fmt_error *err);

/* Turns a tensor of the layer in place: q, k, v, qkv or output, matrix or bias. values: (n_rows,
 * row_values) of t. -ENOMEM. */
int alignment_apply(const struct alignment *a, const struct ck_tensor *t, float *values,
                    struct fmt_error *err);

#endif
