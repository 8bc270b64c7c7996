/* daemon/model/grammar_schema_pattern.c - a regular expression, to what stands between the quotes
 * of a JSON string.
 *
 * Alternatives, groups, classes, `.`, the escapes of ECMAScript for characters and for \d \w \s,
 * and
 * * + ? {m,n}. ^ and $ at the ends; where one is absent, anything may stand there. A quotation
 * mark, a backslash and control characters become what JSON writes for them. */
#include "daemon/model/grammar_schema_internal.h"

#include "daemon/model/grammar.h"
#include "daemon/model/utf8.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PATTERN_DEPTH_MAX 32u

struct pattern {
    struct schema_converter *c;
    const char *at, *end;
    struct schema_text *out;
    unsigned depth;
};

/* A class: its ASCII characters, and of the others those that were named, or all. */
struct class
{
    bool ascii[128];
    bool others;              /* all of them */
    struct schema_text named; /* as they were written, escaped for GBNF */
};

static int refuse(struct pattern *p, const char *what)
{
    return schema_refuse(p->c, "'pattern': %s at '%.20s'", what, p->at);
}

static bool next_is(const struct pattern *p, char c)
{
    return p->at < p->end && *p->at == c;
}

/* ---- characters -------------------------------------------------------------------------- */

/* What JSON writes for an ASCII character that it does not write as it is. */
static void put_escaped(struct schema_text *out, unsigned char c)
{
    static const char raw[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
    const char *found = c != '\0' ? strchr(raw, c) : NULL;
    char json[8];
    if (found != NULL) {
        json[0] = '\\';
        json[1] = letters[found - raw];
        json[2] = '\0';
    } else {
        json[0] = '\\';
        json[1] = 'u';
        json[2] = json[3] = '0';
        json[4] = "01234567"[c >> 4 & 7];
        json[5] = "0123456789abcdef"[c & 15];
        json[6] = '\0';
    }
    schema_put_literal(out, json, strlen(json));
}

static bool is_raw(unsigned char c)
{
    return c >= 0x20 && c != '"' && c != '\\' && c != 0x7F;
}

static void put_class(struct schema_text *out, const struct class *k)
{
    const char * or = "";
    schema_put(out, "(");
    for (unsigned c = 0; c < 128; c++) {
        if (k->ascii[c] && !is_raw((unsigned char)c)) {
            schema_put(out, "%s", or);
            put_escaped(out, (unsigned char)c);
            or = " | ";
        }
    }
    schema_put(out, "%s[", or);
    for (unsigned c = 0; c < 128; c++) {
        if (k->ascii[c] && is_raw((unsigned char)c)) {
            schema_put(out, "\\x%02X", c);
        }
    }
    schema_put_bytes(out, k->named.data ? k->named.data : "", k->named.n);
    schema_put(out, "%s])", k->others ? "\\u0080-\\uD7FF\\uE000-\\U0010FFFF" : "");
    out->failed |= k->named.failed;
}

static void add_group(struct class *k, char letter)
{
    bool in[128] = {false};
    for (unsigned c = 0; c < 128; c++) {
        bool digit = c >= '0' && c <= '9';
        bool letters = ((c | 0x20) >= 'a' && (c | 0x20) <= 'z') || c == '_';
        in[c] = letter == 'd'   ? digit
                : letter == 'w' ? digit || letters
                                : c == ' ' || (c >= 9 && c <= 13);
    }
    for (unsigned c = 0; c < 128; c++) {
        k->ascii[c] |= in[c];
    }
}

static void invert(struct class *k)
{
    for (unsigned c = 0; c < 128; c++) {
        k->ascii[c] = !k->ascii[c];
    }
    k->others = !k->others;
}

/* After the backslash: a character, or a group of them in *k. */
static int take_escape(struct pattern *p, struct class *k, int *ret_char)
{
    static const char letters[] = "tnrfv0", values[] = "\t\n\r\f\v";
    char c = p->at < p->end ? *p->at : '\0';
    *ret_char = -1;
    if (c != '\0' && strchr("dws", c)) {
        add_group(k, c);
    } else if (c != '\0' && strchr("DWS", c)) {
        struct class inverse = {.others = false};
        add_group(&inverse, (char)(c | 0x20));
        invert(&inverse);
        for (unsigned i = 0; i < 128; i++) {
            k->ascii[i] |= inverse.ascii[i];
        }
        k->others = true;
    } else if (c != '\0' && strchr(letters, c)) {
        *ret_char = (unsigned char)values[strchr(letters, c) - letters];
    } else if (c != '\0' && (unsigned char)c < 0x80 && is_raw((unsigned char)c) &&
               !((c | 0x20) >= 'a' && (c | 0x20) <= 'z') && !(c >= '0' && c <= '9')) {
        *ret_char = c;
    } else if (c == '\\' || c == '"') {
        *ret_char = c;
    } else {
        return refuse(p, "an escape that is not supported");
    }
    p->at++;
    return 0;
}

/* A character of more than one byte as it is. */
static int take_other(struct pattern *p, struct schema_text *to)
{
    size_t bytes = 0;
    if (utf8_step((const unsigned char *)p->at, (size_t)(p->end - p->at), &bytes) != UTF8_VALID) {
        return refuse(p, "it is not UTF-8");
    }
    schema_put_bytes(to, p->at, bytes);
    p->at += bytes;
    return 0;
}

/* One member of a class, which may begin a range; *ret_char: -1 for a group, -2 for a character
 * that is not of ASCII and was added. */
static int take_member(struct pattern *p, struct class *k, int *ret_char)
{
    if (next_is(p, '\\')) {
        p->at++;
        return take_escape(p, k, ret_char);
    }
    if ((unsigned char)*p->at >= 0x80) {
        const char *low = p->at;
        *ret_char = -2;
        int rc = take_other(p, &k->named);
        if (rc == 0 && next_is(p, '-') && p->end - p->at > 1 && (unsigned char)p->at[1] >= 0x80) {
            const char *high = ++p->at;
            schema_put(&k->named, "-");
            rc = take_other(p, &k->named);
            if (rc == 0 && strncmp(low, high, (size_t)(p->at - high)) > 0) { /* as code points */
                return refuse(p, "a range that runs backwards");
            }
        }
        return rc;
    }
    *ret_char = (unsigned char)*p->at++;
    return 0;
}

static int take_members(struct pattern *p, struct class *k)
{
    while (!next_is(p, ']')) {
        int low, high;
        if (p->at == p->end) {
            return refuse(p, "a class has no end");
        }
        int rc = take_member(p, k, &low);
        high = low;
        if (rc == 0 && low >= 0 && next_is(p, '-') && p->end - p->at > 1 && p->at[1] != ']') {
            p->at++;
            rc = take_member(p, k, &high);
            if (rc == 0 && high < low) {
                return refuse(p, "a range that runs backwards, or beyond ASCII,");
            }
        }
        if (rc < 0) {
            return rc;
        }
        for (int i = low; low >= 0 && i <= high; i++) {
            k->ascii[i] = true;
        }
    }
    p->at++;
    return 0;
}

static int take_class(struct pattern *p)
{
    struct class k = {.others = false};
    p->at++;
    bool inverted = next_is(p, '^');
    p->at += inverted;
    int rc = take_members(p, &k);
    if (rc == 0 && inverted && k.named.n > 0) {
        rc = refuse(p, "an inverted class with characters beyond ASCII");
    }
    if (rc == 0) {
        if (inverted) {
            invert(&k);
        }
        put_class(p->out, &k);
    }
    schema_text_finish(&k.named);
    return rc;
}

/* ---- expressions ------------------------------------------------------------------------- */

static int take_alternatives(struct pattern *p);

static int take_group(struct pattern *p)
{
    p->at++;
    if (next_is(p, '?')) {
        if (p->end - p->at < 2 || p->at[1] != ':') {
            return refuse(p, "a group that is not supported");
        }
        p->at += 2;
    }
    if (p->depth == PATTERN_DEPTH_MAX) {
        return refuse(p, "too many groups in each other");
    }
    p->depth++;
    schema_put(p->out, "(");
    int rc = take_alternatives(p);
    schema_put(p->out, ")");
    p->depth--;
    if (rc == 0 && !next_is(p, ')')) {
        rc = refuse(p, "a group has no end");
    }
    p->at += rc == 0;
    return rc;
}

static int take_atom(struct pattern *p)
{
    unsigned char c = (unsigned char)*p->at;
    struct class k = {.others = false};
    int one = c;
    int rc = 0;
    if (c == '[') {
        return take_class(p);
    }
    if (c == '(') {
        return take_group(p);
    }
    if (strchr("*+?{^$", c) != NULL) {
        return refuse(p, c == '^' || c == '$' ? "an anchor inside is not supported"
                                              : "there is nothing to repeat");
    }
    if (c >= 0x80) {
        schema_put(p->out, "\"");
        rc = take_other(p, p->out);
        schema_put(p->out, "\"");
        return rc;
    }
    p->at++;
    if (c == '.') { /* all but the ends of lines */
        k.ascii['\n'] = k.ascii['\r'] = true;
        invert(&k);
        one = -1;
    } else if (c == '\\') {
        rc = take_escape(p, &k, &one);
    }
    if (one >= 0) {
        k.ascii[one] = true;
    }
    if (rc == 0) {
        put_class(p->out, &k);
    }
    return rc;
}

/* {m}, {m,} or {m,n}. */
static int take_bounds(struct pattern *p)
{
    char *end;
    unsigned long least, most;
    const char *digits = ++p->at;
    least = strtoul(digits, &end, 10);
    most = least;
    bool good = end > digits && *digits >= '0' && *digits <= '9';
    if (good && *end == ',') {
        digits = end + 1;
        most = *digits >= '0' && *digits <= '9' ? strtoul(digits, &end, 10) : GRAMMAR_REPEAT_MAX;
        end = *digits >= '0' && *digits <= '9' ? end : end + 1;
    }
    if (!good || *end != '}') {
        return refuse(p, "bounds of a repetition that are none,");
    }
    if (least > most || most > GRAMMAR_REPEAT_MAX) {
        return refuse(p, "bounds of a repetition that are too large, or the wrong way round,");
    }
    p->at = end + 1;
    return 0;
}

static int take_repetition(struct pattern *p)
{
    const char *start = p->at;
    if (p->at < p->end && strchr("*+?", *p->at) != NULL) {
        p->at++;
    } else if (next_is(p, '{')) {
        int rc = take_bounds(p);
        if (rc < 0) {
            return rc;
        }
    }
    schema_put_bytes(p->out, start, (size_t)(p->at - start));
    schema_put(p->out, " ");
    if (p->at > start && next_is(p, '?')) {
        p->at++; /* lazy: the same texts */
    }
    return 0;
}

static int take_alternatives(struct pattern *p)
{
    int rc = 0;
    while (rc == 0 && p->at < p->end && *p->at != ')') {
        if (*p->at == '|') {
            p->at++;
            schema_put(p->out, "| ");
            continue;
        }
        rc = take_atom(p);
        rc = rc < 0 ? rc : take_repetition(p);
    }
    return rc;
}

/* Whether the last $ is one, and not an escaped one. */
static bool ends_with_anchor(const char *pattern, size_t n)
{
    size_t backslashes = 0;
    while (backslashes + 1 < n && pattern[n - 2 - backslashes] == '\\') {
        backslashes++;
    }
    return n > 0 && pattern[n - 1] == '$' && backslashes % 2 == 0;
}

/* A | outside of every group and class. */
static bool has_open_alternative(const char *at, const char *end)
{
    int depth = 0;
    bool class = false;
    for (; at < end; at++) {
        if (*at == '\\') {
            at++;
        } else if (class) {
            class = *at != ']';
        } else if (*at == '[') {
            class = true;
        } else {
            depth += *at == '(' ? 1 : *at == ')' ? -1 : 0;
            if (*at == '|' && depth == 0) {
                return true;
            }
        }
    }
    return false;
}

int schema_pattern(struct schema_converter *c, const char *pattern, struct schema_text *out)
{
    size_t n = strlen(pattern);
    bool begins = pattern[0] == '^', ends = ends_with_anchor(pattern, n);
    struct pattern p = {c, pattern + begins, pattern + n - ends, out, 0};
    if ((begins || ends) && has_open_alternative(p.at, p.end)) {
        return schema_refuse(c, "'pattern': alternatives between anchors need parentheses");
    }
    schema_put(out, "%s(", begins ? "" : "char* ");
    int rc = take_alternatives(&p);
    if (rc == 0 && p.at < p.end) {
        rc = refuse(&p, "a parenthesis too many");
    }
    schema_put(out, ")%s", ends ? "" : " char*");
    return rc;
}
