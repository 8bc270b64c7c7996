/* daemon/model/grammar_parse.c - GBNF text to rules as automata.
 *
 * What is parsed becomes a fragment: nodes with one start and one exit, a NODE_JUMP whose next is
 * still open. The nodes of a fragment lie in one piece, so a repetition copies them. */
#include "daemon/model/grammar_internal.h"
#include "daemon/model/utf8.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct rule_name {
    const char *text; /* of the first use */
    size_t bytes;
    bool defined;
};

struct parser {
    struct grammar *g;
    const char *text, *at, *end;
    struct rule_name *rule;
    size_t n_rules, capacity;
    uint32_t *by_hash; /* (hash_size): rule + 1, or 0 */
    size_t hash_size;
    unsigned depth;
    struct fmt_error *err;
};

struct fragment {
    uint32_t start, exit;
};

int grammar_grow(void **array, size_t *capacity, size_t n, size_t item_bytes)
{
    if (n < *capacity) {
        return 0;
    }
    size_t wanted = *capacity > 0 ? *capacity * 2 : 64;
    void *grown = reallocarray(*array, wanted, item_bytes);
    if (grown == NULL) {
        return -ENOMEM;
    }
    *array = grown;
    *capacity = wanted;
    return 0;
}

/* ---- errors ------------------------------------------------------------------------------ */

/* The place of `at` is told; columns count characters. */
static int refuse(struct parser *p, const char *at, const char *what, const char *name,
                  size_t name_bytes)
{
    size_t line = 1, column = 1;
    for (const char *c = p->text; c < at; c++) {
        if (*c == '\n') {
            line++;
            column = 1;
        } else {
            column += !utf8_is_continuation((unsigned char)*c);
        }
    }
    return fmt_fail(p->err, -EINVAL, "line %zu, column %zu: %s%.*s%s", line, column, what,
                    name_bytes < 64 ? (int)name_bytes : 64, name, name_bytes > 0 ? "'" : "");
}

static int refuse_here(struct parser *p, const char *what)
{
    return refuse(p, p->at, what, "", 0);
}

/* ---- building ---------------------------------------------------------------------------- */

/* The index of a new node, or a negative errno. */
static int64_t add_node(struct parser *p, enum grammar_node_kind kind, uint32_t arg, uint32_t next)
{
    struct grammar *g = p->g;
    if (g->n_nodes == GRAMMAR_NODES_MAX) {
        return fmt_fail(p->err, -EINVAL, "the grammar is too large: it needs more than %u nodes",
                        GRAMMAR_NODES_MAX);
    }
    int rc = grammar_grow((void **)&g->node, &g->nodes_capacity, g->n_nodes, sizeof(*g->node));
    if (rc < 0) {
        return rc;
    }
    g->node[g->n_nodes] = (struct grammar_node){kind, arg, next};
    return (int64_t)g->n_nodes++;
}

static struct grammar_node *node_at(struct parser *p, uint32_t index)
{
    return &p->g->node[index];
}

/* A node that does something, and an exit behind it. */
static int one_node(struct parser *p, enum grammar_node_kind kind, uint32_t arg,
                    struct fragment *ret)
{
    int64_t node = add_node(p, kind, arg, (uint32_t)p->g->n_nodes + 1);
    int64_t exit = node < 0 ? node : add_node(p, NODE_JUMP, 0, GRAMMAR_NOWHERE);
    if (exit < 0) {
        return (int)exit;
    }
    *ret = (struct fragment){(uint32_t)node, (uint32_t)exit};
    return 0;
}

static int empty_fragment(struct parser *p, struct fragment *ret)
{
    int64_t node = add_node(p, NODE_JUMP, 0, GRAMMAR_NOWHERE);
    if (node < 0) {
        return (int)node;
    }
    *ret = (struct fragment){(uint32_t)node, (uint32_t)node};
    return 0;
}

/* Another copy of the nodes first..end-1, which hold one fragment. */
static int copy_fragment(struct parser *p, uint32_t first, uint32_t end, struct fragment of,
                         struct fragment *ret)
{
    uint32_t moved = (uint32_t)p->g->n_nodes - first;
    for (uint32_t i = first; i < end; i++) {
        struct grammar_node n = *node_at(p, i);
        n.next += n.next == GRAMMAR_NOWHERE ? 0 : moved;
        n.arg += n.kind == NODE_SPLIT ? moved : 0;
        int64_t node = add_node(p, n.kind, n.arg, n.next);
        if (node < 0) {
            return (int)node;
        }
    }
    *ret = (struct fragment){of.start + moved, of.exit + moved};
    return 0;
}

/* x{least,most}: least copies in a row, then as many that can be left out, each only if the one
 * before was there; without a most, one in a loop. first: where x's nodes begin. */
static int repeat(struct parser *p, uint32_t first, struct fragment x, uint32_t least,
                  uint32_t most, struct fragment *ret)
{
    bool endless = most == GRAMMAR_NOWHERE;
    uint32_t end = (uint32_t)p->g->n_nodes;
    uint32_t copies = endless ? least + 1 : most;
    struct fragment all = {0}, leave = {0};
    int rc = empty_fragment(p, &all);
    rc = rc < 0 ? rc : empty_fragment(p, &leave);
    for (uint32_t i = 0; i < copies && rc == 0; i++) {
        struct fragment copy = {0};
        rc = copy_fragment(p, first, end, x, &copy);
        if (rc < 0) {
            return rc;
        }
        if (i < least) {
            node_at(p, all.exit)->next = copy.start;
            all.exit = copy.exit;
            continue;
        }
        int64_t split = add_node(p, NODE_SPLIT, leave.start, copy.start);
        if (split < 0) {
            return (int)split;
        }
        node_at(p, all.exit)->next = (uint32_t)split;
        all.exit = copy.exit;
        if (endless) {
            node_at(p, copy.exit)->next = (uint32_t)split;
            *ret = (struct fragment){all.start, leave.exit};
            return 0;
        }
    }
    if (rc < 0) {
        return rc;
    }
    node_at(p, all.exit)->next = leave.start;
    *ret = (struct fragment){all.start, leave.exit};
    return 0;
}

/* ---- names ------------------------------------------------------------------------------- */

static bool is_name_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_';
}

static int rehash(struct parser *p)
{
    size_t size = p->hash_size > 0 ? p->hash_size * 2 : 256;
    uint32_t *by_hash = calloc(size, sizeof(*by_hash));
    if (by_hash == NULL) {
        return -ENOMEM;
    }
    free(p->by_hash);
    p->by_hash = by_hash;
    p->hash_size = size;
    return 0;
}

static size_t hash_of(const char *text, size_t bytes)
{
    uint64_t h = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < bytes; i++) {
        h = (h ^ (unsigned char)text[i]) * 1099511628211u;
    }
    return (size_t)(h ^ (h >> 32));
}

/* The slot of a name: its rule's, or an empty one. */
static uint32_t *slot_of(struct parser *p, const char *text, size_t bytes)
{
    size_t i = hash_of(text, bytes) & (p->hash_size - 1);
    for (;; i = (i + 1) & (p->hash_size - 1)) {
        uint32_t entry = p->by_hash[i];
        if (entry == 0 || (p->rule[entry - 1].bytes == bytes &&
                           memcmp(p->rule[entry - 1].text, text, bytes) == 0)) {
            return &p->by_hash[i];
        }
    }
}

/* Reads a name; the rule's number, new where it is seen for the first time. */
static int take_name(struct parser *p, uint32_t *ret)
{
    const char *text = p->at;
    while (p->at < p->end && is_name_char(*p->at)) {
        p->at++;
    }
    size_t bytes = (size_t)(p->at - text);
    if (bytes == 0) {
        return refuse_here(p, "a rule's name was expected");
    }
    if (2 * (p->n_rules + 1) > p->hash_size) {
        int rc = rehash(p);
        for (size_t i = 0; rc == 0 && i < p->n_rules; i++) {
            *slot_of(p, p->rule[i].text, p->rule[i].bytes) = (uint32_t)i + 1;
        }
        if (rc < 0) {
            return rc;
        }
    }
    uint32_t *slot = slot_of(p, text, bytes);
    if (*slot == 0) {
        int rc = grammar_grow((void **)&p->rule, &p->capacity, p->n_rules, sizeof(*p->rule));
        if (rc < 0) {
            return rc;
        }
        if (p->n_rules == GRAMMAR_RULES_MAX) {
            return fmt_fail(p->err, -EINVAL, "the grammar has more than %u rules",
                            GRAMMAR_RULES_MAX);
        }
        p->rule[p->n_rules] = (struct rule_name){text, bytes, false};
        *slot = (uint32_t)++p->n_rules;
    }
    *ret = *slot - 1;
    return 0;
}

/* ---- characters -------------------------------------------------------------------------- */

static void skip_space(struct parser *p, bool lines)
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

static bool next_is(const struct parser *p, char c)
{
    return p->at < p->end && *p->at == c;
}

static int take_hex(struct parser *p, const char *escape, unsigned digits, uint32_t *ret)
{
    uint32_t value = 0;
    for (unsigned i = 0; i < digits; i++, p->at++) {
        char c = p->at < p->end ? *p->at : '\0';
        if (c >= '0' && c <= '9') {
            value = value << 4 | (uint32_t)(c - '0');
        } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
            value = value << 4 | (uint32_t)((c | 0x20) - 'a' + 10);
        } else {
            return refuse(p, escape, "an escape has too few hexadecimal digits", "", 0);
        }
    }
    if (value > GRAMMAR_LAST_POINT || (value >= 0xD800 && value <= 0xDFFF)) {
        return refuse(p, escape, "an escape is no character", "", 0);
    }
    *ret = value;
    return 0;
}

static int take_escape(struct parser *p, uint32_t *ret)
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
        return refuse(p, escape, "an unknown escape", "", 0);
    }
    *ret = (unsigned char)c;
    return 0;
}

/* A character of a literal or class; the end of the text is none. */
static int take_char(struct parser *p, uint32_t *ret)
{
    if (next_is(p, '\\')) {
        return take_escape(p, ret);
    }
    const unsigned char *c = (const unsigned char *)p->at;
    size_t bytes;
    if (utf8_step(c, (size_t)(p->end - p->at), &bytes) != UTF8_VALID) {
        return refuse_here(p, "the grammar is not UTF-8");
    }
    uint32_t value = bytes == 1 ? c[0] : c[0] & (0x7Fu >> bytes);
    for (size_t i = 1; i < bytes; i++) {
        value = value << 6 | (c[i] & 0x3Fu);
    }
    p->at += bytes;
    *ret = value;
    return 0;
}

static int take_literal(struct parser *p, struct fragment *ret)
{
    const char *start = p->at++;
    struct fragment all = {0};
    int rc = empty_fragment(p, &all);
    while (rc == 0 && !next_is(p, '"')) {
        uint32_t c;
        struct fragment one = {0};
        if (p->at == p->end) {
            return refuse(p, start, "a literal has no end", "", 0);
        }
        rc = take_char(p, &c);
        rc = rc < 0 ? rc : one_node(p, NODE_CHAR, c, &one);
        if (rc == 0) {
            node_at(p, all.exit)->next = one.start;
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

static int add_range(struct parser *p, uint32_t low, uint32_t high)
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
static int finish_set(struct parser *p, size_t first, bool inverted, struct fragment *ret)
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
    return one_node(p, NODE_SET, (uint32_t)g->n_sets++, ret);
}

static int take_class(struct parser *p, struct fragment *ret)
{
    const char *start = p->at++;
    size_t first = p->g->n_ranges;
    bool inverted = next_is(p, '^');
    p->at += inverted;
    while (!next_is(p, ']')) {
        uint32_t low, high;
        const char *range = p->at;
        if (p->at == p->end) {
            return refuse(p, start, "a class has no end", "", 0);
        }
        int rc = take_char(p, &low);
        high = low;
        if (rc == 0 && next_is(p, '-') && p->end - p->at > 1 && p->at[1] != ']') {
            p->at++;
            rc = take_char(p, &high);
        }
        if (rc == 0 && high < low) {
            return refuse(p, range, "a range of a class runs backwards", "", 0);
        }
        rc = rc < 0 ? rc : add_range(p, low, high);
        if (rc < 0) {
            return rc;
        }
    }
    p->at++;
    return finish_set(p, first, inverted, ret);
}

static int take_any(struct parser *p, struct fragment *ret)
{
    p->at++;
    size_t first = p->g->n_ranges;
    int rc = add_range(p, 0, GRAMMAR_LAST_POINT);
    return rc < 0 ? rc : finish_set(p, first, false, ret);
}

/* ---- repetitions ------------------------------------------------------------------------- */

static int take_number(struct parser *p, uint32_t *ret)
{
    const char *start = p->at;
    uint32_t value = 0;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') {
        value = value <= GRAMMAR_REPEAT_MAX ? value * 10 + (uint32_t)(*p->at - '0') : value;
        p->at++;
    }
    if (p->at == start) {
        return refuse(p, start, "a number of repetitions was expected", "", 0);
    }
    if (value > GRAMMAR_REPEAT_MAX) {
        return refuse(p, start, "more repetitions than 20000", "", 0);
    }
    *ret = value;
    return 0;
}

/* After the brace. */
static int take_bounds(struct parser *p, uint32_t *ret_least, uint32_t *ret_most)
{
    const char *start = p->at;
    uint32_t least, most;
    skip_space(p, false);
    int rc = take_number(p, &least);
    skip_space(p, false);
    most = least;
    if (rc == 0 && next_is(p, ',')) {
        p->at++;
        skip_space(p, false);
        most = GRAMMAR_NOWHERE;
        rc = next_is(p, '}') ? 0 : take_number(p, &most);
        skip_space(p, false);
    }
    if (rc < 0) {
        return rc;
    }
    if (!next_is(p, '}')) {
        return refuse_here(p, "'}' was expected");
    }
    if (most < least) {
        return refuse(p, start, "the bounds of a repetition are the wrong way round", "", 0);
    }
    p->at++;
    *ret_least = least;
    *ret_most = most;
    return 0;
}

/* Any number of * + ? {m,n} behind x. */
static int take_repetitions(struct parser *p, bool nested, uint32_t first, struct fragment *x)
{
    for (int rc = 0;;) {
        uint32_t least = 0, most = GRAMMAR_NOWHERE;
        skip_space(p, nested);
        char c = p->at < p->end ? *p->at : '\0';
        if (c != '*' && c != '+' && c != '?' && c != '{') {
            return 0;
        }
        p->at++;
        least = c == '+' ? 1 : 0;
        most = c == '?' ? 1 : most;
        rc = c == '{' ? take_bounds(p, &least, &most) : 0;
        rc = rc < 0 ? rc : repeat(p, first, *x, least, most, x);
        if (rc < 0) {
            return rc;
        }
    }
}

/* ---- sequences and rules ----------------------------------------------------------------- */

static int take_alternatives(struct parser *p, bool nested, struct fragment *ret);

static int take_group(struct parser *p, struct fragment *ret)
{
    const char *start = p->at++;
    if (p->depth == GRAMMAR_DEPTH_MAX) {
        return refuse(p, start, "more than 100 parentheses in each other", "", 0);
    }
    p->depth++;
    skip_space(p, true);
    int rc = take_alternatives(p, true, ret);
    p->depth--;
    if (rc < 0) {
        return rc;
    }
    if (!next_is(p, ')')) {
        return p->at == p->end ? refuse(p, start, "a parenthesis is not closed", "", 0)
                               : refuse_here(p, "')' was expected");
    }
    p->at++;
    return 0;
}

/* One symbol; 0 in *ret_any where there is none. */
static int take_symbol(struct parser *p, bool *ret_any, struct fragment *ret)
{
    char c = p->at < p->end ? *p->at : '\0';
    *ret_any = true;
    if (c == '"') {
        return take_literal(p, ret);
    }
    if (c == '[') {
        return take_class(p, ret);
    }
    if (c == '.') {
        return take_any(p, ret);
    }
    if (c == '(') {
        return take_group(p, ret);
    }
    if (p->at < p->end && is_name_char(c)) {
        uint32_t rule;
        int rc = take_name(p, &rule);
        return rc < 0 ? rc : one_node(p, NODE_CALL, rule, ret);
    }
    if (c == '<' || c == '!') {
        return refuse_here(p, "tokens in a grammar are not supported");
    }
    if (c == '*' || c == '+' || c == '?' || c == '{') {
        return refuse_here(p, "there is nothing to repeat");
    }
    *ret_any = false;
    return 0;
}

static int take_sequence(struct parser *p, bool nested, struct fragment *ret)
{
    struct fragment all = {0};
    int rc = empty_fragment(p, &all);
    while (rc == 0) {
        struct fragment one = {0};
        bool any;
        uint32_t first = (uint32_t)p->g->n_nodes;
        rc = take_symbol(p, &any, &one);
        if (rc < 0 || !any) {
            break;
        }
        rc = take_repetitions(p, nested, first, &one);
        if (rc == 0) {
            node_at(p, all.exit)->next = one.start;
            all.exit = one.exit;
        }
    }
    *ret = all;
    return rc;
}

static int take_alternatives(struct parser *p, bool nested, struct fragment *ret)
{
    struct fragment all = {0}, leave = {0};
    int rc = empty_fragment(p, &leave);
    rc = rc < 0 ? rc : take_sequence(p, nested, &all);
    if (rc < 0) {
        return rc;
    }
    node_at(p, all.exit)->next = leave.start;
    while (next_is(p, '|')) {
        struct fragment other = {0};
        p->at++;
        skip_space(p, true);
        rc = take_sequence(p, nested, &other);
        int64_t split = rc < 0 ? rc : add_node(p, NODE_SPLIT, other.start, all.start);
        if (split < 0) {
            return (int)split;
        }
        node_at(p, other.exit)->next = leave.start;
        all.start = (uint32_t)split;
    }
    *ret = (struct fragment){all.start, leave.exit};
    return 0;
}

static int take_rule(struct parser *p)
{
    const char *start = p->at;
    uint32_t rule;
    struct fragment body = {0};
    int rc = take_name(p, &rule);
    if (rc < 0) {
        return rc;
    }
    if (p->rule[rule].defined) {
        return refuse(p, start, "another rule has the name '", start, p->rule[rule].bytes);
    }
    skip_space(p, false);
    if (p->end - p->at < 3 || memcmp(p->at, "::=", 3) != 0) {
        return refuse_here(p, "'::=' was expected");
    }
    p->at += 3;
    skip_space(p, true);
    p->rule[rule].defined = true;
    rc = take_alternatives(p, false, &body);
    if (rc < 0) {
        return rc;
    }
    if (p->at < p->end && *p->at != '\n' && *p->at != '\r') {
        return refuse_here(p, "the end of the rule's line was expected");
    }
    int64_t end = add_node(p, NODE_END, 0, GRAMMAR_NOWHERE);
    if (end < 0) {
        return (int)end;
    }
    node_at(p, body.exit)->next = (uint32_t)end;
    uint32_t *starts = reallocarray(p->g->start, p->capacity, sizeof(*starts));
    if (starts == NULL) {
        return -ENOMEM;
    }
    p->g->start = starts;
    starts[rule] = body.start;
    skip_space(p, true);
    return 0;
}

/* All rules are there: the ones that were named, and root. */
static int check_names(struct parser *p)
{
    uint32_t *root = p->n_rules > 0 ? slot_of(p, "root", 4) : NULL;
    for (size_t i = 0; i < p->n_rules; i++) {
        if (!p->rule[i].defined) {
            return refuse(p, p->rule[i].text, "there is no rule '", p->rule[i].text,
                          p->rule[i].bytes);
        }
    }
    if (root == NULL || *root == 0) {
        return fmt_fail(p->err, -EINVAL, "the grammar has no rule 'root'");
    }
    p->g->root = *root - 1;
    p->g->n_rules = p->n_rules;
    return 0;
}

/* Past the jumps, of which building leaves one behind every symbol. There is no circle of jumps
 * alone: every loop has the split by which it is left. */
static uint32_t past_jumps(const struct grammar *g, uint32_t node)
{
    while (node != GRAMMAR_NOWHERE && g->node[node].kind == NODE_JUMP) {
        node = g->node[node].next;
    }
    return node;
}

/* Backwards, since most jumps lead forwards: what they lead to is short already. */
static void shorten(struct grammar *g)
{
    for (size_t i = g->n_nodes; i-- > 0;) {
        struct grammar_node *node = &g->node[i];
        node->next = past_jumps(g, node->next);
        node->arg = node->kind == NODE_SPLIT ? past_jumps(g, node->arg) : node->arg;
    }
    for (size_t i = 0; i < g->n_rules; i++) {
        g->start[i] = past_jumps(g, g->start[i]);
    }
}

static int parse_text(struct parser *p)
{
    skip_space(p, true);
    while (p->at < p->end) {
        int rc = take_rule(p);
        if (rc < 0) {
            return rc;
        }
    }
    uint32_t again = GRAMMAR_NOWHERE;
    int rc = check_names(p);
    if (rc == 0) {
        shorten(p->g);
    }
    rc = rc < 0 ? rc : grammar_find_left_recursion(p->g, &again);
    if (rc == 0 && again != GRAMMAR_NOWHERE) {
        return refuse(p, p->rule[again].text, "left recursion: a rule can begin with itself: '",
                      p->rule[again].text, p->rule[again].bytes);
    }
    return rc;
}

int grammar_compile(const char *text, size_t bytes, struct grammar **ret, struct fmt_error *err)
{
    if (bytes > GRAMMAR_TEXT_BYTES_MAX) {
        return fmt_fail(err, -EINVAL, "the grammar has %zu bytes; at most %u are taken", bytes,
                        GRAMMAR_TEXT_BYTES_MAX);
    }
    struct grammar *g = calloc(1, sizeof(*g));
    if (g == NULL) {
        return -ENOMEM;
    }
    struct parser p = {.g = g, .text = text, .at = text, .end = text + bytes, .err = err};
    int rc = parse_text(&p);
    free(p.rule);
    free(p.by_hash);
    if (rc < 0) {
        grammar_destroy(g);
        return rc;
    }
    *ret = g;
    return 0;
}

void grammar_destroy(struct grammar *g)
{
    if (g == NULL) {
        return;
    }
    free(g->node);
    free(g->range);
    free(g->set);
    free(g->start);
    free(g);
}
