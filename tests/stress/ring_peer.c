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
#include "tests/stress/hostile/ring_enemy.h"

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

#define N_GOOD      3u
#define N_HOSTILE   2u
#define N_HARMS     400u /* of one hostile connection */
#define N_RINGERS   2u
#define GOOD_UID    1000u
#define HOSTILE_UID 1001u

static struct {
    uv_loop_t loop;
    uv_async_t news;
    uv_prepare_t before_sleep;
    uv_timer_t tick;
    struct peer_host host;
    struct service *service;
    struct quota_table quotas;
    struct penalty_table penalties;
    struct task_list tasks; /* the loop's own: long messages that are being parsed */

    pthread_mutex_t lock; /* of what follows */
    struct arrival {
        int fd;
        uid_t uid;
    } arriving[64];
    size_t n_arriving;
    bool ending;

    atomic_uint n_answers, n_hostile_left, n_hostile_done, n_bells;
    uint64_t ended_ns, turn_ns_max, slept_ns;
    unsigned n_slowed_ticks;
} s;

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
    TAILQ_INSERT_HEAD(&s.tasks, t, entry);
    uv_async_send(&s.news);
    return 0;
}

/* They count as running from the beginning. */
static bool has_begun(void *data, struct task *t)
{
    return false;
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
    while ((t = TAILQ_FIRST(&s.tasks)) != NULL) {
        TAILQ_REMOVE(&s.tasks, t, entry);
        t->work(t);
        t->done(t);
    }
    pthread_mutex_lock(&s.lock);
    while (s.n_arriving > 0) {
        struct quota_amounts held = {.of = {[QUOTA_CONNECTIONS] = 1, [QUOTA_FDS] = 1}};
        struct ipc_error e;
        const struct arrival a = s.arriving[--s.n_arriving];
        int rc = quota_take(&s.quotas, a.uid, &held, &e);
        rc = rc < 0 ? rc : peer_create(&s.host, a.fd, a.uid, false, &held);
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
    uint64_t now = uv_hrtime();
    peers_check_deadlines(&s.host);
    penalty_tick(&s.penalties, now);
    const struct penalty *p = penalty_find(&s.penalties, HOSTILE_UID);
    s.n_slowed_ticks += p && p->slowed;
    on_news(&s.news);
}

static void start_daemon(void)
{
    const struct service_options options = {
        .quotas = &s.quotas,
        .penalties = &s.penalties,
        .host = {.run = run_task, .recall = has_begun, .facts = no_facts},
        .limits = {.calls_per_connection = 64}};
    pthread_mutex_init(&s.lock, NULL);
    TAILQ_INIT(&s.tasks);
    quota_init(&s.quotas);
    penalty_init(&s.penalties);
    /* The hostile ones are slowed again and again, and forgiven: both ways to serve them. */
    s.penalties.limits = (struct penalty_limits){.strikes_max = 200, .share_permille = 300};
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

static int connect_peer(uid_t uid)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0) {
        fail("socketpair", -errno);
    }
    pthread_mutex_lock(&s.lock);
    s.arriving[s.n_arriving++] = (struct arrival){pair[0], uid};
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
                                        .fd = connect_peer(GOOD_UID),
                                        .timeout_ms = 120000,
                                        .spin_us = enemy_random(&x) % 2 * 50,
                                        .ring_in_bytes = 4096,
                                        .ring_out_bytes = 4096};
        int r = gqa_connect(&o, &g, &e);
        if (r < 0) {
            fail(e.message, r);
        }
        for (unsigned i = 0; i < 200; i++) {
            struct gqa_params *p;
            gqa_params_create(&p);
            gqa_params_text(p, "text", text, i % 50 == 0 ? sizeof(text) : enemy_random(&x) % 64);
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

/* Rings as long as the others are at work; with a pause of so many ns, or without. */
static void *ringer(void *arg)
{
    const struct timespec pause = {.tv_nsec = (long)(uintptr_t)arg};
    const uint64_t one = 1;
    struct ring_enemy e;
    int rc = ring_enemy_open(&e, connect_peer(HOSTILE_UID), 1);
    if (rc < 0) {
        fail("a ringer was not let in", rc);
    }
    while (atomic_load(&s.n_hostile_left) > 0) {
        if (write(e.fds[2], &one, sizeof(one)) > 0) {
            atomic_fetch_add(&s.n_bells, 1);
        }
        if (pause.tv_nsec > 0) {
            nanosleep(&pause, NULL);
        }
    }
    ring_enemy_close(&e);
    return NULL;
}

static void *hostile(void *arg)
{
    uint64_t x = (uintptr_t)arg;
    while (atomic_load(&s.n_hostile_done) < atomic_load(&s.n_hostile_left)) {
        struct ring_enemy e;
        int rc = ring_enemy_open(&e, connect_peer(HOSTILE_UID), x + enemy_random(&x));
        if (rc < 0 && rc != -EPIPE) {
            fail("an enemy was not let in", rc);
        }
        unsigned n = rc == 0 ? enemy_random(&e.x) % N_HARMS : 0;
        for (unsigned i = 0; i < n; i++) {
            ring_enemy_harm(&e);
        }
        ring_enemy_close(&e);
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
           "longest turn %.2f ms, slowed for %u ticks\n",
           seed, atomic_load(&s.n_hostile_done), atomic_load(&s.n_bells), atomic_load(&s.n_answers),
           (double)s.turn_ns_max / 1e6, s.n_slowed_ticks);
    if (after > before || atomic_load(&s.n_answers) == 0) {
        fprintf(stderr, "ring_peer: %d descriptors before, %d after\n", before, after);
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
