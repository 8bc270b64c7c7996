/* gqa.hello, gqa.ping, gqa.api_info, server.drain, server.reload. */
#include "daemon/handlers_internal.h"

#include "daemon/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const features[] = {"stream", "cancel", "tensor", "autoload", "ring"};

/* ---- gqa.* ------------------------------------------------------------------------------- */

static void pack_limits(struct ipc_buffer *b, const struct service *s)
{
    pack_kv_map(b, "limits", 6 + QUOTA_COUNT);
    pack_kv_u64(b, "frame_bytes", PROTO_FRAME_BYTES_MAX);
    pack_kv_u64(b, "depth", PROTO_DEPTH_MAX);
    pack_kv_u64(b, "elements", PROTO_ELEMENTS_MAX);
    pack_kv_u64(b, "tokens", PROTO_TOKENS_MAX);
    pack_kv_u64(b, "text_bytes", PROTO_TEXT_BYTES_MAX);
    pack_kv_u64(b, "calls_per_connection", s->limits.calls_per_connection);
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        char key[48];
        snprintf(key, sizeof(key), "%s_per_user", quota_name(k));
        pack_kv_u64(b, key, s->quotas->limits.of[k]);
    }
}

void handle_hello(struct call *call)
{
    const struct proto_hello *p = &call->params.hello;
    uint32_t low = p->version_min;
    uint32_t high = p->has_version_max ? p->version_max : GQA_PROTOCOL_VERSION;
    if (low > GQA_PROTOCOL_VERSION || high < GQA_PROTOCOL_VERSION_MIN || low > high) {
        call_fail(call, PROTO_E_VERSION, "the client speaks versions %u to %u, the daemon %u to %u",
                  low, high, GQA_PROTOCOL_VERSION_MIN, GQA_PROTOCOL_VERSION);
        return;
    }
    char realm[16];
    snprintf(realm, sizeof(realm), "%u", call->uid);
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 8);
    pack_kv_str(b, "server", "gqad");
    pack_kv_str(b, "version", GQAD_VERSION);
    pack_kv_u64(b, "protocol", high < GQA_PROTOCOL_VERSION ? high : GQA_PROTOCOL_VERSION);
    pack_kv_array(b, "features", sizeof(features) / sizeof(features[0]));
    for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
        ipc_pack_str(b, features[i]);
    }
    pack_limits(b, call->service);
    pack_kv_u64(b, "uid", call->uid);
    pack_kv_str(b, "realm", realm);
    pack_kv_bool(b, "admin", call->caller->admin);
    call_end(call);
}

void handle_ping(struct call *call)
{
    call_end_empty(call);
}

void handle_api_info(struct call *call)
{
    const struct ipc_buffer *info = &call->service->api_info;
    ipc_pack_raw(call_begin_result(call), info->data, info->bytes);
    call_end(call);
}

/* ---- server.* ---------------------------------------------------------------------------- */

/* The answer comes when all is done: then the caller knows that the daemon is about to be gone. */
void handle_server_drain(struct call *call)
{
    struct service *s = call->service;
    uint32_t timeout_ms = call->params.server_drain.timeout_ms;
    call->wait = CALL_WAIT_DRAIN;
    LIST_INSERT_HEAD(&s->drains, call, of_drain);
    s->n_open--;
    log_info("drain: asked for by uid %u", call->uid);
    s->host.drain(s->host.data, timeout_ms);
}

void handle_server_reload(struct call *call)
{
    struct service *s = call->service;
    struct ipc_error e;
    if (s->host.reload(s->host.data, &e) < 0) {
        call_fail_error(call, &e);
        return;
    }
    call_end_empty(call);
}
