/* daemon/model/sampler.h - from logits to the next token.
 *
 * Names, defaults and order are llama.cpp's: logit_bias, penalties, top_k, top_p, min_p,
 * temperature, then a draw; temperature <= 0 is greedy (the first of equal maxima). Every sampler
 * of the chain is a row of one table in sampler_chain.c; new ones are rows. One sampler belongs to
 * one sequence and is used by the engine thread only. The same seed, logits and history give the
 * same tokens on every machine (own PCG generator, no libc rand). */
#ifndef DAEMON_MODEL_SAMPLER_H
#define DAEMON_MODEL_SAMPLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct logit_bias {
    int32_t token;
    float bias; /* added to the logit; -inf forbids */
};

struct sampler_params {
    float temperature;       /* 0.8; <= 0: greedy */
    int32_t top_k;           /* 40; <= 0: all */
    float top_p;             /* 0.95; >= 1: off */
    float min_p;             /* 0.05; <= 0: off */
    float repeat_penalty;    /* 1: off */
    float presence_penalty;  /* 0: off */
    float frequency_penalty; /* 0: off */
    int32_t repeat_last_n;   /* 64; 0: off, -1: the whole context */
    uint32_t min_keep;       /* 0: at least one candidate stays */
    uint64_t seed;
    const struct logit_bias *logit_bias; /* copied by sampler_create */
    size_t n_logit_bias;
    bool ignore_eos; /* end-of-generation tokens get -inf: the caller gives them in eog */
    const int32_t *eog;
    size_t n_eog;
    uint32_t n_probs; /* how many best candidates sampler_sample reports */
};

#define SAMPLER_MAX_PROBS 32

struct token_prob {
    int32_t token;
    float logprob; /* natural logarithm, of the softmax over the raw logits (before the chain) */
};

struct sampled_token {
    int32_t token;
    float logprob; /* as above, of the chosen token */
    uint32_t n_probs;
    struct token_prob probs[SAMPLER_MAX_PROBS]; /* best first */
};

struct sampler;

struct sampler_params sampler_params_default(void);

/* 0 and *ret, -EINVAL (values out of range or not finite), -ENOMEM. */
int sampler_create(const struct sampler_params *params, uint32_t n_vocab, struct sampler **ret);
void sampler_destroy(struct sampler *s);

/* Tells the sampler of a token that is now part of the sequence (prompt or generated). -ERANGE when
 * the id is outside the vocabulary, -ENOMEM. */
int sampler_accept(struct sampler *s, int32_t token);

/* logits: (n_vocab), finite or -inf; not modified. -EDOM when any is NaN or +inf, or when all are
 * -inf, as they are or after bias and penalties. Does not accept the chosen token: the caller does.
 */
int sampler_sample(struct sampler *s, const float *logits, struct sampled_token *ret);

#endif
