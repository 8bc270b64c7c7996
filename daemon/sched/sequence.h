/* daemon/sched/sequence.h - a request that runs: its tokens, KV, sampler and place in the step.
 *
 * tokens holds the prompt and what was generated; the first kv.n_tokens of them are computed.
 * Engine thread only. */
#ifndef DAEMON_SCHED_SEQUENCE_H
#define DAEMON_SCHED_SEQUENCE_H

#include "daemon/kv/sequence.h"
#include "daemon/model/text_stream.h"
#include "daemon/request.h"

struct sequence {
    struct sequence *next; /* running ones, oldest first */
    struct request *request;
    struct kv_sequence kv;
    struct sampler *sampler;  /* NULL but for REQUEST_GENERATE */
    struct text_stream *text; /* the same */
    int32_t *tokens;
    size_t n_tokens, capacity;
    size_t n_prompt; /* the first of tokens; the rest was generated */
    size_t part;     /* which input of an EMBED, which sample of a GENERATE */
    double *sums;    /* (n_embd) of rows so far, for POOLING_MEAN; else NULL */
    size_t n_taken;  /* LOGITS, EMBED: rows before it are published, or in sums */
    bool finished; /* its vector is complete, its sample has ended; else it ends with its request */
    struct {
        float *logits; /* (n_vocab) of the prompt's last row, owned; NULL: none is to begin */
        uint32_t next; /* sample */
    } begins;          /* of a first sample: the others, which begin with its prompt */
    bool has_place;    /* among the running; else it gave way, and holds no block */
    bool has_had_place;
    struct {
        bool known;
        uint32_t n_tokens, n_blocks, n_from_store;
    } spared;        /* of the prompt, by the cache: before it gave way for the first time */
    int32_t level;   /* at which it was given its place: order_level() */
    uint64_t number; /* of its start */
    uint64_t bytes_committed; /* of the arena's bound */
    size_t covered_tokens;    /* that these are for */
    uint32_t charged_tokens;  /* the first so many are another sample's to account for */
    bool covered_view;        /* and whether its view had begun */
    uint32_t n_starved;       /* steps in a row for which it found no memory */
    uint64_t last_turn;       /* the step in which its model ran last */
    enum sequence_hold {
        SEQUENCE_READY,
        SEQUENCE_STARVED, /* there was no memory for its next block */
        SEQUENCE_WAITING, /* for blocks that another computes, or that are being checked */
    } hold;               /* in the step that is being formed */
    bool barred;          /* from that step: its realm's blocks are being removed */

    /* Of the step in progress. */
    uint32_t step_rows, step_first_row;
    uint32_t step_outs, step_first_out;

    uint64_t started_ns, prompt_done_ns, last_token_ns;
};

/* space: whose blocks it shares, or NULL. 0 and *ret; -ENOMEM; -EINVAL (sampling parameters);
 * -E2BIG (the grammar). The request stays the caller's. For an EMBED it takes the next input. */
int sequence_create(struct request *r, struct kv_cache *cache, struct kv_space *space,
                    struct sequence **ret);
/* Another sample of the request whose prompt s has computed just now: at the end of that prompt,
 * without a place and a block. 0 and *ret, or as sequence_create(). */
int sequence_create_sample(const struct sequence *s, size_t sample, struct sequence **ret);
void sequence_destroy(struct sequence *s); /* releases its KV; NULL is legal */

/* Of the prompt, those in blocks that all samples can hold: the whole ones. */
static inline uint32_t sequence_shared_tokens(const struct sequence *s)
{
    return (uint32_t)(s->n_prompt / GQA_KV_BLOCK_TOKENS * GQA_KV_BLOCK_TOKENS);
}
static inline struct request_sample *sequence_sample(const struct sequence *s)
{
    return &s->request->samples[s->part];
}
/* The sample ends; its request does with the last of them. */
void sequence_end_sample(struct sequence *s, enum request_finish how);
/* Positions that a request's sequences may come to have: the context, unless their KV policy bounds
 * what is seen. */
uint32_t sequence_positions_max(const struct request *r);

/* How many sequences a request has in the end. */
size_t sequence_count_of(const struct request *r);
/* Tokens of the request's next sequence at its start. There must be one. */
uint64_t sequence_tokens_first(const struct request *r);
/* Tokens that a sequence of the request can come to have; s NULL: the next one, likewise. */
uint64_t sequence_tokens_most(const struct request *r, const struct sequence *s);

/* What the cache has spared it: of its prompt's end, or of the first time that it gave way. */
void sequence_note_spared(struct sequence *s);

/* Lets go of its blocks. What they held is computed again later, or adopted, so that no bit of what
 * follows differs. */
void sequence_yield(struct sequence *s);

/* Its tokens, as the cache wants them. A strict one has no blocks of class P. */
static inline struct kv_text sequence_text(const struct sequence *s)
{
    return (struct kv_text){s->tokens, s->n_tokens, s->request->strict ? 0 : s->n_prompt};
}

/* Of n_tokens, for what they take; s NULL: of the request's next sequence, likewise. */
struct kv_extent sequence_extent(const struct request *r, const struct sequence *s,
                                 uint64_t n_tokens, uint32_t step_rows);

/* How many of its tokens may come from the cache: the others' outputs are wanted, or their votes.
 */
uint32_t sequence_adopt_limit(const struct sequence *s);

/* Blocks up to so many tokens it may leave to others. */
static inline uint32_t sequence_give_limit(const struct sequence *s)
{
    uint32_t common = kv_view_n_common(&s->kv.view.policy, s->kv.view.n_prompt);
    return s->n_prompt < common ? (uint32_t)s->n_prompt : common;
}

/* Tokens that wait to be computed: the rest of the prompt, or the last generated one. */
static inline size_t sequence_pending(const struct sequence *s)
{
    return s->n_tokens - s->kv.n_tokens;
}

/* Whether more waits than the last generated token: the prompt, or what is to be computed again.
 * Such chunks yield to sequences that generate. */
static inline bool sequence_is_prefilling(const struct sequence *s)
{
    return s->kv.n_tokens < s->n_prompt || sequence_pending(s) > 1;
}

/* Whether the step that it takes part in gives logits for its next token. */
static inline bool sequence_generates(const struct sequence *s)
{
    return s->request->kind == REQUEST_GENERATE && s->step_outs > 0 && s->request->n_predict > 0;
}

/* Appends a generated token. -ENOMEM. */
int sequence_append(struct sequence *s, int32_t token);

#endif
