/* client/params.c - building a call's parameters. */
#include "client/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int gqa_params_create(struct gqa_params **ret)
{
    struct gqa_params *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        return -ENOMEM;
    }
    ipc_buffer_init(&p->body);
    *ret = p;
    return 0;
}

struct gqa_params *gqa_params_destroy(struct gqa_params *p)
{
    if (p != NULL) {
        ipc_buffer_finish(&p->body);
        free(p);
    }
    return NULL;
}

static int fail(struct gqa_params *p, int err)
{
    p->error = err;
    return err;
}

/* Packs the key; false when nothing more is to be packed. bytes bounds the value's size. */
static bool begin(struct gqa_params *p, const char *key, bool given, size_t bytes)
{
    if (p->error < 0) {
        return false;
    }
    if (key == NULL || !given) {
        fail(p, -EINVAL);
        return false;
    }
    if (bytes > PROTO_FRAME_BYTES_MAX || strlen(key) > PROTO_NAME_BYTES_MAX ||
        p->body.bytes > PROTO_FRAME_BYTES_MAX) {
        fail(p, -EMSGSIZE);
        return false;
    }
    ipc_pack_str(&p->body, key);
    return true;
}

static int end(struct gqa_params *p)
{
    if (p->body.error < 0) {
        return fail(p, p->body.error);
    }
    p->n_keys++;
    return 0;
}

int client_params_handle(struct gqa_params *p, const char *key, const struct ipc_handle *handle)
{
    if (!begin(p, key, handle != NULL, 0)) {
        return p->error;
    }
    ipc_pack_handle(&p->body, handle);
    return end(p);
}

int gqa_params_bool(struct gqa_params *p, const char *key, bool value)
{
    if (!begin(p, key, true, 0)) {
        return p->error;
    }
    ipc_pack_bool(&p->body, value);
    return end(p);
}

int gqa_params_i64(struct gqa_params *p, const char *key, int64_t value)
{
    if (!begin(p, key, true, 0)) {
        return p->error;
    }
    ipc_pack_i64(&p->body, value);
    return end(p);
}

int gqa_params_u64(struct gqa_params *p, const char *key, uint64_t value)
{
    if (!begin(p, key, true, 0)) {
        return p->error;
    }
    ipc_pack_u64(&p->body, value);
    return end(p);
}

int gqa_params_f64(struct gqa_params *p, const char *key, double value)
{
    if (!begin(p, key, true, 0)) {
        return p->error;
    }
    ipc_pack_f64(&p->body, value);
    return end(p);
}

int gqa_params_str(struct gqa_params *p, const char *key, const char *text)
{
    return gqa_params_text(p, key, text, text != NULL ? strlen(text) : 0);
}

int gqa_params_text(struct gqa_params *p, const char *key, const void *data, size_t bytes)
{
    if (!begin(p, key, data != NULL || bytes == 0, bytes)) {
        return p->error;
    }
    ipc_pack_text(&p->body, data != NULL ? data : "", bytes);
    return end(p);
}

int gqa_params_tokens(struct gqa_params *p, const char *key, const int32_t *ids, size_t count)
{
    if (!begin(p, key, ids != NULL || count == 0, count)) {
        return p->error;
    }
    ipc_pack_tokens(&p->body, ids, count);
    return end(p);
}

int gqa_params_strings(struct gqa_params *p, const char *key, const char *const *texts,
                       size_t count)
{
    if (!begin(p, key, texts != NULL || count == 0, count)) {
        return p->error;
    }
    ipc_pack_array(&p->body, count);
    for (size_t i = 0; i < count; i++) {
        if (texts[i] == NULL) {
            return fail(p, -EINVAL);
        }
        ipc_pack_text(&p->body, texts[i], strlen(texts[i]));
    }
    return end(p);
}

int gqa_params_biases(struct gqa_params *p, const char *key, const int32_t *ids,
                      const float *biases, size_t count)
{
    if (!begin(p, key, (ids != NULL && biases != NULL) || count == 0, count)) {
        return p->error;
    }
    ipc_pack_array(&p->body, count);
    for (size_t i = 0; i < count; i++) {
        ipc_pack_array(&p->body, 2);
        ipc_pack_i64(&p->body, ids[i]);
        ipc_pack_f32(&p->body, biases[i]);
    }
    return end(p);
}
