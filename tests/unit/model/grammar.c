/* Grammars: what they refuse to read, and what they let through, against POSIX expressions, jansson
 * and plain predicates over all short strings. */
#include "daemon/model/grammar.h"

#include <criterion/criterion.h>
#include <jansson.h>

#include <errno.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct grammar *compile(const char *text)
{
    struct grammar *g = NULL;
    struct fmt_error err = {""};
    cr_assert_eq(grammar_compile(text, strlen(text), &g, &err), 0, "%s\n%s", err.text, text);
    return g;
}

static struct grammar_state *begin(const struct grammar *g)
{
    struct grammar_state *s = NULL;
    cr_assert_eq(grammar_state_create(g, &s), 0);
    return s;
}

/* 2: a whole text; 1: the beginning of one; 0: neither. By one step per byte and, as must be the
 * same, all at once. */
static int match_bytes(const struct grammar *g, const char *text, size_t bytes)
{
    struct grammar_state *s = begin(g);
    bool first[256];
    int at_once = grammar_state_allows(s, text, bytes);
    cr_assert_geq(at_once, 0);
    int rc = 0;
    for (size_t i = 0; i < bytes && rc == 0; i++) {
        grammar_state_first_bytes(s, first);
        rc = grammar_state_accept(s, text + i, 1);
        cr_assert(rc == 0 || rc == -EINVAL);
        cr_assert_eq(first[(unsigned char)text[i]], rc == 0);
    }
    cr_assert_eq(at_once, rc == 0, "'%.*s'", (int)bytes, text);
    int result = rc < 0 ? 0 : grammar_state_may_end(s) ? 2 : 1;
    grammar_state_destroy(s);
    return result;
}

static int match(const struct grammar *g, const char *text)
{
    return match_bytes(g, text, strlen(text));
}

static int match_text(const char *grammar, const char *text)
{
    struct grammar *g = compile(grammar);
    int result = match(g, text);
    grammar_destroy(g);
    return result;
}

/* ---- texts that are grammars, and such that are not -------------------------------------- */

Test(grammar, what_is_refused_is_told_with_its_place)
{
    static const struct {
        const char *text, *words;
    } cases[] = {
        {"", "no rule 'root'"},
        {"a ::= \"x\"", "no rule 'root'"},
        {"root ::= b", "line 1, column 10: there is no rule 'b'"},
        {"root ::= \"a\"\nroot ::= \"b\"", "line 2, column 1: another rule has the name 'root'"},
        {"root = \"a\"", "line 1, column 6: '::=' was expected"},
        {"root ::= \"a", "line 1, column 10: a literal has no end"},
        {"root ::= [a", "line 1, column 10: a class has no end"},
        {"root ::= [z-a]", "line 1, column 11: a range of a class runs backwards"},
        {"root ::= (\"a\"", "line 1, column 10: a parenthesis is not closed"},
        {"root ::= \"a\")", "line 1, column 13: the end of the rule's line was expected"},
        {"root ::= *", "line 1, column 10: there is nothing to repeat"},
        {"root ::= \"a\"{2", "line 1, column 15: '}' was expected"},
        {"root ::= \"a\"{3,2}", "wrong way round"},
        {"root ::= \"a\"{}", "line 1, column 14: a number of repetitions"},
        {"root ::= \"a\"{20001}", "more repetitions than 20000"},
        {"root ::= \"\\q\"", "line 1, column 11: an unknown escape"},
        {"root ::= \"\\x1\"", "line 1, column 11: an escape has too few"},
        {"root ::= \"\\uD800\"", "an escape is no character"},
        {"root ::= \"\\U00110000\"", "an escape is no character"},
        {"root ::= \"é\" \"\xff\"", "line 1, column 15: the grammar is not UTF-8"},
        {"root ::= <think>", "tokens in a grammar are not supported"},
        {"root ::= root \"a\"",
         "line 1, column 1: left recursion: a rule can begin with itself: 'root'"},
        {"root ::= a\na ::= \"x\" | b\nb ::= c \"y\"\nc ::= \"\"? a", "left recursion"},
        {"root ::= \"x\" a\na ::= [b]* a", "left recursion: a rule can begin with itself: 'a'"},
        {"root ::= \"a\" root2 \"\n", "a literal has no end"},
        {"1 2", "'::=' was expected"},
        {"::= a", "a rule's name was expected"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct grammar *g = NULL;
        struct fmt_error err = {""};
        cr_expect_eq(grammar_compile(cases[i].text, strlen(cases[i].text), &g, &err), -EINVAL, "%s",
                     cases[i].text);
        cr_expect_null(g);
        cr_expect(strstr(err.text, cases[i].words), "%s\n  %s, not %s", cases[i].text, err.text,
                  cases[i].words);
    }
}

Test(grammar, limits)
{
    struct grammar *g = NULL;
    struct fmt_error err = {""};
    char *text = malloc(GRAMMAR_TEXT_BYTES_MAX + 2);
    memset(text, ' ', GRAMMAR_TEXT_BYTES_MAX + 2);
    cr_expect_eq(grammar_compile(text, GRAMMAR_TEXT_BYTES_MAX + 1, &g, &err), -EINVAL);
    cr_expect(strstr(err.text, "1048577 bytes"), "%s", err.text);
    memcpy(text, "root ::= ", 9);
    memset(text + 9, '(', 101);
    cr_expect_eq(grammar_compile(text, 200, &g, &err), -EINVAL);
    cr_expect(strstr(err.text, "100 parentheses"), "%s", err.text);
    static const char deep[] = "root ::= ((((\"a\"{2000}){2000}){2000}){2000}){2000}";
    cr_expect_eq(grammar_compile(deep, strlen(deep), &g, &err), -EINVAL);
    cr_expect(strstr(err.text, "nodes"), "%s", err.text);
    size_t at = 0;
    for (unsigned i = 0; i < 9000; i++) {
        at += (size_t)sprintf(text + at, "r%u ::= \"a\"\n", i);
    }
    cr_expect_eq(grammar_compile(text, at, &g, &err), -EINVAL);
    cr_expect(strstr(err.text, "8192 rules"), "%s", err.text);
    cr_expect_null(g);
    free(text);
}

Test(grammar, long_chains_of_rules_are_searched_quickly)
{
    /* Each rule can be empty through the next, in the order that is worst for a pass; and the last
     * one begins with the first. */
    char *text = malloc(1 << 20);
    for (int circle = 0; circle < 2; circle++) {
        struct grammar *g = NULL;
        struct fmt_error err = {""};
        size_t at = (size_t)sprintf(text, "root ::= r0\n");
        for (unsigned i = 0; i < 4000; i++) {
            at += (size_t)sprintf(text + at, "r%u ::= r%u r%u\n", i, i + 1, i + 1);
        }
        at += (size_t)sprintf(text + at, "r4000 ::= %s\n", circle ? "\"\" r0" : "\"a\"?");
        int rc = grammar_compile(text, at, &g, &err);
        cr_expect_eq(rc, circle ? -EINVAL : 0, "%s", err.text);
        grammar_destroy(g);
    }
    free(text);
}

/* ---- what is let through ----------------------------------------------------------------- */

Test(grammar, tables)
{
    static const struct {
        const char *grammar, *text;
        int result;
    } cases[] = {
        {"root ::= \"ab\" | \"ac\"", "a", 1},
        {"root ::= \"ab\" | \"ac\"", "ac", 2},
        {"root ::= \"ab\" | \"ac\"", "ad", 0},
        {"root ::= \"ab\" | \"ac\"", "abc", 0},
        {"root ::= \"\"", "", 2},
        {"root ::= | \"a\"", "", 2},
        {"root ::= \"a\" # comment | \"b\"\n\n# another\n", "b", 0},
        {"root ::= \"a\" |\n  \"b\"", "b", 2},
        {"root ::=\n  \"b\"", "b", 2},
        {"root ::= (\n\"a\"\n# in between\n| \"b\"\n)+", "abba", 2},
        {"root ::= \"ab\"*", "aba", 1},
        {"root ::= \"ab\"*", "abab", 2},
        {"root ::= [^a-c\\n]", "d", 2},
        {"root ::= [^a-c\\n]", "b", 0},
        {"root ::= [^a-c\\n]", "\n", 0},
        {"root ::= [^]", "x", 2},
        {"root ::= []", "x", 0},
        {"root ::= [a-]", "-", 2},
        {"root ::= [\\]\\-x]+", "]-x", 2},
        {"root ::= \"\\x41\\u00e9\\U0001F642\"", "Aé🙂", 2},
        {"root ::= \"\\\"\\\\\\t\\r\\n\\[\\]\"", "\"\\\t\r\n[]", 2},
        {"root ::= [ぁ-ゟ]+", "ひらがな", 2},
        {"root ::= [ぁ-ゟ]+", "カ", 0},
        {"root ::= .", "\n", 2},
        {"root ::= .{2}", "é🙂", 2},
        {"root ::= \"a\"{2,3}", "a", 1},
        {"root ::= \"a\"{2,3}", "aaa", 2},
        {"root ::= \"a\"{2,3}", "aaaa", 0},
        {"root ::= \"a\"{ 2 , } \"b\"", "aaaaab", 2},
        {"root ::= \"a\"{0}\"b\"", "b", 2},
        {"root ::= \"a\"{0,0}", "a", 0},
        {"root ::= \"a\"?*+", "aaa", 2},
        {"root ::= (\"a\"?){3}", "aa", 2},
        {"root ::= (\"a\"?){3}", "aaaa", 0},
        {"root ::= (\"\"*)* \"x\"", "x", 2},
        {"root ::= a_b-1\na_b-1 ::= \"x\"", "x", 2},
        {"root ::= \"(\" root? \")\"", "((()))", 2},
        {"root ::= \"(\" root? \")\"", "((())", 1},
        {"root ::= \"(\" root? \")\"", "())", 0},
        {"root ::= a \"b\"\na ::= \"\" | \"a\" a", "aaab", 2},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int got = match_text(cases[i].grammar, cases[i].text);
        cr_expect_eq(got, cases[i].result, "%s with '%s': %d, not %d", cases[i].grammar,
                     cases[i].text, got, cases[i].result);
    }
}

Test(grammar, nul_is_a_character)
{
    struct grammar *g = compile("root ::= \"a\\x00b\" [\\x00-\\x02]");
    cr_expect_eq(match_bytes(g, "a\0b\0", 4), 2);
    cr_expect_eq(match_bytes(g, "a\0b\3", 4), 0);
    grammar_destroy(g);
}

/* A random expression in both notations. */
struct both {
    char gbnf[4096], ere[4096];
    uint64_t state;
};

static unsigned any(struct both *b, unsigned below)
{
    b->state = b->state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(b->state >> 33) % below;
}

static void put(struct both *b, const char *gbnf, const char *ere)
{
    strcat(b->gbnf, gbnf);
    strcat(b->ere, ere);
}

static void put_expression(struct both *b, unsigned depth)
{
    static const char *const atoms[][2] = {
        {"\"a\" ", "a"},     {"\"b\" ", "b"}, {"[ab] ", "[ab]"},     {"[^a] ", "[^a]"},
        {"\"ab\" ", "(ab)"}, {". ", "."},     {"a-rule ", "(ab|c)"},
    };
    static const char *const repetitions[][2] = {
        {"* ", "*"},         {"+ ", "+"},       {"? ", "?"},         {"{2} ", "{2}"},
        {"{1,3} ", "{1,3}"}, {"{2,} ", "{2,}"}, {"{0,2} ", "{0,2}"},
    };
    unsigned n = any(b, 3) + 1;
    for (unsigned i = 0; i < n; i++) {
        if (depth > 0 && any(b, 2) == 0) {
            put(b, "(", "(");
            put_expression(b, depth - 1);
            if (any(b, 2) == 0) {
                put(b, "| ", "|");
                put_expression(b, depth - 1);
            }
            put(b, ") ", ")");
        } else {
            unsigned atom = any(b, 7);
            put(b, atoms[atom][0], atoms[atom][1]);
        }
        if (any(b, 2) == 0) {
            unsigned r = any(b, 7);
            put(b, repetitions[r][0], repetitions[r][1]);
        }
    }
}

Test(grammar, regular_grammars_are_the_regular_expressions)
{
    struct both b = {.state = 11};
    size_t whole = 0, dead = 0;
    for (int round = 0; round < 150; round++) {
        strcpy(b.gbnf, "root ::= ");
        strcpy(b.ere, "^(");
        put_expression(&b, 2);
        put(&b, "\na-rule ::= \"ab\" | \"c\"\n", ")$");
        regex_t regex;
        cr_assert_eq(regcomp(&regex, b.ere, REG_EXTENDED | REG_NOSUB), 0);
        struct grammar *g = compile(b.gbnf);
        for (unsigned length = 0; length <= 5; length++) {
            unsigned count = 1;
            for (unsigned i = 0; i < length; i++) {
                count *= 3;
            }
            for (unsigned k = 0; k < count; k++) {
                char text[8] = {0};
                for (unsigned i = 0, rest = k; i < length; i++, rest /= 3) {
                    text[i] = "abc"[rest % 3];
                }
                bool expected = regexec(&regex, text, 0, NULL, 0) == 0;
                int got = match(g, text);
                cr_assert_eq(got == 2, expected, "%s with '%s'", b.gbnf, text);
                whole += got == 2;
                dead += got == 0;
            }
        }
        grammar_destroy(g);
        regfree(&regex);
    }
    cr_expect(whole > 1000 && dead > 1000, "%zu, %zu", whole, dead);
}

/* ---- context-free languages against predicates ------------------------------------------- */

static bool is_palindrome(const char *t)
{
    size_t n = strlen(t);
    for (size_t i = 0; i < n / 2; i++) {
        if (t[i] != t[n - 1 - i]) {
            return false;
        }
    }
    return n > 0;
}

static bool is_balanced(const char *t)
{
    int depth = 0;
    for (; *t != '\0'; t++) {
        depth += *t == 'a' ? 1 : *t == 'b' ? -1 : 0;
        if (depth < 0) {
            return false;
        }
    }
    return depth == 0;
}

/* a^n b^n c*, or a* b^n c^n: ambiguous where both hold. */
static bool is_two_equal(const char *t)
{
    size_t a = strspn(t, "a"), b = strspn(t + a, "b"), c = strspn(t + a + b, "c");
    return t[a + b + c] == '\0' && (a == b || b == c);
}

Test(grammar, context_free_languages)
{
    static const struct {
        const char *grammar;
        bool (*is_in)(const char *t);
    } cases[] = {
        {"root ::= \"a\" root? \"a\" | \"b\" root? \"b\" | \"c\" root? \"c\" | [abc]",
         is_palindrome},
        {"root ::= (\"a\" root \"b\" | \"c\")*", is_balanced},
        {"root ::= e \"c\"* | \"a\"* f\ne ::= (\"a\" e \"b\")?\nf ::= (\"b\" f \"c\")?",
         is_two_equal},
        /* The same with calls that end where they begin, again and again. */
        {"root ::= e n e2\ne ::= n e1 n\ne1 ::= (\"a\" e \"b\")?\nn ::= \"\" | m\nm ::= (\"\"?)*\n"
         "e2 ::= \"c\"* | x\nx ::= \"z\"",
         NULL},
    };
    for (size_t i = 0; i < 3; i++) {
        struct grammar *g = compile(cases[i].grammar);
        for (unsigned length = 0; length <= 8; length++) {
            unsigned count = 1;
            for (unsigned k = 0; k < length; k++) {
                count *= 3;
            }
            for (unsigned k = 0; k < count; k += 1 + (length == 8)) {
                char text[12] = {0};
                for (unsigned j = 0, rest = k; j < length; j++, rest /= 3) {
                    text[j] = "abc"[rest % 3];
                }
                cr_assert_eq(match(g, text) == 2, cases[i].is_in(text), "%zu: '%s'", i, text);
            }
        }
        grammar_destroy(g);
    }
    cr_expect_eq(match_text(cases[3].grammar, "aabbcc"), 2);
    cr_expect_eq(match_text(cases[3].grammar, "aabcc"), 0);
    cr_expect_eq(match_text(cases[3].grammar, ""), 2);
}

static const char json_grammar[] =
    "root ::= ws (object | array) ws\n"
    "value ::= object | array | string | number | \"true\" | \"false\" | \"null\"\n"
    "object ::= \"{\" ws (string ws \":\" ws value ws (\",\" ws string ws \":\" ws value ws)*)? "
    "\"}\"\n"
    "array ::= \"[\" ws (value ws (\",\" ws value ws)*)? \"]\"\n"
    "string ::= \"\\\"\" ([^\"\\\\\\x00-\\x1F] | \"\\\\\" ([\"\\\\/bfnrt] | \"u\" "
    "[0-9a-fA-F]{4}))* \"\\\"\"\n"
    "number ::= \"-\"? (\"0\" | [1-9] [0-9]{0,15}) (\".\" [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?\n"
    "ws ::= [ \\t\\n]*\n";

Test(grammar, json_is_what_jansson_reads)
{
    /* No d: half of a surrogate pair is none to jansson, and this grammar does not know pairs. */
    static const char alphabet[] = "{}[]:,\"\\u0019.e-+ \ntfnalse\xc3\xa9";
    static const char *const seeds[] = {
        "{\"a\": [1, 2.5e-3, true, null, \"x\\u0041\\n\"], \"b\": {}}",
        "[[], [[]], {\"\": -0}]",
        "[\"\xc3\xa9\xe6\x97\xa5\xf0\x9f\x99\x82\", false]",
        "[ 1 ,\n2 ]",
    };
    struct grammar *g = compile(json_grammar);
    uint64_t state = 5;
    size_t good = 0;
    for (unsigned round = 0; round < 20000; round++) {
        char text[128];
        strcpy(text, seeds[round % 4]);
        for (unsigned k = 0; k < round / 4 % 4; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            size_t at = (size_t)(state >> 33) % strlen(text);
            char c = alphabet[(state >> 50) % (sizeof(alphabet) - 1)];
            if (state >> 20 & 1) {
                memmove(text + at, text + at + 1, strlen(text + at));
            } else if (state >> 21 & 1) {
                text[at] = c;
            } else if (strlen(text) < 120) {
                memmove(text + at + 1, text + at, strlen(text + at) + 1);
                text[at] = c;
            }
        }
        json_t *j = json_loads(text, JSON_ALLOW_NUL, NULL);
        cr_assert_eq(match(g, text) == 2, j != NULL, "%s", text);
        good += j != NULL;
        json_decref(j);
    }
    cr_expect_gt(good, 5000);
    grammar_destroy(g);
}

/* ---- pieces ------------------------------------------------------------------------------ */

Test(grammar, pieces_may_end_inside_a_character)
{
    struct grammar *g = compile("root ::= [à-ï]+ \"🙂\" | \"日\" | \"\\uE000\"");
    struct grammar_state *s = begin(g);
    cr_expect_eq(grammar_state_allows(s, "\xc3", 1), 1);
    cr_expect_eq(grammar_state_allows(s, "\xc2", 1), 0, "U+0080 to U+00BF");
    cr_expect_eq(grammar_state_allows(s, "\xc3\x80", 2), 0, "U+00C0");
    cr_expect_eq(grammar_state_allows(s, "\xe6\x97", 2), 1);
    cr_expect_eq(grammar_state_allows(s, "\xe6\x98", 2), 0);
    cr_expect_eq(grammar_state_allows(s, "\xed", 1), 0,
                 "U+D000 to U+D7FF; the rest are no characters");
    cr_expect_eq(grammar_state_allows(s, "\xee", 1), 1);
    cr_expect_eq(grammar_state_allows(s, "\xf0", 1), 0);
    cr_expect_eq(grammar_state_allows(s, "\xa0", 1), 0, "no character begins so");
    cr_expect_eq(grammar_state_allows(s, "\xff", 1), 0);
    cr_expect_eq(grammar_state_accept(s, "\xc3", 1), 0);
    cr_expect_not(grammar_state_may_end(s));
    cr_expect_eq(grammar_state_accept(s, "x", 1), -EINVAL);
    cr_expect_eq(grammar_state_accept(s, "\xa9\xf0\x9f", 3), 0);
    cr_expect_eq(grammar_state_allows(s, "\x99\x81", 2), 0);
    cr_expect_eq(grammar_state_accept(s, "\x99\x82", 2), 0);
    cr_expect(grammar_state_may_end(s));
    cr_expect_not(grammar_state_may_go_on(s));
    grammar_state_destroy(s);
    grammar_destroy(g);
}

Test(grammar, a_refused_piece_changes_nothing)
{
    struct grammar *g = compile(json_grammar);
    struct grammar_state *s = begin(g);
    static const char *const steps[] = {"[{", "\"k", "ey\": ", "[1,", " 2", "], \"z\":tr", "ue}]"};
    for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
        cr_expect_eq(grammar_state_allows(s, " \n\x01", 3), 0);
        cr_expect_eq(grammar_state_accept(s, "a\x01", 2), -EINVAL);
        cr_expect_eq(grammar_state_allows(s, steps[i], strlen(steps[i])), 1, "%s", steps[i]);
        cr_expect_eq(grammar_state_accept(s, steps[i], strlen(steps[i])), 0, "%s", steps[i]);
    }
    cr_expect(grammar_state_may_end(s));
    grammar_state_destroy(s);
    grammar_destroy(g);
}

Test(grammar, long_texts_and_ambiguity_stay_small)
{
    /* 2^n ways to read a text of n letters; and calls that are collected. */
    static const char *const grammars[] = {
        "root ::= (\"a\" | a)*\na ::= \"a\" | b\nb ::= \"a\"",
        "root ::= (\"a\"? \"a\"? \"a\"?)*",
        "root ::= a*\na ::= b | c\nb ::= \"a\" d\nc ::= \"a\" d\nd ::= \"\" | \"a\" d",
        "root ::= \"a\" root | \"a\"",
    };
    char text[2000];
    memset(text, 'a', sizeof(text));
    for (size_t i = 0; i < sizeof(grammars) / sizeof(grammars[0]); i++) {
        struct grammar *g = compile(grammars[i]);
        struct grammar_state *s = begin(g);
        for (size_t at = 0; at < sizeof(text); at += 8) {
            cr_assert_eq(grammar_state_accept(s, text + at, 8), 0, "%zu at %zu", i, at);
        }
        cr_expect(grammar_state_may_end(s));
        cr_expect_eq(grammar_state_allows(s, "b", 1), 0);
        grammar_state_destroy(s);
        grammar_destroy(g);
    }
}

Test(grammar, calls_are_collected_and_the_rest_stays_right)
{
    struct grammar *g = compile(json_grammar);
    struct grammar_state *s = begin(g);
    cr_assert_eq(grammar_state_accept(s, "[", 1), 0);
    for (int i = 0; i < 3000; i++) {
        cr_assert_eq(grammar_state_accept(s, "[{\"a\":[1,\"x\"],\"b\":", 18), 0, "%d", i);
        cr_assert_eq(grammar_state_accept(s, i % 2 ? "{}}]," : "null}],", i % 2 ? 5 : 7), 0);
    }
    cr_assert_eq(grammar_state_accept(s, "[", 1), 0);
    for (int i = 0; i < 3000; i++) {
        cr_assert_eq(grammar_state_accept(s, "[", 1), 0);
    }
    for (int i = 0; i < 3002; i++) {
        cr_assert_not(grammar_state_may_end(s));
        cr_assert_eq(grammar_state_accept(s, "]", 1), 0, "%d", i);
    }
    cr_expect(grammar_state_may_end(s));
    cr_expect_eq(grammar_state_accept(s, "]", 1), -EINVAL);
    grammar_state_destroy(s);
    grammar_destroy(g);
}

Test(grammar, too_many_places_are_an_error_not_a_crash)
{
    /* As many alternatives as places are counted, each waiting for the same letter. */
    char *text = malloc(1 << 20);
    size_t at = (size_t)sprintf(text, "root ::= (\"a\" \"b\"");
    while (at < 900000) {
        at += (size_t)sprintf(text + at, "|\"a\" \"b\"");
    }
    at += (size_t)sprintf(text + at, ")");
    struct grammar *g = NULL;
    struct fmt_error err = {""};
    int rc = grammar_compile(text, at, &g, &err);
    if (rc == 0) {
        struct grammar_state *s = NULL;
        cr_expect_eq(grammar_state_create(g, &s), -E2BIG);
    } else {
        cr_expect(strstr(err.text, "nodes"), "%s", err.text);
    }
    grammar_destroy(g);
    free(text);
}
