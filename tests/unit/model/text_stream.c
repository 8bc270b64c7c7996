/* The text stream: stop strings and characters cut at every possible place. */
#include "daemon/model/text_stream.h"

#include <criterion/criterion.h>

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_OUT 512

/* What a stream gives for pieces of text: everything released, and which stop string ended it. */
struct result {
    char text[MAX_OUT];
    size_t bytes;
    int stop;
};

static void collect(struct result *r, const char *text, size_t bytes)
{
    cr_assert_leq(r->bytes + bytes, MAX_OUT);
    memcpy(r->text + r->bytes, text, bytes);
    r->bytes += bytes;
}

static struct text_stream *open_stream(const char *const *stops)
{
    size_t bytes[TEXT_STREAM_MAX_STOPS], n = 0;
    while (stops[n]) {
        bytes[n] = strlen(stops[n]);
        n++;
    }
    struct text_stream *s = NULL;
    cr_assert_eq(text_stream_create(stops, bytes, n, &s), 0);
    return s;
}

/* Feeds text cut after byte i wherever bit i of cuts is set. */
static struct result feed(const char *const *stops, const char *text, size_t bytes, uint64_t cuts)
{
    struct result r = {.stop = -1};
    struct text_stream *s = open_stream(stops);
    const char *out;
    size_t n, start = 0;
    for (size_t i = 0; i < bytes && r.stop < 0; i++) {
        if (i + 1 == bytes || (cuts >> i & 1)) {
            cr_assert_eq(text_stream_push(s, text + start, i + 1 - start, &out, &n, &r.stop), 0);
            collect(&r, out, n);
            start = i + 1;
        }
    }
    if (r.stop < 0) {
        cr_assert_eq(text_stream_flush(s, &out, &n), 0);
        collect(&r, out, n);
    }
    text_stream_destroy(s);
    return r;
}

static void expect_always(const char *const *stops, const char *text, size_t bytes,
                          const char *expected, int stop)
{
    cr_assert_leq(bytes, 16);
    for (uint64_t cuts = 0; cuts < (uint64_t)1 << (bytes - 1); cuts++) {
        struct result r = feed(stops, text, bytes, cuts);
        cr_assert(r.bytes == strlen(expected) && memcmp(r.text, expected, r.bytes) == 0,
                  "'%s' cut %#lx: '%.*s', expected '%s'", text, (unsigned long)cuts, (int)r.bytes,
                  r.text, expected);
        cr_assert_eq(r.stop, stop, "'%s' cut %#lx: stop %d", text, (unsigned long)cuts, r.stop);
    }
}

#define ALWAYS(stops, text, expected, stop) \
    expect_always(stops, text, sizeof(text) - 1, expected, stop)
#define STOPS(...)        \
    (const char *const[]) \
    {                     \
        __VA_ARGS__, NULL \
    }
static const char *const no_stops[] = {NULL};

Test(text_stream, plain_text_survives_every_cut)
{
    ALWAYS(no_stops, "hello, world", "hello, world", -1);
    ALWAYS(no_stops, "a\xC3\xA9\xE6\x97\xA5\xF0\x9F\x99\x82z",
           "a\xC3\xA9\xE6\x97\xA5\xF0\x9F\x99\x82z", -1);
}

Test(text_stream, invalid_bytes_become_replacement_characters)
{
    /* Maximal subparts, as WHATWG decoders replace them: Unicode's example of table 3-8. */
    ALWAYS(no_stops,
           "a\xF1\x80\x80\xE1\x80\xC2"
           "b\x80"
           "c\x80\xBF"
           "d",
           "a\uFFFD\uFFFD\uFFFDb\uFFFDc\uFFFD\uFFFDd", -1);
    ALWAYS(no_stops, "\xC0\xAF\xE0\x80\xBF\xF0\x81\x82",
           "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD", -1);
    ALWAYS(no_stops,
           "\xED\xA0\x80\xF4\x91\x92\x93\xFF"
           "A",
           "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD"
           "A",
           -1);
}

Test(text_stream, unfinished_character_is_replaced_at_the_end_only)
{
    ALWAYS(no_stops, "ab\xF0\x9F\x99", "ab\uFFFD", -1);
    struct text_stream *s = open_stream(no_stops);
    const char *out;
    size_t n;
    int stop;
    cr_assert_eq(text_stream_push(s, "ab\xE6\x97", 4, &out, &n, &stop), 0);
    cr_assert(n == 2 && memcmp(out, "ab", 2) == 0, "half a character was sent");
    cr_assert_eq(text_stream_push(s, "\xA5", 1, &out, &n, &stop), 0);
    cr_assert(n == 3 && memcmp(out, "\xE6\x97\xA5", 3) == 0);
    text_stream_destroy(s);
}

Test(text_stream, stop_string_is_caught_across_every_cut)
{
    ALWAYS(STOPS("stop"), "go go stop now", "go go ", 0);
    ALWAYS(STOPS("\n\nUser:"), "hi\n\nUser: x", "hi", 0);
    ALWAYS(STOPS("\xC3\xA9t\xC3\xA9"), "un \xC3\xA9t\xC3\xA9 x", "un ", 0);
    ALWAYS(STOPS("a"), "a", "", 0);
}

Test(text_stream, almost_a_stop_string_is_released)
{
    ALWAYS(STOPS("stop"), "sto sstpstosto", "sto sstpstosto", -1);
    ALWAYS(STOPS("aab"), "aaaaac aaab", "aaaaac a", 0);
    ALWAYS(STOPS("abab"), "aabacabac", "aabacabac", -1);
    ALWAYS(STOPS("abab"), "ababac", "", 0);
}

Test(text_stream, earliest_match_wins_then_the_lists_order)
{
    ALWAYS(STOPS("b", "abc"), "xabcd", "x", 1);
    ALWAYS(STOPS("b", "abd"), "xabcd", "xa", 0);
    ALWAYS(STOPS("abc", "ab"), "xabcd", "x", 0);
    ALWAYS(STOPS("ab", "abc"), "xabcd", "x", 0);
    ALWAYS(STOPS("abc", "ab"), "xabd", "x", 1);
}

Test(text_stream, text_ends_while_a_longer_stop_string_was_possible)
{
    struct result r = feed(STOPS("abc", "ab"), "xab", 3, 0);
    cr_expect(r.bytes == 1 && r.text[0] == 'x', "a part of a stop string was sent");
    r = feed(STOPS("abc"), "xab", 3, 0);
    cr_expect(r.bytes == 3 && memcmp(r.text, "xab", 3) == 0);
}

Test(text_stream, stop_string_of_stray_bytes_cuts_no_character)
{
    ALWAYS(STOPS("\xA9"), "x\xC3\xA9y", "x\xC3\xA9y", -1);
}

Test(text_stream, held_back_text_is_all_that_is_missing)
{
    struct text_stream *s = open_stream(STOPS("<|end|>"));
    const char *out;
    size_t n;
    int stop;
    cr_assert_eq(text_stream_push(s, "abc<|en", 7, &out, &n, &stop), 0);
    cr_expect(n == 3 && memcmp(out, "abc", 3) == 0);
    cr_assert_eq(text_stream_push(s, "x", 1, &out, &n, &stop), 0);
    cr_expect(n == 5 && memcmp(out, "<|enx", 5) == 0);
    cr_assert_eq(text_stream_push(s, "", 0, &out, &n, &stop), 0);
    cr_expect_eq(n, 0);
    text_stream_destroy(s);
}

Test(text_stream, refuses_what_the_contract_forbids)
{
    struct text_stream *s = NULL;
    const char *many[TEXT_STREAM_MAX_STOPS + 1];
    size_t bytes[TEXT_STREAM_MAX_STOPS + 1];
    for (size_t i = 0; i < TEXT_STREAM_MAX_STOPS + 1; i++) {
        many[i] = "x";
        bytes[i] = 1;
    }
    cr_expect_eq(text_stream_create(many, bytes, TEXT_STREAM_MAX_STOPS + 1, &s), -E2BIG);
    bytes[0] = 0;
    cr_expect_eq(text_stream_create(many, bytes, 1, &s), -EINVAL);
    bytes[0] = TEXT_STREAM_MAX_STOP_BYTES + 1;
    cr_expect_eq(text_stream_create(many, bytes, 1, &s), -E2BIG);
    cr_expect_null(s);
    text_stream_destroy(NULL);

    s = open_stream(STOPS("x"));
    const char *out;
    size_t n;
    int stop;
    cr_assert_eq(text_stream_push(s, "ax", 2, &out, &n, &stop), 0);
    cr_expect_eq(stop, 0);
    cr_expect_eq(text_stream_push(s, "b", 1, &out, &n, &stop), -EPIPE);
    cr_expect_eq(text_stream_flush(s, &out, &n), -EPIPE);
    text_stream_destroy(s);
}

/* Any bytes, cut anywhere, with any stop strings of a tiny alphabet: the same as in one piece. */
Test(text_stream, cuts_never_change_the_result)
{
    static const char bytes[] = "ab\xC3\xA9\xE6\x97\xA5\xFF";
    uint64_t state = 20260101;
    for (int round = 0; round < 3000; round++) {
        char text[24], stop_text[3][8];
        const char *stops[4] = {NULL};
        for (size_t i = 0; i < sizeof(text); i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            text[i] = bytes[(state >> 33) % (sizeof(bytes) - 1)];
        }
        for (size_t k = 0; k < 3; k++) {
            size_t n = 1 + (state >> (40 + k)) % 4;
            for (size_t i = 0; i < n; i++) {
                state = state * 6364136223846793005u + 1442695040888963407u;
                stop_text[k][i] = bytes[(state >> 33) % (sizeof(bytes) - 1)];
            }
            stop_text[k][n] = '\0';
            stops[k] = stop_text[k];
        }
        struct result whole = feed(stops, text, sizeof(text), 0);
        struct result cut = feed(stops, text, sizeof(text), state);
        struct result single = feed(stops, text, sizeof(text), UINT64_MAX);
        cr_assert(whole.bytes == cut.bytes && memcmp(whole.text, cut.text, cut.bytes) == 0);
        cr_assert(whole.bytes == single.bytes &&
                  memcmp(whole.text, single.text, single.bytes) == 0);
        cr_assert_eq(whole.stop, cut.stop);
        cr_assert_eq(whole.stop, single.stop);
    }
}
