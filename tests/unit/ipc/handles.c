/* Handles: bytes in a data area that stand in the place of binary, on both sides. */
#include "ipc/codec.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

static uint8_t area[256];

static int find(void *arg, const struct ipc_handle *h, const uint8_t **ret)
{
    unsigned *n_found = arg;
    if (h->offset > sizeof(area) || h->bytes > sizeof(area) - h->offset) {
        return -EPROTO;
    }
    (*n_found)++;
    *ret = area + h->offset;
    return 0;
}

/* An event with a tensor of shape (2, 4) by that handle, and a map that only looks like one. */
static void pack_event(struct ipc_buffer *b, uint64_t offset, uint64_t bytes)
{
    const uint64_t shape[2] = {2, 4};
    const struct ipc_handle handle = {offset, bytes};
    ipc_buffer_init(b);
    ipc_pack_event(b, 7, 0);
    ipc_pack_map(b, 2);
    ipc_pack_str(b, "logits");
    ipc_pack_tensor_f32_by_handle(b, &handle, shape, 2);
    ipc_pack_str(b, "other");
    ipc_pack_map(b, 2);
    ipc_pack_str(b, "ring");
    ipc_pack_str(b, "of fire");
    ipc_pack_str(b, "bytes");
    ipc_pack_u64(b, 1);
}

static const struct ipc_value *data_of(const struct ipc_message *m)
{
    return ipc_value_get(ipc_value_get(ipc_value_at(m->params, 2), "logits"), "data");
}

Test(handles, become_binary_where_they_point)
{
    struct ipc_buffer b;
    struct ipc_message m;
    struct proto_string s;
    uint32_t id;
    unsigned n_found = 0;
    pack_event(&b, 64, 32);
    cr_assert_eq(ipc_message_parse(b.data, b.bytes, &m, &id), 0);
    cr_assert_eq(ipc_message_resolve(&m, find, &n_found), 0);
    cr_assert_eq(n_found, 1);
    cr_assert_eq(ipc_value_bytes(data_of(&m), &s), 0);
    cr_assert_eq((const uint8_t *)s.data, area + 64, "not copied");
    cr_assert_eq(s.bytes, 32);

    area[64] = 1;
    cr_assert_eq(ipc_message_own(&m, area, sizeof(area)), 0);
    area[64] = 2;
    cr_assert_eq(ipc_value_bytes(data_of(&m), &s), 0);
    cr_assert_eq(s.data[0], 1, "a copy of its own by now");
    cr_assert_eq(s.bytes, 32);
    ipc_message_finish(&m);
    ipc_buffer_finish(&b);
}

Test(handles, that_lead_outside_are_refused)
{
    static const struct ipc_handle bad[] = {{0, 257},        {256, 1},        {257, 0},
                                            {UINT64_MAX, 1}, {8, UINT64_MAX}, {0, 1ull << 32}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct ipc_buffer b;
        struct ipc_message m;
        uint32_t id;
        unsigned n_found = 0;
        pack_event(&b, bad[i].offset, bad[i].bytes);
        cr_assert_eq(ipc_message_parse(b.data, b.bytes, &m, &id), 0);
        cr_expect_eq(ipc_message_resolve(&m, find, &n_found), -EPROTO, "handle %zu", i);
        cr_expect_eq(n_found, 0);
        ipc_message_finish(&m);
        ipc_buffer_finish(&b);
    }
}

/* text.detokenize with tokens by handle, against an area of that size. */
static int decode(struct ipc_message *m, uint64_t offset, uint64_t bytes, uint64_t area_bytes,
                  union proto_params *ret, struct ipc_error *e)
{
    struct ipc_buffer b;
    const struct ipc_handle handle = {offset, bytes};
    uint32_t id;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 1, "text.detokenize");
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "m");
    ipc_pack_str(&b, "tokens");
    ipc_pack_handle(&b, &handle);
    static uint8_t frame[256]; /* strings point into it */
    memcpy(frame, b.data, b.bytes);
    cr_assert_eq(ipc_message_parse(frame, b.bytes, m, &id), 0);
    ipc_buffer_finish(&b);
    m->area = area;
    m->area_bytes = area_bytes;
    return ipc_params_decode(PROTO_TEXT_DETOKENIZE, m, ret, e);
}

Test(handles, tokens_are_copied_before_they_are_looked_at)
{
    const int32_t ids[3] = {5, 6, 7};
    struct ipc_message m;
    struct ipc_error e;
    union proto_params p;
    memcpy(area + 4, ids, sizeof(ids));
    cr_assert_eq(decode(&m, 4, sizeof(ids), sizeof(area), &p, &e), 0);
    memset(area, 0xff, sizeof(area));
    cr_assert_eq(p.text_detokenize.tokens.count, 3);
    cr_assert_eq(memcmp(p.text_detokenize.tokens.ids, ids, sizeof(ids)), 0);
    ipc_message_finish(&m);

    cr_assert_eq(decode(&m, 4, sizeof(ids), sizeof(area), &p, &e), -EINVAL, "negative ids by now");
    cr_assert_not_null(strstr(e.message, "'tokens', item 0"));
    ipc_message_finish(&m);
}

Test(handles, of_params_name_what_is_wrong_with_them)
{
    static const struct {
        uint64_t offset, bytes, area_bytes;
        const char *words;
    } bad[] = {{0, 4, 0, "no rings"},           {0, 260, 256, "260 bytes at 0"},
               {256, 4, 256, "4 bytes at 256"}, {UINT64_MAX - 3, 8, 256, "8 bytes at"},
               {0, UINT64_MAX, 256, "has 256"}, {0, 6, 256, "4 bytes each"}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct ipc_message m;
        struct ipc_error e;
        union proto_params p;
        cr_expect_eq(decode(&m, bad[i].offset, bad[i].bytes, bad[i].area_bytes, &p, &e), -EINVAL);
        cr_expect_eq(e.code, PROTO_E_INVALID_PARAMS);
        cr_expect(strstr(e.message, "'tokens'") && strstr(e.message, bad[i].words), "%zu: %s", i,
                  e.message);
        ipc_message_finish(&m);
    }
}

/* text.embed with so many bytes by handle for some of its fields, 0: not that one. */
static int decode_embed(uint64_t prompt_bytes, uint64_t query_bytes, uint64_t token_bytes,
                        const char *handle_of, struct ipc_error *e)
{
    static uint8_t frame[512], large[PROTO_FRAME_BYTES_MAX];
    const char *names[] = {"prompt", "query", "tokens", handle_of};
    const uint64_t bytes[] = {prompt_bytes, query_bytes, token_bytes, handle_of != NULL ? 4 : 0};
    struct ipc_buffer b;
    struct ipc_message m;
    union proto_params p;
    uint32_t id;
    size_t n = 0;
    for (size_t i = 0; i < 4; i++) {
        n += bytes[i] > 0;
    }
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 1, "text.embed");
    ipc_pack_map(&b, 1 + n);
    ipc_pack_str(&b, "model");
    ipc_pack_str(&b, "m");
    for (size_t i = 0; i < 4; i++) {
        if (bytes[i] > 0) {
            ipc_pack_str(&b, names[i]);
            ipc_pack_handle(&b, &(struct ipc_handle){0, bytes[i]});
        }
    }
    cr_assert_leq(b.bytes, sizeof(frame));
    memcpy(frame, b.data, b.bytes);
    cr_assert_eq(ipc_message_parse(frame, b.bytes, &m, &id), 0);
    ipc_buffer_finish(&b);
    m.area = large;
    m.area_bytes = sizeof(large);
    int rc = ipc_params_decode(PROTO_TEXT_EMBED, &m, &p, e);
    ipc_message_finish(&m);
    return rc;
}

/* Sizes are looked at before anything is copied, or memory asked for. */
Test(handles, name_no_more_than_their_field_and_their_message_may_have)
{
    static const uint64_t text = PROTO_TEXT_BYTES_MAX, tokens = 4ull * PROTO_TOKENS_MAX;
    struct ipc_error e;
    cr_expect_eq(decode_embed(text, text, 0, NULL, &e), 0, "%s", e.message);
    cr_expect_eq(decode_embed(text, 0, tokens, NULL, &e), 0, "%s", e.message);

    cr_expect_eq(decode_embed(text + 1, 0, 0, NULL, &e), -EINVAL);
    cr_expect(strstr(e.message, "'prompt' has a length of 8388609"), "%s", e.message);
    cr_expect_eq(decode_embed(0, 0, tokens + 4, NULL, &e), -EINVAL);
    cr_expect(strstr(e.message, "'tokens' has a count of 1048577"), "%s", e.message);
    cr_expect_eq(decode_embed(text, text, 4, NULL, &e), -EINVAL);
    cr_expect(strstr(e.message, "'tokens' is a handle of 4 bytes") &&
                  strstr(e.message, "may name 16777216"),
              "%s", e.message);

    static const char *const others[] = {"normalize", "inputs", "n_dims", "deadline_ms"};
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
        cr_expect_eq(decode_embed(0, 0, 0, others[i], &e), -EINVAL, "%s", others[i]);
        cr_expect(strstr(e.message, "stands for binary"), "%s", e.message);
    }
}
