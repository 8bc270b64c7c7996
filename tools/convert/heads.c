#include "tools/convert/heads.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void head_groups_neighbour(struct head_groups *g, uint32_t n_heads, uint32_t n_groups)
{
    *g = (struct head_groups){n_heads, n_groups, n_heads / n_groups, {0}};
    for (uint32_t h = 0; h < n_heads; h++) {
        g->order[h] = h;
    }
}

bool head_groups_in_order(const struct head_groups *g)
{
    for (uint32_t h = 0; h < g->n_heads; h++) {
        if (g->order[h] != h) {
            return false;
        }
    }
    return true;
}

/* ---- grouping ---------------------------------------------------------------------------- */

void heads_gram(double *gram, uint32_t n_heads, const float *const *rows, size_t n)
{
    for (uint32_t a = 0; a < n_heads; a++) {
        for (uint32_t b = a; b < n_heads; b++) {
            double sum = 0;
            for (size_t i = 0; i < n; i++) {
                sum += (double)rows[a][i] * rows[b][i];
            }
            gram[a * n_heads + b] += sum;
            gram[b * n_heads + a] = gram[a * n_heads + b];
        }
    }
}

/* How much the head has in common with a group: the sum of its products with the members. */
static double affinity(const struct head_groups *g, const double *gram, uint32_t group,
                       uint32_t head)
{
    double sum = 0;
    for (uint32_t i = 0; i < g->size; i++) {
        sum += gram[head * g->n_heads + g->order[group * g->size + i]];
    }
    return sum;
}

/* What the sum of squared distances gets smaller by when places a and b, of two groups, change
 * their heads. That sum is the trace of gram less, for every group, the sum of its members'
 * products divided by its size. */
static double exchange_gain(const struct head_groups *g, const double *gram, uint32_t a, uint32_t b)
{
    uint32_t x = g->order[a], y = g->order[b];
    double xx = gram[x * g->n_heads + x], yy = gram[y * g->n_heads + y];
    double xy = gram[x * g->n_heads + y];
    double leave = affinity(g, gram, a / g->size, x) + affinity(g, gram, b / g->size, y);
    double join = affinity(g, gram, a / g->size, y) + affinity(g, gram, b / g->size, x);
    /* leave counts xx and yy once, join counts xy once for either: sums over pairs follow. */
    return (2 * (join - 2 * xy) - 2 * (leave - xx - yy)) / g->size;
}

static int compare_heads(const void *a, const void *b)
{
    const uint32_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static void sort_groups(struct head_groups *g)
{
    for (uint32_t i = 0; i < g->n_groups; i++) {
        qsort(g->order + i * g->size, g->size, sizeof(*g->order), compare_heads);
    }
    /* Groups as wholes, by their first head. */
    qsort(g->order, g->n_groups, g->size * sizeof(*g->order), compare_heads);
}

void head_groups_similar(struct head_groups *g, uint32_t n_heads, uint32_t n_groups,
                         const double *gram)
{
    head_groups_neighbour(g, n_heads, n_groups);
    double trace = 0;
    for (uint32_t h = 0; h < n_heads; h++) {
        trace += gram[h * n_heads + h];
    }
    const double least = 1e-9 * trace; /* of rounding, which must not go round in circles */
    for (double best = least; best >= least && best > 0;) {
        uint32_t best_a = 0, best_b = 0;
        best = 0;
        for (uint32_t a = 0; a < n_heads; a++) {
            for (uint32_t b = (a / g->size + 1) * g->size; b < n_heads; b++) {
                double gain = exchange_gain(g, gram, a, b);
                if (gain > best) {
                    best = gain;
                    best_a = a;
                    best_b = b;
                }
            }
        }
        if (best >= least && best > 0) {
            uint32_t head = g->order[best_a];
            g->order[best_a] = g->order[best_b];
            g->order[best_b] = head;
        }
    }
    sort_groups(g);
}

/* ---- pooling ----------------------------------------------------------------------------- */

double pool_loss_share(const struct pool_loss *l)
{
    return l->total > 0 ? l->lost / l->total : 0;
}

static uint64_t next_random(struct pool_random *r)
{
    uint64_t z = (r->state += 0x9e3779b97f4a7c15u); /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

struct pool_random pool_random_of(uint64_t seed, uint32_t layer, enum ck_role role)
{
    struct pool_random r = {seed};
    r.state = next_random(&r) ^ ((uint64_t)layer << 8 | (uint64_t)role);
    return r;
}

/* Box and Muller: (0, 1] and [0, 1) to a normal deviate. */
static double normal(struct pool_random *r)
{
    double u = ((double)(next_random(r) >> 11) + 1) * 0x1p-53;
    double v = (double)(next_random(r) >> 11) * 0x1p-53;
    return sqrt(-2 * log(u)) * cos(2 * M_PI * v);
}

void pool_rows(enum pool_kind kind, const float *const *members, uint32_t n_members, size_t n,
               double deviation, struct pool_random *random, float *ret, struct pool_loss *loss)
{
    for (size_t i = 0; i < n; i++) {
        double value = members[0][i];
        if (kind == POOL_MEAN) {
            for (uint32_t m = 1; m < n_members; m++) {
                value += members[m][i];
            }
            value /= n_members;
        } else if (kind == POOL_RANDOM) {
            value = deviation * normal(random);
        }
        ret[i] = (float)value;
        for (uint32_t m = 0; m < n_members; m++) {
            double x = members[m][i], gone = x - (double)ret[i];
            loss->total += x * x;
            loss->lost += gone * gone;
        }
    }
}
