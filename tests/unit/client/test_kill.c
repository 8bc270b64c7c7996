/* A daemon that is killed (SIGKILL) or stopped (SIGSTOP), in each state that a client can see it
 * in; and deadlines that hold against a daemon that says much but never the end. */
#include "peer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define KILLED (128 + SIGKILL)

struct seen {
    struct gqa *g;
    int n_events, n_ends, status;
    struct gqa_error error;
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
    if (error != NULL) {
        s->error = *error;
    }
}

static int start(struct gqa *g, const char *method, uint32_t timeout_ms, uint32_t total_ms,
                 struct seen *s, uint32_t *ret_id)
{
    struct gqa_call_options o = {.struct_size = sizeof(o),
                                 .timeout_ms = timeout_ms,
                                 .event = on_event,
                                 .done = on_done,
                                 .arg = s,
                                 .total_ms = total_ms};
    s->g = g;
    return gqa_call_async(g, method, NULL, &o, ret_id);
}

/* Until the call has ended or the connection is lost; the last result of gqa_process(). */
static int run(struct gqa *g, const struct seen *s)
{
    int r = 0;
    while (r >= 0 && (s == NULL || s->n_ends == 0)) {
        r = gqa_process(g);
        if (r == 0) {
            cr_assert_geq(gqa_wait(g, UINT64_MAX), 0);
        }
    }
    return r;
}

/* Lost in the one way: told once, then always the same, with nothing left to wait for. */
static void expect_lost(struct gqa *g)
{
    cr_expect_not(gqa_is_connected(g));
    cr_expect_eq(gqa_process(g), -ENOTCONN);
    cr_expect_eq(gqa_wait(g, UINT64_MAX), -ENOTCONN);
    cr_expect_eq(gqa_events(g), 0);
    cr_expect_eq(gqa_timeout_usec(g), UINT64_MAX);
    cr_expect_eq(gqa_call_async(g, "gqa.ping", NULL, NULL, NULL), -ENOTCONN);
}

static void die(void)
{
    kill(getpid(), SIGKILL);
}

/* ---- hello ------------------------------------------------------------------------------- */

static void dies_before_hello(int fd, void *arg)
{
    die();
}

static void dies_unanswered(int fd, void *arg)
{
    peer_expect(fd, "gqa.hello");
    die();
}

static void dies_half_answered(int fd, void *arg)
{
    peer_expect(fd, "gqa.hello");
    peer_write(fd, "\x94\x01\x01\xc0\x82", 5); /* a response's head, and a map without its pairs */
    die();
}

Test(kill, before_and_during_hello)
{
    peer_script scripts[] = {dies_before_hello, dies_unanswered, dies_half_answered};
    for (size_t i = 0; i < sizeof(scripts) / sizeof(scripts[0]); i++) {
        struct gqa *g = NULL;
        struct gqa_error e;
        int fd;
        pid_t pid = peer_start(scripts[i], NULL, &fd);
        struct gqa_connect_options o = {
            .struct_size = sizeof(o), .flags = GQA_CONNECT_FD, .fd = fd, .timeout_ms = 20000};
        cr_expect_eq(gqa_connect(&o, &g, &e), -ECONNRESET, "script %zu", i);
        cr_expect_null(g);
        cr_expect_str_eq(e.name, "ECONNRESET");
        cr_expect_not_null(strstr(e.message, "connection lost"), "%s", e.message);
        cr_expect_eq(close(fd), 0);
        cr_expect_eq(peer_finish(pid), KILLED);
    }
}

/* ---- after it ---------------------------------------------------------------------------- */

static void dies_idle(int fd, void *arg)
{
    die();
}

/* Nothing is pending, so gqa_wait() would wait for ever; the death wakes it. */
Test(kill, while_idle_in_wait)
{
    pid_t pid;
    struct gqa *g = peer_connect(dies_idle, NULL, &pid);
    cr_expect_eq(gqa_timeout_usec(g), UINT64_MAX);
    cr_expect_eq(run(g, NULL), -ECONNRESET);
    expect_lost(g);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), KILLED);
}

static void dies_with_the_call(int fd, void *arg)
{
    peer_expect(fd, "text.generate");
    die();
}

static void dies_streaming(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "a", 1);
    peer_step(fd, id, 1, "b", 2);
    die();
}

static void dies_in_a_step(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "a", 1);
    peer_write(fd, "\x93\x02\xa9gqa.ev", 9);
    die();
}

static void dies_after_cancel(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "a", 1);
    peer_expect(fd, "$cancel");
    die();
}

Test(kill, with_a_call_under_way)
{
    static const struct {
        peer_script script;
        int n_events;
        bool cancels;
        const char *words;
    } states[] = {
        {dies_with_the_call, 0, false, "the daemon went away"},
        {dies_streaming, 2, false, "the daemon went away"},
        {dies_in_a_step, 1, false, "in the middle of a message"},
        {dies_after_cancel, 1, true, "the daemon went away"},
    };
    for (size_t i = 0; i < sizeof(states) / sizeof(states[0]); i++) {
        pid_t pid;
        uint32_t id;
        struct seen s = {0};
        struct gqa *g = peer_connect(states[i].script, NULL, &pid);
        cr_assert_eq(start(g, "text.generate", 20000, 0, &s, &id), 0);
        if (states[i].cancels) {
            cr_expect_eq(gqa_cancel(g, id), 0);
        }
        cr_expect_eq(run(g, &s), -ECONNRESET, "state %zu", i);
        cr_expect_eq(s.n_ends, 1);
        cr_expect_eq(s.n_events, states[i].n_events, "state %zu: %d", i, s.n_events);
        cr_expect_eq(s.status, -ECONNRESET);
        cr_expect_eq(s.error.code, 0);
        cr_expect_str_eq(s.error.name, "ECONNRESET");
        cr_expect_not_null(strstr(s.error.message, "text.generate: connection lost: "));
        cr_expect_not_null(strstr(s.error.message, states[i].words), "%s", s.error.message);
        expect_lost(g);
        gqa_close(g);
        cr_expect_eq(s.n_ends, 1, "ended once");
        cr_expect_eq(peer_finish(pid), KILLED);
    }
}

/* Reads nothing, so that the client's output queues up. */
static void reads_nothing(int fd, void *arg)
{
    for (;;) {
        pause();
    }
}

/* A call that is larger than the socket's buffer. */
static void start_large(struct gqa *g, uint32_t timeout_ms, struct seen *s, uint32_t *ret_id)
{
    const size_t bytes = 8u << 20;
    struct gqa_params *p;
    char *prompt = malloc(bytes);
    struct gqa_call_options o = {.struct_size = sizeof(o),
                                 .timeout_ms = timeout_ms,
                                 .event = on_event,
                                 .done = on_done,
                                 .arg = s};
    memset(prompt, 'p', bytes);
    gqa_params_create(&p);
    gqa_params_text(p, "prompt", prompt, bytes);
    free(prompt);
    cr_assert_eq(gqa_call_async(g, "text.generate", p, &o, ret_id), 0);
    gqa_params_destroy(p);
}

Test(kill, while_output_is_queued)
{
    pid_t pid;
    struct seen s = {0};
    struct gqa *g = peer_connect(reads_nothing, NULL, &pid);
    start_large(g, 20000, &s, NULL);
    cr_assert_eq(gqa_events(g), POLLIN | POLLOUT);
    cr_assert_eq(kill(pid, SIGKILL), 0);
    cr_expect_eq(run(g, &s), -ECONNRESET);
    cr_expect_eq(s.n_ends, 1);
    cr_expect_eq(s.status, -ECONNRESET);
    expect_lost(g);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), KILLED);
}

Test(kill, while_a_helper_waits)
{
    pid_t pid;
    struct gqa_error e;
    struct gqa *g = peer_connect(dies_streaming, NULL, &pid);
    cr_expect_eq(gqa_generate(g, NULL, NULL, NULL, NULL, NULL, &e), -ECONNRESET);
    cr_expect_not_null(strstr(e.message, "text.generate: connection lost"));
    cr_expect_eq(gqa_ping(g, &e), -ENOTCONN);
    cr_expect_str_eq(e.message, "gqa.ping: the connection is lost");
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), KILLED);
}

/* ---- stopped, not dead ------------------------------------------------------------------- */

static void answers_pings(int fd, void *arg)
{
    for (;;) {
        struct peer_request r;
        peer_read(fd, &r);
        if (!r.is_cancel) {
            peer_answer(fd, r.id);
        }
        peer_request_finish(&r);
    }
}

static void stop(pid_t pid)
{
    int status;
    cr_assert_eq(kill(pid, SIGSTOP), 0);
    cr_assert_eq(waitpid(pid, &status, WUNTRACED), pid);
    cr_assert(WIFSTOPPED(status));
}

Test(stopped, hello_ends_at_the_deadline)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    int fd;
    pid_t pid = peer_start(answers_pings, NULL, &fd);
    stop(pid);
    struct gqa_connect_options o = {
        .struct_size = sizeof(o), .flags = GQA_CONNECT_FD, .fd = fd, .timeout_ms = 50};
    cr_expect_eq(gqa_connect(&o, &g, &e), -ETIMEDOUT);
    cr_expect_not_null(strstr(e.message, "gqa.hello"), "%s", e.message);
    close(fd);
    kill(pid, SIGKILL);
    cr_expect_eq(peer_finish(pid), KILLED);
}

Test(stopped, calls_end_at_their_deadline_and_the_connection_lives_on)
{
    pid_t pid;
    struct seen s = {0};
    struct gqa *g = peer_connect(answers_pings, NULL, &pid);
    stop(pid);
    cr_assert_eq(start(g, "gqa.ping", 50, 0, &s, NULL), 0);
    cr_expect_eq(run(g, &s), 1);
    cr_expect_eq(s.status, -ETIMEDOUT);
    cr_expect_str_eq(s.error.message, "gqa.ping: nothing was heard for 50 ms");
    kill(pid, SIGCONT);
    cr_expect_eq(gqa_ping(g, NULL), 0, "the late answer is dropped, the next one is ours");
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

Test(stopped, a_call_that_cannot_be_sent_ends_too)
{
    pid_t pid;
    uint32_t id;
    struct seen s = {0};
    struct gqa *g = peer_connect(reads_nothing, NULL, &pid);
    start_large(g, 50, &s, &id);
    cr_expect_eq(run(g, &s), 1);
    cr_expect_eq(s.status, -ETIMEDOUT);
    cr_expect(gqa_is_connected(g));
    gqa_close(g);
    kill(pid, SIGKILL);
    peer_finish(pid);
}

/* Starts calls with that much text until no more fits. */
static void fill(struct gqa *g, size_t bytes)
{
    struct gqa_params *p;
    int r = 0;
    char *text = malloc(bytes);
    memset(text, 't', bytes);
    gqa_params_create(&p);
    gqa_params_text(p, "text", text, bytes);
    free(text);
    while (r == 0) {
        r = gqa_call_async(g, "text.tokenize", p, NULL, NULL);
    }
    cr_assert_eq(r, -ENOBUFS);
    gqa_params_destroy(p);
}

/* The queue of output is full of requests; cancelling one is still possible. */
Test(stopped, cancel_works_while_the_queue_is_full)
{
    pid_t pid;
    uint32_t id = 0;
    struct seen s = {0};
    struct gqa *g = peer_connect(reads_nothing, NULL, &pid);
    start_large(g, 20000, &s, &id);
    fill(g, 1u << 20);
    fill(g, 1u << 10); /* less than this is left */
    cr_expect_eq(gqa_cancel(g, id), 0);
    gqa_close(g);
    cr_expect_eq(s.n_ends, 1);
    kill(pid, SIGKILL);
    peer_finish(pid);
}

/* ---- a daemon that never comes to an end -------------------------------------------------- */

static void streams_for_ever(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.generate");
    for (uint32_t seq = 0;; seq++) {
        peer_step(fd, id, seq, "and so on ", 1);
    }
}

Test(deadline, total_ms_ends_a_call_that_goes_on_and_on)
{
    pid_t pid;
    struct seen s = {0};
    struct gqa *g = peer_connect(streams_for_ever, NULL, &pid);
    cr_assert_eq(start(g, "text.generate", 20000, 60, &s, NULL), 0);
    run(g, &s);
    cr_expect_eq(s.status, -ETIMEDOUT);
    cr_expect_str_eq(s.error.message, "text.generate: not finished within 60 ms");
    gqa_close(g);
    peer_finish(pid);
}

static void floods(int fd, void *arg)
{
    char *text = malloc(60001);
    uint32_t id = peer_expect(fd, "text.generate");
    memset(text, 'f', 60000);
    text[60000] = '\0';
    for (uint32_t seq = 0;; seq++) {
        peer_step(fd, id, seq, text, 1);
    }
}

/* Another call's flood does not carry a silent call past its deadline. */
Test(deadline, holds_amid_a_flood)
{
    pid_t pid;
    struct seen flood = {0}, s = {0};
    struct gqa *g = peer_connect(floods, NULL, &pid);
    cr_assert_eq(start(g, "text.generate", 20000, 0, &flood, NULL), 0);
    cr_assert_eq(start(g, "gqa.ping", 30, 0, &s, NULL), 0);
    run(g, &s);
    cr_expect_eq(s.status, -ETIMEDOUT);
    cr_expect_eq(flood.n_ends, 0);
    gqa_close(g);
    peer_finish(pid);
}

/* Options of a program that was built before total_ms existed. */
Test(deadline, shorter_options_are_understood)
{
    pid_t pid;
    struct seen s = {0};
    struct gqa *g = peer_connect(answers_pings, NULL, &pid);
    struct gqa_call_options o = {.struct_size = offsetof(struct gqa_call_options, total_ms),
                                 .done = on_done,
                                 .arg = &s,
                                 .total_ms = 1};
    cr_assert_eq(gqa_call_async(g, "gqa.ping", NULL, &o, NULL), 0);
    run(g, &s);
    cr_expect_eq(s.status, 0);
    o.struct_size = 2;
    cr_expect_eq(gqa_call_async(g, "gqa.ping", NULL, &o, NULL), -EINVAL);
    cr_expect_eq(gqa_call(g, "gqa.ping", NULL, &o, NULL, NULL), -EINVAL);
    cr_expect_eq(gqa_generate(g, NULL, &o, NULL, NULL, NULL, NULL), -EINVAL);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}
