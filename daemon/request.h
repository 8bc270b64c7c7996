/* daemon/request.h - one generation, logits or embedding request, from admission to its last event.
 *
 * The loop thread creates a request, submits it to the engine and keeps the pointer; the engine
 * works on it and sends events; after the final event (REQUEST_DONE) the loop owns it alone and
 * destroys it. Fields are grouped by who writes them. */
#ifndef DAEMON_REQUEST_H
#define DAEMON_REQUEST_H

#include "daemon/area.h"
#include "daemon/kv/sequence.h"
#include "daemon/model/grammar.h"
#include "daemon/model/model.h"
#include "daemon/model/pooling.h"
#include "daemon/model/sampler.h"
#include "ipc/protocol.h"

#include <stdatomic.h>
#include <sys/types.h>

enum request_kind { REQUEST_GENERATE, REQUEST_LOGITS, REQUEST_EMBED };

enum request_finish {
    FINISH_NONE,
    FINISH_STOP,      /* a stop string */
    FINISH_EOS,       /* an end-of-generation token */
    FINISH_LENGTH,    /* n_predict or the context was reached */
    FINISH_TIME,      /* t_max_predict_ms */
    FINISH_CANCELLED, /* by the caller, or because it went away */
    FINISH_ERROR
};
const char *request_finish_name(enum request_finish finish); /* "stop", "eos", ... */

/* Where the time went, in milliseconds. */
struct request_timings {
    /* By the clock: from submission to the first place among the running; from there to the end of
     * the prompt; from submission to the first token; from there to the last. */
    double queue_ms, prompt_ms, first_token_ms, predict_ms;
    /* At work: steps that computed rows of its prompt; other steps with a row of it; drawing tokens
     * from logits. */
    double prefill_ms, decode_ms, sampling_ms;
};

/* What can be seen of a request while it is open. */
enum request_state {
    REQUEST_STATE_WAITING, /* for a place among the running */
    REQUEST_STATE_PREFILL,
    REQUEST_STATE_DECODE,
    REQUEST_STATE_PAUSED,    /* for a slow reader */
    REQUEST_STATE_PREEMPTED, /* gave its place or memory to others, and waits to go on */
};
const char *request_state_name(enum request_state state); /* "waiting", ... */

struct fair_user;

/* One text of an embedding request. */
struct request_input {
    int32_t *tokens; /* owned; at least one */
    size_t n_tokens;
};

/* What a REQUEST_EMBED has instead of tokens. Every input is a sequence of its own, so that many
 * share the engine's steps. */
struct request_embed {
    struct request_input *inputs; /* owned */
    size_t n_inputs;
    enum pooling pooling;
    int32_t norm;   /* as embedding_normalise() takes it */
    uint32_t width; /* of a vector; at most what the model gives */
    float *vectors; /* (n_inputs, width), owned; NULL with POOLING_NONE, whose rows are events */
};

/* One continuation of a REQUEST_GENERATE's prompt. Samples share the prompt's KV, and draw with
 * seeds that follow one another (request_seed), so that the first is what a request of one gives,
 * and any of them can be had alone. */
struct request_sample {
    enum request_finish finish; /* NONE while it goes on */
    int stop_index;             /* FINISH_STOP: which one */
    uint32_t n_generated;
};
#define REQUEST_SAMPLES_MAX PROTO_SAMPLES_MAX

struct request {
    /* Written by the loop before submission, then constant. */
    enum request_kind kind;
    struct model *model; /* a reference */
    uid_t uid;
    int32_t *tokens; /* owned; at least one, but for EMBED */
    size_t n_tokens;
    uint32_t n_predict;             /* of each sample */
    uint32_t n_samples;             /* of a GENERATE; 1 unless request_set_samples() */
    struct sampler_params sampling; /* its arrays are owned by the request */
    struct grammar *grammar;        /* that the text follows, owned; or NULL */
    char **stops;                   /* owned */
    size_t *stop_bytes;
    size_t n_stops;
    bool ignore_eos;
    uint32_t t_max_predict_ms;
    uint32_t first_row;           /* LOGITS */
    char realm[KV_REALM_BYTES];   /* whose cached blocks it shares; "": it shares nothing */
    int pin;                      /* 1: the prompt's blocks stay until unpinned; -1: no longer */
    int32_t priority;             /* higher goes first (daemon/sched/order.h) */
    uint32_t deadline_ms;         /* from submission to the end; 0: none */
    bool strict;                  /* all rows are of class D: no bit depends on who made a block */
    struct kv_policy kv_policy;   /* what is kept of its tokens */
    bool cache_exact;             /* only blocks that are bit-identical to computing them anew */
    bool wants_kept;              /* GENERATE: kept */
    bool logprobs;                /* LOGITS */
    const atomic_bool *is_unread; /* set while its uid's programs have too much to read; or NULL */
    struct area *area;            /* where its rows go while there is room, a reference; or NULL */
    struct request_embed embed;
    void *owner;        /* the loop's own, never touched by the engine */
    double delivery_ms; /* likewise: from the making of events to their packing, all together */

    /* Shared. */
    atomic_bool cancelled;           /* set by the loop, read by the engine between steps */
    atomic_size_t undelivered_bytes; /* of events; the engine pauses the sequence above a bound */
    struct {                         /* written by the engine, for those who look on */
        atomic_uint state, n_prompt, n_cached, n_generated;
    } seen;

    /* Written by the engine, read by the loop with the DONE event. */
    enum request_finish finish; /* of all; of samples that all ended by themselves the first's */
    struct request_sample *samples; /* (n_samples), owned */
    enum proto_error_code error;
    char error_message[256];
    uint32_t n_prompt, n_cached, n_generated; /* n_generated: of all samples */
    uint32_t hit_blocks, store_blocks;        /* adopted; of these from the store */
    enum kv_miss miss;                        /* why no more of them */
    uint32_t n_pinned;                        /* tokens, of whole blocks */
    uint32_t n_kept, n_dropped;               /* tokens of its last step, by its KV policy */
    float *kept;          /* (n_prompt) share of layers and groups that keep each, or NULL; owned */
    uint32_t n_steps;     /* that had a row of it */
    uint32_t n_preempted; /* so often it gave way */
    struct request_timings timings;
    uint64_t submitted_ns;

    /* The engine's queue and sequences. An EMBED may wait there for its next input while sequences
     * of others of its inputs run. */
    struct request *next;
    struct fair_user *user; /* while it is open */
    uint64_t turn_ns;       /* its place in its user's line */
    uint64_t skipped;       /* the round of admission that has passed it by */
    uint64_t noted_turn;    /* the last step that n_steps counts */
    double needed_ms;       /* at least, for its deadline; below 0: not estimated yet */
    bool is_queued;
    size_t next_input;                /* EMBED: the first that was not begun */
    uint32_t n_sequences;             /* that run */
    struct request_event *done_event; /* allocated at submission, so that the end cannot fail */
};

/* A zeroed request with defaults; request_destroy frees what it owns and drops the model. */
struct request *request_create(enum request_kind kind, struct model *model);
/* Before submission, of a GENERATE: 1 to REQUEST_SAMPLES_MAX. -ENOMEM. */
int request_set_samples(struct request *r, uint32_t n);
/* That a sample draws with: sampling.seed + sample, modulo 2^64. */
uint64_t request_seed(const struct request *r, uint32_t sample);
void request_destroy(struct request *r); /* NULL is legal */

/* Whether more of its events wait for delivery than may, or, of one that generates nothing, of its
 * uid's answers: it rests until the readers catch up. */
bool request_is_paused(const struct request *r);

/* An event, allocated by the engine in one piece with its arrays; the loop frees it with free(). */
enum request_event_kind { REQUEST_TOKENS, REQUEST_ROWS, REQUEST_DONE };

struct request_event {
    struct request_event *next;
    struct request *request;
    enum request_event_kind kind;
    size_t bytes; /* counted in undelivered_bytes; the loop subtracts it when delivered */
    uint64_t made_ns;
    /* TOKENS: tokens generated since the last event, and the text that may be shown now. */
    uint32_t n_tokens;
    const struct sampled_token *tokens; /* with logprobs when n_probs was asked for */
    const char *text;
    size_t text_bytes;
    /* ROWS: logits (n_rows, n_vocab) or logprobs (n_rows) from first_row on; or embeddings (n_rows,
     * embed.width) of the input that part names. */
    uint32_t first_row, n_rows;
    uint32_t part; /* which input of an EMBED, which sample of a GENERATE */
    const float *rows;
    bool is_placed; /* rows lie in the request's area, at place: shared with the client */
    uint64_t place;
};

#endif
