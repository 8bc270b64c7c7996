/* Calls: events in order, one end each, cancel, deadlines, answers in any order. */
#include "peer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* What a call's callbacks saw. */
struct seen {
    struct gqa *g;
    char text[256];
    int n_events, n_ends, status;
    struct gqa_error error;
    int cancel_at, close_at; /* event count; 0: never */
};

static void on_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct seen *s = arg;
    const char *text = "";
    size_t bytes = 0;
    cr_expect_eq(s->n_ends, 0, "an event after the end");
    gqa_value_bytes(gqa_value_get(event, "text"), &text, &bytes);
    strncat(s->text, text, bytes);
    s->n_events++;
    if (s->n_events == s->cancel_at) {
        cr_expect_eq(gqa_cancel(s->g, id), 0);
        cr_expect_eq(gqa_cancel(s->g, id), 0, "twice is once");
    }
    if (s->n_events == s->close_at) {
        cr_expect_eq(gqa_process(s->g), -EDEADLK);
        cr_expect_eq(gqa_ping(s->g, NULL), -EDEADLK);
        gqa_close(s->g);
    }
}

static void on_done(void *arg, uint32_t id, int status, const struct gqa_value *result,
                    const struct gqa_error *error)
{
    struct seen *s = arg;
    s->n_ends++;
    s->status = status;
    cr_expect((status == 0) == (error == NULL));
    if (error != NULL) {
        s->error = *error;
    }
}

static uint32_t start(struct gqa *g, struct seen *s, uint32_t timeout_ms)
{
    uint32_t id = 0;
    struct gqa_call_options o = {.struct_size = sizeof(o),
                                 .timeout_ms = timeout_ms,
                                 .event = on_event,
                                 .done = on_done,
                                 .arg = s};
    s->g = g;
    cr_assert_eq(gqa_call_async(g, "text.generate", NULL, &o, &id), 0);
    return id;
}

static void run_until_end(struct gqa *g, const struct seen *s)
{
    while (s->n_ends == 0) {
        int r = gqa_process(g);
        if (r == 0) {
            cr_assert_geq(gqa_wait(g, UINT64_MAX), 0);
        }
        cr_assert(r >= 0 || s->n_ends > 0, "process said %d", r);
    }
}

static void three_steps(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "a", 1);
    peer_step(fd, id, 1, "b", 2);
    peer_step(fd, id, 2, "c", 3);
    peer_end(fd, id, "length");
}

Test(calls, events_come_in_order_and_one_end)
{
    pid_t pid;
    struct seen s = {0};
    struct gqa *g = peer_connect(three_steps, NULL, &pid);
    start(g, &s, 0);
    run_until_end(g, &s);
    cr_expect_str_eq(s.text, "abc");
    cr_expect_eq(s.status, 0);
    gqa_close(g);
    cr_expect_eq(s.n_ends, 1);
    cr_expect_eq(peer_finish(pid), 0);
}

static void skips_a_step(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "a", 1);
    peer_step(fd, id, 2, "c", 3);
    peer_end(fd, id, "length");
}

Test(calls, a_missing_step_is_not_passed_over)
{
    pid_t pid;
    struct seen s = {0};
    struct gqa *g = peer_connect(skips_a_step, NULL, &pid);
    start(g, &s, 0);
    run_until_end(g, &s);
    cr_expect_eq(s.status, -EPROTO);
    cr_expect_eq(gqa_process(g), -ENOTCONN);
    gqa_close(g);
    peer_finish(pid);
}

static void until_cancelled(int fd, void *arg)
{
    struct peer_request r;
    uint32_t id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "a", 1);
    peer_step(fd, id, 1, "b", 2);
    peer_read(fd, &r);
    if (!r.is_cancel || r.id != id) {
        _exit(2);
    }
    peer_request_finish(&r);
    peer_end(fd, id, "cancelled");
    peer_answer(fd, peer_expect(fd, "gqa.ping")); /* nothing came between: cancelled once */
}

Test(calls, cancel_is_sent_once_and_waits_for_the_end)
{
    pid_t pid;
    struct seen s = {.cancel_at = 1};
    struct gqa *g = peer_connect(until_cancelled, NULL, &pid);
    uint32_t id = start(g, &s, 0);
    run_until_end(g, &s);
    cr_expect_eq(s.status, 0);
    cr_expect_eq(gqa_cancel(g, id), -ENOENT);
    cr_expect_eq(gqa_ping(g, NULL), 0);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

static void late_answer(int fd, void *arg)
{
    struct peer_request r;
    uint32_t id = peer_expect(fd, "text.generate");
    peer_read(fd, &r); /* the deadline cancels */
    if (!r.is_cancel || r.id != id) {
        _exit(2);
    }
    peer_request_finish(&r);
    peer_step(fd, id, 0, "late", 1);
    peer_end(fd, id, "length");
    peer_answer(fd, peer_expect(fd, "gqa.ping"));
}

Test(calls, deadline_ends_a_call_and_late_answers_are_dropped)
{
    pid_t pid;
    struct seen s = {0};
    struct gqa *g = peer_connect(late_answer, NULL, &pid);
    start(g, &s, 30);
    cr_expect_neq(gqa_timeout_usec(g), UINT64_MAX);
    run_until_end(g, &s);
    cr_expect_eq(s.status, -ETIMEDOUT);
    cr_expect_eq(gqa_ping(g, NULL), 0, "the connection lives on");
    cr_expect_eq(s.n_ends, 1);
    cr_expect_str_eq(s.text, "");
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

static void two_backwards(int fd, void *arg)
{
    uint32_t a = peer_expect(fd, "text.generate"), b = peer_expect(fd, "text.generate");
    peer_step(fd, b, 0, "second", 1);
    peer_step(fd, a, 0, "first", 1);
    peer_end(fd, b, "length");
    peer_end(fd, a, "length");
}

Test(calls, answers_come_in_any_order)
{
    pid_t pid;
    struct seen a = {0}, b = {0};
    struct gqa *g = peer_connect(two_backwards, NULL, &pid);
    cr_expect_neq(start(g, &a, 0), start(g, &b, 0));
    run_until_end(g, &a);
    cr_expect_eq(b.n_ends, 1);
    cr_expect_str_eq(a.text, "first");
    cr_expect_str_eq(b.text, "second");
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

Test(calls, close_inside_a_callback)
{
    pid_t pid;
    struct seen s = {.close_at = 2};
    struct gqa *g = peer_connect(three_steps, NULL, &pid);
    start(g, &s, 0);
    int r;
    do {
        r = gqa_process(g); /* after -ENOTCONN g is gone */
        if (r == 0) {
            gqa_wait(g, UINT64_MAX);
        }
    } while (r >= 0);
    cr_expect_eq(r, -ENOTCONN);
    cr_expect_eq(s.n_ends, 1);
    cr_expect_eq(s.status, -ECANCELED);
    cr_expect_eq(s.n_events, 2);
    cr_expect_eq(peer_finish(pid), 0);
}

static void refuses(int fd, void *arg)
{
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "text.generate");
    ipc_buffer_init(&b);
    ipc_pack_array(&b, 4);
    ipc_pack_u64(&b, IPC_RESPONSE);
    ipc_pack_u64(&b, id);
    ipc_pack_map(&b, 4);
    ipc_pack_str(&b, "code");
    ipc_pack_u64(&b, PROTO_E_BUSY);
    ipc_pack_str(&b, "name");
    ipc_pack_str(&b, "BUSY");
    ipc_pack_str(&b, "message");
    ipc_pack_str(&b, "8 requests wait,\nwhich is the limit");
    ipc_pack_str(&b, "retry_after_ms");
    ipc_pack_u64(&b, 250);
    ipc_pack_nil(&b);
    peer_send(fd, &b);
}

Test(calls, a_refusal_is_told_on_one_line)
{
    pid_t pid;
    struct seen s = {0};
    struct gqa *g = peer_connect(refuses, NULL, &pid);
    start(g, &s, 0);
    run_until_end(g, &s);
    cr_expect_eq(s.status, -EBUSY);
    cr_expect_eq(s.error.code, GQA_E_BUSY);
    cr_expect_eq(s.error.retry_after_ms, 250);
    cr_expect_str_eq(s.error.name, "BUSY");
    cr_expect_str_eq(s.error.message, "8 requests wait, which is the limit");
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

static void drains(int fd, void *arg)
{
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "gqa.ping");
    ipc_buffer_init(&b);
    ipc_pack_notification(&b, "gqa.draining");
    ipc_pack_map(&b, 0);
    peer_send(fd, &b);
    peer_answer(fd, id);
}

static void on_notify(void *arg, const char *method, const struct gqa_value *params)
{
    *(bool *)arg = strcmp(method, "gqa.draining") == 0;
}

Test(calls, notifications_reach_their_callback)
{
    pid_t pid;
    bool draining = false;
    struct gqa *g = peer_connect(drains, NULL, &pid);
    gqa_set_notify(g, on_notify, &draining);
    cr_expect_eq(gqa_ping(g, NULL), 0);
    cr_expect(draining);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

/* A request much larger than the socket's buffer goes out in pieces, and a slow answer comes in
 * pieces. */
static void measures_prompt(int fd, void *arg)
{
    struct peer_request r;
    struct proto_string prompt = {0};
    struct ipc_buffer b;
    peer_read(fd, &r);
    ipc_value_bytes(ipc_value_get(r.message.params, "prompt"), &prompt);
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, r.id);
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "bytes");
    ipc_pack_u64(&b, prompt.bytes);
    for (size_t i = 0; i < b.bytes; i++) {
        peer_write(fd, b.data + i, 1);
    }
    ipc_buffer_finish(&b);
    peer_request_finish(&r);
}

Test(calls, partial_writes_and_reads)
{
    const size_t bytes = 1u << 18;
    pid_t pid;
    struct gqa_params *p;
    struct gqa_reply *reply;
    struct gqa *g = peer_connect(measures_prompt, NULL, &pid);
    int tiny = 1;
    cr_assert_eq(setsockopt(gqa_fd(g), SOL_SOCKET, SO_SNDBUF, &tiny, sizeof(tiny)), 0);
    char *prompt = malloc(bytes);
    memset(prompt, 'p', bytes);
    gqa_params_create(&p);
    cr_expect_eq(gqa_params_text(p, "prompt", prompt, bytes), 0);
    cr_assert_eq(gqa_call(g, "text.generate", p, NULL, &reply, NULL), 0);
    uint64_t n = 0;
    cr_expect_eq(gqa_value_u64(gqa_value_get(gqa_reply_value(reply), "bytes"), &n), 0);
    cr_expect_eq(n, bytes);
    gqa_params_destroy(p);
    free(prompt);
    gqa_close(g);
    cr_expect_eq(gqa_value_u64(gqa_value_get(gqa_reply_value(reply), "bytes"), &n), 0,
                 "a reply outlives the connection");
    gqa_reply_destroy(reply);
    cr_expect_eq(peer_finish(pid), 0);
}

static void silent(int fd, void *arg)
{
    char byte;
    while (read(fd, &byte, 1) > 0) {
    }
}

Test(calls, limits_are_errors_and_send_nothing)
{
    const size_t bytes = (16u << 20) + 1;
    pid_t pid;
    struct gqa_params *p;
    struct gqa *g = peer_connect(silent, NULL, &pid);
    char *prompt = calloc(1, bytes);
    gqa_params_create(&p);
    cr_expect_eq(gqa_params_text(p, "prompt", prompt, bytes), -EMSGSIZE);
    cr_expect_eq(gqa_params_bool(p, "stream", true), -EMSGSIZE, "the first error sticks");
    cr_expect_eq(gqa_call_async(g, "text.generate", p, NULL, NULL), -EMSGSIZE);
    cr_expect_eq(gqa_call_async(g, "", NULL, NULL, NULL), -EINVAL);
    int r = 0;
    for (int i = 0; i < 2000 && r == 0; i++) {
        r = gqa_call_async(g, "gqa.ping", NULL, NULL, NULL);
    }
    cr_expect_eq(r, -ENOBUFS);
    gqa_params_destroy(p);
    free(prompt);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}
