#include "tests/unit/engine/embeds.h"
#include "tests/unit/engine/tiny.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static bool news;

static void need(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "embeds: %s\n", what);
        exit(99);
    }
}

static void notify(void *arg)
{
    pthread_mutex_lock(&lock);
    news = true;
    pthread_cond_signal(&wake);
    pthread_mutex_unlock(&lock);
}

struct engine *embeds_engine(struct pool *pool, uint32_t n_parallel, uint32_t n_batch)
{
    struct engine *engine = NULL;
    struct engine_options o = {
        .pool = pool,
        .n_batch = n_batch,
        .n_parallel = n_parallel,
        .n_queue = 16,
        .kv = {.arena_bytes_max = 64u << 20},
        .notify = notify,
    };
    need(engine_create(&o, &engine) == 0, "engine_create");
    return engine;
}

int32_t embeds_token(uint32_t seed, uint32_t i)
{
    return (int32_t)((seed * 7919 + i * i * 31 + i * 101) % (TINY_VOCAB - 3) + 3);
}

static int32_t *make_tokens(uint32_t seed, uint32_t n)
{
    int32_t *tokens = malloc(n * sizeof(*tokens));
    need(tokens != NULL, "memory");
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = embeds_token(seed, i);
    }
    return tokens;
}

static struct embeds *make(struct model *m, enum request_kind kind)
{
    struct embeds *e = calloc(1, sizeof(*e));
    need(e != NULL, "memory");
    e->request = request_create(kind, m);
    need(e->request != NULL, "memory");
    e->request->owner = e;
    e->n_embd = model_shape(m)->n_embd;
    return e;
}

struct embeds *embeds_make(struct model *m, enum pooling pooling, uint32_t seed,
                           const uint32_t *lengths, uint32_t n_inputs)
{
    struct embeds *e = make(m, REQUEST_EMBED);
    struct request_embed *r = &e->request->embed;
    need(n_inputs <= EMBEDS_INPUTS_MAX, "too many inputs");
    r->pooling = pooling;
    r->norm = EMBEDDING_NORM_NONE;
    r->width = pooling == POOLING_RANK ? model_n_scores(m) : e->n_embd;
    r->inputs = calloc(n_inputs, sizeof(*r->inputs));
    r->vectors = pooling != POOLING_NONE ? calloc(n_inputs, r->width * sizeof(float)) : NULL;
    need(r->inputs != NULL && (pooling == POOLING_NONE || r->vectors != NULL), "memory");
    r->n_inputs = n_inputs;
    for (uint32_t i = 0; i < n_inputs; i++) {
        r->inputs[i] = (struct request_input){make_tokens(seed + i, lengths[i]), lengths[i]};
    }
    return e;
}

struct embeds *embeds_make_generation(struct model *m, uint32_t n_tokens, uint32_t n_predict)
{
    struct embeds *e = make(m, REQUEST_GENERATE);
    e->request->tokens = make_tokens(99, n_tokens);
    e->request->n_tokens = n_tokens;
    e->request->n_predict = n_predict;
    e->request->sampling.temperature = 0;
    e->request->ignore_eos = true;
    return e;
}

void embeds_destroy(struct embeds *e)
{
    if (e == NULL) {
        return;
    }
    for (uint32_t i = 0; i < EMBEDS_INPUTS_MAX; i++) {
        free(e->rows[i]);
    }
    request_destroy(e->request);
    free(e);
}

void embeds_submit(struct engine *engine, struct embeds *e)
{
    need(engine_submit(engine, e->request) == 0, "engine_submit");
}

static void take_rows(struct embeds *e, const struct request_event *ev)
{
    uint32_t width = e->request->embed.width;
    float **rows = &e->rows[ev->part];
    uint32_t *n = &e->n_rows[ev->part];
    e->out_of_order |= ev->first_row != *n;
    *rows = realloc(*rows, (*n + ev->n_rows) * width * sizeof(float));
    need(*rows != NULL, "memory");
    memcpy(*rows + *n * width, ev->rows, ev->n_rows * width * sizeof(float));
    *n += ev->n_rows;
}

/* Nothing stands in for a backend that fails: the engine is told so when it asks. */
static struct engine_swap refusal;
static atomic_bool is_refused;

static void on_refused(void *arg)
{
    atomic_store(&is_refused, true);
}

static void refuse_substitutes(struct engine *engine)
{
    struct engine_wanted wanted;
    if (atomic_exchange(&is_refused, false)) {
        model_unref(refusal.model);
        refusal.model = NULL;
    }
    if (refusal.model == NULL && engine_take_wanted(engine, &wanted)) {
        refusal =
            (struct engine_swap){.model = wanted.model, .substitute = true, .done = on_refused};
        need(engine_swap(engine, &refusal) == 0, "engine_swap");
    }
}

static void take_events(struct engine *engine)
{
    struct request_event *next;
    for (struct request_event *ev = engine_take_events(engine); ev != NULL; ev = next) {
        struct embeds *e = ev->request->owner;
        next = ev->next;
        need(!e->done, "an event after the last one");
        if (ev->kind == REQUEST_ROWS) {
            take_rows(e, ev);
        }
        e->n_generated += ev->kind == REQUEST_TOKENS ? ev->n_tokens : 0;
        e->done = ev->kind == REQUEST_DONE;
        atomic_fetch_sub(&ev->request->undelivered_bytes, ev->bytes);
        free(ev);
    }
    refuse_substitutes(engine);
    engine_kick(engine);
}

static void wait_for_news(struct engine *engine)
{
    pthread_mutex_lock(&lock);
    while (!news) {
        pthread_cond_wait(&wake, &lock);
    }
    news = false;
    pthread_mutex_unlock(&lock);
    take_events(engine);
}

void embeds_wait(struct engine *engine, struct embeds *e)
{
    while (!e->done) {
        wait_for_news(engine);
    }
}

void embeds_wait_inputs(struct engine *engine, struct embeds *e, uint32_t n)
{
    uint32_t begun = 0;
    while (begun < n && !e->done) {
        wait_for_news(engine);
        begun = 0;
        for (uint32_t i = 0; i < EMBEDS_INPUTS_MAX; i++) {
            begun += e->n_rows[i] > 0;
        }
    }
}

const float *embeds_vector(const struct embeds *e, uint32_t input)
{
    return e->request->embed.vectors + (size_t)input * e->request->embed.width;
}
