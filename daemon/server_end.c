/* The end: draining, cutting what takes too long, delivering the last answers. */
#include "daemon/server_internal.h"

#include "daemon/log.h"
#include "daemon/notify.h"

static void enter_ending(struct server *s);

static void on_end_deadline(uv_timer_t *timer)
{
    struct server *s = timer->data;
    s->state = SERVER_STOPPED;
    uv_stop(&s->loop);
}

static void on_cut_deadline(uv_timer_t *timer)
{
    struct server *s = timer->data;
    log_warning("%u calls did not end when they were cancelled", service_n_open(s->service));
    enter_ending(s);
}

static void enter_cutting(struct server *s)
{
    s->state = SERVER_CUTTING;
    if (service_n_open(s->service) > 0) {
        log_info("the time is up: %u calls are cut", service_n_open(s->service));
    }
    uv_timer_start(&s->deadline, on_cut_deadline, SERVER_CUT_MS, 0);
    peers_cut(&s->peers);
}

static void on_drain_deadline(uv_timer_t *timer)
{
    struct server *s = timer->data;
    enter_cutting(s);
    server_check_end(s);
}

/* All calls are answered: those who asked for the drain hear of it, and connections close as their
 * output leaves. */
static void enter_ending(struct server *s)
{
    s->state = SERVER_ENDING;
    service_drained(s->service);
    peers_end(&s->peers);
    uv_timer_start(&s->deadline, on_end_deadline, SERVER_END_MS, 0);
}

void server_drain(struct server *s, uint32_t timeout_ms)
{
    if (s->state >= SERVER_DRAINING) {
        if (timeout_ms == 0 && s->state == SERVER_DRAINING) {
            enter_cutting(s);
        }
        return;
    }
    s->state = SERVER_DRAINING;
    notify_stopping();
    notify_extend_timeout((uint64_t)(timeout_ms + SERVER_CUT_MS + SERVER_END_MS + SERVER_LOADS_MS +
                                     SERVER_TASKS_MS + SERVER_DISK_MS) *
                          1000);
    listen_close(s); /* another daemon may take the place at once */
    service_drain(s->service);
    peers_notify_draining(&s->peers);
    if (timeout_ms == 0) {
        enter_cutting(s);
    } else {
        uv_timer_start(&s->deadline, on_drain_deadline, timeout_ms, 0);
    }
    uv_async_send(&s->task_news); /* the state is looked at after whatever called us */
}

void server_check_end(struct server *s)
{
    if ((s->state == SERVER_DRAINING || s->state == SERVER_CUTTING) &&
        service_n_open(s->service) == 0) {
        enter_ending(s);
        uv_async_send(&s->task_news); /* one more turn of the loop flushes what was said */
    } else if (s->state == SERVER_ENDING && s->peers.n_peers == 0) {
        s->state = SERVER_STOPPED;
        uv_stop(&s->loop);
    }
}
