/* daemon/model/sampler_truncate.c - the samplers that drop candidates.
 *
 * Each leaves at least sampler_min_keep() of them, and sorts only as much of the front as it looks
 * at. */
#include "daemon/model/sampler_internal.h"

#include <math.h>

#define FIRST_SORTED 128 /* what walks down the order sorts this many first, */
#define SORT_GROWTH  8   /* then eight times as many, ... */

/* Sorts so far that candidate i is in its place. */
static void sort_past(struct candidates *c, size_t i)
{
    if (i >= c->n_sorted) {
        size_t grown = i == 0 ? FIRST_SORTED : i * SORT_GROWTH;
        candidates_sort(c, grown < c->n ? grown : c->n);
    }
}

/* Tang et al., "Top-n-sigma: Not All Logits Are You Need", 2024: what lies more than n standard
 * deviations of the logits below the best is noise. Forbidden tokens are not counted. */
void top_n_sigma_apply(struct sampler *s, struct candidates *c)
{
    double max = candidates_max(c), mean = 0, squares = 0;
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++) {
        if (c->item[i].logit > -INFINITY) {
            mean += c->item[i].logit;
            n++;
        }
    }
    mean /= (double)n; /* not 0: the best is not -inf */
    for (size_t i = 0; i < c->n; i++) {
        if (c->item[i].logit > -INFINITY) {
            squares += (c->item[i].logit - mean) * (c->item[i].logit - mean);
        }
    }
    double least = max - (double)s->params.top_n_sigma * sqrt(squares / (double)n);
    candidates_keep_above(c, (float)least, sampler_min_keep(s, c));
}

size_t top_k_keeps(const struct sampler *s, size_t n)
{
    size_t k = (size_t)s->params.top_k;
    k = k > s->params.min_keep ? k : s->params.min_keep;
    return k < n ? k : n;
}

void top_k_apply(struct sampler *s, struct candidates *c)
{
    size_t k = top_k_keeps(s, c->n);
    if (k < c->n) {
        candidates_sort(c, k);
        candidates_keep_first(c, k);
    }
}

/* Meister et al., "Locally Typical Sampling", 2022: the fewest candidates whose probabilities pass
 * typical_p, those first whose surprise is nearest to the entropy. With d the distance of a logit
 * from the best, surprise - entropy is mean(d) - d.
 *
 * The order by that difference is found by candidates_sort(): while this runs, the logits are its
 * negatives, and the real ones are kept by token. */
void typical_p_apply(struct sampler *s, struct candidates *c)
{
    struct softmax all = candidates_softmax(c);
    for (size_t i = 0; i < c->n; i++) {
        struct candidate *item = &c->item[i];
        s->kept_logits[item->token] = item->logit;
        item->logit = (float)-fabs(all.mean - (double)(item->logit - all.max));
    }
    c->n_sorted = 0;
    double wanted = all.sum * (double)s->params.typical_p;
    double sum = 0;
    size_t keep = sampler_min_keep(s, c);
    size_t n = c->n;
    for (size_t i = 0; i < c->n; i++) {
        sort_past(c, i);
        sum += sampler_exp(s->kept_logits[c->item[i].token] - all.max);
        if (sum > wanted && i + 1 >= keep) {
            n = i + 1;
            break;
        }
    }
    c->n = n;
    c->n_sorted = 0;
    for (size_t i = 0; i < n; i++) {
        c->item[i].logit = s->kept_logits[c->item[i].token];
    }
}

/* Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020: the fewest candidates
 * whose probabilities reach top_p. */
void top_p_apply(struct sampler *s, struct candidates *c)
{
    float max = candidates_max(c);
    double total = 0;
    for (size_t i = 0; i < c->n; i++) {
        total += sampler_exp(c->item[i].logit - max);
    }
    double wanted = total * (double)s->params.top_p;
    double sum = 0;
    size_t keep = sampler_min_keep(s, c);
    for (size_t i = 0; i < c->n; i++) {
        sort_past(c, i);
        sum += sampler_exp(c->item[i].logit - max);
        if (sum >= wanted && i + 1 >= keep) {
            candidates_keep_first(c, i + 1);
            return;
        }
    }
}

/* Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024: a candidate must be at least min_p
 * times as likely as the best. */
void min_p_apply(struct sampler *s, struct candidates *c)
{
    float max = candidates_max(c);
    size_t keep = sampler_min_keep(s, c);
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++) {
        n += sampler_exp(c->item[i].logit - max) >= s->params.min_p;
    }
    if (n < keep) {
        candidates_sort(c, keep);
        candidates_keep_first(c, keep);
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

/* "Exclude top choices", p-e-w, 2024 (text-generation-webui, pull request 6335): of the candidates
 * whose probability reaches the threshold all but the least likely go, with xtc_probability. */
void xtc_apply(struct sampler *s, struct candidates *c)
{
    if (c->n < 2 || pcg32_unit(&s->rng) > (double)s->params.xtc_probability) {
        return;
    }
    struct softmax all = candidates_softmax(c);
    double least = all.sum * (double)s->params.xtc_threshold;
    size_t n = 0, stays = 0;
    for (size_t i = 0; i < c->n; i++) {
        struct candidate x = c->item[i], y = c->item[stays];
        if (sampler_exp(x.logit - all.max) < least) {
            continue;
        }
        bool worse = x.logit < y.logit || (x.logit == y.logit && x.token > y.token);
        stays = n == 0 || worse ? i : stays;
        n++;
    }
    size_t keep = s->params.min_keep > 0 ? s->params.min_keep : 1;
    if (n < 2 || c->n - (n - 1) < keep) {
        return;
    }
    size_t kept = 0;
    for (size_t i = 0; i < c->n; i++) {
        if (i == stays || sampler_exp(c->item[i].logit - all.max) < least) {
            c->item[kept++] = c->item[i];
        }
    }
    c->n_sorted = c->n_sorted >= n ? c->n_sorted - (n - 1) : 0; /* they were the first ones */
    c->n = kept;
}
