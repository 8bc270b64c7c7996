/* daemon/model/sampler.c - one sequence's sampler: parameters, history, the step. */
#include "daemon/model/sampler_internal.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_HISTORY 256 /* tokens */

struct sampler_params sampler_params_default(void)
{
    return (struct sampler_params){
        .temperature = 0.8f,
        .top_k = 40,
        .top_p = 0.95f,
        .min_p = 0.05f,
        .repeat_penalty = 1.0f,
        .repeat_last_n = 64,
    };
}

static bool params_valid(const struct sampler_params *p, uint32_t n_vocab)
{
    if (n_vocab == 0 || n_vocab > INT32_MAX || p->n_probs > SAMPLER_MAX_PROBS ||
        p->repeat_last_n < -1) {
        return false;
    }
    if (!isfinite(p->temperature) || !(p->top_p >= 0) || !isfinite(p->top_p) ||
        !isfinite(p->min_p) || p->min_p > 1 || !(p->repeat_penalty > 0) ||
        !isfinite(p->repeat_penalty) || !isfinite(p->presence_penalty) ||
        !isfinite(p->frequency_penalty)) {
        return false;
    }
    for (size_t i = 0; i < p->n_logit_bias; i++) {
        const struct logit_bias *b = &p->logit_bias[i];
        if (b->token < 0 || (uint32_t)b->token >= n_vocab || !(b->bias < INFINITY)) {
            return false;
        }
    }
    for (size_t i = 0; i < p->n_eog; i++) {
        if (p->eog[i] < 0 || (uint32_t)p->eog[i] >= n_vocab) {
            return false;
        }
    }
    return true;
}

static bool wants_history(const struct sampler_params *p)
{
    return p->repeat_last_n != 0 &&
           (p->repeat_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0);
}

static int copy_bias(struct sampler *s, const struct sampler_params *p)
{
    size_t n = p->n_logit_bias + (p->ignore_eos ? p->n_eog : 0);
    if (n == 0) {
        return 0;
    }
    s->bias = calloc(n, sizeof(*s->bias));
    if (!s->bias) {
        return -ENOMEM;
    }
    if (p->n_logit_bias > 0) {
        memcpy(s->bias, p->logit_bias, p->n_logit_bias * sizeof(*s->bias));
    }
    for (size_t i = p->n_logit_bias; i < n; i++) {
        s->bias[i] = (struct logit_bias){p->eog[i - p->n_logit_bias], -INFINITY};
    }
    s->n_bias = n;
    return 0;
}

void sampler_destroy(struct sampler *s)
{
    if (!s) {
        return;
    }
    free(s->bias);
    free(s->cand.item);
    free(s->history);
    free(s->counts);
    free(s);
}

int sampler_create(const struct sampler_params *params, uint32_t n_vocab, struct sampler **ret)
{
    if (!params_valid(params, n_vocab)) {
        return -EINVAL;
    }
    struct sampler *s = calloc(1, sizeof(*s));
    if (!s) {
        return -ENOMEM;
    }
    s->params = *params;
    s->params.logit_bias = NULL;
    s->params.eog = NULL;
    s->n_vocab = n_vocab;
    pcg32_init(&s->rng, params->seed);
    int rc = copy_bias(s, params);
    if (rc < 0) {
        goto err_destroy;
    }
    rc = -ENOMEM;
    s->cand.item = malloc(n_vocab * sizeof(*s->cand.item));
    if (!s->cand.item) {
        goto err_destroy;
    }
    if (wants_history(params)) {
        s->counts = calloc(n_vocab, sizeof(*s->counts));
        if (!s->counts) {
            goto err_destroy;
        }
    }
    *ret = s;
    return 0;

err_destroy:
    sampler_destroy(s);
    return rc;
}

static int grow_history(struct sampler *s)
{
    size_t capacity = s->history_capacity ? s->history_capacity * 2 : FIRST_HISTORY;
    if (s->params.repeat_last_n > 0 && capacity > (size_t)s->params.repeat_last_n) {
        capacity = (size_t)s->params.repeat_last_n;
    }
    int32_t *history = reallocarray(s->history, capacity, sizeof(*history));
    if (!history) {
        return -ENOMEM;
    }
    s->history = history;
    s->history_capacity = capacity;
    return 0;
}

int sampler_accept(struct sampler *s, int32_t token)
{
    if (token < 0 || (uint32_t)token >= s->n_vocab) {
        return -ERANGE;
    }
    if (!s->counts) {
        return 0;
    }
    if (s->params.repeat_last_n > 0 && s->n_history == (size_t)s->params.repeat_last_n) {
        s->counts[s->history[s->history_next]]--;
        s->history[s->history_next] = token;
        s->history_next = (s->history_next + 1) % s->n_history;
        s->counts[token]++;
        return 0;
    }
    if (s->n_history == s->history_capacity) {
        int rc = grow_history(s);
        if (rc < 0) {
            return rc;
        }
    }
    s->history[s->n_history++] = token;
    s->counts[token]++;
    return 0;
}

/* The n best of the raw logits, best first; equal ones by ascending id. */
static void fill_probs(const struct sampler *s, const float *logits, float log_sum,
                       struct sampled_token *out)
{
    size_t wanted = s->params.n_probs < s->n_vocab ? s->params.n_probs : s->n_vocab;
    size_t n = 0;
    for (uint32_t i = 0; i < s->n_vocab && wanted > 0; i++) {
        if (n == wanted && !(logits[i] > out->probs[n - 1].logprob)) {
            continue;
        }
        size_t at = n < wanted ? n++ : n - 1;
        while (at > 0 && logits[i] > out->probs[at - 1].logprob) {
            out->probs[at] = out->probs[at - 1];
            at--;
        }
        out->probs[at] = (struct token_prob){(int32_t)i, logits[i]};
    }
    for (size_t i = 0; i < n; i++) {
        out->probs[i].logprob -= log_sum;
    }
    out->n_probs = (uint32_t)n;
}

/* False when a bias or penalty overflowed, or forbade every token. */
static bool can_draw(const struct candidates *c)
{
    bool bad = false;
    for (size_t i = 0; i < c->n; i++) {
        bad |= !(c->item[i].logit < INFINITY);
    }
    return !bad && candidates_max(c) > -INFINITY;
}

/* Runs the rows over fresh candidates: first those that move logits, which come first in the
 * table, then, unless the answer is the best one anyway, those that choose. */
static int run_chain(struct sampler *s, const float *logits, bool greedy)
{
    struct candidates *c = &s->cand;
    c->n = s->n_vocab;
    c->n_sorted = 0;
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        c->item[i] = (struct candidate){logits[i], (int32_t)i};
    }
    size_t r = 0;
    bool moved = false;
    for (; r < sampler_n_rows && sampler_rows[r].moves_logits; r++) {
        if (sampler_rows[r].enabled(s)) {
            sampler_rows[r].apply(s, c);
            moved = true;
        }
    }
    if (moved && !can_draw(c)) {
        return -EDOM;
    }
    for (; r < sampler_n_rows && !greedy; r++) {
        if (sampler_rows[r].enabled(s)) {
            sampler_rows[r].apply(s, c);
        }
    }
    return 0;
}

static int32_t draw(struct sampler *s)
{
    const struct candidates *c = &s->cand;
    float max = candidates_max(c);
    double sum = 0;
    for (size_t i = 0; i < c->n; i++) {
        sum += sampler_exp(c->item[i].logit - max);
    }
    double left = pcg32_unit(&s->rng) * sum;
    int32_t last = c->item[0].token; /* replaced below: the best one's share is 1 */
    for (size_t i = 0; i < c->n; i++) {
        double p = sampler_exp(c->item[i].logit - max);
        if (p == 0) {
            continue;
        }
        last = c->item[i].token;
        left -= p;
        if (left < 0) {
            break;
        }
    }
    return last; /* rounding can leave a rest: then it is the last that is possible */
}

static bool moves_any_logit(const struct sampler *s)
{
    for (size_t r = 0; r < sampler_n_rows; r++) {
        if (sampler_rows[r].moves_logits && sampler_rows[r].enabled(s)) {
            return true;
        }
    }
    return false;
}

int sampler_sample(struct sampler *s, const float *logits, struct sampled_token *ret)
{
    size_t best;
    float log_sum;
    int rc = sampler_log_sum_exp(logits, s->n_vocab, &best, &log_sum);
    if (rc < 0) {
        return rc;
    }
    struct sampled_token out = {.token = (int32_t)best};
    bool greedy = s->params.temperature <= 0;
    if (!greedy || moves_any_logit(s)) {
        rc = run_chain(s, logits, greedy);
        if (rc < 0) {
            return rc;
        }
        if (greedy) {
            candidates_sort(&s->cand, 1);
            out.token = s->cand.item[0].token;
        } else {
            out.token = draw(s);
        }
    }
    out.logprob = logits[out.token] - log_sum;
    fill_probs(s, logits, log_sum, &out);
    *ret = out;
    return 0;
}
