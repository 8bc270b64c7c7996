/* daemon/model/grammar_parse.c - GBNF text to rules as automata: names, repetitions, rules. */
#include "daemon/model/grammar_text.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- names ------------------------------------------------------------------------------- */

static bool is_name_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_';
}

static int rehash(struct grammar_parser *p)
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
static uint32_t *slot_of(struct grammar_parser *p, const char *text, size_t bytes)
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
static int take_name(struct grammar_parser *p, uint32_t *ret)
{
    const char *text = p->at;
    while (p->at < p->end && is_name_char(*p->at)) {
        p->at++;
    }
    size_t bytes = (size_t)(p->at - text);
    if (bytes == 0) {
        return grammar_refuse_here(p, "a rule's name was expected");
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
        p->rule[p->n_rules] = (struct grammar_rule_name){text, bytes, false};
        *slot = (uint32_t)++p->n_rules;
    }
    *ret = *slot - 1;
    return 0;
}

/* ---- repetitions ------------------------------------------------------------------------- */

static int take_number(struct grammar_parser *p, uint32_t *ret)
{
    const char *start = p->at;
    uint32_t value = 0;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') {
        value = value <= GRAMMAR_REPEAT_MAX ? value * 10 + (uint32_t)(*p->at - '0') : value;
        p->at++;
    }
    if (p->at == start) {
        return grammar_refuse(p, start, "a number of repetitions was expected", "", 0);
    }
    if (value > GRAMMAR_REPEAT_MAX) {
        return grammar_refuse(p, start, "more repetitions than 20000", "", 0);
    }
    *ret = value;
    return 0;
}

/* After the brace. */
static int take_bounds(struct grammar_parser *p, uint32_t *ret_least, uint32_t *ret_most)
{
    const char *start = p->at;
    uint32_t least, most;
    grammar_skip_space(p, false);
    int rc = take_number(p, &least);
    grammar_skip_space(p, false);
    most = least;
    if (rc == 0 && grammar_next_is(p, ',')) {
        p->at++;
        grammar_skip_space(p, false);
        most = GRAMMAR_NOWHERE;
        rc = grammar_next_is(p, '}') ? 0 : take_number(p, &most);
        grammar_skip_space(p, false);
    }
    if (rc < 0) {
        return rc;
    }
    if (!grammar_next_is(p, '}')) {
        return grammar_refuse_here(p, "'}' was expected");
    }
    if (most < least) {
        return grammar_refuse(p, start, "the bounds of a repetition are the wrong way round", "",
                              0);
    }
    p->at++;
    *ret_least = least;
    *ret_most = most;
    return 0;
}

/* Any number of * + ? {m,n} behind x. */
static int take_repetitions(struct grammar_parser *p, bool nested, uint32_t first,
                            struct grammar_fragment *x)
{
    for (int rc = 0;;) {
        uint32_t least = 0, most = GRAMMAR_NOWHERE;
        grammar_skip_space(p, nested);
        char c = p->at < p->end ? *p->at : '\0';
        if (c != '*' && c != '+' && c != '?' && c != '{') {
            return 0;
        }
        p->at++;
        least = c == '+' ? 1 : 0;
        most = c == '?' ? 1 : most;
        rc = c == '{' ? take_bounds(p, &least, &most) : 0;
        rc = rc < 0 ? rc : grammar_repeat(p, first, *x, least, most, x);
        if (rc < 0) {
            return rc;
        }
    }
}

/* ---- sequences and rules ----------------------------------------------------------------- */

static int take_alternatives(struct grammar_parser *p, bool nested, struct grammar_fragment *ret);

static int take_group(struct grammar_parser *p, struct grammar_fragment *ret)
{
    const char *start = p->at++;
    if (p->depth == GRAMMAR_DEPTH_MAX) {
        return grammar_refuse(p, start, "more than 100 parentheses in each other", "", 0);
    }
    p->depth++;
    grammar_skip_space(p, true);
    int rc = take_alternatives(p, true, ret);
    p->depth--;
    if (rc < 0) {
        return rc;
    }
    if (!grammar_next_is(p, ')')) {
        return p->at == p->end ? grammar_refuse(p, start, "a parenthesis is not closed", "", 0)
                               : grammar_refuse_here(p, "')' was expected");
    }
    p->at++;
    return 0;
}

/* One symbol; 0 in *ret_any where there is none. */
static int take_symbol(struct grammar_parser *p, bool *ret_any, struct grammar_fragment *ret)
{
    char c = p->at < p->end ? *p->at : '\0';
    *ret_any = true;
    if (c == '"') {
        return grammar_take_literal(p, ret);
    }
    if (c == '[') {
        return grammar_take_class(p, ret);
    }
    if (c == '.') {
        return grammar_take_any(p, ret);
    }
    if (c == '(') {
        return take_group(p, ret);
    }
    if (p->at < p->end && is_name_char(c)) {
        uint32_t rule;
        int rc = take_name(p, &rule);
        return rc < 0 ? rc : grammar_one_node(p, NODE_CALL, rule, ret);
    }
    if (c == '<' || c == '!') {
        return grammar_refuse_here(p, "tokens in a grammar are not supported");
    }
    if (c == '*' || c == '+' || c == '?' || c == '{') {
        return grammar_refuse_here(p, "there is nothing to repeat");
    }
    *ret_any = false;
    return 0;
}

static int take_sequence(struct grammar_parser *p, bool nested, struct grammar_fragment *ret)
{
    struct grammar_fragment all = {0};
    int rc = grammar_empty_fragment(p, &all);
    while (rc == 0) {
        struct grammar_fragment one = {0};
        bool any;
        uint32_t first = (uint32_t)p->g->n_nodes;
        rc = take_symbol(p, &any, &one);
        if (rc < 0 || !any) {
            break;
        }
        rc = take_repetitions(p, nested, first, &one);
        if (rc == 0) {
            grammar_node_at(p, all.exit)->next = one.start;
            all.exit = one.exit;
        }
    }
    *ret = all;
    return rc;
}

static int take_alternatives(struct grammar_parser *p, bool nested, struct grammar_fragment *ret)
{
    struct grammar_fragment all = {0}, leave = {0};
    int rc = grammar_empty_fragment(p, &leave);
    rc = rc < 0 ? rc : take_sequence(p, nested, &all);
    if (rc < 0) {
        return rc;
    }
    grammar_node_at(p, all.exit)->next = leave.start;
    while (grammar_next_is(p, '|')) {
        struct grammar_fragment other = {0};
        p->at++;
        grammar_skip_space(p, true);
        rc = take_sequence(p, nested, &other);
        int64_t split = rc < 0 ? rc : grammar_add_node(p, NODE_SPLIT, other.start, all.start);
        if (split < 0) {
            return (int)split;
        }
        grammar_node_at(p, other.exit)->next = leave.start;
        all.start = (uint32_t)split;
    }
    *ret = (struct grammar_fragment){all.start, leave.exit};
    return 0;
}

static int take_rule(struct grammar_parser *p)
{
    const char *start = p->at;
    uint32_t rule;
    struct grammar_fragment body = {0};
    int rc = take_name(p, &rule);
    if (rc < 0) {
        return rc;
    }
    if (p->rule[rule].defined) {
        return grammar_refuse(p, start, "another rule has the name '", start, p->rule[rule].bytes);
    }
    grammar_skip_space(p, false);
    if (p->end - p->at < 3 || memcmp(p->at, "::=", 3) != 0) {
        return grammar_refuse_here(p, "'::=' was expected");
    }
    p->at += 3;
    grammar_skip_space(p, true);
    p->rule[rule].defined = true;
    rc = take_alternatives(p, false, &body);
    if (rc < 0) {
        return rc;
    }
    if (p->at < p->end && *p->at != '\n' && *p->at != '\r') {
        return grammar_refuse_here(p, "the end of the rule's line was expected");
    }
    int64_t end = grammar_add_node(p, NODE_END, 0, GRAMMAR_NOWHERE);
    if (end < 0) {
        return (int)end;
    }
    grammar_node_at(p, body.exit)->next = (uint32_t)end;
    uint32_t *starts = reallocarray(p->g->start, p->capacity, sizeof(*starts));
    if (starts == NULL) {
        return -ENOMEM;
    }
    p->g->start = starts;
    starts[rule] = body.start;
    grammar_skip_space(p, true);
    return 0;
}

/* All rules are there: the ones that were named, and root. */
static int check_names(struct grammar_parser *p)
{
    uint32_t *root = p->n_rules > 0 ? slot_of(p, "root", 4) : NULL;
    for (size_t i = 0; i < p->n_rules; i++) {
        if (!p->rule[i].defined) {
            return grammar_refuse(p, p->rule[i].text, "there is no rule '", p->rule[i].text,
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

static int parse_text(struct grammar_parser *p)
{
    grammar_skip_space(p, true);
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
        return grammar_refuse(p, p->rule[again].text,
                              "left recursion: a rule can begin with itself: '",
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
    struct grammar_parser p = {.g = g, .text = text, .at = text, .end = text + bytes, .err = err};
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
