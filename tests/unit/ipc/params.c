/* Every row of the table, whatever it is: the limits themselves are taken, what lies beyond them is
 * refused, and the refusal names the field. A new field is covered by being in the table. */
#include "tests/unit/ipc/request.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct proto_string text_of_size(uint64_t bytes)
{
    static char *block;
    if (block == NULL) {
        block = malloc(PROTO_TEXT_BYTES_MAX + 1);
        cr_assert_not_null(block);
        memset(block, 'x', PROTO_TEXT_BYTES_MAX + 1);
    }
    return (struct proto_string){block, bytes};
}

/* A value of the row's type: a size for strings and arrays, else the value itself. */
static void pack_value(struct ipc_buffer *b, const struct proto_field *f, union proto_bound bound)
{
    switch (f->type) {
    case PROTO_BOOL:
        ipc_pack_bool(b, bound.u != 0);
        break;
    case PROTO_U32:
    case PROTO_U64:
        ipc_pack_u64(b, bound.u);
        break;
    case PROTO_I32:
        ipc_pack_i64(b, bound.i);
        break;
    case PROTO_F32:
        ipc_pack_f64(b, bound.f);
        break;
    case PROTO_NAME:
    case PROTO_TEXT:
        ipc_pack_text(b, text_of_size(bound.u).data, bound.u);
        break;
    case PROTO_TOKENS:
        ipc_pack_array(b, bound.u);
        for (uint64_t i = 0; i < bound.u; i++) {
            ipc_pack_u64(b, i);
        }
        break;
    case PROTO_STRINGS:
    case PROTO_TEXTS:
        ipc_pack_array(b, bound.u);
        for (uint64_t i = 0; i < bound.u; i++) {
            ipc_pack_str(b, "stop");
        }
        break;
    case PROTO_BIASES:
        ipc_pack_array(b, bound.u);
        for (uint64_t i = 0; i < bound.u; i++) {
            ipc_pack_array(b, 2);
            ipc_pack_u64(b, i);
            ipc_pack_f32(b, -1.5f);
        }
        break;
    }
}

/* A pair that any method takes for the row. */
static void pack_good(struct ipc_buffer *b, const struct proto_field *f)
{
    ipc_pack_str(b, f->name);
    pack_value(b, f, f->min);
}

/* Packs good values for all required fields but one; returns how many. */
static size_t pack_required(struct ipc_buffer *b, const struct proto_method_info *info,
                            const struct proto_field *except)
{
    size_t n = 0;
    for (size_t i = 0; i < info->n_fields; i++) {
        if (info->fields[i].required && &info->fields[i] != except) {
            pack_good(b, &info->fields[i]);
            n++;
        }
    }
    return n;
}

static void expect_named(const struct proto_method_info *info, const struct proto_field *f,
                         const struct ipc_error *e)
{
    char quoted[64];
    snprintf(quoted, sizeof(quoted), "'%s'", f->name);
    cr_assert_eq(e->code, PROTO_E_INVALID_PARAMS);
    cr_assert_not_null(strstr(e->message, quoted), "%s %s: '%s'", info->name, f->name, e->message);
}

/* What goes into a field: packed by fill, with arg. */
typedef void (*fill_fn)(struct ipc_buffer *b, const struct proto_field *f, const void *arg);

/* Decodes with the field filled so; -EINVAL must name it. */
static int decode_with(enum proto_method method, const struct proto_field *f, fill_fn fill,
                       const void *arg, union proto_params *ret)
{
    const struct proto_method_info *info = proto_method_info(method);
    struct ipc_buffer body;
    struct ipc_error e;
    union proto_params params;

    ipc_buffer_init(&body);
    size_t n = pack_required(&body, info, f);
    ipc_pack_str(&body, f->name);
    fill(&body, f, arg);
    int rc = test_decode(method, n + 1, &body, ret != NULL ? ret : &params, &e, NULL);
    if (rc < 0) {
        cr_assert_eq(rc, -EINVAL);
        expect_named(info, f, &e);
    }
    return rc;
}

static void fill_bound(struct ipc_buffer *b, const struct proto_field *f, const void *arg)
{
    pack_value(b, f, *(const union proto_bound *)arg);
}

static void fill_raw(struct ipc_buffer *b, const struct proto_field *f, const void *arg)
{
    const struct proto_string *raw = arg;
    ipc_pack_raw(b, raw->data, raw->bytes);
}

#define FOR_EACH_FIELD(m, info, f)                                                           \
    for (int m = 0; m < PROTO_METHOD_COUNT; m++)                                             \
        for (const struct proto_method_info *info = proto_method_info((enum proto_method)m); \
             info != NULL; info = NULL)                                                      \
            for (const struct proto_field *f = info->fields; f < info->fields + info->n_fields; f++)

Test(params, both_limits_are_accepted)
{
    FOR_EACH_FIELD(m, info, f)
    {
        cr_assert_eq(decode_with((enum proto_method)m, f, fill_bound, &f->min, NULL), 0,
                     "%s %s min", info->name, f->name);
        cr_assert_eq(decode_with((enum proto_method)m, f, fill_bound, &f->max, NULL), 0,
                     "%s %s max", info->name, f->name);
    }
}

/* The neighbours of a row's limits, packed where the wire can express them; 0 when it cannot. */
static bool pack_beyond(struct ipc_buffer *b, const struct proto_field *f, bool above)
{
    union proto_bound bound = above ? f->max : f->min;
    switch (f->type) {
    case PROTO_BOOL:
        return false;
    case PROTO_U32:
    case PROTO_U64:
        if (above ? bound.u == UINT64_MAX : bound.u == 0) {
            ipc_pack_i64(b, -1);
        } else {
            ipc_pack_u64(b, above ? bound.u + 1 : bound.u - 1);
        }
        return true;
    case PROTO_I32:
        ipc_pack_i64(b, above ? bound.i + 1 : bound.i - 1);
        return true;
    case PROTO_F32:
        ipc_pack_f64(b, above ? bound.f + 1 : bound.f - 1);
        return true;
    default:
        if (!above && bound.u == 0) {
            return false;
        }
        bound.u = above ? bound.u + 1 : bound.u - 1;
        pack_value(b, f, bound);
        return true;
    }
}

Test(params, one_beyond_a_limit_is_refused_by_name)
{
    size_t n = 0;
    FOR_EACH_FIELD(m, info, f)
    {
        for (int above = 0; above < 2; above++) {
            struct ipc_buffer raw;
            ipc_buffer_init(&raw);
            if (pack_beyond(&raw, f, above != 0)) {
                struct proto_string s = {(const char *)raw.data, raw.bytes};
                cr_assert_eq(decode_with((enum proto_method)m, f, fill_raw, &s, NULL), -EINVAL,
                             "%s %s %s", info->name, f->name, above ? "above" : "below");
                n++;
            }
            ipc_buffer_finish(&raw);
        }
    }
    cr_assert_gt(n, 50);
}

/* Whether a row takes a value of that type. */
static bool takes(enum proto_field_type type, enum ipc_value_type value)
{
    switch (type) {
    case PROTO_BOOL:
        return value == IPC_BOOL;
    case PROTO_U32:
    case PROTO_I32:
    case PROTO_U64:
        return value == IPC_UINT;
    case PROTO_F32:
        return value == IPC_UINT || value == IPC_FLOAT;
    case PROTO_NAME:
    case PROTO_TEXT:
        return value == IPC_STR || value == IPC_BIN;
    case PROTO_TOKENS:
    case PROTO_STRINGS:
    case PROTO_TEXTS:
        return value == IPC_ARRAY;
    case PROTO_BIASES:
        return value == IPC_ARRAY || value == IPC_MAP;
    }
    return false;
}

/* Whether its bounds leave room for the samples below: 1, text of one byte, arrays without items.
 */
static bool fits(const struct proto_field *f, enum ipc_value_type value)
{
    bool sized = !proto_field_type_is_scalar(f->type);
    if (f->type == PROTO_U32 || f->type == PROTO_U64) {
        return f->min.u <= 1;
    }
    return !sized || f->min.u <= (value == IPC_STR || value == IPC_BIN ? 1u : 0u);
}

Test(params, wrong_types_are_refused_by_name)
{
    static const struct {
        enum ipc_value_type type;
        struct proto_string raw;
    } values[] = {
        {IPC_NIL, {"\xc0", 1}},
        {IPC_BOOL, {"\xc3", 1}},
        {IPC_UINT, {"\x01", 1}},
        {IPC_FLOAT, {"\xcb\x3f\xf0\0\0\0\0\0\0", 9}}, /* 1.0: not an integer */
        {IPC_STR, {"\xa1x", 2}},
        {IPC_BIN, {"\xc4\x01x", 3}},
        {IPC_ARRAY, {"\x90", 1}},
        {IPC_MAP, {"\x80", 1}},
    };
    FOR_EACH_FIELD(m, info, f)
    {
        for (size_t i = 0; i < sizeof(values) / sizeof(values[0]); i++) {
            bool good = takes(f->type, values[i].type) && fits(f, values[i].type);
            int want = good ? 0 : -EINVAL;
            cr_assert_eq(decode_with((enum proto_method)m, f, fill_raw, &values[i].raw, NULL), want,
                         "%s %s, type %d", info->name, f->name, (int)values[i].type);
        }
    }
}

Test(params, nan_and_infinity_are_refused_everywhere)
{
    static const struct proto_string raws[] = {
        {"\xca\x7f\xc0\0\0", 5},                     /* NaN */
        {"\xcb\x7f\xf8\0\0\0\0\0\0", 9},             /* NaN */
        {"\xca\x7f\x80\0\0", 5},                     /* inf */
        {"\xcb\xff\xf0\0\0\0\0\0\0", 9},             /* -inf */
        {"\xcb\x7f\xe0\0\0\0\0\0\0", 9},             /* 8.99e307: no float */
        {"\xcb\xff\xef\xff\xff\xff\xff\xff\xff", 9}, /* the lowest double */
    };
    FOR_EACH_FIELD(m, info, f)
    {
        for (size_t i = 0; i < sizeof(raws) / sizeof(raws[0]); i++) {
            cr_assert_eq(decode_with((enum proto_method)m, f, fill_raw, &raws[i], NULL), -EINVAL,
                         "%s %s, value %zu", info->name, f->name, i);
        }
    }
}

Test(params, names_hold_no_nul_but_texts_may)
{
    static const struct proto_string raw = {"\xa3x\0y", 4};
    FOR_EACH_FIELD(m, info, f)
    {
        if (f->type == PROTO_NAME || f->type == PROTO_TEXT) {
            cr_assert_eq(decode_with((enum proto_method)m, f, fill_raw, &raw, NULL),
                         f->type == PROTO_NAME ? -EINVAL : 0, "%s %s", info->name, f->name);
        }
    }
}

Test(params, a_missing_field_is_named_and_others_get_their_defaults)
{
    FOR_EACH_FIELD(m, info, f)
    {
        union proto_params params;
        struct ipc_buffer body;
        struct ipc_error e;
        ipc_buffer_init(&body);
        size_t n = pack_required(&body, info, f);
        int rc = test_decode((enum proto_method)m, n, &body, &params, &e, NULL);
        if (f->required) {
            cr_assert_eq(rc, -EINVAL);
            expect_named(info, f, &e);
            continue;
        }
        cr_assert_eq(rc, 0);
        const char *member = (const char *)&params + f->offset;
        cr_assert_not(*(const bool *)((const char *)&params + f->has_offset));
        cr_assert_eq(params.ping.n_fields, info->n_fields);
        if (f->type == PROTO_F32) {
            cr_assert_eq(*(const float *)member, (float)f->fallback.f, "%s", f->name);
        } else if (f->type == PROTO_U32) {
            cr_assert_eq(*(const uint32_t *)member, f->fallback.u, "%s", f->name);
        } else if (f->type == PROTO_I32) {
            cr_assert_eq(*(const int32_t *)member, f->fallback.i, "%s", f->name);
        } else if (f->type == PROTO_BOOL) {
            cr_assert_eq(*(const bool *)member, f->fallback.u, "%s", f->name);
        } else if (!proto_field_type_is_scalar(f->type)) {
            const struct proto_string *s = (const struct proto_string *)member;
            cr_assert_not_null(s->data, "%s", f->name); /* all sized types begin alike */
            cr_assert_eq(s->bytes, 0);
        }
    }
}

Test(params, duplicates_are_refused_by_name)
{
    FOR_EACH_FIELD(m, info, f)
    {
        union proto_params params;
        struct ipc_buffer body;
        struct ipc_error e;
        ipc_buffer_init(&body);
        size_t n = pack_required(&body, info, f);
        pack_good(&body, f);
        pack_good(&body, f);
        cr_assert_eq(test_decode((enum proto_method)m, n + 2, &body, &params, &e, NULL), -EINVAL);
        expect_named(info, f, &e);
    }
}

Test(params, unknown_keys_are_ignored_whatever_they_are)
{
    for (int m = 0; m < PROTO_METHOD_COUNT; m++) {
        union proto_params params;
        struct ipc_buffer body;
        struct ipc_error e;
        ipc_buffer_init(&body);
        size_t n = pack_required(&body, proto_method_info((enum proto_method)m), NULL);
        ipc_pack_str(&body, "x_new");
        ipc_pack_array(&body, 1);
        ipc_pack_f64(&body, NAN);
        ipc_pack_str(&body, "x_new"); /* twice: what is not known is not judged */
        ipc_pack_nil(&body);
        ipc_pack_u64(&body, 5);
        ipc_pack_nil(&body);
        ipc_pack_nil(&body);
        ipc_pack_nil(&body);
        ipc_pack_str(&body, "");
        ipc_pack_nil(&body);
        cr_assert_eq(test_decode((enum proto_method)m, n + 5, &body, &params, &e, NULL), 0, "%s",
                     e.message);
    }
}

Test(params, nothing_is_written_when_one_is_refused)
{
    union proto_params params, before;
    struct ipc_buffer body;
    struct ipc_error e;
    memset(&params, 0x5a, sizeof(params));
    before = params;
    ipc_buffer_init(&body);
    ipc_pack_str(&body, "model");
    ipc_pack_str(&body, "tiny");
    ipc_pack_str(&body, "top_p");
    ipc_pack_f32(&body, 1.5f);
    cr_assert_eq(test_decode(PROTO_TEXT_GENERATE, 2, &body, &params, &e, NULL), -EINVAL);
    cr_assert_str_eq(e.message, "'top_p' is 1.5; it must be 0 to 1");
    cr_assert_eq(memcmp(&params, &before, sizeof(params)), 0);
}
