#include "tools/convert/convert.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COPY_BYTES (4u << 20) /* written at a time of what stays */

struct conversion {
    const struct checkpoint *c;
    const struct convert_options *options;
    struct head_groups *groups;   /* (n_layers) */
    struct alignment *alignments; /* (n_layers), zeroed without calibration */
    struct ck_outcome *outcomes;
    struct convert_layer *layers;
    struct ck_output *out;
    struct fmt_error *err;
    float *rows;     /* (n_kv_heads, widest row): a row of every head */
    float *row;      /* (widest row): what is written */
    uint8_t *packed; /* the same in its type */
    uint64_t done, total;
};

/* Rows of a tensor that belong to KV heads: head h has rows [first + h * dim, + dim). */
struct section {
    uint64_t first, dim;
    enum ck_role role; /* CK_Q: its heads' rows move; CK_K, CK_V: they are pooled */
};

static uint32_t sections_of(const struct ck_shape *s, const struct ck_tensor *t,
                            struct section ret[3])
{
    const uint64_t q = (uint64_t)s->n_heads / s->n_kv_heads * s->k_dim;
    switch (t->role) {
    case CK_Q:
        ret[0] = (struct section){0, q, CK_Q};
        return 1;
    case CK_SINKS:
        ret[0] = (struct section){0, s->n_heads / s->n_kv_heads, CK_Q};
        return 1;
    case CK_K:
        ret[0] = (struct section){0, s->k_dim, CK_K};
        return 1;
    case CK_V:
        ret[0] = (struct section){0, s->v_dim, CK_V};
        return 1;
    case CK_QKV:
        ret[0] = (struct section){0, q, CK_Q};
        ret[1] = (struct section){q * s->n_kv_heads, s->k_dim, CK_K};
        ret[2] = (struct section){(q + s->k_dim) * s->n_kv_heads, s->v_dim, CK_V};
        return 3;
    default:
        return 0;
    }
}

/* ---- what becomes of every tensor -------------------------------------------------------- */

static bool is_pooled(const struct conversion *v, const struct ck_tensor *t)
{
    return (t->role == CK_K || t->role == CK_V || t->role == CK_QKV) && !v->options->keep_heads &&
           v->options->n_kv_heads != v->c->shape.n_kv_heads;
}

/* Whether its heads change places; those of K and V do so when they are pooled anyway. */
static bool is_moved(const struct conversion *v, const struct ck_tensor *t)
{
    bool of_heads = t->role != CK_OTHER && t->role != CK_K_NORM;
    return of_heads && !head_groups_in_order(&v->groups[t->layer]);
}

static bool is_turned(const struct conversion *v, const struct ck_tensor *t)
{
    const unsigned by_k = t->role == CK_Q || t->role == CK_K || t->role == CK_QKV ? ALIGN_K : 0;
    const unsigned by_v = t->role == CK_V || t->role == CK_OUT || t->role == CK_QKV ? ALIGN_V : 0;
    return v->options->calibration != NULL && (v->options->align & (by_k | by_v)) != 0 &&
           v->groups[t->layer].size > 1;
}

static bool is_rewritten(const struct conversion *v, const struct ck_tensor *t)
{
    return is_pooled(v, t) || is_moved(v, t) || is_turned(v, t);
}

static struct ck_outcome outcome_of(const struct conversion *v, const struct ck_tensor *t)
{
    const struct ck_shape *s = &v->c->shape;
    struct ck_outcome to = {t->type, t->n_rows};
    struct section sections[3];
    if (is_pooled(v, t)) {
        uint32_t n = sections_of(s, t, sections);
        for (uint32_t i = 0; i < n; i++) {
            if (sections[i].role != CK_Q) {
                to.n_rows -= sections[i].dim * (s->n_kv_heads - v->options->n_kv_heads);
            }
        }
    }
    const struct fmt_type_info *wanted = v->options->type;
    if (t->is_matrix && t->type != NULL && wanted != NULL && t->row_values % wanted->n_block == 0) {
        to.type = wanted;
    } else if (is_rewritten(v, t) && !v->c->container->can_write(t->type)) {
        to.type = fmt_type_info(FMT_TYPE_F16);
    }
    return to;
}

/* ---- groups of similar heads ------------------------------------------------------------- */

static void read_heads(const struct conversion *v, const struct ck_tensor *t,
                       const struct section *of, uint64_t i, const float **ret)
{
    for (uint32_t h = 0; h < v->c->shape.n_kv_heads; h++) {
        float *row = v->rows + h * t->row_values;
        ck_row(t, of->first + h * of->dim + i, row);
        ret[h] = row;
    }
}

/* Adds what K or V of a layer say about which heads are alike; either counts as a whole. */
static int add_gram(const struct conversion *v, uint32_t layer, enum ck_role role, double *sum)
{
    const uint32_t n = v->c->shape.n_kv_heads;
    const struct ck_tensor *t = checkpoint_find(v->c, CK_QKV, layer, true);
    t = t != NULL ? t : checkpoint_find(v->c, role, layer, true);
    const float *heads[CK_MAX_HEADS];
    struct section sections[3];
    double *gram = calloc((size_t)n * n, sizeof(*gram));
    if (gram == NULL) {
        return fmt_fail(v->err, -ENOMEM, "out of memory");
    }
    uint32_t n_sections = sections_of(&v->c->shape, t, sections);
    for (uint32_t k = 0; k < n_sections; k++) {
        for (uint64_t i = 0; sections[k].role == role && i < sections[k].dim; i++) {
            read_heads(v, t, &sections[k], i, heads);
            heads_gram(gram, n, heads, (size_t)t->row_values);
        }
    }
    double trace = 0;
    for (uint32_t h = 0; h < n; h++) {
        trace += gram[h * n + h];
    }
    for (size_t i = 0; trace > 0 && i < (size_t)n * n; i++) {
        sum[i] += gram[i] / trace;
    }
    free(gram);
    return 0;
}

static int choose_groups(struct conversion *v)
{
    const uint32_t n = v->c->shape.n_kv_heads;
    for (uint32_t layer = 0; layer < v->c->shape.n_layers; layer++) {
        struct head_groups *g = &v->groups[layer];
        head_groups_neighbour(g, n, v->options->n_kv_heads);
        if (v->options->group != GROUP_SIMILAR || g->size == 1) {
            continue;
        }
        double *gram = calloc((size_t)n * n, sizeof(*gram));
        int rc = gram == NULL ? fmt_fail(v->err, -ENOMEM, "out of memory") : 0;
        if (rc == 0 && v->options->calibration != NULL) {
            rc = alignment_gram(v->options->calibration, &v->c->shape, layer, v->options->align,
                                gram, v->err);
        } else if (rc == 0) {
            rc = add_gram(v, layer, CK_K, gram);
            rc = rc < 0 ? rc : add_gram(v, layer, CK_V, gram);
        }
        if (rc == 0) {
            head_groups_similar(g, n, v->options->n_kv_heads, gram);
        }
        free(gram);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

static int find_alignments(struct conversion *v)
{
    const struct convert_options *o = v->options;
    int rc = o->calibration != NULL ? alignment_check(v->c, o->align, v->err) : 0;
    for (uint32_t layer = 0; rc == 0 && o->calibration != NULL && layer < v->c->shape.n_layers;
         layer++) {
        struct alignment *a = &v->alignments[layer];
        rc = alignment_init(a, o->calibration, &v->c->shape, layer, o->align, &v->groups[layer],
                            v->err);
        if (rc == 0) {
            v->layers[layer] =
                (struct convert_layer){a->k_loss, a->v_loss, a->k_loss_before, a->v_loss_before};
        }
    }
    return rc;
}

/* ---- writing ----------------------------------------------------------------------------- */

static int put(struct conversion *v, const void *data, size_t bytes)
{
    return v->c->container->write(v->out, data, bytes, v->err);
}

static int put_row(struct conversion *v, const struct ck_tensor *t, const struct ck_outcome *to,
                   const float *row)
{
    to->type->quantise(row, v->packed, (size_t)t->row_values);
    return put(v, v->packed, (size_t)fmt_type_bytes(to->type, t->row_values));
}

static int put_as_it_is(struct conversion *v, const struct ck_tensor *t)
{
    int rc = 0;
    for (uint64_t at = 0; rc == 0 && at < t->bytes;) {
        size_t n = t->bytes - at < COPY_BYTES ? (size_t)(t->bytes - at) : COPY_BYTES;
        rc = put(v, t->data + at, n);
        at += n;
    }
    return rc;
}

/* The deviation of a section's values, which random ones are to have. */
static double deviation_of(struct conversion *v, const struct ck_tensor *t,
                           const struct section *of)
{
    double sum = 0;
    uint64_t n = of->dim * v->c->shape.n_kv_heads;
    for (uint64_t i = 0; i < n; i++) {
        ck_row(t, of->first + i, v->row);
        for (uint64_t k = 0; k < t->row_values; k++) {
            sum += (double)v->row[k] * v->row[k];
        }
    }
    return n > 0 ? sqrt(sum / (double)(n * t->row_values)) : 0;
}

static int put_pooled(struct conversion *v, const struct ck_tensor *t, const struct ck_outcome *to,
                      const struct section *of)
{
    const struct head_groups *g = &v->groups[t->layer];
    const enum pool_kind pool = v->options->pool;
    struct pool_random random = pool_random_of(v->options->seed, t->layer, of->role);
    double deviation = pool == POOL_RANDOM ? deviation_of(v, t, of) : 0;
    struct pool_loss no_loss = {0, 0};
    struct convert_layer *layer = &v->layers[t->layer];
    /* Biases are pooled, and not counted: they are no part of the matrices' variance. */
    bool counts = t->is_matrix && v->options->calibration == NULL;
    struct pool_loss *loss = !counts ? &no_loss : of->role == CK_K ? &layer->k : &layer->v;
    const float *members[CK_MAX_HEADS];
    int rc = 0;
    for (uint32_t group = 0; group < g->n_groups; group++) {
        for (uint64_t i = 0; rc == 0 && i < of->dim; i++) {
            for (uint32_t m = 0; m < g->size; m++) {
                float *row = v->rows + m * t->row_values;
                ck_row(t, of->first + g->order[group * g->size + m] * of->dim + i, row);
                members[m] = row;
            }
            pool_rows(pool, members, g->size, (size_t)t->row_values, deviation, &random, v->row,
                      loss);
            rc = put_row(v, t, to, v->row);
        }
    }
    return rc;
}

/* Rows as they are, head after head in the groups' order. */
static int put_moved(struct conversion *v, const struct ck_tensor *t, const struct ck_outcome *to,
                     const struct section *of)
{
    const struct head_groups *g = &v->groups[t->layer];
    const uint64_t row_bytes = t->bytes / t->n_rows;
    int rc = 0;
    for (uint32_t h = 0; h < g->n_heads; h++) {
        for (uint64_t i = 0; rc == 0 && i < of->dim; i++) {
            uint64_t row = of->first + g->order[h] * of->dim + i;
            if (to->type == t->type) {
                rc = put(v, t->data + row * row_bytes, (size_t)row_bytes);
            } else {
                ck_row(t, row, v->row);
                rc = put_row(v, t, to, v->row);
            }
        }
    }
    return rc;
}

/* Every row of the output's matrix, its columns in the groups' order. */
static int put_columns(struct conversion *v, const struct ck_tensor *t, const struct ck_outcome *to)
{
    const struct head_groups *g = &v->groups[t->layer];
    const uint64_t width = t->row_values / g->n_heads;
    int rc = 0;
    for (uint64_t row = 0; rc == 0 && row < t->n_rows; row++) {
        ck_row(t, row, v->rows);
        for (uint32_t h = 0; h < g->n_heads; h++) {
            memcpy(v->row + h * width, v->rows + g->order[h] * width, width * sizeof(float));
        }
        rc = put_row(v, t, to, v->row);
    }
    return rc;
}

static int put_rows(struct conversion *v, const struct ck_tensor *t, const struct ck_outcome *to)
{
    int rc = 0;
    for (uint64_t row = 0; rc == 0 && row < t->n_rows; row++) {
        ck_row(t, row, v->row);
        rc = put_row(v, t, to, v->row);
    }
    return rc;
}

static int put_heads(struct conversion *v, const struct ck_tensor *t, const struct ck_outcome *to)
{
    struct section sections[3];
    int rc = 0;
    if (t->role == CK_OUT && is_moved(v, t)) {
        return put_columns(v, t, to);
    }
    if (!is_pooled(v, t) && !is_moved(v, t)) {
        return to->type == t->type ? put_as_it_is(v, t) : put_rows(v, t, to);
    }
    uint32_t n = sections_of(&v->c->shape, t, sections);
    for (uint32_t i = 0; rc == 0 && i < n; i++) {
        bool moved = sections[i].role == CK_Q || !is_pooled(v, t);
        rc = moved ? put_moved(v, t, to, &sections[i]) : put_pooled(v, t, to, &sections[i]);
    }
    return rc;
}

/* Turned tensors are turned as a whole, in float32, and stand for the file's from then on. */
static int put_tensor(struct conversion *v, const struct ck_tensor *t, const struct ck_outcome *to)
{
    if (!is_turned(v, t)) {
        return put_heads(v, t, to);
    }
    struct ck_tensor turned = *t;
    float *values = NULL;
    if (t->n_rows <= SIZE_MAX / sizeof(float) / t->row_values) {
        values = malloc((size_t)(t->n_rows * t->row_values) * sizeof(float));
    }
    if (values == NULL) {
        return fmt_fail(v->err, -ENOMEM, "tensor %s: no memory to turn it", t->name);
    }
    for (uint64_t row = 0; row < t->n_rows; row++) {
        ck_row(t, row, values + row * t->row_values);
    }
    turned.type = fmt_type_info(FMT_TYPE_F32);
    turned.data = (const uint8_t *)values;
    turned.bytes = t->n_rows * t->row_values * sizeof(float);
    int rc = alignment_apply(&v->alignments[t->layer], t, values, v->err);
    rc = rc < 0 ? rc : put_heads(v, &turned, to);
    free(values);
    return rc;
}

/* ---- the whole --------------------------------------------------------------------------- */

static int check_options(const struct checkpoint *c, const struct convert_options *o,
                         struct fmt_error *err)
{
    const uint32_t n = c->shape.n_kv_heads;
    if (o->n_kv_heads < 1 || o->n_kv_heads > n || n % o->n_kv_heads != 0) {
        return fmt_fail(err, -EINVAL,
                        "%u KV heads cannot be made of the model's %u: groups must be of equal "
                        "size",
                        o->n_kv_heads, n);
    }
    if (c->shape.n_heads % n != 0) {
        return fmt_fail(err, -EINVAL, "%u query heads do not share %u KV heads evenly",
                        c->shape.n_heads, n);
    }
    if (o->type != NULL && !c->container->can_write(o->type)) {
        return fmt_fail(err, -ENOTSUP, "matrices of type %s are not written in this container",
                        o->type->name);
    }
    return 0;
}

static int allocate(struct conversion *v)
{
    const struct checkpoint *c = v->c;
    uint64_t widest = 1;
    for (size_t i = 0; i < c->n_tensors; i++) {
        widest = c->tensors[i].row_values > widest ? c->tensors[i].row_values : widest;
        v->total += c->tensors[i].bytes;
    }
    if (widest > SIZE_MAX / sizeof(float) / (c->shape.n_kv_heads + 1)) {
        return fmt_fail(v->err, -EFBIG, "rows of %" PRIu64 " values are too wide", widest);
    }
    v->groups = calloc(c->shape.n_layers, sizeof(*v->groups));
    v->alignments = calloc(c->shape.n_layers, sizeof(*v->alignments));
    v->outcomes = calloc(c->n_tensors + 1, sizeof(*v->outcomes));
    v->rows = malloc((size_t)widest * c->shape.n_kv_heads * sizeof(float));
    v->row = malloc((size_t)widest * sizeof(float));
    v->packed = malloc((size_t)widest * sizeof(float)); /* no type is wider */
    return v->groups == NULL || v->alignments == NULL || v->outcomes == NULL || v->rows == NULL ||
                   v->row == NULL || v->packed == NULL
               ? fmt_fail(v->err, -ENOMEM, "out of memory")
               : 0;
}

static int write_all(struct conversion *v, const char *path)
{
    static const char *const pool_names[] = {"mean", "first", "random"};
    const struct checkpoint *c = v->c;
    const struct convert_options *o = v->options;
    const bool same = o->keep_heads || c->shape.n_kv_heads == o->n_kv_heads;
    char how[160];
    snprintf(how, sizeof(how), "%u KV heads made %u by gqa-convert, --pool %s --group %s: %s",
             c->shape.n_kv_heads, same ? c->shape.n_kv_heads : o->n_kv_heads,
             o->calibration != NULL ? "aligned" : pool_names[o->pool],
             o->group == GROUP_SIMILAR ? "similar" : "neighbour",
             same ? "computes what it did" : "needs uptraining");
    struct ck_facts facts = {same ? c->shape.n_kv_heads : o->n_kv_heads, o->type, how};
    for (size_t i = 0; i < c->n_tensors; i++) {
        v->outcomes[i] = outcome_of(v, &c->tensors[i]);
    }
    int rc = c->container->begin(c, path, v->outcomes, &facts, &v->out, v->err);
    for (size_t i = 0; rc == 0 && i < c->n_tensors; i++) {
        const struct ck_tensor *t = &c->tensors[i];
        rc = put_tensor(v, t, &v->outcomes[i]);
        ck_tensor_release(t);
        v->done += t->bytes;
        if (v->options->progress != NULL) {
            v->options->progress(v->options->progress_arg, v->done, v->total);
        }
    }
    return rc < 0 ? rc : c->container->finish(v->out, v->err);
}

int convert_checkpoint(const struct checkpoint *c, const char *path,
                       const struct convert_options *options, struct convert_layer *layers,
                       struct fmt_error *err)
{
    struct conversion v = {.c = c, .options = options, .layers = layers, .err = err};
    int rc = check_options(c, options, err);
    rc = rc < 0 ? rc : checkpoint_check(c, err);
    rc = rc < 0 ? rc : allocate(&v);
    rc = rc < 0 ? rc : choose_groups(&v);
    rc = rc < 0 ? rc : find_alignments(&v);
    rc = rc < 0 ? rc : write_all(&v, path);
    c->container->destroy(v.out);
    for (uint32_t layer = 0; v.alignments != NULL && layer < c->shape.n_layers; layer++) {
        alignment_finish(&v.alignments[layer]);
    }
    free(v.alignments);
    free(v.groups);
    free(v.outcomes);
    free(v.rows);
    free(v.row);
    free(v.packed);
    return rc;
}
