/* A sampler that is held to a grammar, over whole vocabularies. */
#include "daemon/model/constraint.h"
#include "daemon/model/sampler.h"
#include "tests/unit/model/vocab_image.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct vocab_image image;
static struct gguf *file;
static struct tokenizer *tokenizer;
static uint32_t n_vocab;
static float *logits;
static uint64_t state = 9;

static void set_up(bool spm)
{
    struct fmt_error err;
    if (spm) {
        vocab_image_spm(&image);
    } else {
        vocab_image_bpe(&image, "gpt-2");
    }
    file = vocab_image_open(&image);
    cr_assert_eq(tokenizer_create(file, &tokenizer, &err), 0);
    n_vocab = tokenizer_n_vocab(tokenizer) + 3; /* as embeddings may be padded */
    logits = malloc(n_vocab * sizeof(*logits));
}

static void tear_down(void)
{
    free(logits);
    tokenizer_destroy(tokenizer);
    gguf_close(file);
    vocab_image_finish(&image);
}

static void fill_logits(void)
{
    for (uint32_t i = 0; i < n_vocab; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        logits[i] = (float)((double)(state >> 40) / (1 << 24) * 12 - 6);
    }
}

static struct grammar *compile(const char *text)
{
    struct grammar *g = NULL;
    struct fmt_error err = {""};
    cr_assert_eq(grammar_compile(text, strlen(text), &g, &err), 0, "%s", err.text);
    return g;
}

static struct constraint *constrain(const struct grammar *g)
{
    struct constraint *c = NULL;
    cr_assert_eq(constraint_create(g, tokenizer, &c), 0);
    return c;
}

static struct sampler *create(const struct sampler_params *p, const struct grammar *g)
{
    struct sampler *s = NULL;
    cr_assert_eq(sampler_create(p, n_vocab, &s), 0);
    cr_assert_eq(sampler_constrain(s, constrain(g)), 0);
    return s;
}

static const char objects[] = "root ::= \"{\" (pair (\",\" pair)*)? \"}\"\n"
                              "pair ::= \" \"? word \":\" (word | root | \"日本\" | [0-9]+)\n"
                              "word ::= \"hello\" | \"the\" | \"wo\" \"r\"? \"ld\"? | [x-z]";

/* Follows a run step by step with a second constraint: what greedy chose is the best of the tokens
 * that are allowed one by one; the mask says the same. */
static void follow(const struct grammar *g)
{
    struct sampler_params p = sampler_params_default();
    p.temperature = 0;
    struct sampler *s = create(&p, g);
    struct constraint *c = constrain(g);
    float *masked = malloc(n_vocab * sizeof(*masked));
    for (int step = 0; step < 60 && !sampler_is_complete(s); step++) {
        struct sampled_token out;
        int32_t best = -1;
        fill_logits();
        memcpy(masked, logits, n_vocab * sizeof(*masked));
        cr_assert_eq(constraint_mask(c, masked, n_vocab), 0);
        for (uint32_t i = 0; i < n_vocab; i++) {
            int allowed = constraint_allows(c, (int32_t)i);
            cr_assert_eq(allowed, masked[i] > -INFINITY, "token %u", i);
            best = allowed && (best < 0 || logits[i] > logits[best]) ? (int32_t)i : best;
        }
        cr_assert_eq(sampler_sample(s, logits, &out), 0);
        cr_assert_eq(out.token, best);
        if (tokenizer_is_eog(tokenizer, best)) {
            break;
        }
        cr_assert_eq(sampler_accept(s, best), 0);
        cr_assert_eq(constraint_accept(c, best), 0);
    }
    free(masked);
    constraint_destroy(c);
    sampler_destroy(s);
}

Test(constraint, the_best_that_is_allowed_is_chosen)
{
    for (int spm = 0; spm < 2; spm++) {
        set_up(spm);
        struct grammar *g = compile(objects);
        for (int run = 0; run < 30; run++) {
            follow(g);
        }
        grammar_destroy(g);
        tear_down();
    }
}

Test(constraint, draws_stay_within_the_grammar_and_end_with_it)
{
    for (int spm = 0; spm < 2; spm++) {
        set_up(spm);
        struct grammar *g = compile(objects);
        unsigned complete = 0;
        for (uint64_t seed = 0; seed < 60; seed++) {
            struct sampler_params p = sampler_params_default();
            p.seed = seed;
            p.mirostat = (int32_t)(seed % 3);
            p.repeat_penalty = 1.1f;
            struct sampler *s = create(&p, g);
            int32_t tokens[200];
            size_t n = 0;
            while (n < 200 && !sampler_is_complete(s)) {
                struct sampled_token out;
                fill_logits();
                cr_assert_eq(sampler_sample(s, logits, &out), 0);
                cr_assert_not(tokenizer_is_eog(tokenizer, out.token),
                              "it ends only where nothing follows");
                tokens[n++] = out.token;
                cr_assert_eq(sampler_accept(s, out.token), 0);
            }
            struct grammar_state *state_again = NULL;
            cr_assert_eq(grammar_state_create(g, &state_again), 0);
            for (size_t i = 0; i < n; i++) {
                struct gguf_string piece;
                cr_assert_eq(tokenizer_piece(tokenizer, tokens[i], false, &piece), 0);
                cr_assert_eq(grammar_state_accept(state_again, piece.data, piece.bytes), 0);
            }
            cr_assert_eq(grammar_state_may_end(state_again), sampler_is_complete(s));
            complete += sampler_is_complete(s);
            grammar_state_destroy(state_again);
            sampler_destroy(s);
        }
        cr_expect_gt(complete, 20);
        grammar_destroy(g);
        tear_down();
    }
}

Test(constraint, ends_only_where_the_grammar_does)
{
    set_up(false);
    int32_t eos = tokenizer_eos(tokenizer);
    struct grammar *g = compile("root ::= \"b\" \"c\"*");
    struct constraint *c = constrain(g);
    cr_expect_eq(constraint_allows(c, eos), 0);
    cr_expect_eq(constraint_accept(c, eos), -EINVAL);
    fill_logits();
    logits[eos] = 100;
    struct sampler_params p = sampler_params_default();
    struct sampler *s = create(&p, g);
    struct sampled_token out;
    cr_assert_eq(sampler_sample(s, logits, &out), 0);
    struct gguf_string piece;
    cr_assert_eq(tokenizer_piece(tokenizer, out.token, false, &piece), 0);
    cr_expect(piece.bytes == 1 && piece.data[0] == 'b');
    cr_assert_eq(sampler_accept(s, out.token), 0);
    cr_expect_not(sampler_is_complete(s));
    cr_assert_eq(sampler_sample(s, logits, &out), 0);
    cr_expect_eq(out.token, eos);
    cr_expect_eq(constraint_allows(c, -1), 0);
    cr_expect_eq(constraint_allows(c, 1 << 30), 0);
    sampler_destroy(s);
    constraint_destroy(c);
    grammar_destroy(g);
    tear_down();
}

Test(constraint, no_token_left_is_an_error)
{
    set_up(true);
    struct grammar *g = compile("root ::= \"x\"");
    struct logit_bias bias[300];
    size_t n = 0;
    for (int32_t i = 0; i < (int32_t)n_vocab - 3; i++) {
        struct gguf_string piece;
        cr_assert_eq(tokenizer_piece(tokenizer, i, false, &piece), 0);
        if (piece.bytes > 0 && piece.data[0] == 'x') {
            bias[n++] = (struct logit_bias){i, -INFINITY};
        }
    }
    struct sampler_params p = sampler_params_default();
    p.logit_bias = bias;
    p.n_logit_bias = n;
    for (int greedy = 0; greedy < 2; greedy++) {
        p.temperature = greedy ? 0 : 1;
        struct sampler *s = create(&p, g);
        struct sampled_token out;
        fill_logits();
        cr_expect_eq(sampler_sample(s, logits, &out), -ENODATA);
        for (uint32_t i = 0; i < n_vocab; i++) {
            logits[i] = -INFINITY;
        }
        cr_expect_eq(sampler_sample(s, logits, &out), -EDOM);
        sampler_destroy(s);
    }
    grammar_destroy(g);
    tear_down();
}

Test(constraint, characters_of_several_tokens)
{
    /* The bytes of 日 and of 🙂 are tokens of their own in both vocabularies. */
    for (int spm = 0; spm < 2; spm++) {
        set_up(spm);
        struct grammar *g = compile("root ::= (\"🙂\" | \"ß\") \"é\"");
        struct sampler_params p = sampler_params_default();
        char text[64] = {0};
        p.temperature = 0;
        struct sampler *s = create(&p, g);
        while (!sampler_is_complete(s)) {
            struct sampled_token out;
            struct gguf_string piece;
            fill_logits();
            cr_assert_eq(sampler_sample(s, logits, &out), 0);
            cr_assert_eq(tokenizer_piece(tokenizer, out.token, false, &piece), 0);
            cr_assert_leq(piece.bytes, 2, "no token has a whole character of these but é");
            strncat(text, piece.data, piece.bytes);
            cr_assert_eq(sampler_accept(s, out.token), 0);
        }
        cr_expect(strcmp(text, "🙂é") == 0 || strcmp(text, "ßé") == 0, "%s", text);
        sampler_destroy(s);
        grammar_destroy(g);
        tear_down();
    }
}
