/* ipc/params.c - a request's params, checked row by row against the table of protocol.h. */
#include "ipc/codec_internal.h"

#include <errno.h>
#include <string.h>

static void set_default(const struct proto_field *f, void *member)
{
    static const int32_t no_token;
    static const struct proto_string no_string = {"", 0};
    static const struct proto_bias no_bias;

    switch (f->type) {
    case PROTO_BOOL:
        *(bool *)member = f->fallback.u != 0;
        break;
    case PROTO_U32:
        *(uint32_t *)member = (uint32_t)f->fallback.u;
        break;
    case PROTO_I32:
        *(int32_t *)member = (int32_t)f->fallback.i;
        break;
    case PROTO_U64:
        *(uint64_t *)member = f->fallback.u;
        break;
    case PROTO_F32:
        *(float *)member = (float)f->fallback.f;
        break;
    case PROTO_NAME:
    case PROTO_TEXT:
        *(struct proto_string *)member = no_string;
        break;
    case PROTO_TOKENS:
        *(struct proto_tokens *)member = (struct proto_tokens){&no_token, 0};
        break;
    case PROTO_STRINGS:
    case PROTO_TEXTS:
        *(struct proto_strings *)member = (struct proto_strings){&no_string, 0};
        break;
    case PROTO_BIASES:
        *(struct proto_biases *)member = (struct proto_biases){&no_bias, 0};
        break;
    }
}

/* The row that a key names; NULL for unknown keys, which a newer client may send. */
static const struct proto_field *find_field(const struct proto_method_info *info,
                                            const struct ipc_value *key)
{
    struct proto_string name;
    if (ipc_value_bytes(key, &name) < 0) {
        return NULL;
    }
    for (size_t i = 0; i < info->n_fields; i++) {
        const struct proto_field *f = &info->fields[i];
        if (strlen(f->name) == name.bytes && memcmp(f->name, name.data, name.bytes) == 0) {
            return f;
        }
    }
    return NULL;
}

static bool *has_member(union proto_params *params, const struct proto_field *f)
{
    return (bool *)((char *)params + f->has_offset);
}

/* Fills what was given; the rest of params holds the defaults already. */
static int decode_map(const struct proto_method_info *info, struct ipc_message *m,
                      union proto_params *params, struct ipc_error *e)
{
    const struct ipc_value *key, *value;
    for (size_t i = 0; ipc_value_pair(m->params, i, &key, &value); i++) {
        struct field_decoder d = {m, find_field(info, key), e};
        if (d.field == NULL) {
            continue;
        }
        bool *has = has_member(params, d.field);
        if (*has) {
            ipc_error_set(e, PROTO_E_INVALID_PARAMS, "'%s' is given twice", d.field->name);
            return -EINVAL;
        }
        int rc = ipc_field_decode(&d, value, (char *)params + d.field->offset);
        if (rc < 0) {
            return rc;
        }
        *has = true;
    }
    return 0;
}

int ipc_params_decode(enum proto_method method, struct ipc_message *m, union proto_params *ret,
                      struct ipc_error *e)
{
    const struct proto_method_info *info = proto_method_info(method);
    union proto_params params;

    memset(&params, 0, sizeof(params));
    for (size_t i = 0; i < info->n_fields; i++) {
        set_default(&info->fields[i], (char *)&params + info->fields[i].offset);
    }
    int rc = decode_map(info, m, &params, e);
    if (rc < 0) {
        return rc;
    }
    for (size_t i = 0; i < info->n_fields; i++) {
        const struct proto_field *f = &info->fields[i];
        if (f->required && !*has_member(&params, f)) {
            ipc_error_set(e, PROTO_E_INVALID_PARAMS, "%s needs '%s': %s", info->name, f->name,
                          f->doc);
            return -EINVAL;
        }
    }
    /* Every params struct begins with it, whichever method's it is. */
    params.ping.n_fields = (uint32_t)info->n_fields;
    *ret = params;
    return 0;
}
