/* Calls from message to answer, with an engine that does what the test says, when it says. */
#include "tests/unit/daemon/fakes.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct service_limits limits = {.allow_autoload = true, .calls_per_connection = 4};

static struct service *service;

struct client {
    struct caller caller;
    struct ipc_buffer out;
    size_t seen; /* bytes of out that next() has read */
    unsigned n_resumed, n_broken;
    struct ring_sizes opened;
    struct ipc_message message;
};

static void written(struct caller *c)
{
}

static void resumed(struct caller *c)
{
    ((struct client *)c)->n_resumed++;
}

static void broken(struct caller *c)
{
    ((struct client *)c)->n_broken++;
}

static int open_ring(struct caller *c, const struct ring_sizes *sizes, struct ipc_error *e)
{
    ((struct client *)c)->opened = *sizes;
    return 0;
}

static int close_ring(struct caller *c, struct ipc_error *e)
{
    ipc_error_set(e, PROTO_E_NOT_FOUND, "the connection has no rings");
    return -ENOENT;
}

static const struct caller_sink sink = {written, resumed, broken, open_ring, close_ring};

static struct client *client_create(uid_t uid)
{
    struct client *c = calloc(1, sizeof(*c));
    ipc_buffer_init(&c->out);
    caller_init(&c->caller, service, &sink, &c->out, uid, uid == 0);
    return c;
}

static void client_destroy(struct client *c)
{
    caller_finish(&c->caller);
    ipc_message_finish(&c->message);
    ipc_buffer_finish(&c->out);
    free(c);
}

/* The next message that the client would have received; NULL when there is none. */
static const struct ipc_message *next(struct client *c)
{
    struct ipc_scanner scanner;
    size_t used = 0;
    uint32_t id;
    ipc_message_finish(&c->message);
    c->message = (struct ipc_message){0};
    if (c->seen == c->out.bytes) {
        return NULL;
    }
    ipc_scanner_init(&scanner, PROTO_FRAME_BYTES_MAX);
    cr_assert_eq(ipc_scanner_feed(&scanner, c->out.data + c->seen, c->out.bytes - c->seen, &used),
                 1);
    cr_assert_eq(ipc_message_parse(c->out.data + c->seen, used, &c->message, &id), 0);
    c->seen += used;
    return &c->message;
}

static uint64_t error_code(const struct ipc_message *m)
{
    uint64_t code = 0;
    cr_assert_not_null(m);
    cr_assert_eq(m->kind, IPC_RESPONSE);
    ipc_value_u64(ipc_value_get(m->error, "code"), &code);
    return code;
}

static bool finish_is(const struct ipc_message *m, const char *finish)
{
    struct proto_string s;
    return m && m->kind == IPC_RESPONSE && m->result &&
           ipc_value_bytes(ipc_value_get(m->result, "finish"), &s) == 0 &&
           s.bytes == strlen(finish) && memcmp(s.data, finish, s.bytes) == 0;
}

static void hand_in(struct client *c, struct ipc_buffer *b)
{
    cr_assert_eq(b->error, 0);
    uint8_t *frame = malloc(b->bytes);
    memcpy(frame, b->data, b->bytes);
    caller_message(&c->caller, frame, b->bytes);
    ipc_buffer_finish(b);
}

static void send_generate(struct client *c, uint32_t id, const char *model, const char *prompt,
                          size_t prompt_bytes)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, "text.generate");
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, model);
    ipc_pack_str(&b, "prompt");
    ipc_pack_text(&b, prompt, prompt_bytes);
    hand_in(c, &b);
}

static void send_cancel(struct client *c, uint32_t id)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_notification(&b, "$cancel");
    ipc_pack_array(&b, 1);
    ipc_pack_u64(&b, id);
    hand_in(c, &b);
}

static void set_up(void)
{
    service = fake_service(&limits);
}

static void tear_down(void)
{
    cr_assert_eq(service_n_open(service), 0);
    cr_assert_eq(fakes.model_refs, 0, "%u references to the model are left", fakes.model_refs);
    service_destroy(service);
}

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
    cr_assert_not_null(fakes.tasks);
    client_destroy(c);
    cr_assert_eq(service_n_open(service), 1);
    fake_run_tasks();
    cr_assert_eq(fakes.n_submitted, 0);
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
    cr_assert_not_null(fakes.tasks);
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
    send_cancel(c, 1);
    cr_assert_null(next(c));
    fake_run_tasks();
    cr_assert(finish_is(next(c), "cancelled"));
    send_dry(c);
    client_destroy(c);
    fake_run_tasks();
    cr_assert_eq(fakes.n_submitted, 0);
}

Test(handlers, a_long_message_is_parsed_elsewhere_and_holds_the_next)
{
    static char text[SERVICE_INLINE_FRAME_BYTES];
    struct client *c = client_create(0);
    memset(text, 'a', sizeof(text));
    send_generate(c, 1, "fake", text, sizeof(text));
    cr_assert(c->caller.parsing);
    fake_run_tasks();
    cr_assert_not(c->caller.parsing);
    cr_assert_eq(c->n_resumed, 1);
    cr_assert_eq(error_code(next(c)), PROTO_E_CONTEXT_EXCEEDED);
    client_destroy(c);
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

/* ---- embeddings -------------------------------------------------------------------------- */

/* text.embed of n texts of so many bytes, with a pooling where one is given. */
static void send_embed(struct client *c, uint32_t id, size_t n, size_t bytes, const char *pooling)
{
    static char text[SERVICE_INLINE_TEXT_BYTES];
    struct ipc_buffer b;
    cr_assert_leq(bytes, sizeof(text));
    memset(text, 'a', bytes);
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, "text.embed");
    ipc_pack_map(&b, pooling ? 3 : 2);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "fake");
    ipc_pack_str(&b, "inputs");
    ipc_pack_array(&b, n);
    for (size_t i = 0; i < n; i++) {
        ipc_pack_text(&b, text, bytes);
    }
    if (pooling) {
        ipc_pack_str(&b, "pooling");
        ipc_pack_str(&b, pooling);
    }
    hand_in(c, &b);
}

static bool message_has(const struct ipc_message *m, const char *words)
{
    struct proto_string s;
    char text[512];
    cr_assert_eq(ipc_value_bytes(ipc_value_get(m->error, "message"), &s), 0);
    snprintf(text, sizeof(text), "%.*s", (int)s.bytes, s.data);
    return strstr(text, words) != NULL;
}

Test(handlers, embeddings_come_with_the_result)
{
    struct client *c = client_create(0);
    send_embed(c, 1, 2, 5, "mean");
    cr_assert_eq(fakes.n_submitted, 1);
    struct request *r = fakes.submitted[0];
    cr_assert_eq(r->kind, REQUEST_EMBED);
    cr_assert_eq(r->embed.n_inputs, 2);
    cr_assert_eq(r->embed.inputs[1].n_tokens, 5);
    cr_assert_eq(r->embed.norm, 2);
    cr_assert_eq(r->embed.width, FAKE_N_EMBD);
    for (int i = 0; i < 2 * FAKE_N_EMBD; i++) {
        r->embed.vectors[i] = (float)i;
    }
    fake_done(r, FINISH_LENGTH);
    service_pump(service);
    const struct ipc_message *m = next(c);
    cr_assert(m && m->result);
    const struct ipc_value *tensor = ipc_value_get(m->result, "embeddings");
    uint64_t n = 0;
    struct proto_string data;
    cr_assert_eq(ipc_value_u64(ipc_value_at(ipc_value_get(tensor, "shape"), 0), &n), 0);
    cr_assert_eq(n, 2);
    cr_assert_eq(ipc_value_bytes(ipc_value_get(tensor, "data"), &data), 0);
    cr_assert_eq(data.bytes, 2 * FAKE_N_EMBD * sizeof(float));
    client_destroy(c);
}

Test(handlers, an_encoder_takes_a_text_in_one_step_and_generates_nothing)
{
    fakes.model_is_encoder = true;
    struct client *c = client_create(0);
    send_embed(c, 1, 3, FAKE_N_BATCH + 1, "mean");
    const struct ipc_message *m = next(c);
    cr_assert_eq(error_code(m), PROTO_E_CONTEXT_EXCEEDED);
    cr_assert(message_has(m, "'inputs', item 0 has 33 tokens"));
    cr_assert(message_has(m, "32 (batch_size)"));
    send_embed(c, 2, 1, FAKE_N_CTX + 1, "mean");
    m = next(c);
    cr_assert(message_has(m, "65 tokens") && message_has(m, "64"));
    send_generate(c, 3, "fake", "abc", 3);
    m = next(c);
    cr_assert_eq(error_code(m), PROTO_E_INVALID_PARAMS);
    cr_assert(message_has(m, "text.embed"));
    cr_assert_eq(fakes.n_submitted, 0);
    client_destroy(c);
}

Test(handlers, ranking_needs_a_classifier)
{
    struct client *c = client_create(0);
    send_embed(c, 1, 1, 4, "rank");
    const struct ipc_message *m = next(c);
    cr_assert_eq(error_code(m), PROTO_E_INVALID_PARAMS);
    cr_assert(message_has(m, "cls.weight"));
    fakes.n_scores = 1;
    send_embed(c, 2, 1, 4, "rank");
    cr_assert_eq(fakes.submitted[0]->embed.width, 1);
    send_embed(c, 3, 1, 4, "best");
    cr_assert(message_has(next(c), "none, mean, cls, last or rank"));
    fake_done(fakes.submitted[0], FINISH_LENGTH);
    service_pump(service);
    client_destroy(c);
}

/* Texts that are long together are encoded on the task pool, and the wait can be cancelled. */
Test(handlers, many_texts_are_encoded_off_the_loop)
{
    struct client *c = client_create(0);
    send_embed(c, 1, 100, 60, "mean");
    cr_assert_eq(fakes.n_submitted, 0);
    fake_run_tasks();
    cr_assert_eq(fakes.n_submitted, 1);
    fake_done(fakes.submitted[0], FINISH_LENGTH);
    service_pump(service);
    cr_assert(next(c)->result != NULL);
    send_embed(c, 2, 100, 60, "mean");
    send_cancel(c, 2);
    fake_run_tasks();
    cr_assert_eq(error_code(next(c)), PROTO_E_CANCELLED);
    cr_assert_eq(fakes.n_submitted, 0);
    client_destroy(c);
}

static void send_ring_open(struct client *c, uint32_t id, uint64_t ring_bytes, uint64_t in_bytes)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, "ring.open");
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "ring_bytes");
    ipc_pack_u64(&b, ring_bytes);
    ipc_pack_str(&b, "in_bytes");
    ipc_pack_u64(&b, in_bytes);
    hand_in(c, &b);
}

Test(handlers, rings_have_whole_pages_and_powers_of_two)
{
    struct client *c = client_create(0);
    uint64_t told = 0;
    send_ring_open(c, 1, 8192, 4097);
    cr_assert_eq(c->opened.ring_bytes, 8192);
    cr_assert_eq(c->opened.in_bytes, 8192);
    const struct ipc_message *m = next(c);
    cr_assert_not_null(m->result);
    ipc_value_u64(ipc_value_get(m->result, "in_bytes"), &told);
    cr_assert_eq(told, 8192);

    c->opened = (struct ring_sizes){0};
    send_ring_open(c, 2, 8191, 4096);
    cr_assert_eq(error_code(next(c)), PROTO_E_INVALID_PARAMS);
    cr_assert_eq(c->opened.ring_bytes, 0);
    client_destroy(c);
}

/* ---- the data area ----------------------------------------------------------------------- */

#define AREA_IN_BYTES  4096u
#define AREA_OUT_BYTES 16384u /* rows for 40 tokens, but not twice */

static uint8_t area_bytes[AREA_IN_BYTES + AREA_OUT_BYTES];
static unsigned n_unused;

static void area_is_unused(struct area *a)
{
    n_unused++;
}

static struct request *send_logits(struct client *c, uint32_t id)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, "text.logits");
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "fake");
    ipc_pack_str(&b, "prompt");
    ipc_pack_str(&b, "abc");
    hand_in(c, &b);
    cr_assert_eq(fakes.n_submitted, 1);
    return fakes.submitted[0];
}

/* The data of the next message's tensor: a handle, or all of it inside. */
static const struct ipc_value *next_data(struct client *c)
{
    const struct ipc_message *m = next(c);
    cr_assert(m && m->kind == IPC_NOTIFICATION);
    const struct ipc_value *tensor = ipc_value_get(ipc_value_at(m->params, 2), "logits");
    return ipc_value_get(tensor, "data");
}

static void give(struct client *c, uint64_t offset)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_notification(&b, "$give");
    ipc_pack_array(&b, 1);
    ipc_pack_u64(&b, offset);
    hand_in(c, &b);
}

Test(handlers, rows_in_the_data_area_are_named_and_not_copied)
{
    struct client *c = client_create(0);
    struct area area;
    struct ipc_handle first, second;
    area_init(&area, area_bytes, AREA_IN_BYTES, AREA_OUT_BYTES, area_is_unused);
    c->caller.area = &area;
    struct request *r = send_logits(c, 1);
    cr_assert_eq(r->area, &area);

    fake_rows(r, 40, 1.5f);
    service_pump(service);
    cr_assert_eq(ipc_value_handle(next_data(c), &first), 0);
    cr_assert_geq(first.offset, AREA_IN_BYTES);
    cr_assert_eq(first.bytes, 40 * FAKE_N_VOCAB * sizeof(float));
    cr_assert_eq(((float *)(area_bytes + first.offset))[39 * FAKE_N_VOCAB], 1.5f);

    /* No room: inside. Room again: the same place. Too few to be worth it: inside. */
    fake_rows(r, 40, 2.5f);
    service_pump(service);
    cr_assert_eq(ipc_value_type(next_data(c)), IPC_BIN);
    give(c, first.offset);
    fake_rows(r, 40, 3.5f);
    fake_rows(r, 1, 4.5f);
    service_pump(service);
    cr_assert_eq(ipc_value_handle(next_data(c), &second), 0);
    cr_assert_eq(second.offset, first.offset);
    cr_assert_eq(ipc_value_type(next_data(c)), IPC_BIN);

    fake_done(r, FINISH_LENGTH);
    service_pump(service);
    cr_assert_eq(area.n_refs, 1);
    client_destroy(c);
    area_unref(&area);
    cr_assert_eq(n_unused, 1);
    area_finish(&area);
}

Test(handlers, rows_of_rings_that_were_closed_go_inside)
{
    struct client *c = client_create(0);
    struct area area;
    struct proto_string data;
    float value;
    area_init(&area, area_bytes, AREA_IN_BYTES, AREA_OUT_BYTES, area_is_unused);
    c->caller.area = &area;
    struct request *r = send_logits(c, 1);
    fake_rows(r, 40, 1.5f); /* the engine was quicker than ring.close */
    area_retire(&area);
    service_pump(service);
    cr_assert_eq(ipc_value_bytes(next_data(c), &data), 0);
    cr_assert_eq(data.bytes, 40 * FAKE_N_VOCAB * sizeof(float));
    memcpy(&value, data.data + data.bytes - sizeof(value), sizeof(value));
    cr_assert_eq(value, 1.5f);

    /* The rings are gone, and the request still has their memory. */
    c->caller.area = NULL;
    area_unref(&area);
    cr_assert_eq(n_unused, 0);
    fake_rows(r, 40, 2.5f);
    service_pump(service);
    cr_assert_eq(ipc_value_bytes(next_data(c), &data), 0);
    fake_done(r, FINISH_LENGTH);
    service_pump(service);
    cr_assert_eq(n_unused, 1);
    client_destroy(c);
    area_finish(&area);
}
