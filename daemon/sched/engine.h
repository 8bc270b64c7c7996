/* daemon/sched/engine.h - the engine thread: batches, steps, samples, publishes.
 *
 * One engine runs one device. It takes requests from a bounded queue, forms a batch of at most
 * n_batch rows out of all runnable sequences (one decode row each, then prompt chunks), runs one
 * step of one model, samples, and publishes events. Everything that changes a sequence (cancel,
 * deadline, unload) acts between steps.
 *
 * submit/cancel/take_events/stats are for the loop thread. */
#ifndef DAEMON_SCHED_ENGINE_H
#define DAEMON_SCHED_ENGINE_H

#include "daemon/kv/cache_admin.h"
#include "daemon/kv/export.h"
#include "daemon/kv/import.h"
#include "daemon/request.h"
#include "daemon/sched/fair.h"
#include "daemon/sched/histogram.h"

struct engine;

/* Most rows of a step that give logits: what models must be loaded with (max_out_rows). */
uint32_t engine_max_out_rows(uint32_t n_parallel);

struct engine_options {
    struct pool *pool;   /* owned by the caller; the engine thread becomes its worker 0 */
    uint32_t n_batch;    /* most rows of a step */
    uint32_t n_parallel; /* most sequences that run at once */
    uint32_t n_queue;    /* most requests that wait, and up to 4 more of each user */
    /* Milliseconds that steps with generations may take for the prompts beside them, also where
     * that stretches the generations' time by more than budget.h allows; 0: none. */
    uint32_t step_ms_target;
    /* The KV cache. options.kv.wake and wake_arg are the engine's own. */
    struct kv_cache_options kv;
    /* Called on the engine thread when events are ready to be taken; must only wake the loop. */
    void (*notify)(void *arg);
    void *notify_arg;
};

/* -ETIMEDOUT: it could not be made, whatever for, and the disk does not answer: what the cache had
 * it do is left to the io thread, as when engine_destroy() returns false. */
int engine_create(const struct engine_options *options, struct engine **ret);
/* Cancels what runs, joins the thread, answers what waits with -ESHUTDOWN. What exports and imports
 * hold stays until the engine is destroyed: another thread may be copying it. Everything else may
 * still be called, and is refused. NULL is legal, and so is a second time. */
void engine_stop(struct engine *e);
/* Stops it if need be. Nobody may be copying; events not taken are dropped. A purge whose files are
 * still being removed is waited for, and answered here. NULL is legal. False: the disk does not
 * answer, and what the cache had it do is left to the io thread (kv_cache_destroy()). */
bool engine_destroy(struct engine *e);
/* Instead of destroying a stopped one, where others copy for ever what it holds and the process is
 * about to end: what it was saving is saved, if the disk answers. */
void engine_settle_cache(struct engine *e);

/* Hands over a request. -EAGAIN: the queue is full (BUSY); -ESHUTDOWN: draining. On failure the
 * caller keeps the request. */
int engine_submit(struct engine *e, struct request *r);

/* Milliseconds after which a queue that is full should have room. */
uint32_t engine_retry_ms(struct engine *e);

/* Asks for the end of a request: a DONE event with FINISH_CANCELLED follows within a step. */
void engine_cancel(struct engine *e, struct request *r);

/* A slow reader caught up (undelivered_bytes went down): the engine looks again. */
void engine_kick(struct engine *e);

/* All events published so far, oldest first, or NULL. */
struct request_event *engine_take_events(struct engine *e);

/* No new requests from now on. */
void engine_drain(struct engine *e);

/* How long what took, since the start. */
struct engine_latency {
    struct histogram first_token; /* from submission to the first generated token */
    struct histogram inter_token; /* from one token of a sequence to the next */
    struct histogram queue;       /* from submission to a place among the running */
    struct histogram whole;       /* from submission to the end, of what was not cancelled */
    struct histogram step;        /* of the engine */
};

struct engine_stats {
    uint32_t n_running, n_waiting;
    uint64_t n_requests, n_steps, n_prompt_tokens, n_generated_tokens;
    uint64_t step_ns_total;
    uint64_t n_preemptions;
    uint32_t step_rows; /* of the last step */
    struct engine_latency latency;
    uint64_t kv_bytes_used, kv_bytes_max, kv_blocks_used;
    struct kv_cache_stats kv;
};
void engine_stats(struct engine *e, struct engine_stats *ret);

/* The users that are known, in no order: up to max of them. Returns how many there are. Their next
 * is not to be followed. */
size_t engine_users(struct engine *e, struct fair_user *ret, size_t max);
/* Weights of users' shares, from the next step on; others have 1. -ENOMEM. */
int engine_set_weights(struct engine *e, const struct fair_weight *weights, size_t n);

/* The open requests, waiting ones last: up to max of them. Returns how many there are. They stay
 * until their DONE events are taken; what others than the loop write of them is in seen. */
size_t engine_requests(struct engine *e, const struct request **ret, size_t max);

/* ---- the cache --------------------------------------------------------------------------- */

enum engine_kv_op {
    ENGINE_KV_LIST,  /* what is kept */
    ENGINE_KV_DROP,  /* lets go of it */
    ENGINE_KV_PURGE, /* removes it for good; running sequences of the realm begin anew */
    /* Prefixes that leave and come; engine_transfer.c has the bounds. They wait for the io thread
     * without holding up a step. */
    ENGINE_KV_EXPORT,      /* finds and holds a prompt's blocks, to be read by another thread */
    ENGINE_KV_EXPORT_END,  /* nobody reads any more */
    ENGINE_KV_IMPORT,      /* a place for a piece, to be written by another thread */
    ENGINE_KV_IMPORT_KEEP, /* all has come: it enters the tree */
    ENGINE_KV_IMPORT_DROP, /* what has come is of no use */
};

/* The caller's until done, which comes once, on the engine thread, and must only hand the news to
 * the loop. */
struct engine_kv_call {
    enum engine_kv_op op;
    bool all; /* every realm */
    char realm[KV_REALM_BYTES];
    const struct kv_identity *model; /* DROP: of this model alone; or NULL. EXPORT, IMPORT */
    uint32_t uid;                    /* EXPORT, IMPORT: whose, for the bounds */
    const struct kv_layout *layout;  /* EXPORT, IMPORT: the model's */
    const int32_t *tokens;           /* (n_tokens) EXPORT */
    size_t n_tokens;
    struct kv_import_piece piece; /* IMPORT; its data is not looked at */
    uint32_t positions_max;       /* IMPORT: blocks of the model's context */
    /* EXPORT's result, EXPORT_END's input; the engine's own. */
    struct kv_export *export;
    /* IMPORT: 0 begins one, and is replaced by its number; KEEP and DROP: which. */
    uint64_t import;
    void (*done)(void *arg);
    void *arg;
    /* Results. */
    int result; /* 0 or -errno */
    struct kv_removed removed;
    struct kv_space_facts *spaces; /* (n_spaces) LIST: malloc'ed, the caller's */
    size_t n_spaces;
    /* IMPORT: where the piece's bytes go. The import stays until *writing is cleared (release), and
     * must not be touched after that, but the engine kicked; NULL where the piece has no bytes. */
    void *to;
    atomic_bool *writing;
    uint32_t n_kept_tokens, n_new_tokens; /* KEEP */
    struct fmt_error err;                 /* EXPORT to DROP: why, as a sentence */
    struct engine_kv_call *next;          /* the engine's, as all below */
    struct engine_kv_call *behind, **behind_end;
};

/* -ESHUTDOWN: done does not come.
 * Results of transfers: -ENOENT nothing is cached of the prompt; -EBUSY a bound of transfers, try
 * again; -ENOMEM; -EINVAL a piece that is not to be believed (the import is dropped then, as with
 * every other failure but -EBUSY); -ESTALE no such import: it was dropped, since no piece came for
 * long or its realm was purged. */
int engine_kv(struct engine *e, struct engine_kv_call *call);

/* ---- backends ---------------------------------------------------------------------------- */

struct plan;

/* Another plan for a model, between two steps; sequences that run go on with the K and V that they
 * have. The caller's until done, which comes once, on the engine thread, and must only hand the
 * news to the loop. */
struct engine_swap {
    struct model *model; /* stays loaded until done */
    struct plan *plan;   /* a reference, the engine's when result is 0 */
    bool required;       /* a step that it fails is an error: nothing stands in for it */
    bool shadow;         /* plan only computes the same for comparison; NULL ends that */
    bool substitute;     /* plan stands in for the one in place; NULL: nothing can */
    uint32_t every;      /* so many steps of which one is compared */
    void (*done)(void *arg);
    void *arg;
    int result;               /* 0; -ESHUTDOWN */
    uint64_t pause_ns;        /* for which no step could run */
    struct engine_swap *next; /* the engine's */
};
/* -ESHUTDOWN: done does not come. */
int engine_swap(struct engine *e, struct engine_swap *swap);

/* A plan that is no longer in use, to be closed where there is time for it: references to it and to
 * its model, which must go after it. False: there is none. After every notify there may be some. */
struct engine_retired {
    struct plan *plan;
    struct model *model;
};
bool engine_take_retired(struct engine *e, struct engine_retired *ret);

/* A model whose backend has failed a step, with nothing to stand in for it. Its sequences wait for
 * engine_swap() with substitute set, others step on: preparing a plan may mean packing gigabytes.
 * The model is a reference, the taker's. After every notify there may be some. */
struct engine_wanted {
    struct model *model;
    const char *spec; /* of the backend that could; constant */
};
bool engine_take_wanted(struct engine *e, struct engine_wanted *ret);

/* When the step in progress began (CLOCK_MONOTONIC), or 0 while the engine waits for work: a
 * watchdog sees a step that does not end. */
uint64_t engine_step_started_ns(struct engine *e);

/* Sequences of a model that wait or run; the loop unloads a model when there are none. */
uint32_t engine_model_users(struct engine *e, const struct model *m);

#endif
