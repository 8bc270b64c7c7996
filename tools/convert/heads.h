/* tools/convert/heads.h - which KV heads become one, and how their rows are pooled.
 *
 * A multi-head (or already grouped) layer has n_heads KV heads; n_groups of them are to be left,
 * each of n_heads / n_groups. After Ainslie et al. 2023 (arXiv 2305.13245), section 2.1: the mean
 * of a group's projections keeps most, one head of them less, random values least. */
#ifndef TOOLS_CONVERT_HEADS_H
#define TOOLS_CONVERT_HEADS_H

#include "tools/convert/checkpoint.h"

enum pool_kind { POOL_MEAN, POOL_FIRST, POOL_RANDOM };
enum group_kind {
    GROUP_NEIGHBOUR, /* heads that lie side by side */
    GROUP_SIMILAR,   /* heads whose projections differ least: the query heads move with them */
};

/* Group g holds heads order[g * size .. (g + 1) * size). */
struct head_groups {
    uint32_t n_heads, n_groups, size;
    uint32_t order[CK_MAX_HEADS]; /* a permutation of the heads */
};

void head_groups_neighbour(struct head_groups *g, uint32_t n_heads, uint32_t n_groups);

/* Whether the heads stay where they are. */
bool head_groups_in_order(const struct head_groups *g);

/* Squared distances that add up over rows: gram (n_heads, n_heads) += x x^T, for heads' rows
 * x (n_heads, n). */
void heads_gram(double *gram, uint32_t n_heads, const float *const *rows, size_t n);

/* Groups of equal size within which heads differ least: the sum of squared distances from their
 * mean is made smaller by exchanging two heads, from neighbours on, until no exchange helps. The
 * outcome is in canonical order, so that equal input gives equal groups. */
void head_groups_similar(struct head_groups *g, uint32_t n_heads, uint32_t n_groups,
                         const double *gram);

/* What pooling loses: squares of all values, and of their differences from what stands for them. */
struct pool_loss {
    double total, lost;
};
double pool_loss_share(const struct pool_loss *l); /* 0..; 0 where there was nothing */

/* Random numbers of a normal distribution; the same seed gives the same ones. */
struct pool_random {
    uint64_t state;
};
struct pool_random pool_random_of(uint64_t seed, uint32_t layer, enum ck_role role);

/* One row of a group from its members' rows (n_members, n). deviation: of POOL_RANDOM. */
void pool_rows(enum pool_kind kind, const float *const *members, uint32_t n_members, size_t n,
               double deviation, struct pool_random *random, float *ret, struct pool_loss *loss);

#endif
