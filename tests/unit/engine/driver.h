/* tests/unit/engine/driver.h - an engine over a tiny model, requests to it and what came of them.
 *
 * One engine at a time, in globals: each test of criterion runs in a process of its own. */
#ifndef TESTS_UNIT_ENGINE_DRIVER_H
#define TESTS_UNIT_ENGINE_DRIVER_H

#include "daemon/sched/engine.h"
#include "tests/unit/engine/parts.h"

#define DRIVER_RESULTS_MAX 64u

/* What came for one request. */
struct result {
    struct request *request;
    int32_t tokens[2048];
    uint64_t made_ns[2048]; /* when each of them was made */
    uint32_t n_tokens;
    float *rows; /* (n_rows, width) */
    uint32_t n_rows, next_row;
    uint32_t n_placed; /* of the events with rows: those that lay in the request's area */
    bool out_of_order, done;
    struct result *others; /* (n_samples - 1) the further samples'; NULL where there are none */
};

extern struct parts parts;
extern struct model *model;
extern struct engine *engine;
extern struct result results[DRIVER_RESULTS_MAX];
extern uint32_t n_results;

void driver_setup(const struct tiny *t);
/* pool, n_batch and notify are the driver's own. */
void driver_start(const struct engine_options *options);
void driver_stop(void); /* ends the engine; another may be started */
void driver_teardown(void);
/* true: the engine stops behind the next step that publishes something, until it is let go. */
void driver_hold(bool hold);

/* Before submission; request_set_samples(). */
void ask_for_samples(struct result *r, uint32_t n);
/* What came for a sample. */
struct result *sample_of(struct result *r, uint32_t sample);
/* A request over a prompt of n tokens that depends on seed; greedy. */
struct result *make(enum request_kind kind, uint32_t seed, uint32_t n, uint32_t n_predict);
void submit(struct result *r);
/* Takes the events there are; deliver: tells the engine that they reached their reader. */
void take_events(bool deliver);
void wait_for_news(void);
void wait_done(struct result *r);
void wait_all(void);
/* Until there are so many, or it is done. Where the engine was held before r was submitted, it
 * stands still then, and what is done next comes before whatever would be the next token. */
void wait_tokens(struct result *r, uint32_t n);
void check_same(const struct result *a, const struct result *b);
void check_nothing_used(void);

#endif
