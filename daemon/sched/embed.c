#include "daemon/sched/embed.h"

#include <errno.h>
#include <math.h>
#include <string.h>

bool embed_wants_row(const struct sequence *s, size_t index)
{
    switch (s->request->embed.pooling) {
    case POOLING_NONE:
    case POOLING_MEAN:
        return index >= s->n_taken;
    case POOLING_CLS:
        return index == 0;
    case POOLING_LAST:
        return index + 1 == s->n_prompt;
    case POOLING_RANK:
        break;
    }
    /* A classifier reads the token that has seen all of the text. */
    return model_is_encoder(s->request->model) ? index == 0 : index + 1 == s->n_prompt;
}

uint32_t embed_wants(const struct sequence *s)
{
    return s->request->embed.pooling == POOLING_RANK ? MODEL_WANTS_SCORES : MODEL_WANTS_EMBEDDINGS;
}

static bool all_finite(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return false;
        }
    }
    return true;
}

static void softmax(float *x, uint32_t n)
{
    double max = (double)x[0], sum = 0;
    for (uint32_t i = 1; i < n; i++) {
        max = (double)x[i] > max ? (double)x[i] : max;
    }
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)x[i] - max);
    }
    for (uint32_t i = 0; i < n; i++) {
        x[i] = (float)(exp((double)x[i] - max) / sum);
    }
}

static void take_vector(struct sequence *s, const float *row)
{
    const struct request_embed *e = &s->request->embed;
    float *vector = e->vectors + s->part * e->width;
    memcpy(vector, row, e->width * sizeof(*vector));
    if (e->pooling != POOLING_RANK) {
        embedding_normalise(vector, e->width, e->norm);
    } else if (model_shape(s->request->model)->arch->flags & ARCH_RANK_SOFTMAX) {
        softmax(vector, e->width);
    }
}

static void add_rows(struct sequence *s, const float *rows, uint32_t n_embd)
{
    for (uint32_t i = 0; i < s->step_outs; i++) {
        const float *row = rows + (size_t)i * n_embd;
        for (uint32_t k = 0; k < n_embd; k++) {
            s->sums[k] += (double)row[k];
        }
    }
}

static void take_mean(struct sequence *s)
{
    const struct request_embed *e = &s->request->embed;
    float *vector = e->vectors + s->part * e->width;
    for (uint32_t k = 0; k < e->width; k++) {
        vector[k] = (float)(s->sums[k] / (double)s->n_prompt);
    }
    embedding_normalise(vector, e->width, e->norm);
}

int embed_take(const struct publisher *p, struct sequence *s, const struct model_outputs *out)
{
    const struct request *r = s->request;
    bool rank = r->embed.pooling == POOLING_RANK;
    uint32_t n_embd = rank ? model_n_scores(r->model) : model_shape(r->model)->n_embd;
    const float *rows = (rank ? out->scores : out->embeddings) + (size_t)s->step_first_out * n_embd;
    int rc = 0;
    if (!all_finite(rows, (size_t)s->step_outs * n_embd)) {
        return -EDOM;
    }
    if (s->step_outs > 0 && r->embed.pooling == POOLING_NONE) {
        rc = publish_embeddings(p, s, rows, n_embd);
    } else if (s->step_outs > 0 && r->embed.pooling == POOLING_MEAN) {
        add_rows(s, rows, n_embd);
    } else if (s->step_outs > 0) {
        take_vector(s, rows);
    }
    s->n_taken = rc == 0 && s->kv.n_tokens > s->n_taken ? s->kv.n_tokens : s->n_taken;
    s->finished = rc == 0 && s->kv.n_tokens >= s->n_prompt;
    if (s->finished && r->embed.pooling == POOLING_MEAN) {
        take_mean(s);
    }
    return rc;
}
