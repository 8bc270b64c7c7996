/* tests/unit/model/sampler_plain.h - the samplers of a chain in the plainest form, as their
 * descriptions read: doubles, full sorts, quadratic searches. What the real ones are checked
 * against. */
#ifndef TESTS_UNIT_MODEL_SAMPLER_PLAIN_H
#define TESTS_UNIT_MODEL_SAMPLER_PLAIN_H

#include "daemon/model/sampler.h"

struct plain_token {
    int32_t token;
    double logit, p, key;
};

/* Candidates, always best first (equal ones by ascending id). */
struct plain {
    const struct sampler_params *params;
    const int32_t *history; /* oldest first */
    size_t n_history;
    struct plain_token *item; /* (n) */
    size_t n;
    /* A comparison was so close that float and double may decide differently. */
    bool close;
};

void plain_init(struct plain *p, const struct sampler_params *params, const float *logits,
                size_t n);
void plain_finish(struct plain *p);

/* xtc is taken to strike; with a probability other than 0 or 1 it is not to be used. */
void plain_apply(struct plain *p, enum sampler_kind kind);
void plain_softmax(struct plain *p); /* fills p */

/* How many candidates mirostat leaves of n_vocab at a surprise of mu bits. Uses params. */
size_t plain_mirostat_count(struct plain *p, size_t n_vocab, double mu);

#endif
