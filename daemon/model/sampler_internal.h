/* daemon/model/sampler_internal.h - what the sampler's files share. */
#ifndef DAEMON_MODEL_SAMPLER_INTERNAL_H
#define DAEMON_MODEL_SAMPLER_INTERNAL_H

#include "daemon/model/sampler.h"

#include <string.h>

struct candidate {
    float logit;
    int32_t token;
};

/* The candidates of one step. The first n_sorted are the best ones, best first (equal logits by
 * ascending id); the others lie in any order that depends on the logits alone. */
struct candidates {
    struct candidate *item;
    size_t n;
    size_t n_sorted;
};

struct pcg32 {
    uint64_t state;
    uint64_t increment; /* odd */
};

/* The last tokens of the sequence, for the samplers that look back; empty while none of those is
 * on. A ring of max tokens once it has grown to that. */
struct token_history {
    int32_t *token;
    size_t n, capacity, max;
    size_t next; /* the oldest one's place, once the ring is full; else 0 */
};

/* What the dry sampler works with; NULL while it is off. */
struct dry_state {
    int32_t *recent;   /* (history.capacity): the window, newest first */
    uint32_t *repeat;  /* (history.capacity): how long the newest tokens are found that far back */
    uint32_t *longest; /* (n_vocab): of the repetition that a token would continue, plus 1; 0: none.
                          All 0 between two steps. */
};

struct sampler {
    struct sampler_params params; /* logit_bias and eog are NULL here: see bias */
    uint32_t n_vocab;
    struct logit_bias *bias; /* logit_bias, then end-of-generation tokens to forbid */
    size_t n_bias;
    uint8_t chain[SAMPLER_CHAIN_MAX]; /* of params.chain what has an effect */
    uint32_t n_chain;
    bool takes_best; /* whatever comes: the answer is the best of the logits with their bias */
    struct pcg32 rng;
    struct candidates cand; /* cand.item: (n_vocab), written anew at every step */

    struct token_history history;
    uint32_t *counts;   /* (n_vocab): how often in the last repeat_last_n tokens; or NULL */
    float *kept_logits; /* (n_vocab): for typical_p, by token; or NULL */
    float *moved;       /* (n_vocab): logits with their bias; or NULL */
    struct dry_state dry;
    float mirostat_mu; /* bits */

    struct constraint *constraint; /* or NULL */
    float *masked;                 /* (n_vocab): logits of what it allows; or NULL */
};

/* One sampler of the chain. */
struct sampler_row {
    const char *name, *other_name; /* the latter may be NULL */
    bool (*enabled)(const struct sampler_params *p);
    void (*apply)(struct sampler *s, struct candidates *c);
    bool moves_logits; /* else it only drops candidates, or keeps their order */
    bool keeps_best;   /* the best candidate is still the best afterwards, whatever was dropped */
};

extern const struct sampler_row sampler_rows[SAMPLER_KINDS];

/* e^x for x <= 0 (or -inf) by basic operations only, so that every machine draws the same tokens;
 * relative error below 2e-7; 0 below about -87.
 * Cody-Waite reduction x = n ln 2 + r and the Cephes polynomial for e^r, |r| <= ln 2 / 2. */
static inline float sampler_exp(float x)
{
    const float lowest = -87.0f;     /* e^-87 is still a normal float */
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float clamped = x > lowest ? x : lowest;
    float shifted = clamped * 1.44269504088896341f + magic;
    float n = shifted - magic;
    float r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &p, sizeof(bits));
    bits += (uint32_t)(int32_t)n << 23;
    memcpy(&p, &bits, sizeof(p));
    return x > lowest ? p : 0.0f;
}

/* Checks and sums logits (n): -EDOM when any is NaN or +inf or all are -inf; *ret_best is the index
 * of the first maximum, *ret_log_sum the logarithm of the sum of their exponentials. */
int sampler_log_sum_exp(const float *logits, size_t n, size_t *ret_best, float *ret_log_sum);
/* The same without the sum. */
int sampler_find_best(const float *logits, size_t n, size_t *ret);

/* ln x, e^x and x^y by basic operations only, for the same reason; relative errors below 1e-14.
 * x >= 0 for the logarithm and the power; exponentials are kept within e^-700 to e^700. */
double sampler_log(double x);
double sampler_exp_wide(double x);
double sampler_pow(double x, double y);

void pcg32_init(struct pcg32 *rng, uint64_t seed);
double pcg32_unit(struct pcg32 *rng); /* [0, 1), 53 bits */

/* ---- the history ------------------------------------------------------------------------- */

static inline int32_t history_back(const struct token_history *h, size_t i) /* 0: the newest */
{
    size_t at = h->next + h->n - 1 - i;
    return h->token[at < h->n ? at : at - h->n];
}

/* ---- candidates (sampler_candidates.c) --------------------------------------------------- */

/* Makes the first k candidates (k <= n) the best ones in order. O(n log k). */
void candidates_sort(struct candidates *c, size_t k);
/* Makes the k best (1 to n) of n logits the candidates, in order: what sorting all and keeping the
 * first gives. Candidate i is token i before. */
void candidates_take_best(struct candidates *c, const float *logits, size_t n, size_t k);
/* Drops all but the first k candidates, which must be sorted. */
void candidates_keep_first(struct candidates *c, size_t k);
/* Drops those below least, but keeps at least the best `keep` (1 to n) ones. */
void candidates_keep_above(struct candidates *c, float least, size_t keep);
float candidates_max(const struct candidates *c); /* n > 0 */

/* The softmax of the candidates: share i is e^(logit i - max) / sum. mean is the expectation of
 * logit - max, which is <= 0; the entropy is ln(sum) - mean. */
struct softmax {
    float max;
    double sum, mean;
};
struct softmax candidates_softmax(const struct candidates *c);
/* Draws by the softmax: the index of the candidate. */
size_t candidates_draw(const struct candidates *c, struct pcg32 *rng);

/* ---- samplers ---------------------------------------------------------------------------- */

/* How many candidates a sampler must leave. */
static inline size_t sampler_min_keep(const struct sampler *s, const struct candidates *c)
{
    size_t keep = s->params.min_keep > 0 ? s->params.min_keep : 1;
    return keep < c->n ? keep : c->n;
}

/* Divides by the temperature; at <= 0 only the best stays. */
void temperature_scale(struct candidates *c, float temperature);

/* Truncating ones (sampler_truncate.c). */
size_t top_k_keeps(const struct sampler *s, size_t n); /* of n candidates */
void top_n_sigma_apply(struct sampler *s, struct candidates *c);
void top_k_apply(struct sampler *s, struct candidates *c);
void typical_p_apply(struct sampler *s, struct candidates *c);
void top_p_apply(struct sampler *s, struct candidates *c);
void min_p_apply(struct sampler *s, struct candidates *c);
void xtc_apply(struct sampler *s, struct candidates *c);

/* sampler_dry.c */
bool dry_enabled(const struct sampler_params *p);
int dry_init(struct sampler *s); /* -ENOMEM */
void dry_finish(struct sampler *s);
int dry_grow(struct sampler *s, size_t capacity); /* of the history. -ENOMEM */
void dry_apply(struct sampler *s, struct candidates *c);

/* sampler_mirostat.c: draws among the candidates and learns from the draw; the index. */
size_t mirostat_draw(struct sampler *s, struct candidates *c);

#endif
