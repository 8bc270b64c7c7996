/* The scanner: the same answer however the input is cut, and no belief in counts. */
#include "tests/unit/ipc/request.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

/* Three messages that together hold every type byte of the format but the extensions. */
static void pack_corpus(struct ipc_buffer *b)
{
    static const uint8_t rare[] = {
        0xdc, 0x00, 0x0b,                                     /* array 16 of 11 */
        0xc0, 0xc2, 0xc3,                                     /* nil, false, true */
        0xd0, 0x80, 0xd1, 0x80, 0x00,                         /* int 8, 16 */
        0xdb, 0x00, 0x00, 0x00, 0x01, 'a',                    /* str 32 */
        0xda, 0x00, 0x01, 'a',  0xd9, 0x00,                   /* str 16, str 8 (empty) */
        0xc6, 0x00, 0x00, 0x00, 0x02, 0xc1, 0xc1,             /* bin 32 */
        0xdf, 0x00, 0x00, 0x00, 0x01, 0x01, 0x90,             /* map 32 of 1: an empty array */
        0xdd, 0x00, 0x00, 0x00, 0x02, 0x80, 0xde, 0x00, 0x00, /* array 32: two empty maps */
    };
    static char text[70000];
    static const float values[6] = {1, 2, 3};
    static const uint64_t shape[2] = {2, 3};
    static const int32_t tokens[] = {1, -5, 200, -200, 40000, -40000, 100000, -100000};

    memset(text, 'x', sizeof(text));
    ipc_pack_request(b, 70000, "text.generate");
    ipc_pack_map(b, 5);
    ipc_pack_str(b, "prompt");
    ipc_pack_text(b, text, sizeof(text));
    ipc_pack_str(b, "short");
    ipc_pack_text(b, text, 300);
    ipc_pack_str(b, "bin");
    ipc_pack_bin(b, text, 300);
    ipc_pack_str(b, "numbers");
    ipc_pack_array(b, 4);
    ipc_pack_f32(b, 1.5f);
    ipc_pack_f64(b, 2.5);
    ipc_pack_u64(b, UINT64_MAX);
    ipc_pack_i64(b, INT64_MIN);
    ipc_pack_str(b, "tokens");
    ipc_pack_tokens(b, tokens, 8);
    ipc_pack_raw(b, rare, sizeof(rare));
    ipc_pack_event(b, 1, 2);
    ipc_pack_tensor_f32(b, values, shape, 2);
}

static int feed(const void *data, size_t bytes)
{
    struct ipc_scanner s;
    size_t used;
    ipc_scanner_init(&s, PROTO_FRAME_BYTES_MAX);
    return ipc_scanner_feed(&s, data, bytes, &used);
}

Test(scanner, one_byte_at_a_time_finds_the_same_ends)
{
    struct ipc_buffer b;
    struct ipc_scanner whole, bytewise;
    size_t at = 0, used, n_messages = 0;

    ipc_buffer_init(&b);
    pack_corpus(&b);
    ipc_scanner_init(&whole, PROTO_FRAME_BYTES_MAX);
    ipc_scanner_init(&bytewise, PROTO_FRAME_BYTES_MAX);
    while (at < b.bytes) {
        cr_assert_eq(ipc_scanner_feed(&whole, b.data + at, b.bytes - at, &used), 1);
        for (size_t i = 0; i < used; i++) {
            size_t one = 0;
            cr_assert_eq(ipc_scanner_feed(&bytewise, b.data + at + i, 1, &one), i + 1 == used);
            cr_assert_eq(one, 1);
        }
        at += used;
        n_messages++;
    }
    cr_assert_eq(n_messages, 3);
    ipc_buffer_finish(&b);
}

Test(scanner, resumes_at_every_split)
{
    struct ipc_buffer b;
    size_t first;

    ipc_buffer_init(&b);
    pack_corpus(&b);
    struct ipc_scanner s;
    ipc_scanner_init(&s, PROTO_FRAME_BYTES_MAX);
    cr_assert_eq(ipc_scanner_feed(&s, b.data, b.bytes, &first), 1);
    for (size_t cut = 0; cut < first; cut++) {
        size_t used = 0;
        cr_assert_eq(ipc_scanner_feed(&s, b.data, cut, &used), 0);
        cr_assert_eq(used, cut);
        cr_assert_eq(ipc_scanner_feed(&s, b.data + cut, b.bytes - cut, &used), 1);
        cr_assert_eq(used, first - cut);
    }
    ipc_buffer_finish(&b);
}

Test(scanner, counts_that_cannot_come_are_refused_at_once)
{
    static const uint8_t array[] = {0xdd, 0xff, 0xff, 0xff, 0xff};
    static const uint8_t map[] = {0xdf, 0xff, 0xff, 0xff, 0xff};
    static const uint8_t string[] = {0xdb, 0xff, 0xff, 0xff, 0xff};
    static const uint8_t binary[] = {0xc6, 0x01, 0x00, 0x00, 0x00}; /* 16 MiB and its head */
    static const uint8_t elements[] = {0xdd, 0x00, 0x11, 0x00, 0x01};
    static const uint8_t pairs[] = {0xdf, 0x00, 0x08, 0x80, 0x01};
    size_t before = mallinfo2().uordblks;

    cr_assert_eq(feed(array, sizeof(array)), -EMSGSIZE);
    cr_assert_eq(feed(map, sizeof(map)), -EMSGSIZE);
    cr_assert_eq(feed(string, sizeof(string)), -EMSGSIZE);
    cr_assert_eq(feed(binary, sizeof(binary)), -EMSGSIZE);
    cr_assert_eq(PROTO_ELEMENTS_MAX, 0x110000);
    cr_assert_eq(feed(elements, sizeof(elements)), -EMSGSIZE);
    cr_assert_eq(feed(pairs, sizeof(pairs)), -EMSGSIZE);
    cr_assert_eq(mallinfo2().uordblks, before);
}

Test(scanner, elements_are_counted_over_the_whole_message)
{
    /* Two arrays of 9/16 of the limit each. */
    static const uint8_t head[] = {0x92, 0xdd, 0x00, 0x09, 0x90, 0x00};
    struct ipc_scanner s;
    size_t used;
    uint8_t *nils = calloc(1, 0x99000);

    cr_assert_not_null(nils);
    ipc_scanner_init(&s, PROTO_FRAME_BYTES_MAX);
    cr_assert_eq(ipc_scanner_feed(&s, head, sizeof(head), &used), 0);
    cr_assert_eq(ipc_scanner_feed(&s, nils, 0x99000, &used), 0);
    cr_assert_eq(ipc_scanner_feed(&s, head + 1, sizeof(head) - 1, &used), -EMSGSIZE);
    free(nils);
}

Test(scanner, depth_is_limited)
{
    uint8_t arrays[64], maps[64];
    memset(arrays, 0x91, sizeof(arrays));
    memset(maps, 0x81, sizeof(maps));
    cr_assert_eq(feed(arrays, PROTO_DEPTH_MAX), 0);
    cr_assert_eq(feed(arrays, PROTO_DEPTH_MAX + 1), -ELOOP);
    cr_assert_eq(feed(maps, 1), 0);
    cr_assert_eq(feed(maps, PROTO_DEPTH_MAX + 1), -ELOOP);
    arrays[PROTO_DEPTH_MAX] = 0xc0;
    cr_assert_eq(feed(arrays, PROTO_DEPTH_MAX + 1), 1);
    arrays[PROTO_DEPTH_MAX] = 0x90; /* an empty one is as deep as a full one */
    cr_assert_eq(feed(arrays, PROTO_DEPTH_MAX + 1), -ELOOP);
}

Test(scanner, the_frame_limit_is_exact)
{
    static const uint8_t message[] = {0x93, 0xa2, 'h', 'i', 0xcd, 0x01, 0x02, 0xc0};
    struct ipc_scanner s;
    size_t used;
    for (uint32_t max = 1; max < sizeof(message); max++) {
        ipc_scanner_init(&s, max);
        cr_assert_eq(ipc_scanner_feed(&s, message, sizeof(message), &used), -EMSGSIZE,
                     "with a limit of %u", max);
    }
    ipc_scanner_init(&s, sizeof(message));
    cr_assert_eq(ipc_scanner_feed(&s, message, sizeof(message), &used), 1);
    cr_assert_eq(used, sizeof(message));
}

Test(scanner, extensions_and_the_byte_that_does_not_exist_are_refused)
{
    static const uint8_t bad[] = {0xc1, 0xc7, 0xc8, 0xc9, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8};
    for (size_t i = 0; i < sizeof(bad); i++) {
        cr_assert_eq(feed(&bad[i], 1), -EPROTO, "byte %02x", bad[i]);
    }
}

Test(scanner, outputs_are_untouched_on_failure)
{
    static const uint8_t message[] = {0x91, 0xc1};
    struct ipc_scanner s;
    size_t used = 77;
    ipc_scanner_init(&s, 100);
    cr_assert_eq(ipc_scanner_feed(&s, message, 2, &used), -EPROTO);
    cr_assert_eq(used, 77);
}
