#include "tests/unit/ipc/request.h"

#include <criterion/criterion.h>

#include <stdlib.h>
#include <string.h>

struct test_message test_parse(struct ipc_buffer *b)
{
    struct test_message t;
    struct ipc_scanner s;
    size_t used = 0;
    uint32_t id = 0;

    cr_assert_eq(b->error, 0);
    t.frame = malloc(b->bytes);
    cr_assert_not_null(t.frame);
    memcpy(t.frame, b->data, b->bytes);
    ipc_scanner_init(&s, PROTO_FRAME_BYTES_MAX);
    cr_assert_eq(ipc_scanner_feed(&s, t.frame, b->bytes, &used), 1);
    cr_assert_eq(used, b->bytes);
    cr_assert_eq(ipc_message_parse(t.frame, used, &t.message, &id), 0);
    ipc_buffer_finish(b);
    return t;
}

void test_message_finish(struct test_message *t)
{
    ipc_message_finish(&t->message);
    free(t->frame);
}

int test_decode(enum proto_method method, size_t n_pairs, struct ipc_buffer *body,
                union proto_params *ret, struct ipc_error *e, struct test_message *ret_message)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_request(&b, 1, proto_method_info(method)->name);
    ipc_pack_map(&b, n_pairs);
    ipc_pack_raw(&b, body->data, body->bytes);
    ipc_buffer_finish(body);

    struct test_message t = test_parse(&b);
    memset(e, 0, sizeof(*e));
    int rc = ipc_params_decode(method, &t.message, ret, e);
    if (rc == 0 && ret_message != NULL) {
        *ret_message = t;
    } else {
        test_message_finish(&t);
    }
    return rc;
}
