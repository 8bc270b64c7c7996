/* daemon/sched/engine_internal.h - what engine.c, engine_admit.c and engine_step.c share; private
 * to them. All functions are the engine thread's. */
#ifndef DAEMON_SCHED_ENGINE_INTERNAL_H
#define DAEMON_SCHED_ENGINE_INTERNAL_H

#include "daemon/model/plan.h"
#include "daemon/sched/batch.h"
#include "daemon/sched/deadline.h"
#include "daemon/sched/engine.h"
#include "daemon/sched/order.h"
#include "daemon/sched/preempt.h"
#include "daemon/sched/publish.h"

#include <pthread.h>

/* The lock guards the queue of waiting requests, the list of running sequences (written by the
 * engine thread only, so that it reads it without), the events not yet taken, and the flags. */
#define ENGINE_RETIRED_MAX 32u
#define ENGINE_WANTED_MAX  16u
#define ENGINE_COSTS_MAX   16u /* models whose steps' cost is remembered */

struct engine_cost {
    const struct model *model; /* only compared: it may be gone */
    uint64_t used;             /* turn */
    uint32_t n_mixed;          /* budget_rows() */
    struct cost cost;
};

struct engine {
    struct engine_options options;
    struct kv_cache *cache;
    struct batch batch;
    struct publisher publisher;
    pthread_t thread;

    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_bool stop; /* written under the lock */
    bool joined;      /* the thread has ended; of who stops it */
    bool draining, kicked, weights_changed;
    struct request *queue, **queue_end;
    uint32_t n_waiting, n_running;
    struct sequence *running; /* in the order of their starts; those without a place too */
    struct fair fair;
    struct engine_latency latency;
    struct order_pace pace;   /* of the queue */
    uint32_t n_new_deadlines; /* in the queue, without an estimate */
    struct request_event *events, **events_end;
    struct engine_kv_call *kv_calls, **kv_calls_end;
    struct engine_swap *swaps;
    struct engine_retired retired[ENGINE_RETIRED_MAX];
    uint32_t n_retired;
    struct engine_wanted wanted[ENGINE_WANTED_MAX];
    uint32_t n_wanted;

    /* The engine thread's own. */
    /* Drops and purges that wait for the cache's io: each bars its realm, and has behind it what
     * came later and concerns that. */
    struct engine_kv_call *waiting;
    struct engine_kv_call *deferred; /* wait too, but sequences of the realm step meanwhile */
    struct kv_export *exports;
    struct engine_import *imports;
    uint64_t n_imports;       /* so far: the last one's number */
    uint64_t bytes_committed; /* of the arena's bound, by those with a place and by transfers */
    uint64_t turn;            /* counts steps, for the order of models */
    uint64_t round;           /* counts admissions */
    uint64_t n_started;       /* sequences so far */
    struct engine_cost costs[ENGINE_COSTS_MAX];

    /* Written by the engine thread, read by the loop. */
    _Atomic uint64_t n_requests, n_steps, n_prompt_tokens, n_generated_tokens, step_ns_total;
    _Atomic uint64_t step_started_ns, n_preemptions;
    atomic_uint step_rows;
};

uint64_t engine_now_ns(void);

/* ---- what others can see (engine_watch.c) ---- */

void engine_note_latency(struct engine *e, struct histogram *h, uint64_t from_ns, uint64_t to_ns);
/* After a step that is committed: its time and rows, for the members and in all. */
void engine_note_step(struct engine *e, uint64_t step_ns);
/* The request's state as its sequence has it now. */
void engine_note_state(const struct sequence *s);

/* ---- what steps take (engine_cost.c) ---- */

const struct cost *engine_cost(struct engine *e, const struct model *m);
void engine_learn_cost(struct engine *e, uint64_t step_ns);
/* What the next batch of that model goes by. */
void engine_fill_rules(struct engine *e, const struct model *m, struct batch_rules *ret);

/* ---- beginnings (engine_admit.c) ---- */

/* Gives places to those that wait. */
void engine_admit(struct engine *e);
/* Of the arena's bound, what nobody is promised. */
uint64_t engine_bytes_free(const struct engine *e);
/* Sequences have grown, and will need more. */
void engine_commit_growth(struct engine *e);
void engine_leave_place(struct engine *e, struct sequence *s);
/* Whose blocks the request shares, or NULL. False: what its store holds is not known yet. */
bool engine_find_space(struct engine *e, const struct request *r, struct kv_space **ret);

/* Adds a sequence of the request to the running, at their end and without a place. */
void engine_add_sequence(struct engine *e, struct sequence *s);
/* Counts anew what the sequence, which has a place, needs soon of the arena's bound. */
void engine_charge(struct engine *e, struct sequence *s);

/* ---- samples of one prompt (engine_samples.c) ---- */

/* s has computed the prompt, whose last row gave the logits (n_vocab): the request's other samples
 * are to begin. -ENOMEM. */
int engine_note_beginnings(struct sequence *s, const float *logits);
/* Between two steps: some of those that are to begin do, without a place so far. False: there are
 * none. */
bool engine_begin_samples(struct engine *e);
/* A sample with a place from which s, which holds no block, can take the prompt; or NULL. */
struct sequence *engine_find_source(const struct engine *e, const struct sequence *s);
/* s has a place now: takes the prompt from source. */
void engine_share_prompt(struct sequence *s, const struct sequence *source);
/* s lets go of its place: another sample accounts for the prompt from now on. */
void engine_pass_prompt_on(struct engine *e, const struct sequence *s);

/* ---- giving way (engine_preempt.c) ---- */

void engine_preempt(struct engine *e, struct sequence *s);
/* Makes a sequence give way to the request, which is on that level, if there is one that should. */
bool engine_make_room(struct engine *e, const struct request *r, int32_t level);

enum engine_relief {
    ENGINE_RELIEF_NONE,   /* nobody is short of memory, or it will come */
    ENGINE_RELIEF_AGAIN,  /* somebody gave way: form the batch again */
    ENGINE_RELIEF_FAILED, /* a request that is alone has none, and ends */
};
/* After a batch was formed, or not: sees to those for whom there was no memory. */
enum engine_relief engine_relieve(struct engine *e, bool formed);

/* ---- ends (engine_end.c) ---- */

/* Ends a request with an error, unless something has ended it already. */
#define GRAMMAR_PLACES_MESSAGE "the grammar is too ambiguous: the text may be in too many places"

void engine_request_fail(struct request *r, enum proto_error_code code, const char *message);

/* The same for what has kept a token from being drawn and published; 0: nothing has. */
void engine_generation_fail(struct request *r, int rc);

/* Gives a request back to the loop when nothing of it waits or runs. */
void engine_settle(struct engine *e, struct request *r);
/* Ends requests of the queue that were cancelled, failed, or can't end in time. */
void engine_drop_ended(struct engine *e);
/* Takes out sequences that have ended, or whose requests were cancelled or are late. */
void engine_retire_finished(struct engine *e);
/* Milliseconds until the first deadline of all, or -1. Under the lock. */
int engine_deadline_timeout_ms(const struct engine *e);

/* ---- the cache, backends, steps ---- */

/* Does what was asked of the cache, for a bounded time. A drop or purge may have to wait for what
 * is being saved of its realm. */
void engine_run_kv_calls(struct engine *e);
/* Whether one waits that removes what is of the request's realm: it must not step, nor begin,
 * before. */
bool engine_is_barred(const struct engine *e, const struct request *r);
/* Answers those that nobody will run any more. */
void engine_end_kv_calls(struct engine *e);

/* Runs a transfer's call. -EAGAIN: it is to be run again when there may be news. */
int engine_transfer(struct engine *e, struct engine_kv_call *call);
/* Lets go of the blocks that exports of the realm (NULL: all) hold. False: some are being read. */
bool engine_release_exports(struct engine *e, const char *realm);
/* Drops imports of the realm, likewise. False: into some a piece is being written. */
bool engine_drop_imports(struct engine *e, const char *realm);
/* Drops imports that nobody goes on with. */
void engine_drop_idle_imports(struct engine *e);
/* Milliseconds until that is due, or -1. */
int engine_transfer_timeout_ms(const struct engine *e);
void engine_end_transfers(struct engine *e);

/* Puts other plans in place. */
void engine_run_swaps(struct engine *e);
/* Answers those that nobody will run any more, and drops what is retired. */
void engine_end_swaps(struct engine *e);
/* Puts the reference in place of the model's plan, whose reference it returns. */
struct plan *engine_put_plan(struct engine *e, struct model *m, struct plan *plan);
/* Hands a reference to somebody who has time: closing a backend takes long. NULL is legal. */
void engine_retire_plan(struct engine *e, struct model *m, struct plan *plan);
/* The model's sequences share nothing any more. Returns how many they are. */
uint32_t engine_detach(struct engine *e, const struct model *m);
/* What engine_swap() has brought for a plan that failed; NULL: nothing. */
void engine_put_substitute(struct engine *e, struct model *m, struct plan *plan);
/* Runs the batch, and again on a standby where its backend fails. 0, -errno, or
 * ENGINE_STEP_PUT_OFF: the standby is not there yet, and nothing has happened. */
#define ENGINE_STEP_PUT_OFF 1
int engine_run_step(struct engine *e, struct model_outputs *ret);

/* Compares some steps with the shadow, before they are committed. */
void engine_shadow_step(struct engine *e, const struct model_outputs *out, uint64_t step_ns);

/* One step of one model. False when there is nothing to do. */
bool engine_step(struct engine *e);

#endif
