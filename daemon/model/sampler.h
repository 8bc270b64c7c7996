/* daemon/model/sampler.h - from logits to the next token.
 *
 * Names, defaults and order are llama.cpp's: logit_bias, then the chain of params.chain, then a
 * draw. The chain is by default penalties, dry, top_n_sigma, top_k, typical_p, top_p, min_p, xtc,
 * temperature; what is not in it is not applied, the temperature included. Every sampler of the
 * chain is a row of one table in sampler_chain.c; new ones are rows. With mirostat there is no
 * chain: logit_bias, temperature, mirostat.
 *
 * A temperature <= 0 (and no dynatemp_range) is greedy: where it stands in the chain, the first of
 * equal maxima of what the samplers before it left. Tokens that a sampler drops are gone for the
 * ones after it.
 *
 * One sampler belongs to one sequence, and whoever uses it uses it alone: the engine thread, or the
 * worker that it has draw for that sequence (sched/draw.h). The same seed, logits
 * and history give the same tokens on every machine (own PCG generator, exponentials and
 * logarithms, no libc rand). */
#ifndef DAEMON_MODEL_SAMPLER_H
#define DAEMON_MODEL_SAMPLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a chain is made of, in the default order. */
enum sampler_kind {
    SAMPLER_PENALTIES,
    SAMPLER_DRY,
    SAMPLER_TOP_N_SIGMA,
    SAMPLER_TOP_K,
    SAMPLER_TYPICAL_P,
    SAMPLER_TOP_P,
    SAMPLER_MIN_P,
    SAMPLER_XTC,
    SAMPLER_TEMPERATURE,
    SAMPLER_KINDS
};
#define SAMPLER_CHAIN_MAX 16 /* a sampler may come more than once */

const char *sampler_name(enum sampler_kind kind); /* "top_k" */
/* By name, or by llama.cpp's other spelling of it ("typ_p", "temp"). -ENOENT. */
int sampler_by_name(const char *name, size_t bytes, enum sampler_kind *ret);

struct logit_bias {
    int32_t token;
    float bias; /* added to the logit; -inf forbids */
};

struct dry_breakers;

struct sampler_params {
    float temperature;          /* 0.8; <= 0: greedy */
    float dynatemp_range;       /* 0: off; the temperature varies by +- this with the entropy */
    float dynatemp_exponent;    /* 1; >= 0 */
    int32_t top_k;              /* 40; <= 0: all */
    float top_p;                /* 0.95; >= 1: off */
    float min_p;                /* 0.05; <= 0: off */
    float typical_p;            /* 1; >= 1: off */
    float top_n_sigma;          /* -1; <= 0: off */
    float xtc_probability;      /* 0: off */
    float xtc_threshold;        /* 0.1; > 0.5: off */
    float repeat_penalty;       /* 1: off */
    float presence_penalty;     /* 0: off */
    float frequency_penalty;    /* 0: off */
    int32_t repeat_last_n;      /* 64; 0: off, -1: the whole context */
    float dry_multiplier;       /* 0: off; >= 0 */
    float dry_base;             /* 1.75; < 1: off */
    int32_t dry_allowed_length; /* 2: longer repetitions are penalised; >= 0 */
    int32_t dry_penalty_last_n; /* -1: the whole context, 0: off */
    /* Borrowed, must outlive the sampler; NULL: nothing breaks a repetition. */
    const struct dry_breakers *dry_breakers;
    int32_t mirostat;                 /* 0: off; 1, 2: that version, in the chain's place */
    float mirostat_tau, mirostat_eta; /* 5, 0.1: wished surprise in bits, learning rate */
    uint8_t chain[SAMPLER_CHAIN_MAX]; /* enum sampler_kind */
    uint32_t n_chain;
    uint32_t
        min_keep; /* 0; as many of the best candidates every sampler leaves, and at least one */
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

/* Whether tokens of the sequence will be compared with dry_breakers. */
bool sampler_params_want_dry(const struct sampler_params *params);

/* 0 and *ret, -EINVAL (values out of range or not finite), -ENOMEM. */
int sampler_create(const struct sampler_params *params, uint32_t n_vocab, struct sampler **ret);
void sampler_destroy(struct sampler *s);

/* Tells the sampler of a token that is now part of the sequence (prompt or generated). -ERANGE when
 * the id is outside the vocabulary, -ENOMEM. */
int sampler_accept(struct sampler *s, int32_t token);

struct constraint;

/* From now on only tokens that the constraint allows are chosen, and what is accepted is told to it
 * (-EINVAL, -E2BIG: see constraint.h). A token is chosen first and then checked; only if it is
 * refused, all others are, and one is chosen again. On success the constraint is the sampler's;
 * once per sampler. -ENOMEM. */
int sampler_constrain(struct sampler *s, struct constraint *c);
/* The constraint has the text end here. False without one. */
bool sampler_is_complete(const struct sampler *s);

/* logits: (n_vocab), finite or -inf; not modified. -EDOM when any is NaN or +inf, or when all are
 * -inf, as they are or after bias and penalties. -ENODATA when the constraint leaves no token;
 * -E2BIG: see constraint.h. Does not accept the chosen token: the caller does. */
int sampler_sample(struct sampler *s, const float *logits, struct sampled_token *ret);

#endif
