/* Vocabularies that lie: refused with a sentence, or harmless. */
#include "daemon/model/tokenizer.h"
#include "tests/unit/model/vocab_image.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct gguf_string texts[] = {{"<unk>", 5}, {"<s>", 3}, {"</s>", 4}, {"a", 1},
                                           {"b", 1},     {"ab", 2},  {"a", 1},    {"", 0}};
static const int32_t types[] = {2, 3, 3, 1, 1, 1, 1, 1};
static const float scores[] = {0, 0, 0, -1, -2, -3, -4, -5};
#define N (sizeof(texts) / sizeof(texts[0]))

static void begin(struct vocab_image *v, const char *model)
{
    vocab_image_init(v);
    vocab_image_string(v, "tokenizer.ggml.model", model);
    vocab_image_strings(v, "tokenizer.ggml.tokens", texts, N);
}

/* Creation fails with this error, and the sentence names the key. */
static void expect_refused(struct vocab_image *v, int rc, const char *key)
{
    struct gguf *g = vocab_image_open(v);
    struct tokenizer *t = NULL;
    struct fmt_error err = {""};
    cr_expect_eq(tokenizer_create(g, &t, &err), rc, "%s", err.text);
    cr_expect_not_null(strstr(err.text, key), "'%s' does not name %s", err.text, key);
    cr_expect_null(t);
    gguf_close(g);
    vocab_image_finish(v);
}

static struct tokenizer *expect_accepted(struct vocab_image *v, struct gguf **ret_g)
{
    struct tokenizer *t = NULL;
    struct fmt_error err = {""};
    *ret_g = vocab_image_open(v);
    cr_assert_eq(tokenizer_create(*ret_g, &t, &err), 0, "%s", err.text);
    return t;
}

Test(tokenizer_hostile, unknown_kinds)
{
    struct vocab_image v;
    vocab_image_init(&v);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.model");
    begin(&v, "wordpiece");
    expect_refused(&v, -ENOTSUP, "wordpiece");
    begin(&v, "gpt2");
    vocab_image_strings(&v, "tokenizer.ggml.merges", NULL, 0);
    vocab_image_string(&v, "tokenizer.ggml.pre", "never-heard-of");
    expect_refused(&v, -ENOTSUP, "llama-bpe");
}

Test(tokenizer_hostile, counts_that_disagree)
{
    struct vocab_image v;
    begin(&v, "llama");
    vocab_image_f32s(&v, "tokenizer.ggml.scores", scores, N - 1);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.scores");
    begin(&v, "llama");
    expect_refused(&v, -EINVAL, "tokenizer.ggml.scores");
    begin(&v, "llama");
    vocab_image_f32s(&v, "tokenizer.ggml.scores", scores, N);
    vocab_image_i32s(&v, "tokenizer.ggml.token_type", types, N - 1);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.token_type");
    vocab_image_init(&v);
    vocab_image_string(&v, "tokenizer.ggml.model", "gpt2");
    vocab_image_strings(&v, "tokenizer.ggml.tokens", NULL, 0);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.tokens");
    vocab_image_init(&v);
    vocab_image_string(&v, "tokenizer.ggml.model", "gpt2");
    vocab_image_f32s(&v, "tokenizer.ggml.tokens", scores, N);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.tokens");
    begin(&v, "gpt2");
    expect_refused(&v, -EINVAL, "tokenizer.ggml.merges");
}

Test(tokenizer_hostile, values_out_of_range)
{
    struct vocab_image v;
    float bad_scores[N] = {0};
    bad_scores[4] = NAN;
    begin(&v, "llama");
    vocab_image_f32s(&v, "tokenizer.ggml.scores", bad_scores, N);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.scores[4]");
    int32_t bad_types[N] = {0};
    bad_types[5] = 77;
    begin(&v, "llama");
    vocab_image_f32s(&v, "tokenizer.ggml.scores", scores, N);
    vocab_image_i32s(&v, "tokenizer.ggml.token_type", bad_types, N);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.token_type[5]");
    bad_types[5] = TOKEN_BYTE; /* "ab" is no byte */
    begin(&v, "llama");
    vocab_image_f32s(&v, "tokenizer.ggml.scores", scores, N);
    vocab_image_i32s(&v, "tokenizer.ggml.token_type", bad_types, N);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.tokens[5]");
    static const char *const ids[] = {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                      "tokenizer.ggml.eot_token_id",
                                      "tokenizer.ggml.unknown_token_id"};
    for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]); i++) {
        begin(&v, "gpt2");
        vocab_image_strings(&v, "tokenizer.ggml.merges", NULL, 0);
        vocab_image_u32(&v, ids[i], N);
        expect_refused(&v, -EINVAL, ids[i]);
    }
    begin(&v, "gpt2");
    vocab_image_strings(&v, "tokenizer.ggml.merges", NULL, 0);
    vocab_image_bool(&v, "tokenizer.ggml.add_bos_token", true);
    expect_refused(&v, -EINVAL, "tokenizer.ggml.add_bos_token");
}

Test(tokenizer_hostile, duplicate_and_empty_tokens)
{
    struct vocab_image v;
    struct gguf *g;
    begin(&v, "llama");
    vocab_image_f32s(&v, "tokenizer.ggml.scores", scores, N);
    vocab_image_i32s(&v, "tokenizer.ggml.token_type", types, N);
    vocab_image_bool(&v, "tokenizer.ggml.add_space_prefix", false);
    struct tokenizer *t = expect_accepted(&v, &g);
    int32_t *ids;
    size_t n;
    struct tokenize_options plain = {false, false};
    cr_assert_eq(tokenizer_encode(t, "a", 1, plain, 10, &ids, &n), 0);
    cr_expect(n == 1 && ids[0] == 3, "of two equal tokens the first is used");
    free(ids);
    /* No byte tokens: what is not in the vocabulary is unknown. */
    cr_assert_eq(tokenizer_encode(t,
                                  "a\xE2\x82\xAC"
                                  "b",
                                  5, plain, 10, &ids, &n),
                 0);
    cr_expect(n == 3 && ids[0] == 3 && ids[1] == 0 && ids[2] == 4);
    free(ids);
    char *text;
    size_t bytes;
    int32_t all[N];
    for (size_t i = 0; i < N; i++) {
        all[i] = (int32_t)i;
    }
    cr_assert_eq(tokenizer_decode(t, all, N, true, &text, &bytes), 0);
    cr_expect_str_eq(text, "<unk><s></s>ababa");
    free(text);
    tokenizer_destroy(t);
    gguf_close(g);
    vocab_image_finish(&v);
}

Test(tokenizer_hostile, merges_of_nothing_known)
{
    static const struct gguf_string merges[] = {
        {"a b", 3}, {"x y", 3},  {"a  b", 4}, {" ", 1},         {"", 0},    {"a", 1},
        {"a ", 2},  {" a b", 4}, {"b a", 3},  {"\xFF \xFE", 3}, {"a b", 3}, {"\0 \0", 3}};
    struct vocab_image v;
    struct gguf *g;
    begin(&v, "gpt2");
    vocab_image_strings(&v, "tokenizer.ggml.merges", merges, sizeof(merges) / sizeof(merges[0]));
    struct tokenizer *t = expect_accepted(&v, &g);
    int32_t *ids;
    size_t n;
    struct tokenize_options plain = {false, false};
    cr_assert_eq(tokenizer_encode(t, "abba", 4, plain, 10, &ids, &n), 0);
    cr_expect(n == 3 && ids[0] == 5 && ids[1] == 4 && ids[2] == 3);
    free(ids);
    /* Neither byte tokens nor an unknown token: an error, never a text with holes. */
    cr_expect_eq(tokenizer_encode(t, "a\xFF", 2, plain, 10, &ids, &n), -EILSEQ);
    tokenizer_destroy(t);
    gguf_close(g);
    vocab_image_finish(&v);
}

/* A long word of one letter: as fast as any other text, and no recursion. */
Test(tokenizer_hostile, very_long_words)
{
    size_t bytes = 1 << 20;
    char *text = malloc(bytes);
    cr_assert_not_null(text);
    static const char fill[] = {'a', ' ', '\n', '\xE2', '\xFF', '<'};
    for (size_t k = 0; k < 3 * sizeof(fill); k++) {
        struct vocab_image v;
        if (k % 3 == 0) {
            vocab_image_spm(&v);
        } else {
            vocab_image_bpe(&v, k % 3 == 1 ? "deepseek-llm" : "qwen2");
        }
        struct gguf *g;
        struct tokenizer *t = expect_accepted(&v, &g);
        memset(text, fill[k / 3], bytes);
        text[bytes - 1] = 'x';
        int32_t *ids;
        size_t n, back_bytes;
        char *back;
        struct tokenize_options plain = {false, false};
        cr_assert_eq(tokenizer_encode(t, text, bytes, plain, 2 * bytes, &ids, &n), 0);
        cr_assert_eq(tokenizer_decode(t, ids, n, false, &back, &back_bytes), 0);
        cr_expect(back_bytes == bytes && memcmp(back, text, bytes) == 0);
        free(back);
        free(ids);
        tokenizer_destroy(t);
        gguf_close(g);
        vocab_image_finish(&v);
    }
    free(text);
}
