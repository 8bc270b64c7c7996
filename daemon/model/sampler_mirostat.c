/* daemon/model/sampler_mirostat.c - draws that hold the surprise of the text at a wished value.
 *
 * Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity",
 * 2021. Both versions cut the candidates off at a surprise of mu bits, draw, and move mu by the
 * error of the drawn token's surprise. */
#include "daemon/model/sampler_internal.h"

#include <math.h>

#define LN2            0.693147180559945309417
#define ESTIMATED_FROM 100 /* candidates; the paper's m */

/* The exponent s of Zipf's law that fits the best candidates (least squares of the logarithms, the
 * paper's equation for s-hat); NAN with less than two. */
static double zipf_exponent(struct candidates *c)
{
    size_t m = c->n < ESTIMATED_FROM ? c->n : ESTIMATED_FROM;
    double products = 0, squares = 0;
    candidates_sort(c, m);
    for (size_t i = 0; i + 1 < m && c->item[i + 1].logit > -INFINITY; i++) {
        double t = sampler_log((double)(i + 2) / (double)(i + 1));
        double b = (double)c->item[i].logit - (double)c->item[i + 1].logit;
        products += t * b;
        squares += t * t;
    }
    return products / squares;
}

/* Version 1: as many candidates as a Zipf distribution of that exponent has up to mu bits. */
static void keep_estimated(struct sampler *s, struct candidates *c)
{
    double exponent = zipf_exponent(c);
    double excess = exponent - 1;
    double vocabulary = sampler_log((double)s->n_vocab);
    double rest = 1 - sampler_exp_wide(-excess * vocabulary);
    double factor = rest != 0 ? excess / rest : 1 / vocabulary; /* its limit at excess 0 */
    double most =
        sampler_pow(factor * sampler_exp_wide((double)s->mirostat_mu * LN2), 1 / exponent);
    size_t k = 1; /* also for NAN */
    if (most >= (double)c->n) {
        k = c->n;
    } else if (most > 1) {
        k = (size_t)most;
    }
    candidates_sort(c, k);
    candidates_keep_first(c, k);
}

/* Version 2: the candidates of at most mu bits, at least the best one. */
static void keep_unsurprising(struct sampler *s, struct candidates *c)
{
    struct softmax all = candidates_softmax(c);
    double least = sampler_log(all.sum) - (double)s->mirostat_mu * LN2;
    candidates_keep_above(c, (float)((double)all.max + least), 1);
}

size_t mirostat_draw(struct sampler *s, struct candidates *c)
{
    if (s->params.mirostat == 1) {
        keep_estimated(s, c);
    } else {
        keep_unsurprising(s, c);
    }
    size_t drawn = candidates_draw(c, &s->rng);
    struct softmax kept = candidates_softmax(c);
    double below = (double)c->item[drawn].logit - (double)kept.max;
    double surprise = (sampler_log(kept.sum) - below) / LN2;
    s->mirostat_mu -= s->params.mirostat_eta * (float)(surprise - (double)s->params.mirostat_tau);
    return drawn;
}
