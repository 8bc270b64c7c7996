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

void client_unlink(struct gqa *g, struct client_pending *p)
{
    struct client_pending **at = &g->pending;
    while (*at != p) {
        at = &(*at)->next;
    }
    *at = p->next;
    g->n_pending--;
}

static void append_pending(struct gqa *g, struct client_pending *p)
{
    struct client_pending **at = &g->pending;
    while (*at != NULL) {
        at = &(*at)->next;
    }
    *at = p;
    g->n_pending++;
}

void client_end(struct client_pending *p, int status, const struct gqa_value *result,
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
        client_unlink(g, p);
        client_end(p, status, NULL, &e);
    }
}

int client_send_cancel(struct gqa *g, const struct client_pending *p)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_notification(&b, "$cancel");
    ipc_pack_array(&b, 1);
    ipc_pack_u64(&b, p->id);
    int r = p->by_socket ? client_send_by_socket(g, &b) : client_send(g, &b, NULL);
    ipc_buffer_finish(&b);
    return r;
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
    int r = client_send(g, &b, params != NULL ? &params->body : NULL);
    ipc_buffer_finish(&b);
    return r;
}

int client_call_options(const struct gqa_call_options *given, struct gqa_call_options *ret)
{
    struct gqa_call_options o = {.struct_size = sizeof(o)};
    if (given != NULL) {
        if (given->struct_size < sizeof(size_t)) {
            return -EINVAL;
        }
        memcpy(&o, given, given->struct_size < sizeof(o) ? given->struct_size : sizeof(o));
        o.struct_size = sizeof(o);
    }
    *ret = o;
    return 0;
}

int client_start(struct gqa *g, const char *method, const struct gqa_params *params,
                 const struct gqa_call_options *options, uint32_t *ret_id)
{
    struct gqa_call_options o;
    int r = client_call_options(options, &o);
    if (r < 0) {
        return r;
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
    p->by_socket = g->ring == NULL;
    r = send_request(g, p->id, method, params);
    if (r < 0) {
        free(p);
        return r;
    }
    g->has_asked = true;
    memcpy(p->method, method, method_bytes + 1);
    client_deadline_start(g, p, &o);
    p->event = o.event;
    p->done = o.done;
    p->arg = o.arg;
    append_pending(g, p);
    if (ret_id != NULL) {
        *ret_id = p->id;
    }
    return 0;
}

/* They change the ways of the connection itself. */
bool client_is_own_method(const char *method)
{
    return method != NULL && strncmp(method, "ring.", 5) == 0;
}

int gqa_call_async(struct gqa *g, const char *method, const struct gqa_params *params,
                   const struct gqa_call_options *options, uint32_t *ret_id)
{
    return client_is_own_method(method) ? -EINVAL
                                        : client_start(g, method, params, options, ret_id);
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
    int r = client_send_cancel(g, p);
    if (r < 0) {
        return r;
    }
    client_deadline_cancelled(p);
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
    client_deadline_heard(p);
    if (p->event != NULL) {
        p->event(p->arg, p->id, client_from_ipc(event));
    }
    return 0;
}

static bool is_named(const struct ipc_message *m, const char *name)
{
    return m->method.bytes == strlen(name) && memcmp(m->method.data, name, strlen(name)) == 0;
}

static int on_notification(struct gqa *g, const struct ipc_message *m)
{
    if (is_named(m, "gqa.event")) {
        return on_event(g, m->params);
    }
    if (is_named(m, "gqa.wake")) {
        return 0; /* it has done its work: somebody looks at the ring */
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
    client_unlink(g, p);
    if (m->error != NULL) {
        client_end(p, gqa_strcode(e.code), NULL, &e);
    } else {
        client_end(p, 0, client_from_ipc(m->result), NULL);
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
    r = g->ring != NULL ? client_ring_resolve(g->ring, &m) : 0;
    if (r < 0) {
        ipc_message_finish(&m);
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
    if (g->ring != NULL) {
        client_ring_give_back(g);
    }
    return r;
}
