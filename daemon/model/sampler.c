/* daemon/model/sampler.c - one sequence's sampler: parameters, history, the step. */
#include "daemon/model/constraint.h"
#include "daemon/model/sampler_internal.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_HISTORY 256 /* tokens */

struct sampler_params sampler_params_default(void)
{
    struct sampler_params p = {
        .temperature = 0.8f,
        .dynatemp_exponent = 1.0f,
        .top_k = 40,
        .top_p = 0.95f,
        .min_p = 0.05f,
        .typical_p = 1.0f,
        .top_n_sigma = -1.0f,
        .xtc_threshold = 0.1f,
        .repeat_penalty = 1.0f,
        .repeat_last_n = 64,
        .dry_base = 1.75f,
        .dry_allowed_length = 2,
        .dry_penalty_last_n = -1,
        .mirostat_tau = 5.0f,
        .mirostat_eta = 0.1f,
        .n_chain = SAMPLER_KINDS,
    };
    for (uint32_t i = 0; i < SAMPLER_KINDS; i++) {
        p.chain[i] = (uint8_t)i;
    }
    return p;
}

/* Finite and at least least; a NaN is neither. */
static bool at_least(float x, float least)
{
    return x >= least && isfinite(x);
}

static bool numbers_valid(const struct sampler_params *p)
{
    return isfinite(p->temperature) && at_least(p->dynatemp_range, 0) &&
           at_least(p->dynatemp_exponent, 0) && at_least(p->top_p, 0) && isfinite(p->min_p) &&
           p->min_p <= 1 && at_least(p->typical_p, 0) && isfinite(p->top_n_sigma) &&
           at_least(p->xtc_probability, 0) && at_least(p->xtc_threshold, 0) &&
           p->repeat_penalty > 0 && isfinite(p->repeat_penalty) && isfinite(p->presence_penalty) &&
           isfinite(p->frequency_penalty) && p->repeat_last_n >= -1 &&
           at_least(p->dry_multiplier, 0) && at_least(p->dry_base, 0) &&
           p->dry_allowed_length >= 0 && p->dry_penalty_last_n >= -1 && p->mirostat >= 0 &&
           p->mirostat <= 2 && at_least(p->mirostat_tau, 0) && at_least(p->mirostat_eta, 0);
}

static bool params_valid(const struct sampler_params *p, uint32_t n_vocab)
{
    if (n_vocab == 0 || n_vocab > INT32_MAX || p->n_probs > SAMPLER_MAX_PROBS ||
        p->n_chain > SAMPLER_CHAIN_MAX || !numbers_valid(p)) {
        return false;
    }
    for (size_t i = 0; i < p->n_chain; i++) {
        if (p->chain[i] >= SAMPLER_KINDS) {
            return false;
        }
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

/* Whether a sampler is in the chain and has an effect. */
static bool is_on(const struct sampler_params *p, enum sampler_kind kind)
{
    bool listed = false;
    for (uint32_t i = 0; i < p->n_chain && i < SAMPLER_CHAIN_MAX; i++) {
        listed |= p->chain[i] == kind;
    }
    return listed && p->mirostat == 0 && sampler_rows[kind].enabled(p);
}

bool sampler_params_want_dry(const struct sampler_params *params)
{
    return is_on(params, SAMPLER_DRY);
}

/* What is left of the chain without the samplers that have no effect: those that are off, and, at
 * temperature 0, all that come after it, and those just before it that keep the best anyway. */
static void reduce_chain(struct sampler *s)
{
    const struct sampler_params *p = &s->params;
    bool greedy = p->temperature <= 0 && (p->dynatemp_range <= 0 || p->mirostat > 0);
    if (p->mirostat > 0) {
        s->takes_best = greedy;
        return;
    }
    uint32_t n = 0;
    bool ends = false; /* with one candidate */
    for (uint32_t i = 0; i < p->n_chain && !ends; i++) {
        enum sampler_kind kind = p->chain[i];
        if (!sampler_rows[kind].enabled(p)) {
            continue;
        }
        ends = greedy && kind == SAMPLER_TEMPERATURE;
        while (ends && n > 0 && sampler_rows[s->chain[n - 1]].keeps_best) {
            n--;
        }
        s->chain[n++] = (uint8_t)kind;
    }
    s->n_chain = n;
    s->takes_best = ends && n == 1;
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
    dry_finish(s);
    free(s->bias);
    free(s->cand.item);
    free(s->history.token);
    free(s->counts);
    free(s->kept_logits);
    free(s->moved);
    constraint_destroy(s->constraint);
    free(s->masked);
    free(s);
}

/* How many tokens a sampler that looks back that far needs. */
static size_t window(int32_t last_n)
{
    return last_n < 0 ? SIZE_MAX : (size_t)last_n;
}

/* What the samplers of the chain work with. */
static int allocate(struct sampler *s)
{
    const struct sampler_params *p = &s->params;
    s->cand.item = malloc(s->n_vocab * sizeof(*s->cand.item));
    if (!s->cand.item) {
        return -ENOMEM;
    }
    if (s->n_bias > 0) {
        s->moved = malloc(s->n_vocab * sizeof(*s->moved));
        if (!s->moved) {
            return -ENOMEM;
        }
    }
    if (is_on(p, SAMPLER_PENALTIES)) {
        s->history.max = window(p->repeat_last_n);
        s->counts = calloc(s->n_vocab, sizeof(*s->counts));
        if (!s->counts) {
            return -ENOMEM;
        }
    }
    if (is_on(p, SAMPLER_TYPICAL_P)) {
        s->kept_logits = malloc(s->n_vocab * sizeof(*s->kept_logits));
        if (!s->kept_logits) {
            return -ENOMEM;
        }
    }
    if (is_on(p, SAMPLER_DRY)) {
        size_t wanted = window(p->dry_penalty_last_n);
        s->history.max = wanted > s->history.max ? wanted : s->history.max;
        return dry_init(s);
    }
    return 0;
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
    s->mirostat_mu = 2 * params->mirostat_tau;
    pcg32_init(&s->rng, params->seed);
    int rc = copy_bias(s, params);
    rc = rc < 0 ? rc : allocate(s);
    if (rc < 0) {
        sampler_destroy(s);
        return rc;
    }
    reduce_chain(s);
    *ret = s;
    return 0;
}

static int grow_history(struct sampler *s)
{
    struct token_history *h = &s->history;
    size_t capacity = h->capacity ? h->capacity * 2 : FIRST_HISTORY;
    capacity = capacity < h->max ? capacity : h->max;
    int32_t *token = reallocarray(h->token, capacity, sizeof(*token));
    if (!token) {
        return -ENOMEM;
    }
    h->token = token;
    int rc = dry_grow(s, capacity);
    if (rc == 0) {
        h->capacity = capacity;
    }
    return rc;
}

/* Before the token comes into the history: one leaves the penalties' window. */
static void count_token(struct sampler *s, int32_t token)
{
    size_t last_n = window(s->params.repeat_last_n);
    if (s->history.n >= last_n) {
        s->counts[history_back(&s->history, last_n - 1)]--;
    }
    s->counts[token]++;
}

int sampler_accept(struct sampler *s, int32_t token)
{
    struct token_history *h = &s->history;
    if (token < 0 || (uint32_t)token >= s->n_vocab) {
        return -ERANGE;
    }
    if (s->constraint) {
        int rc = constraint_accept(s->constraint, token);
        if (rc < 0) {
            return rc;
        }
    }
    if (h->max == 0) {
        return 0;
    }
    if (h->n == h->capacity && h->n < h->max) {
        int rc = grow_history(s);
        if (rc < 0) {
            return rc;
        }
    }
    if (s->counts) {
        count_token(s, token);
    }
    if (h->n < h->capacity) {
        h->token[h->n++] = token;
    } else {
        h->token[h->next] = token;
        h->next = h->next + 1 < h->n ? h->next + 1 : 0;
    }
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

/* -EDOM when a penalty overflowed, or forbade every token. */
static int check_moved(const struct candidates *c)
{
    bool bad = false;
    for (size_t i = 0; i < c->n; i++) {
        bad |= !(c->item[i].logit < INFINITY);
    }
    return !bad && candidates_max(c) > -INFINITY ? 0 : -EDOM;
}

/* Candidate i is token i. */
static void fill_candidates(struct sampler *s, const float *logits)
{
    struct candidates *c = &s->cand;
    c->n = s->n_vocab;
    c->n_sorted = 0;
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        c->item[i] = (struct candidate){logits[i], (int32_t)i};
    }
}

/* The candidates, and how many samplers of the chain have chosen among them already: of a large
 * vocabulary most tokens never become one where top_k comes first. */
static uint32_t begin_chain(struct sampler *s, const float *logits)
{
    bool cuts = s->n_chain > 0 && s->chain[0] == SAMPLER_TOP_K;
    size_t k = cuts ? top_k_keeps(s, s->n_vocab) : s->n_vocab;
    if (k < s->n_vocab) {
        candidates_take_best(&s->cand, logits, s->n_vocab, k);
        return 1;
    }
    fill_candidates(s, logits);
    return 0;
}

/* Runs the samplers over fresh candidates, then draws. */
static int run_chain(struct sampler *s, const float *logits, int32_t *ret)
{
    struct candidates *c = &s->cand;
    bool moved = false;
    int rc = 0;
    for (uint32_t i = begin_chain(s, logits); i < s->n_chain && rc == 0; i++) {
        const struct sampler_row *row = &sampler_rows[s->chain[i]];
        if (moved && !row->moves_logits) { /* the others rely on it */
            rc = check_moved(c);
            moved = false;
        }
        if (rc == 0) {
            row->apply(s, c);
            moved |= row->moves_logits;
        }
    }
    rc = rc == 0 && moved ? check_moved(c) : rc;
    if (rc < 0) {
        return rc;
    }
    size_t drawn;
    if (s->params.mirostat > 0) {
        temperature_scale(c, s->params.temperature);
        drawn = mirostat_draw(s, c);
    } else {
        drawn = candidates_draw(c, &s->rng);
    }
    *ret = c->item[drawn].token;
    return 0;
}

int sampler_constrain(struct sampler *s, struct constraint *c)
{
    assert(!s->constraint);
    s->masked = malloc(s->n_vocab * sizeof(*s->masked));
    if (!s->masked) {
        return -ENOMEM;
    }
    s->constraint = c;
    return 0;
}

bool sampler_is_complete(const struct sampler *s)
{
    return s->constraint && constraint_is_complete(s->constraint);
}

/* Adds the bias; *ret_best becomes the best of what that gives. -EDOM when it overflowed, or
 * forbade every token. */
static int move_logits(struct sampler *s, const float *logits, size_t *ret_best)
{
    memcpy(s->moved, logits, s->n_vocab * sizeof(*logits));
    for (size_t i = 0; i < s->n_bias; i++) {
        s->moved[s->bias[i].token] += s->bias[i].bias;
    }
    return sampler_find_best(s->moved, s->n_vocab, ret_best);
}

/* best: of the logits. */
static int choose(struct sampler *s, const float *logits, size_t best, int32_t *ret)
{
    if (s->n_bias > 0) {
        int rc = move_logits(s, logits, &best);
        if (rc < 0) {
            return rc;
        }
        logits = s->moved;
    }
    if (s->takes_best) {
        *ret = (int32_t)best;
        return 0;
    }
    return run_chain(s, logits, ret);
}

/* Chooses again, where the constraint refuses what was chosen from all tokens. */
static int choose_allowed(struct sampler *s, const float *logits, size_t best, int32_t *ret)
{
    float mu = s->mirostat_mu, log_sum;
    int32_t token;
    int rc = choose(s, logits, best, &token);
    int allowed = rc == 0 && s->constraint ? constraint_allows(s->constraint, token) : 1;
    if (rc < 0 || allowed < 0) {
        return rc < 0 ? rc : allowed;
    }
    if (allowed) {
        *ret = token;
        return 0;
    }
    memcpy(s->masked, logits, s->n_vocab * sizeof(*logits));
    rc = constraint_mask(s->constraint, s->masked, s->n_vocab);
    if (rc < 0) {
        return rc;
    }
    s->mirostat_mu = mu; /* what was drawn does not count */
    rc = sampler_log_sum_exp(s->masked, s->n_vocab, &best, &log_sum);
    rc = rc < 0 ? rc : choose(s, s->masked, best, ret);
    return rc == -EDOM ? -ENODATA : rc; /* the logits themselves were fine */
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
    rc = choose_allowed(s, logits, best, &out.token);
    if (rc < 0) {
        return rc;
    }
    out.logprob = logits[out.token] - log_sum;
    fill_probs(s, logits, log_sum, &out);
    *ret = out;
    return 0;
}
