/* daemon/model/grammar_internal.h - compiled grammars, as parser, checks and matcher see them. */
#ifndef DAEMON_MODEL_GRAMMAR_INTERNAL_H
#define DAEMON_MODEL_GRAMMAR_INTERNAL_H

#include "daemon/model/grammar.h"

#define GRAMMAR_NOWHERE    UINT32_MAX
#define GRAMMAR_LAST_POINT 0x10FFFFu

/* What stands at a place of a rule. */
enum grammar_node_kind {
    NODE_JUMP,  /* nothing: go to next */
    NODE_SPLIT, /* go to next, or to arg */
    NODE_CHAR,  /* the character arg */
    NODE_SET,   /* one of set arg */
    NODE_CALL,  /* what rule arg stands for */
    NODE_END    /* of the rule */
};
struct grammar_node {
    uint32_t kind; /* enum grammar_node_kind */
    uint32_t arg;
    uint32_t next; /* where to go on */
};

struct grammar_range {
    uint32_t low, high; /* both included */
};
struct grammar_set { /* ranges in ascending order, apart from each other */
    uint32_t first, n;
};

struct grammar {
    struct grammar_node *node;
    size_t n_nodes, nodes_capacity;
    struct grammar_range *range;
    size_t n_ranges, ranges_capacity;
    struct grammar_set *set;
    size_t n_sets, sets_capacity;
    uint32_t *start; /* (n_rules): a rule's first node */
    size_t n_rules;
    uint32_t root;
};

/* Makes room for one more in an array that doubles. -ENOMEM. */
int grammar_grow(void **array, size_t *capacity, size_t n, size_t item_bytes);

/* Whether any character of low..high is what the node, NODE_CHAR or NODE_SET, stands for. */
bool grammar_node_meets(const struct grammar *g, const struct grammar_node *node, uint32_t low,
                        uint32_t high);

/* A rule that can begin with itself, or GRAMMAR_NOWHERE in *ret. -ENOMEM. */
int grammar_find_left_recursion(const struct grammar *g, uint32_t *ret);

#endif
