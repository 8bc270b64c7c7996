/* daemon/model/grammar_chars.c - GBNF's characters: escapes, literals, classes. */
#include "daemon/model/grammar_text.h"
#include "daemon/model/utf8.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- characters -------------------------------------------------------------------------- */

void grammar_skip_space(struct grammar_parser *p, bool lines)
{
    while (p->at < p->end) {
        char c = *p->at;
        if (c == '#') {
            while (p->at < p->end && *p->at != '\n' && *p->at != '\r') {
                p->at++;
            }
        } else if (c == ' ' || c == '\t' || (lines && (c == '\n' || c == '\r'))) {
            p->at++;
        } else {
            return;
        }
    }
}

bool grammar_next_is(const struct grammar_parser *p, char c)
{
    return p->at < p->end && *p->at == c;
}

static int take_hex(struct grammar_parser *p, const char *escape, unsigned digits, uint32_t *ret)
{
    uint32_t value = 0;
    for (unsigned i = 0; i < digits; i++, p->at++) {
        char c = p->at < p->end ? *p->at : '\0';
        if (c >= '0' && c <= '9') {
            value = value << 4 | (uint32_t)(c - '0');
        } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
            value = value << 4 | (uint32_t)((c | 0x20) - 'a' + 10);
        } else {
            return grammar_refuse(p, escape, "an escape has too few hexadecimal digits", "", 0);
        }
    }
    if (value > GRAMMAR_LAST_POINT || (value >= 0xD800 && value <= 0xDFFF)) {
        return grammar_refuse(p, escape, "an escape is no character", "", 0);
    }
    *ret = value;
    return 0;
}

static int take_escape(struct grammar_parser *p, uint32_t *ret)
{
    static const char plain[] = "\\\"[]-", letters[] = "trn", meanings[] = "\t\r\n";
    const char *escape = p->at++;
    char c = p->at < p->end ? *p->at++ : '\0';
    const char *letter = c != '\0' ? strchr(letters, c) : NULL;
    if (c == 'x' || c == 'u' || c == 'U') {
        return take_hex(p, escape, c == 'x' ? 2 : c == 'u' ? 4 : 8, ret);
    }
    if (letter != NULL) {
        *ret = (unsigned char)meanings[letter - letters];
        return 0;
    }
    if (c == '\0' || strchr(plain, c) == NULL) {
        return grammar_refuse(p, escape, "an unknown escape", "", 0);
    }
    *ret = (unsigned char)c;
    return 0;
}

/* A character of a literal or class; the end of the text is none. */
static int take_char(struct grammar_parser *p, uint32_t *ret)
{
    if (grammar_next_is(p, '\\')) {
        return take_escape(p, ret);
    }
    const unsigned char *c = (const unsigned char *)p->at;
    size_t bytes;
    if (utf8_step(c, (size_t)(p->end - p->at), &bytes) != UTF8_VALID) {
        return grammar_refuse_here(p, "the grammar is not UTF-8");
    }
    uint32_t value = bytes == 1 ? c[0] : c[0] & (0x7Fu >> bytes);
    for (size_t i = 1; i < bytes; i++) {
        value = value << 6 | (c[i] & 0x3Fu);
    }
    p->at += bytes;
    *ret = value;
    return 0;
}

int grammar_take_literal(struct grammar_parser *p, struct grammar_fragment *ret)
{
    const char *start = p->at++;
    struct grammar_fragment all = {0};
    int rc = grammar_empty_fragment(p, &all);
    while (rc == 0 && !grammar_next_is(p, '"')) {
        uint32_t c;
        struct grammar_fragment one = {0};
        if (p->at == p->end) {
            return grammar_refuse(p, start, "a literal has no end", "", 0);
        }
        rc = take_char(p, &c);
        rc = rc < 0 ? rc : grammar_one_node(p, NODE_CHAR, c, &one);
        if (rc == 0) {
            grammar_node_at(p, all.exit)->next = one.start;
            all.exit = one.exit;
        }
    }
    if (rc == 0) {
        p->at++;
        *ret = all;
    }
    return rc;
}

/* ---- classes ----------------------------------------------------------------------------- */

static int add_range(struct grammar_parser *p, uint32_t low, uint32_t high)
{
    struct grammar *g = p->g;
    int rc = grammar_grow((void **)&g->range, &g->ranges_capacity, g->n_ranges, sizeof(*g->range));
    if (rc == 0) {
        g->range[g->n_ranges++] = (struct grammar_range){low, high};
    }
    return rc;
}

static int by_low(const void *a, const void *b)
{
    uint32_t x = ((const struct grammar_range *)a)->low, y = ((const struct grammar_range *)b)->low;
    return (x > y) - (x < y);
}

/* The ranges from first on become a set: in order, joined, and inverted where asked for. */
static int finish_set(struct grammar_parser *p, size_t first, bool inverted,
                      struct grammar_fragment *ret)
{
    struct grammar *g = p->g;
    size_t n = g->n_ranges - first, kept = 0;
    int rc = grammar_grow((void **)&g->range, &g->ranges_capacity, g->n_ranges, sizeof(*g->range));
    if (rc < 0) {
        return rc;
    }
    struct grammar_range *r = g->range + first; /* there is an array now, also for an empty set */
    if (n > 0) {
        qsort(r, n, sizeof(*r), by_low);
    }
    for (size_t i = 0; i < n; i++) {
        if (kept > 0 && r[i].low <= r[kept - 1].high + 1) {
            r[kept - 1].high = r[i].high > r[kept - 1].high ? r[i].high : r[kept - 1].high;
        } else {
            r[kept++] = r[i];
        }
    }
    g->n_ranges = first + kept;
    if (inverted) {
        rc = add_range(p, GRAMMAR_LAST_POINT + 1, GRAMMAR_LAST_POINT + 1); /* may move the ranges */
        r = g->range + first;
        uint32_t from = 0;
        size_t gaps = 0;
        for (size_t i = 0; rc == 0 && i <= kept; i++) {
            struct grammar_range gap = {from, r[i].low - 1};
            from = r[i].high + 1;
            if (r[i].low > gap.low) {
                r[gaps++] = gap;
            }
        }
        g->n_ranges = first + gaps;
    }
    rc =
        rc < 0 ? rc : grammar_grow((void **)&g->set, &g->sets_capacity, g->n_sets, sizeof(*g->set));
    if (rc < 0) {
        return rc;
    }
    g->set[g->n_sets] = (struct grammar_set){(uint32_t)first, (uint32_t)(g->n_ranges - first)};
    return grammar_one_node(p, NODE_SET, (uint32_t)g->n_sets++, ret);
}

int grammar_take_class(struct grammar_parser *p, struct grammar_fragment *ret)
{
    const char *start = p->at++;
    size_t first = p->g->n_ranges;
    bool inverted = grammar_next_is(p, '^');
    p->at += inverted;
    while (!grammar_next_is(p, ']')) {
        uint32_t low, high;
        const char *range = p->at;
        if (p->at == p->end) {
            return grammar_refuse(p, start, "a class has no end", "", 0);
        }
        int rc = take_char(p, &low);
        high = low;
        if (rc == 0 && grammar_next_is(p, '-') && p->end - p->at > 1 && p->at[1] != ']') {
            p->at++;
            rc = take_char(p, &high);
        }
        if (rc == 0 && high < low) {
            return grammar_refuse(p, range, "a range of a class runs backwards", "", 0);
        }
        rc = rc < 0 ? rc : add_range(p, low, high);
        if (rc < 0) {
            return rc;
        }
    }
    p->at++;
    return finish_set(p, first, inverted, ret);
}

int grammar_take_any(struct grammar_parser *p, struct grammar_fragment *ret)
{
    p->at++;
    size_t first = p->g->n_ranges;
    int rc = add_range(p, 0, GRAMMAR_LAST_POINT);
    return rc < 0 ? rc : finish_set(p, first, false, ret);
}
