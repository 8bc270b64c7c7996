/* client/error.c - errors in words. */
#include "client/internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int gqa_strcode(int32_t code)
{
    static const int errnos[] = {
        [GQA_E_INVALID_REQUEST] = EINVAL,  [GQA_E_METHOD_NOT_FOUND] = EOPNOTSUPP,
        [GQA_E_INVALID_PARAMS] = EINVAL,   [GQA_E_ACCESS_DENIED] = EACCES,
        [GQA_E_VERSION] = EPROTONOSUPPORT, [GQA_E_NOT_FOUND] = ENOENT,
        [GQA_E_EXISTS] = EEXIST,           [GQA_E_MODEL_REFUSED] = ENOEXEC,
        [GQA_E_CONTEXT_EXCEEDED] = E2BIG,  [GQA_E_BUSY] = EBUSY,
        [GQA_E_CANCELLED] = ECANCELED,     [GQA_E_DEADLINE] = ETIMEDOUT,
        [GQA_E_DRAINING] = ESHUTDOWN,      [GQA_E_NO_MEMORY] = ENOMEM,
        [GQA_E_BACKEND] = ENODEV,          [GQA_E_IO] = EIO,
        [GQA_E_INTERNAL] = EREMOTEIO,
    };
    if (code <= 0 || (size_t)code >= sizeof(errnos) / sizeof(errnos[0])) {
        return -EREMOTEIO;
    }
    return -errnos[code];
}

/* The public list repeats the protocol's table, which is not installed: they may not drift. */
#define E(name, code, doc) \
    _Static_assert((int)GQA_E_##name == (int)PROTO_E_##name, "client.h repeats ipc/protocol.h");
GQA_ERRORS(E)
#undef E

int client_fail(struct gqa_error *e, int err, const char *format, ...)
{
    if (e == NULL) {
        return err;
    }
    const char *name = strerrorname_np(-err);
    *e = (struct gqa_error){0};
    snprintf(e->name, sizeof(e->name), "%s", name != NULL ? name : "ERROR");
    va_list args;
    va_start(args, format);
    vsnprintf(e->message, sizeof(e->message), format, args);
    va_end(args);
    return err;
}

/* Copies what a peer sent: terminated, cut to fit, on one line. */
static void copy_line(char *to, size_t room, const struct proto_string *from)
{
    size_t n = from->bytes < room - 1 ? from->bytes : room - 1;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)from->data[i];
        to[i] = c < 0x20 || c == 0x7f ? ' ' : (char)c;
    }
    to[n] = '\0';
}

int client_error_read(const struct ipc_value *map, struct gqa_error *ret)
{
    struct proto_string name, message;
    int64_t code = 0;
    if (ipc_value_i64(ipc_value_get(map, "code"), &code) < 0 || code <= 0 || code > INT32_MAX ||
        ipc_value_bytes(ipc_value_get(map, "name"), &name) < 0 ||
        ipc_value_bytes(ipc_value_get(map, "message"), &message) < 0) {
        return -EPROTO;
    }
    struct gqa_error e = {.code = (int32_t)code};
    copy_line(e.name, sizeof(e.name), &name);
    copy_line(e.message, sizeof(e.message), &message);
    uint64_t retry = 0;
    if (ipc_value_u64(ipc_value_get(map, "retry_after_ms"), &retry) == 0) {
        e.retry_after_ms = retry < UINT32_MAX ? (uint32_t)retry : UINT32_MAX;
    }
    *ret = e;
    return 0;
}
