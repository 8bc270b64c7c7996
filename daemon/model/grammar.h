/* daemon/model/grammar.h - a grammar that the generated text must follow, and how far it is.
 *
 * The notation is llama.cpp's GBNF: `name ::= alternatives`, literals "..." and classes [a-z],
 * [^...] with the escapes \t \r \n \\ \" \[ \] \- \xXX \uXXXX \UXXXXXXXX, `.` for any character,
 * groups, `*` `+` `?` `{m}` `{m,}` `{m,n}`, and comments from # to the end of the line. Rules end
 * with their line; inside parentheses and after `|` and `::=` a new line is white space. The text
 * is what `root` stands for. Tokens (<...>) are not supported.
 *
 * A grammar is immutable and may be shared by threads. Every rule is a small automaton whose loops
 * are its own, and which calls other rules; a state (struct grammar_state) holds the set of places
 * where the text may be, each with whom to return to. Equal places are held once, so ambiguity
 * costs no more than there are places; GRAMMAR_PLACES_MAX bounds them. */
#ifndef DAEMON_MODEL_GRAMMAR_H
#define DAEMON_MODEL_GRAMMAR_H

#include "format/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GRAMMAR_TEXT_BYTES_MAX (1u << 20)
#define GRAMMAR_RULES_MAX      8192u
#define GRAMMAR_NODES_MAX                                                                       \
    (1u << 18)                        /* about one per character, class and call, repeated ones \
                                         as often as they are repeated */
#define GRAMMAR_DEPTH_MAX  100u       /* of parentheses */
#define GRAMMAR_REPEAT_MAX 20000u     /* m and n of {m,n} */
#define GRAMMAR_PLACES_MAX (1u << 16) /* where a text may be at once */

struct grammar;

/* 0 and *ret. -EINVAL with err: what is wrong, with line and column (a rule that is not defined,
 * that can begin with itself, ...), or which limit is exceeded; -ENOMEM. Linear but for the search
 * for left recursion; off the loop and the engine. */
int grammar_compile(const char *text, size_t bytes, struct grammar **ret, struct fmt_error *err);
void grammar_destroy(struct grammar *g); /* NULL is legal */

struct grammar_state; /* of one text; g must outlive it */

/* -ENOMEM; -E2BIG as below. */
int grammar_state_create(const struct grammar *g, struct grammar_state **ret);
void grammar_state_destroy(struct grammar_state *s); /* NULL is legal */

/* Whether the text may go on with these bytes, which may end (and begin) inside a character. Bytes
 * that are not UTF-8 fit no grammar. 1 or 0; -ENOMEM; -E2BIG past GRAMMAR_PLACES_MAX. The state
 * stays where it is, though what it points to may move. */
int grammar_state_allows(struct grammar_state *s, const char *bytes, size_t n);

/* Goes on with them. -EINVAL when they are not allowed; -ENOMEM; -E2BIG: as it was before. */
int grammar_state_accept(struct grammar_state *s, const char *bytes, size_t n);

/* Which bytes may come next: a necessary condition only. */
void grammar_state_first_bytes(const struct grammar_state *s, bool ret_possible[256]);

bool grammar_state_may_end(const struct grammar_state *s);
bool grammar_state_may_go_on(const struct grammar_state *s);

#endif
