/* Pre-tokenisers: every name compiles, cuts where it should, and cuts by hand as PCRE2 does. */
#include "daemon/model/tokenizer_pre_internal.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct pre_tokenizer *create(const char *name, bool by_hand)
{
    struct pre_tokenizer *p = NULL;
    struct fmt_error err = {""};
    struct gguf_string view = {name, strlen(name)};
    cr_assert_eq(pre_tokenizer_create(view, by_hand, &p, &err), 0, "%s: %s", name, err.text);
    return p;
}

/* The words of the text, separated by '|'. */
static void expect_words(const char *name, const char *text, const char *expected)
{
    for (int by_hand = 0; by_hand < 2; by_hand++) {
        struct pre_tokenizer *p = create(name, by_hand);
        struct pre_scratch *s;
        const uint32_t *ends;
        size_t n, used = 0;
        char joined[512] = "";
        cr_assert_eq(pre_scratch_create(p, &s), 0);
        cr_assert_eq(pre_tokenizer_split(p, s, text, strlen(text), &ends, &n), 0);
        for (size_t i = 0; i < n; i++) {
            uint32_t start = i ? ends[i - 1] : 0;
            used += (size_t)snprintf(joined + used, sizeof(joined) - used, "%s%.*s", i ? "|" : "",
                                     (int)(ends[i] - start), text + start);
        }
        cr_expect_str_eq(joined, expected, "%s%s: %s, expected %s", name, by_hand ? " by hand" : "",
                         joined, expected);
        pre_scratch_destroy(s);
        pre_tokenizer_destroy(p);
    }
}

Test(tokenizer_pre, gpt2_and_llama3)
{
    expect_words("gpt-2", "I'm  fine, it'S 1234\n\n x", "I|'m| | fine|,| it|'|S| 1234|\n\n| x");
    expect_words("gpt-2", "a  \n", "a|  \n");
    expect_words("llama-bpe", "I'M  1234567\r\n\n  x(y)!\n\nz",
                 "I|'M| | |123|456|7|\r\n\n| | x|(y|)!\n\n|z");
    expect_words("llama-bpe", "é\tß 日本 \n \n!", "é|\tß| 日本| \n \n|!");
    expect_words("qwen2", "12 a1", "1|2| a|1");
    expect_words("qwen35", "कि", "कि");
    expect_words("qwen2", "कि!", "क|ि!");
    expect_words("starcoder", "a12  b", "a|1|2| | b");
}

Test(tokenizer_pre, deepseek)
{
    expect_words("deepseek-llm", "ab 12,日本 x \n ", "ab| |12|,|日本| x| |\n| ");
    expect_words("deepseek-llm", "a　。b", "a|　。|b");
    expect_words("deepseek-v3", "12345 #include日本x", "123|45| #|include|日本|x");
    expect_words("deepseek-coder", "x1 ,y", "x|1| ,|y");
}

Test(tokenizer_pre, cased)
{
    expect_words("gpt-4o", "HelloWorld ABCdef's x", "Hello|World| ABCdef's| x");
    expect_words("tekken", "HelloWORLD's", "Hello|WORLD|'s");
    expect_words("youtu", "HelloWorld 12 한국、日本", "HelloWorld| |1|2| |한국|、|日本");
    expect_words("granite-embed-multi-97m", "किA नB", "कि|A| न|B");
}

Test(tokenizer_pre, numbers_in_threes)
{
    expect_words("tiny_aya", "1234567 12a 1234", "1|234|567| |12|a| |1|234");
    expect_words("superbpe", "a b 1234567c", "a b |1|234|567|c");
    expect_words("afmoe", "ab1234 x", "ab|1|234| x");
    expect_words("minicpm5", "1234567", "123|456|7");
}

Test(tokenizer_pre, others)
{
    expect_words("bailingmoe", "it's\n\n1", "it|'s|\n\n|1");
    expect_words("exaone-moe", "two words  three", "two words| | three");
    expect_words("kimi-k2", "HelloWorld's日本x123456", "HelloWorld's|日本|x|123|456");
    expect_words("laguna", "a\n\nb", "a|\n\n|b");
    expect_words("chameleon", "IMGIMGABZx,  1", "IMGIMGABZ|x|,|  |1");
    expect_words("ufakzeka", "Ali'nin", "Ali|'nin");
    expect_words("jais-2", "a      b", "a|    | | b");
    expect_words("bloom", "a, b (c)", "a|,| b| (|c|)");
    expect_words("viking", "a12", "a|1|2");
    expect_words("falcon", "a$$1234", "a|$$|123|4");
    expect_words("default", "1234,x", "123|4|,|x");
    expect_words("seed-coder", "x!!\n1", "x|!!|\n|1");
    expect_words("spark2_5", "x!\n\n1", "x|!|\n|\n|1");
}

Test(tokenizer_pre, an_unknown_name_is_refused_by_name)
{
    static const char *const names[] = {"", "gpt-3", "qwen", "llama-bp", "whitespace"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        struct pre_tokenizer *p = NULL;
        struct fmt_error err = {""};
        struct gguf_string view = {names[i], strlen(names[i])};
        cr_assert_eq(pre_tokenizer_create(view, true, &p, &err), -ENOTSUP);
        cr_expect_not_null(strstr(err.text, "tokenizer.ggml.pre: unknown pre-tokeniser '"));
        cr_expect(strstr(err.text, names[i]) && !p);
    }
}

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

/* A few characters of every class and length, so that all neighbourhoods occur. */
static size_t random_text(uint64_t *state, char *text, size_t size)
{
    static const char *const parts[] = {
        " ",      " ",      "  ",       "\n",     "\r",         "\r\n", "\t",   "'",  "'s",
        "'S",     "'LL",    "'re",      "a",      "z",          "B",    "é",    "ß",  "日",
        "本",     "한",     "က",        "ḁ",      "ⅷ",          "1",    "22",   "٣",  "½",
        "!",      "/",      "#",        "_",      "$",          "€",    "、",   "　", "\xC2\xA0",
        "\u2003", "\u2028", "\xC2\x85", "\u0301", "ि",          "👍",    "‘",    "～", "Ⴀ",
        "ſ",      "İ",      "\u200D",   "\uFFFD", "\U00012345", "\x7F", "\x01",
    };
    size_t n = 0, count = next_random(state) % 40;
    for (size_t i = 0; i < count; i++) {
        const char *part = parts[next_random(state) % (sizeof(parts) / sizeof(parts[0]))];
        size_t bytes = strlen(part), times = next_random(state) % 8 == 0 ? 5 : 1;
        for (size_t k = 0; k < times && n + bytes < size; k++) {
            memcpy(text + n, part, bytes);
            n += bytes;
        }
    }
    return n;
}

static void expect_same_words(const struct pre_row *row, uint64_t seed, int rounds)
{
    struct pre_tokenizer *hand = create(row->name, true), *truth = create(row->name, false);
    struct pre_scratch *a, *b;
    char text[512];
    uint64_t state = seed;
    cr_assert_eq(pre_scratch_create(hand, &a), 0);
    cr_assert_eq(pre_scratch_create(truth, &b), 0);
    for (int round = 0; round < rounds; round++) {
        size_t bytes = random_text(&state, text, sizeof(text)), n, m;
        const uint32_t *x, *y;
        cr_assert_eq(pre_tokenizer_split(hand, a, text, bytes, &x, &n), 0);
        cr_assert_eq(pre_tokenizer_split(truth, b, text, bytes, &y, &m), 0);
        cr_assert(n == m && (n == 0 || memcmp(x, y, n * sizeof(*x)) == 0),
                  "%s: '%.*s' (seed %lu, round %d)", row->name, (int)bytes, text,
                  (unsigned long)seed, round);
        cr_assert_eq(n > 0 ? x[n - 1] : 0, bytes, "%s: the last word ends with the text",
                     row->name);
    }
    pre_scratch_destroy(a);
    pre_scratch_destroy(b);
    pre_tokenizer_destroy(hand);
    pre_tokenizer_destroy(truth);
}

Test(tokenizer_pre, by_hand_as_pcre2)
{
    const struct pre_row *row;
    for (size_t i = 0; (row = pre_row_at(i)) != NULL; i++) {
        bool scanned = false, first = true;
        for (size_t k = 0; row->expressions[k]; k++) {
            scanned |= row->expressions[k]->scan != NULL;
        }
        for (size_t k = 0; k < i; k++) { /* aliases share a list: once is enough */
            first &= pre_row_at(k)->expressions != row->expressions;
        }
        if (scanned && first) {
            expect_same_words(row, 1 + i, 20000);
        }
    }
}

/* Every character alone and between letters, in the classes of the hand-written scanners. */
Test(tokenizer_pre, classes_of_all_characters)
{
    static const char *const names[] = {"gpt-2", "qwen35", "deepseek-llm", "llama-bpe"};
    const uint8_t *classes = pre_classes();
    cr_assert_not_null(classes);
    cr_expect_eq(classes['a'], CLASS_LETTER | CLASS_CASED | CLASS_SIGN);
    cr_expect_eq(classes[0x85], CLASS_SPACE);
    cr_expect_eq(classes[0x3000], CLASS_SPACE | CLASS_SIGN | CLASS_CJK);
    cr_expect_eq(classes[0x10FFFF], 0);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        struct pre_tokenizer *hand = create(names[i], true), *truth = create(names[i], false);
        struct pre_scratch *a, *b;
        cr_assert_eq(pre_scratch_create(hand, &a), 0);
        cr_assert_eq(pre_scratch_create(truth, &b), 0);
        for (uint32_t point = 0x80; point < 0x110000; point += 1 + point / 0x3000) {
            if (point >= 0xD800 && point < 0xE000) {
                continue;
            }
            char text[16];
            int n = point < 0x800 ? snprintf(text, sizeof(text), "a %c%cb", 0xC0 | point >> 6,
                                             0x80 | (point & 63))
                    : point < 0x10000
                        ? snprintf(text, sizeof(text), "a %c%c%cb", 0xE0 | point >> 12,
                                   0x80 | (point >> 6 & 63), 0x80 | (point & 63))
                        : snprintf(text, sizeof(text), "a %c%c%c%cb", 0xF0 | point >> 18,
                                   0x80 | (point >> 12 & 63), 0x80 | (point >> 6 & 63),
                                   0x80 | (point & 63));
            const uint32_t *x, *y;
            size_t nx, ny;
            cr_assert_eq(pre_tokenizer_split(hand, a, text, (size_t)n, &x, &nx), 0);
            cr_assert_eq(pre_tokenizer_split(truth, b, text, (size_t)n, &y, &ny), 0);
            cr_assert(nx == ny && memcmp(x, y, nx * sizeof(*x)) == 0, "%s: U+%04X", names[i],
                      (unsigned)point);
        }
        pre_scratch_destroy(a);
        pre_scratch_destroy(b);
        pre_tokenizer_destroy(hand);
        pre_tokenizer_destroy(truth);
    }
}
