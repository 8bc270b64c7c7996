/* Calls from message to answer, with an engine that does what the test says, when it says. */
#include "tests/unit/daemon/handlers_client.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

TestSuite(handlers, .init = set_up, .fini = tear_down);

Test(handlers, bytes_count_as_delivered_unless_the_client_is_congested)
{
    struct client *c = client_create(0);
    send_generate(c, 1, "fake", "abc", 3);
    struct request *r = fakes.submitted[0];
    cr_assert_not_null(r);
    cr_assert_eq(r->n_tokens, 3);

    fake_tokens(r, "x", 5, 100);
    service_pump(service);
    cr_assert_eq(atomic_load(&r->undelivered_bytes), 0);
    cr_assert_eq(fakes.n_kicks, 1);

    c->caller.congested = true;
    fake_tokens(r, "y", 6, 100);
    fake_tokens(r, "z", 7, 30);
    service_pump(service);
    cr_assert_eq(atomic_load(&r->undelivered_bytes), 130);
    cr_assert_eq(fakes.n_kicks, 1);

    c->caller.congested = false;
    caller_uncongested(&c->caller);
    cr_assert_eq(atomic_load(&r->undelivered_bytes), 0);
    cr_assert_eq(fakes.n_kicks, 2);

    fake_done(r, FINISH_LENGTH);
    service_pump(service);
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(next(c)->kind, IPC_NOTIFICATION);
    }
    cr_assert(finish_is(next(c), "length"));
    cr_assert_null(next(c));
    client_destroy(c);
}

Test(handlers, a_client_that_leaves_cancels_and_is_never_written_to)
{
    struct client *c = client_create(0);
    send_generate(c, 1, "fake", "abc", 3);
    struct request *r = fakes.submitted[0];
    client_destroy(c);
    cr_assert_eq(fakes.n_cancelled, 1);
    cr_assert_eq(service_n_open(service), 1);
    fake_tokens(r, "late", 5, 100);
    fake_done(r, FINISH_CANCELLED);
    service_pump(service);
}

Test(handlers, a_client_that_leaves_while_its_prompt_is_encoded)
{
    static char text[SERVICE_INLINE_TEXT_BYTES + 1];
    struct client *c = client_create(0);
    memset(text, 'a', sizeof(text));
    send_generate(c, 1, "fake", text, sizeof(text));
    cr_assert(!TAILQ_EMPTY(&fakes.tasks));
    client_destroy(c);
    cr_assert_eq(service_n_open(service), 0);
    cr_assert(TAILQ_EMPTY(&fakes.tasks), "nobody would hear of it");
    cr_assert_eq(fakes.n_submitted, 0);
}

static void send_list(struct client *c, uint32_t id)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, "model.list");
    ipc_pack_map(&b, 0);
    hand_in(c, &b);
}

/* Folders may lie on a slow disk: the loop does not read them. */
Test(handlers, models_are_listed_on_the_task_pool)
{
    struct client *c = client_create(0);
    send_list(c, 1);
    cr_assert_null(next(c));
    cr_assert(!TAILQ_EMPTY(&fakes.tasks));
    fake_run_tasks();
    const struct ipc_message *m = next(c);
    cr_assert_not_null(m);
    cr_expect_not_null(ipc_value_get(m->result, "models"));
    send_list(c, 2);
    client_destroy(c);
    fake_run_tasks();
    cr_expect_eq(service_n_open(service), 0);
}

/* Of those that wait, the one that came last. */
static struct task *begin_a_task(void)
{
    struct task *t = TAILQ_FIRST(&fakes.tasks);
    cr_assert_not_null(t);
    TAILQ_REMOVE(&fakes.tasks, t, entry);
    return t;
}

static void end_a_task(struct task *t)
{
    t->work(t);
    t->done(t);
}

static void send_dry(struct client *c)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 1, "text.generate");
    ipc_pack_map(&b, 4);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "fake");
    ipc_pack_str(&b, "prompt");
    ipc_pack_str(&b, "abc");
    ipc_pack_str(&b, "dry_multiplier");
    ipc_pack_f64(&b, 0.8);
    ipc_pack_str(&b, "dry_sequence_breakers");
    ipc_pack_array(&b, 1);
    ipc_pack_str(&b, "b");
    hand_in(c, &b);
}

Test(handlers, breakers_are_searched_elsewhere)
{
    struct client *c = client_create(0);
    send_dry(c);
    cr_assert(!TAILQ_EMPTY(&fakes.tasks));
    cr_assert_eq(fakes.n_submitted, 0);
    fake_run_tasks();
    cr_assert_eq(fakes.n_submitted, 1);
    cr_assert_not_null(fakes.submitted[0]->sampling.dry_breakers);
    fake_done(fakes.submitted[0], FINISH_LENGTH);
    service_pump(service);
    cr_assert(finish_is(next(c), "length"));
    client_destroy(c);
}

Test(handlers, a_cancel_while_breakers_are_searched)
{
    struct client *c = client_create(0);
    send_dry(c);
    struct task *t = begin_a_task();
    send_cancel(c, 1);
    cr_assert_null(next(c)); /* the call is not the loop's while it runs */
    end_a_task(t);
    cr_assert(finish_is(next(c), "cancelled"));
    send_dry(c);
    t = begin_a_task();
    client_destroy(c);
    cr_assert_eq(service_n_open(service), 1);
    end_a_task(t);
    cr_assert_eq(service_n_open(service), 0);
    cr_assert_eq(fakes.n_submitted, 0);
}

Test(handlers, a_cancel_before_breakers_are_searched)
{
    struct client *c = client_create(0);
    send_dry(c);
    send_cancel(c, 1);
    cr_assert(finish_is(next(c), "cancelled"));
    cr_assert(TAILQ_EMPTY(&fakes.tasks));
    send_dry(c);
    client_destroy(c);
    cr_assert(TAILQ_EMPTY(&fakes.tasks));
    cr_assert_eq(fakes.n_submitted, 0);
    cr_assert_null(quota_user(&fakes.quotas, 0)); /* all is given back, once */
}

/* A ping with so many values beside its own. */
static void send_values(struct client *c, uint32_t id, uint32_t n)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, "gqa.ping");
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "payload");
    ipc_pack_array(&b, n);
    for (uint32_t i = 0; i < n; i++) {
        ipc_pack_u64(&b, 0);
    }
    hand_in(c, &b);
}

Test(handlers, a_message_of_many_values_is_parsed_elsewhere_and_holds_the_next)
{
    struct client *c = client_create(0);
    send_values(c, 1, SERVICE_INLINE_ELEMENTS);
    cr_assert(c->caller.parsing);
    cr_assert_null(next(c));
    fake_run_tasks();
    cr_assert_not(c->caller.parsing);
    cr_assert_eq(c->n_resumed, 1);
    const struct ipc_message *m = next(c);
    cr_assert(m && m->kind == IPC_RESPONSE && m->id == 1 && !m->error);
    client_destroy(c);
}

Test(handlers, a_message_of_many_values_is_freed_elsewhere_too)
{
    struct client *c = client_create(0);
    send_values(c, 1, SERVICE_INLINE_ELEMENTS);
    end_a_task(begin_a_task());
    cr_assert_not_null(next(c));
    cr_assert(!TAILQ_EMPTY(&fakes.tasks));
    fake_run_tasks();
    client_destroy(c);
}

/* The client reads the answer to ring.close while a copy is still being made. */
Test(handlers, what_handles_name_is_copied_elsewhere_and_stays_until_then)
{
    static uint8_t data[2 * SERVICE_INLINE_HANDLE_BYTES];
    static const uint64_t bytes[] = {SERVICE_INLINE_HANDLE_BYTES, SERVICE_INLINE_HANDLE_BYTES + 1};
    for (uint32_t i = 0; i < 2; i++) {
        struct client *c = client_create(0);
        struct area area;
        struct ipc_buffer b;
        area_init(&area, data, sizeof(data) - AREA_BYTES_MIN, AREA_BYTES_MIN, NULL);
        memset(data, 'a', sizeof(data));
        c->caller.area = &area;
        ipc_buffer_init(&b);
        ipc_pack_request(&b, i, "text.tokenize");
        ipc_pack_map(&b, 2);
        ipc_pack_str(&b, "model");
        ipc_pack_str(&b, "fake");
        ipc_pack_str(&b, "text");
        ipc_pack_handle(&b, &(struct ipc_handle){8, bytes[i]});
        hand_in(c, &b);
        cr_expect_eq(c->caller.parsing, i == 1, "%u", i);
        cr_expect_eq(area.n_refs, 1 + i, "%u", i);
        c->caller.area = NULL;
        fake_run_tasks();
        cr_expect_not(c->caller.parsing);
        cr_expect_eq(area.n_refs, 1);
        const struct ipc_message *m = next(c);
        cr_assert(m && m->kind == IPC_RESPONSE && m->id == i && !m->error);
        area_finish(&area);
        client_destroy(c);
    }
}

Test(handlers, a_long_message_of_few_values_is_parsed_at_once)
{
    static char text[1u << 20];
    struct client *c = client_create(0);
    memset(text, 'a', sizeof(text));
    send_generate(c, 1, "fake", text, sizeof(text));
    cr_assert_not(c->caller.parsing);
    cr_assert_eq(c->n_resumed, 0);
    fake_run_tasks(); /* its text is encoded there */
    cr_assert_eq(error_code(next(c)), PROTO_E_CONTEXT_EXCEEDED);
    client_destroy(c);
}

Test(handlers, cancellations_count_against_the_uid_whatever_they_name)
{
    struct client *c = client_create(7);
    c->caller.penalty = penalty_ref(&fakes.penalties, 7);
    send_generate(c, 1, "fake", "abc", 3);
    send_cancel(c, 99);
    send_cancel(c, 1);
    send_cancel(c, 1);
    cr_assert_float_eq(c->caller.penalty->strikes, 3, 0.9); /* they drain as time passes */
    fake_done(fakes.submitted[0], FINISH_CANCELLED);
    service_pump(service);
    client_destroy(c);
    penalty_finish(&fakes.penalties);
}

Test(handlers, cancelling_answers_with_what_was_done)
{
    struct client *c = client_create(0);
    send_generate(c, 1, "fake", "abc", 3);
    send_cancel(c, 99);
    cr_assert_eq(fakes.n_cancelled, 0);
    send_cancel(c, 1);
    cr_assert_eq(fakes.n_cancelled, 1);
    fake_done(fakes.submitted[0], FINISH_CANCELLED);
    service_pump(service);
    cr_assert(finish_is(next(c), "cancelled"));
    client_destroy(c);
}

Test(handlers, cancelling_a_wait_for_a_model_answers_at_once)
{
    fakes.model_is_loaded = false;
    struct client *c = client_create(0);
    send_generate(c, 1, "fake", "abc", 3);
    cr_assert_eq(fakes.n_loads, 1);
    send_cancel(c, 1);
    cr_assert(finish_is(next(c), "cancelled"));
    cr_assert_eq(service_n_open(service), 0);
    /* The load ends all the same, and its reference is given back. */
    fakes.load.on_progress(fakes.load.arg, "read", 1, 2);
    fakes.load.on_done(fakes.load.arg, model_ref(fake_model()), 0, "");
    fake_run_tasks();
    cr_assert_null(next(c));
    client_destroy(c);
}

Test(handlers, a_load_that_fails_tells_those_who_waited)
{
    fakes.model_is_loaded = false;
    struct client *c = client_create(0);
    send_generate(c, 1, "fake", "abc", 3);
    fakes.load.on_done(fakes.load.arg, NULL, -EINVAL, "tensor 7 is bent");
    fake_run_tasks();
    cr_assert_eq(error_code(next(c)), PROTO_E_MODEL_REFUSED);
    client_destroy(c);
}

/* Under another name of its file: whoever wants to use it does, whoever wants to load it is told.
 */
Test(handlers, a_model_that_was_loaded_meanwhile_is_used)
{
    fakes.model_is_loaded = false;
    struct client *c = client_create(0);
    send_generate(c, 1, "fake", "abc", 3);
    fakes.load.on_done(fakes.load.arg, model_ref(fake_model()), -EEXIST, "the name is taken");
    fake_run_tasks();
    cr_assert_eq(fakes.n_submitted, 1);
    fake_done(fakes.submitted[0], FINISH_CANCELLED);
    service_pump(service);
    cr_assert(finish_is(next(c), "cancelled"));
    send_load(c, 2, "fake");
    fakes.load.on_done(fakes.load.arg, model_ref(fake_model()), -EEXIST, "the name is taken");
    fake_run_tasks();
    cr_assert_eq(error_code(next(c)), PROTO_E_EXISTS);
    client_destroy(c);
}

Test(handlers, the_pattern_list_says_who_loads_by_being_named)
{
    static const char *const patterns[] = {"nice-*"};
    struct service_limits listed = limits;
    listed.allow_models = patterns;
    listed.n_allow_models = 1;
    cr_assert_eq(service_set_limits(service, &listed), 0);
    fakes.model_is_loaded = false;
    struct client *c = client_create(1000);
    send_generate(c, 1, "fake", "abc", 3);
    cr_assert_eq(error_code(next(c)), PROTO_E_NOT_FOUND);
    cr_assert_eq(fakes.n_loads, 0);
    client_destroy(c);
}

Test(handlers, open_calls_are_bounded_per_connection_and_per_user)
{
    fakes.quotas.limits.of[QUOTA_CALLS] = 6;
    struct client *a = client_create(7);
    struct client *b = client_create(7);
    struct client *other = client_create(8);
    for (uint32_t i = 0; i < 4; i++) {
        send_generate(a, i, "fake", "abc", 3);
    }
    cr_assert_null(next(a));
    send_generate(a, 4, "fake", "abc", 3);
    cr_assert_eq(error_code(next(a)), PROTO_E_BUSY);
    send_generate(b, 0, "fake", "abc", 3);
    send_generate(b, 1, "fake", "abc", 3);
    cr_assert_null(next(b));
    send_generate(b, 2, "fake", "abc", 3);
    cr_assert_eq(error_code(next(b)), PROTO_E_BUSY);
    send_generate(other, 0, "fake", "abc", 3);
    cr_assert_null(next(other));

    while (fakes.n_submitted > 0) {
        fake_done(fakes.submitted[0], FINISH_EOS);
    }
    service_pump(service);
    client_destroy(a);
    client_destroy(b);
    client_destroy(other);
}

/* What uid 7 holds of a quota. */
static uint64_t held(enum quota_kind kind)
{
    const struct quota_user *u = quota_user(&fakes.quotas, 7);
    return u ? u->used.of[kind] : 0;
}

Test(handlers, prompts_that_wait_are_bounded_per_user_until_their_first_result)
{
    fakes.quotas.limits.of[QUOTA_QUEUED_TOKENS] = 7;
    struct client *c = client_create(7);
    send_generate(c, 1, "fake", "abc", 3);
    uint64_t n_tokens = held(QUOTA_QUEUED_TOKENS);
    cr_assert(n_tokens > 0 && n_tokens * 2 <= 7 && n_tokens * 3 > 7, "%llu tokens",
              (unsigned long long)n_tokens);
    send_generate(c, 2, "fake", "abc", 3);
    cr_assert_null(next(c));
    send_generate(c, 3, "fake", "abc", 3);
    cr_assert_eq(error_code(next(c)), PROTO_E_BUSY);
    cr_assert_eq(held(QUOTA_QUEUED_REQUESTS), 2);
    cr_assert_eq(held(QUOTA_SEQUENCES), 2);

    fake_tokens(fakes.submitted[0], "x", 5, 100);
    service_pump(service);
    cr_assert_eq(held(QUOTA_QUEUED_TOKENS), n_tokens);
    cr_assert_eq(held(QUOTA_QUEUED_REQUESTS), 1);
    cr_assert_eq(held(QUOTA_SEQUENCES), 2);
    cr_assert_not_null(next(c)); /* the event */
    send_generate(c, 4, "fake", "abc", 3);
    cr_assert_null(next(c));

    while (fakes.n_submitted > 0) {
        fake_done(fakes.submitted[0], FINISH_EOS);
    }
    service_pump(service);
    cr_assert_null(quota_user(&fakes.quotas, 7));
    client_destroy(c);
}

Test(handlers, a_client_that_went_away_holds_its_quotas_until_the_engine_lets_go)
{
    struct client *c = client_create(7);
    send_generate(c, 1, "fake", "abc", 3);
    client_destroy(c);
    cr_assert_eq(held(QUOTA_CALLS), 1);
    cr_assert_eq(held(QUOTA_SEQUENCES), 1);
    fake_done(fakes.submitted[0], FINISH_CANCELLED);
    service_pump(service);
    cr_assert_null(quota_user(&fakes.quotas, 7));
}

Test(handlers, a_request_that_waits_too_long_for_its_reader_is_ended)
{
    struct client *c = client_create(7);
    send_generate(c, 1, "fake", "abc", 3);
    send_generate(c, 2, "fake", "abc", 3);
    struct request *paused = fakes.submitted[0];
    struct request *other = fakes.submitted[1];
    c->caller.congested = true;
    fake_tokens(paused, "x", 5, 100);
    service_pump(service);
    cr_assert_not_null(next(c)); /* the event */
    cr_assert_eq(caller_end_paused(&c->caller, 250), 1);
    cr_assert_eq(caller_end_paused(&c->caller, 250), 0);
    cr_assert_eq(fakes.n_cancelled, 1);
    fake_done(paused, FINISH_CANCELLED);
    fake_done(other, FINISH_EOS);
    service_pump(service);
    cr_assert_eq(error_code(next(c)), PROTO_E_DEADLINE);
    cr_assert(finish_is(next(c), "eos"));
    cr_assert_null(quota_user(&fakes.quotas, 7));
    client_destroy(c);
}

Test(handlers, a_message_counts_until_its_request_has_copies)
{
    struct client *c = client_create(7);
    struct quota_amounts of_message = {.of = {[QUOTA_INPUT_BYTES] = 500}};
    struct ipc_error e;
    struct registry_load loads[3];
    fakes.model_is_loaded = false;
    for (uint32_t id = 1; id <= 2; id++) { /* they wait for their model */
        cr_assert_eq(quota_take(&fakes.quotas, 7, &of_message, &e), 0);
        c->held_bytes = 500;
        send_generate(c, id, "fake", "abc", 3);
        loads[id] = fakes.load;
    }
    cr_assert_eq(held(QUOTA_INPUT_BYTES), 1000);
    send_cancel(c, 1);
    cr_assert(finish_is(next(c), "cancelled"));
    cr_assert_eq(held(QUOTA_INPUT_BYTES), 500);
    fakes.model_is_loaded = true;
    cr_assert_eq(quota_take(&fakes.quotas, 7, &of_message, &e), 0);
    c->held_bytes = 500;
    send_generate(c, 3, "fake", "abc", 3);
    cr_assert_eq(fakes.n_submitted, 1);
    cr_assert_eq(held(QUOTA_INPUT_BYTES), 500); /* only that which waits */
    client_destroy(c);
    cr_assert_eq(held(QUOTA_INPUT_BYTES), 0);
    fake_done(fakes.submitted[0], FINISH_CANCELLED);
    service_pump(service);
    for (uint32_t id = 1; id <= 2; id++) {
        loads[id].on_done(loads[id].arg, NULL, -ECANCELED, "");
    }
    fake_run_tasks();
}

Test(handlers, a_message_without_room_is_refused_by_its_head)
{
    struct client *c = client_create(7);
    const struct ipc_error busy = {.code = PROTO_E_BUSY, .message = "full"};
    static const uint8_t request[] = {0x94, 0x00, 0xcd, 0x12, 0x34};
    static const uint8_t other[] = {0x93, 0x02, 0xa5, '$', 'g', 'i', 'v', 'e'};
    cr_assert_eq(caller_refuse(&c->caller, request, sizeof(request), &busy), 0);
    const struct ipc_message *m = next(c);
    cr_assert_eq(error_code(m), PROTO_E_BUSY);
    cr_assert_eq(m->id, 0x1234);
    cr_assert_eq(caller_refuse(&c->caller, request, 4, &busy), -EPROTO); /* its id is cut */
    cr_assert_eq(next(c)->kind, IPC_NOTIFICATION);
    cr_assert_eq(caller_refuse(&c->caller, other, sizeof(other), &busy), -EPROTO);
    cr_assert_eq(next(c)->kind, IPC_NOTIFICATION);
    cr_assert_eq(c->n_broken, 0);
    client_destroy(c);
}

Test(handlers, answers_that_nobody_reads_shut_the_door)
{
    struct quota_amounts connection = {.of = {[QUOTA_CONNECTIONS] = 1}};
    struct ipc_error e;
    struct client *c = client_create(7);
    fakes.quotas.limits.of[QUOTA_OUTPUT_BYTES] = 1000;
    cr_assert_eq(quota_take(&fakes.quotas, 7, &connection, &e), 0);
    quota_change(&fakes.quotas, 7, QUOTA_OUTPUT_BYTES, 0, 1000);
    send_generate(c, 1, "fake", "abc", 3);
    cr_assert_eq(error_code(next(c)), PROTO_E_BUSY);
    cr_assert_eq(held(QUOTA_CALLS), 0);
    client_destroy(c);
    quota_finish(&fakes.quotas);
}

static void send_urgent(struct client *c, uint32_t id, const char *method, int64_t priority)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, method);
    ipc_pack_map(&b, 4);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "fake");
    ipc_pack_str(&b, "prompt");
    ipc_pack_str(&b, "abc");
    ipc_pack_str(&b, "priority");
    ipc_pack_i64(&b, priority);
    ipc_pack_str(&b, "deadline_ms");
    ipc_pack_u64(&b, 500);
    hand_in(c, &b);
}

Test(handlers, only_administrators_raise_a_priority)
{
    struct client *user = client_create(7), *admin = client_create(0);
    static const char *const methods[] = {"text.generate", "text.logits", "text.embed"};
    for (uint32_t i = 0; i < 3; i++) {
        send_urgent(user, 1, methods[i], 1);
        cr_assert_eq(error_code(next(user)), PROTO_E_ACCESS_DENIED, "%s", methods[i]);
        cr_assert_eq(fakes.n_submitted, 0);
        send_urgent(user, 1, methods[i], 9);
        cr_assert_eq(error_code(next(user)), PROTO_E_INVALID_PARAMS, "%s", methods[i]);
    }
    send_urgent(user, 2, "text.generate", -8);
    send_urgent(admin, 3, "text.generate", 8);
    fake_run_tasks();
    cr_assert_eq(fakes.n_submitted, 2);
    cr_assert_eq(fakes.submitted[0]->priority, -8);
    cr_assert_eq(fakes.submitted[1]->priority, 8);
    cr_assert_eq(fakes.submitted[1]->deadline_ms, 500);
    fake_done(fakes.submitted[1], FINISH_LENGTH);
    fake_done(fakes.submitted[0], FINISH_LENGTH);
    service_pump(service);
    client_destroy(user);
    client_destroy(admin);
}

Test(handlers, a_full_queue_and_a_drain_are_told)
{
    struct client *c = client_create(0);
    fakes.submit_result = -EAGAIN;
    send_generate(c, 1, "fake", "abc", 3);
    const struct ipc_message *m = next(c);
    uint64_t retry_ms = 0;
    cr_assert_eq(error_code(m), PROTO_E_BUSY);
    cr_assert_eq(ipc_value_u64(ipc_value_get(m->error, "retry_after_ms"), &retry_ms), 0);
    cr_assert_eq(retry_ms, 1234); /* the engine's word */
    fakes.submit_result = 0;
    service_drain(service);
    send_generate(c, 2, "fake", "abc", 3);
    cr_assert_eq(error_code(next(c)), PROTO_E_DRAINING);
    client_destroy(c);
}

/* Also what is no request to the engine, and would keep a thread of the task pool. */
Test(handlers, nothing_that_takes_its_time_begins_while_draining)
{
    static const char *const methods[] = {"text.tokenize", "model.unload", "kv.export",
                                          "backend.use", "backend.selftest"};
    struct client *c = client_create(0);
    c->caller.admin = true;
    service_drain(service);
    for (uint32_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++) {
        struct ipc_buffer b;
        ipc_buffer_init(&b);
        ipc_pack_request(&b, i + 1, methods[i]);
        ipc_pack_map(&b, 0);
        hand_in(c, &b);
        const struct ipc_message *m = next(c);
        cr_assert_not_null(m, "%s is not answered", methods[i]);
        cr_assert_eq(error_code(m), PROTO_E_DRAINING, "%s", methods[i]);
    }
    client_destroy(c);
}

Test(handlers, what_the_drain_cuts_is_told_so)
{
    struct client *c = client_create(0);
    send_generate(c, 1, "fake", "abc", 3);
    service_drain(service);
    caller_cut(&c->caller);
    cr_assert_eq(fakes.n_cancelled, 1);
    fake_done(fakes.submitted[0], FINISH_CANCELLED);
    service_pump(service);
    cr_assert_eq(error_code(next(c)), PROTO_E_DRAINING);
    client_destroy(c);
}

/* What has not begun on the task pool is not waited for: also a message that nobody has read. */
Test(handlers, what_the_drain_cuts_before_its_turn_is_told_so_at_once)
{
    struct client *c = client_create(0), *d = client_create(0);
    send_dry(c);
    send_values(d, 7, SERVICE_INLINE_ELEMENTS);
    service_drain(service);
    caller_cut(&c->caller);
    caller_cut(&d->caller);
    cr_assert_eq(error_code(next(c)), PROTO_E_DRAINING);
    const struct ipc_message *m = next(d);
    cr_assert_eq(error_code(m), PROTO_E_DRAINING);
    cr_assert_eq(m->id, 7);
    cr_assert_not(d->caller.parsing);
    cr_assert_eq(d->n_resumed, 1);
    cr_assert(TAILQ_EMPTY(&fakes.tasks));
    cr_assert_eq(service_n_open(service), 0);
    cr_assert_null(quota_user(&fakes.quotas, 0));
    client_destroy(c);
    client_destroy(d);
}

Test(handlers, unloading_waits_for_the_last_request)
{
    struct client *c = client_create(0);
    struct ipc_buffer b;
    send_generate(c, 1, "fake", "abc", 3);
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 2, "model.unload");
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "fake");
    hand_in(c, &b);
    cr_assert_null(next(c));

    send_generate(c, 3, "fake", "abc", 3);
    cr_assert_eq(error_code(next(c)), PROTO_E_DRAINING);

    fake_done(fakes.submitted[0], FINISH_EOS);
    service_pump(service);
    cr_assert(finish_is(next(c), "eos"));
    fake_run_tasks();
    const struct ipc_message *m = next(c);
    cr_assert_not_null(m);
    cr_assert_eq(m->id, 2);
    cr_assert_null(m->error);
    client_destroy(c);
}

/* Once the engine has it the message is of no use; what is gone is not freed again. */
Test(handlers, a_long_message_is_freed_once_and_by_the_pool)
{
    static uint8_t padding[4u << 20];
    struct client *c = client_create(0);
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 1, "text.generate");
    ipc_pack_map(&b, 3);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "fake");
    ipc_pack_str(&b, "prompt");
    ipc_pack_str(&b, "abc");
    ipc_pack_str(&b, "padding");
    ipc_pack_bin(&b, padding, sizeof(padding));
    hand_in(c, &b);
    cr_assert_not_null(fakes.submitted[0]);
    cr_assert(!TAILQ_EMPTY(&fakes.tasks));
    fake_run_tasks();
    fake_done(fakes.submitted[0], FINISH_EOS);
    service_pump(service);
    cr_assert(finish_is(next(c), "eos"));
    cr_assert(TAILQ_EMPTY(&fakes.tasks), "there was nothing left to free");
    client_destroy(c);
}

Test(handlers, a_message_that_is_none_breaks_the_connection)
{
    struct client *c = client_create(0);
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_str(&b, "hello");
    hand_in(c, &b);
    cr_assert_eq(c->n_broken, 1);
    cr_assert_eq(next(c)->kind, IPC_NOTIFICATION);
    client_destroy(c);
}

Test(handlers, a_failed_reload_says_why)
{
    struct client *c = client_create(0);
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 1, "server.reload");
    ipc_pack_map(&b, 0);
    hand_in(c, &b);
    cr_assert_eq(error_code(next(c)), PROTO_E_INVALID_PARAMS);
    client_destroy(c);
}

static uid_t uid_of_task(void)
{
    struct task *t = TAILQ_FIRST(&fakes.tasks);
    cr_assert_not_null(t);
    uid_t uid = t->uid;
    fake_run_tasks();
    return uid;
}

/* What a quota counts is its user's to be freed; what none counts does not wait behind what that
 * user makes last, since it could pile up there. */
Test(handlers, memory_that_is_counted_is_freed_in_its_users_turn)
{
    enum { BYTES = 3 << 20, UID = 7 };
    const struct quota_amounts held = {.of = {[QUOTA_INPUT_BYTES] = BYTES}};

    struct ipc_error e;

    cr_assert_eq(quota_take(&fakes.quotas, UID, &held, &e), 0);
    service_free_message(service, UID, NULL, malloc(BYTES), BYTES, BYTES);
    cr_expect_eq(uid_of_task(), (uid_t)UID);
    service_free(service, malloc(BYTES), BYTES);
    cr_expect_eq(uid_of_task(), TASK_OF_DAEMON);
}
