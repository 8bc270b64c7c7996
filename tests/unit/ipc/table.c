/* The table of protocol.h as data, and gqa.api_info, which tells it. */
#include "tests/unit/ipc/request.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <string.h>

Test(table, every_method_is_found_by_its_name)
{
    for (int m = 0; m < PROTO_METHOD_COUNT; m++) {
        const struct proto_method_info *info = proto_method_info((enum proto_method)m);
        enum proto_method found = PROTO_METHOD_COUNT;
        cr_assert_eq(proto_method_by_name(info->name, strlen(info->name), &found), 0);
        cr_assert_eq(found, (enum proto_method)m);
        cr_assert_eq(proto_method_by_name(info->name, strlen(info->name) - 1, &found), -ENOENT);
        cr_assert_eq(proto_method_by_name(info->name, strlen(info->name) + 1, &found), -ENOENT);
        cr_assert_eq(found, (enum proto_method)m);
    }
    cr_assert_null(proto_method_info(PROTO_METHOD_COUNT));
}

/* The build checks integers; floats are no constants that a static assertion takes. */
Test(table, float_rows_are_in_order)
{
    size_t n = 0;
    for (int m = 0; m < PROTO_METHOD_COUNT; m++) {
        const struct proto_method_info *info = proto_method_info((enum proto_method)m);
        for (size_t i = 0; i < info->n_fields; i++) {
            const struct proto_field *f = &info->fields[i];
            if (f->type == PROTO_F32) {
                cr_assert_leq(f->min.f, f->fallback.f, "%s %s", info->name, f->name);
                cr_assert_leq(f->fallback.f, f->max.f, "%s %s", info->name, f->name);
                n++;
            }
        }
    }
    cr_assert_gt(n, 0);
}

Test(table, no_name_comes_twice)
{
    for (int m = 0; m < PROTO_METHOD_COUNT; m++) {
        const struct proto_method_info *info = proto_method_info((enum proto_method)m);
        for (size_t i = 0; i < info->n_fields; i++) {
            for (size_t j = 0; j < i; j++) {
                cr_assert_str_neq(info->fields[i].name, info->fields[j].name);
            }
        }
    }
}

Test(table, errors_have_names_and_unknown_ones_are_said_to_be)
{
    size_t n = 0;
    for (; proto_error_at(n) != PROTO_OK; n++) {
        cr_assert_str_neq(proto_error_name(proto_error_at(n)), "UNKNOWN");
        cr_assert_gt(strlen(proto_error_doc(proto_error_at(n))), 0);
    }
    cr_assert_gt(n, 0);
    cr_assert_str_eq(proto_error_name(PROTO_E_INVALID_PARAMS), "INVALID_PARAMS");
    cr_assert_str_eq(proto_error_name((enum proto_error_code)9999), "UNKNOWN");
}

static void expect_text(const struct ipc_value *map, const char *key, const char *text)
{
    struct proto_string s;
    cr_assert_eq(ipc_value_bytes(ipc_value_get(map, key), &s), 0, "%s", key);
    cr_assert_eq(s.bytes, strlen(text));
    cr_assert_eq(memcmp(s.data, text, s.bytes), 0);
}

static void expect_bound(const struct proto_field *f, const struct ipc_value *v,
                         union proto_bound bound)
{
    uint64_t u;
    int64_t i;
    double d;
    bool b;
    switch (f->type) {
    case PROTO_BOOL:
        cr_assert_eq(ipc_value_bool(v, &b), 0);
        cr_assert_eq(b, bound.u);
        break;
    case PROTO_I32:
        cr_assert_eq(ipc_value_i64(v, &i), 0);
        cr_assert_eq(i, bound.i);
        break;
    case PROTO_F32:
        cr_assert_eq(ipc_value_f64(v, &d), 0);
        cr_assert_eq(d, bound.f);
        break;
    default:
        cr_assert_eq(ipc_value_u64(v, &u), 0);
        cr_assert_eq(u, bound.u);
    }
}

Test(table, api_info_tells_every_row_exactly)
{
    struct ipc_buffer b;
    bool required;

    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, 1);
    ipc_pack_api_info(&b);
    struct test_message t = test_parse(&b);
    const struct ipc_value *methods = ipc_value_get(t.message.result, "methods");
    cr_assert_eq(ipc_value_count(methods), PROTO_METHOD_COUNT);
    for (int m = 0; m < PROTO_METHOD_COUNT; m++) {
        const struct proto_method_info *info = proto_method_info((enum proto_method)m);
        const struct ipc_value *method = ipc_value_at(methods, (size_t)m);
        const struct ipc_value *params = ipc_value_get(method, "params");
        expect_text(method, "name", info->name);
        expect_text(method, "access", proto_access_name(info->access));
        expect_text(method, "doc", info->doc);
        cr_assert_eq(ipc_value_count(params), info->n_fields);
        for (size_t i = 0; i < info->n_fields; i++) {
            const struct proto_field *f = &info->fields[i];
            const struct ipc_value *row = ipc_value_at(params, i);
            expect_text(row, "name", f->name);
            expect_text(row, "type", proto_field_type_name(f->type));
            expect_text(row, "doc", f->doc);
            cr_assert_eq(ipc_value_bool(ipc_value_get(row, "required"), &required), 0);
            cr_assert_eq(required, f->required);
            expect_bound(f, ipc_value_get(row, "min"), f->min);
            expect_bound(f, ipc_value_get(row, "max"), f->max);
            if (!f->required && proto_field_type_is_scalar(f->type)) {
                expect_bound(f, ipc_value_get(row, "default"), f->fallback);
            } else {
                cr_assert_null(ipc_value_get(row, "default"));
            }
        }
    }
    uint64_t value;
    const struct ipc_value *limits = ipc_value_get(t.message.result, "limits");
    cr_assert_eq(ipc_value_u64(ipc_value_get(limits, "frame_bytes"), &value), 0);
    cr_assert_eq(value, PROTO_FRAME_BYTES_MAX);
    cr_assert_geq(ipc_value_count(ipc_value_get(t.message.result, "errors")), 17);
    test_message_finish(&t);
}
