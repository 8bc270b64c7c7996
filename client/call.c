/* client/call.c - calls from their start to their one end. */
#include "client/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct client_pending *find(struct gqa *g, uint32_t id)
{
    struct client_pending *p = g->pending;
    while (p != NULL && p->id != id) {
        p = p->next;
    }
    return p;
}

static void unlink_call(struct gqa *g, struct client_pending *p)
{
    struct client_pending **at = &g->pending;
    while (*at != p) {
        at = &(*at)->next;
    }
    *at = p->next;
    g->n_pending--;
}

static void append_call(struct gqa *g, struct client_pending *p)
{
    struct client_pending **at = &g->pending;
    while (*at != NULL) {
        at = &(*at)->next;
    }
    *at = p;
    g->n_pending++;
}

/* The call has left the list; tells its owner and frees it. */
static void end_call(struct client_pending *p, int status, const struct gqa_value *result,
                     const struct gqa_error *error)
{
    if (p->done != NULL) {
        p->done(p->arg, p->id, status, result, error);
    }
    free(p);
}

void client_end_all(struct gqa *g, int status, const char *why)
{
    while (g->pending != NULL) {
        struct client_pending *p = g->pending;
        struct gqa_error e;
        client_fail(&e, status, "%s: %s", p->method, why);
        unlink_call(g, p);
        end_call(p, status, NULL, &e);
    }
}

/* Tells the daemon to stop. Where that cannot be sent the daemon's work is wasted, nothing else. */
static int send_cancel(struct gqa *g, uint32_t id)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_notification(&b, "$cancel");
    ipc_pack_array(&b, 1);
    ipc_pack_u64(&b, id);
    int r = client_send(g, &b);
    ipc_buffer_finish(&b);
    return r;
}

unsigned client_expire(struct gqa *g)
{
    unsigned n = 0;
    uint64_t now = client_now_us();
    struct client_pending *p = g->pending;
    while (p != NULL && g->lost == 0) {
        if (p->deadline_us > now) {
            p = p->next;
            continue;
        }
        struct gqa_error e;
        int status = p->cancelled ? -ECANCELED : -ETIMEDOUT;
        if (p->cancelled) {
            client_fail(&e, status, "%s: cancelled; the daemon has not confirmed it", p->method);
        } else {
            client_fail(&e, status, "%s: nothing was heard for %llu ms", p->method,
                        (unsigned long long)(p->silence_us / 1000u));
            send_cancel(g, p->id);
        }
        unlink_call(g, p);
        end_call(p, status, NULL, &e);
        n++;
        p = g->pending; /* the callback may have changed the list */
    }
    return n;
}

/* Work that queues behind other work is silent for longer than a question to the daemon itself. */
static uint32_t default_timeout_ms(const struct gqa *g, const char *method)
{
    bool is_work = strncmp(method, "text.", 5) == 0 || strncmp(method, "model.", 6) == 0;
    return is_work ? CLIENT_TIMEOUT_LONG_MS : g->timeout_ms;
}

static uint32_t fresh_id(struct gqa *g)
{
    do {
        g->next_id = g->next_id == UINT32_MAX ? 1 : g->next_id + 1;
    } while (find(g, g->next_id) != NULL);
    return g->next_id;
}

static int send_request(struct gqa *g, uint32_t id, const char *method,
                        const struct gqa_params *params)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, id, method);
    ipc_pack_map(&b, params != NULL ? params->n_keys : 0);
    if (params != NULL) {
        ipc_pack_raw(&b, params->body.data, params->body.bytes);
    }
    int r = client_send(g, &b);
    ipc_buffer_finish(&b);
    return r;
}

int gqa_call_async(struct gqa *g, const char *method, const struct gqa_params *params,
                   const struct gqa_call_options *options, uint32_t *ret_id)
{
    struct gqa_call_options o = {0};
    if (options != NULL) {
        if (options->struct_size < sizeof(size_t)) {
            return -EINVAL;
        }
        memcpy(&o, options, options->struct_size < sizeof(o) ? options->struct_size : sizeof(o));
    }
    size_t method_bytes = method != NULL ? strlen(method) : 0;
    if (method_bytes == 0 || method_bytes > PROTO_NAME_BYTES_MAX) {
        return -EINVAL;
    }
    if (params != NULL && params->error < 0) {
        return params->error;
    }
    if (g->lost < 0) {
        return -ENOTCONN;
    }
    if (g->n_pending >= CLIENT_PENDING_MAX) {
        return -ENOBUFS;
    }
    struct client_pending *p = calloc(1, sizeof(*p) + method_bytes + 1);
    if (p == NULL) {
        return -ENOMEM;
    }
    p->id = fresh_id(g);
    int r = send_request(g, p->id, method, params);
    if (r < 0) {
        free(p);
        return r;
    }
    memcpy(p->method, method, method_bytes + 1);
    uint32_t timeout_ms = o.timeout_ms != 0 ? o.timeout_ms : default_timeout_ms(g, method);
    p->silence_us = (uint64_t)timeout_ms * 1000u;
    p->deadline_us = client_now_us() + p->silence_us;
    p->event = o.event;
    p->done = o.done;
    p->arg = o.arg;
    append_call(g, p);
    if (ret_id != NULL) {
        *ret_id = p->id;
    }
    return 0;
}

int gqa_cancel(struct gqa *g, uint32_t id)
{
    struct client_pending *p = find(g, id);
    if (p == NULL) {
        return -ENOENT;
    }
    if (p->cancelled) {
        return 0;
    }
    int r = send_cancel(g, id);
    if (r < 0) {
        return r;
    }
    p->cancelled = true;
    p->deadline_us = client_now_us() + CLIENT_CANCEL_GRACE_MS * 1000u;
    return 0;
}

/* Events and answers of calls that have ended already (a deadline, a late cancel) are dropped. */
static int on_event(struct gqa *g, const struct ipc_value *params)
{
    uint64_t id, seq;
    const struct ipc_value *event = ipc_value_at(params, 2);
    if (ipc_value_type(params) != IPC_ARRAY || ipc_value_u64(ipc_value_at(params, 0), &id) < 0 ||
        ipc_value_u64(ipc_value_at(params, 1), &seq) < 0 || id > UINT32_MAX || seq > UINT32_MAX ||
        event == NULL || ipc_value_type(event) != IPC_MAP) {
        return -EPROTO;
    }
    struct client_pending *p = find(g, (uint32_t)id);
    if (p == NULL) {
        return 0;
    }
    if (p->has_seq && seq != p->next_seq) {
        return -EPROTO; /* a step of the answer is missing: nobody may take it for whole */
    }
    p->has_seq = true;
    p->next_seq = (uint32_t)seq + 1;
    if (!p->cancelled) {
        p->deadline_us = client_now_us() + p->silence_us;
    }
    if (p->event != NULL) {
        p->event(p->arg, p->id, client_from_ipc(event));
    }
    return 0;
}

static int on_notification(struct gqa *g, const struct ipc_message *m)
{
    static const char event[] = "gqa.event";
    if (m->method.bytes == sizeof(event) - 1 &&
        memcmp(m->method.data, event, sizeof(event) - 1) == 0) {
        return on_event(g, m->params);
    }
    char method[PROTO_NAME_BYTES_MAX + 1];
    if (g->notify != NULL && m->method.bytes < sizeof(method)) {
        memcpy(method, m->method.data, m->method.bytes);
        method[m->method.bytes] = '\0';
        g->notify(g->notify_arg, method, client_from_ipc(m->params));
    }
    return 0;
}

static int on_response(struct gqa *g, const struct ipc_message *m)
{
    struct gqa_error e;
    if (m->error != NULL && client_error_read(m->error, &e) < 0) {
        return -EPROTO;
    }
    struct client_pending *p = find(g, m->id);
    if (p == NULL) {
        return 0;
    }
    unlink_call(g, p);
    if (m->error != NULL) {
        end_call(p, gqa_strcode(e.code), NULL, &e);
    } else {
        end_call(p, 0, client_from_ipc(m->result), NULL);
    }
    return 0;
}

int client_dispatch(struct gqa *g, const uint8_t *frame, size_t bytes)
{
    struct ipc_message m;
    uint32_t id;
    int r = ipc_message_parse(frame, bytes, &m, &id);
    if (r < 0) {
        return r;
    }
    g->frame = frame;
    g->frame_bytes = bytes;
    if (m.kind == IPC_RESPONSE) {
        r = on_response(g, &m);
    } else if (m.kind == IPC_NOTIFICATION) {
        r = on_notification(g, &m);
    } else {
        r = -EPROTO; /* a daemon asks nothing */
    }
    g->frame = NULL;
    ipc_message_finish(&m);
    return r;
}
