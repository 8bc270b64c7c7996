#include "tools/convert/alignment.h"

#include "tools/convert/polar.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

int alignment_check(const struct checkpoint *c, unsigned parts, struct fmt_error *err)
{
    if (!(parts & ALIGN_K)) {
        return 0;
    }
    for (uint32_t layer = 0; layer < c->shape.n_layers; layer++) {
        const struct ck_tensor *norm = checkpoint_find(c, CK_K_NORM, layer, false);
        if (norm != NULL) {
            return fmt_fail(err, -ENOTSUP,
                            "tensor %s: its gains differ from dimension to dimension, so that K "
                            "cannot be turned without changing the model (--align v leaves it)",
                            norm->name);
        }
    }
    if (c->shape.cache_pairs == CK_PAIRS_UNKNOWN) {
        return fmt_fail(err, -ENOTSUP,
                        "which dimensions of K RoPE turns together is not known of %s models "
                        "(--align v leaves K)",
                        c->shape.architecture);
    }
    return 0;
}

/* The two dimensions of a pair of the calibration's K. */
static void pair_dims(const struct ck_shape *s, uint32_t pair, uint32_t *ret_a, uint32_t *ret_b)
{
    bool halves = s->cache_pairs == CK_PAIRS_HALVES;
    *ret_a = halves ? pair : 2 * pair;
    *ret_b = halves ? pair + s->n_rot / 2 : 2 * pair + 1;
}

/* ---- finding the rotations --------------------------------------------------------------- */

/* What is needed while one layer is aligned; all heads' values of K or of V. */
struct work {
    uint32_t n_tokens, dim;
    float *values;  /* (n_kv_heads, n_tokens, dim) */
    float *turned;  /* (n_tokens, dim): one head's, rotated */
    double *mean;   /* (n_tokens, dim) */
    double *cross;  /* (dim, dim) */
    double *room;   /* (3, dim, dim) */
    double *result; /* (dim, dim) */
};

static void work_finish(struct work *w)
{
    free(w->values);
    free(w->turned);
    free(w->mean);
    free(w->cross);
    free(w->room);
    free(w->result);
}

static int work_init(struct work *w, const struct calibration *cal, const struct ck_shape *s,
                     uint32_t layer, enum ck_role role, struct fmt_error *err)
{
    const uint32_t dim = role == CK_K ? s->k_dim : s->v_dim;
    const size_t n = (size_t)calibration_n_tokens(cal) * dim, square = (size_t)dim * dim;
    *w = (struct work){.n_tokens = calibration_n_tokens(cal), .dim = dim};
    w->values = malloc(n * s->n_kv_heads * sizeof(float));
    w->turned = malloc(n * sizeof(float));
    w->mean = malloc(n * sizeof(double));
    w->cross = malloc(square * sizeof(double));
    w->room = malloc(3 * square * sizeof(double));
    w->result = malloc(square * sizeof(double));
    if (w->values == NULL || w->turned == NULL || w->mean == NULL || w->cross == NULL ||
        w->room == NULL || w->result == NULL) {
        work_finish(w);
        return fmt_fail(err, -ENOMEM, "out of memory");
    }
    for (uint32_t h = 0; h < s->n_kv_heads; h++) {
        calibration_head(cal, layer, role, h, w->values + h * n);
    }
    return 0;
}

static const float *head_values(const struct work *w, uint32_t head)
{
    return w->values + (size_t)head * w->n_tokens * w->dim;
}

/* turned = values of the head times q (dim, dim). */
static void turn_v(const struct work *w, const float *values, const double *q)
{
    for (uint32_t t = 0; t < w->n_tokens; t++) {
        for (uint32_t i = 0; i < w->dim; i++) {
            double sum = 0;
            for (uint32_t m = 0; m < w->dim; m++) {
                sum += (double)values[t * w->dim + m] * q[m * w->dim + i];
            }
            w->turned[t * w->dim + i] = (float)sum;
        }
    }
}

/* turned = values of the head, each pair turned by its angle. */
static void turn_k(const struct work *w, const struct ck_shape *s, const float *values,
                   const double *angles)
{
    memcpy(w->turned, values, (size_t)w->n_tokens * w->dim * sizeof(float));
    for (uint32_t pair = 0; pair < s->n_rot / 2; pair++) {
        const double c = cos(angles[pair]), sine = sin(angles[pair]);
        uint32_t a, b;
        pair_dims(s, pair, &a, &b);
        for (uint32_t t = 0; t < w->n_tokens; t++) {
            const float *x = values + (size_t)t * w->dim;
            w->turned[t * w->dim + a] = (float)(c * x[a] - sine * x[b]);
            w->turned[t * w->dim + b] = (float)(sine * x[a] + c * x[b]);
        }
    }
}

/* cross = x^T y, both (n_tokens, dim). */
static void cross_products(const struct work *w, const float *x, const double *y)
{
    memset(w->cross, 0, (size_t)w->dim * w->dim * sizeof(double));
    for (uint32_t t = 0; t < w->n_tokens; t++) {
        for (uint32_t i = 0; i < w->dim; i++) {
            const double value = x[t * w->dim + i];
            for (uint32_t j = 0; j < w->dim; j++) {
                w->cross[i * w->dim + j] += value * y[t * w->dim + j];
            }
        }
    }
}

/* The angle by which the pair of x is to be turned to come nearest to y's: with x and y as complex
 * numbers, that of the sum of conj(x) y. Returns the sum's magnitude. */
static double pair_angle(const struct work *w, const float *x, const double *y, uint32_t a,
                         uint32_t b, double *ret)
{
    double along = 0, across = 0;
    for (uint32_t t = 0; t < w->n_tokens; t++) {
        const float *u = x + (size_t)t * w->dim;
        const double *v = y + (size_t)t * w->dim;
        along += u[a] * v[a] + u[b] * v[b];
        across += u[a] * v[b] - u[b] * v[a];
    }
    *ret = atan2(across, along);
    return hypot(along, across);
}

/* Where the present rotation of a head puts its values. */
static void turn(const struct alignment *al, const struct work *w, enum ck_role role, uint32_t head)
{
    const struct ck_shape *s = al->shape;
    if (role == CK_V) {
        turn_v(w, head_values(w, head), al->v + (size_t)head * w->dim * w->dim);
    } else {
        turn_k(w, s, head_values(w, head), al->angles + (size_t)head * (s->n_rot / 2));
    }
}

/* Mean of the group's turned heads; returns the sum of its squares: the larger, the nearer they
 * are, since rotations leave the sum of the heads' own squares as it is. */
static double group_mean(const struct alignment *al, const struct work *w, enum ck_role role,
                         const struct head_groups *g, uint32_t group)
{
    const size_t n = (size_t)w->n_tokens * w->dim;
    double sum = 0;
    memset(w->mean, 0, n * sizeof(double));
    for (uint32_t m = 0; m < g->size; m++) {
        turn(al, w, role, g->order[group * g->size + m]);
        for (size_t i = 0; i < n; i++) {
            w->mean[i] += (double)w->turned[i] / g->size;
        }
    }
    for (size_t i = 0; i < n; i++) {
        sum += w->mean[i] * w->mean[i];
    }
    return sum;
}

/* Turns a head towards w->mean. */
static void align_head(const struct alignment *al, const struct work *w, enum ck_role role,
                       uint32_t head)
{
    const struct ck_shape *s = al->shape;
    const float *values = head_values(w, head);
    if (role == CK_V) {
        cross_products(w, values, w->mean);
        polar_rotation(w->cross, w->dim, w->room, al->v + (size_t)head * w->dim * w->dim);
        return;
    }
    for (uint32_t pair = 0; pair < s->n_rot / 2; pair++) {
        uint32_t a, b;
        pair_dims(s, pair, &a, &b);
        pair_angle(w, values, w->mean, a, b, al->angles + (size_t)head * (s->n_rot / 2) + pair);
    }
}

/* Returns the sum of the mean's squares at the end. */
static double align_group(const struct alignment *al, const struct work *w, enum ck_role role,
                          const struct head_groups *g, uint32_t group)
{
    const uint32_t *heads = g->order + group * g->size;
    const float *first = head_values(w, heads[0]);
    double before = 0;
    for (size_t i = 0; i < (size_t)w->n_tokens * w->dim; i++) {
        w->mean[i] = first[i];
    }
    for (int round = 0; round < ALIGN_ROUNDS_MAX; round++) {
        for (uint32_t m = 0; m < g->size; m++) {
            align_head(al, w, role, heads[m]);
        }
        double now = group_mean(al, w, role, g, group);
        if (now - before <= ALIGN_GAIN_LEAST * before) {
            return now;
        }
        before = now;
    }
    return before;
}

static double sum_of_squares(const struct work *w, uint32_t n_heads)
{
    double sum = 0;
    for (size_t i = 0; i < (size_t)n_heads * w->n_tokens * w->dim; i++) {
        sum += (double)w->values[i] * w->values[i];
    }
    return sum;
}

/* turned: whether this part is to be aligned; what is lost is measured in either case. */
static int align_role(struct alignment *al, const struct calibration *cal, uint32_t layer,
                      enum ck_role role, bool turned, const struct head_groups *g,
                      struct pool_loss *ret_before, struct pool_loss *ret, struct fmt_error *err)
{
    struct work w;
    int rc = work_init(&w, cal, al->shape, layer, role, err);
    if (rc < 0) {
        return rc;
    }
    double total = sum_of_squares(&w, g->n_heads);
    *ret_before = *ret = (struct pool_loss){total, total};
    for (uint32_t group = 0; group < g->n_groups; group++) {
        double as_it_was = group_mean(al, &w, role, g, group);
        double as_it_is = turned && g->size > 1 ? align_group(al, &w, role, g, group) : as_it_was;
        ret_before->lost -= g->size * as_it_was;
        ret->lost -= g->size * as_it_is;
    }
    work_finish(&w);
    return 0;
}

int alignment_init(struct alignment *a, const struct calibration *cal, const struct ck_shape *shape,
                   uint32_t layer, unsigned parts, const struct head_groups *groups,
                   struct fmt_error *err)
{
    const size_t square = (size_t)shape->v_dim * shape->v_dim;
    *a = (struct alignment){.shape = shape, .parts = parts};
    a->v = calloc(square * shape->n_kv_heads, sizeof(double));
    a->angles = calloc((size_t)shape->n_kv_heads * (shape->n_rot / 2) + 1, sizeof(double));
    int rc = a->v == NULL || a->angles == NULL ? fmt_fail(err, -ENOMEM, "out of memory") : 0;
    for (size_t i = 0; rc == 0 && i < square * shape->n_kv_heads; i++) {
        a->v[i] = i % square % (shape->v_dim + 1) == 0; /* identities */
    }
    if (rc == 0) {
        rc = align_role(a, cal, layer, CK_K, (parts & ALIGN_K) != 0, groups, &a->k_loss_before,
                        &a->k_loss, err);
    }
    if (rc == 0) {
        rc = align_role(a, cal, layer, CK_V, (parts & ALIGN_V) != 0, groups, &a->v_loss_before,
                        &a->v_loss, err);
    }
    if (rc < 0) {
        alignment_finish(a);
    }
    return rc;
}

void alignment_finish(struct alignment *a)
{
    free(a->v);
    free(a->angles);
    memset(a, 0, sizeof(*a));
}

/* ---- which heads are alike --------------------------------------------------------------- */

/* What head x has in common with head y (as doubles in w->mean) when it is turned towards it. */
static double common(const struct work *w, const struct ck_shape *s, enum ck_role role,
                     const float *x)
{
    double sum = 0, angle;
    if (role == CK_V) {
        cross_products(w, x, w->mean);
        return polar_rotation(w->cross, w->dim, w->room, w->result);
    }
    for (uint32_t pair = 0; pair < s->n_rot / 2; pair++) {
        uint32_t a, b;
        pair_dims(s, pair, &a, &b);
        sum += pair_angle(w, x, w->mean, a, b, &angle);
    }
    for (uint32_t d = s->n_rot; d < w->dim; d++) { /* these stay as they are */
        for (uint32_t t = 0; t < w->n_tokens; t++) {
            sum += x[t * w->dim + d] * w->mean[t * w->dim + d];
        }
    }
    return sum;
}

static int add_gram(const struct calibration *cal, const struct ck_shape *s, uint32_t layer,
                    enum ck_role role, double *gram, struct fmt_error *err)
{
    const uint32_t n = s->n_kv_heads;
    struct work w;
    double trace = 0;
    int rc = work_init(&w, cal, s, layer, role, err);
    if (rc < 0) {
        return rc;
    }
    const size_t n_values = (size_t)w.n_tokens * w.dim;
    for (size_t i = 0; i < n_values * n; i++) {
        trace += (double)w.values[i] * w.values[i];
    }
    for (uint32_t y = 0; y < n; y++) {
        for (size_t i = 0; i < n_values; i++) {
            w.mean[i] = head_values(&w, y)[i];
        }
        for (uint32_t x = 0; x <= y; x++) {
            double value = trace > 0 ? common(&w, s, role, head_values(&w, x)) / trace : 0;
            gram[x * n + y] += value;
            gram[y * n + x] = gram[x * n + y];
        }
    }
    work_finish(&w);
    return 0;
}

int alignment_gram(const struct calibration *cal, const struct ck_shape *shape, uint32_t layer,
                   unsigned parts, double *gram, struct fmt_error *err)
{
    int rc = 0;
    memset(gram, 0, (size_t)shape->n_kv_heads * shape->n_kv_heads * sizeof(*gram));
    if (parts & ALIGN_K) {
        rc = add_gram(cal, shape, layer, CK_K, gram, err);
    }
    return rc == 0 && (parts & ALIGN_V) ? add_gram(cal, shape, layer, CK_V, gram, err) : rc;
}
