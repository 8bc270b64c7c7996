/* daemon/model/grammar_build.c - nodes of an automaton, made, copied and joined; and errors with
 * their place in the text. */
#include "daemon/model/grammar_text.h"
#include "daemon/model/utf8.h"

#include <errno.h>
#include <stdlib.h>

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

int grammar_refuse(struct grammar_parser *p, const char *at, const char *what, const char *name,
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

int grammar_refuse_here(struct grammar_parser *p, const char *what)
{
    return grammar_refuse(p, p->at, what, "", 0);
}

/* ---- building ---------------------------------------------------------------------------- */

int64_t grammar_add_node(struct grammar_parser *p, enum grammar_node_kind kind, uint32_t arg,
                         uint32_t next)
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

struct grammar_node *grammar_node_at(struct grammar_parser *p, uint32_t index)
{
    return &p->g->node[index];
}

int grammar_one_node(struct grammar_parser *p, enum grammar_node_kind kind, uint32_t arg,
                     struct grammar_fragment *ret)
{
    int64_t node = grammar_add_node(p, kind, arg, (uint32_t)p->g->n_nodes + 1);
    int64_t exit = node < 0 ? node : grammar_add_node(p, NODE_JUMP, 0, GRAMMAR_NOWHERE);
    if (exit < 0) {
        return (int)exit;
    }
    *ret = (struct grammar_fragment){(uint32_t)node, (uint32_t)exit};
    return 0;
}

int grammar_empty_fragment(struct grammar_parser *p, struct grammar_fragment *ret)
{
    int64_t node = grammar_add_node(p, NODE_JUMP, 0, GRAMMAR_NOWHERE);
    if (node < 0) {
        return (int)node;
    }
    *ret = (struct grammar_fragment){(uint32_t)node, (uint32_t)node};
    return 0;
}

/* Another copy of the nodes first..end-1, which hold one fragment. */
static int copy_fragment(struct grammar_parser *p, uint32_t first, uint32_t end,
                         struct grammar_fragment of, struct grammar_fragment *ret)
{
    uint32_t moved = (uint32_t)p->g->n_nodes - first;
    for (uint32_t i = first; i < end; i++) {
        struct grammar_node n = *grammar_node_at(p, i);
        n.next += n.next == GRAMMAR_NOWHERE ? 0 : moved;
        n.arg += n.kind == NODE_SPLIT ? moved : 0;
        int64_t node = grammar_add_node(p, n.kind, n.arg, n.next);
        if (node < 0) {
            return (int)node;
        }
    }
    *ret = (struct grammar_fragment){of.start + moved, of.exit + moved};
    return 0;
}

int grammar_repeat(struct grammar_parser *p, uint32_t first, struct grammar_fragment x,
                   uint32_t least, uint32_t most, struct grammar_fragment *ret)
{
    bool endless = most == GRAMMAR_NOWHERE;
    uint32_t end = (uint32_t)p->g->n_nodes;
    uint32_t copies = endless ? least + 1 : most;
    struct grammar_fragment all = {0}, leave = {0};
    int rc = grammar_empty_fragment(p, &all);
    rc = rc < 0 ? rc : grammar_empty_fragment(p, &leave);
    for (uint32_t i = 0; i < copies && rc == 0; i++) {
        struct grammar_fragment copy = {0};
        rc = copy_fragment(p, first, end, x, &copy);
        if (rc < 0) {
            return rc;
        }
        if (i < least) {
            grammar_node_at(p, all.exit)->next = copy.start;
            all.exit = copy.exit;
            continue;
        }
        int64_t split = grammar_add_node(p, NODE_SPLIT, leave.start, copy.start);
        if (split < 0) {
            return (int)split;
        }
        grammar_node_at(p, all.exit)->next = (uint32_t)split;
        all.exit = copy.exit;
        if (endless) {
            grammar_node_at(p, copy.exit)->next = (uint32_t)split;
            *ret = (struct grammar_fragment){all.start, leave.exit};
            return 0;
        }
    }
    if (rc < 0) {
        return rc;
    }
    grammar_node_at(p, all.exit)->next = leave.start;
    *ret = (struct grammar_fragment){all.start, leave.exit};
    return 0;
}
