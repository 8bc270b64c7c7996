/* daemon/model/grammar_check.c - what a grammar's automata can and cannot do. */
#include "daemon/model/grammar_internal.h"

#include <errno.h>
#include <stdlib.h>

bool grammar_node_meets(const struct grammar *g, const struct grammar_node *node, uint32_t low,
                        uint32_t high)
{
    if (node->kind == NODE_CHAR) {
        return node->arg >= low && node->arg <= high;
    }
    const struct grammar_set *set = &g->set[node->arg];
    const struct grammar_range *range = &g->range[set->first];
    size_t from = 0, to = set->n; /* the first range that ends at low or after */
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if (range[middle].high < low) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    return from < set->n && range[from].low <= high;
}

/* ---- left recursion ---------------------------------------------------------------------- */

/* A walk over what a rule can begin with: nodes that are reached without a character. */
struct walk {
    const struct grammar *g;
    bool *nullable;  /* (n_rules): it can stand for nothing */
    uint32_t *seen;  /* (n_nodes): the walk in which a node was seen last */
    uint32_t *stack; /* (n_nodes) */
    uint32_t round;
};

static void push(struct walk *w, size_t *n, uint32_t node)
{
    if (w->seen[node] != w->round) {
        w->seen[node] = w->round;
        w->stack[(*n)++] = node;
    }
}

/* Appends the rules that this one can begin with to *callees (NULL: not asked for); true when it
 * can stand for nothing. */
static bool walk_rule(struct walk *w, uint32_t rule, uint32_t *callees, size_t *n_callees)
{
    size_t n = 0;
    bool ends = false;
    w->round++;
    push(w, &n, w->g->start[rule]);
    while (n > 0) {
        const struct grammar_node *node = &w->g->node[w->stack[--n]];
        switch (node->kind) {
        case NODE_SPLIT:
            push(w, &n, node->arg);
            push(w, &n, node->next);
            break;
        case NODE_JUMP:
            push(w, &n, node->next);
            break;
        case NODE_CALL:
            if (callees != NULL) {
                callees[(*n_callees)++] = node->arg;
            }
            if (w->nullable[node->arg]) {
                push(w, &n, node->next);
            }
            break;
        case NODE_END:
            ends = true;
            break;
        default:
            break;
        }
    }
    return ends;
}

/* In passes over the rules, there and back, until one finds none. */
static void find_nullable(struct walk *w)
{
    uint32_t n = (uint32_t)w->g->n_rules;
    bool changed = true;
    for (unsigned pass = 0; changed; pass++) {
        changed = false;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t rule = pass % 2 == 0 ? i : n - 1 - i;
            if (!w->nullable[rule] && walk_rule(w, rule, NULL, NULL)) {
                w->nullable[rule] = changed = true;
            }
        }
    }
}

/* A search in depth along what rules can begin with. The callees of every rule on the path are on
 * one stack, which therefore holds each call of the grammar at most once. */
struct search {
    struct walk w;
    uint32_t *path;      /* (n_rules) */
    uint32_t *first;     /* (n_rules): where the callees of path[i] begin */
    uint32_t *callees;   /* (n_nodes) */
    unsigned char *mark; /* (n_rules) */
};
enum { MARK_NEW, MARK_ON_PATH, MARK_DONE };

/* From one rule; the rule that was met again, or GRAMMAR_NOWHERE. */
static uint32_t search_from(struct search *s, uint32_t rule)
{
    size_t depth = 0, n_callees = 0;
    for (;;) {
        s->mark[rule] = MARK_ON_PATH;
        s->path[depth] = rule;
        s->first[depth++] = (uint32_t)n_callees;
        walk_rule(&s->w, rule, s->callees, &n_callees);
        do {
            while (depth > 0 && n_callees == s->first[depth - 1]) {
                s->mark[s->path[--depth]] = MARK_DONE;
            }
            if (depth == 0) {
                return GRAMMAR_NOWHERE;
            }
            rule = s->callees[--n_callees];
        } while (s->mark[rule] == MARK_DONE);
        if (s->mark[rule] == MARK_ON_PATH) {
            return rule;
        }
    }
}

int grammar_find_left_recursion(const struct grammar *g, uint32_t *ret)
{
    struct search s = {.w.g = g};
    int rc = -ENOMEM;
    s.w.nullable = calloc(g->n_rules, sizeof(*s.w.nullable));
    s.w.seen = calloc(g->n_nodes, sizeof(*s.w.seen));
    s.w.stack = calloc(g->n_nodes, sizeof(*s.w.stack));
    s.path = calloc(g->n_rules, sizeof(*s.path));
    s.first = calloc(g->n_rules, sizeof(*s.first));
    s.callees = calloc(g->n_nodes, sizeof(*s.callees));
    s.mark = calloc(g->n_rules, sizeof(*s.mark));
    if (s.w.nullable && s.w.seen && s.w.stack && s.path && s.first && s.callees && s.mark) {
        uint32_t again = GRAMMAR_NOWHERE;
        find_nullable(&s.w);
        for (uint32_t i = 0; i < g->n_rules && again == GRAMMAR_NOWHERE; i++) {
            again = s.mark[i] == MARK_NEW ? search_from(&s, i) : again;
        }
        *ret = again;
        rc = 0;
    }
    free(s.w.nullable);
    free(s.w.seen);
    free(s.w.stack);
    free(s.path);
    free(s.first);
    free(s.callees);
    free(s.mark);
    return rc;
}
