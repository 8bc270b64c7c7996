#include "daemon/server_internal.h"

#include "daemon/log.h"
#include "daemon/notify.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A step that takes longer than this means that the engine hangs; then the watchdog starves. */
#define STEP_NS_MAX 60000000000u

#define CPU_READ_NS 100000u

/* ---- what the service needs of the loop -------------------------------------------------- */

static void host_drain(void *data, uint32_t timeout_ms)
{
    server_drain(data, timeout_ms);
}

static int host_reload(void *data, struct ipc_error *e)
{
    struct config_error why;
    if (server_reload(data, &why) < 0) {
        ipc_error_set(e, PROTO_E_INVALID_PARAMS, "the configuration stays as it was: %s", why.text);
        return -EINVAL;
    }
    return 0;
}

static void host_facts(void *data, struct service_host_facts *ret)
{
    const struct server *s = data;
    *ret = (struct service_host_facts){.n_connections = s->peers.n_peers,
                                       .n_turns = s->turns.count,
                                       .turn_ns_max = s->turns.ns_max,
                                       .turn_cpu_ns_max = s->turns.cpu_ns_max,
                                       .turn_ns_busy = s->turns.ns_busy};
}

/* Engine thread. */
static void on_engine_notify(void *arg)
{
    struct server *s = arg;
    uv_async_send(&s->engine_news);
}

static void on_engine_news(uv_async_t *handle)
{
    struct server *s = handle->data;
    service_pump(s->service);
    server_check_end(s);
}

static void on_task_news(uv_async_t *handle)
{
    struct server *s = handle->data;
    tasks_deliver(s);
    server_check_end(s);
}

static void on_peer_closed(struct peer_host *host)
{
    struct server *s = server_of_peers(host);
    if (s->only_client && host->n_peers == 0 && s->state < SERVER_DRAINING) {
        log_info("the only client has left");
        server_drain(s, 0);
    }
}

static uint64_t thread_cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void note_computing(struct turns *t, uint64_t busy)
{
    t->unread_ns += busy;
    if (t->unread_ns >= CPU_READ_NS) {
        uint64_t cpu = thread_cpu_ns();
        t->cpu_ns_max = cpu - t->cpu_ns > t->cpu_ns_max ? cpu - t->cpu_ns : t->cpu_ns_max;
        t->cpu_ns = cpu;
        t->unread_ns = 0;
    }
}

/* A turn of the loop begins when it wakes and ends before it sleeps again: for so long nobody else
 * is served. libuv calls back from inside of the wait, so the time slept is taken off. The clock
 * also counts while the kernel runs somebody else on the loop's core; the thread's own does not,
 * and what it took to fall asleep and wake is in it. Reading that one is a call into the kernel, a
 * tenth of what a short turn takes: short ones are taken together up to CPU_READ_NS. */
static void measure_turn(struct server *s)
{
    struct turns *t = &s->turns;
    uint64_t now = uv_hrtime();
    uint64_t slept = uv_metrics_idle_time(&s->loop);
    if (t->ended_ns == 0) {
        t->cpu_ns = thread_cpu_ns();
    } else if (now - t->ended_ns >= slept - t->slept_ns) {
        uint64_t busy = now - t->ended_ns - (slept - t->slept_ns);
        t->count++;
        t->ns_busy += busy;
        t->ns_max = busy > t->ns_max ? busy : t->ns_max;
        note_computing(t, busy);
    }
    t->ended_ns = now;
    t->slept_ns = slept;
}

static void on_before_sleep(uv_prepare_t *handle)
{
    struct server *s = handle->data;
    peers_serve(&s->peers);
    peers_serve_rings(&s->peers);
    server_check_end(s);
    measure_turn(s);
}

/* A core is idle for certain while no step runs, or where there are more than compute. */
static bool has_idle_core(const struct peer_host *host)
{
    const struct server *s =
        (const struct server *)((const char *)host - offsetof(struct server, peers));
    return s->n_cores > s->config->threads || engine_step_started_ns(s->parts.engine) == 0;
}

/* ---- signals, timers --------------------------------------------------------------------- */

static void on_end_signal(uv_signal_t *handle, int signum)
{
    struct server *s = handle->data;
    if (s->n_signals++ > 0) {
        log_warning("signal %d again: ending at once", signum);
        listen_close(s);
        _exit(128 + signum);
    }
    log_info("signal %d: finishing", signum);
    server_drain(s, s->config->drain_timeout_ms);
}

static void on_reload_signal(uv_signal_t *handle, int signum)
{
    struct config_error err;
    if (server_reload(handle->data, &err) < 0) {
        log_error("the configuration stays as it was: %s", err.text);
    }
}

static void on_lifetime(uv_poll_t *handle, int status, int events)
{
    struct server *s = handle->data;
    char byte;
    ssize_t n = read(s->lifetime_fd, &byte, sizeof(byte));
    if (status >= 0 && (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))) {
        return; /* what is written there means nothing */
    }
    uv_poll_stop(&s->lifetime);
    log_info("whoever started this daemon has ended: ending as well");
    server_drain(s, 0);
}

/* The watchdog hears of the loop by the ping itself, and of the engine by the age of its step. */
static void feed_watchdog(struct server *s, uint64_t now)
{
    if (s->watchdog_usec == 0 || now - s->watchdog_sent_ns < s->watchdog_usec * 1000 / 3) {
        return;
    }
    uint64_t step = engine_step_started_ns(s->parts.engine);
    if (step != 0 && now > step && now - step > STEP_NS_MAX) {
        log_error("the engine's step has not ended for %llu s",
                  (unsigned long long)((now - step) / 1000000000u));
        return;
    }
    s->watchdog_sent_ns = now;
    notify_watchdog();
}

static void on_tick(uv_timer_t *timer)
{
    struct server *s = timer->data;
    uint64_t now = uv_hrtime();
    peers_check_deadlines(&s->peers);
    penalty_tick(&s->penalties, now);
    registry_relieve(s->parts.registry);
    feed_watchdog(s, now);
    if (s->state == SERVER_STARTING) {
        notify_extend_timeout(30 * SERVER_TICK_MS * 1000);
    }
}

/* ---- creation ---------------------------------------------------------------------------- */

static int start_signals(struct server *s)
{
    const struct {
        uv_signal_t *handle;
        uv_signal_cb callback;
        int signum;
    } signals[] = {{&s->on_hup, on_reload_signal, SIGHUP},
                   {&s->on_term, on_end_signal, SIGTERM},
                   {&s->on_int, on_end_signal, SIGINT}};
    for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++) {
        uv_signal_init(&s->loop, signals[i].handle);
        signals[i].handle->data = s;
        int rc = uv_signal_start(signals[i].handle, signals[i].callback, signals[i].signum);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

static int start_lifetime(struct server *s, int fd)
{
    if (fd < 0) {
        return 0;
    }
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
        fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        int rc = -errno;
        log_error("--lifetime-fd %d: %s", fd, strerror(-rc));
        return rc;
    }
    int rc = uv_poll_init(&s->loop, &s->lifetime, fd);
    if (rc == 0) {
        s->lifetime_fd = fd;
        s->lifetime.data = s;
        rc = uv_poll_start(&s->lifetime, UV_READABLE | UV_DISCONNECT, on_lifetime);
    }
    if (rc < 0) {
        log_error("--lifetime-fd %d: %s", fd, uv_strerror(rc));
    }
    return rc;
}

static int start_loop(struct server *s)
{
    int rc = uv_loop_init(&s->loop);
    if (rc < 0) {
        return rc;
    }
    uv_loop_configure(&s->loop, UV_METRICS_IDLE_TIME);
    rc = peers_init(&s->peers, &s->loop);
    rc = rc < 0 ? rc : peer_alarm_init(&s->rested, &s->loop, listen_rested);
    if (rc < 0) {
        return rc;
    }
    uv_async_init(&s->loop, &s->engine_news, on_engine_news);
    uv_async_init(&s->loop, &s->task_news, on_task_news);
    uv_prepare_init(&s->loop, &s->before_sleep);
    uv_timer_init(&s->loop, &s->tick);
    uv_timer_init(&s->loop, &s->deadline);
    s->engine_news.data = s->task_news.data = s->before_sleep.data = s;
    s->tick.data = s->deadline.data = s;
    uv_prepare_start(&s->before_sleep, on_before_sleep);
    uint64_t tick_ms = SERVER_TICK_MS;
    s->watchdog_usec = notify_watchdog_usec();
    if (s->watchdog_usec > 0 && s->watchdog_usec / 4000 < tick_ms) {
        tick_ms = s->watchdog_usec / 4000 + 1;
    }
    uv_timer_start(&s->tick, on_tick, tick_ms, tick_ms);
    return start_signals(s);
}

static int start_service(struct server *s)
{
    int rc = parts_create(&s->parts, s->config, s->in_memory, on_engine_notify, s);
    if (rc < 0) {
        return rc;
    }
    const struct service_options options = {.engine = s->parts.engine,
                                            .registry = s->parts.registry,
                                            .catalogue = s->parts.catalogue,
                                            .quotas = &s->quotas,
                                            .penalties = &s->penalties,
                                            .realm = s->config->kv_realm,
                                            .host = {.data = s,
                                                     .run = tasks_run,
                                                     .recall = tasks_recall,
                                                     .post = tasks_post,
                                                     .drain = host_drain,
                                                     .reload = host_reload,
                                                     .facts = host_facts}};
    rc = service_create(&options, &s->service);
    if (rc < 0) {
        return rc;
    }
    s->peers.service = s->service;
    s->peers.quotas = &s->quotas;
    s->peers.penalties = &s->penalties;
    s->peers.on_closed = on_peer_closed;
    s->peers.has_idle_core = has_idle_core;
    return server_apply_live(s);
}

int server_create(const struct server_options *options, struct server **ret)
{
    struct server *s = calloc(1, sizeof(*s));
    if (!s) {
        return -ENOMEM;
    }
    s->config = options->config;
    s->source = options->source;
    s->reserve_fd = s->lifetime_fd = -1;
    s->n_cores = uv_available_parallelism();
    TAILQ_INIT(&s->posted);
    pthread_mutex_init(&s->posted_lock, NULL);
    task_queue_init(&s->tasks);
    quota_init(&s->quotas);
    penalty_init(&s->penalties);

    int rc = start_loop(s);
    if (rc < 0) {
        log_error("the event loop cannot be made: %s", uv_strerror(rc));
        pthread_mutex_destroy(&s->posted_lock);
        free(s);
        return rc;
    }
    s->in_memory = options->temporary_cache;
    rc = places_create(s);
    rc = rc < 0 ? rc : start_service(s);
    rc = rc < 0 ? rc : listen_open(s, options);
    rc = rc < 0 ? rc : start_lifetime(s, options->lifetime_fd);
    if (rc == 0 && options->serve_fd >= 0) {
        rc = listen_adopt(s, options->serve_fd);
        s->only_client = s->n_listeners == 0;
    }
    if (rc < 0) {
        s->config = NULL; /* stays the caller's */
        server_destroy(s);
        return rc;
    }
    *ret = s;
    return 0;
}

/* ---- running ----------------------------------------------------------------------------- */

static void begin_serving(struct server *s)
{
    s->state = SERVER_SERVING;
    notify_ready();
    /* Scripts wait for this line. */
    printf("READY\n");
    fflush(stdout);
}

static void on_preloaded(void *arg, int result)
{
    struct server *s = arg;
    if (--s->n_preloading == 0 && s->state == SERVER_STARTING) {
        begin_serving(s);
    }
}

int server_run(struct server *s)
{
    const struct config_list *models = &s->config->model;
    /* One more than there are models, so that none of them can be the last before all are asked. */
    s->n_preloading = (uint32_t)models->count + 1;
    for (size_t i = 0; i < models->count; i++) {
        service_preload(s->service, models->items[i], on_preloaded, s);
    }
    on_preloaded(s, 0);
    return uv_run(&s->loop, UV_RUN_DEFAULT) < 0 ? -EIO : 0;
}

static void close_handle(uv_handle_t *handle, void *arg)
{
    if (!uv_is_closing(handle)) {
        uv_close(handle, NULL);
    }
}

bool server_destroy(struct server *s)
{
    if (!s) {
        return true;
    }
    listen_close(s);
    if (s->service) {
        peers_close(&s->peers);
        service_stop(s->service);
    }
    /* The engine's and the registry's threads report their ends, which may make tasks. The pool's
     * tasks end, of which some copy what the engine holds, but for those that have not begun; then
     * nobody is left who could post but a purge that the engine's end waits for. */
    bool ended = parts_stop(&s->parts);
    tasks_deliver(s);
    tasks_give_up(s);
    uv_walk(&s->loop, close_handle, NULL);
    if (!tasks_end(s) || !ended) {
        engine_settle_cache(s->parts.engine); /* which those that copy still read */
        return false;
    }
    parts_destroy_engine(&s->parts);
    tasks_deliver(s);
    uv_run(&s->loop, UV_RUN_DEFAULT);
    uv_loop_close(&s->loop);
    peers_finish(&s->peers);
    peer_alarm_finish(&s->rested);
    service_destroy(s->service);
    parts_destroy(&s->parts);
    quota_finish(&s->quotas);
    penalty_finish(&s->penalties);
    if (s->reserve_fd >= 0) {
        close(s->reserve_fd);
    }
    if (s->lifetime_fd >= 0) {
        close(s->lifetime_fd);
    }
    pthread_mutex_destroy(&s->posted_lock);
    config_destroy(s->config);
    free(s);
    return true;
}
