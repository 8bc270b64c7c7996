/* The service, its callers, and the way from a message to its handler. */
#include "daemon/handlers_internal.h"

#include "daemon/log.h"
#include "ipc/extents.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

typedef void (*handler_fn)(struct call *call);

static const handler_fn handlers[PROTO_METHOD_COUNT] = {
#define M(ID, id, name, access, FIELDS, doc) [PROTO_##ID] = handle_##id,
    GQA_METHODS(M)
#undef M
};

uint64_t clock_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the service ------------------------------------------------------------------------- */

static void limits_finish(struct service_limits *l)
{
    for (size_t i = 0; i < l->n_allow_models; i++) {
        free((char *)l->allow_models[i]);
    }
    free((void *)l->allow_models);
    l->allow_models = NULL;
    l->n_allow_models = 0;
}

int service_set_limits(struct service *s, const struct service_limits *limits)
{
    struct service_limits copy = *limits;
    copy.allow_models = NULL;
    copy.n_allow_models = 0;
    if (limits->n_allow_models > 0) {
        char **names = calloc(limits->n_allow_models, sizeof(*names));
        if (!names) {
            return -ENOMEM;
        }
        copy.allow_models = (const char *const *)names;
        for (size_t i = 0; i < limits->n_allow_models; i++) {
            names[i] = strdup(limits->allow_models[i]);
            if (!names[i]) {
                limits_finish(&copy);
                return -ENOMEM;
            }
            copy.n_allow_models++;
        }
    }
    limits_finish(&s->limits);
    s->limits = copy;
    return 0;
}

/* A user's programs have read: its requests that rested may go on. */
static void on_relieved(void *arg)
{
    struct service *s = arg;
    if (!s->stopped) {
        engine_kick(s->engine);
    }
}

int service_create(const struct service_options *options, struct service **ret)
{
    struct service *s = calloc(1, sizeof(*s));
    if (!s) {
        return -ENOMEM;
    }
    s->engine = options->engine;
    s->registry = options->registry;
    s->catalogue = options->catalogue;
    s->quotas = options->quotas;
    s->quotas->relieved = on_relieved;
    s->quotas->relieved_arg = s;
    s->penalties = options->penalties;
    s->host = options->host;
    snprintf(s->realm, sizeof(s->realm), "%s", options->realm ? options->realm : "");
    s->started_ns = clock_now_ns();
    ipc_buffer_init(&s->nowhere);
    ipc_buffer_init(&s->api_info);
    ipc_pack_api_info(&s->api_info);
    if (getrandom(&s->id_seed, sizeof(s->id_seed), 0) < 0) {
        s->id_seed = s->started_ns;
    }
    LIST_INIT(&s->unloads);
    LIST_INIT(&s->drains);
    int rc = s->api_info.error;
    rc = rc < 0 ? rc : service_set_limits(s, &options->limits);
    if (rc < 0) {
        ipc_buffer_finish(&s->api_info);
        free(s);
        return rc;
    }
    *ret = s;
    return 0;
}

void service_destroy(struct service *s)
{
    if (!s) {
        return;
    }
    struct unload *u;
    while ((u = LIST_FIRST(&s->unloads)) != NULL) {
        LIST_REMOVE(u, entry);
        model_unref(u->model);
        free(u);
    }
    s->quotas->relieved = NULL;
    ipc_buffer_finish(&s->nowhere);
    ipc_buffer_finish(&s->api_info);
    limits_finish(&s->limits);
    free(s);
}

void service_drain(struct service *s)
{
    s->draining = true;
    engine_drain(s->engine);
}

void service_stop(struct service *s)
{
    s->stopped = true;
}

uint32_t service_n_open(const struct service *s)
{
    return s->n_open;
}

void service_drained(struct service *s)
{
    struct call *call;
    while ((call = LIST_FIRST(&s->drains)) != NULL) {
        call_end_empty(call);
    }
}

void service_pump(struct service *s)
{
    struct request_event *ev = engine_take_events(s->engine);
    bool delivered = false;
    while (ev) {
        struct request_event *next = ev->next;
        delivered |= call_deliver(ev->request->owner, ev);
        free(ev);
        ev = next;
    }
    if (delivered) {
        engine_kick(s->engine);
    }
    service_close_retired(s);
    service_make_substitutes(s);
    service_check_unloads(s);
}

int service_run(struct service *s, struct task *t)
{
    return s->host.run(s->host.data, t);
}

/* ---- callers ----------------------------------------------------------------------------- */

void caller_init(struct caller *c, struct service *s, const struct caller_sink *sink,
                 struct ipc_buffer *out, uid_t uid, bool admin)
{
    *c = (struct caller){.service = s, .sink = sink, .out = out, .uid = uid, .admin = admin};
    LIST_INIT(&c->calls);
}

void caller_finish(struct caller *c)
{
    struct call *call;
    while ((call = LIST_FIRST(&c->calls)) != NULL) {
        call_leave_caller(call);
        call_release_held(call);
        call_stop(call);
    }
    caller_drop_import(c);
}

void caller_cut(struct caller *c)
{
    struct call *next;
    for (struct call *call = LIST_FIRST(&c->calls); call; call = next) {
        next = LIST_NEXT(call, of_caller);
        if (call->wait != CALL_WAIT_DRAIN) {
            call->cut = true;
            call_stop(call);
        }
    }
}

unsigned caller_end_paused(struct caller *c, uint32_t timeout_ms)
{
    struct call *next;
    unsigned n_ended = 0;
    for (struct call *call = LIST_FIRST(&c->calls); call; call = next) {
        next = LIST_NEXT(call, of_caller);
        bool is_paused = (call->wait == CALL_WAIT_ENGINE &&
                          (call->held_bytes > 0 || request_is_paused(call->request))) ||
                         call->wait == CALL_WAIT_READER;
        if (is_paused && call->paused_ms == 0) {
            call->paused_ms = timeout_ms;
            n_ended++;
            call_stop(call);
        }
    }
    return n_ended;
}

void caller_uncongested(struct caller *c)
{
    struct call *next;
    bool released = false;
    for (struct call *call = LIST_FIRST(&c->calls); call; call = next) {
        next = LIST_NEXT(call, of_caller);
        released |= call->held_bytes > 0;
        call_release_held(call);
        if (call->wait == CALL_WAIT_READER && !c->congested) {
            transfer_go_on(call);
        }
    }
    if (released) {
        engine_kick(c->service->engine);
    }
}

void caller_notify_draining(struct caller *c)
{
    ipc_pack_notification(c->out, "gqa.draining");
    ipc_pack_array(c->out, 0);
    c->sink->written(c);
}

void pack_error_notification(struct ipc_buffer *b, const struct ipc_error *e)
{
    ipc_pack_notification(b, "gqa.error");
    ipc_pack_array(b, 1);
    ipc_pack_map(b, e->retry_after_ms > 0 ? 4 : 3);
    pack_kv_u64(b, "code", e->code);
    pack_kv_str(b, "name", proto_error_name(e->code));
    pack_kv_str(b, "message", e->message);
    if (e->retry_after_ms > 0) {
        pack_kv_u64(b, "retry_after_ms", e->retry_after_ms);
    }
}

void caller_notify_error(struct caller *c, const struct ipc_error *e)
{
    pack_error_notification(c->out, e);
    c->sink->written(c);
}

/* ---- messages ---------------------------------------------------------------------------- */

static bool method_is_work(enum proto_method method)
{
    return method == PROTO_TEXT_GENERATE || method == PROTO_TEXT_LOGITS ||
           method == PROTO_TEXT_EMBED || method == PROTO_TEXT_TOKENIZE ||
           method == PROTO_TEXT_DETOKENIZE || method == PROTO_MODEL_LOAD ||
           method == PROTO_KV_PIN || method == PROTO_KV_EXPORT || method == PROTO_KV_IMPORT ||
           method == PROTO_MODEL_UNLOAD || method == PROTO_BACKEND_USE ||
           method == PROTO_BACKEND_SELFTEST;
}

/* The task pool's, or the loop's; touches nothing but the call. */
static void decode(struct call *call, enum proto_method method, const struct area *area)
{
    if (area) {
        call->message.area = area->data;
        call->message.area_bytes = area->in_bytes;
    }
    call->decode_result =
        ipc_params_decode(method, &call->message, &call->params, &call->decode_error);
    call->decoded = true;
}

static void dispatch_request(struct call *call)
{
    struct proto_string name = call->message.method;
    enum proto_method method;
    struct ipc_error e = {0};

    call->id = call->message.id;
    if (call_open(call, &e) < 0) {
        call_fail_error(call, &e);
        return;
    }
    if (proto_method_by_name(name.data, name.bytes, &method) < 0) {
        call_fail(call, PROTO_E_METHOD_NOT_FOUND, "no method '%.*s'",
                  (int)(name.bytes > 64 ? 64 : name.bytes), name.data);
        return;
    }
    call->method = method;
    if (proto_method_info(method)->access == PROTO_ADMIN && !call->caller->admin) {
        call_fail(call, PROTO_E_ACCESS_DENIED,
                  "%s is for administrators: root, the daemon's own user and its admin_group; "
                  "the caller is uid %u",
                  proto_method_info(method)->name, call->uid);
        return;
    }
    if (call->service->draining && method_is_work(method)) {
        call_fail(call, PROTO_E_DRAINING, "the daemon is about to end");
        return;
    }
    if (!call->decoded) {
        decode(call, method, call->caller->area);
    }
    if (call->decode_result < 0) {
        call_fail_error(call, &call->decode_error);
        return;
    }
    handlers[method](call);
}

/* "$cancel" [id]. A call that has already been answered, or never was, is no fault. */
static void cancel(struct caller *c, const struct ipc_value *params)
{
    uint64_t id;
    if (ipc_value_u64(ipc_value_at(params, 0), &id) < 0 || id > UINT32_MAX) {
        return;
    }
    struct call *call = call_find(c, (uint32_t)id);
    penalty_strike(c->service->penalties, c->penalty, PENALTY_CANCEL, clock_now_ns());
    if (call && !call->cancelled) {
        call->cancelled = true;
        call_stop(call);
    }
}

/* "$give" [offset, ...]: the client has done with what handles named. */
static void take_back(struct caller *c, const struct ipc_value *params)
{
    uint64_t offset;
    for (size_t i = 0; c->area && i < ipc_value_count(params) && i < EXTENTS_MAX; i++) {
        if (ipc_value_u64(ipc_value_at(params, i), &offset) == 0) {
            area_give(c->area, offset);
        }
    }
}

static bool is_named(const struct ipc_message *m, const char *name)
{
    return m->method.bytes == strlen(name) && memcmp(m->method.data, name, m->method.bytes) == 0;
}

static void dispatch_notification(struct caller *c, const struct ipc_message *m)
{
    if (is_named(m, "$cancel")) {
        cancel(c, m->params);
    } else if (is_named(m, "$give")) {
        take_back(c, m->params);
    }
}

/* It told nothing that this protocol knows, or there was no memory to look. */
static void dispatch_unparsed(struct call *call)
{
    struct caller *c = call->caller;
    struct ipc_error e;

    if (call->parse_result == -ENOMEM) {
        ipc_error_set(&e, PROTO_E_NO_MEMORY, "no memory for a message of %zu bytes",
                      call->frame_bytes);
    } else {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST,
                      "not a message of this protocol: [0, id, method, params] is a request");
    }
    if (call->parse_id != UINT32_MAX) {
        call->id = call->parse_id;
        call_fail_error(call, &e);
    } else {
        call_drop(call);
        caller_notify_error(c, &e);
    }
    c->sink->broken(c);
}

static void dispatch(struct call *call)
{
    struct caller *c = call->caller;

    if (call->parse_result < 0) {
        dispatch_unparsed(call);
        return;
    }
    if (call->message.kind == IPC_REQUEST) {
        dispatch_request(call);
        return;
    }
    if (call->message.kind == IPC_NOTIFICATION) {
        dispatch_notification(c, &call->message);
    }
    call_drop(call); /* a response answers nothing: the daemon asks nothing of clients */
}

static void parse(struct call *call)
{
    call->parse_id = UINT32_MAX;
    call->parse_result =
        ipc_message_parse(call->frame, call->frame_bytes, &call->message, &call->parse_id);
    call->parsed = call->parse_result == 0;
}

/* The task pool. */
static void take_apart_work(struct task *t)
{
    struct call *call = call_of_task(t);
    enum proto_method method;
    if (!call->parsed) {
        parse(call);
    }
    if (call->parsed && call->message.kind == IPC_REQUEST &&
        proto_method_by_name(call->message.method.data, call->message.method.bytes, &method) == 0) {
        decode(call, method, call->area);
    }
    call->task_result = 0;
}

/* The daemon's end has come before the message's turn. */
static void refuse_untaken(struct call *call)
{
    if (ipc_request_id(call->frame, call->frame_bytes, &call->id) == 0) {
        call_fail_cancelled(call);
    } else {
        call_drop(call); /* no request */
    }
}

static void taken_apart(struct task *t)
{
    struct call *call = call_of_task(t);
    struct caller *c = call->caller;
    call->wait = CALL_WAIT_NOTHING;
    area_unref(call->area);
    call->area = NULL;
    if (!c) {
        call_drop(call);
        return;
    }
    c->parsing = false;
    if (call->task_result == 0) {
        dispatch(call);
    } else {
        refuse_untaken(call);
    }
    c->sink->resumed(c);
}

/* Has the pool take the message apart, and then dispatches it. False: without memory for a task the
 * loop has to do it itself, which is slow but right. */
static bool take_apart_elsewhere(struct call *call)
{
    struct caller *c = call->caller;
    call->task = (struct task){.work = take_apart_work, .done = taken_apart, .uid = c->uid};
    call->task_result = -ECANCELED; /* until it is done */
    call->wait = CALL_WAIT_TASK;
    call->area = area_ref(c->area);
    call->is_large = c->parsing = true;
    if (c->service->host.run(c->service->host.data, &call->task) == 0) {
        return true;
    }
    area_unref(call->area);
    call->area = NULL;
    c->parsing = false;
    call->wait = CALL_WAIT_NOTHING;
    return false;
}

/* Whether handles name so much that copying it is not for the loop. */
static bool names_much(const struct call *call)
{
    const struct ipc_value *key, *value;
    struct ipc_handle h;
    uint64_t bytes = 0;
    bool is_request = call->parsed && call->message.kind == IPC_REQUEST && call->caller->area;
    for (size_t i = 0; is_request && ipc_value_pair(call->message.params, i, &key, &value); i++) {
        if (ipc_value_handle(value, &h) == 0 && h.bytes <= PROTO_FRAME_BYTES_MAX) {
            bytes += h.bytes;
        }
    }
    return bytes > SERVICE_INLINE_HANDLE_BYTES;
}

int caller_refuse(struct caller *c, const uint8_t *head, size_t bytes, const struct ipc_error *e)
{
    uint32_t id;
    int rc = ipc_request_id(head, bytes, &id);
    if (rc < 0) {
        caller_notify_error(c, e);
        return rc;
    }
    ipc_pack_response_error(c->out, id, e);
    c->sink->written(c);
    return 0;
}

void caller_message(struct caller *c, uint8_t *frame, size_t bytes, uint32_t n_elements,
                    uint64_t held_bytes)
{
    struct call *call = call_create(c, frame, bytes, held_bytes);
    if (!call) {
        struct ipc_error e;
        service_free_message(c->service, c->uid, NULL, frame, bytes, held_bytes);
        ipc_error_set(&e, PROTO_E_NO_MEMORY, "no memory for a message of %zu bytes", bytes);
        caller_notify_error(c, &e);
        c->sink->broken(c);
        return;
    }
    if (n_elements > SERVICE_INLINE_ELEMENTS && take_apart_elsewhere(call)) {
        return;
    }
    parse(call);
    if (names_much(call) && take_apart_elsewhere(call)) {
        return;
    }
    dispatch(call);
}
