/* A daemon that dies or talks nonsense, at every place where it can. */
#include "peer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Everything that a peer says after a generation was asked for: an event, then the end. The id of
 * the first call after hello is 2. */
static void pack_answer(struct ipc_buffer *b, uint32_t id)
{
    const int32_t token = 5;
    ipc_pack_event(b, id, 0);
    ipc_pack_map(b, 2);
    ipc_pack_str(b, "text");
    ipc_pack_str(b, "hi");
    ipc_pack_str(b, "tokens");
    ipc_pack_tokens(b, &token, 1);
    ipc_pack_response_ok(b, id);
    ipc_pack_map(b, 1);
    ipc_pack_str(b, "finish");
    ipc_pack_str(b, "stop");
}

static void dies_after(int fd, void *arg)
{
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "text.generate");
    ipc_buffer_init(&b);
    pack_answer(&b, id);
    peer_write(fd, b.data, *(size_t *)arg);
}

struct seen {
    int n_events, n_ends, status;
};

static void on_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    ((struct seen *)arg)->n_events++;
}

static void on_done(void *arg, uint32_t id, int status, const struct gqa_value *result,
                    const struct gqa_error *error)
{
    struct seen *s = arg;
    s->n_ends++;
    s->status = status;
}

static int run(struct gqa *g, struct seen *s)
{
    struct gqa_call_options o = {
        .struct_size = sizeof(o), .event = on_event, .done = on_done, .arg = s};
    cr_assert_eq(gqa_call_async(g, "text.generate", NULL, &o, NULL), 0);
    int r = 0;
    while (s->n_ends == 0 && r >= 0) {
        r = gqa_process(g);
        if (r == 0) {
            gqa_wait(g, UINT64_MAX);
        }
    }
    return r;
}

Test(death, at_every_byte_of_an_answer)
{
    struct ipc_buffer whole;
    ipc_buffer_init(&whole);
    pack_answer(&whole, 2);
    for (size_t bytes = 0; bytes <= whole.bytes; bytes++) {
        pid_t pid;
        struct seen s = {0};
        struct gqa *g = peer_connect(dies_after, &bytes, &pid);
        run(g, &s);
        cr_expect_eq(s.n_ends, 1);
        cr_expect_eq(s.status, bytes == whole.bytes ? 0 : -ECONNRESET, "cut at %zu", bytes);
        while (gqa_process(g) >= 0) {
            gqa_wait(g, UINT64_MAX);
        }
        cr_expect_eq(gqa_process(g), -ENOTCONN);
        cr_expect_eq(gqa_wait(g, 0), -ENOTCONN);
        cr_expect_eq(gqa_events(g), 0);
        cr_expect_eq(gqa_call_async(g, "gqa.ping", NULL, NULL, NULL), -ENOTCONN);
        gqa_close(g);
        cr_expect_eq(s.n_ends, 1, "ended once");
        cr_expect_eq(peer_finish(pid), 0);
    }
    ipc_buffer_finish(&whole);
}

static void dies_at_once(int fd, void *arg)
{
}

Test(death, while_idle_then_a_call)
{
    pid_t pid;
    struct gqa_error e;
    struct gqa *g = peer_connect(dies_at_once, NULL, &pid);
    cr_expect_eq(peer_finish(pid), 0); /* it is dead before the call is sent: EPIPE, no signal */
    int r = gqa_ping(g, &e);
    cr_expect_eq(r, -ECONNRESET);
    cr_expect_not_null(strstr(e.message, "gqa.ping"));
    cr_expect_eq(gqa_ping(g, &e), -ENOTCONN);
    gqa_close(g);
}

static void dies_unread(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "gqa.ping");
    peer_answer(fd, id);
}

/* The daemon answers the first call and dies with the second unread in its buffer: the answer that
 * it did give arrives all the same. */
Test(death, last_words_are_read)
{
    pid_t pid;
    struct seen a = {0}, b = {0};
    struct gqa_call_options o = {.struct_size = sizeof(o), .done = on_done};
    struct gqa *g = peer_connect(dies_unread, NULL, &pid);
    o.arg = &a;
    cr_assert_eq(gqa_call_async(g, "gqa.ping", NULL, &o, NULL), 0);
    o.arg = &b;
    cr_assert_eq(gqa_call_async(g, "gqa.ping", NULL, &o, NULL), 0);
    cr_expect_eq(peer_finish(pid), 0);
    while (gqa_process(g) >= 0) {
    }
    cr_expect(a.n_ends == 1 && a.status == 0);
    cr_expect(b.n_ends == 1 && b.status == -ECONNRESET);
    gqa_close(g);
}

struct nonsense {
    const char *bytes;
    size_t n_bytes;
};

static void talks_nonsense(int fd, void *arg)
{
    const struct nonsense *n = arg;
    peer_expect(fd, "text.generate");
    peer_write(fd, n->bytes, n->n_bytes);
    peer_expect(fd, "nothing more"); /* stays until the client goes */
}

#define NONSENSE(text)         \
    {                          \
        text, sizeof(text) - 1 \
    }

Test(death, nonsense_is_a_protocol_error)
{
    static struct nonsense cases[] = {
        NONSENSE("\xc1"),                                  /* no msgpack type */
        NONSENSE("\xdd\xff\xff\xff\xff"),                  /* an array of 4 G elements */
        NONSENSE("\x05"),                                  /* a number */
        NONSENSE("\x93\x01\x02\xc0"),                      /* three elements of a response */
        NONSENSE("\x94\x07\x02\xc0\x80"),                  /* kind 7 */
        NONSENSE("\x94\x01\x02\xa3"                        /* an error that is a string */
                 "bad\xc0"),                               /* */
        NONSENSE("\x94\x01\x02\x81\xa4"                    /* an error without name and message */
                 "code\x03\xc0"),                          /* */
        NONSENSE("\x94\x00\x01\xa8gqa.ping\x80"),          /* a request to the client */
        NONSENSE("\x93\x02\xa9gqa.event\x91\x02"),         /* an event of one element */
        NONSENSE("\x93\x02\xa9gqa.event\x93\x02\x00\x07"), /* an event that is no map */
        NONSENSE("\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91\x91"), /* depth 12 */
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        pid_t pid;
        struct seen s = {0};
        struct gqa *g = peer_connect(talks_nonsense, &cases[i], &pid);
        int r = run(g, &s);
        cr_expect_eq(r, -EPROTO, "case %zu: %d", i, r);
        cr_expect_eq(s.status, -EPROTO, "case %zu", i);
        cr_expect_eq(s.n_ends, 1);
        gqa_close(g);
        peer_finish(pid);
    }
}
