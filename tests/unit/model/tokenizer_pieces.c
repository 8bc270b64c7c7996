/* WordPiece and unigram vocabularies: ids worked out by hand, and naive implementations beside. */
#include "daemon/model/tokenizer_internal.h"
#include "tests/unit/model/vocab_image.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NO_LIMIT   10000000
#define MAX_PIECES 64

struct vocab {
    struct vocab_image image;
    struct gguf *g;
    struct tokenizer *t;
};

static const struct tokenize_options plain = {false, false}, special = {true, true};

static void begin(struct vocab *v, const char *model, const char *const *pieces,
                  const int32_t *types, size_t n)
{
    struct gguf_string texts[MAX_PIECES];
    for (size_t i = 0; i < n; i++) {
        texts[i] = (struct gguf_string){pieces[i], strlen(pieces[i])};
    }
    vocab_image_init(&v->image);
    vocab_image_string(&v->image, "tokenizer.ggml.model", model);
    vocab_image_strings(&v->image, "tokenizer.ggml.tokens", texts, n);
    vocab_image_i32s(&v->image, "tokenizer.ggml.token_type", types, n);
}

static void finish(struct vocab *v)
{
    struct fmt_error err = {""};
    v->g = vocab_image_open(&v->image);
    cr_assert_eq(tokenizer_create(v->g, &v->t, &err), 0, "%s", err.text);
}

static void expect_refused(struct vocab *v, const char *words)
{
    struct fmt_error err = {""};
    v->g = vocab_image_open(&v->image);
    v->t = NULL;
    cr_expect_eq(tokenizer_create(v->g, &v->t, &err), -EINVAL, "%s", words);
    cr_expect_not_null(strstr(err.text, words), "'%s' does not say '%s'", err.text, words);
}

static void close_vocab(struct vocab *v)
{
    tokenizer_destroy(v->t);
    gguf_close(v->g);
    vocab_image_finish(&v->image);
}

static void expect_ids(const struct vocab *v, const char *text, struct tokenize_options options,
                       const char *expected)
{
    int32_t *ids;
    size_t n, used = 0;
    char joined[512] = "";
    cr_assert_eq(tokenizer_encode(v->t, text, strlen(text), options, NO_LIMIT, &ids, &n), 0);
    for (size_t i = 0; i < n; i++) {
        used += (size_t)snprintf(joined + used, sizeof(joined) - used, "%s%d", i ? " " : "",
                                 (int)ids[i]);
    }
    cr_expect_str_eq(joined, expected, "'%s' gave %s, expected %s", text, joined, expected);
    free(ids);
}

/* ---- WordPiece ------------------------------------------------------------------------------- */

static const char *const WORDS[] = {
    "[PAD]",  "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁un",   "▁unaff", "aff", "able", "a",
    "ffable", "▁cafe", "▁!",    "▁~",    "▁你",    "▁好",   "▁play",  "ing", "▁a",   "b",
    "▁ᄒ",    "ᅡ",    "ᆫ",    "▁क",    "ि",      "▁Café", "▁。",    "▁b",  "ab",   "▁ab",
};
#define N_WORDS (sizeof(WORDS) / sizeof(WORDS[0]))

static void begin_wordpiece(struct vocab *v)
{
    int32_t types[N_WORDS];
    for (size_t i = 0; i < N_WORDS; i++) {
        types[i] = i < 5 ? TOKEN_CONTROL : TOKEN_NORMAL;
    }
    begin(v, "bert", WORDS, types, N_WORDS);
    vocab_image_u32(&v->image, "tokenizer.ggml.unknown_token_id", 1);
    vocab_image_u32(&v->image, "tokenizer.ggml.cls_token_id", 2);
    vocab_image_u32(&v->image, "tokenizer.ggml.seperator_token_id", 3);
}

Test(tokenizer_pieces, wordpiece)
{
    struct vocab v;
    begin_wordpiece(&v);
    finish(&v);
    cr_expect_str_eq(tokenizer_kind(v.t), "bert");
    expect_ids(&v, "unaffable", plain, "6 8"); /* the longest first: not un + aff + able */
    expect_ids(&v, "unable", plain, "5 8");
    expect_ids(&v, "CAFÉ!你好 playing", special, "2 11 12 14 15 16 17 3");
    expect_ids(&v, "cafe\xCC\x81", plain, "11");                      /* an accent apart */
    expect_ids(&v, "play\u200Bing \xEF\xBF\xBD\x01", plain, "16 17"); /* no width, no character */
    expect_ids(&v, "playxing playing", plain, "1 16 17");
    expect_ids(&v, "a~b\u3002", plain, "18 13 27 26");
    expect_ids(&v, "\u3000a\u00A0b\t", plain, "18 27");
    expect_ids(&v, "한 कि", plain,
               "20 21 22 23 24"); /* all of a syllable; a mark with a width stays */
    expect_ids(&v,
               "un\xFF"
               "able",
               plain, "5 8");
    expect_ids(&v, "", special, "2 3");
    expect_ids(&v, " \n", special, "2 3");
    expect_ids(&v, "a[MASK]b", special, "2 18 4 27 3");
    expect_ids(&v, "[MASK]", plain, "1 1 1");
    close_vocab(&v);
}

Test(tokenizer_pieces, wordpiece_words_have_a_limit)
{
    struct vocab v;
    char text[256] = "";
    begin_wordpiece(&v);
    finish(&v);
    memset(text, 'a', 100);
    int32_t *ids;
    size_t n;
    cr_assert_eq(tokenizer_encode(v.t, text, 100, plain, NO_LIMIT, &ids, &n), 0);
    cr_expect(n == 100 && ids[0] == 18 && ids[99] == 9);
    free(ids);
    memset(text, 'a', 101);
    memcpy(text + 101, " b", 3);
    expect_ids(&v, text, plain, "1 27");
    close_vocab(&v);
}

Test(tokenizer_pieces, wordpiece_cased)
{
    struct vocab v;
    begin_wordpiece(&v);
    vocab_image_bool(&v.image, "tokenizer.ggml.normalizer.lowercase", false);
    finish(&v);
    expect_ids(&v, "Café café CAFE", plain, "25 1 1");
    close_vocab(&v);
    begin_wordpiece(&v);
    vocab_image_bool(&v.image, "tokenizer.ggml.normalizer.lowercase", false);
    vocab_image_bool(&v.image, "tokenizer.ggml.normalizer.strip_accents", true);
    finish(&v);
    expect_ids(&v, "café Café", plain, "11 1");
    close_vocab(&v);
}

Test(tokenizer_pieces, wordpiece_needs_its_tokens)
{
    struct vocab v;
    int32_t types[2] = {TOKEN_NORMAL, TOKEN_NORMAL};
    begin(&v, "bert", WORDS, types, 2);
    expect_refused(&v, "bos_token_id");
    close_vocab(&v);
    begin(&v, "bert", WORDS, types, 2);
    vocab_image_u32(&v.image, "tokenizer.ggml.bos_token_id", 0);
    expect_refused(&v, "seperator_token_id");
    close_vocab(&v);
}

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

/* Greedy, by trying every piece at every place. */
static size_t wordpiece_naively(const char *word, int32_t *ids)
{
    char text[128];
    size_t n = 0;
    snprintf(text, sizeof(text), "▁%s", word);
    for (const char *at = text; *at;) {
        size_t best = 0;
        for (size_t i = 5; i < N_WORDS; i++) {
            size_t bytes = strlen(WORDS[i]);
            if (bytes > best && strncmp(at, WORDS[i], bytes) == 0) {
                best = bytes;
                ids[n] = (int32_t)i;
            }
        }
        if (best == 0) {
            ids[0] = 1;
            return 1;
        }
        n++;
        at += best;
    }
    return n;
}

Test(tokenizer_pieces, wordpiece_as_the_naive_way)
{
    static const char *const parts[] = {"un", "aff",  "able", "ffable", "a",
                                        "b",  "play", "ing",  "x"};
    struct vocab v;
    uint64_t state = 5;
    begin_wordpiece(&v);
    finish(&v);
    for (int round = 0; round < 20000; round++) {
        char word[80] = "";
        int32_t expected[80], *ids;
        size_t n;
        for (uint64_t k = 1 + next_random(&state) % 6; k > 0; k--) {
            strcat(word, parts[next_random(&state) % (k == 3 ? 9 : 8)]);
        }
        size_t m = wordpiece_naively(word, expected);
        cr_assert_eq(tokenizer_encode(v.t, word, strlen(word), plain, NO_LIMIT, &ids, &n), 0);
        cr_assert(n == m && memcmp(ids, expected, n * sizeof(*ids)) == 0, "%s", word);
        free(ids);
    }
    close_vocab(&v);
}

/* ---- unigram --------------------------------------------------------------------------------- */

static const char *const PIECES[] = {"<pad>", "</s>", "<unk>", "▁",   "a",  "b",  "ab",
                                     "bab",   "▁a",   "▁ab",   "aba", "▁▁", "日", "<tool>"};
static const float SCORES[] = {0,     0,     0,     -2.5f, -3.25f, -4.0f, -5.5f,
                               -8.0f, -4.5f, -6.0f, -7.5f, -3.0f,  -9.0f, 0};
#define N_PIECES (sizeof(PIECES) / sizeof(PIECES[0]))

static void begin_unigram(struct vocab *v, bool prefix, bool merge)
{
    int32_t types[N_PIECES] = {3, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4};
    begin(v, "t5", PIECES, types, N_PIECES);
    vocab_image_f32s(&v->image, "tokenizer.ggml.scores", SCORES, N_PIECES);
    vocab_image_bool(&v->image, "tokenizer.ggml.add_space_prefix", prefix);
    vocab_image_bool(&v->image, "tokenizer.ggml.remove_extra_whitespaces", merge);
}

Test(tokenizer_pieces, unigram)
{
    struct vocab v;
    begin_unigram(&v, true, true);
    finish(&v);
    cr_expect_str_eq(tokenizer_kind(v.t), "t5");
    expect_ids(&v, "ab", plain, "9");     /* ▁ab -6 before ▁a b -8.5 */
    expect_ids(&v, "aba", plain, "9 4");  /* ▁ab a -9.25 before ▁ aba -10 and ▁a b a -11.75 */
    expect_ids(&v, "abab", plain, "9 6"); /* -11.5; ▁a bab -12.5 */
    expect_ids(&v, "  ab   a ", plain, "9 8"); /* spaces merge; the last ones go */
    expect_ids(&v, "xyz", plain, "3 2");       /* UNKNOWNs in a row are one */
    expect_ids(&v, "a xa", special, "8 3 2 4 1");
    expect_ids(&v, "a<tool>b</s>", special, "8 13 3 5 1 1");
    expect_ids(&v, "\xFF", plain, "3 2");
    expect_ids(&v, "", special, "1");
    close_vocab(&v);
    begin_unigram(&v, true, false);
    finish(&v);
    expect_ids(&v, "  ab", plain, "11 9");   /* two, and the one in front */
    expect_ids(&v, "a  a", plain, "8 11 4"); /* -10.75; ▁a ▁ ▁a -11.5 */
    close_vocab(&v);
    begin_unigram(&v, false, false);
    finish(&v);
    expect_ids(&v, "ab a", plain, "6 8");
    close_vocab(&v);
}

Test(tokenizer_pieces, unigram_bytes_stand_for_unknown_characters)
{
    static char names[256][8];
    const char *pieces[259] = {"<unk>", "▁", "a"};
    struct gguf_string texts[259];
    int32_t types[259] = {2, 1, 1};
    float scores[259] = {0, -1, -2};
    struct vocab v;
    for (int i = 0; i < 256; i++) {
        snprintf(names[i], sizeof(names[i]), "<0x%02X>", (unsigned)i);
        pieces[3 + i] = names[i];
        types[3 + i] = TOKEN_BYTE;
    }
    for (size_t i = 0; i < 259; i++) {
        texts[i] = (struct gguf_string){pieces[i], strlen(pieces[i])};
    }
    vocab_image_init(&v.image);
    vocab_image_string(&v.image, "tokenizer.ggml.model", "t5");
    vocab_image_strings(&v.image, "tokenizer.ggml.tokens", texts, 259);
    vocab_image_i32s(&v.image, "tokenizer.ggml.token_type", types, 259);
    vocab_image_f32s(&v.image, "tokenizer.ggml.scores", scores, 259);
    vocab_image_bool(&v.image, "tokenizer.ggml.add_space_prefix", true);
    vocab_image_bool(&v.image, "tokenizer.ggml.add_eos_token", false);
    vocab_image_u32(&v.image, "tokenizer.ggml.unknown_token_id", 0);
    finish(&v);
    expect_ids(&v, "aé", plain, "1 2 198 172");
    const int32_t ids[] = {1, 2, 198, 172};
    char *text;
    size_t bytes;
    cr_assert_eq(tokenizer_decode(v.t, ids, 4, false, &text, &bytes), 0);
    cr_expect_str_eq(text, "aé");
    free(text);
    close_vocab(&v);
}

/* The best sum over all ways to cut text, with UNKNOWN for a character; pieces hold U+2581. */
static double best_naively(const char *text)
{
    if (!*text) {
        return 0;
    }
    double best = -1e300;
    size_t step = 1;
    while ((text[step] & 0xC0) == 0x80) {
        step++;
    }
    bool covered = false;
    for (size_t i = 3; i < N_PIECES - 1; i++) {
        size_t bytes = strlen(PIECES[i]);
        if (strncmp(text, PIECES[i], bytes) == 0) {
            covered |= bytes == step;
            best = fmax(best, (double)SCORES[i] + best_naively(text + bytes));
        }
    }
    return covered ? best : fmax(best, -19.0 + best_naively(text + step)); /* least score - 10 */
}

Test(tokenizer_pieces, unigram_as_the_exhaustive_way)
{
    static const char *const parts[] = {"a", "b", "a", "b", "ab", "日", " "};
    struct vocab v;
    uint64_t state = 3;
    begin_unigram(&v, false, false);
    finish(&v);
    for (int round = 0; round < 20000; round++) {
        char text[64] = "", escaped[128] = "";
        int32_t *ids;
        size_t n;
        for (uint64_t k = 1 + next_random(&state) % 9; k > 0; k--) {
            const char *part = parts[next_random(&state) % 7];
            strcat(text, part);
            strcat(escaped, *part == ' ' ? "▁" : part);
        }
        cr_assert_eq(tokenizer_encode(v.t, text, strlen(text), plain, NO_LIMIT, &ids, &n), 0);
        double sum = 0;
        char back[128] = "";
        for (size_t i = 0; i < n; i++) {
            sum += (double)SCORES[ids[i]];
            strcat(back, PIECES[ids[i]]);
        }
        cr_assert_str_eq(back, escaped, "the pieces are the text");
        cr_assert_eq(sum, best_naively(escaped), "'%s': %g is not the best, %g", text, sum,
                     best_naively(escaped)); /* scores are multiples of a quarter: sums are exact */
        free(ids);
    }
    close_vocab(&v);
}

/* ---- normalisation rules --------------------------------------------------------------------- */

#define N_UNITS 512u

/* A map with two rules: "A" to "a", "é" (C3 A9) to "ab". Children of the root at 0x100 ^ byte, the
 * rule's end of "A" at 0x80, the children of C3 at 0x000 ^ byte, the end of its A9 at 0x81. */
static size_t make_charsmap(unsigned char *map)
{
    uint32_t units[N_UNITS] = {0};
    uint32_t a = 0x100 ^ 0x41, c3 = 0x100 ^ 0xC3, a9 = 0xA9;
    units[0] = 0x100u << 10;
    units[a] = 0x41 | 1u << 8 | (a ^ 0x80) << 10;
    units[0x80] = 1u << 31 | 0;
    units[c3] = 0xC3 | c3 << 10;
    units[a9] = 0xA9 | 1u << 8 | (a9 ^ 0x81) << 10;
    units[0x81] = 1u << 31 | 2;
    size_t n = 0;
    uint32_t bytes = sizeof(units);
    for (uint32_t i = 0; i <= N_UNITS; i++) {
        uint32_t word = i == 0 ? bytes : units[i - 1];
        for (int k = 0; k < 4; k++) {
            map[n++] = (unsigned char)(word >> (8 * k));
        }
    }
    memcpy(map + n, "a\0ab", 5);
    return n + 5;
}

Test(tokenizer_pieces, charsmap)
{
    unsigned char map[4 * N_UNITS + 16];
    struct vocab v;
    size_t n = make_charsmap(map);
    begin_unigram(&v, true, true);
    vocab_image_bytes(&v.image, "tokenizer.ggml.precompiled_charsmap", map, n);
    finish(&v);
    expect_ids(&v, "Ab", plain, "9");
    expect_ids(&v, "é É", plain, "9 3 2");
    expect_ids(&v, "b\xC3", plain, "3 5 2"); /* the rule's first half is no rule */
    close_vocab(&v);
}

Test(tokenizer_pieces, charsmaps_that_lie)
{
    unsigned char map[4 * N_UNITS + 16];
    static const char key[] = "tokenizer.ggml.precompiled_charsmap";
    struct vocab v;
    size_t n = make_charsmap(map);
    const struct {
        size_t bytes;
        unsigned char first;
        const char *words;
    } rows[] = {
        {3, 0, "too few"},
        {n, 2, "in a map of"},
        {n - 5, 0, "in a map of"},
        {n - 1, 0, "not terminated"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        begin_unigram(&v, true, true);
        map[0] = rows[i].first;
        vocab_image_bytes(&v.image, key, map, rows[i].bytes);
        expect_refused(&v, rows[i].words);
        close_vocab(&v);
    }
    map[0] = 0;
    uint64_t state = 9;
    for (int round = 0; round < 3000; round++) { /* any units: no crash, ids of the vocabulary */
        for (int k = 0; k < 40; k++) {
            map[4 + next_random(&state) % (n - 5)] = (unsigned char)next_random(&state);
        }
        begin_unigram(&v, true, true);
        vocab_image_bytes(&v.image, key, map, n);
        finish(&v);
        int32_t *ids;
        size_t count;
        int rc = tokenizer_encode(v.t, "Ab é AÉ\xC3", 10, plain, NO_LIMIT, &ids, &count);
        cr_assert(rc == 0 || rc == -E2BIG);
        if (rc == 0) {
            free(ids);
        }
        close_vocab(&v);
    }
}

Test(tokenizer_pieces, scores_that_lie)
{
    struct vocab v;
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < 3; i++) {
        float scores[N_PIECES];
        int32_t types[N_PIECES] = {3, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4};
        memcpy(scores, SCORES, sizeof(scores));
        scores[5] = bad[i];
        begin(&v, "t5", PIECES, types, N_PIECES);
        vocab_image_f32s(&v.image, "tokenizer.ggml.scores", scores, N_PIECES);
        expect_refused(&v, "tokenizer.ggml.scores[5]");
        close_vocab(&v);
        begin(&v, "t5", PIECES, types, N_PIECES);
        vocab_image_f32s(&v.image, "tokenizer.ggml.scores", scores, N_PIECES - 1);
        expect_refused(&v, "tokenizer.ggml.scores");
        close_vocab(&v);
    }
}

Test(tokenizer_pieces, pieces_have_limits)
{
    static char text[2000];
    static const char *const pieces[] = {"<unk>", text, "a"};
    static const float scores[] = {0, -1, -2};
    int32_t types[] = {2, 3, 1};
    struct vocab v;
    memset(text, 'a', sizeof(text) - 1);
    begin(&v, "t5", pieces, types, 3);
    vocab_image_f32s(&v.image, "tokenizer.ggml.scores", scores, 3);
    expect_refused(&v, "tokenizer.ggml.tokens[1]: a special token of 1999 bytes");
    close_vocab(&v);
    types[1] = 1;
    begin(&v, "t5", pieces, types, 3);
    vocab_image_f32s(&v.image, "tokenizer.ggml.scores", scores, 3);
    expect_refused(&v, "tokenizer.ggml.tokens[1]: a piece of 1999 bytes");
    close_vocab(&v);
}

/* ---- work grows with the text, never faster -------------------------------------------------- */

static uint64_t steps_of(const struct tokenizer *t, const char *text, size_t bytes)
{
    struct scratch s;
    cr_assert_eq(scratch_init(&s, t, bytes, NO_LIMIT), 0);
    cr_assert_eq(t->model->encode(t, &s, text, bytes, true), 0);
    uint64_t steps = s.n_steps;
    scratch_finish(&s);
    return steps;
}

static void expect_linear(const struct tokenizer *t, const char *part)
{
    enum { SMALL = 1 << 17, LARGE = 1 << 20 };
    char *text = malloc(LARGE);
    uint64_t state = 1;
    cr_assert_not_null(text);
    for (size_t i = 0, n = strlen(part); i < LARGE; i++) {
        text[i] = n ? part[i % n] : (char)next_random(&state);
    }
    uint64_t small = steps_of(t, text, SMALL), large = steps_of(t, text, LARGE);
    cr_expect(large <= small * 9 + 1000, "%s, '%s': %lu steps, then %lu for 8 times the text",
              tokenizer_kind(t), part, (unsigned long)small, (unsigned long)large);
    cr_expect(large <= 64u * LARGE, "%s, '%s': %lu steps", tokenizer_kind(t), part,
              (unsigned long)large);
    free(text);
}

Test(tokenizer_pieces, work_is_linear, .timeout = 60)
{
    static const char *const parts[] = {
        "a", " ", "ab", "\xF0\x9F\x9A\x80", "1", "\n", "a ", "hello", "", "'", "\xFF"};
    struct vocab v[4];
    begin_wordpiece(&v[0]);
    begin_unigram(&v[1], true, false);
    vocab_image_spm(&v[2].image);
    vocab_image_bpe(&v[3].image, "gpt-2");
    for (size_t i = 0; i < 4; i++) {
        finish(&v[i]);
        for (size_t k = 0; k < sizeof(parts) / sizeof(parts[0]); k++) {
            expect_linear(v[i].t, parts[k]);
        }
        close_vocab(&v[i]);
    }
}
