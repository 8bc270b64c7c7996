/* ipc/api_info.c - the result of gqa.api_info: the table of protocol.h, told to clients. */
#include "ipc/codec.h"

static void pack_bound(struct ipc_buffer *b, enum proto_field_type type, union proto_bound bound)
{
    switch (type) {
    case PROTO_BOOL:
        ipc_pack_bool(b, bound.u != 0);
        break;
    case PROTO_I32:
        ipc_pack_i64(b, bound.i);
        break;
    case PROTO_F32:
        ipc_pack_f64(b, bound.f);
        break;
    default:
        ipc_pack_u64(b, bound.u);
        break;
    }
}

/* {name, type, required, bounds, min, max, default?, doc} */
static void pack_field(struct ipc_buffer *b, const struct proto_field *f)
{
    bool has_default = !f->required && proto_field_type_is_scalar(f->type);

    ipc_pack_map(b, has_default ? 8 : 7);
    ipc_pack_str(b, "name");
    ipc_pack_str(b, f->name);
    ipc_pack_str(b, "type");
    ipc_pack_str(b, proto_field_type_name(f->type));
    ipc_pack_str(b, "required");
    ipc_pack_bool(b, f->required);
    ipc_pack_str(b, "bounds");
    ipc_pack_str(b, proto_field_type_bounds(f->type));
    ipc_pack_str(b, "min");
    pack_bound(b, f->type, f->min);
    ipc_pack_str(b, "max");
    pack_bound(b, f->type, f->max);
    if (has_default) {
        ipc_pack_str(b, "default");
        pack_bound(b, f->type, f->fallback);
    }
    ipc_pack_str(b, "doc");
    ipc_pack_str(b, f->doc);
}

static void pack_method(struct ipc_buffer *b, const struct proto_method_info *info)
{
    ipc_pack_map(b, 4);
    ipc_pack_str(b, "name");
    ipc_pack_str(b, info->name);
    ipc_pack_str(b, "access");
    ipc_pack_str(b, proto_access_name(info->access));
    ipc_pack_str(b, "doc");
    ipc_pack_str(b, info->doc);
    ipc_pack_str(b, "params");
    ipc_pack_array(b, info->n_fields);
    for (size_t i = 0; i < info->n_fields; i++) {
        pack_field(b, &info->fields[i]);
    }
}

static void pack_errors(struct ipc_buffer *b)
{
    size_t count = 0;
    while (proto_error_at(count) != PROTO_OK) {
        count++;
    }
    ipc_pack_array(b, count);
    for (size_t i = 0; i < count; i++) {
        enum proto_error_code code = proto_error_at(i);
        ipc_pack_map(b, 3);
        ipc_pack_str(b, "name");
        ipc_pack_str(b, proto_error_name(code));
        ipc_pack_str(b, "code");
        ipc_pack_u64(b, code);
        ipc_pack_str(b, "doc");
        ipc_pack_str(b, proto_error_doc(code));
    }
}

static void pack_limits(struct ipc_buffer *b)
{
    static const struct {
        const char *name;
        uint64_t value;
    } limits[] = {
        {"frame_bytes", PROTO_FRAME_BYTES_MAX},     {"depth", PROTO_DEPTH_MAX},
        {"elements", PROTO_ELEMENTS_MAX},           {"tokens", PROTO_TOKENS_MAX},
        {"text_bytes", PROTO_TEXT_BYTES_MAX},       {"name_bytes", PROTO_NAME_BYTES_MAX},
        {"path_bytes", PROTO_PATH_BYTES_MAX},       {"stops", PROTO_STOPS_MAX},
        {"stop_bytes", PROTO_STOP_BYTES_MAX},       {"biases", PROTO_BIASES_MAX},
        {"samplers", PROTO_SAMPLERS_MAX},           {"grammar_bytes", PROTO_GRAMMAR_BYTES_MAX},
        {"schema_bytes", PROTO_SCHEMA_BYTES_MAX},   {"breakers", PROTO_BREAKERS_MAX},
        {"breaker_bytes", PROTO_BREAKER_BYTES_MAX}, {"inputs", PROTO_INPUTS_MAX},
    };
    size_t count = sizeof(limits) / sizeof(limits[0]);
    ipc_pack_map(b, count);
    for (size_t i = 0; i < count; i++) {
        ipc_pack_str(b, limits[i].name);
        ipc_pack_u64(b, limits[i].value);
    }
}

void ipc_pack_api_info(struct ipc_buffer *b)
{
    ipc_pack_map(b, 4);
    ipc_pack_str(b, "protocol");
    ipc_pack_u64(b, GQA_PROTOCOL_VERSION);
    ipc_pack_str(b, "methods");
    ipc_pack_array(b, PROTO_METHOD_COUNT);
    for (int m = 0; m < PROTO_METHOD_COUNT; m++) {
        pack_method(b, proto_method_info((enum proto_method)m));
    }
    ipc_pack_str(b, "errors");
    pack_errors(b);
    ipc_pack_str(b, "limits");
    pack_limits(b);
}
