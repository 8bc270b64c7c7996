/* daemon/model/sampler_chain.c - the chain: one row per sampler, in the order of llama.cpp.
 *
 * A row sees candidates and changes their logits or drops some; at least one always stays. Rows
 * that need an order sort only as much of the front as they look at. */
#include "daemon/model/sampler_internal.h"

#include <math.h>

#define FIRST_SORTED 128 /* top_p sorts this many first, then eight times as many, ... */
#define SORT_GROWTH  8

static bool better(struct candidate a, struct candidate b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

/* Restores the heap of k candidates, the worst at its root, after item[root] was replaced. */
static void sift_down(struct candidate *item, size_t k, size_t root)
{
    struct candidate moved = item[root];
    for (;;) {
        size_t child = 2 * root + 1;
        if (child >= k) {
            break;
        }
        if (child + 1 < k && better(item[child], item[child + 1])) {
            child++;
        }
        if (!better(moved, item[child])) {
            break;
        }
        item[root] = item[child];
        root = child;
    }
    item[root] = moved;
}

void candidates_sort(struct candidates *c, size_t k)
{
    if (k <= c->n_sorted) {
        return;
    }
    struct candidate *item = c->item;
    for (size_t i = k / 2; i-- > 0;) {
        sift_down(item, k, i);
    }
    for (size_t i = k; i < c->n; i++) {
        if (better(item[i], item[0])) {
            struct candidate out = item[0];
            item[0] = item[i];
            item[i] = out;
            sift_down(item, k, 0);
        }
    }
    for (size_t end = k; end-- > 1;) {
        struct candidate worst = item[0];
        item[0] = item[end];
        item[end] = worst;
        sift_down(item, end, 0);
    }
    c->n_sorted = k;
}

float candidates_max(const struct candidates *c)
{
    if (c->n_sorted > 0) {
        return c->item[0].logit;
    }
    float max = c->item[0].logit;
    for (size_t i = 1; i < c->n; i++) {
        max = c->item[i].logit > max ? c->item[i].logit : max;
    }
    return max;
}

/* Drops all but the first n candidates, which must be sorted. */
static void keep_first(struct candidates *c, size_t n)
{
    c->n = n;
    c->n_sorted = n;
}

static size_t min_keep(const struct sampler *s, const struct candidates *c)
{
    size_t keep = s->params.min_keep > 0 ? s->params.min_keep : 1;
    return keep < c->n ? keep : c->n;
}

static bool bias_enabled(const struct sampler *s)
{
    return s->n_bias > 0;
}

/* Runs before anything was sorted or dropped: candidate i is still token i. */
static void bias_apply(struct sampler *s, struct candidates *c)
{
    for (size_t i = 0; i < s->n_bias; i++) {
        c->item[s->bias[i].token].logit += s->bias[i].bias;
    }
}

static bool penalties_enabled(const struct sampler *s)
{
    return s->n_history > 0;
}

/* Also in token order. The formula: Keskar et al., "CTRL", 2019, section 4.1 (repeat), and OpenAI's
 * frequency and presence penalties. */
static void penalties_apply(struct sampler *s, struct candidates *c)
{
    const struct sampler_params *p = &s->params;
    for (size_t i = 0; i < c->n; i++) {
        uint32_t count = s->counts[i];
        if (count == 0) {
            continue;
        }
        float *logit = &c->item[i].logit;
        *logit = *logit > 0 ? *logit / p->repeat_penalty : *logit * p->repeat_penalty;
        *logit -= (float)count * p->frequency_penalty + p->presence_penalty;
    }
}

static bool top_k_enabled(const struct sampler *s)
{
    return s->params.top_k > 0;
}

static void top_k_apply(struct sampler *s, struct candidates *c)
{
    size_t k = (size_t)s->params.top_k;
    size_t keep = min_keep(s, c);
    k = k > keep ? k : keep;
    if (k < c->n) {
        candidates_sort(c, k);
        keep_first(c, k);
    }
}

static bool top_p_enabled(const struct sampler *s)
{
    return s->params.top_p < 1;
}

/* Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020: the fewest candidates
 * whose probabilities reach top_p. */
static void top_p_apply(struct sampler *s, struct candidates *c)
{
    float max = candidates_max(c);
    double total = 0;
    for (size_t i = 0; i < c->n; i++) {
        total += sampler_exp(c->item[i].logit - max);
    }
    double wanted = total * (double)s->params.top_p;
    double sum = 0;
    size_t keep = min_keep(s, c);
    for (size_t i = 0; i < c->n; i++) {
        if (i >= c->n_sorted) {
            size_t grown = i == 0 ? FIRST_SORTED : i * SORT_GROWTH;
            candidates_sort(c, grown < c->n ? grown : c->n);
        }
        sum += sampler_exp(c->item[i].logit - max);
        if (sum >= wanted && i + 1 >= keep) {
            keep_first(c, i + 1);
            return;
        }
    }
}

static bool min_p_enabled(const struct sampler *s)
{
    return s->params.min_p > 0;
}

/* Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024: a candidate must be at least min_p
 * times as likely as the best. */
static void min_p_apply(struct sampler *s, struct candidates *c)
{
    float max = candidates_max(c);
    size_t keep = min_keep(s, c);
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++) {
        n += sampler_exp(c->item[i].logit - max) >= s->params.min_p;
    }
    if (n < keep) {
        candidates_sort(c, keep);
        keep_first(c, keep);
        return;
    }
    size_t kept = 0;
    for (size_t i = 0; i < c->n; i++) {
        if (sampler_exp(c->item[i].logit - max) >= s->params.min_p) {
            c->item[kept++] = c->item[i];
        }
    }
    c->n = kept;
    c->n_sorted = c->n_sorted < kept ? c->n_sorted : kept;
}

static bool temperature_enabled(const struct sampler *s)
{
    return s->params.temperature > 0 && s->params.temperature != 1;
}

/* Divides the distance from the best, so that no temperature, however small, overflows. */
static void temperature_apply(struct sampler *s, struct candidates *c)
{
    float max = candidates_max(c);
    for (size_t i = 0; i < c->n; i++) {
        c->item[i].logit = (c->item[i].logit - max) / s->params.temperature;
    }
}

const struct sampler_row sampler_rows[] = {
    {"logit_bias", bias_enabled, bias_apply, true},
    {"penalties", penalties_enabled, penalties_apply, true},
    {"top_k", top_k_enabled, top_k_apply, false},
    {"top_p", top_p_enabled, top_p_apply, false},
    {"min_p", min_p_enabled, min_p_apply, false},
    {"temperature", temperature_enabled, temperature_apply, false},
};
const size_t sampler_n_rows = sizeof(sampler_rows) / sizeof(sampler_rows[0]);
