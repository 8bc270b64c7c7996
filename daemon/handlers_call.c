/* Calls: from arrival to the one answer. */
#include "daemon/handlers_internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct call *call_create(struct caller *c, uint8_t *frame, size_t bytes, uint64_t held_bytes)
{
    struct service *s = c->service;
    struct call *call = calloc(1, sizeof(*call));
    if (!call) {
        return NULL;
    }
    call->service = s;
    call->caller = c;
    call->uid = c->uid;
    call->frame = frame;
    call->frame_bytes = bytes;
    call->frame_held_bytes = held_bytes;
    call->method = PROTO_METHOD_COUNT;
    LIST_INSERT_HEAD(&c->calls, call, of_caller);
    c->n_calls++;
    s->n_open++;
    return call;
}

/* ---- by id ------------------------------------------------------------------------------- */

/* One table for all connections, so that an idle one costs nothing and a storm of cancellations no
 * walk along its calls. */
static size_t bucket(const struct caller *c, uint32_t id)
{
    uint64_t x = ((uintptr_t)c >> 4) ^ c->service->id_seed;
    x = (x + id) * 0x9e3779b97f4a7c15u; /* 2^64 over the golden ratio */
    return (x ^ x >> 29) * 0xbf58476d1ce4e5b9u >> 32 & (SERVICE_ID_BUCKETS - 1);
}

struct call *call_find(const struct caller *c, uint32_t id)
{
    struct call *call;
    LIST_FOREACH(call, &c->service->by_id[bucket(c, id)], of_id)
    {
        if (call->caller == c && call->id == id) {
            return call;
        }
    }
    return NULL;
}

void call_leave_caller(struct call *call)
{
    if (!call->caller) {
        return;
    }
    LIST_REMOVE(call, of_caller);
    call->caller->n_calls--;
    call->caller = NULL;
    if (call->is_open) {
        call->is_open = false;
        LIST_REMOVE(call, of_id);
    }
}

#define RETRY_AFTER_MS 100u

int call_open(struct call *call, struct ipc_error *e)
{
    struct service *s = call->service;
    if (call_find(call->caller, call->id)) {
        ipc_error_set(e, PROTO_E_INVALID_REQUEST, "id %u belongs to a call that is open", call->id);
        return -EINVAL;
    }
    if (call->caller->n_calls > s->limits.calls_per_connection) {
        ipc_error_set(e, PROTO_E_BUSY, "this connection has %u open calls, which is the limit",
                      s->limits.calls_per_connection);
        e->retry_after_ms = RETRY_AFTER_MS;
        return -EBUSY;
    }
    int rc = quota_check(s->quotas, call->uid, QUOTA_OUTPUT_BYTES, e);
    rc = rc < 0 ? rc : call_take(call, &(struct quota_amounts){.of = {[QUOTA_CALLS] = 1}}, e);
    if (rc == 0) {
        call->is_open = true;
        LIST_INSERT_HEAD(&s->by_id[bucket(call->caller, call->id)], call, of_id);
    }
    return rc;
}

int call_take(struct call *call, const struct quota_amounts *wanted, struct ipc_error *e)
{
    int rc = quota_take(call->service->quotas, call->uid, wanted, e);
    for (unsigned k = 0; rc == 0 && k < QUOTA_COUNT; k++) {
        call->held.of[k] += wanted->of[k];
    }
    return rc;
}

void call_release_message(struct call *call)
{
    struct ipc_message *large = call->parsed && call->is_large ? &call->message : NULL;
    if (call->parsed && !large) {
        ipc_message_finish(&call->message);
    }
    service_free_message(call->service, call->uid, large, call->frame, call->frame_bytes,
                         call->frame_held_bytes);
    call->message = (struct ipc_message){0};
    call->parsed = false;
    call->frame = NULL;
    call->frame_bytes = call->frame_held_bytes = 0;
}

void call_drop(struct call *call)
{
    struct service *s = call->service;
    transfer_destroy(call); /* tells the caller how far it came */
    call_leave_caller(call);
    if (call->wait == CALL_WAIT_DRAIN) {
        LIST_REMOVE(call, of_drain);
    } else {
        s->n_open--;
    }
    quota_give(s->quotas, call->uid, &call->held);
    call_release_message(call);
    backend_job_destroy(call);
    model_unref(call->model);
    request_destroy(call->request);
    for (size_t i = 0; i < call->n_entries; i++) {
        model_unref(call->entries[i].model);
    }
    free(call->entries);
    free(call->tokens);
    free(call->text);
    call_drop_collected(call);
    free(call);
}

/* Answers to callers that are gone are packed all the same, into a buffer that is emptied: one
 * path, not two. */
static struct ipc_buffer *call_out(struct call *call)
{
    return call->caller ? call->caller->out : &call->service->nowhere;
}

static void call_written(struct call *call)
{
    if (call->caller) {
        call->caller->sink->written(call->caller);
    } else {
        ipc_buffer_finish(&call->service->nowhere);
    }
}

struct ipc_buffer *call_begin_result(struct call *call)
{
    struct ipc_buffer *b = call_out(call);
    ipc_pack_response_ok(b, call->id);
    return b;
}

void call_end(struct call *call)
{
    call_written(call);
    call_drop(call);
}

void call_end_empty(struct call *call)
{
    ipc_pack_map(call_begin_result(call), 0);
    call_end(call);
}

struct ipc_buffer *call_begin_event(struct call *call)
{
    struct ipc_buffer *b = call_out(call);
    ipc_pack_event(b, call->id, call->seq++);
    return b;
}

void call_end_event(struct call *call)
{
    call_written(call);
}

/* What the engine has made lies in memory: no overflow. */
static uint64_t tensor_bytes(const uint64_t *shape, size_t n_dims)
{
    uint64_t bytes = sizeof(float);
    for (size_t i = 0; i < n_dims; i++) {
        bytes *= shape[i];
    }
    return bytes;
}

void call_pack_tensor(struct call *call, struct ipc_buffer *b, const float *data,
                      const uint64_t *shape, size_t n_dims)
{
    struct ipc_handle handle = {.offset = 0, .bytes = tensor_bytes(shape, n_dims)};
    void *to = NULL;
    if (call->caller && area_take(call->caller->area, handle.bytes, &handle.offset, &to) == 0) {
        memcpy(to, data, handle.bytes);
        ipc_pack_tensor_f32_by_handle(b, &handle, shape, n_dims);
    } else {
        ipc_pack_tensor_f32(b, data, shape, n_dims);
    }
}

void call_pack_rows(struct call *call, struct ipc_buffer *b, const struct request_event *ev,
                    const uint64_t *shape, size_t n_dims)
{
    struct area *area = call->request->area;
    const struct ipc_handle handle = {.offset = ev->place, .bytes = tensor_bytes(shape, n_dims)};
    if (ev->is_placed && area == call->caller->area && !area_is_retired(area)) {
        ipc_pack_tensor_f32_by_handle(b, &handle, shape, n_dims);
    } else {
        call_pack_tensor(call, b, ev->rows, shape, n_dims);
    }
}

void call_fail_error(struct call *call, const struct ipc_error *e)
{
    ipc_pack_response_error(call_out(call), call->id, e);
    call_end(call);
}

void call_fail(struct call *call, enum proto_error_code code, const char *format, ...)
{
    struct ipc_error e;
    va_list args;
    char message[sizeof(e.message)];
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    ipc_error_set(&e, code, "%s", message);
    if (code == PROTO_E_BUSY) {
        e.retry_after_ms = RETRY_AFTER_MS;
    }
    call_fail_error(call, &e);
}

bool call_may_see_paths(const struct call *call)
{
    return call->caller && call->caller->admin;
}

void call_fail_cancelled(struct call *call)
{
    if (call->cut && !call->cancelled) {
        call_fail(call, PROTO_E_DRAINING, "the daemon ended before the call did");
    } else if (call->paused_ms > 0 && !call->cancelled) {
        call_fail(call, PROTO_E_DEADLINE,
                  "the call was ended: its answers were not read fast enough for %u ms "
                  "(paused_timeout_ms)",
                  call->paused_ms);
    } else if (call->method == PROTO_TEXT_GENERATE) {
        call_finish_cancelled_generate(call);
    } else {
        call_fail(call, PROTO_E_CANCELLED, "cancelled by the caller");
    }
}

void call_stop(struct call *call)
{
    switch (call->wait) {
    case CALL_WAIT_ENGINE:
        engine_cancel(call->service->engine, call->request);
        break;
    case CALL_WAIT_LOAD:
        load_detach(call->load);
        call_fail_cancelled(call);
        break;
    case CALL_WAIT_UNLOAD:
        unload_detach(call);
        call_fail_cancelled(call);
        break;
    case CALL_WAIT_DRAIN:
        call_fail_cancelled(call);
        break;
    case CALL_WAIT_READER:
        transfer_stop(call);
        break;
    case CALL_WAIT_TASK:
        if (call->service->host.recall(call->service->host.data, &call->task)) {
            call->task.done(&call->task);
        } /* else it looks at the flags when it ends */
        break;
    case CALL_WAIT_POST: /* likewise */
    case CALL_WAIT_NOTHING:
        break;
    }
}

static void run(struct call *call, const struct task *task)
{
    call->task = *task;
    call->task_result = 0;
    call->wait = CALL_WAIT_TASK;
    int rc = call->service->host.run(call->service->host.data, &call->task);
    if (rc < 0) {
        call->wait = CALL_WAIT_NOTHING;
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a task");
    }
}

void call_run(struct call *call, void (*work)(struct task *), void (*done)(struct task *))
{
    run(call, &(struct task){.work = work, .done = done, .uid = call->uid});
}

void call_run_on_disk(struct call *call, void (*work)(struct task *), void (*done)(struct task *))
{
    run(call, &(struct task){.work = work, .done = done, .uid = call->uid, .asks_disk = true});
}
