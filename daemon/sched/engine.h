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

#include "daemon/request.h"

struct engine;

/* Most rows of a step that give logits: what models must be loaded with (max_out_rows). */
uint32_t engine_max_out_rows(uint32_t n_parallel);

struct engine_options {
    struct pool *pool;     /* owned by the caller; the engine thread becomes its worker 0 */
    uint32_t n_batch;      /* most rows of a step */
    uint32_t n_parallel;   /* most sequences that run at once */
    uint32_t n_queue;      /* most requests that wait */
    uint64_t kv_bytes_max; /* of the arena, over all models */
    /* Called on the engine thread when events are ready to be taken; must only wake the loop. */
    void (*notify)(void *arg);
    void *notify_arg;
};

int engine_create(const struct engine_options *options, struct engine **ret);
/* Cancels what runs, joins the thread; events not taken are dropped. NULL is legal. */
void engine_destroy(struct engine *e);

/* Hands over a request. -EAGAIN: the queue is full (BUSY); -ESHUTDOWN: draining. On failure the
 * caller keeps the request. */
int engine_submit(struct engine *e, struct request *r);

/* Asks for the end of a request: a DONE event with FINISH_CANCELLED follows within a step. */
void engine_cancel(struct engine *e, struct request *r);

/* A slow reader caught up (undelivered_bytes went down): the engine looks again. */
void engine_kick(struct engine *e);

/* All events published so far, oldest first, or NULL. */
struct request_event *engine_take_events(struct engine *e);

/* No new requests from now on. */
void engine_drain(struct engine *e);

struct engine_stats {
    uint32_t n_running, n_waiting;
    uint64_t n_requests, n_steps, n_prompt_tokens, n_generated_tokens;
    uint64_t step_ns_total;
    uint64_t kv_bytes_used, kv_bytes_max, kv_blocks_used;
};
void engine_stats(struct engine *e, struct engine_stats *ret);

/* When the step in progress began (CLOCK_MONOTONIC), or 0 while the engine waits for work: a
 * watchdog sees a step that does not end. */
uint64_t engine_step_started_ns(struct engine *e);

/* Sequences of a model that wait or run; the loop unloads a model when there are none. */
uint32_t engine_model_users(struct engine *e, const struct model *m);

#endif
