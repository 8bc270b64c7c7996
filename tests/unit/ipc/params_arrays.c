/* What the decoder makes of values: a whole request, token arrays, stops, biases, texts. */
#include "tests/unit/ipc/request.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void expect_refused(struct ipc_buffer *body, const char *sentence)
{
    union proto_params params;
    struct ipc_error e;
    cr_assert_eq(test_decode(PROTO_TEXT_GENERATE, 2, body, &params, &e, NULL), -EINVAL);
    cr_assert_str_eq(e.message, sentence);
}

/* The beginning of a body of two pairs: the model, and the key of the field looked at. */
static struct ipc_buffer begin(const char *field)
{
    struct ipc_buffer body;
    ipc_buffer_init(&body);
    ipc_pack_str(&body, "model");
    ipc_pack_str(&body, "tiny");
    ipc_pack_str(&body, field);
    return body;
}

Test(arrays, a_whole_request_is_filled)
{
    static const int32_t ids[3] = {0, 5, INT32_MAX};
    struct test_message t;
    union proto_params params;
    struct ipc_buffer body = begin("tokens");
    struct ipc_error e;

    ipc_pack_tokens(&body, ids, 3);
    ipc_pack_str(&body, "seed");
    ipc_pack_u64(&body, UINT64_MAX);
    ipc_pack_bin(&body, "top_k", 5); /* python's bytes for a key */
    ipc_pack_i64(&body, -1);
    ipc_pack_str(&body, "temperature");
    ipc_pack_u64(&body, 0);
    ipc_pack_str(&body, "stop");
    ipc_pack_array(&body, 2);
    ipc_pack_str(&body, "\n");
    ipc_pack_bin(&body, "\xff\0", 2);
    cr_assert_eq(test_decode(PROTO_TEXT_GENERATE, 6, &body, &params, &e, &t), 0, "%s", e.message);
    const struct proto_text_generate *g = &params.text_generate;
    cr_assert_eq(g->model.bytes, 4);
    cr_assert_eq(memcmp(g->model.data, "tiny", 4), 0);
    cr_assert_eq(g->tokens.count, 3);
    cr_assert_eq(memcmp(g->tokens.ids, ids, sizeof(ids)), 0);
    cr_assert_eq(g->seed, UINT64_MAX);
    cr_assert_eq(g->top_k, -1);
    cr_assert_eq(g->temperature, 0);
    cr_assert_eq(g->stop.count, 2);
    cr_assert_eq(g->stop.items[1].bytes, 2);
    cr_assert(g->has_seed && g->has_top_k && g->has_tokens && g->has_stop);
    cr_assert_not(g->has_prompt);
    cr_assert_not(g->has_top_p);
    cr_assert_eq(g->top_p, 0.95f);
    test_message_finish(&t);
}

Test(arrays, the_most_tokens_fit_the_limits_of_the_wire)
{
    struct test_message t;
    union proto_params params;
    struct ipc_buffer body = begin("tokens");
    struct ipc_error e;
    ipc_pack_array(&body, PROTO_TOKENS_MAX);
    for (uint32_t i = 0; i < PROTO_TOKENS_MAX; i++) {
        ipc_pack_u64(&body, INT32_MAX - i); /* five bytes each */
    }
    cr_assert_eq(test_decode(PROTO_TEXT_GENERATE, 2, &body, &params, &e, &t), 0, "%s", e.message);
    cr_assert_eq(params.text_generate.tokens.count, PROTO_TOKENS_MAX);
    cr_assert_eq(params.text_generate.tokens.ids[PROTO_TOKENS_MAX - 1],
                 INT32_MAX - (int32_t)PROTO_TOKENS_MAX + 1);
    test_message_finish(&t);
}

Test(arrays, token_ids_are_integers_of_31_bits)
{
    struct ipc_buffer body = begin("tokens");
    ipc_pack_array(&body, 2);
    ipc_pack_u64(&body, 1);
    ipc_pack_i64(&body, -1);
    expect_refused(&body, "'tokens', item 1: a token id must be 0 to 2147483647");

    body = begin("tokens");
    ipc_pack_array(&body, 1);
    ipc_pack_u64(&body, (uint64_t)INT32_MAX + 1);
    expect_refused(&body, "'tokens', item 0: a token id must be 0 to 2147483647");

    body = begin("tokens");
    ipc_pack_array(&body, 1);
    ipc_pack_u64(&body, UINT64_MAX);
    expect_refused(&body, "'tokens', item 0: a token id must be 0 to 2147483647");

    body = begin("tokens");
    ipc_pack_array(&body, 1);
    ipc_pack_f32(&body, 1);
    expect_refused(&body, "'tokens', item 0: a token id must be an integer; it is a float");
}

Test(arrays, stops_are_strings_of_a_bounded_length)
{
    char longest[PROTO_STOP_BYTES_MAX + 1];
    memset(longest, 'x', sizeof(longest));
    struct ipc_buffer body = begin("stop");
    ipc_pack_array(&body, 1);
    ipc_pack_str(&body, "");
    expect_refused(&body, "'stop', item 0: has a length of 0; it must be 1 to 256");

    body = begin("stop");
    ipc_pack_array(&body, 1);
    ipc_pack_text(&body, longest, sizeof(longest));
    expect_refused(&body, "'stop', item 0: has a length of 257; it must be 1 to 256");

    body = begin("stop");
    ipc_pack_array(&body, 1);
    ipc_pack_u64(&body, 1);
    expect_refused(&body, "'stop', item 0: must be a string; it is an integer");
}

static void pack_pair(struct ipc_buffer *b, uint64_t token, double bias)
{
    ipc_pack_array(b, 2);
    ipc_pack_u64(b, token);
    ipc_pack_f64(b, bias);
}

Test(arrays, biases_come_as_pairs_or_as_a_map_and_may_forbid)
{
    struct test_message t;
    union proto_params params;
    struct ipc_error e;
    const struct proto_biases *biases = &params.text_generate.logit_bias;

    struct ipc_buffer body = begin("logit_bias");
    ipc_pack_array(&body, 3);
    pack_pair(&body, 7, -INFINITY);
    pack_pair(&body, 8, 2.5);
    ipc_pack_array(&body, 2);
    ipc_pack_u64(&body, 9);
    ipc_pack_bool(&body, false);
    cr_assert_eq(test_decode(PROTO_TEXT_GENERATE, 2, &body, &params, &e, &t), 0, "%s", e.message);
    cr_assert_eq(biases->count, 3);
    cr_assert_eq(biases->items[0].token, 7);
    cr_assert_eq(biases->items[0].bias, -INFINITY);
    cr_assert_eq(biases->items[1].bias, 2.5f);
    cr_assert_eq(biases->items[2].token, 9);
    cr_assert_eq(biases->items[2].bias, -INFINITY);
    test_message_finish(&t);

    body = begin("logit_bias");
    ipc_pack_map(&body, 1);
    ipc_pack_u64(&body, 7);
    ipc_pack_i64(&body, -3);
    cr_assert_eq(test_decode(PROTO_TEXT_GENERATE, 2, &body, &params, &e, &t), 0, "%s", e.message);
    cr_assert_eq(biases->count, 1);
    cr_assert_eq(biases->items[0].token, 7);
    cr_assert_eq(biases->items[0].bias, -3);
    test_message_finish(&t);
}

Test(arrays, biases_that_mean_nothing_are_refused)
{
    struct ipc_buffer body = begin("logit_bias");
    ipc_pack_array(&body, 1);
    pack_pair(&body, 7, INFINITY);
    expect_refused(&body, "'logit_bias', item 0: a bias of inf; it must be finite, or -inf");

    body = begin("logit_bias");
    ipc_pack_array(&body, 1);
    pack_pair(&body, 7, (double)NAN);
    expect_refused(&body, "'logit_bias', item 0: a bias of nan; it must be finite, or -inf");

    body = begin("logit_bias");
    ipc_pack_array(&body, 1);
    pack_pair(&body, 7, -1e300);
    expect_refused(&body, "'logit_bias', item 0: a bias of -1e+300; it must be finite, or -inf");

    body = begin("logit_bias");
    ipc_pack_array(&body, 1);
    ipc_pack_array(&body, 2);
    ipc_pack_u64(&body, 7);
    ipc_pack_bool(&body, true);
    expect_refused(&body, "'logit_bias', item 0: a bias must be a number or false; it is true");

    body = begin("logit_bias");
    ipc_pack_array(&body, 1);
    ipc_pack_array(&body, 3);
    for (uint64_t i = 0; i < 3; i++) {
        ipc_pack_u64(&body, i);
    }
    expect_refused(&body, "'logit_bias', item 0: must be [token, bias]");
}

/* ---- texts ------------------------------------------------------------------------------- */

/* Unlike stop strings they may be empty, and long. */
Test(arrays, texts_may_be_empty_and_long)
{
    struct ipc_buffer body = begin("inputs");
    struct test_message t;
    union proto_params params;
    struct ipc_error e;
    char *longer = calloc(1, PROTO_STOP_BYTES_MAX + 1);
    cr_assert(longer != NULL);
    ipc_pack_array(&body, 3);
    ipc_pack_str(&body, "");
    ipc_pack_bin(&body, "\0\xff", 2);
    ipc_pack_bin(&body, longer, PROTO_STOP_BYTES_MAX + 1);
    free(longer);
    cr_assert_eq(test_decode(PROTO_TEXT_EMBED, 2, &body, &params, &e, &t), 0, "%s", e.message);
    const struct proto_text_embed *p = &params.text_embed;
    cr_assert(p->has_inputs && !p->has_prompt && !p->has_pooling);
    cr_assert_eq(p->inputs.count, 3);
    cr_assert_eq(p->inputs.items[0].bytes, 0);
    cr_assert_eq(p->inputs.items[1].bytes, 2);
    cr_assert_eq(p->inputs.items[2].bytes, PROTO_STOP_BYTES_MAX + 1);
    cr_assert_eq(p->embd_normalize, 2);
    test_message_finish(&t);
}

Test(arrays, texts_that_are_none_or_too_many_are_refused)
{
    struct ipc_buffer body = begin("inputs");
    union proto_params params;
    struct ipc_error e;
    ipc_pack_array(&body, 2);
    ipc_pack_str(&body, "x");
    ipc_pack_u64(&body, 5);
    cr_assert_eq(test_decode(PROTO_TEXT_EMBED, 2, &body, &params, &e, NULL), -EINVAL);
    cr_assert_str_eq(e.message, "'inputs', item 1: must be a string; it is an integer");
    body = begin("inputs");
    ipc_pack_array(&body, PROTO_INPUTS_MAX + 1);
    for (uint32_t i = 0; i <= PROTO_INPUTS_MAX; i++) {
        ipc_pack_str(&body, "x");
    }
    cr_assert_eq(test_decode(PROTO_TEXT_EMBED, 2, &body, &params, &e, NULL), -EINVAL);
    cr_assert_str_eq(e.message, "'inputs' has a count of 2049; it must be 0 to 2048");
}
