/* The engine over a tiny model: tokens alone and in company, bounds, cancels, rows, slow readers.
 */
#include "tests/unit/engine/driver.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MANY (64ull << 20) /* bytes of KV: more than any test needs */
#define SLAB (2ull << 20)  /* what one sequence of the tiny model commits */

static void start(uint32_t n_parallel, uint32_t n_queue, uint64_t kv_bytes_max)
{
    const struct engine_options o = {
        .n_parallel = n_parallel,
        .n_queue = n_queue,
        .kv.arena_bytes_max = kv_bytes_max,
    };
    driver_start(&o);
}

static void setup(void)
{
    const struct tiny t = tiny_default();
    driver_setup(&t);
}

TestSuite(engine, .init = setup, .fini = driver_teardown, .timeout = 120);

/* ---- generation -------------------------------------------------------------------------- */

Test(engine, greedy_generation_is_deterministic)
{
    start(4, 8, MANY);
    struct result *a = make(REQUEST_GENERATE, 1, 20, 50), *b = make(REQUEST_GENERATE, 1, 20, 50);
    submit(a);
    wait_done(a);
    submit(b);
    wait_all();
    cr_expect(eq(int, a->request->finish, FINISH_LENGTH));
    cr_expect(eq(u32, a->n_tokens, 50));
    cr_expect(eq(u32, a->request->n_generated, 50));
    cr_expect(eq(u32, a->request->n_prompt, 20));
    check_same(a, b);
    unsigned distinct = 0;
    for (uint32_t i = 1; i < 50; i++) {
        distinct += a->tokens[i] != a->tokens[0];
    }
    cr_expect(lt(u32, 0, distinct)); /* the model says more than one word */
}

/* Prompts of many lengths, chunked and in company, against each one alone. */
Test(engine, tokens_do_not_depend_on_company)
{
    static const uint32_t lengths[] = {1, 7, 63, 64, 65, 130, 200};
    start(7, 8, MANY);
    for (uint32_t i = 0; i < 7; i++) {
        struct result *alone = make(REQUEST_GENERATE, i, lengths[i], 40);
        submit(alone);
        wait_done(alone);
    }
    for (uint32_t i = 0; i < 7; i++) {
        submit(make(REQUEST_GENERATE, i, lengths[i], 40));
    }
    wait_all();
    for (uint32_t i = 0; i < 7; i++) {
        check_same(&results[i], &results[7 + i]);
    }
}

Test(engine, models_take_turns)
{
    struct tiny t = tiny_default();
    t.seed = 2;
    struct model *others[2] = {parts_load(&parts, &t, "two"), NULL};
    t.seed = 3;
    others[1] = parts_load(&parts, &t, "three");
    start(8, 8, MANY);
    for (uint32_t i = 0; i < 6; i++) {
        struct result *r = make(REQUEST_GENERATE, i, 10, 400);
        atomic_store(&r->request->undelivered_bytes, 1u << 30); /* until all are there */
        if (i % 3 > 0) {
            model_unref(r->request->model);
            r->request->model = model_ref(others[i % 3 - 1]);
        }
        submit(r);
    }
    for (uint32_t i = 0; i < 6; i++) {
        atomic_fetch_sub(&results[i].request->undelivered_bytes, 1u << 30);
    }
    engine_kick(engine);
    wait_done(&results[0]);
    /* With turns, nobody is far behind when the first has ended. */
    for (uint32_t i = 0; i < 6; i++) {
        cr_expect(lt(u32, 50, results[i].n_tokens), "request %u has %u", i, results[i].n_tokens);
    }
    wait_all();
    model_unref(others[0]);
    model_unref(others[1]);
}

Test(engine, the_context_ends_a_generation)
{
    start(2, 8, MANY);
    submit(make(REQUEST_GENERATE, 1, 500, 1000));
    submit(make(REQUEST_GENERATE, 1, 511, 1000));
    submit(make(REQUEST_GENERATE, 2, 5, 0));
    wait_all();
    cr_expect(eq(int, results[0].request->finish, FINISH_LENGTH));
    cr_expect(eq(u32, results[0].n_tokens, 12));
    cr_expect(eq(u32, results[1].n_tokens, 1));
    cr_expect(eq(int, results[2].request->finish, FINISH_LENGTH));
    cr_expect(eq(u32, results[2].n_tokens, 0));
}

Test(engine, parameters_that_do_not_fit_are_an_error)
{
    start(2, 8, MANY);
    struct result *r = make(REQUEST_GENERATE, 1, 5, 10);
    r->request->sampling.temperature = NAN;
    submit(r);
    wait_all();
    cr_expect(eq(int, r->request->finish, FINISH_ERROR));
    cr_expect(eq(int, r->request->error, PROTO_E_INVALID_PARAMS));
}

/* ---- bounds ------------------------------------------------------------------------------ */

Test(engine, a_full_queue_says_so)
{
    start(1, 2, MANY);
    driver_hold(true);
    submit(make(REQUEST_GENERATE, 1, 10, 400));
    wait_tokens(&results[0], 1); /* it runs, and leaves the queue empty */
    submit(make(REQUEST_GENERATE, 2, 10, 3));
    submit(make(REQUEST_GENERATE, 3, 10, 3));
    struct result *refused = make(REQUEST_GENERATE, 4, 10, 3);
    int rc = engine_submit(engine, refused->request);
    cr_expect(eq(int, rc, -EAGAIN));
    n_results--;
    request_destroy(refused->request);
    struct engine_stats s;
    engine_stats(engine, &s);
    cr_expect(eq(u32, s.n_running, 1));
    cr_expect(eq(u32, s.n_waiting, 2));
    cr_expect(eq(u32, engine_model_users(engine, model), 3));
    driver_hold(false);
    wait_all();
}

static int try_as(uid_t uid)
{
    struct result *r = make(REQUEST_GENERATE, uid, 10, 3);
    r->request->uid = uid;
    int rc = engine_submit(engine, r->request);
    if (rc < 0) {
        n_results--;
        request_destroy(r->request);
    }
    return rc;
}

Test(engine, a_user_that_fills_the_queue_keeps_nobody_out)
{
    start(1, 16, MANY);
    driver_hold(true);
    submit(make(REQUEST_GENERATE, 1, 10, 400));
    wait_tokens(&results[0], 1); /* it runs, and leaves the queue empty */
    for (unsigned i = 0; i < 16; i++) {
        cr_expect(eq(int, try_as(1), 0));
    }
    cr_expect(eq(int, try_as(1), -EAGAIN));
    for (uid_t uid = 2; uid <= 3; uid++) {
        for (unsigned i = 0; i < 4; i++) {
            cr_expect(eq(int, try_as(uid), 0));
        }
        cr_expect(eq(int, try_as(uid), -EAGAIN));
    }
    cr_expect(eq(int, try_as(1), -EAGAIN));
    struct fair_user users[8];
    size_t n = engine_users(engine, users, 8);
    cr_expect(eq(sz, n, 4));
    for (size_t i = 0; i < n; i++) { /* those that were refused are not among them */
        uint32_t n_waiting = users[i].uid == 0 ? 0 : users[i].uid == 1 ? 16 : 4;
        cr_expect(eq(u32, users[i].n_waiting, n_waiting));
        cr_expect(eq(u32, users[i].n_requests, users[i].uid == 0 ? 1 : n_waiting));
    }
    driver_hold(false);
    wait_all();
}

Test(engine, draining_takes_no_more)
{
    start(1, 2, MANY);
    submit(make(REQUEST_GENERATE, 1, 10, 20));
    engine_drain(engine);
    struct result *refused = make(REQUEST_GENERATE, 4, 10, 3);
    cr_expect(eq(int, engine_submit(engine, refused->request), -ESHUTDOWN));
    n_results--;
    request_destroy(refused->request);
    wait_all();
    cr_expect(eq(u32, results[0].n_tokens, 20));
}

Test(engine, what_can_never_fit_is_told_in_numbers)
{
    start(4, 8, SLAB - 4096);
    struct result *r = make(REQUEST_GENERATE, 1, 10, 10);
    submit(r);
    wait_all();
    cr_expect(eq(int, r->request->finish, FINISH_ERROR));
    cr_expect(eq(int, r->request->error, PROTO_E_NO_MEMORY));
    cr_expect(strstr(r->request->error_message, "2097152") != NULL, "%s",
              r->request->error_message);
    cr_expect(strstr(r->request->error_message, "2093056") != NULL, "%s",
              r->request->error_message);
}

Test(engine, what_fits_one_after_another_all_ends_well)
{
    start(8, 16, SLAB);
    for (uint32_t i = 0; i < 8; i++) {
        submit(make(REQUEST_GENERATE, 5, 40, 30));
    }
    wait_all();
    for (uint32_t i = 0; i < 8; i++) {
        cr_expect(eq(int, results[i].request->finish, FINISH_LENGTH));
        check_same(&results[0], &results[i]);
    }
}

/* ---- cancel ------------------------------------------------------------------------------ */

Test(engine, cancel_while_running_and_while_waiting)
{
    start(1, 8, MANY);
    struct result *running = make(REQUEST_GENERATE, 1, 10, 490);
    struct result *waiting = make(REQUEST_GENERATE, 2, 10, 490);
    struct result *last = make(REQUEST_GENERATE, 3, 10, 5);
    driver_hold(true);
    submit(running);
    submit(waiting);
    submit(last);
    wait_tokens(running, 3);
    engine_cancel(engine, waiting->request);
    driver_hold(false);
    wait_done(waiting);
    cr_expect(eq(int, waiting->request->finish, FINISH_CANCELLED));
    cr_expect(eq(u32, waiting->n_tokens, 0));
    engine_cancel(engine, running->request);
    wait_all();
    cr_expect(running->request->finish == FINISH_CANCELLED || running->n_tokens == 490);
    cr_expect(eq(int, last->request->finish, FINISH_LENGTH));
    cr_expect(eq(u32, last->n_tokens, 5));
}

Test(engine, cancel_leaves_the_neighbours_alone)
{
    start(4, 8, MANY);
    submit(make(REQUEST_GENERATE, 9, 70, 60));
    wait_done(&results[0]);
    driver_hold(true);
    submit(make(REQUEST_GENERATE, 9, 70, 60));
    submit(make(REQUEST_GENERATE, 2, 200, 200));
    submit(make(REQUEST_GENERATE, 3, 20, 200));
    wait_tokens(&results[3], 2);
    engine_cancel(engine, results[2].request);
    engine_cancel(engine, results[3].request);
    driver_hold(false);
    wait_all();
    check_same(&results[0], &results[1]);
}

Test(engine, destroy_with_running_and_waiting_requests)
{
    start(2, 8, MANY);
    for (uint32_t i = 0; i < 6; i++) {
        submit(make(REQUEST_GENERATE, i, 100, 300));
    }
    wait_tokens(&results[0], 1);
    engine_destroy(engine);
    engine = NULL;
    for (uint32_t i = 0; i < 6; i++) {
        cr_expect(ne(int, results[i].request->finish, FINISH_NONE));
    }
}

/* ---- rows of logits ---------------------------------------------------------------------- */

Test(engine, rows_are_complete_in_order_and_agree_with_logprobs)
{
    start(4, 8, MANY);
    struct result *rows = make(REQUEST_LOGITS, 1, 300, 0);
    struct result *tail = make(REQUEST_LOGITS, 1, 300, 0);
    struct result *probs = make(REQUEST_LOGITS, 1, 300, 0);
    tail->request->first_row = 250;
    probs->request->logprobs = true;
    submit(rows);
    submit(tail);
    submit(probs);
    wait_all();
    cr_expect(not(rows->out_of_order || tail->out_of_order || probs->out_of_order));
    cr_assert(eq(u32, rows->n_rows, 300));
    cr_assert(eq(u32, tail->n_rows, 50));
    cr_assert(eq(u32, probs->n_rows, 299));
    cr_expect(eq(int,
                 memcmp(rows->rows + 250 * TINY_VOCAB, tail->rows, 50 * TINY_VOCAB * sizeof(float)),
                 0));
    for (uint32_t i = 0; i < 299; i++) {
        const float *row = rows->rows + i * TINY_VOCAB;
        double sum = 0;
        for (uint32_t k = 0; k < TINY_VOCAB; k++) {
            sum += exp((double)row[k]);
        }
        double truth = row[rows->request->tokens[i + 1]] - log(sum);
        cr_assert(fabs(truth - (double)probs->rows[i]) < 1e-4, "row %u", i);
    }
    cr_expect(eq(int, rows->request->finish, FINISH_LENGTH));
}

static void area_is_unused(struct area *a)
{
}

/* Straight into what the client reads; and behind the event once that is full. */
Test(engine, rows_go_into_the_area_while_there_is_room)
{
    static uint8_t bytes[4096 + 2 * PARTS_BATCH * TINY_VOCAB * sizeof(float)];
    struct area area;
    start(4, 8, MANY);
    area_init(&area, bytes, 4096, sizeof(bytes) - 4096, area_is_unused);
    struct result *plain = make(REQUEST_LOGITS, 1, 300, 0);
    struct result *placed = make(REQUEST_LOGITS, 1, 300, 0);
    placed->request->area = area_ref(&area);
    submit(plain);
    submit(placed);
    wait_all();
    cr_assert(eq(u32, plain->n_rows, 300));
    cr_assert(eq(u32, placed->n_rows, 300));
    cr_expect(not(placed->out_of_order));
    cr_expect(eq(u32, plain->n_placed, 0));
    cr_expect(ge(u32, placed->n_placed, 2));
    cr_expect(eq(int, memcmp(plain->rows, placed->rows, 300 * TINY_VOCAB * sizeof(float)), 0));
    cr_expect(eq(u32, area.n_refs, 2));
}

/* The first token of a generation is the best of the prompt's last row. */
Test(engine, rows_and_generation_agree)
{
    start(4, 8, MANY);
    struct result *rows = make(REQUEST_LOGITS, 4, 77, 0);
    struct result *text = make(REQUEST_GENERATE, 4, 77, 1);
    rows->request->first_row = 76;
    submit(rows);
    submit(text);
    wait_all();
    cr_assert(eq(u32, rows->n_rows, 1));
    uint32_t best = 0;
    for (uint32_t k = 0; k < TINY_VOCAB; k++) {
        bool allowed = k != TINY_EOS;
        best = allowed && rows->rows[k] > rows->rows[best] ? k : best;
    }
    cr_expect(eq(i32, text->tokens[0], (int32_t)best));
}

Test(engine, one_token_with_logprobs_has_no_row)
{
    start(4, 8, MANY);
    struct result *r = make(REQUEST_LOGITS, 4, 1, 0);
    r->request->logprobs = true;
    submit(r);
    wait_all();
    cr_expect(eq(u32, r->n_rows, 0));
    cr_expect(eq(int, r->request->finish, FINISH_LENGTH));
}

/* ---- slow readers ------------------------------------------------------------------------ */

/* Undelivered bytes above the bound stop one request; its neighbour goes on, and a kick resumes. */
Test(engine, a_slow_reader_pauses_its_own_request_only)
{
    start(4, 8, MANY);
    struct result *slow = make(REQUEST_GENERATE, 1, 10, 100);
    struct result *other = make(REQUEST_GENERATE, 2, 10, 200);
    const size_t far_too_much = 1u << 30;
    atomic_store(&slow->request->undelivered_bytes, far_too_much);
    submit(slow);
    submit(other);
    wait_done(other);
    cr_expect(eq(u32, other->n_tokens, 200));
    cr_expect(eq(u32, slow->n_tokens, 0));
    cr_expect(not(slow->done));
    atomic_fetch_sub(&slow->request->undelivered_bytes, far_too_much);
    engine_kick(engine);
    wait_all();
    cr_expect(eq(u32, slow->n_tokens, 100));
}

Test(engine, a_paused_request_can_be_cancelled)
{
    start(4, 8, MANY);
    struct result *slow = make(REQUEST_GENERATE, 1, 10, 100);
    atomic_store(&slow->request->undelivered_bytes, 1u << 30);
    submit(slow);
    engine_cancel(engine, slow->request);
    wait_all();
    cr_expect(eq(int, slow->request->finish, FINISH_CANCELLED));
}

Test(engine, stats_count_what_was_done)
{
    struct engine_stats s;
    start(4, 8, MANY);
    submit(make(REQUEST_GENERATE, 1, 100, 20));
    submit(make(REQUEST_LOGITS, 1, 50, 0));
    wait_all();
    engine_stats(engine, &s);
    cr_expect(eq(u64, s.n_requests, 2));
    cr_expect(eq(u64, s.n_prompt_tokens, 150));
    cr_expect(eq(u64, s.n_generated_tokens, 20));
    cr_expect(ge(u64, s.n_steps, 21));
    cr_expect(eq(u64, s.kv_bytes_max, MANY));
    cr_expect(eq(u64, engine_step_started_ns(engine), 0));
}
