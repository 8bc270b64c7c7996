/* The engine's scheduler: sequences that give way and go on, places by priority and by user,
 * deadlines. Whatever happens, the tokens are those of a request alone. */
#include "tests/unit/engine/driver.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <stdio.h>
#include <string.h>

#define MANY  (64ull << 20)
#define BLOCK (128ull << 10) /* of the model below: 16 in a slab of 2 MiB */
#define ROOM  (32 * BLOCK)   /* for four sequences of 512 tokens */

/* Blocks so large that a few sequences fill a small arena. */
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

TestSuite(preempt, .init = setup, .fini = driver_teardown, .timeout = 300);

#define N 16u

static struct result *make_one(uint32_t i, const char *realm, bool exact)
{
    struct result *r = make(REQUEST_GENERATE, i, 20 + 10 * i, 490 - 10 * i);
    snprintf(r->request->realm, sizeof(r->request->realm), "%s", realm);
    r->request->cache_exact = exact;
    /* Draws depend on all draws before them: what was lost or drawn twice would show. */
    r->request->sampling.temperature = i % 2 == 0 ? 0 : 1;
    r->request->sampling.seed = i;
    return r;
}

static uint64_t n_preempted(void)
{
    static struct engine_stats s;
    engine_stats(engine, &s);
    return s.n_preemptions;
}

/* 16 sequences in room for 4, against each alone in room for all. */
static void oversubscribe(const char *realm, bool exact)
{
    start(1, MANY);
    for (uint32_t i = 0; i < N; i++) {
        submit(make_one(i, "", exact));
    }
    wait_all();
    cr_expect(eq(u64, n_preempted(), 0));
    driver_stop();
    start(N, ROOM);
    for (uint32_t i = 0; i < N; i++) {
        submit(make_one(i, realm, exact));
    }
    uint32_t counted = 0;
    wait_all();
    for (uint32_t i = 0; i < N; i++) {
        const struct result *r = &results[N + i];
        cr_assert(eq(int, r->request->finish, FINISH_LENGTH), "%u: %s", i,
                  r->request->error_message);
        cr_expect(eq(u32, r->request->n_prompt, 20 + 10 * i));
        cr_expect(le(u32, r->request->n_cached, r->request->n_prompt));
        check_same(&results[i], r);
        counted += r->request->n_preempted;
    }
    cr_expect(lt(u64, 0, n_preempted())); /* or this test says nothing */
    cr_expect(eq(u64, n_preempted(), counted));
}

Test(preempt, a_crowded_arena_changes_no_token)
{
    oversubscribe("one", false);
}

Test(preempt, nor_does_it_without_a_shared_cache)
{
    oversubscribe("", false);
}

Test(preempt, nor_with_exact_blocks_alone)
{
    oversubscribe("one", true);
}

/* ---- votes ------------------------------------------------------------------------------- */

#define N_VOTED 400u

static const struct kv_policy choosy = {
    .kind = KV_POLICY_SNAPKV, .budget = 128, .observed = 16, .kernel = 7};

static struct result *make_choosy(uint32_t seed)
{
    struct result *r = make(REQUEST_GENERATE, seed, N_VOTED, 60);
    r->request->kv_policy = choosy;
    return r;
}

/* Votes of a prompt are memory of the arena's bound: one that has room for the blocks alone takes
 * no such request, and in one for a single sequence two run one after the other. */
Test(preempt, votes_count_in_the_bound)
{
    enum { VOTES = 4 * 4 * (N_VOTED - 16) * sizeof(float) };
    const struct kv_layout *layout = model_kv_layout(model);
    uint64_t n_blocks = kv_policy_blocks(&choosy, 0, N_VOTED, N_VOTED + 60, PARTS_BATCH, false);
    uint64_t blocks = kv_arena_bytes_for(layout->classes[0].block_bytes, n_blocks);
    start(4, MANY);
    struct result *alone[2] = {make_choosy(1), make_choosy(2)};
    submit(alone[0]);
    submit(alone[1]);
    wait_all();
    driver_stop();

    start(4, blocks + VOTES - 1);
    struct result *refused = make_choosy(1);
    submit(refused);
    wait_done(refused);
    cr_expect(eq(int, refused->request->finish, FINISH_ERROR));
    cr_expect(eq(int, refused->request->error, PROTO_E_NO_MEMORY));
    driver_stop();

    start(4, blocks + VOTES);
    struct result *both[2] = {make_choosy(1), make_choosy(2)};
    submit(both[0]);
    submit(both[1]);
    wait_done(both[0]);
    wait_done(both[1]);
    for (uint32_t i = 0; i < 2; i++) {
        cr_expect(eq(int, both[i]->request->finish, FINISH_LENGTH), "%s",
                  both[i]->request->error_message);
        check_same(alone[i], both[i]);
    }
    check_nothing_used();
}

/* ---- places ------------------------------------------------------------------------------ */

Test(preempt, an_urgent_request_takes_a_place_and_gives_it_back)
{
    start(2, MANY);
    struct result *alone = make(REQUEST_GENERATE, 1, 40, 400);
    submit(alone);
    wait_done(alone);
    struct result *patient = make(REQUEST_GENERATE, 1, 40, 400);
    struct result *second = make(REQUEST_GENERATE, 2, 40, 400);
    struct result *urgent = make(REQUEST_GENERATE, 3, 40, 5);
    urgent->request->priority = 3;
    patient->request->realm[0] = second->request->realm[0] = '\0';
    driver_hold(true);
    submit(patient);
    submit(second);
    wait_tokens(second, 1);
    submit(urgent);
    driver_hold(false);
    wait_done(urgent);
    wait_all();
    cr_expect(eq(u32, second->request->n_preempted, 1)); /* the younger */
    cr_expect(eq(u32, patient->request->n_preempted, 0));
    cr_expect(eq(u32, second->n_tokens, 400));
    check_same(alone, patient);
}

/* Of two that wait, whoever asked for more goes first, also where it came later. */
Test(preempt, priority_goes_before_arrival)
{
    start(1, MANY);
    struct result *running = make(REQUEST_GENERATE, 1, 40, 400);
    struct result *low = make(REQUEST_GENERATE, 2, 40, 400);
    struct result *high = make(REQUEST_GENERATE, 3, 40, 5);
    running->request->priority = 8;
    low->request->priority = -2;
    driver_hold(true);
    submit(running);
    wait_tokens(running, 1);
    submit(low);
    submit(high);
    engine_cancel(engine, running->request);
    driver_hold(false);
    wait_done(high);
    cr_expect(lt(u32, low->n_tokens, 400));
    wait_all();
    cr_expect(lt(dbl, high->request->timings.queue_ms, low->request->timings.queue_ms));
}

/* One user has all places; another comes, and has one before any of them ends. */
Test(preempt, a_user_with_nothing_gets_a_place_of_one_with_many)
{
    start(3, MANY);
    struct result *many[3];
    for (uint32_t i = 0; i < 3; i++) {
        many[i] = make(REQUEST_GENERATE, i, 40, 460);
        many[i]->request->uid = 1;
    }
    driver_hold(true);
    for (uint32_t i = 0; i < 3; i++) {
        submit(many[i]);
    }
    for (uint32_t i = 0; i < 3; i++) {
        wait_tokens(many[i], 1);
    }
    struct result *other = make(REQUEST_GENERATE, 9, 40, 5);
    other->request->uid = 2;
    submit(other);
    driver_hold(false);
    wait_done(other);
    wait_all();
    uint32_t counted = 0;
    for (uint32_t i = 0; i < 3; i++) {
        cr_expect(eq(u32, many[i]->n_tokens, 460));
        counted += many[i]->request->n_preempted;
    }
    cr_expect(eq(u32, counted, 1));
    cr_expect(eq(u32, other->request->n_preempted, 0));
}

/* A sequence whose reader sleeps keeps its place only while nobody wants it. */
Test(preempt, a_resting_sequence_gives_way)
{
    start(1, MANY);
    struct result *slow = make(REQUEST_GENERATE, 1, 40, 100);
    struct result *other = make(REQUEST_GENERATE, 2, 40, 100);
    atomic_store(&slow->request->undelivered_bytes, 1u << 30);
    submit(slow);
    submit(other);
    wait_done(other);
    cr_expect(eq(u32, slow->n_tokens, 0));
    atomic_fetch_sub(&slow->request->undelivered_bytes, 1u << 30);
    engine_kick(engine);
    wait_all();
    cr_expect(eq(u32, slow->n_tokens, 100));
}

Test(preempt, one_that_gave_way_can_be_cancelled)
{
    start(1, MANY);
    struct result *patient = make(REQUEST_GENERATE, 1, 40, 400);
    struct result *urgent = make(REQUEST_GENERATE, 2, 40, 400);
    urgent->request->priority = 1;
    driver_hold(true);
    submit(patient);
    wait_tokens(patient, 1);
    submit(urgent);
    wait_tokens(urgent, 1);
    engine_cancel(engine, patient->request);
    driver_hold(false);
    wait_all();
    cr_expect(eq(int, patient->request->finish, FINISH_CANCELLED));
    cr_expect(eq(u32, urgent->n_tokens, 400));
}

Test(preempt, an_engine_can_end_with_sequences_that_gave_way)
{
    start(N, ROOM);
    for (uint32_t i = 0; i < N; i++) {
        submit(make_one(i, "one", false));
    }
    wait_done(&results[0]);
    driver_stop();
    for (uint32_t i = 0; i < N; i++) {
        cr_expect(ne(int, results[i].request->finish, FINISH_NONE));
    }
}

/* ---- deadlines --------------------------------------------------------------------------- */

/* Holds the only place, and cannot be made to leave it. */
static struct result *block_the_place(void)
{
    struct result *r = make(REQUEST_GENERATE, 1, 40, 470);
    r->request->priority = 8;
    submit(r);
    wait_tokens(r, 1);
    return r;
}

Test(preempt, a_deadline_passes_while_a_request_waits)
{
    start(1, MANY);
    struct result *r = make(REQUEST_GENERATE, 2, 40, 1);
    r->request->deadline_ms = 30;
    atomic_store(&r->request->undelivered_bytes, 1u << 30); /* it can never step */
    submit(r);
    wait_done(r);
    cr_expect(eq(int, r->request->finish, FINISH_ERROR));
    cr_expect(eq(int, r->request->error, PROTO_E_DEADLINE));
    cr_expect(strstr(r->request->error_message, "'deadline_ms' 30") != NULL, "%s",
              r->request->error_message);
    wait_all();
}

/* Tokens that were made are not thrown away. (On a machine so slow that there are none, it is an
 * error.) */
Test(preempt, what_has_tokens_ends_with_them)
{
    start(1, MANY);
    struct result *r = make(REQUEST_GENERATE, 2, 40, 460);
    r->request->deadline_ms = 1000;
    submit(r);
    wait_tokens(r, 1);
    atomic_fetch_add(&r->request->undelivered_bytes, 1u << 30); /* from now on it rests */
    wait_done(r);
    bool made_some = r->n_tokens > 0 && r->n_tokens < 460;
    cr_expect(eq(int, r->request->finish,
                 made_some         ? FINISH_TIME
                 : r->n_tokens > 0 ? FINISH_LENGTH
                                   : FINISH_ERROR));
    wait_all();
}

Test(preempt, the_hopeless_is_refused_at_once)
{
    start(1, MANY);
    for (uint32_t i = 0; i < 8; i++) { /* steps of both kinds are seen */
        submit(make(REQUEST_GENERATE, i, 200, 20));
    }
    wait_all();
    struct result *blocker = block_the_place();
    struct result *r = make(REQUEST_GENERATE, 20, 100, 400);
    r->request->deadline_ms = 1;
    submit(r);
    wait_done(r);
    cr_expect(eq(int, r->request->error, PROTO_E_DEADLINE));
    cr_expect(eq(u32, r->n_tokens, 0));
    struct result *in_time = make(REQUEST_GENERATE, 21, 100, 4);
    in_time->request->deadline_ms = 3600 * 1000;
    submit(in_time);
    wait_all();
    cr_expect(eq(int, in_time->request->finish, FINISH_LENGTH));
    cr_expect(eq(int, blocker->request->finish, FINISH_LENGTH));
}
