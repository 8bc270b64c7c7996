/* tools/convert/alignment_apply.c - turning a layer's weights. */
#include "tools/convert/alignment.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Turns the pairs of one head's rows: rows (k_dim, n). */
static void turn_pairs(const struct ck_shape *s, const double *angles, float *rows, uint64_t n)
{
    const bool halves = s->rope_pairs == CK_PAIRS_HALVES;
    for (uint32_t pair = 0; pair < s->n_rot / 2; pair++) {
        const double c = cos(angles[pair]), sine = sin(angles[pair]);
        float *a = rows + (halves ? pair : 2 * pair) * n;
        float *b = rows + (halves ? pair + s->n_rot / 2 : 2 * pair + 1) * n;
        for (uint64_t i = 0; i < n; i++) {
            const double x = a[i], y = b[i];
            a[i] = (float)(c * x - sine * y);
            b[i] = (float)(sine * x + c * y);
        }
    }
}

/* rows (v_dim, n) become q^T rows. */
static void turn_rows(const double *q, uint32_t dim, float *rows, uint64_t n, double *column)
{
    for (uint64_t i = 0; i < n; i++) {
        for (uint32_t d = 0; d < dim; d++) {
            column[d] = 0;
            for (uint32_t m = 0; m < dim; m++) {
                column[d] += q[m * dim + d] * rows[m * n + i];
            }
        }
        for (uint32_t d = 0; d < dim; d++) {
            rows[d * n + i] = (float)column[d];
        }
    }
}

/* A piece of a row (dim) becomes piece q. */
static void turn_columns(const double *q, uint32_t dim, float *piece, double *column)
{
    memset(column, 0, dim * sizeof(*column));
    for (uint32_t m = 0; m < dim; m++) {
        for (uint32_t d = 0; d < dim; d++) {
            column[d] += piece[m] * q[m * dim + d];
        }
    }
    for (uint32_t d = 0; d < dim; d++) {
        piece[d] = (float)column[d];
    }
}

/* Rows of n_heads heads from values on, n_per_kv of which share a KV head. */
static void apply_k(const struct alignment *a, float *values, uint32_t n_heads, uint32_t n_per_kv,
                    uint64_t n)
{
    const struct ck_shape *s = a->shape;
    for (uint32_t h = 0; h < n_heads && (a->parts & ALIGN_K); h++) {
        turn_pairs(s, a->angles + (size_t)(h / n_per_kv) * (s->n_rot / 2),
                   values + (uint64_t)h * s->k_dim * n, n);
    }
}

static void apply_v(const struct alignment *a, float *values, uint64_t n, double *column)
{
    const struct ck_shape *s = a->shape;
    for (uint32_t h = 0; h < s->n_kv_heads; h++) {
        turn_rows(a->v + (size_t)h * s->v_dim * s->v_dim, s->v_dim,
                  values + (uint64_t)h * s->v_dim * n, n, column);
    }
}

static void apply_out(const struct alignment *a, const struct ck_tensor *t, float *values,
                      double *column)
{
    const struct ck_shape *s = a->shape;
    const uint32_t n_per_kv = s->n_heads / s->n_kv_heads;
    for (uint64_t row = 0; row < t->n_rows; row++) {
        for (uint32_t h = 0; h < s->n_heads; h++) {
            turn_columns(a->v + (size_t)(h / n_per_kv) * s->v_dim * s->v_dim, s->v_dim,
                         values + row * t->row_values + (uint64_t)h * s->v_dim, column);
        }
    }
}

int alignment_apply(const struct alignment *a, const struct ck_tensor *t, float *values,
                    struct fmt_error *err)
{
    const struct ck_shape *s = a->shape;
    const uint64_t n = t->row_values, q_rows = (uint64_t)s->n_heads * s->k_dim,
                   k_rows = (uint64_t)s->n_kv_heads * s->k_dim;
    const uint32_t n_per_kv = s->n_heads / s->n_kv_heads;
    double *column = malloc(s->v_dim * sizeof(*column));
    if (column == NULL) {
        return fmt_fail(err, -ENOMEM, "out of memory");
    }
    switch (t->role) {
    case CK_Q:
        apply_k(a, values, s->n_heads, n_per_kv, n);
        break;
    case CK_K:
        apply_k(a, values, s->n_kv_heads, 1, n);
        break;
    case CK_V:
        apply_v(a, values, n, column);
        break;
    case CK_QKV:
        apply_k(a, values, s->n_heads, n_per_kv, n);
        apply_k(a, values + q_rows * n, s->n_kv_heads, 1, n);
        apply_v(a, values + (q_rows + k_rows) * n, n, column);
        break;
    case CK_OUT:
        apply_out(a, t, values, column);
        break;
    default:
        break;
    }
    free(column);
    return 0;
}
