/* tests/kernels/attention_truth.c - attention in float64, by the documents alone. */
#include "tests/kernels/attention_problem.h"
#include "tests/kernels/attention_stored.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double *all_as_stored(uint32_t type, int rotated, const float *x, size_t n_rows,
                             uint32_t dim)
{
    double *stored = attn_allocate(n_rows * dim * sizeof(*stored));

    for (size_t i = 0; i < n_rows; i++) {
        attn_as_stored(type, rotated, x + i * dim, dim, stored + i * dim);
    }
    return stored;
}

/* Whether a cache of the type holds K or V rotated, as the problem has it. */
static int rotates(const struct attn_problem *p, uint32_t type)
{
    return type == GQA_TYPE_Q4_0 && !p->spec.unrotated;
}

/* One sequence with K and V as its cache has them. */
struct truth {
    const struct attn_problem *p;
    uint32_t seq;
    double *k, *v; /* as in struct attn_problem_seq */
};

static int mask_bit(const struct truth *t, uint32_t row, uint32_t other)
{
    uint32_t n_words = (t->p->spec.seqs[t->seq].n_rows + 63) / 64;

    return t->p->spec.seqs[t->seq].mask[(size_t)row * n_words + other / 64] >> other % 64 & 1;
}

/* The position of a place for the window. */
static int64_t position_of(const struct truth *t, uint32_t place)
{
    uint32_t n_past = t->p->spec.seqs[t->seq].n_past, n_rows = t->p->spec.seqs[t->seq].n_rows;
    int64_t position = n_past;

    if (place < n_past || t->p->spec.seqs[t->seq].mask == NULL) {
        return place;
    }
    for (uint32_t j = 0; j < n_rows; j++) {
        position += j != place - n_past && mask_bit(t, place - n_past, j);
    }
    return position;
}

/* positions: of all places. Whether new row row sees a place, by docs/plugin-abi.md. */
static int sees(const struct truth *t, const int64_t *positions, uint32_t row, uint32_t place)
{
    uint32_t n_past = t->p->spec.seqs[t->seq].n_past;
    int64_t window = t->p->spec.window, p = positions[n_past + row], other = positions[place];
    int mutual = (int)t->p->spec.seqs[t->seq].mutual;

    if (place >= n_past && t->p->spec.seqs[t->seq].mask != NULL) {
        if (!mask_bit(t, row, place - n_past)) {
            return 0;
        }
    } else if (place > n_past + row && !mutual) {
        return 0;
    }
    return window == 0 || (p - window < other && (!mutual || other < p + window));
}

/* The query as its scores want it. *ret_error: how far float32 may be off in one of its values, in
 * half-units: a sum of n values in log2(n) steps and a product. */
static double *query_of(const struct truth *truth, uint32_t place, uint32_t head, double *ret_error)
{
    const struct gqa_attn_layer *l = &truth->p->layer;
    const float *from =
        truth->p->seqs[truth->seq].q + ((size_t)place * l->n_heads + head) * l->k_dim;
    double *q = attn_allocate(l->k_dim * sizeof(*q)), sum = 0;

    for (uint32_t d = 0; d < l->k_dim; d++) {
        q[d] = from[d];
        sum += fabs(q[d]);
    }
    *ret_error = 0;
    if (rotates(truth->p, l->k_type)) {
        double n = attn_rotation_size(l->k_dim);
        attn_rotate(q, l->k_dim);
        *ret_error = (log2(n) + 1) * sum / sqrt(n);
    }
    return q;
}

/* One query by the book; seen (n_tokens) says of what. Returns the bound: the error of the scores'
 * float32 sums moves every weight by a factor exp(+-2 error), and the sums of weights and outputs
 * round a few dozen times. A sum of k_dim products is off by sqrt(k_dim) half-units of its absolute
 * sum, times 8 to be safe. A rotated output sums n such errors over sqrt(n). */
static double truth_of_query(const struct truth *truth, const unsigned char *seen, uint32_t place,
                             uint32_t head, double *out)
{
    const struct gqa_attn_layer *l = &truth->p->layer;
    uint32_t group = head / (l->n_heads / l->n_kv_heads);
    uint32_t n_tokens = truth->p->seqs[truth->seq].n_tokens;
    double q_error, *q = query_of(truth, place, head, &q_error);
    double *scores = attn_allocate(n_tokens * sizeof(*scores));
    double max = l->sinks != NULL ? l->sinks[head] : -INFINITY, sum = 0, error = 0, v_max = 0;

    for (uint32_t t = 0; t < n_tokens; t++) {
        const double *k = truth->k + ((size_t)t * l->n_kv_heads + group) * l->k_dim;
        double score = 0, size = 0, k_size = 0;

        for (uint32_t d = 0; seen[t] && d < l->k_dim; d++) {
            score += q[d] * k[d];
            size += fabs(q[d] * k[d]);
            k_size += fabs(k[d]);
        }
        score *= l->scale;
        error = fmax(error, (8 * sqrt(l->k_dim) * size + q_error * k_size) * l->scale);
        scores[t] = l->softcap > 0 ? l->softcap * tanh(score / l->softcap) : score;
        max = seen[t] ? fmax(max, scores[t]) : max;
    }
    memset(out, 0, l->v_dim * sizeof(*out));
    for (uint32_t t = 0; t < n_tokens; t++) {
        const double *v = truth->v + ((size_t)t * l->n_kv_heads + group) * l->v_dim;
        double weight = seen[t] ? exp(scores[t] - max) : 0;

        sum += weight;
        for (uint32_t d = 0; seen[t] && d < l->v_dim; d++) {
            out[d] += weight * v[d];
            v_max = fmax(v_max, fabs(v[d]));
        }
    }
    sum += l->sinks != NULL ? exp(l->sinks[head] - max) : 0;
    for (uint32_t d = 0; d < l->v_dim; d++) {
        out[d] = sum > 0 ? out[d] / sum : 0;
    }
    free(scores);
    free(q);
    error = v_max * (2 * error + 64) * 0x1p-24;
    if (rotates(truth->p, l->v_type)) {
        attn_rotate(out, l->v_dim);
        error *= sqrt(attn_rotation_size(l->v_dim));
    }
    return error;
}

static void truth_of_seq(const struct truth *t, double *out, double *bound)
{
    const struct attn_spec *spec = &t->p->spec;
    uint32_t n_past = spec->seqs[t->seq].n_past, n_tokens = t->p->seqs[t->seq].n_tokens;
    int64_t *positions = attn_allocate(n_tokens * sizeof(*positions));
    unsigned char *seen = attn_allocate(n_tokens);

    for (uint32_t place = 0; place < n_tokens; place++) {
        positions[place] = position_of(t, place);
    }
    for (uint32_t row = 0; row < spec->seqs[t->seq].n_rows; row++) {
        for (uint32_t place = 0; place < n_tokens; place++) {
            seen[place] = (unsigned char)sees(t, positions, row, place);
        }
        for (uint32_t head = 0; head < spec->n_heads; head++) {
            double error = truth_of_query(t, seen, n_past + row, head, out);
            for (uint32_t d = 0; d < spec->v_dim; d++) {
                bound[d] = error;
            }
            out += spec->v_dim;
            bound += spec->v_dim;
        }
    }
    free(positions);
    free(seen);
}

void attn_problem_truth(const struct attn_problem *p, double *out, double *bound)
{
    const struct attn_spec *spec = &p->spec;

    for (uint32_t i = 0; i < spec->n_seqs; i++) {
        size_t n = (size_t)p->seqs[i].n_tokens * spec->n_kv_heads;
        struct truth t = {.p = p, .seq = i};

        t.k = all_as_stored(spec->k_type, rotates(p, spec->k_type), p->seqs[i].k, n, spec->k_dim);
        t.v = all_as_stored(spec->v_type, rotates(p, spec->v_type), p->seqs[i].v, n, spec->v_dim);
        truth_of_seq(&t, out, bound);
        out += (size_t)spec->seqs[i].n_rows * spec->n_heads * spec->v_dim;
        bound += (size_t)spec->seqs[i].n_rows * spec->n_heads * spec->v_dim;
        free(t.k);
        free(t.v);
    }
}
