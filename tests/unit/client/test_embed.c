/* gqa_embed(): vectors of texts, rows whose texts alternate, and daemons that talk nonsense. */
#include "peer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Rows of a text of three values each, all of them x. */
static void send_rows(int fd, uint32_t id, uint32_t seq, uint32_t input, uint32_t first_row,
                      uint32_t n_rows, uint32_t n_dims, float x)
{
    struct ipc_buffer b;
    const uint64_t shape[2] = {n_rows, n_dims};
    float values[16];
    for (uint32_t i = 0; i < n_rows * n_dims; i++) {
        values[i] = x;
    }
    ipc_buffer_init(&b);
    ipc_pack_event(&b, id, seq);
    ipc_pack_map(&b, 3);
    ipc_pack_str(&b, "input");
    ipc_pack_u64(&b, input);
    ipc_pack_str(&b, "first_row");
    ipc_pack_u64(&b, first_row);
    ipc_pack_str(&b, "embeddings");
    ipc_pack_tensor_f32(&b, values, shape, 2);
    peer_send(fd, &b);
}

/* The result of n texts with so many tokens, and a tensor of n_rows where that is not 0. */
static void send_result(int fd, uint32_t id, const uint64_t *n_tokens, uint32_t n, uint32_t n_rows)
{
    static const float values[4] = {1, 2, 3, 4};
    const uint64_t shape[2] = {n_rows, 2};
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, n_rows > 0 ? 2 : 1);
    ipc_pack_str(&b, "n_tokens");
    ipc_pack_array(&b, n);
    for (uint32_t i = 0; i < n; i++) {
        ipc_pack_u64(&b, n_tokens[i]);
    }
    if (n_rows > 0) {
        ipc_pack_str(&b, "embeddings");
        ipc_pack_tensor_f32(&b, values, shape, 2);
    }
    peer_send(fd, &b);
}

static int embed(struct gqa *g, float **values, size_t *n_rows, size_t *n_dims,
                 struct gqa_reply **reply, struct gqa_error *e)
{
    static const char *const texts[] = {"one", "two"};
    struct gqa_params *p;
    cr_assert_eq(gqa_params_create(&p), 0);
    gqa_params_str(p, "model", "m");
    gqa_params_strings(p, "inputs", texts, 2);
    int r = gqa_embed(g, p, NULL, values, n_rows, n_dims, reply, e);
    gqa_params_destroy(p);
    return r;
}

static const uint64_t lengths[] = {3, 2};

static void vectors(int fd, void *arg)
{
    send_result(fd, peer_expect(fd, "text.embed"), lengths, 2, 2);
}

Test(embed, a_vector_per_text)
{
    pid_t pid;
    float *values = NULL;
    size_t n_rows = 0, n_dims = 0;
    struct gqa_error e;
    struct gqa_reply *reply;
    struct gqa *g = peer_connect(vectors, NULL, &pid);
    cr_assert_eq(embed(g, &values, &n_rows, &n_dims, &reply, &e), 0, "%s", e.message);
    cr_expect(n_rows == 2 && n_dims == 2);
    cr_expect(values[0] == 1 && values[1] == 2 && values[2] == 3 && values[3] == 4);
    cr_expect_eq(gqa_value_count(gqa_value_get(gqa_reply_value(reply), "n_tokens")), 2);
    gqa_reply_destroy(reply);
    free(values);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

static void rows_that_alternate(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.embed");
    send_rows(fd, id, 0, 1, 0, 1, 3, 20);
    send_rows(fd, id, 1, 0, 0, 2, 3, 10);
    send_rows(fd, id, 2, 1, 1, 1, 3, 21);
    send_rows(fd, id, 3, 0, 2, 1, 3, 12);
    send_result(fd, id, lengths, 2, 0);
}

Test(embed, rows_are_put_in_the_order_of_texts)
{
    static const float want[] = {10, 10, 12, 20, 21};
    pid_t pid;
    float *values = NULL;
    size_t n_rows = 0, n_dims = 0;
    struct gqa_error e;
    struct gqa *g = peer_connect(rows_that_alternate, NULL, &pid);
    cr_assert_eq(embed(g, &values, &n_rows, &n_dims, NULL, &e), 0, "%s", e.message);
    cr_assert(n_rows == 5 && n_dims == 3);
    for (size_t i = 0; i < 15; i++) {
        cr_expect(values[i] == want[i / 3], "value %zu", i);
    }
    free(values);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

/* ---- nonsense ---------------------------------------------------------------------------- */

static void too_few_rows(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.embed");
    send_rows(fd, id, 0, 0, 0, 2, 3, 1);
    send_result(fd, id, lengths, 2, 0);
}

static void a_row_twice(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.embed");
    send_rows(fd, id, 0, 0, 0, 3, 3, 1);
    send_rows(fd, id, 1, 0, 0, 2, 3, 1);
    send_result(fd, id, lengths, 2, 0);
}

static void too_many_rows(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.embed");
    send_rows(fd, id, 0, 1, 0, 3, 3, 1);
    send_rows(fd, id, 1, 0, 0, 2, 3, 1);
    send_result(fd, id, lengths, 2, 0);
}

static void a_text_that_is_not_there(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.embed");
    send_rows(fd, id, 0, 2, 0, 5, 3, 1);
    send_result(fd, id, lengths, 2, 0);
}

static void huge_lengths(int fd, void *arg)
{
    static const uint64_t huge[] = {UINT64_MAX, 2};
    send_result(fd, peer_expect(fd, "text.embed"), huge, 2, 0);
}

static void too_few_vectors(int fd, void *arg)
{
    send_result(fd, peer_expect(fd, "text.embed"), lengths, 2, 1);
}

static void widths_that_differ(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.embed");
    send_rows(fd, id, 0, 0, 0, 3, 3, 1);
    send_rows(fd, id, 1, 1, 0, 2, 2, 1);
    if (peer_expect(fd, "$cancel") != id) {
        _exit(2);
    }
    send_result(fd, id, lengths, 2, 0);
}

Test(embed, nonsense_is_an_error_and_leaks_nothing)
{
    static const peer_script scripts[] = {
        too_few_rows, a_row_twice,     too_many_rows,     a_text_that_is_not_there,
        huge_lengths, too_few_vectors, widths_that_differ};
    for (size_t i = 0; i < sizeof(scripts) / sizeof(scripts[0]); i++) {
        pid_t pid;
        float *values = NULL;
        size_t n_rows = 7, n_dims = 7;
        struct gqa_error e;
        struct gqa_reply *reply = NULL;
        struct gqa *g = peer_connect(scripts[i], NULL, &pid);
        cr_expect_eq(embed(g, &values, &n_rows, &n_dims, &reply, &e), -EPROTO, "script %zu", i);
        cr_expect(values == NULL && n_rows == 7 && n_dims == 7 && reply == NULL);
        gqa_close(g);
        cr_expect_eq(peer_finish(pid), 0, "script %zu", i);
    }
}
