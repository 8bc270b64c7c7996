/* The synchronous helpers and the readers of values. */
#include "peer.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void echo_tokens(int fd, void *arg)
{
    static const int32_t ids[] = {1, 42, 7};
    struct peer_request r;
    struct ipc_buffer b;
    struct proto_string text;
    bool special = true;
    peer_read(fd, &r);
    if (strcmp(r.method, "text.tokenize") != 0 ||
        ipc_value_bytes(ipc_value_get(r.message.params, "text"), &text) < 0 || text.bytes != 3 ||
        ipc_value_bool(ipc_value_get(r.message.params, "add_special"), &special) < 0 || special) {
        _exit(2);
    }
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, r.id);
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "tokens");
    ipc_pack_tokens(&b, ids, 3);
    peer_send(fd, &b);
    peer_request_finish(&r);

    uint32_t id = peer_expect(fd, "text.detokenize");
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "text");
    ipc_pack_text(&b, "a\0\xff", 3);
    peer_send(fd, &b);

    id = peer_expect(fd, "text.tokenize");
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "tokens");
    ipc_pack_str(&b, "none");
    peer_send(fd, &b);
}

Test(helpers, tokenize_and_back)
{
    pid_t pid;
    int32_t *ids = NULL;
    size_t count = 0, bytes = 0;
    char *text = NULL;
    struct gqa_error e;
    struct gqa *g = peer_connect(echo_tokens, NULL, &pid);
    cr_assert_eq(gqa_tokenize(g, "m", "a\0b", 3, GQA_TOKENIZE_NO_SPECIAL, &ids, &count, &e), 0);
    cr_assert_eq(count, 3);
    cr_expect(ids[0] == 1 && ids[1] == 42 && ids[2] == 7);
    cr_assert_eq(gqa_detokenize(g, "m", ids, count, 0, &text, &bytes, &e), 0);
    cr_expect(bytes == 3 && memcmp(text, "a\0\xff", 4) == 0, "bytes, then a NUL");
    free(ids);
    free(text);
    cr_expect_eq(gqa_tokenize(g, "m", "x", 1, 0, &ids, &count, &e), -EPROTO);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

static void generates(int fd, void *arg)
{
    uint32_t id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "one ", 11);
    peer_step(fd, id, 1, "two", 12);
    peer_end(fd, id, "stop");
    id = peer_expect(fd, "text.generate");
    peer_step(fd, id, 0, "three", 13);
    if (peer_expect(fd, "$cancel") != id) {
        _exit(2);
    }
    peer_end(fd, id, "cancelled");
}

struct heard {
    char text[64];
    int32_t last;
    bool enough;
};

static int on_text(void *arg, const char *text, size_t bytes, const int32_t *ids, size_t n_ids)
{
    struct heard *h = arg;
    strncat(h->text, text, bytes);
    h->last = n_ids > 0 ? ids[n_ids - 1] : -1;
    return h->enough;
}

static bool finish_is(const struct gqa_reply *reply, const char *finish)
{
    const char *s = "";
    size_t bytes = 0;
    gqa_value_bytes(gqa_value_get(gqa_reply_value(reply), "finish"), &s, &bytes);
    return bytes == strlen(finish) && memcmp(s, finish, bytes) == 0;
}

Test(helpers, generate_streams_and_stops_when_told)
{
    pid_t pid;
    struct heard h = {0};
    struct gqa_params *p;
    struct gqa_reply *reply;
    struct gqa_error e;
    struct gqa *g = peer_connect(generates, NULL, &pid);
    gqa_params_create(&p);
    gqa_params_str(p, "model", "m");
    cr_assert_eq(gqa_generate(g, p, NULL, on_text, &h, &reply, &e), 0);
    cr_expect_str_eq(h.text, "one two");
    cr_expect_eq(h.last, 12);
    cr_expect(finish_is(reply, "stop"));
    gqa_reply_destroy(reply);
    h.enough = true;
    cr_assert_eq(gqa_generate(g, p, NULL, on_text, &h, &reply, &e), 0);
    cr_expect(finish_is(reply, "cancelled"));
    gqa_reply_destroy(reply);
    gqa_params_destroy(p);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

static void generates_samples(int fd, void *arg)
{
    static const uint32_t samples[] = {0, 2, 1, 2};
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "text.generate");
    ipc_buffer_init(&b);
    for (uint32_t i = 0; i < 4; i++) {
        const int32_t token = (int32_t)(20 + i);
        ipc_pack_event(&b, id, i);
        ipc_pack_map(&b, 3);
        ipc_pack_str(&b, "sample");
        ipc_pack_u64(&b, samples[i]);
        ipc_pack_str(&b, "text");
        ipc_pack_str(&b, i < 2 ? "a" : "b");
        ipc_pack_str(&b, "tokens");
        ipc_pack_tokens(&b, &token, 1);
    }
    peer_send(fd, &b);
    peer_end(fd, id, "stop");
}

static int on_sample(void *arg, uint32_t sample, const char *text, size_t bytes, const int32_t *ids,
                     size_t n_ids)
{
    return sample < 3 ? on_text((struct heard *)arg + sample, text, bytes, ids, n_ids) : -1;
}

Test(helpers, samples_are_told_apart)
{
    pid_t pid;
    struct heard h[3] = {{{0}}};
    struct gqa_params *p;
    struct gqa_error e;
    struct gqa *g = peer_connect(generates_samples, NULL, &pid);
    gqa_params_create(&p);
    gqa_params_str(p, "model", "m");
    gqa_params_u64(p, "n", 3);
    cr_assert_eq(gqa_generate_samples(g, p, NULL, on_sample, h, NULL, &e), 0);
    cr_expect_str_eq(h[0].text, "a");
    cr_expect_str_eq(h[1].text, "b");
    cr_expect_str_eq(h[2].text, "ab");
    cr_expect(h[0].last == 20 && h[1].last == 22 && h[2].last == 23);
    gqa_params_destroy(p);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

static void loads(int fd, void *arg)
{
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "model.load");
    ipc_buffer_init(&b);
    ipc_pack_event(&b, id, 0);
    ipc_pack_map(&b, 3);
    ipc_pack_str(&b, "stage");
    ipc_pack_str(&b, "read");
    ipc_pack_str(&b, "done");
    ipc_pack_u64(&b, 3);
    ipc_pack_str(&b, "total");
    ipc_pack_u64(&b, 8);
    peer_send(fd, &b);
    peer_answer(fd, id);
}

static void on_progress(void *arg, const char *stage, uint64_t done, uint64_t total)
{
    *(bool *)arg = strcmp(stage, "read") == 0 && done == 3 && total == 8;
}

Test(helpers, load_tells_progress)
{
    pid_t pid;
    bool seen = false;
    struct gqa_params *p;
    struct gqa *g = peer_connect(loads, NULL, &pid);
    gqa_params_create(&p);
    gqa_params_str(p, "model", "m");
    cr_expect_eq(gqa_model_load(g, p, on_progress, &seen, NULL, NULL), 0);
    cr_expect(seen);
    gqa_params_destroy(p);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

static void sends_values(int fd, void *arg)
{
    static const float rows[] = {1, 2, 3, 4, 5, 6};
    static const uint64_t shape[] = {2, 3}, wrong[] = {UINT64_MAX, 3};
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "values");
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 6);
    ipc_pack_str(&b, "tensor");
    ipc_pack_tensor_f32(&b, rows, shape, 2);
    ipc_pack_str(&b, "wrong");
    ipc_pack_map(&b, 4);
    ipc_pack_str(&b, "nd");
    ipc_pack_bool(&b, true);
    ipc_pack_str(&b, "type");
    ipc_pack_str(&b, "<f4");
    ipc_pack_str(&b, "shape");
    ipc_pack_array(&b, 2);
    ipc_pack_u64(&b, wrong[0]);
    ipc_pack_u64(&b, wrong[1]);
    ipc_pack_str(&b, "data");
    ipc_pack_bin(&b, rows, sizeof(rows));
    ipc_pack_str(&b, "nil");
    ipc_pack_nil(&b);
    ipc_pack_str(&b, "negative");
    ipc_pack_i64(&b, -3);
    ipc_pack_str(&b, "large");
    ipc_pack_u64(&b, UINT64_MAX);
    ipc_pack_str(&b, "ids");
    ipc_pack_array(&b, 2);
    ipc_pack_i64(&b, 4);
    ipc_pack_i64(&b, (int64_t)1 << 40);
    peer_send(fd, &b);
}

Test(helpers, values_are_read_with_their_types)
{
    pid_t pid;
    struct gqa_reply *reply;
    struct gqa_tensor_view t;
    struct gqa *g = peer_connect(sends_values, NULL, &pid);
    cr_assert_eq(gqa_call(g, "values", NULL, NULL, &reply, NULL), 0);
    gqa_close(g);
    const struct gqa_value *v = gqa_reply_value(reply);
    cr_assert_eq(gqa_value_tensor_f32(gqa_value_get(v, "tensor"), &t), 0);
    cr_expect(t.n_dims == 2 && t.shape[0] == 2 && t.shape[1] == 3 && t.bytes == 24);
    float last;
    memcpy(&last, (const char *)t.data + 20, sizeof(last));
    cr_expect_eq(last, 6.0f);
    cr_expect_eq(gqa_value_tensor_f32(gqa_value_get(v, "wrong"), &t), -EINVAL);
    cr_expect_eq(gqa_value_tensor_f32(gqa_value_get(v, "ids"), &t), -EINVAL);
    cr_expect_eq(gqa_value_tensor_f32(NULL, &t), -ENOENT);

    uint64_t u = 9;
    int64_t i = 9;
    int32_t ids[2];
    size_t n;
    cr_expect_eq(gqa_value_u64(gqa_value_get(v, "nil"), &u), -ENOENT);
    cr_expect_eq(gqa_value_u64(gqa_value_get(v, "absent"), &u), -ENOENT);
    cr_expect_eq(gqa_value_u64(gqa_value_get(gqa_value_get(v, "absent"), "deep"), &u), -ENOENT);
    cr_expect_eq(gqa_value_u64(gqa_value_get(v, "negative"), &u), -ERANGE);
    cr_expect_eq(u, 9, "untouched on failure");
    cr_expect_eq(gqa_value_i64(gqa_value_get(v, "large"), &i), -ERANGE);
    cr_expect_eq(gqa_value_i64(gqa_value_get(v, "negative"), &i), 0);
    cr_expect_eq(i, -3);
    cr_expect_eq(gqa_value_tokens(gqa_value_get(v, "ids"), NULL, 0, &n), 0);
    cr_expect_eq(n, 2);
    cr_expect_eq(gqa_value_tokens(gqa_value_get(v, "ids"), ids, 2, &n), -ERANGE);
    gqa_reply_destroy(reply);
    cr_expect_eq(peer_finish(pid), 0);
}

static void reads_params(int fd, void *arg)
{
    struct peer_request r;
    struct ipc_error e;
    union proto_params params;
    peer_read(fd, &r);
    if (ipc_params_decode(PROTO_TEXT_GENERATE, &r.message, &params, &e) < 0) {
        _exit(3);
    }
    const struct proto_text_generate *p = &params.text_generate;
    bool right = p->has_seed && p->seed == UINT64_MAX && p->temperature == 0.5f && p->top_k == -1 &&
                 p->ignore_eos && p->tokens.count == 2 && p->tokens.ids[1] == 300 &&
                 p->stop.count == 2 && p->stop.items[1].bytes == 1 && p->logit_bias.count == 1 &&
                 p->logit_bias.items[0].token == 9 && isinf(p->logit_bias.items[0].bias);
    peer_answer(fd, r.id);
    _exit(right ? 0 : 4);
}

Test(helpers, params_arrive_as_the_protocol_wants_them)
{
    static const int32_t ids[] = {1, 300}, bias_ids[] = {9};
    static const char *const stops[] = {"end", "."};
    static const float biases[] = {-INFINITY};
    pid_t pid;
    struct gqa_params *p;
    struct gqa *g = peer_connect(reads_params, NULL, &pid);
    gqa_params_create(&p);
    gqa_params_str(p, "model", "m");
    gqa_params_tokens(p, "tokens", ids, 2);
    gqa_params_u64(p, "seed", UINT64_MAX);
    gqa_params_f64(p, "temperature", 0.5);
    gqa_params_i64(p, "top_k", -1);
    gqa_params_bool(p, "ignore_eos", true);
    gqa_params_strings(p, "stop", stops, 2);
    cr_expect_eq(gqa_params_biases(p, "logit_bias", bias_ids, biases, 1), 0);
    cr_expect_eq(gqa_call(g, "text.generate", p, NULL, NULL, NULL), 0);
    gqa_params_destroy(p);
    gqa_close(g);
    cr_expect_eq(peer_finish(pid), 0);
}

Test(helpers, error_codes_are_those_of_the_protocol)
{
    cr_expect_eq(gqa_strcode(GQA_E_NOT_FOUND), -ENOENT);
    cr_expect_eq(gqa_strcode(GQA_E_CANCELLED), -ECANCELED);
    cr_expect_eq(gqa_strcode(9999), -EREMOTEIO);
    cr_expect_eq(gqa_strcode(-1), -EREMOTEIO);
}
