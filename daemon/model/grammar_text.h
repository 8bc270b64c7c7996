/* daemon/model/grammar_text.h - what the files that read GBNF text share: grammar_parse.c (names,
 * rules, repetitions), grammar_chars.c (characters, classes) and grammar_build.c (nodes).
 *
 * What is parsed becomes a fragment: nodes with one start and one exit, a NODE_JUMP whose next is
 * still open. The nodes of a fragment lie in one piece, so a repetition copies them. Functions
 * return 0 or a negative errno, whose words are in the parser's err. */
#ifndef DAEMON_MODEL_GRAMMAR_TEXT_H
#define DAEMON_MODEL_GRAMMAR_TEXT_H

#include "daemon/model/grammar_internal.h"

struct grammar_rule_name {
    const char *text; /* of the first use */
    size_t bytes;
    bool defined;
};

struct grammar_parser {
    struct grammar *g;
    const char *text, *at, *end;
    struct grammar_rule_name *rule;
    size_t n_rules, capacity;
    uint32_t *by_hash; /* (hash_size): rule + 1, or 0 */
    size_t hash_size;
    unsigned depth;
    struct fmt_error *err;
};

struct grammar_fragment {
    uint32_t start, exit;
};

/* ---- grammar_build.c -------------------------------------------------------------------- */

/* The place of `at` is told; columns count characters. */
int grammar_refuse(struct grammar_parser *p, const char *at, const char *what, const char *name,
                   size_t name_bytes);
int grammar_refuse_here(struct grammar_parser *p, const char *what);
/* The index of a new node, or a negative errno. */
int64_t grammar_add_node(struct grammar_parser *p, enum grammar_node_kind kind, uint32_t arg,
                         uint32_t next);
struct grammar_node *grammar_node_at(struct grammar_parser *p, uint32_t index);
/* A node that does something, and an exit behind it. */
int grammar_one_node(struct grammar_parser *p, enum grammar_node_kind kind, uint32_t arg,
                     struct grammar_fragment *ret);
int grammar_empty_fragment(struct grammar_parser *p, struct grammar_fragment *ret);
/* x{least,most}: least copies in a row, then as many that can be left out, each only if the one
 * before was there; without a most, one in a loop. first: where x's nodes begin. */
int grammar_repeat(struct grammar_parser *p, uint32_t first, struct grammar_fragment x,
                   uint32_t least, uint32_t most, struct grammar_fragment *ret);

/* ---- grammar_chars.c -------------------------------------------------------------------- */

void grammar_skip_space(struct grammar_parser *p, bool lines);
bool grammar_next_is(const struct grammar_parser *p, char c);
int grammar_take_literal(struct grammar_parser *p, struct grammar_fragment *ret);
int grammar_take_class(struct grammar_parser *p, struct grammar_fragment *ret);
int grammar_take_any(struct grammar_parser *p, struct grammar_fragment *ret);

#endif
