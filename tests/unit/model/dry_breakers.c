/* Breakers of the dry sampler: found in tokens as in the text that they stand for. */
#include "daemon/model/dry_breakers.h"
#include "daemon/model/sampler.h"
#include "daemon/model/sampler_internal.h"
#include "tests/unit/model/vocab_image.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct vocab_image image;
static struct gguf *file;
static struct tokenizer *tokenizer;

static void open_vocabulary(void (*make)(struct vocab_image *v))
{
    struct fmt_error err;
    make(&image);
    file = vocab_image_open(&image);
    cr_assert_eq(tokenizer_create(file, &tokenizer, &err), 0);
}

static void make_bpe(struct vocab_image *v)
{
    vocab_image_bpe(v, "gpt-2");
}

static void close_vocabulary(void)
{
    tokenizer_destroy(tokenizer);
    gguf_close(file);
    vocab_image_finish(&image);
}

static struct dry_breakers *create(const char *const *texts, size_t n)
{
    struct gguf_string strings[DRY_BREAKERS_MAX];
    struct dry_breakers *b = NULL;
    for (size_t i = 0; i < n; i++) {
        strings[i] = (struct gguf_string){texts[i], strlen(texts[i])};
    }
    cr_assert_eq(dry_breakers_create(tokenizer, strings, n, &b), 0);
    return b;
}

/* The tokens of a text, newest first. */
static size_t recent_tokens(const char *text, int32_t *recent)
{
    int32_t *tokens;
    size_t n;
    cr_assert_eq(tokenizer_encode(tokenizer, text, strlen(text), (struct tokenize_options){0}, 100,
                                  &tokens, &n),
                 0);
    for (size_t i = 0; i < n; i++) {
        recent[i] = tokens[n - 1 - i];
    }
    free(tokens);
    return n;
}

static size_t since(const struct dry_breakers *b, const char *text)
{
    int32_t recent[100];
    size_t n = recent_tokens(text, recent);
    return dry_breakers_since(b, recent, n);
}

Test(dry_breakers, inside_of_tokens)
{
    open_vocabulary(make_bpe);
    struct dry_breakers *b = create((const char *const[]){"\n", "ell"}, 2);
    int32_t token[100];
    cr_expect_eq(since(b, "bcd"), 3, "no breaker");
    cr_expect_eq(since(b, "b\ncd"), 2);
    cr_expect_eq(since(b, "b\n\ncdg"), 3, "two new lines are one token");
    cr_expect_eq(since(b, "bhellocd"), 2, "hello is one token");
    cr_expect_eq(since(b, "bcd\n"), 0);
    cr_assert_eq(recent_tokens("hello", token), 1);
    cr_expect(dry_breakers_in_token(b, token[0]));
    cr_assert_eq(recent_tokens("\n\n", token), 1);
    cr_expect(dry_breakers_in_token(b, token[0]));
    cr_assert_eq(recent_tokens("e", token), 1);
    cr_expect_not(dry_breakers_in_token(b, token[0]), "it only begins one");
    cr_expect_not(dry_breakers_in_token(b, 1 << 30));
    cr_expect_not(dry_breakers_in_token(NULL, 0));
    cr_expect_eq(dry_breakers_since(NULL, token, 1), 1);
    dry_breakers_destroy(b);
    close_vocabulary();
}

Test(dry_breakers, across_tokens)
{
    open_vocabulary(make_bpe);
    struct dry_breakers *b = create((const char *const[]){"lo wb"}, 1);
    cr_expect_eq(since(b, "hello wbcd"), 2, "hello, then the tokens of ' wb'");
    cr_expect_eq(since(b, "hello wcd"), 4);
    cr_expect_eq(since(b, "hello world"), 2);
    dry_breakers_destroy(b);
    b = create((const char *const[]){"b", "bcd"}, 2);
    cr_expect_eq(since(b, "xbcdx"), 1, "the longest that begins there counts");
    cr_expect_eq(since(b, "xbcx"), 2);
    dry_breakers_destroy(b);
    close_vocabulary();
}

Test(dry_breakers, control_tokens_have_their_names)
{
    open_vocabulary(make_bpe);
    struct dry_breakers *b = create((const char *const[]){"im_end"}, 1);
    int32_t end = tokenizer_eos(tokenizer);
    cr_expect(dry_breakers_in_token(b, end));
    dry_breakers_destroy(b);
    close_vocabulary();
}

/* Where every byte is a token, the tokens are the text: what the last-beginning breaker leaves. */
Test(dry_breakers, tokens_of_one_byte_are_searched_like_the_text)
{
    open_vocabulary(make_bpe);
    uint64_t state = 3;
    for (int round = 0; round < 500; round++) {
        char text[41] = {0}, breakers[3][5] = {{0}};
        const char *texts[3] = {breakers[0], breakers[1], breakers[2]};
        for (size_t i = 0; i < 40 + 3 * 4; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            char letter = "bcg"[(state >> 33) % 3];
            if (i < 40) {
                text[i] = letter;
            } else if ((i - 40) % 4 == 0 || (state >> 40) % 4 != 0) {
                char *breaker = breakers[(i - 40) / 4];
                breaker[strlen(breaker)] = letter;
            }
        }
        size_t expected = 40;
        for (size_t start = 0; start < 40; start++) {
            size_t longest = 0;
            for (int k = 0; k < 3; k++) {
                size_t bytes = strlen(breakers[k]);
                if (strncmp(text + start, breakers[k], bytes) == 0 && bytes > longest) {
                    longest = bytes;
                }
            }
            expected = longest > 0 ? 40 - start - longest : expected;
        }
        struct dry_breakers *b = create(texts, 3);
        cr_assert_eq(since(b, text), expected, "%s in %s: %zu, not %zu", breakers[0], text,
                     since(b, text), expected);
        dry_breakers_destroy(b);
    }
    close_vocabulary();
}

Test(dry_breakers, sentencepiece)
{
    open_vocabulary(vocab_image_spm);
    struct dry_breakers *b = create((const char *const[]){"\n", "é"}, 2);
    int32_t recent[100];
    size_t n = recent_tokens("hello\nthe", recent);
    cr_expect_eq(dry_breakers_since(b, recent, n), n - 2,
                 "hello and the new line are a token each");
    n = recent_tokens("aé", recent);
    cr_expect_eq(dry_breakers_since(b, recent, n), 0);
    dry_breakers_destroy(b);
    close_vocabulary();
}

Test(dry_breakers, limits)
{
    open_vocabulary(make_bpe);
    struct gguf_string strings[DRY_BREAKERS_MAX + 1];
    char longest[DRY_BREAKER_BYTES_MAX + 1];
    memset(longest, 'h', sizeof(longest));
    struct dry_breakers *b = NULL;
    for (size_t i = 0; i <= DRY_BREAKERS_MAX; i++) {
        strings[i] = (struct gguf_string){longest, DRY_BREAKER_BYTES_MAX};
    }
    cr_expect_eq(dry_breakers_create(tokenizer, strings, DRY_BREAKERS_MAX + 1, &b), -EINVAL);
    cr_assert_eq(dry_breakers_create(tokenizer, strings, DRY_BREAKERS_MAX, &b), 0);
    dry_breakers_destroy(b);
    cr_assert_eq(dry_breakers_create(tokenizer, strings, 0, &b), 0);
    cr_expect_eq(since(b, "a\nb"), 3);
    dry_breakers_destroy(b);
    b = NULL;
    strings[1].bytes = DRY_BREAKER_BYTES_MAX + 1;
    cr_expect_eq(dry_breakers_create(tokenizer, strings, 2, &b), -EINVAL);
    strings[1].bytes = 0;
    cr_expect_eq(dry_breakers_create(tokenizer, strings, 2, &b), -EINVAL);
    cr_expect_null(b);
    close_vocabulary();
}

/* What the sampler makes of it: the logits that are left. */
Test(dry_breakers, a_repetition_ends_at_a_breaker)
{
    open_vocabulary(make_bpe);
    struct dry_breakers *b = NULL;
    cr_assert_eq(dry_breakers_create(tokenizer, dry_breakers_default, 4, &b), 0);
    uint32_t n_vocab = tokenizer_n_vocab(tokenizer);
    float *logits = calloc(n_vocab, sizeof(*logits));
    struct sampler_params p = sampler_params_default();
    p.temperature = 1;
    p.dry_multiplier = 1;
    p.dry_base = 2;
    p.dry_allowed_length = 1;
    p.chain[0] = SAMPLER_DRY;
    p.n_chain = 1;
    static const struct {
        const char *text, *next;
        float with, without; /* the penalty */
    } cases[] = {
        {"bcgdbcg", "d", -4, -4},     /* 3 tokens are repeated */
        {"b\ncgdb\ncg", "d", -2, -8}, /* 2 since the breaker */
        {"bcg\nbcg", "\n", 0, -4},    /* a breaker itself is never penalised */
        {"bcgdbcg:", "b", 0, 0},      /* nothing since */
        {"b:gd\nb:g", "d", -1, -4},   /* the last one counts */
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (int with = 0; with < 2; with++) {
            int32_t recent[100], next[100];
            struct sampler *s = NULL;
            struct sampled_token out;
            p.dry_breakers = with ? b : NULL;
            cr_assert_eq(sampler_create(&p, n_vocab, &s), 0);
            for (size_t n = recent_tokens(cases[i].text, recent); n-- > 0;) {
                cr_assert_eq(sampler_accept(s, recent[n]), 0);
            }
            cr_assert_eq(recent_tokens(cases[i].next, next), 1);
            cr_assert_eq(sampler_sample(s, logits, &out), 0);
            float got = s->cand.item[next[0]].logit;
            cr_expect(got == (with ? cases[i].with : cases[i].without), "case %zu, %d: %g", i, with,
                      (double)got);
            sampler_destroy(s);
        }
    }
    free(logits);
    dry_breakers_destroy(b);
    close_vocabulary();
}
