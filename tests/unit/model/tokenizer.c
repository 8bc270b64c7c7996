/* The tokenizers on small vocabularies made in memory: ids, round trips, special tokens. */
#include "daemon/model/tokenizer.h"
#include "tests/unit/model/vocab_image.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NO_LIMIT 100000
#define MAX_IDS  600

struct vocab {
    struct vocab_image image;
    struct gguf *g;
    struct tokenizer *t;
};

static void finish_vocab(struct vocab *v)
{
    struct fmt_error err = {""};
    v->g = vocab_image_open(&v->image);
    cr_assert_eq(tokenizer_create(v->g, &v->t, &err), 0, "%s", err.text);
}

static struct vocab spm(void)
{
    struct vocab v;
    vocab_image_spm(&v.image);
    finish_vocab(&v);
    return v;
}

static struct vocab bpe(const char *pre)
{
    struct vocab v;
    vocab_image_bpe(&v.image, pre);
    finish_vocab(&v);
    return v;
}

static void close_vocab(struct vocab *v)
{
    tokenizer_destroy(v->t);
    gguf_close(v->g);
    vocab_image_finish(&v->image);
}

/* The id of the token whose piece, shown as special, is this text; the last such. */
static int32_t id_of(const struct vocab *v, const char *piece)
{
    int32_t found = TOKEN_NONE;
    for (uint32_t i = 0; i < tokenizer_n_vocab(v->t); i++) {
        struct gguf_string s;
        cr_assert_eq(tokenizer_piece(v->t, (int32_t)i, true, &s), 0);
        if (s.bytes == strlen(piece) && memcmp(s.data, piece, s.bytes) == 0) {
            found = (int32_t)i;
        }
    }
    cr_assert_neq(found, TOKEN_NONE, "no token '%s'", piece);
    return found;
}

/* The pieces of the encoded text, separated by '|'. */
static void expect_pieces(const struct vocab *v, const char *text, struct tokenize_options options,
                          const char *expected)
{
    int32_t *ids;
    size_t n, used = 0;
    char joined[512] = "";
    cr_assert_eq(tokenizer_encode(v->t, text, strlen(text), options, NO_LIMIT, &ids, &n), 0);
    for (size_t i = 0; i < n; i++) {
        struct gguf_string s;
        cr_assert_eq(tokenizer_piece(v->t, ids[i], true, &s), 0);
        used += (size_t)snprintf(joined + used, sizeof(joined) - used, "%s%.*s", i ? "|" : "",
                                 (int)s.bytes, s.data);
    }
    cr_expect_str_eq(joined, expected, "'%s' gave %s, expected %s", text, joined, expected);
    free(ids);
}

static const struct tokenize_options plain = {false, false};
static const struct tokenize_options special = {true, true};
static const struct tokenize_options parsed = {false, true};

static void expect_round_trip(const struct vocab *v, const char *text, size_t bytes)
{
    int32_t *ids;
    size_t n, back_bytes;
    char *back;
    cr_assert_eq(tokenizer_encode(v->t, text, bytes, plain, NO_LIMIT, &ids, &n), 0);
    cr_assert_eq(tokenizer_decode(v->t, ids, n, false, &back, &back_bytes), 0);
    cr_assert(back_bytes == bytes && memcmp(back, text, bytes) == 0, "'%.*s' came back as '%.*s'",
              (int)bytes, text, (int)back_bytes, back);
    cr_assert_eq(back[back_bytes], '\0');
    free(back);
    free(ids);
}

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static void expect_any_bytes_survive(const struct vocab *v)
{
    static const char *const parts[] = {
        " ",          "  ",   "hello",  " world",       "\xC3\xA9", "\xE6\x97\xA5\xE6\x9C\xAC",
        "\xE2\x96",   "\n\n", "12",     "\xFF",         "\xF0\x9F", "<tool>",
        "<|im_end|>", "<s>",  "<0x41>", "\xED\xA0\x80", "'s",
    };
    char all[256], text[96];
    for (int i = 0; i < 256; i++) {
        all[i] = (char)i;
        expect_round_trip(v, &all[i], 1);
    }
    expect_round_trip(v, all, sizeof(all));
    expect_round_trip(v, "", 0);
    expect_round_trip(v, "a\0b\0", 4);
    uint64_t state = 7;
    for (int round = 0; round < 3000; round++) {
        size_t n = 0;
        while (n < 64) {
            if (next_random(&state) % 2) {
                const char *part = parts[next_random(&state) % (sizeof(parts) / sizeof(*parts))];
                memcpy(text + n, part, strlen(part));
                n += strlen(part);
            } else {
                text[n++] = (char)next_random(&state);
            }
        }
        /* U+2581 is a space to SentencePiece vocabularies: the one text that changes. */
        if (!memmem(text, n, "\xE2\x96\x81", 3)) {
            expect_round_trip(v, text, n);
        }
    }
}

Test(tokenizer, spm_merges_by_score)
{
    struct vocab v = spm();
    cr_expect_str_eq(tokenizer_kind(v.t), "llama");
    cr_expect_str_eq(tokenizer_pre(v.t), "");
    expect_pieces(&v, "the world", plain, " the| world");
    expect_pieces(&v, "hello", plain, " hello");
    expect_pieces(&v, "xhello, the", plain, " |x|hell|o,| the"); /* "o," beats "hello" */
    expect_pieces(&v, "a     the", plain, " a|    | the");
    expect_pieces(&v, "\xE6\x97\xA5\xE6\x9C\xAC", plain, " |\xE6\x97\xA5\xE6\x9C\xAC");
    close_vocab(&v);
}

Test(tokenizer, spm_unknown_characters_become_bytes)
{
    struct vocab v = spm();
    int32_t *ids;
    size_t n;
    cr_assert_eq(tokenizer_encode(v.t, "\xE2\x82\xAC", 3, plain, NO_LIMIT, &ids, &n), 0);
    cr_assert_eq(n, 4);
    cr_expect(ids[1] == 3 + 0xE2 && ids[2] == 3 + 0x82 && ids[3] == 3 + 0xAC);
    for (size_t i = 1; i < n; i++) {
        cr_expect_eq(tokenizer_token_kind(v.t, ids[i]), TOKEN_BYTE);
    }
    free(ids);
    close_vocab(&v);
}

Test(tokenizer, spm_any_bytes_survive)
{
    struct vocab v = spm();
    expect_any_bytes_survive(&v);
    close_vocab(&v);
}

Test(tokenizer, spm_special_tokens_restart_the_text)
{
    struct vocab v = spm();
    expect_pieces(&v, "the<|im_end|>the", special, "<s>| the|<|im_end|>| the");
    expect_pieces(&v, "the<tool>the", plain, " the|<tool>| the");
    expect_pieces(&v, "<s>", plain, " |<|s|>");
    expect_pieces(&v, "<s><s>", parsed, "<s>|<s>");
    expect_pieces(&v, "", special, "<s>");
    int32_t ids[] = {1, id_of(&v, " the"), id_of(&v, "<|im_end|>"), id_of(&v, " the")};
    char *text;
    size_t bytes;
    cr_assert_eq(tokenizer_decode(v.t, ids, 4, false, &text, &bytes), 0);
    cr_expect_str_eq(text, "thethe");
    free(text);
    cr_assert_eq(tokenizer_decode(v.t, ids, 4, true, &text, &bytes), 0);
    cr_expect_str_eq(text, "<s>the<|im_end|>the");
    free(text);
    close_vocab(&v);
}

Test(tokenizer, spm_without_a_space_in_front)
{
    struct vocab v;
    vocab_image_spm(&v.image);
    vocab_image_bool(&v.image, "tokenizer.ggml.add_space_prefix", false);
    vocab_image_bool(&v.image, "tokenizer.ggml.add_bos_token", false);
    vocab_image_bool(&v.image, "tokenizer.ggml.add_eos_token", true);
    finish_vocab(&v);
    expect_pieces(&v, "hello the", special, "hello| the|</s>");
    expect_pieces(&v, " the", plain, " the");
    cr_expect_not(tokenizer_adds_bos(v.t));
    expect_any_bytes_survive(&v);
    close_vocab(&v);
}

/* A piece with a space inside forbids encoding word by word. */
Test(tokenizer, spm_pieces_across_words)
{
    static const char *const pieces[] = {"<unk>", "a", "b", "▁", "a▁", "a▁b"};
    enum { N = sizeof(pieces) / sizeof(pieces[0]) };
    struct gguf_string texts[N];
    float scores[N];
    int32_t types[N] = {2, 1, 1, 1, 1, 1};
    for (size_t i = 0; i < N; i++) {
        texts[i] = (struct gguf_string){pieces[i], strlen(pieces[i])};
        scores[i] = (float)i;
    }
    struct vocab v;
    vocab_image_init(&v.image);
    vocab_image_string(&v.image, "tokenizer.ggml.model", "llama");
    vocab_image_strings(&v.image, "tokenizer.ggml.tokens", texts, N);
    vocab_image_f32s(&v.image, "tokenizer.ggml.scores", scores, N);
    vocab_image_i32s(&v.image, "tokenizer.ggml.token_type", types, N);
    finish_vocab(&v);
    expect_pieces(&v, "a b a", plain, " |a b| |a");
    expect_pieces(&v, "a?", plain, " |a|<unk>");
    close_vocab(&v);
}

Test(tokenizer, bpe_merges_by_rank)
{
    struct vocab v = bpe("gpt-2");
    cr_expect_str_eq(tokenizer_kind(v.t), "gpt2");
    cr_expect_str_eq(tokenizer_pre(v.t), "gpt-2");
    expect_pieces(&v, "hello world", plain, "hello| world");
    expect_pieces(&v, "hell the12", plain, "hell| the|12");
    expect_pieces(&v, "\xC3\xA9\xC3\xA8", plain, "\xC3\xA9|\xC3|\xA8");
    expect_pieces(&v, "a     the", plain, "a|    | the");
    close_vocab(&v);
}

Test(tokenizer, bpe_any_bytes_survive_every_pre_tokeniser)
{
    static const char *const names[] = {
        "default",   "gpt-2",  "llama-bpe",    "qwen2",          "qwen35",
        "starcoder", "falcon", "deepseek-llm", "deepseek-coder", "deepseek-v3",
        "gpt-4o",    "tekken", "bloom",        "viking",         "seed-coder",
    };
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        struct vocab v = bpe(names[i]);
        expect_any_bytes_survive(&v);
        close_vocab(&v);
    }
}

Test(tokenizer, bpe_pre_tokenisers_cut_where_they_should)
{
    struct vocab v = bpe("qwen2");
    expect_pieces(&v, "12", plain, "1|2"); /* digits one by one: never merged */
    expect_pieces(&v, "\n\nin", plain, "\n\n|in");
    close_vocab(&v);
    v = bpe("llama-bpe");
    expect_pieces(&v, "12", plain, "12");
    expect_pieces(&v, "1212", plain, "12|1|2"); /* in threes */
    close_vocab(&v);
    v = bpe("starcoder");
    expect_pieces(&v, "12", plain, "1|2");
    expect_pieces(&v, "\n\nin", plain, "\n|\n|in");
    close_vocab(&v);
}

Test(tokenizer, user_defined_tokens_always_control_tokens_on_request)
{
    struct vocab v = bpe("gpt-2");
    expect_pieces(&v, "hello<tool> world", plain, "hello|<tool>| world");
    expect_pieces(&v, "<|im_end|>", parsed, "<|im_end|>");
    int32_t *ids;
    size_t n;
    cr_assert_eq(tokenizer_encode(v.t, "<|im_end|>", 10, plain, NO_LIMIT, &ids, &n), 0);
    cr_expect_gt(n, 1);
    free(ids);
    int32_t end = id_of(&v, "<|im_end|>");
    struct gguf_string s = {"x", 1};
    cr_assert_eq(tokenizer_piece(v.t, end, false, &s), 0);
    cr_expect_eq(s.bytes, 0);
    cr_assert_eq(tokenizer_piece(v.t, id_of(&v, "<tool>"), false, &s), 0);
    cr_expect_eq(s.bytes, 6);
    cr_expect(tokenizer_is_eog(v.t, end) && !tokenizer_is_eog(v.t, 0));
    cr_expect_eq(tokenizer_eos(v.t), end);
    cr_expect_eq(tokenizer_bos(v.t), TOKEN_NONE);
    cr_expect_eq(tokenizer_token_kind(v.t, end), TOKEN_CONTROL);
    close_vocab(&v);
}

Test(tokenizer, longest_special_token_goes_first)
{
    static const char *const pieces[] = {"<a>", "<a><b>", "<b><c><d>", "<", ">",
                                         "a",   "b",      "c",         "d", "<c>"};
    enum { N = sizeof(pieces) / sizeof(pieces[0]) };
    struct gguf_string texts[N];
    int32_t types[N] = {4, 4, 3, 1, 1, 1, 1, 1, 1, 4};
    for (size_t i = 0; i < N; i++) {
        texts[i] = (struct gguf_string){pieces[i], strlen(pieces[i])};
    }
    struct vocab v;
    vocab_image_init(&v.image);
    vocab_image_string(&v.image, "tokenizer.ggml.model", "gpt2");
    vocab_image_strings(&v.image, "tokenizer.ggml.tokens", texts, N);
    vocab_image_i32s(&v.image, "tokenizer.ggml.token_type", types, N);
    vocab_image_strings(&v.image, "tokenizer.ggml.merges", NULL, 0);
    finish_vocab(&v);
    expect_pieces(&v, "<a><b><c><d>", parsed, "<a>|<b><c><d>");
    expect_pieces(&v, "<a><b><c><d>", plain, "<a><b>|<c>|<|d|>");
    expect_pieces(&v, "<a><a><a>b<a>", plain, "<a>|<a>|<a>|b|<a>");
    close_vocab(&v);
}

Test(tokenizer, control_tokens_of_phi3_swallow_spaces)
{
    struct vocab v;
    vocab_image_spm(&v.image);
    vocab_image_string(&v.image, "general.name", "Phi-3 mini");
    finish_vocab(&v);
    expect_pieces(&v, "the<|im_end|> \n\tthe<s> the", parsed, " the|<|im_end|>| the|<s>| | the");
    expect_pieces(&v, "<|im_end|> \n", parsed, "<|im_end|>");
    close_vocab(&v);
}

struct encoder {
    const struct tokenizer *t;
    const char *text;
    int32_t *ids;
    size_t n;
    int rc;
};

static void *encode_often(void *arg)
{
    struct encoder *e = arg;
    for (int i = 0; i < 200 && e->rc == 0; i++) {
        free(e->ids);
        e->ids = NULL;
        e->rc = tokenizer_encode(e->t, e->text, strlen(e->text), special, NO_LIMIT, &e->ids, &e->n);
    }
    return NULL;
}

Test(tokenizer, threads_share_one_tokenizer)
{
    struct vocab v = bpe("deepseek-llm");
    struct encoder e[4];
    pthread_t threads[4];
    for (size_t i = 0; i < 4; i++) {
        e[i] = (struct encoder){v.t, "hello hello world the<tool>12 \xC3\xA9  the", NULL, 0, 0};
        cr_assert_eq(pthread_create(&threads[i], NULL, encode_often, &e[i]), 0);
    }
    for (size_t i = 0; i < 4; i++) {
        cr_assert_eq(pthread_join(threads[i], NULL), 0);
        cr_assert_eq(e[i].rc, 0);
        cr_expect(e[i].n == e[0].n && memcmp(e[i].ids, e[0].ids, e[0].n * sizeof(int32_t)) == 0);
    }
    for (size_t i = 0; i < 4; i++) {
        free(e[i].ids);
    }
    close_vocab(&v);
}

Test(tokenizer, limits_and_ids_outside)
{
    struct vocab v = bpe("gpt-2");
    int32_t *ids = NULL;
    size_t n = 99;
    cr_expect_eq(tokenizer_encode(v.t, "abc", 3, plain, 2, &ids, &n), -E2BIG);
    cr_expect(ids == NULL && n == 99, "outputs are untouched on failure");
    cr_assert_eq(tokenizer_encode(v.t, "abc", 3, plain, 3, &ids, &n), 0);
    cr_expect_eq(n, 3);
    free(ids);
    cr_assert_eq(tokenizer_encode(v.t, "", 0, plain, 0, &ids, &n), 0);
    cr_expect(ids == NULL && n == 0);

    const int32_t outside[] = {0, (int32_t)tokenizer_n_vocab(v.t)}, negative = -1;
    char *text = NULL;
    size_t bytes;
    struct gguf_string s;
    cr_expect_eq(tokenizer_decode(v.t, outside, 2, false, &text, &bytes), -ERANGE);
    cr_expect_eq(tokenizer_decode(v.t, &negative, 1, false, &text, &bytes), -ERANGE);
    cr_expect_eq(tokenizer_piece(v.t, outside[1], true, &s), -ERANGE);
    cr_expect_not(tokenizer_is_eog(v.t, -1));
    cr_expect_null(text);
    close_vocab(&v);
    tokenizer_destroy(NULL);
}

/* The obvious quadratic algorithm, on the vocabulary's own pieces. */
static size_t merge_slowly(const struct vocab *v, const char *const *merges, size_t n_merges,
                           const char *word, size_t bytes, size_t *ends)
{
    (void)v;
    size_t n = bytes;
    for (size_t i = 0; i < bytes; i++) {
        ends[i] = i + 1;
    }
    for (;;) {
        size_t best = n_merges, at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            size_t start = i ? ends[i - 1] : 0;
            for (size_t k = 0; k < best; k++) {
                const char *space = strchr(merges[k], ' ');
                size_t left = (size_t)(space - merges[k]), right = strlen(space + 1);
                if (ends[i] - start == left && ends[i + 1] - ends[i] == right &&
                    memcmp(word + start, merges[k], left) == 0 &&
                    memcmp(word + ends[i], space + 1, right) == 0) {
                    best = k;
                    at = i;
                }
            }
        }
        if (best == n_merges) {
            return n;
        }
        memmove(ends + at, ends + at + 1, (n - at - 1) * sizeof(*ends));
        n--;
    }
}

Test(tokenizer, bpe_equals_the_obvious_algorithm)
{
    static const char *const merges[] = {"a b",     "b a",  "ab a",  "a a",    "b b",  "aa b",
                                         "aba aba", "c ab", "ba ba", "aab ba", "cab c"};
    enum { N_MERGES = sizeof(merges) / sizeof(merges[0]), N = N_MERGES + 3 };
    struct gguf_string texts[N] = {{"a", 1}, {"b", 1}, {"c", 1}}, lines[N_MERGES];
    char joined[N_MERGES][16];
    for (size_t i = 0; i < N_MERGES; i++) {
        const char *space = strchr(merges[i], ' ');
        snprintf(joined[i], sizeof(joined[i]), "%.*s%s", (int)(space - merges[i]), merges[i],
                 space + 1);
        texts[3 + i] = (struct gguf_string){joined[i], strlen(joined[i])};
        lines[i] = (struct gguf_string){merges[i], strlen(merges[i])};
    }
    struct vocab v;
    vocab_image_init(&v.image);
    vocab_image_string(&v.image, "tokenizer.ggml.model", "gpt2");
    vocab_image_string(&v.image, "tokenizer.ggml.pre", "gpt-2");
    vocab_image_strings(&v.image, "tokenizer.ggml.tokens", texts, N);
    vocab_image_strings(&v.image, "tokenizer.ggml.merges", lines, N_MERGES);
    finish_vocab(&v);
    uint64_t state = 3;
    for (int round = 0; round < 5000; round++) {
        char word[80];
        size_t ends[80], n = 1 + next_random(&state) % sizeof(word), start = 0;
        for (size_t i = 0; i < n; i++) {
            word[i] = (char)('a' + (next_random(&state) % 8 + 1) / 4);
        }
        size_t expected = merge_slowly(&v, merges, N_MERGES, word, n, ends), count;
        int32_t *ids;
        cr_assert_eq(tokenizer_encode(v.t, word, n, plain, NO_LIMIT, &ids, &count), 0);
        cr_assert_eq(count, expected, "'%.*s'", (int)n, word);
        for (size_t i = 0; i < count; i++) {
            struct gguf_string s;
            cr_assert_eq(tokenizer_piece(v.t, ids[i], true, &s), 0);
            cr_assert(s.bytes == ends[i] - start && memcmp(s.data, word + start, s.bytes) == 0);
            start = ends[i];
        }
        free(ids);
    }
    close_vocab(&v);
}
