/* daemon/model/sampler_dry.c - "don't repeat yourself": the penalty for going on with a repetition.
 *
 * p-e-w, text-generation-webui, pull request 5677, 2024. A token that would continue a repetition
 * of n >= dry_allowed_length tokens loses dry_multiplier * dry_base ^ (n - dry_allowed_length). A
 * repetition is the end of the text occurring earlier in it; breakers end it. */
#include "daemon/model/dry_breakers.h"
#include "daemon/model/sampler_internal.h"

#include <errno.h>
#include <stdlib.h>

/* Enough to be out of the question, and finite: if every token is repeated, one is drawn still. */
#define PENALTY_MAX 1e30

bool dry_enabled(const struct sampler_params *p)
{
    return p->dry_multiplier > 0 && p->dry_base >= 1 && p->dry_penalty_last_n != 0;
}

int dry_init(struct sampler *s)
{
    s->dry.longest = calloc(s->n_vocab, sizeof(*s->dry.longest));
    return s->dry.longest ? 0 : -ENOMEM;
}

void dry_finish(struct sampler *s)
{
    free(s->dry.recent);
    free(s->dry.repeat);
    free(s->dry.longest);
}

int dry_grow(struct sampler *s, size_t capacity)
{
    if (!s->dry.longest) {
        return 0;
    }
    int32_t *recent = reallocarray(s->dry.recent, capacity, sizeof(*recent));
    if (!recent) {
        return -ENOMEM;
    }
    s->dry.recent = recent;
    uint32_t *repeat = reallocarray(s->dry.repeat, capacity, sizeof(*repeat));
    if (!repeat) {
        return -ENOMEM;
    }
    s->dry.repeat = repeat;
    return 0;
}

/* repeat[k]: how many of the newest tokens are the same k tokens earlier. The Z-algorithm on the
 * text read backwards; each token is compared with at most two others. */
static void find_repeats(const int32_t *recent, size_t n, uint32_t *repeat)
{
    size_t start = 0, end = 0; /* the match that reaches furthest back */
    for (size_t k = 1; k < n; k++) {
        size_t length = 0;
        if (k < end) {
            length = repeat[k - start];
            length = length < end - k ? length : end - k;
        }
        while (k + length < n && recent[length] == recent[k + length]) {
            length++;
        }
        repeat[k] = (uint32_t)length;
        if (k + length > end) {
            start = k;
            end = k + length;
        }
    }
}

static double penalty_of(const struct sampler_params *p, uint32_t length)
{
    double penalty = (double)p->dry_multiplier;
    double factor = (double)p->dry_base;
    for (uint32_t n = length - (uint32_t)p->dry_allowed_length; n > 0; n /= 2) {
        penalty *= n % 2 ? factor : 1;
        factor *= factor;
    }
    return penalty < PENALTY_MAX ? penalty : PENALTY_MAX;
}

static void subtract_penalties(const struct sampler *s, struct candidates *c)
{
    const struct sampler_params *p = &s->params;
    for (size_t i = 0; i < c->n; i++) {
        uint32_t longest = s->dry.longest[c->item[i].token];
        if (longest > 0 && !dry_breakers_in_token(p->dry_breakers, c->item[i].token)) {
            c->item[i].logit -= (float)penalty_of(p, longest - 1);
        }
    }
    c->n_sorted = 0;
}

void dry_apply(struct sampler *s, struct candidates *c)
{
    const struct sampler_params *p = &s->params;
    size_t allowed = (size_t)p->dry_allowed_length;
    size_t n = s->history.n;
    if (p->dry_penalty_last_n > 0 && n > (size_t)p->dry_penalty_last_n) {
        n = (size_t)p->dry_penalty_last_n;
    }
    if (n <= allowed) {
        return;
    }
    int32_t *recent = s->dry.recent;
    for (size_t i = 0; i < n; i++) {
        recent[i] = history_back(&s->history, i);
    }
    size_t most = dry_breakers_since(p->dry_breakers, recent, n);
    if (most < allowed) {
        return;
    }
    find_repeats(recent, n, s->dry.repeat);
    bool any = false;
    for (size_t k = 1; k < n; k++) {
        size_t length = s->dry.repeat[k] < most ? s->dry.repeat[k] : most;
        uint32_t *longest = &s->dry.longest[recent[k - 1]]; /* of the token that came next */
        if (length >= allowed && length + 1 > *longest) {
            *longest = (uint32_t)length + 1;
            any = true;
        }
    }
    if (any) {
        subtract_penalties(s, c);
    }
    for (size_t k = 1; k < n; k++) {
        s->dry.longest[recent[k - 1]] = 0;
    }
}
