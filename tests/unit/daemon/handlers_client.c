#include "tests/unit/daemon/handlers_client.h"
#include "tests/unit/must.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

const struct service_limits limits = {.allow_autoload = true, .calls_per_connection = 4};

struct service *service;

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

struct client *client_create(uid_t uid)
{
    struct client *c = calloc(1, sizeof(*c));
    ipc_buffer_init(&c->out);
    caller_init(&c->caller, service, &sink, &c->out, uid, uid == 0);
    return c;
}

void client_destroy(struct client *c)
{
    caller_finish(&c->caller);
    ipc_message_finish(&c->message);
    ipc_buffer_finish(&c->out);
    free(c);
}

const struct ipc_message *next(struct client *c)
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

uint64_t error_code(const struct ipc_message *m)
{
    uint64_t code = 0;
    cr_assert_not_null(m);
    cr_assert_eq(m->kind, IPC_RESPONSE);
    ipc_value_u64(ipc_value_get(m->error, "code"), &code);
    return code;
}

bool finish_is(const struct ipc_message *m, const char *finish)
{
    struct proto_string s;
    return m && m->kind == IPC_RESPONSE && m->result &&
           ipc_value_bytes(ipc_value_get(m->result, "finish"), &s) == 0 &&
           s.bytes == strlen(finish) && memcmp(s.data, finish, s.bytes) == 0;
}

void hand_in(struct client *c, struct ipc_buffer *b)
{
    cr_assert_eq(b->error, 0);
    uint8_t *frame = malloc(b->bytes);
    memcpy(frame, b->data, b->bytes);
    struct ipc_scanner s;
    size_t used;
    ipc_scanner_init(&s, PROTO_FRAME_BYTES_MAX);
    ipc_scanner_feed(&s, frame, b->bytes, &used); /* what is no message is handed in as well */
    caller_message(&c->caller, frame, b->bytes, s.message_elements, c->held_bytes);
    c->held_bytes = 0;
    ipc_buffer_finish(b);
}

void send_generate(struct client *c, uint32_t id, const char *model, const char *prompt,
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

void send_load(struct client *c, uint32_t id, const char *model)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, "model.load");
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, model);
    hand_in(c, &b);
}

void send_cancel(struct client *c, uint32_t id)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_notification(&b, "$cancel");
    ipc_pack_array(&b, 1);
    ipc_pack_u64(&b, id);
    hand_in(c, &b);
}

void set_up(void)
{
    service = fake_service(&limits);
}

void tear_down(void)
{
    must(service_n_open(service) == 0);
    must(fakes.model_refs == 0);
    service_destroy(service);
}
