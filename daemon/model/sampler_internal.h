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

struct sampler {
    struct sampler_params params; /* logit_bias and eog are NULL here: see bias */
    uint32_t n_vocab;
    struct logit_bias *bias; /* logit_bias, then end-of-generation tokens to forbid */
    size_t n_bias;
    struct pcg32 rng;
    struct candidates cand; /* cand.item: (n_vocab), written anew at every step */

    /* The last tokens, for the penalties; NULL and empty while those are off. history is a ring of
     * repeat_last_n once it has grown to that; counts is (n_vocab): how often each is in it. */
    int32_t *history;
    size_t n_history, history_capacity, history_next;
    uint32_t *counts;
};

/* One sampler of the chain. */
struct sampler_row {
    const char *name;
    bool (*enabled)(const struct sampler *s);
    void (*apply)(struct sampler *s, struct candidates *c);
    bool moves_logits; /* it may change which candidate is the best: greedy needs it too */
};

extern const struct sampler_row sampler_rows[];
extern const size_t sampler_n_rows;

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

void pcg32_init(struct pcg32 *rng, uint64_t seed);
double pcg32_unit(struct pcg32 *rng); /* [0, 1), 53 bits */

/* Makes the first k candidates (k <= n) the best ones in order. O(n log k). */
void candidates_sort(struct candidates *c, size_t k);
float candidates_max(const struct candidates *c); /* n > 0 */

#endif
