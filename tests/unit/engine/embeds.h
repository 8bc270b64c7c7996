/* tests/unit/engine/embeds.h - embedding requests on an engine, run to their ends. */
#ifndef TESTS_UNIT_ENGINE_EMBEDS_H
#define TESTS_UNIT_ENGINE_EMBEDS_H

#include "daemon/sched/engine.h"

#define EMBEDS_INPUTS_MAX 64u

/* A request and what came for it. */
struct embeds {
    struct request *request;
    uint32_t n_embd;
    /* POOLING_NONE: rows of each input, (n_tokens, width). */
    float *rows[EMBEDS_INPUTS_MAX];
    uint32_t n_rows[EMBEDS_INPUTS_MAX];
    uint32_t n_generated; /* of a REQUEST_GENERATE that keeps the engine busy */
    bool out_of_order, done;
};

/* An engine whose news end embeds_wait(). Errors end the process. */
struct engine *embeds_engine(struct pool *pool, uint32_t n_parallel, uint32_t n_batch);

/* Token i of the text that seed and length make; never a control token. */
int32_t embeds_token(uint32_t seed, uint32_t i);

/* A request of inputs with those lengths; input i is the text of seed + i. */
struct embeds *embeds_make(struct model *m, enum pooling pooling, uint32_t seed,
                           const uint32_t *lengths, uint32_t n_inputs);
/* A greedy generation over a prompt of that length. */
struct embeds *embeds_make_generation(struct model *m, uint32_t n_tokens, uint32_t n_predict);
void embeds_destroy(struct embeds *e);

void embeds_submit(struct engine *engine, struct embeds *e);
void embeds_wait(struct engine *engine, struct embeds *e);
/* Until so many inputs of a POOLING_NONE have rows, or the request is done. */
void embeds_wait_inputs(struct engine *engine, struct embeds *e, uint32_t n);

/* The vector of an input. */
const float *embeds_vector(const struct embeds *e, uint32_t input);

#endif
