/* Many samples of one prompt: each is what a request of one gives with its seed, the prompt is
 * computed once and its blocks are there once, whoever has a place when. */
#include "tests/unit/engine/driver.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MANY  (64ull << 20)
#define BLOCK (128ull << 10) /* of the model below: 16 in a slab of 2 MiB */
#define ROOM  (32 * BLOCK)
#define SEED  1000u

static void setup(void)
{
    struct tiny t = tiny_default();
    t.n_layers = 4;
    t.n_embd = 128;
    t.n_heads = t.n_kv_heads = 4;
    driver_setup(&t);
}

static void start(uint32_t n_parallel, uint64_t kv_bytes_max)
{
    const struct engine_options o = {
        .n_parallel = n_parallel, .n_queue = 64, .kv.arena_bytes_max = kv_bytes_max};
    driver_start(&o);
}

TestSuite(samples, .init = setup, .fini = driver_teardown, .timeout = 300);

static struct engine_stats stats(void)
{
    struct engine_stats s;
    engine_stats(engine, &s);
    return s;
}

/* Draws depend on all draws before them: what was lost or drawn twice would show. Some end by
 * themselves, so that samples end at different times. */
static struct result *make_draws(uint32_t n_prompt, uint32_t n_predict, const char *realm)
{
    static const struct logit_bias eos = {TINY_EOS, 1.0f};
    struct result *r = make(REQUEST_GENERATE, 1, n_prompt, n_predict);
    struct logit_bias *bias = malloc(sizeof(*bias));
    *bias = eos;
    r->request->sampling.logit_bias = bias; /* the request's own */
    r->request->sampling.n_logit_bias = 1;
    r->request->sampling.temperature = 1;
    r->request->sampling.top_k = 0;
    r->request->sampling.seed = SEED;
    r->request->ignore_eos = false;
    snprintf(r->request->realm, sizeof(r->request->realm), "%s", realm);
    return r;
}

/* The samples of r against requests of one, with the seeds that follow. Returns how many ended
 * before n_predict. */
static uint32_t check_against_alone(struct result *r, uint32_t n_prompt, uint32_t n_predict)
{
    uint32_t n = r->request->n_samples, n_short = 0;
    for (uint32_t i = 0; i < n; i++) {
        struct result *alone = make_draws(n_prompt, n_predict, "");
        alone->request->sampling.seed = SEED + i;
        submit(alone);
        wait_done(alone);
        const struct request_sample *one = &alone->request->samples[0];
        const struct request_sample *many = &r->request->samples[i];
        cr_expect(eq(u64, request_seed(r->request, i), SEED + i));
        cr_expect(eq(int, many->finish, one->finish), "sample %u", i);
        cr_expect(eq(u32, many->n_generated, one->n_generated), "sample %u", i);
        cr_expect(eq(u32, many->n_generated, sample_of(r, i)->n_tokens));
        check_same(alone, sample_of(r, i));
        n_short += many->finish == FINISH_EOS;
    }
    return n_short;
}

/* n samples of a prompt, in so many places. */
static struct result *run(uint32_t n, uint32_t n_prompt, uint32_t n_predict, const char *realm)
{
    struct result *r = make_draws(n_prompt, n_predict, realm);
    ask_for_samples(r, n);
    submit(r);
    wait_done(r);
    cr_assert(ne(int, r->request->finish, FINISH_ERROR), "%s", r->request->error_message);
    cr_expect(eq(int, r->request->finish, r->request->samples[0].finish));
    cr_expect(eq(u32, r->request->n_prompt, n_prompt));
    uint32_t total = 0;
    for (uint32_t i = 0; i < n; i++) {
        total += r->request->samples[i].n_generated;
    }
    cr_expect(eq(u32, r->request->n_generated, total));
    check_nothing_used();
    return r;
}

static void check_prompt_computed_once(uint32_t n_prompt)
{
    start(8, MANY);
    struct result *r = run(8, n_prompt, 150, "");
    cr_expect(eq(u64, stats().n_prompt_tokens, n_prompt));
    uint32_t n_short = check_against_alone(r, n_prompt, 150);
    cr_expect(lt(u32, 0, n_short)); /* or this test says less */
}

Test(samples, each_is_what_its_seed_gives_alone)
{
    check_prompt_computed_once(100);
}

Test(samples, a_prompt_of_whole_blocks)
{
    check_prompt_computed_once(128);
}

Test(samples, a_prompt_of_one_token)
{
    check_prompt_computed_once(1);
}

Test(samples, with_a_shared_cache)
{
    start(8, MANY);
    struct result *first = run(5, 200, 100, "one");
    cr_expect(eq(u32, first->request->n_cached, 0));
    struct result *second = run(5, 200, 100, "one");
    cr_expect(ge(u32, second->request->n_cached, 192));
    for (uint32_t i = 0; i < 5; i++) {
        check_same(sample_of(first, i), sample_of(second, i));
    }
    check_against_alone(first, 200, 100);
}

Test(samples, more_than_there_are_places)
{
    start(2, MANY);
    struct result *shared = run(7, 100, 120, "one");
    struct result *apart = run(7, 100, 120, "");
    check_against_alone(shared, 100, 120);
    for (uint32_t i = 0; i < 7; i++) {
        check_same(sample_of(shared, i), sample_of(apart, i));
    }
}

static void crowd(const char *realm)
{
    start(16, ROOM);
    struct result *r = make_draws(70, 400, realm);
    r->request->ignore_eos = true;
    ask_for_samples(r, 16);
    submit(r);
    wait_all();
    cr_expect(lt(u64, 0, stats().n_preemptions)); /* or this test says nothing */
    for (uint32_t i = 0; i < 16; i++) {
        struct result *alone = make_draws(70, 400, "");
        alone->request->ignore_eos = true;
        alone->request->sampling.seed = SEED + i;
        submit(alone);
        wait_done(alone);
        check_same(alone, sample_of(r, i));
    }
}

Test(samples, a_crowded_arena_changes_no_token)
{
    crowd("one");
}

Test(samples, nor_does_it_without_a_shared_cache)
{
    crowd("");
}

/* 5 whole blocks of prompt and at most one more each: apart they would need 48 of the 32 blocks. */
Test(samples, blocks_of_the_prompt_are_there_once)
{
    start(8, ROOM);
    struct result *r = make_draws(320, 60, "");
    r->request->ignore_eos = true;
    ask_for_samples(r, 8);
    submit(r);
    wait_all();
    cr_expect(eq(u64, stats().n_preemptions, 0));
    uint64_t last_ns = UINT64_MAX;
    for (uint32_t i = 0; i < 8; i++) {
        uint64_t ns = sample_of(r, i)->made_ns[59];
        last_ns = ns < last_ns ? ns : last_ns;
    }
    for (uint32_t i = 0; i < 8; i++) {
        cr_expect(eq(u32, sample_of(r, i)->n_tokens, 60));
        cr_expect(lt(u64, sample_of(r, i)->made_ns[1], last_ns), "sample %u waited for room", i);
    }
}

/* How many samples have drawn their first token at last at that time. */
static uint32_t begun_by(struct result *r, uint32_t n, uint64_t ns)
{
    uint32_t n_begun = 0;
    for (uint32_t i = 0; i < n; i++) {
        n_begun += sample_of(r, i)->made_ns[0] <= ns;
    }
    return n_begun;
}

/* What a beginning costs, which does not depend on the model, is no more between two tokens of
 * another than a step of all places. */
Test(samples, others_do_not_wait_for_all_of_them_to_begin)
{
    enum { N_PLACES = 3, N_SAMPLES = 32 };
    start(N_PLACES, MANY);
    struct result *other = make(REQUEST_GENERATE, 7, 30, 400);
    other->request->uid = 4711;
    driver_hold(true);
    submit(other);
    wait_tokens(other, 1);
    struct result *many = make_draws(100, 20, "one");
    ask_for_samples(many, N_SAMPLES);
    submit(many);
    driver_hold(false);
    wait_all();
    uint32_t n_gaps = 0;
    for (uint32_t i = 1; i < other->n_tokens; i++) {
        uint32_t n = begun_by(many, N_SAMPLES, other->made_ns[i]) -
                     begun_by(many, N_SAMPLES, other->made_ns[i - 1]);
        cr_expect(le(u32, n, N_PLACES + 1), "%u begin before token %u", n, i); /* and the first */
        n_gaps += n > 0;
    }
    cr_expect(le(u32, N_SAMPLES / (N_PLACES + 1), n_gaps)); /* or this test says nothing */
}

/* It has ended with its first token, and yet the others begin where it began. */
Test(samples, a_first_one_that_ends_at_once)
{
    start(1, MANY);
    struct result *r = run(9, 100, 1, "");
    cr_expect(eq(u64, stats().n_prompt_tokens, 100));
    check_against_alone(r, 100, 1);
}

Test(samples, cancelling_ends_them_all)
{
    start(3, MANY);
    struct result *r = make_draws(100, 390, "one");
    r->request->ignore_eos = true;
    ask_for_samples(r, 6);
    driver_hold(true);
    submit(r);
    wait_tokens(sample_of(r, 2), 3);
    engine_cancel(engine, r->request);
    driver_hold(false);
    wait_all();
    cr_expect(eq(int, r->request->finish, FINISH_CANCELLED));
    for (uint32_t i = 0; i < 6; i++) {
        cr_expect(eq(int, r->request->samples[i].finish, FINISH_CANCELLED));
        cr_expect(ge(u32, r->request->samples[i].n_generated, 1));
    }
}

Test(samples, nothing_to_generate_is_done_at_once)
{
    start(3, MANY);
    struct result *r = run(4, 100, 0, "");
    for (uint32_t i = 0; i < 4; i++) {
        cr_expect(eq(int, r->request->samples[i].finish, FINISH_LENGTH));
    }
}

/* Samples are their user's sequences like any others: another user's request gets its place. */
Test(samples, another_user_is_not_held_up)
{
    start(2, MANY);
    struct result *many = make_draws(100, 400, "one");
    many->request->ignore_eos = true;
    ask_for_samples(many, 16);
    driver_hold(true);
    submit(many);
    wait_tokens(many, 3);
    struct result *other = make(REQUEST_GENERATE, 7, 30, 10);
    other->request->uid = 4711;
    submit(other);
    driver_hold(false);
    wait_done(other);
    cr_expect(not(many->done));
    engine_cancel(engine, many->request);
    wait_all();
}
