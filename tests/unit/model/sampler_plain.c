#include "tests/unit/model/sampler_plain.h"

#include <math.h>
#include <stdlib.h>

static int best_first(const void *a, const void *b)
{
    const struct plain_token *x = a, *y = b;
    if (x->logit != y->logit) {
        return x->logit > y->logit ? -1 : 1;
    }
    return x->token < y->token ? -1 : 1;
}

static int lowest_key_first(const void *a, const void *b)
{
    const struct plain_token *x = a, *y = b;
    if (x->key != y->key) {
        return x->key < y->key ? -1 : 1;
    }
    return x->token < y->token ? -1 : 1;
}

static void sort(struct plain *p)
{
    qsort(p->item, p->n, sizeof(*p->item), best_first);
}

void plain_init(struct plain *p, const struct sampler_params *params, const float *logits, size_t n)
{
    *p = (struct plain){.params = params, .n = n, .item = calloc(n, sizeof(*p->item))};
    for (size_t i = 0; i < n; i++) {
        p->item[i] = (struct plain_token){.token = (int32_t)i, .logit = (double)logits[i]};
    }
    sort(p);
}

void plain_finish(struct plain *p)
{
    free(p->item);
}

void plain_softmax(struct plain *p)
{
    double sum = 0;
    for (size_t i = 0; i < p->n; i++) {
        sum += exp(p->item[i].logit - p->item[0].logit);
    }
    for (size_t i = 0; i < p->n; i++) {
        p->item[i].p = exp(p->item[i].logit - p->item[0].logit) / sum;
    }
}

static double entropy(const struct plain *p)
{
    double h = 0;
    for (size_t i = 0; i < p->n; i++) {
        h -= p->item[i].p > 0 ? p->item[i].p * log(p->item[i].p) : 0;
    }
    return h;
}

/* x >= y, and whether that hung by a thread. */
static bool reaches(struct plain *p, double x, double y)
{
    p->close |= fabs(x - y) < 1e-5 * (1 + fabs(y));
    return x >= y;
}

static size_t least_kept(const struct plain *p)
{
    size_t keep = p->params->min_keep > 1 ? p->params->min_keep : 1;
    return keep < p->n ? keep : p->n;
}

static void keep_first(struct plain *p, size_t n)
{
    p->n = n > least_kept(p) ? n : least_kept(p);
}

/* ---- samplers ---------------------------------------------------------------------------- */

static void penalties(struct plain *p)
{
    const struct sampler_params *o = p->params;
    size_t window = o->repeat_last_n < 0 || (size_t)o->repeat_last_n > p->n_history
                        ? p->n_history
                        : (size_t)o->repeat_last_n;
    for (size_t i = 0; i < p->n; i++) {
        double *logit = &p->item[i].logit;
        int count = 0;
        for (size_t h = p->n_history - window; h < p->n_history; h++) {
            count += p->history[h] == p->item[i].token;
        }
        if (count > 0) {
            *logit = *logit > 0 ? *logit / (double)o->repeat_penalty
                                : *logit * (double)o->repeat_penalty;
            *logit -= count * (double)o->frequency_penalty + (double)o->presence_penalty;
        }
    }
    sort(p);
}

/* Of every earlier place where the end of the text stands, the token after it is penalised by the
 * longest such end. No breakers. */
static void dry(struct plain *p)
{
    const struct sampler_params *o = p->params;
    size_t n = p->n_history, allowed = (size_t)o->dry_allowed_length;
    const int32_t *text = p->history;
    if (o->dry_penalty_last_n >= 0 && n > (size_t)o->dry_penalty_last_n) {
        text += n - (size_t)o->dry_penalty_last_n;
        n = (size_t)o->dry_penalty_last_n;
    }
    if (o->dry_multiplier <= 0 || o->dry_base < 1 || n <= allowed) {
        return;
    }
    for (size_t i = 0; i < p->n; i++) {
        bool found = false;
        size_t longest = 0;
        for (size_t end = 1; end < n; end++) { /* text[end] would be repeated */
            size_t length = 0;
            while (length < end && text[end - 1 - length] == text[n - 1 - length]) {
                length++;
            }
            if (text[end] == p->item[i].token && length >= allowed) {
                found = true;
                longest = length > longest ? length : longest;
            }
        }
        if (found) {
            double penalty =
                (double)o->dry_multiplier * pow((double)o->dry_base, (double)(longest - allowed));
            p->item[i].logit -= penalty < 1e30 ? penalty : 1e30;
        }
    }
    sort(p);
}

static void top_n_sigma(struct plain *p)
{
    double sum = 0, squares = 0, n = 0;
    if (p->params->top_n_sigma <= 0) {
        return;
    }
    for (size_t i = 0; i < p->n; i++) {
        sum += isinf(p->item[i].logit) ? 0 : p->item[i].logit;
        n += !isinf(p->item[i].logit);
    }
    for (size_t i = 0; i < p->n; i++) {
        squares += isinf(p->item[i].logit) ? 0 : pow(p->item[i].logit - sum / n, 2);
    }
    double least = p->item[0].logit - (double)p->params->top_n_sigma * sqrt(squares / n);
    size_t kept = 0;
    while (kept < p->n && reaches(p, p->item[kept].logit, least)) {
        kept++;
    }
    keep_first(p, kept);
}

static void typical(struct plain *p)
{
    if (p->params->typical_p >= 1) {
        return;
    }
    plain_softmax(p);
    double h = entropy(p);
    for (size_t i = 0; i < p->n; i++) {
        p->item[i].key = fabs(-log(p->item[i].p) - h);
    }
    qsort(p->item, p->n, sizeof(*p->item), lowest_key_first);
    double sum = 0;
    size_t kept = 0;
    while (kept < p->n && (kept < least_kept(p) || sum <= (double)p->params->typical_p)) {
        sum += p->item[kept++].p;
        p->close |= fabs(sum - (double)p->params->typical_p) < 1e-5;
    }
    if (kept < p->n) {
        const struct plain_token *last = &p->item[kept - 1], *next = &p->item[kept];
        p->close |= last->logit != next->logit && fabs(last->key - next->key) < 1e-5;
    }
    p->n = kept;
    sort(p);
}

static void top_p(struct plain *p)
{
    if (p->params->top_p >= 1) {
        return;
    }
    plain_softmax(p);
    double sum = 0;
    size_t kept = 0;
    while (kept < p->n && (kept == 0 || !reaches(p, sum, (double)p->params->top_p))) {
        sum += p->item[kept++].p;
    }
    keep_first(p, kept);
}

static void min_p(struct plain *p)
{
    plain_softmax(p);
    size_t kept = 0;
    while (kept < p->n && reaches(p, p->item[kept].p, (double)p->params->min_p * p->item[0].p)) {
        kept++;
    }
    keep_first(p, p->params->min_p > 0 ? kept : p->n);
}

static void xtc(struct plain *p)
{
    if (p->params->xtc_probability <= 0 || p->params->xtc_threshold > 0.5f) {
        return;
    }
    plain_softmax(p);
    size_t likely = 0;
    while (likely < p->n && reaches(p, p->item[likely].p, (double)p->params->xtc_threshold)) {
        likely++;
    }
    if (likely >= 2 && p->n - (likely - 1) >= p->params->min_keep) {
        for (size_t i = likely - 1; i < p->n; i++) {
            p->item[i - (likely - 1)] = p->item[i];
        }
        p->n -= likely - 1;
    }
}

static void temperature(struct plain *p)
{
    double t = (double)p->params->temperature, range = (double)p->params->dynatemp_range;
    if (range > 0) {
        if (p->n == 1) {
            return;
        }
        plain_softmax(p);
        double low = t > range ? t - range : 0, high = t + range;
        t = low + (high - low) *
                      pow(entropy(p) / log((double)p->n), (double)p->params->dynatemp_exponent);
        p->close |= t < 1e-4; /* an entropy of next to nothing: it may round to greedy */
    }
    if (t <= 0) {
        p->n = 1;
        return;
    }
    double max = p->item[0].logit;
    for (size_t i = 0; i < p->n; i++) {
        p->item[i].logit = (p->item[i].logit - max) / t;
    }
}

void plain_apply(struct plain *p, enum sampler_kind kind)
{
    switch (kind) {
    case SAMPLER_PENALTIES:
        penalties(p);
        return;
    case SAMPLER_DRY:
        dry(p);
        return;
    case SAMPLER_TOP_N_SIGMA:
        top_n_sigma(p);
        return;
    case SAMPLER_TOP_K:
        keep_first(p, p->params->top_k > 0 && (size_t)p->params->top_k < p->n
                          ? (size_t)p->params->top_k
                          : p->n);
        return;
    case SAMPLER_TYPICAL_P:
        typical(p);
        return;
    case SAMPLER_TOP_P:
        top_p(p);
        return;
    case SAMPLER_MIN_P:
        min_p(p);
        return;
    case SAMPLER_XTC:
        xtc(p);
        return;
    case SAMPLER_TEMPERATURE:
        temperature(p);
        return;
    case SAMPLER_KINDS:
        abort();
    }
}

/* ---- mirostat ---------------------------------------------------------------------------- */

size_t plain_mirostat_count(struct plain *p, size_t n_vocab, double mu)
{
    plain_softmax(p);
    if (p->params->mirostat == 2) {
        size_t n = 0;
        while (n < p->n && reaches(p, mu, -log2(p->item[n].p))) {
            n++;
        }
        return n > 0 ? n : 1;
    }
    double products = 0, squares = 0;
    for (size_t i = 0; i < 99 && i + 1 < p->n; i++) {
        double t = log((double)(i + 2) / (double)(i + 1));
        products += t * log(p->item[i].p / p->item[i + 1].p);
        squares += t * t;
    }
    double s = products / squares, epsilon = s - 1;
    double k = pow(epsilon * pow(2, mu) / (1 - pow((double)n_vocab, -epsilon)), 1 / s);
    p->close |= fabs(k - round(k)) < 1e-3 * (1 + k);
    if (k >= (double)p->n) {
        return p->n;
    }
    return k > 1 ? (size_t)k : 1;
}
