/* Stand-ins for engine, models and tokenizer, so that the handlers can be driven step by step. */
#ifndef TESTS_UNIT_DAEMON_FAKES_H
#define TESTS_UNIT_DAEMON_FAKES_H

#include "daemon/handlers.h"

#define FAKE_N_VOCAB 100
#define FAKE_N_CTX   64
#define FAKE_N_EMBD  4
#define FAKE_N_BATCH 32

/* What was asked of the fakes since the test began. */
struct fakes {
    struct request *submitted[16];
    unsigned n_submitted, n_cancelled, n_kicks;
    int submit_result;
    struct request_event *events; /* that engine_take_events will give */
    bool model_is_encoder;
    uint32_t n_scores;         /* of its classifier */
    bool model_is_loaded;      /* else the registry starts a load of it */
    struct registry_load load; /* the last one that was asked for */
    unsigned n_loads, model_refs;
    struct task_list tasks;    /* that the task pool has not run */
    struct quota_table quotas; /* without limits, until the test sets some */
    struct penalty_table penalties;
};
extern struct fakes fakes;

struct model *fake_model(void);
/* Publishes an event for a request, as the engine would. */
void fake_tokens(struct request *r, const char *text, int32_t token, size_t bytes);
/* Rows of logits that all are value; in the request's area where there is room. */
void fake_rows(struct request *r, uint32_t n_rows, float value);
void fake_done(struct request *r, enum request_finish finish);

/* A service over the fakes, whose tasks wait in fakes.tasks. */
struct service *fake_service(const struct service_limits *limits);
void fake_run_tasks(void);

#endif
