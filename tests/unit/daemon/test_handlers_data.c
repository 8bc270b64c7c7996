/* Calls whose answers are numbers: embeddings, and tensors in the data area of rings. */
#include "tests/unit/daemon/handlers_client.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

TestSuite(handlers_data, .init = set_up, .fini = tear_down);

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

Test(handlers_data, embeddings_come_with_the_result)
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

Test(handlers_data, an_encoder_takes_a_text_in_one_step_and_generates_nothing)
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

Test(handlers_data, ranking_needs_a_classifier)
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
Test(handlers_data, many_texts_are_encoded_off_the_loop)
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

Test(handlers_data, rings_have_whole_pages_and_powers_of_two)
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

Test(handlers_data, rows_in_the_data_area_are_named_and_not_copied)
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

Test(handlers_data, rows_of_rings_that_were_closed_go_inside)
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
