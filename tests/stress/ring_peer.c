/* ring_peer - the daemon's peers on their loop, in one process with clients that use rings well and
 * clients that do not: they flip shared bytes while the daemon looks at them, let indices jump,
 * flood the doorbell and take away its O_NONBLOCK, never take an answer, and leave at any moment;
 * two ring the doorbell for nothing all the time, a thousand times a second and as fast as it goes.
 * Good clients get every answer, nothing is left behind, and the longest turn of the loop is told.
 * Also for -Db_sanitize=thread and =address.
 *
 *   ring_peer [CONNECTIONS [SEED]]      of hostile clients; default 60 */
#include "daemon/log.h"
#include "daemon/peer.h"
#include "ipc/ring_map.h"

#include <gqa/client.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define N_GOOD    3u
#define N_HOSTILE 2u
#define N_HARMS   400u /* of one hostile connection */
#define N_RINGERS 2u

static struct {
    uv_loop_t loop;
    uv_async_t news;
    uv_prepare_t before_sleep;
    uv_timer_t tick;
    struct peer_host host;
    struct service *service;
    struct quota_table quotas;
    struct penalty_table penalties;
    struct task *tasks; /* the loop's own: long messages that are being parsed */

    pthread_mutex_t lock; /* of what follows */
    int arriving[64];
    size_t n_arriving;
    bool ending;

    atomic_uint n_answers, n_hostile_left, n_hostile_done, n_bells;
    uint64_t ended_ns, turn_ns_max, slept_ns;
} s;

static uint32_t next(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return (uint32_t)(*x >> 32);
}

static void fail(const char *what, int rc)
{
    fprintf(stderr, "ring_peer: %s: %s\n", what, strerror(-rc));
    _exit(EXIT_FAILURE);
}

static int count_fds(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (d && readdir(d)) {
        n++;
    }
    closedir(d);
    return n;
}

/* ---- the daemon's side ------------------------------------------------------------------- */

static int run_task(void *data, struct task *t)
{
    t->next = s.tasks;
    s.tasks = t;
    uv_async_send(&s.news);
    return 0;
}

static void no_facts(void *data, struct service_host_facts *ret)
{
}

static bool core_is_idle(const struct peer_host *host)
{
    return true;
}

static void peer_left(struct peer_host *host)
{
}

static void on_news(uv_async_t *handle)
{
    struct task *t;
    while ((t = s.tasks) != NULL) {
        s.tasks = t->next;
        t->work(t);
        t->done(t);
    }
    pthread_mutex_lock(&s.lock);
    while (s.n_arriving > 0) {
        struct quota_amounts held = {.of = {[QUOTA_CONNECTIONS] = 1, [QUOTA_FDS] = 1}};
        struct ipc_error e;
        int rc = quota_take(&s.quotas, 1000, &held, &e);
        rc = rc < 0 ? rc : peer_create(&s.host, s.arriving[--s.n_arriving], 1000, false, &held);
        if (rc < 0) {
            fail("peer_create", rc);
        }
    }
    if (s.ending && s.host.n_peers == 0) {
        uv_stop(&s.loop);
    }
    pthread_mutex_unlock(&s.lock);
}

static void on_before_sleep(uv_prepare_t *handle)
{
    peers_serve(&s.host);
    peers_serve_rings(&s.host);
    uint64_t now = uv_hrtime(), slept = uv_metrics_idle_time(&s.loop);
    if (s.ended_ns != 0 && now - s.ended_ns >= slept - s.slept_ns) {
        uint64_t busy = now - s.ended_ns - (slept - s.slept_ns);
        s.turn_ns_max = busy > s.turn_ns_max ? busy : s.turn_ns_max;
    }
    s.ended_ns = now;
    s.slept_ns = slept;
}

static void on_tick(uv_timer_t *timer)
{
    peers_check_deadlines(&s.host);
    on_news(&s.news);
}

static void start_daemon(void)
{
    const struct service_options options = {.quotas = &s.quotas,
                                            .penalties = &s.penalties,
                                            .host = {.run = run_task, .facts = no_facts},
                                            .limits = {.calls_per_connection = 64}};
    pthread_mutex_init(&s.lock, NULL);
    quota_init(&s.quotas);
    penalty_init(&s.penalties);
    s.penalties.limits = (struct penalty_limits){1000, 5};
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        s.quotas.limits.of[k] = 1ull << 40;
    }
    uv_loop_init(&s.loop);
    uv_loop_configure(&s.loop, UV_METRICS_IDLE_TIME);
    uv_async_init(&s.loop, &s.news, on_news);
    uv_prepare_init(&s.loop, &s.before_sleep);
    uv_timer_init(&s.loop, &s.tick);
    uv_prepare_start(&s.before_sleep, on_before_sleep);
    uv_timer_start(&s.tick, on_tick, 20, 20);
    int rc = peers_init(&s.host, &s.loop);
    if (rc < 0) {
        fail("peers_init", rc);
    }
    rc = service_create(&options, &s.service);
    if (rc < 0) {
        fail("service_create", rc);
    }
    s.host.service = s.service;
    s.host.quotas = &s.quotas;
    s.host.penalties = &s.penalties;
    s.host.handshake_ns = s.host.reader_timeout_ns = s.host.paused_timeout_ns = 60000000000u;
    s.host.ring_poll_ns = 50000;
    s.host.has_idle_core = core_is_idle;
    s.host.on_closed = peer_left;
}

static void close_handle(uv_handle_t *handle, void *arg)
{
    if (!uv_is_closing(handle)) {
        uv_close(handle, NULL);
    }
}

static void stop_daemon(void)
{
    uv_walk(&s.loop, close_handle, NULL);
    uv_run(&s.loop, UV_RUN_DEFAULT);
    if (uv_loop_close(&s.loop) != 0 || !LIST_EMPTY(&s.host.awake)) {
        fail("handles or rings are left", -EBUSY);
    }
    if (!LIST_EMPTY(&s.quotas.users)) {
        fail("quotas are still held", -EBUSY);
    }
    service_destroy(s.service);
    quota_finish(&s.quotas);
    penalty_finish(&s.penalties);
    peers_finish(&s.host);
}

/* ---- a new connection -------------------------------------------------------------------- */

static int connect_peer(void)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0) {
        fail("socketpair", -errno);
    }
    pthread_mutex_lock(&s.lock);
    s.arriving[s.n_arriving++] = pair[0];
    pthread_mutex_unlock(&s.lock);
    uv_async_send(&s.news);
    return pair[1];
}

/* ---- clients that do well ---------------------------------------------------------------- */

/* As long as the hostile ones are at work, however they wait; every answer must come. */
static void *good(void *arg)
{
    uint64_t x = 0x9e3779b97f4a7c15u ^ (uintptr_t)arg;
    static char text[200000];
    while (atomic_load(&s.n_hostile_left) > 0) {
        struct gqa *g;
        struct gqa_error e;
        struct gqa_connect_options o = {.struct_size = sizeof(o),
                                        .flags = GQA_CONNECT_FD | GQA_F_SHM,
                                        .fd = connect_peer(),
                                        .timeout_ms = 120000,
                                        .spin_us = next(&x) % 2 * 50,
                                        .ring_in_bytes = 4096,
                                        .ring_out_bytes = 4096};
        int r = gqa_connect(&o, &g, &e);
        if (r < 0) {
            fail(e.message, r);
        }
        for (unsigned i = 0; i < 200; i++) {
            struct gqa_params *p;
            gqa_params_create(&p);
            gqa_params_text(p, "text", text, i % 50 == 0 ? sizeof(text) : next(&x) % 64);
            r = gqa_call(g, i % 16 == 0 ? "gqa.api_info" : "gqa.ping", p, NULL, NULL, &e);
            gqa_params_destroy(p);
            if (r < 0) {
                fail(e.message, r);
            }
            atomic_fetch_add(&s.n_answers, 1);
        }
        gqa_close(g);
    }
    return NULL;
}

/* ---- clients that do not ----------------------------------------------------------------- */

struct enemy {
    int fd, fds[3];
    struct ring_map map;
    struct ring_in in;
    struct ring_out out;
    uint64_t x;
};

/* ring.open by hand; what comes before the whole answer is the answer. */
static bool open_rings(struct enemy *e)
{
    static const struct ring_sizes sizes = {4096, 4096, 4096};
    union {
        char space[CMSG_SPACE(sizeof(e->fds))];
        struct cmsghdr align;
    } control;
    char data[512];
    struct iovec iov = {.iov_base = data, .iov_len = sizeof(data)};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control.space,
                         .msg_controllen = sizeof(control.space)};
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 1, "ring.open");
    ipc_pack_map(&b, 3);
    ipc_pack_str(&b, "ring_bytes");
    ipc_pack_u64(&b, sizes.ring_bytes);
    ipc_pack_str(&b, "in_bytes");
    ipc_pack_u64(&b, sizes.in_bytes);
    ipc_pack_str(&b, "out_bytes");
    ipc_pack_u64(&b, sizes.out_bytes);
    fcntl(e->fd, F_SETFL, fcntl(e->fd, F_GETFL) & ~O_NONBLOCK);
    bool sent = send(e->fd, b.data, b.bytes, MSG_NOSIGNAL) == (ssize_t)b.bytes;
    ipc_buffer_finish(&b);
    if (!sent || recvmsg(e->fd, &msg, MSG_CMSG_CLOEXEC) <= 0) {
        return false;
    }
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    if (!c || c->cmsg_len != CMSG_LEN(sizeof(e->fds))) {
        fail("ring.open brought no descriptors", -EPROTO);
    }
    memcpy(e->fds, CMSG_DATA(c), sizeof(e->fds));
    int rc = ring_map_open(e->fds, &sizes, &e->map);
    if (rc < 0) {
        fail("ring_map_open", rc);
    }
    ring_map_client_ends(&e->map, &e->in, &e->out);
    return true;
}

static void ask(struct enemy *e)
{
    struct ipc_buffer b;
    size_t done = 0;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 2 + next(&e->x) % 1000, next(&e->x) % 8 ? "gqa.api_info" : "ring.close");
    ipc_pack_map(&b, 0);
    ring_out_put(&e->out, b.data, b.bytes, &done);
    ring_out_publish(&e->out);
    ipc_buffer_finish(&b);
}

static void flip(struct enemy *e)
{
    size_t bytes = RING_CONTROL_BYTES + 2 * 4096;
    volatile uint8_t *at = (uint8_t *)e->map.control;
    size_t place = next(&e->x) % 4 ? 128 + next(&e->x) % 900 : next(&e->x) % bytes;
    at[place] ^= (uint8_t)(1u << next(&e->x) % 8);
}

static void jump(struct enemy *e)
{
    struct ring_control *c = e->map.control;
    _Atomic uint32_t *const words[] = {&c->sub_tail,    &c->comp_head, &c->daemon_wait,
                                       &c->client_wait, &c->sub_head,  &c->comp_tail};
    _Atomic uint32_t *word = words[next(&e->x) % 6];
    atomic_store(word, next(&e->x) % 3 ? atomic_load(word) + next(&e->x) % 64 * 8 : next(&e->x));
}

/* The doorbell's count to the brim, without O_NONBLOCK, or drained under the daemon's eyes. */
static void flood(struct enemy *e)
{
    uint64_t count = UINT64_MAX - 1;
    fcntl(e->fds[2], F_SETFL, fcntl(e->fds[2], F_GETFL) | O_NONBLOCK);
    ssize_t n = next(&e->x) % 2 ? write(e->fds[2], &count, sizeof(count))
                                : read(e->fds[2], &count, sizeof(count));
    (void)n;
    fcntl(e->fds[2], F_SETFL, fcntl(e->fds[2], F_GETFL) & ~O_NONBLOCK);
}

static void harm(struct enemy *e)
{
    char scratch[256];
    switch (next(&e->x) % 8) {
    case 0:
        flip(e);
        break;
    case 1:
        jump(e);
        break;
    case 2:
    case 3:
        flood(e);
        break;
    case 4: { /* sometimes it behaves */
        static _Thread_local uint8_t record[RING_RECORD_MAX];
        size_t bytes;
        bool last;
        while (ring_in_take(&e->in, PROTO_FRAME_BYTES_MAX, record, &bytes, &last) == 1) {
        }
        ring_in_publish(&e->in);
        break;
    }
    case 5:
        while (recv(e->fd, scratch, sizeof(scratch), MSG_DONTWAIT) > 0) {
        }
        break;
    default:
        ask(e);
        flood(e);
    }
}

static void close_rings(struct enemy *e)
{
    ring_map_finish(&e->map);
    for (unsigned i = 0; i < 3; i++) {
        close(e->fds[i]);
    }
}

/* Rings as long as the others are at work; with a pause of so many ns, or without. */
static void *ringer(void *arg)
{
    const struct timespec pause = {.tv_nsec = (long)(uintptr_t)arg};
    const uint64_t one = 1;
    struct enemy e = {.fd = connect_peer()};
    if (!open_rings(&e)) {
        fail("a ringer was not let in", -EPROTO);
    }
    while (atomic_load(&s.n_hostile_left) > 0) {
        if (write(e.fds[2], &one, sizeof(one)) > 0) {
            atomic_fetch_add(&s.n_bells, 1);
        }
        if (pause.tv_nsec > 0) {
            nanosleep(&pause, NULL);
        }
    }
    close_rings(&e);
    close(e.fd);
    return NULL;
}

static void *hostile(void *arg)
{
    uint64_t x = (uintptr_t)arg;
    while (atomic_load(&s.n_hostile_done) < atomic_load(&s.n_hostile_left)) {
        struct enemy e = {.fd = connect_peer(), .x = x + next(&x)};
        if (open_rings(&e)) {
            unsigned n = next(&e.x) % N_HARMS;
            for (unsigned i = 0; i < n; i++) {
                harm(&e);
            }
            close_rings(&e);
        }
        close(e.fd);
        atomic_fetch_add(&s.n_hostile_done, 1);
    }
    return NULL;
}

/* ---- all of it --------------------------------------------------------------------------- */

static void *run_clients(void *arg)
{
    static const uintptr_t pauses_ns[N_RINGERS] = {1000000, 0};
    pthread_t g[N_GOOD], h[N_HOSTILE], b[N_RINGERS];
    uintptr_t seed = (uintptr_t)arg;
    for (uintptr_t i = 0; i < N_GOOD; i++) {
        pthread_create(&g[i], NULL, good, (void *)(seed + i));
    }
    for (uintptr_t i = 0; i < N_HOSTILE; i++) {
        pthread_create(&h[i], NULL, hostile, (void *)(seed * 7919 + i + 1));
    }
    for (unsigned i = 0; i < N_RINGERS; i++) {
        pthread_create(&b[i], NULL, ringer, (void *)pauses_ns[i]);
    }
    for (unsigned i = 0; i < N_HOSTILE; i++) {
        pthread_join(h[i], NULL);
    }
    atomic_store(&s.n_hostile_left, 0);
    for (unsigned i = 0; i < N_RINGERS; i++) {
        pthread_join(b[i], NULL);
    }
    for (unsigned i = 0; i < N_GOOD; i++) {
        pthread_join(g[i], NULL);
    }
    pthread_mutex_lock(&s.lock);
    s.ending = true;
    pthread_mutex_unlock(&s.lock);
    uv_async_send(&s.news);
    return NULL;
}

int main(int argc, char **argv)
{
    unsigned long n = argc > 1 ? strtoul(argv[1], NULL, 10) : 60;
    unsigned long seed = argc > 2 ? strtoul(argv[2], NULL, 10) : 88172645;
    pthread_t clients;
    uv_loop_t first; /* libuv keeps a few descriptors from its first loop on */
    uv_loop_init(&first);
    uv_loop_close(&first);
    int before = count_fds();
    log_init(LOG_LEVEL_ERROR); /* it warns of every client that it cuts, which is all of them */
    atomic_store(&s.n_hostile_left, (unsigned)n);
    start_daemon();
    pthread_create(&clients, NULL, run_clients, (void *)(uintptr_t)seed);
    uv_run(&s.loop, UV_RUN_DEFAULT);
    pthread_join(clients, NULL);
    stop_daemon();
    int after = count_fds();
    printf("ring_peer: seed %lu, %u hostile connections, %u doorbells, %u answers to others, "
           "longest turn %.2f ms\n",
           seed, atomic_load(&s.n_hostile_done), atomic_load(&s.n_bells), atomic_load(&s.n_answers),
           (double)s.turn_ns_max / 1e6);
    if (after > before || atomic_load(&s.n_answers) == 0) {
        fprintf(stderr, "ring_peer: %d descriptors before, %d after\n", before, after);
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
