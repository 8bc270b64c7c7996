/* Messages in shared memory: a daemon that plays its end well, badly, and not at all. */
#include "peer.h"

#include "ipc/ring_map.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define N_CALLS    500u
#define N_WAKE_UPS 50u
#define TEXT_BYTES (3u * RING_BYTES_MIN)

/* The daemon's end, in the forked child. */
struct end {
    int fd, bell;
    struct ring_map map;
    struct ring_in in;
    struct ring_out out;
    uint8_t *frame;
    size_t frame_bytes;
    uint8_t record[RING_RECORD_MAX];
};

enum fault { WELL, NO_FEATURE, BUSY, TOO_FEW_FDS, WRONG_SIZE, UNSEALED };

static void hello(int fd, bool has_rings)
{
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "gqa.hello");
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "protocol");
    ipc_pack_u64(&b, GQA_PROTOCOL_VERSION);
    ipc_pack_str(&b, "features");
    ipc_pack_array(&b, 1);
    ipc_pack_str(&b, has_rings ? "ring" : "stream");
    peer_send(fd, &b);
}

static void send_with_fds(int fd, const struct ipc_buffer *b, const int *fds, size_t n_fds)
{
    union {
        char space[CMSG_SPACE(3 * sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec iov = {.iov_base = b->data, .iov_len = b->bytes};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control.space,
                         .msg_controllen = CMSG_SPACE(n_fds * sizeof(int))};
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
    memcpy(CMSG_DATA(c), fds, n_fds * sizeof(int));
    if (sendmsg(fd, &msg, 0) != (ssize_t)b->bytes) {
        _exit(5);
    }
}

static void announce(struct end *e, uint32_t id, enum fault fault)
{
    struct ring_sizes sizes = {.ring_bytes = RING_BYTES_MIN, .in_bytes = 4096, .out_bytes = 4096};
    int fds[3];
    if (ring_map_create(&sizes, &e->map, fds) < 0) {
        _exit(4);
    }
    ring_map_daemon_ends(&e->map, &e->in, &e->out);
    fds[2] = e->bell = eventfd(0, EFD_CLOEXEC);
    if (fault == UNSEALED) {
        int pipes[2];
        if (pipe(pipes) < 0) {
            _exit(4);
        }
        fds[0] = pipes[0];
    }
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 3);
    ipc_pack_str(&b, "ring_bytes");
    ipc_pack_u64(&b, sizes.ring_bytes);
    ipc_pack_str(&b, "in_bytes");
    ipc_pack_u64(&b, fault == WRONG_SIZE ? 8192 : sizes.in_bytes);
    ipc_pack_str(&b, "out_bytes");
    ipc_pack_u64(&b, sizes.out_bytes);
    send_with_fds(e->fd, &b, fds, fault == TOO_FEW_FDS ? 2 : 3);
    ipc_buffer_finish(&b);
}

static void open_rings(struct end *e, int fd, enum fault fault)
{
    *e = (struct end){.fd = fd};
    hello(fd, fault != NO_FEATURE);
    if (fault == NO_FEATURE) {
        return;
    }
    uint32_t id = peer_expect(fd, "ring.open");
    if (fault == BUSY) {
        struct ipc_error error;
        struct ipc_buffer b;
        ipc_buffer_init(&b);
        ipc_error_set(&error, PROTO_E_BUSY, "no memory of that kind is left");
        ipc_pack_response_error(&b, id, &error);
        peer_send(fd, &b);
        return;
    }
    announce(e, id, fault);
}

/* Wakes the client as it asked; true when it had. */
static bool wake(struct end *e, uint32_t mask)
{
    static const uint8_t message[] = {0x93, 2, 0xa8, 'g', 'q', 'a', '.', 'w', 'a', 'k', 'e', 0x90};
    uint32_t wait = ring_take_wait(&e->map.control->client_wait, mask);
    if (wait & RING_WAIT_FUTEX) {
        ring_bell_ring(&e->map.control->client_bell);
    } else if (wait & RING_WAIT_MESSAGE) {
        peer_write(e->fd, message, sizeof(message));
    }
    return wait != RING_WAIT_NOTHING;
}

static void sleep_until_rung(struct end *e, uint32_t wait, bool to_put)
{
    uint64_t count;
    ring_wait_for(&e->map.control->daemon_wait, wait);
    if (to_put ? !ring_out_has_moved(&e->out) : !ring_in_has_some(&e->in)) {
        struct pollfd p[] = {{.fd = e->bell, .events = POLLIN}, {.fd = e->fd, .events = POLLRDHUP}};
        poll(p, 2, -1);
        if (p[1].revents & (POLLRDHUP | POLLHUP)) {
            _exit(0); /* the client has left */
        }
        if (read(e->bell, &count, sizeof(count)) < 0) {
            _exit(6);
        }
    }
    ring_wait_for(&e->map.control->daemon_wait, RING_WAIT_NOTHING);
}

/* The next message, whose bytes stay in e. */
static struct ipc_message take_message(struct end *e)
{
    struct ipc_scanner scanner;
    struct ipc_message m;
    size_t bytes, used;
    uint32_t id;
    bool last;
    e->frame_bytes = 0;
    ipc_scanner_init(&scanner, PROTO_FRAME_BYTES_MAX);
    for (;;) {
        int r = ring_in_take(&e->in, PROTO_FRAME_BYTES_MAX, e->record, &bytes, &last);
        if (r < 0) {
            _exit(7);
        }
        if (r == 0) {
            ring_in_publish(&e->in);
            wake(e, RING_WAIT_ROOM);
            sleep_until_rung(e, RING_WAIT_FUTEX, false);
            continue;
        }
        e->frame = realloc(e->frame, e->frame_bytes + bytes);
        memcpy(e->frame + e->frame_bytes, e->record, bytes);
        e->frame_bytes += bytes;
        r = ipc_scanner_feed(&scanner, e->record, bytes, &used);
        if (r < 0 || (r > 0 && used < bytes)) {
            _exit(8); /* these clients wait for each answer */
        }
        if (r > 0) {
            break;
        }
    }
    ring_in_publish(&e->in);
    wake(e, RING_WAIT_ROOM);
    if (ipc_message_parse(e->frame, e->frame_bytes, &m, &id) < 0) {
        _exit(9);
    }
    return m;
}

static uint32_t take_request(struct end *e)
{
    struct ipc_message m = take_message(e);
    uint32_t id = m.id;
    if (m.kind != IPC_REQUEST) {
        _exit(9);
    }
    ipc_message_finish(&m);
    return id;
}

static void put(struct end *e, struct ipc_buffer *b)
{
    size_t done = 0;
    int r;
    while ((r = ring_out_put(&e->out, b->data, b->bytes, &done)) == 0) {
        ring_out_publish(&e->out);
        wake(e, RING_WAIT_FUTEX | RING_WAIT_MESSAGE);
        sleep_until_rung(e, RING_WAIT_FUTEX | RING_WAIT_ROOM, true);
    }
    if (r < 0) {
        _exit(10);
    }
    ring_out_publish(&e->out);
    wake(e, RING_WAIT_FUTEX | RING_WAIT_MESSAGE);
    ipc_buffer_finish(b);
}

/* Answers every call with the bytes of its request. */
static void echoes(int fd, void *arg)
{
    struct end e;
    open_rings(&e, fd, WELL);
    for (;;) {
        struct ipc_buffer b;
        uint32_t id = take_request(&e);
        ipc_buffer_init(&b);
        ipc_pack_response_ok(&b, id);
        ipc_pack_bin(&b, e.frame, e.frame_bytes);
        put(&e, &b);
    }
}

static int connect_to(peer_script script, void *arg, uint32_t flags, uint32_t spin_us,
                      pid_t *ret_pid, struct gqa **ret)
{
    struct gqa_error e;
    int fd;
    *ret_pid = peer_start(script, arg, &fd);
    struct gqa_connect_options o = {.struct_size = sizeof(o),
                                    .flags = GQA_CONNECT_FD | flags,
                                    .fd = fd,
                                    .timeout_ms = 20000,
                                    .spin_us = spin_us};
    int r = gqa_connect(&o, ret, &e);
    if (r < 0) {
        close(fd);
    }
    return r;
}

static void expect_echo(const struct gqa_value *result, const char *text, size_t bytes)
{
    const char *data;
    size_t n;
    cr_assert_eq(gqa_value_bytes(result, &data, &n), 0);
    cr_assert_geq(n, bytes);
    cr_assert_not_null(memmem(data, n, text, bytes));
}

/* ---- a daemon that plays well ------------------------------------------------------------ */

Test(ring, calls_go_and_come_however_the_client_waits)
{
    static const uint32_t spins[] = {0, 50, GQA_SPIN_NEVER};
    char text[TEXT_BYTES]; /* longer than the rings: both ends wait for room */
    for (size_t s = 0; s < sizeof(spins) / sizeof(spins[0]); s++) {
        struct gqa *g = NULL;
        pid_t pid;
        cr_assert_eq(connect_to(echoes, NULL, GQA_F_SHM, spins[s], &pid, &g), 0);
        cr_assert(gqa_has_ring(g));
        for (unsigned i = 0; i < N_CALLS; i++) {
            size_t bytes = i % 50 == 0 ? sizeof(text) : 1 + i % 40;
            struct gqa_params *p;
            struct gqa_reply *reply;
            memset(text, 'a' + (int)(i % 26), sizeof(text));
            cr_assert_eq(gqa_params_create(&p), 0);
            gqa_params_text(p, "text", text, bytes);
            cr_assert_eq(gqa_call(g, "echo", p, NULL, &reply, NULL), 0);
            expect_echo(gqa_reply_value(reply), text, bytes);
            gqa_reply_destroy(reply);
            gqa_params_destroy(p);
        }
        gqa_close(g);
        cr_assert_eq(peer_finish(pid), 0);
    }
}

static void on_done(void *arg, uint32_t id, int status, const struct gqa_value *result,
                    const struct gqa_error *error)
{
    *(int *)arg = status == 0 ? 1 : status;
}

/* Sleeps by poll() alone until the call has ended. */
static void poll_until(struct gqa *g, const int *done, unsigned round)
{
    while (*done == 0) {
        uint64_t due = gqa_timeout_usec(g);
        struct pollfd p = {.fd = gqa_fd(g), .events = (short)gqa_events(g)};
        if (due != 0) {
            cr_assert_gt(poll(&p, 1, 20000), 0, "round %u: nobody woke the loop", round);
        }
        while (gqa_process(g) > 0) {
        }
    }
    cr_assert_eq(*done, 1);
}

/* As docs/client.md tells it: what to watch is asked for before every sleep. */
Test(ring, a_program_with_its_own_loop_is_woken_by_the_socket)
{
    struct gqa *g = NULL;
    pid_t pid;
    cr_assert_eq(connect_to(echoes, NULL, GQA_F_SHM, 0, &pid, &g), 0);
    int fd = gqa_fd(g);
    for (unsigned i = 0; i < N_CALLS; i++) {
        int done = 0;
        const struct gqa_call_options o = {.struct_size = sizeof(o), .done = on_done, .arg = &done};
        cr_assert_eq(gqa_call_async(g, "echo", NULL, &o, NULL), 0);
        poll_until(g, &done, i);
    }
    cr_assert_eq(gqa_fd(g), fd);
    gqa_close(g);
    cr_assert_eq(peer_finish(pid), 0);
}

Test(ring, a_ring_that_becomes_full_between_two_questions_is_waited_for)
{
    struct gqa *g = NULL;
    struct gqa_params *params;
    char text[TEXT_BYTES];
    pid_t pid;
    cr_assert_eq(connect_to(echoes, NULL, GQA_F_SHM, 0, &pid, &g), 0);
    memset(text, 'x', sizeof(text));
    cr_assert_eq(gqa_params_create(&params), 0);
    gqa_params_text(params, "text", text, sizeof(text));
    for (unsigned i = 0; i < N_WAKE_UPS; i++) {
        int done = 0;
        const struct gqa_call_options o = {.struct_size = sizeof(o), .done = on_done, .arg = &done};
        gqa_events(g); /* there was room then */
        cr_assert_eq(gqa_call_async(g, "echo", params, &o, NULL), 0);
        poll_until(g, &done, i);
    }
    gqa_params_destroy(params);
    gqa_close(g);
    cr_assert_eq(peer_finish(pid), 0);
}

static void on_signal(int number)
{
}

/* It slept on the futex then; now the program sleeps on the socket. */
Test(ring, after_a_wait_that_a_signal_ended_the_socket_wakes)
{
    const struct sigaction action = {.sa_handler = on_signal};
    const struct itimerval soon = {.it_interval = {.tv_usec = 300}, .it_value = {.tv_usec = 300}};
    const struct itimerval never = {{0}};
    struct gqa *g = NULL;
    pid_t pid;
    cr_assert_eq(connect_to(echoes, NULL, GQA_F_SHM, 0, &pid, &g), 0);
    cr_assert_eq(sigaction(SIGALRM, &action, NULL), 0);
    for (unsigned i = 0; i < N_WAKE_UPS; i++) {
        int done = 0;
        const struct gqa_call_options o = {.struct_size = sizeof(o), .done = on_done, .arg = &done};
        cr_assert_eq(setitimer(ITIMER_REAL, &soon, NULL), 0);
        cr_assert_eq(gqa_wait(g, UINT64_MAX), -EINTR);
        cr_assert_eq(setitimer(ITIMER_REAL, &never, NULL), 0);
        cr_assert_eq(gqa_call_async(g, "echo", NULL, &o, NULL), 0);
        poll_until(g, &done, i);
    }
    gqa_close(g);
    cr_assert_eq(peer_finish(pid), 0);
}

/* ---- rings that are not to be had -------------------------------------------------------- */

static void faulty(int fd, void *arg)
{
    struct end e;
    enum fault fault = *(const enum fault *)arg;
    open_rings(&e, fd, fault);
    if (fault == NO_FEATURE || fault == BUSY) {
        for (;;) {
            peer_answer(fd, peer_expect(fd, "gqa.ping"));
        }
    }
    char byte;
    ssize_t n = read(fd, &byte, 1); /* until the client has left */
    (void)n;
}

Test(ring, without_rings_the_flag_decides)
{
    static enum fault faults[] = {NO_FEATURE, BUSY};
    static const int codes[] = {-EOPNOTSUPP, -EBUSY};
    for (size_t i = 0; i < 2; i++) {
        struct gqa *g = NULL;
        pid_t pid;
        cr_assert_eq(connect_to(faulty, &faults[i], GQA_F_SHM, 0, &pid, &g), codes[i]);
        cr_assert_eq(peer_finish(pid), 0);
        cr_assert_eq(connect_to(faulty, &faults[i], GQA_F_SHM_AUTO, 0, &pid, &g), 0);
        cr_assert_not(gqa_has_ring(g));
        cr_assert_eq(gqa_ping(g, NULL), 0);
        gqa_close(g);
        cr_assert_eq(peer_finish(pid), 0);
    }
}

Test(ring, rings_that_are_not_as_told_are_refused)
{
    static enum fault faults[] = {TOO_FEW_FDS, WRONG_SIZE, UNSEALED};
    for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++) {
        struct gqa *g = NULL;
        pid_t pid;
        cr_expect_eq(connect_to(faulty, &faults[i], GQA_F_SHM_AUTO, 0, &pid, &g), -EPROTO);
        cr_assert_eq(peer_finish(pid), 0);
    }
}

Test(ring, the_librarys_own_methods_are_not_the_programs)
{
    struct gqa *g = NULL;
    pid_t pid;
    cr_assert_eq(connect_to(echoes, NULL, GQA_F_SHM, 0, &pid, &g), 0);
    cr_assert_eq(gqa_call_async(g, "ring.close", NULL, NULL, NULL), -EINVAL);
    cr_assert_eq(gqa_call(g, "ring.open", NULL, NULL, NULL, NULL), -EINVAL);
    cr_assert_eq(gqa_ping(g, NULL), 0);
    gqa_close(g);
    cr_assert_eq(peer_finish(pid), 0);
}

/* ---- calls that were made before the rings ------------------------------------------------ */

/* A first client is left; the next one has rings, and a call from before them on the socket. Its
 * cancel comes there, though the ring is full of the next call's request, which is whole. */
static void serves_twice(int fd, void *arg)
{
    int listener = *(const int *)arg;
    struct end e;
    struct peer_request cancel;
    struct ipc_buffer b;
    int first = accept(listener, NULL, NULL);
    hello(first, false);
    close(first);
    e = (struct end){.fd = accept(listener, NULL, NULL)};
    hello(e.fd, true);
    uint32_t id = peer_expect(e.fd, "text.generate");
    announce(&e, peer_expect(e.fd, "ring.open"), WELL);
    peer_read(e.fd, &cancel);
    if (!cancel.is_cancel || cancel.id != id) {
        _exit(11);
    }
    peer_request_finish(&cancel);
    uint32_t echo = take_request(&e);
    const uint32_t ids[] = {id, echo};
    for (size_t i = 0; i < 2; i++) {
        ipc_buffer_init(&b);
        ipc_pack_response_ok(&b, ids[i]);
        ipc_pack_bin(&b, e.frame, i == 1 ? e.frame_bytes : 0);
        put(&e, &b);
    }
    peer_read(e.fd, &cancel); /* until the client has left */
}

static void on_reopened(void *arg, int status, const struct gqa_error *error)
{
    *(int *)arg = status == 0 ? 1 : status;
}

static void run_until(struct gqa *g, const int *done)
{
    while (*done == 0) {
        int r = gqa_process(g);
        cr_assert_geq(r, 0);
        if (r == 0) {
            gqa_wait(g, UINT64_MAX);
        }
    }
}

Test(ring, a_cancel_goes_the_way_of_its_request)
{
    char folder[] = "/tmp/gqa-test-XXXXXX", text[TEXT_BYTES];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct gqa *g = NULL;
    struct gqa_params *p;
    struct gqa_error e;
    int unused, opened = 0, cancelled = 0, echoed = 0;
    uint32_t id;
    cr_assert_not_null(mkdtemp(folder));
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/s", folder);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert_eq(bind(listener, (const struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(listen(listener, 4), 0);
    pid_t pid = peer_start(serves_twice, &listener, &unused);
    const struct gqa_connect_options o = {.struct_size = sizeof(o),
                                          .flags = GQA_F_SHM_AUTO,
                                          .socket = address.sun_path,
                                          .timeout_ms = 20000};
    cr_assert_eq(gqa_connect(&o, &g, &e), 0);
    while (gqa_process(g) >= 0) {
        gqa_wait(g, UINT64_MAX);
    }

    cr_assert_eq(gqa_reconnect_async(g, 0, on_reopened, &opened, &e), 0);
    struct gqa_call_options call = {
        .struct_size = sizeof(call), .done = on_done, .arg = &cancelled};
    cr_assert_eq(gqa_call_async(g, "text.generate", NULL, &call, &id), 0);
    run_until(g, &opened);
    cr_assert(gqa_has_ring(g));
    memset(text, 'x', sizeof(text));
    cr_assert_eq(gqa_params_create(&p), 0);
    gqa_params_text(p, "text", text, sizeof(text));
    call.arg = &echoed;
    cr_assert_eq(gqa_call_async(g, "echo", p, &call, NULL), 0);
    cr_assert_eq(gqa_cancel(g, id), 0);
    run_until(g, &cancelled);
    run_until(g, &echoed);
    cr_expect_eq(cancelled, 1);
    cr_expect_eq(echoed, 1);
    gqa_params_destroy(p);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
    close(unused);
    close(listener);
    unlink(address.sun_path);
    rmdir(folder);
}

/* ---- a daemon that dies or lies ---------------------------------------------------------- */

enum lie { DIES, DISCARDS, TAIL, RECORD, GARBAGE };

static void lies(int fd, void *arg)
{
    static const uint8_t garbage[] = {0xc1, 0xc1};
    struct end e;
    size_t done = 0;
    open_rings(&e, fd, WELL);
    take_request(&e);
    switch (*(const enum lie *)arg) {
    case DIES:
        break;
    case DISCARDS: /* as the daemon does when it ends a connection */
        shutdown(fd, SHUT_RDWR);
        ring_map_discard(&e.map);
        break;
    case TAIL:
        atomic_store(&e.map.control->comp_tail, 0x10000);
        break;
    case RECORD:
        memset((uint8_t *)e.map.control + RING_CONTROL_BYTES + RING_BYTES_MIN, 0xff, 64);
        atomic_store(&e.map.control->comp_tail, 64);
        break;
    case GARBAGE:
        ring_out_put(&e.out, garbage, sizeof(garbage), &done);
        ring_out_publish(&e.out);
        break;
    }
    wake(&e, RING_WAIT_FUTEX | RING_WAIT_MESSAGE);
    if (*(const enum lie *)arg >= TAIL) {
        char byte;
        ssize_t n = read(fd, &byte, 1);
        (void)n;
    }
}

Test(ring, a_daemon_that_dies_or_lies_ends_the_calls_once)
{
    static enum lie all[] = {DIES, DISCARDS, TAIL, RECORD, GARBAGE};
    static const int codes[] = {-ECONNRESET, -ECONNRESET, -EPROTO, -EPROTO, -EPROTO};
    for (size_t i = 0; i < 2 * sizeof(all) / sizeof(all[0]); i++) {
        struct gqa *g = NULL;
        pid_t pid;
        int done = 0;
        const struct gqa_call_options o = {.struct_size = sizeof(o), .done = on_done, .arg = &done};
        cr_assert_eq(connect_to(lies, &all[i / 2], GQA_F_SHM, i % 2 * 100, &pid, &g), 0);
        cr_assert_eq(gqa_call_async(g, "echo", NULL, &o, NULL), 0);
        int r = 0;
        while (r >= 0) {
            r = gqa_process(g);
            if (r == 0) {
                gqa_wait(g, UINT64_MAX);
            }
        }
        cr_expect_eq(r, codes[i / 2], "lie %d: %d", (int)all[i / 2], r);
        cr_expect_eq(done, codes[i / 2]);
        cr_expect_eq(gqa_process(g), -ENOTCONN);
        cr_expect_not(gqa_has_ring(g));
        gqa_close(g);
        cr_assert_eq(peer_finish(pid), 0);
    }
}

/* ---- the data area ----------------------------------------------------------------------- */

#define N_ROWS 8u

/* Answers with an event and a result that name the same tensor, and expects it back twice. */
static void lends(int fd, void *arg)
{
    const uint64_t shape[2] = {N_ROWS, 4};
    const struct ipc_handle handle = {4096 + 64, N_ROWS * 4 * sizeof(float)};
    struct end e;
    open_rings(&e, fd, WELL);
    uint32_t id = take_request(&e);
    for (unsigned i = 0; i < N_ROWS * 4; i++) {
        ((float *)(e.map.data + handle.offset))[i] = (float)i;
    }
    for (int last = 0; last < 2; last++) {
        struct ipc_buffer b;
        ipc_buffer_init(&b);
        if (last) {
            ipc_pack_response_ok(&b, id);
        } else {
            ipc_pack_event(&b, id, 0);
        }
        ipc_pack_map(&b, 1);
        ipc_pack_str(&b, "rows");
        ipc_pack_tensor_f32_by_handle(&b, &handle, shape, 2);
        put(&e, &b);
        struct ipc_message m = take_message(&e);
        uint64_t offset = 0;
        if (m.kind != IPC_NOTIFICATION || memcmp(m.method.data, "$give", m.method.bytes) != 0 ||
            ipc_value_count(m.params) != 1 ||
            ipc_value_u64(ipc_value_at(m.params, 0), &offset) < 0 || offset != handle.offset) {
            _exit(11);
        }
        ipc_message_finish(&m);
        if (last) { /* what was given back is somebody else's */
            memset(e.map.data + handle.offset, 0xff, handle.bytes);
        }
    }
    take_request(&e); /* until the client leaves */
}

static void expect_rows(const struct gqa_value *map)
{
    struct gqa_tensor_view t;
    cr_assert_eq(gqa_value_tensor_f32(gqa_value_get(map, "rows"), &t), 0);
    cr_assert_eq(t.bytes, N_ROWS * 4 * sizeof(float));
    for (unsigned i = 0; i < N_ROWS * 4; i++) {
        float value;
        memcpy(&value, (const char *)t.data + i * sizeof(value), sizeof(value));
        cr_assert_eq(value, (float)i);
    }
}

static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    expect_rows(event);
    ++*(int *)arg;
}

Test(ring, tensors_are_read_in_place_and_given_back)
{
    struct gqa *g = NULL;
    struct gqa_reply *reply;
    pid_t pid;
    int n_events = 0;
    const struct gqa_call_options o = {
        .struct_size = sizeof(o), .event = on_rows, .arg = &n_events};
    cr_assert_eq(connect_to(lends, NULL, GQA_F_SHM, 0, &pid, &g), 0);
    cr_assert_eq(gqa_call(g, "text.logits", NULL, &o, &reply, NULL), 0);
    cr_assert_eq(n_events, 1);
    expect_rows(gqa_reply_value(reply));
    gqa_close(g);
    cr_assert_eq(peer_finish(pid), 0);
    expect_rows(gqa_reply_value(reply)); /* a copy of its own */
    gqa_reply_destroy(reply);
}

Test(ring, parameters_lie_in_shared_memory)
{
    static const char text[] = {(char)0x82, (char)0xa4, 'r', 'i', 'n', 'g', 64};
    struct gqa *g = NULL;
    struct gqa_params *p;
    struct gqa_reply *reply;
    void *first, *second, *none;
    pid_t pid;
    cr_assert_eq(connect_to(echoes, NULL, GQA_F_SHM, 0, &pid, &g), 0);
    cr_assert_eq(gqa_shared_take(g, 10, &first), 0);
    cr_assert_eq(gqa_shared_take(g, 100, &second), 0);
    cr_assert_eq(gqa_shared_take(g, 4096, &none), -ENOSPC);
    cr_assert_eq((char *)second - (char *)first, 64);
    cr_assert_eq(gqa_params_create(&p), 0);
    cr_assert_eq(gqa_params_shared(p, "tokens", g, second, 100), 0);
    cr_assert_eq(gqa_call(g, "echo", p, NULL, &reply, NULL), 0);
    expect_echo(gqa_reply_value(reply), text, sizeof(text));
    gqa_reply_destroy(reply);
    cr_assert_eq(gqa_params_shared(p, "other", g, p, 4), -EINVAL, "not in the area");
    gqa_params_destroy(p);
    cr_assert_eq(gqa_shared_give(g, second), 0);
    cr_assert_eq(gqa_shared_give(g, second), -ENOENT);
    cr_assert_eq(gqa_shared_give(g, g), -ENOENT);
    cr_assert_eq(gqa_shared_take(g, 4096 - 64, &second), 0);
    gqa_close(g);
    cr_assert_eq(peer_finish(pid), 0);
}
