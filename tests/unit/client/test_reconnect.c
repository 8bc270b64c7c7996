/* A daemon that went away and came back: the connection is opened again, nothing is sent again. */
#include "peer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* A place where daemons listen, one after the other. */
struct place {
    char folder[64];
    struct sockaddr_un address;
};

static void place_init(struct place *p)
{
    memset(p, 0, sizeof(*p));
    snprintf(p->folder, sizeof(p->folder), "/tmp/gqa-test-XXXXXX");
    cr_assert_not_null(mkdtemp(p->folder));
    p->address.sun_family = AF_UNIX;
    snprintf(p->address.sun_path, sizeof(p->address.sun_path), "%s/s", p->folder);
}

static void place_finish(struct place *p)
{
    unlink(p->address.sun_path);
    rmdir(p->folder);
}

static int serve(const struct place *p)
{
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unlink(p->address.sun_path);
    if (bind(listener, (const struct sockaddr *)&p->address, sizeof(p->address)) < 0 ||
        listen(listener, 4) < 0) {
        return -1;
    }
    return listener;
}

/* A daemon that says hello to one client and then runs the script. It listens when this returns. */
static pid_t start_daemon(const struct place *p, peer_script script, uint32_t version)
{
    int listener = serve(p);
    cr_assert_geq(listener, 0);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int fd = accept(listener, NULL, NULL);
        peer_hello(fd, version);
        script(fd, NULL);
        _exit(0);
    }
    close(listener);
    return pid;
}

struct seen {
    int n_ends, status;
    struct gqa_error error;
};

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

static void on_reconnect(void *arg, int status, const struct gqa_error *error)
{
    struct seen *s = arg;
    s->n_ends++;
    s->status = status;
    cr_expect((status == 0) == (error == NULL));
    if (error != NULL) {
        s->error = *error;
    }
}

static int start(struct gqa *g, const char *method, struct seen *s)
{
    struct gqa_call_options o = {.struct_size = sizeof(o), .done = on_done, .arg = s};
    return gqa_call_async(g, method, NULL, &o, NULL);
}

static int run(struct gqa *g, const struct seen *s)
{
    int r = 0;
    while (r >= 0 && (s == NULL || s->n_ends == 0)) {
        r = gqa_process(g);
        if (r == 0) {
            gqa_wait(g, UINT64_MAX);
        }
    }
    return r;
}

static void dies_generating(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "once", 1);
    kill(getpid(), SIGKILL);
}

/* Meets exactly one ping: a generation that was sent again would be found here. */
static void expects_a_ping(int fd, void *arg)
{
    peer_answer(fd, peer_expect(fd, "gqa.ping"));
}

static void stays(int fd, void *arg)
{
    char byte;
    while (read(fd, &byte, 1) > 0) {
    }
}

static struct gqa *connect_to(const struct place *p, uint32_t timeout_ms)
{
    struct gqa *g = NULL;
    struct gqa_error e;
    struct gqa_connect_options o = {
        .struct_size = sizeof(o), .socket = p->address.sun_path, .timeout_ms = timeout_ms};
    cr_assert_eq(gqa_connect(&o, &g, &e), 0);
    return g;
}

/* A connection whose daemon has been killed in a generation; s saw its end. */
static struct gqa *lose(const struct place *p, struct seen *s)
{
    pid_t pid = start_daemon(p, dies_generating, GQA_PROTOCOL_VERSION);
    struct gqa *g = connect_to(p, 20000);
    cr_assert_eq(start(g, "text.generate", s), 0);
    cr_expect_eq(run(g, s), -ECONNRESET);
    cr_expect_eq(peer_finish(pid), 128 + SIGKILL);
    return g;
}

Test(reconnect, opens_again_and_sends_nothing_twice)
{
    struct place p;
    struct seen s = {0};
    struct gqa_error e;
    place_init(&p);
    struct gqa *g = lose(&p, &s);
    int fd = gqa_fd(g);
    pid_t pid = start_daemon(&p, expects_a_ping, GQA_PROTOCOL_VERSION);
    cr_assert_eq(gqa_reconnect(g, 20000, &e), 0);
    cr_expect(gqa_is_connected(g));
    cr_expect_eq(gqa_fd(g), fd, "the number stays");
    cr_expect_eq(gqa_reconnect(g, 0, &e), -EISCONN);
    cr_expect_not_null(gqa_value_get(gqa_server_info(g), "server"));
    cr_expect_eq(gqa_ping(g, &e), 0);
    cr_expect_eq(s.n_ends, 1, "the lost generation ended once");
    cr_expect_eq(peer_finish(pid), 0);
    gqa_close(g);
    place_finish(&p);
}

/* GQA_SOCKET is looked at again: the daemon may have moved. */
Test(reconnect, follows_the_environment)
{
    struct place old, new;
    struct gqa *g = NULL;
    struct gqa_error e;
    place_init(&old);
    place_init(&new);
    pid_t pid = start_daemon(&old, dies_generating, GQA_PROTOCOL_VERSION);
    setenv("GQA_SOCKET", old.address.sun_path, 1);
    cr_assert_eq(gqa_connect(NULL, &g, &e), 0);
    cr_expect_eq(gqa_generate(g, NULL, NULL, NULL, NULL, NULL, &e), -ECONNRESET);
    peer_finish(pid);
    pid = start_daemon(&new, expects_a_ping, GQA_PROTOCOL_VERSION);
    setenv("GQA_SOCKET", new.address.sun_path, 1);
    cr_expect_eq(gqa_reconnect(g, 20000, &e), 0);
    cr_expect_eq(gqa_ping(g, &e), 0);
    cr_expect_eq(peer_finish(pid), 0);
    gqa_close(g);
    place_finish(&old);
    place_finish(&new);
}

Test(reconnect, waits_for_a_daemon_that_starts)
{
    struct place p;
    struct seen s = {0};
    struct gqa_error e;
    place_init(&p);
    struct gqa *g = lose(&p, &s);
    unlink(p.address.sun_path);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        nanosleep(&(struct timespec){.tv_nsec = 50000000},
                  NULL); /* the first attempt comes sooner */
        int fd = accept(serve(&p), NULL, NULL);
        peer_hello(fd, GQA_PROTOCOL_VERSION);
        expects_a_ping(fd, NULL);
        _exit(0);
    }
    cr_expect_eq(gqa_reconnect(g, 20000, &e), 0);
    cr_expect_eq(gqa_ping(g, &e), 0);
    cr_expect_eq(peer_finish(pid), 0);
    gqa_close(g);
    place_finish(&p);
}

Test(reconnect, fails_at_its_deadline_and_may_be_tried_again)
{
    struct place p;
    struct seen s = {0};
    struct gqa_error e;
    place_init(&p);
    struct gqa *g = lose(&p, &s);
    cr_expect_eq(gqa_reconnect(g, 50, &e), -ECONNREFUSED, "the dead daemon's socket");
    unlink(p.address.sun_path);
    cr_expect_eq(gqa_reconnect(g, 50, &e), -ENOENT);
    cr_expect_not_null(strstr(e.message, p.address.sun_path));
    int listener = serve(&p); /* it never accepts: hello is not answered */
    cr_expect_eq(gqa_reconnect(g, 50, &e), -ETIMEDOUT);
    cr_expect_eq(gqa_process(g), -ENOTCONN);
    close(listener);
    pid_t pid = start_daemon(&p, stays, GQA_PROTOCOL_VERSION + 1);
    cr_expect_eq(gqa_reconnect(g, 20000, &e), -EPROTONOSUPPORT);
    cr_expect_eq(peer_finish(pid), 0, "the refused connection was ended");
    cr_expect_not(gqa_is_connected(g));
    pid = start_daemon(&p, expects_a_ping, GQA_PROTOCOL_VERSION);
    cr_expect_eq(gqa_reconnect(g, 20000, &e), 0);
    cr_expect_eq(gqa_ping(g, &e), 0);
    cr_expect_eq(peer_finish(pid), 0);
    gqa_close(g);
    place_finish(&p);
}

Test(reconnect, only_where_there_is_an_address)
{
    pid_t pid;
    struct gqa_error e;
    struct gqa *g = peer_connect(dies_generating, NULL, &pid);
    cr_expect_eq(gqa_generate(g, NULL, NULL, NULL, NULL, NULL, &e), -ECONNRESET);
    cr_expect_eq(gqa_reconnect(g, 50, &e), -EOPNOTSUPP);
    cr_expect_eq(gqa_reconnect_async(g, 50, on_reconnect, NULL, &e), -EOPNOTSUPP);
    gqa_close(g);
    peer_finish(pid);
}

struct inside {
    struct gqa *g;
    int status;
};

static void reconnects_inside(void *arg, uint32_t id, int status, const struct gqa_value *result,
                              const struct gqa_error *error)
{
    struct inside *i = arg;
    i->status = gqa_reconnect(i->g, 50, NULL);
}

Test(reconnect, not_inside_a_callback)
{
    struct place p;
    place_init(&p);
    pid_t pid = start_daemon(&p, dies_generating, GQA_PROTOCOL_VERSION);
    struct inside i = {.g = connect_to(&p, 20000)};
    struct gqa_call_options o = {.struct_size = sizeof(o), .done = reconnects_inside, .arg = &i};
    cr_assert_eq(gqa_call_async(i.g, "text.generate", NULL, &o, NULL), 0);
    cr_expect_eq(run(i.g, NULL), -ECONNRESET);
    cr_expect_eq(i.status, -EDEADLK);
    gqa_close(i.g);
    peer_finish(pid);
    place_finish(&p);
}

/* ---- for a loop ---------------------------------------------------------------------------- */

/* epoll forgets the old socket by itself; the new one, of the same number, is added. */
Test(reconnect_async, with_epoll_and_a_call_behind_hello)
{
    struct place p;
    struct seen s = {0}, hello = {0}, ping = {0};
    struct gqa_error e;
    place_init(&p);
    struct gqa *g = lose(&p, &s);
    int set = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    cr_assert_eq(epoll_ctl(set, EPOLL_CTL_ADD, gqa_fd(g), &event), 0);
    cr_expect_eq(gqa_reconnect_async(g, 0, on_reconnect, &hello, &e), -ECONNREFUSED);
    pid_t pid = start_daemon(&p, expects_a_ping, GQA_PROTOCOL_VERSION);
    cr_assert_eq(gqa_reconnect_async(g, 0, on_reconnect, &hello, &e), 0);
    cr_assert_eq(start(g, "gqa.ping", &ping), 0);
    cr_assert_eq(epoll_ctl(set, EPOLL_CTL_ADD, gqa_fd(g), &event), 0);
    while (ping.n_ends == 0) {
        int r = gqa_process(g);
        cr_assert_geq(r, 0);
        if (r == 0) {
            cr_expect_eq(epoll_wait(set, &event, 1, 20000), 1);
        }
    }
    cr_expect(hello.n_ends == 1 && hello.status == 0);
    cr_expect_eq(ping.status, 0);
    cr_expect_eq(peer_finish(pid), 0);
    close(set);
    gqa_close(g);
    place_finish(&p);
}

Test(reconnect_async, hello_that_is_not_answered_or_refused)
{
    struct place p;
    struct seen s = {0}, hello = {0}, ping = {0};
    struct gqa_error e;
    place_init(&p);
    struct gqa *g = lose(&p, &s);
    int listener = serve(&p);
    cr_assert_eq(gqa_reconnect_async(g, 50, on_reconnect, &hello, &e), 0);
    cr_assert_eq(start(g, "gqa.ping", &ping), 0);
    cr_expect_eq(run(g, NULL), -ENOTCONN);
    cr_expect(hello.n_ends == 1 && hello.status == -ETIMEDOUT);
    cr_expect(ping.n_ends == 1 && ping.status == -ENOTCONN);
    close(listener);

    pid_t pid = start_daemon(&p, stays, GQA_PROTOCOL_VERSION + 1);
    hello = (struct seen){0};
    cr_assert_eq(gqa_reconnect_async(g, 0, on_reconnect, &hello, &e), 0);
    cr_expect_eq(run(g, NULL), -ENOTCONN);
    cr_expect(hello.n_ends == 1 && hello.status == -EPROTONOSUPPORT);
    cr_expect_eq(peer_finish(pid), 0);
    cr_expect_not(gqa_is_connected(g));
    gqa_close(g);
    place_finish(&p);
}

Test(reconnect_async, dies_or_is_closed_before_it_is_answered)
{
    struct place p;
    struct seen s = {0}, hello = {0};
    struct gqa_error e;
    place_init(&p);
    struct gqa *g = lose(&p, &s);
    int listener = serve(&p);
    cr_assert_eq(gqa_reconnect_async(g, 0, on_reconnect, &hello, &e), 0);
    close(listener); /* unaccepted connections are reset */
    cr_expect_eq(run(g, NULL), -ECONNRESET);
    cr_expect(hello.n_ends == 1 && hello.status == -ECONNRESET);

    hello = (struct seen){0};
    listener = serve(&p);
    cr_assert_eq(gqa_reconnect_async(g, 0, on_reconnect, &hello, &e), 0);
    gqa_close(g);
    cr_expect(hello.n_ends == 1 && hello.status == -ECANCELED);
    close(listener);
    place_finish(&p);
}

/* A full backlog would block connect(): the loop is told to come again. */
Test(reconnect_async, never_blocks)
{
    struct place p;
    struct seen s = {0}, hello = {0};
    struct gqa_error e;
    place_init(&p);
    struct gqa *g = lose(&p, &s);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unlink(p.address.sun_path);
    cr_assert_eq(bind(listener, (struct sockaddr *)&p.address, sizeof(p.address)), 0);
    cr_assert_eq(listen(listener, 0), 0);
    int first = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert_eq(connect(first, (struct sockaddr *)&p.address, sizeof(p.address)), 0);
    cr_expect_eq(gqa_reconnect_async(g, 0, on_reconnect, &hello, &e), -EAGAIN);
    cr_expect_eq(hello.n_ends, 0);
    cr_expect_eq(gqa_process(g), -ENOTCONN);
    close(first);
    close(listener);
    gqa_close(g);
    place_finish(&p);
}
