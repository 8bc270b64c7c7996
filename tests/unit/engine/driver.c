#include "tests/unit/engine/driver.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct parts parts;
struct model *model;
struct engine *engine;
struct result results[DRIVER_RESULTS_MAX];
uint32_t n_results;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static bool news, held;
static bool stands, goes_on; /* the engine, held; and yet to its next news */

/* The engine thread, when it has published something. */
static void on_notify(void *arg)
{
    pthread_mutex_lock(&lock);
    news = true;
    pthread_cond_broadcast(&wake);
    stands = true;
    while (held && !goes_on) {
        pthread_cond_wait(&wake, &lock);
    }
    stands = goes_on = false;
    pthread_mutex_unlock(&lock);
}

void driver_hold(bool hold)
{
    pthread_mutex_lock(&lock);
    held = hold;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
}

/* An engine that stands still, and has told all, goes on to its next news. */
static void let_go_once(void)
{
    pthread_mutex_lock(&lock);
    goes_on = stands && !news;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
}

void driver_setup(const struct tiny *t)
{
    parts_init(&parts, 2);
    model = parts_load(&parts, t, "tiny");
}

void driver_start(const struct engine_options *options)
{
    struct engine_options o = *options;
    o.pool = parts.pool;
    o.n_batch = PARTS_BATCH;
    o.notify = on_notify;
    cr_assert(eq(int, engine_create(&o, &engine), 0));
}

void driver_stop(void)
{
    engine_destroy(engine);
    engine = NULL;
}

void check_nothing_used(void)
{
    struct engine_stats s;
    engine_stats(engine, &s);
    cr_expect(eq(u64, s.kv.blocks_held, 0));
    cr_expect(le(u64, s.kv_bytes_used, s.kv.arena_bytes_cached));
    cr_expect(eq(u32, s.n_running, 0));
    cr_expect(eq(u32, s.n_waiting, 0));
    cr_expect(eq(u32, engine_model_users(engine, model), 0));
}

void driver_teardown(void)
{
    engine_destroy(engine);
    for (uint32_t i = 0; i < n_results; i++) {
        request_destroy(results[i].request);
        free(results[i].rows);
        free(results[i].others);
    }
    model_unref(model);
    parts_finish(&parts);
}

/* ---- requests ---------------------------------------------------------------------------- */

/* A request over a prompt of n tokens that depends on seed; greedy. */
struct result *make(enum request_kind kind, uint32_t seed, uint32_t n, uint32_t n_predict)
{
    struct result *out = &results[n_results++];
    struct request *r = request_create(kind, model);
    cr_assert(r != NULL);
    r->tokens = malloc(n * sizeof(*r->tokens));
    for (uint32_t i = 0; i < n; i++) {
        r->tokens[i] = (int32_t)((seed * 7919 + i * i * 31 + i * 101) % (TINY_VOCAB - 3) + 3);
    }
    r->n_tokens = n;
    r->n_predict = n_predict;
    r->sampling.temperature = 0;
    r->ignore_eos = true;
    r->owner = out;
    *out = (struct result){.request = r, .next_row = UINT32_MAX};
    return out;
}

void ask_for_samples(struct result *r, uint32_t n)
{
    cr_assert(eq(int, request_set_samples(r->request, n), 0));
    r->others = calloc(n - 1, sizeof(*r->others));
    for (uint32_t i = 0; i + 1 < n; i++) {
        r->others[i].request = r->request;
    }
}

struct result *sample_of(struct result *r, uint32_t sample)
{
    return sample == 0 ? r : &r->others[sample - 1];
}

void submit(struct result *r)
{
    cr_assert(eq(int, engine_submit(engine, r->request), 0));
}

static void take_token(struct result *out, const struct request_event *e)
{
    out->made_ns[out->n_tokens] = e->made_ns;
    out->tokens[out->n_tokens++] = e->tokens[0].token;
}

static void take_rows(struct result *out, const struct request_event *e)
{
    const struct request *r = out->request;
    size_t width = r->logprobs ? 1 : TINY_VOCAB;
    out->next_row = out->next_row == UINT32_MAX ? r->first_row : out->next_row;
    out->out_of_order |= e->first_row != out->next_row;
    out->next_row = e->first_row + e->n_rows;
    out->rows = realloc(out->rows, (out->n_rows + e->n_rows) * width * sizeof(float));
    memcpy(out->rows + out->n_rows * width, e->rows, e->n_rows * width * sizeof(float));
    out->n_rows += e->n_rows;
    if (e->is_placed) {
        out->n_placed++;
        cr_expect(eq(ptr, (void *)e->rows, r->area->data + e->place));
    }
}

/* Takes the events there are; deliver: tells the engine that they reached their reader. */
void take_events(bool deliver)
{
    struct request_event *next;
    for (struct request_event *e = engine_take_events(engine); e != NULL; e = next) {
        struct result *out = e->request->owner;
        next = e->next;
        cr_assert(not(out->done));
        if (e->kind == REQUEST_TOKENS && e->n_tokens == 1) {
            take_token(sample_of(out, e->part), e);
        } else if (e->kind == REQUEST_ROWS) {
            take_rows(out, e);
        }
        out->done = e->kind == REQUEST_DONE;
        if (deliver) {
            atomic_fetch_sub(&e->request->undelivered_bytes, e->bytes);
        }
        free(e);
    }
    engine_kick(engine);
}

void wait_for_news(void)
{
    pthread_mutex_lock(&lock);
    while (!news) {
        pthread_cond_wait(&wake, &lock);
    }
    news = false;
    pthread_mutex_unlock(&lock);
}

void wait_done(struct result *r)
{
    while (!r->done) {
        wait_for_news();
        take_events(true);
    }
}

void wait_all(void)
{
    for (uint32_t i = 0; i < n_results; i++) {
        wait_done(&results[i]);
    }
    check_nothing_used();
}

void wait_tokens(struct result *r, uint32_t n)
{
    while (r->n_tokens < n && !r->done) {
        let_go_once();
        wait_for_news();
        take_events(true);
    }
}

void check_same(const struct result *a, const struct result *b)
{
    cr_assert(eq(u32, a->n_tokens, b->n_tokens));
    cr_expect(eq(int, memcmp(a->tokens, b->tokens, a->n_tokens * sizeof(a->tokens[0])), 0));
}
