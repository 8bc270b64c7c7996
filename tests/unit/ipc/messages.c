/* Messages: every packer read back, every malformed head refused with the id that it had. */
#include "tests/unit/ipc/request.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static bool text_is(struct proto_string s, const char *text)
{
    return s.bytes == strlen(text) && memcmp(s.data, text, s.bytes) == 0;
}

Test(messages, integers_and_floats_come_back_exactly)
{
    static const uint64_t us[] = {0, 127, 128, 255, 256, 65535, 65536, UINT32_MAX, UINT64_MAX};
    static const int64_t is[] = {0, -1, -32, -33, -129, -32769, INT32_MIN, INT64_MIN, INT64_MAX};
    static const double fs[] = {0.1, -1e300, INFINITY};
    struct ipc_buffer b;
    uint64_t u;
    int64_t i;
    double f;

    ipc_buffer_init(&b);
    ipc_pack_notification(&b, "x");
    ipc_pack_array(&b, 22);
    for (size_t n = 0; n < 9; n++) {
        ipc_pack_u64(&b, us[n]);
        ipc_pack_i64(&b, is[n]);
    }
    for (size_t n = 0; n < 3; n++) {
        ipc_pack_f64(&b, fs[n]);
    }
    ipc_pack_f32(&b, 0.1f);
    struct test_message t = test_parse(&b);
    const struct ipc_value *p = t.message.params;
    for (size_t n = 0; n < 9; n++) {
        cr_assert_eq(ipc_value_u64(ipc_value_at(p, 2 * n), &u), 0);
        cr_assert_eq(u, us[n]);
        cr_assert_eq(ipc_value_i64(ipc_value_at(p, 2 * n + 1), &i), 0);
        cr_assert_eq(i, is[n]);
        cr_assert_eq(ipc_value_u64(ipc_value_at(p, 2 * n + 1), &u), is[n] < 0 ? -ERANGE : 0);
        cr_assert_eq(ipc_value_i64(ipc_value_at(p, 2 * n), &i), us[n] > INT64_MAX ? -ERANGE : 0);
    }
    for (size_t n = 0; n < 3; n++) {
        cr_assert_eq(ipc_value_f64(ipc_value_at(p, 18 + n), &f), 0);
        cr_assert_eq(f, fs[n]);
    }
    cr_assert_eq(ipc_value_f64(ipc_value_at(p, 21), &f), 0);
    cr_assert_eq(f, (double)0.1f);
    cr_assert_null(ipc_value_at(p, 22));
    test_message_finish(&t);
}

Test(messages, text_is_a_string_when_it_is_utf8_and_binary_otherwise)
{
    static const struct {
        const char *text;
        size_t bytes;
        enum ipc_value_type type;
    } cases[] = {
        {"", 0, IPC_STR},
        {"a\0b", 3, IPC_STR},
        {"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", 9, IPC_STR},
        {"\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf", 10, IPC_STR}, /* the last ones allowed */
        {"\xc3", 1, IPC_BIN},                                      /* cut */
        {"\xe2\x82", 2, IPC_BIN},
        {"\x80", 1, IPC_BIN},
        {"\xc0\x80", 2, IPC_BIN},         /* overlong */
        {"\xe0\x9f\xbf", 3, IPC_BIN},     /* overlong */
        {"\xf0\x8f\xbf\xbf", 4, IPC_BIN}, /* overlong */
        {"\xed\xa0\x80", 3, IPC_BIN},     /* a surrogate */
        {"\xf4\x90\x80\x80", 4, IPC_BIN}, /* beyond the last */
        {"\xff", 1, IPC_BIN},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct ipc_buffer b;
        struct proto_string s;
        ipc_buffer_init(&b);
        ipc_pack_response_ok(&b, 1);
        ipc_pack_text(&b, cases[i].text, cases[i].bytes);
        struct test_message t = test_parse(&b);
        cr_assert_eq(ipc_value_type(t.message.result), cases[i].type, "case %zu", i);
        cr_assert_eq(ipc_value_bytes(t.message.result, &s), 0);
        cr_assert_eq(s.bytes, cases[i].bytes);
        cr_assert_eq(memcmp(s.data, cases[i].text, s.bytes), 0);
        test_message_finish(&t);
    }
}

Test(messages, containers_are_walked)
{
    static const int32_t ids[3] = {1, -2, 300000};
    const struct ipc_value *key, *value;
    struct ipc_buffer b;
    int64_t id;
    bool flag;

    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, 7);
    ipc_pack_map(&b, 3);
    ipc_pack_str(&b, "tokens");
    ipc_pack_tokens(&b, ids, 3);
    ipc_pack_str(&b, "flag");
    ipc_pack_bool(&b, true);
    ipc_pack_str(&b, "none");
    ipc_pack_nil(&b);
    struct test_message t = test_parse(&b);
    cr_assert_eq(t.message.kind, IPC_RESPONSE);
    cr_assert_eq(t.message.id, 7);
    cr_assert_null(t.message.error);
    const struct ipc_value *tokens = ipc_value_get(t.message.result, "tokens");
    cr_assert_eq(ipc_value_count(tokens), 3);
    for (size_t i = 0; i < 3; i++) {
        cr_assert_eq(ipc_value_i64(ipc_value_at(tokens, i), &id), 0);
        cr_assert_eq(id, ids[i]);
    }
    cr_assert_eq(ipc_value_bool(ipc_value_get(t.message.result, "flag"), &flag), 0);
    cr_assert(flag);
    cr_assert_eq(ipc_value_type(ipc_value_get(t.message.result, "none")), IPC_NIL);
    cr_assert_null(ipc_value_get(t.message.result, "fla"));
    cr_assert_null(ipc_value_get(t.message.result, "flags"));
    cr_assert(ipc_value_pair(t.message.result, 2, &key, &value));
    cr_assert_not(ipc_value_pair(t.message.result, 3, &key, &value));
    cr_assert_not(ipc_value_pair(tokens, 0, &key, &value));
    cr_assert_null(ipc_value_at(t.message.result, 0));
    test_message_finish(&t);
}

Test(messages, absent_values_and_other_types_say_so)
{
    struct ipc_buffer b;
    struct proto_string s;
    uint64_t u = 5;
    int64_t i;
    double f;
    bool flag;

    cr_assert_eq(ipc_value_u64(NULL, &u), -ENOENT);
    cr_assert_eq(ipc_value_i64(NULL, &i), -ENOENT);
    cr_assert_eq(ipc_value_f64(NULL, &f), -ENOENT);
    cr_assert_eq(ipc_value_bool(NULL, &flag), -ENOENT);
    cr_assert_eq(ipc_value_bytes(NULL, &s), -ENOENT);
    cr_assert_eq(ipc_value_type(NULL), IPC_NIL);
    cr_assert_eq(ipc_value_count(NULL), 0);
    cr_assert_null(ipc_value_at(NULL, 0));
    cr_assert_null(ipc_value_get(NULL, "x"));

    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, 7);
    ipc_pack_f64(&b, 1);
    struct test_message t = test_parse(&b);
    cr_assert_eq(ipc_value_u64(t.message.result, &u), -EINVAL);
    cr_assert_eq(ipc_value_i64(t.message.result, &i), -EINVAL);
    cr_assert_eq(ipc_value_bool(t.message.result, &flag), -EINVAL);
    cr_assert_eq(ipc_value_bytes(t.message.result, &s), -EINVAL);
    cr_assert_eq(u, 5);
    test_message_finish(&t);
}

Test(messages, a_tensor_carries_its_shape_and_bytes)
{
    static const float values[6] = {1, 2, 3, -4, INFINITY, 0.5f};
    static const uint64_t shape[2] = {2, 3};
    struct ipc_buffer b;
    struct proto_string s;
    uint64_t n;
    bool nd;

    ipc_buffer_init(&b);
    ipc_pack_event(&b, 3, 9);
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "logits");
    ipc_pack_tensor_f32(&b, values, shape, 2);
    struct test_message t = test_parse(&b);
    cr_assert_eq(t.message.kind, IPC_NOTIFICATION);
    cr_assert(text_is(t.message.method, "gqa.event"));
    cr_assert_eq(ipc_value_u64(ipc_value_at(t.message.params, 0), &n), 0);
    cr_assert_eq(n, 3);
    cr_assert_eq(ipc_value_u64(ipc_value_at(t.message.params, 1), &n), 0);
    cr_assert_eq(n, 9);
    const struct ipc_value *tensor = ipc_value_get(ipc_value_at(t.message.params, 2), "logits");
    cr_assert_eq(ipc_value_bool(ipc_value_get(tensor, "nd"), &nd), 0);
    cr_assert(nd);
    cr_assert_eq(ipc_value_bytes(ipc_value_get(tensor, "type"), &s), 0);
    cr_assert(text_is(s, "<f4"));
    cr_assert_eq(ipc_value_count(ipc_value_get(tensor, "shape")), 2);
    cr_assert_eq(ipc_value_u64(ipc_value_at(ipc_value_get(tensor, "shape"), 1), &n), 0);
    cr_assert_eq(n, 3);
    cr_assert_eq(ipc_value_bytes(ipc_value_get(tensor, "data"), &s), 0);
    cr_assert_eq(s.bytes, sizeof(values));
    cr_assert_eq(memcmp(s.data, values, sizeof(values)), 0);
    test_message_finish(&t);
}

Test(messages, an_error_response_tells_code_name_message_and_hint)
{
    struct ipc_error e;
    struct ipc_buffer b;
    struct proto_string s;
    uint64_t n;

    for (int hint = 0; hint < 2; hint++) {
        ipc_error_set(&e, PROTO_E_BUSY, "queue of %d is full", 8);
        e.retry_after_ms = hint ? 250 : 0;
        ipc_buffer_init(&b);
        ipc_pack_response_error(&b, UINT32_MAX, &e);
        struct test_message t = test_parse(&b);
        cr_assert_eq(t.message.id, UINT32_MAX);
        cr_assert_null(t.message.result);
        cr_assert_eq(ipc_value_u64(ipc_value_get(t.message.error, "code"), &n), 0);
        cr_assert_eq(n, PROTO_E_BUSY);
        cr_assert_eq(ipc_value_bytes(ipc_value_get(t.message.error, "name"), &s), 0);
        cr_assert(text_is(s, "BUSY"));
        cr_assert_eq(ipc_value_bytes(ipc_value_get(t.message.error, "message"), &s), 0);
        cr_assert(text_is(s, "queue of 8 is full"));
        cr_assert_eq(ipc_value_u64(ipc_value_get(t.message.error, "retry_after_ms"), &n),
                     hint ? 0 : -ENOENT);
        test_message_finish(&t);
    }
}

Test(messages, an_error_quotes_anything_safely)
{
    struct ipc_error e;
    char big[1000];
    ipc_error_set(&e, PROTO_E_NOT_FOUND, "no '%s'", "a\x1b[31m\nb\xff\xc3\xa9\x7f");
    cr_assert_str_eq(e.message, "no 'a?[31m?b?\xc3\xa9?'");
    for (size_t i = 0; i + 1 < sizeof(big); i++) {
        big[i] = i % 2 ? '\xa9' : '\xc3';
    }
    big[sizeof(big) - 1] = '\0';
    ipc_error_set(&e, PROTO_E_NOT_FOUND, "%s", big);
    cr_assert_eq(strlen(e.message), sizeof(e.message) - 1);
    cr_assert_eq(e.message[sizeof(e.message) - 2], '?'); /* the cut character */
}

static int parse_exact(const void *data, size_t bytes, uint32_t *ret_id)
{
    struct ipc_message m;
    uint8_t *copy = malloc(bytes > 0 ? bytes : 1);
    cr_assert_not_null(copy);
    memcpy(copy, data, bytes);
    int rc = ipc_message_parse(copy, bytes, &m, ret_id);
    if (rc == 0) {
        ipc_message_finish(&m);
    }
    free(copy);
    return rc;
}

Test(messages, malformed_ones_are_refused_with_the_id_they_had)
{
#define CASE(bytes, id)              \
    {                                \
        bytes, sizeof(bytes) - 1, id \
    }
    static const struct {
        const char *data;
        size_t bytes;
        uint32_t id;
    } cases[] = {
        CASE("\xc0", UINT32_MAX),                  /* no array */
        CASE("\x80", UINT32_MAX),                  /* a map */
        CASE("\x90", UINT32_MAX),                  /* empty */
        CASE("\x94\x03\x05\xa1x\x80", UINT32_MAX), /* kind 3 */
        CASE("\x94\xff\x05\xa1x\x80", UINT32_MAX), /* kind -1 */
        CASE("\x94\xa1"
             "0\x05\xa1x\x80",
             UINT32_MAX),                                          /* kind "0" */
        CASE("\x94\xca\0\0\0\0\x05\xa1x\x80", UINT32_MAX),         /* kind 0.0 */
        CASE("\x92\x00\x05", 5),                                   /* request: too short */
        CASE("\x93\x00\x05\xa1x", 5),                              /* no params */
        CASE("\x95\x00\x05\xa1x\x80\xc0", 5),                      /* too long */
        CASE("\x94\x00\xff\xa1x\x80", UINT32_MAX),                 /* id -1 */
        CASE("\x94\x00\xcf\0\0\0\1\0\0\0\0\xa1x\x80", UINT32_MAX), /* id 2^32 */
        CASE("\x94\x00\xa1"
             "5\xa1x\x80",
             UINT32_MAX),                              /* id "5" */
        CASE("\x94\x00\x05\x07\x80", 5),               /* method 7 */
        CASE("\x94\x00\x05\xc4\x01x\x80", 5),          /* method binary */
        CASE("\x94\x00\x05\xa1x\x90", 5),              /* params an array */
        CASE("\x94\x00\x05\xa1x\xc0", 5),              /* params nil */
        CASE("\x93\x01\x05\xc0", UINT32_MAX),          /* response: too short */
        CASE("\x94\x01\xa1x\xc0\xc0", UINT32_MAX),     /* id "x" */
        CASE("\x94\x01\x05\xa1x\xc0", UINT32_MAX),     /* error "x" */
        CASE("\x92\x02\xa1x", UINT32_MAX),             /* notification: too short */
        CASE("\x94\x02\xa1x\x90\x90", UINT32_MAX),     /* too long */
        CASE("\x93\x02\x05\x90", UINT32_MAX),          /* method 5 */
        CASE("\x93\x02\xa1x\xc0", UINT32_MAX),         /* params nil */
        CASE("\x94\x00\x05\xa1x\x80\xc0", UINT32_MAX), /* bytes behind the end */
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint32_t id = 4242;
        cr_assert_eq(parse_exact(cases[i].data, cases[i].bytes, &id), -EPROTO, "case %zu", i);
        cr_assert_eq(id, cases[i].id, "case %zu: id %u", i, id);
    }
}

Test(messages, the_smallest_good_ones_are_accepted)
{
    uint32_t id = 4242;
    cr_assert_eq(parse_exact("\x94\x00\x05\xa1x\x80", 6, &id), 0);
    cr_assert_eq(parse_exact("\x94\x01\x05\xc0\xc0", 5, &id), 0);
    cr_assert_eq(parse_exact("\x94\x01\x05\x80\xc0", 5, &id), 0);
    cr_assert_eq(parse_exact("\x93\x02\xa1x\x90", 5, &id), 0);
    cr_assert_eq(parse_exact("\x93\x02\xa1x\x80", 5, &id), 0);
    cr_assert_eq(id, 4242);
}

Test(messages, one_cut_anywhere_never_parses)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, 1);
    ipc_pack_api_info(&b);
    for (size_t cut = 0; cut < b.bytes; cut++) {
        uint32_t id;
        cr_assert_eq(parse_exact(b.data, cut, &id), -EPROTO, "cut at %zu", cut);
    }
    ipc_buffer_finish(&b);
}

Test(messages, finishing_twice_is_harmless)
{
    struct ipc_message m;
    uint32_t id;
    cr_assert_eq(ipc_message_parse((const uint8_t *)"\x93\x02\xa1x\x90", 5, &m, &id), 0);
    ipc_message_finish(&m);
    ipc_message_finish(&m);
    cr_assert_null(m.params);
}
