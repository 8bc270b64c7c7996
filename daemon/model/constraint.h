/* daemon/model/constraint.h - a grammar applied to the tokens of a vocabulary.
 *
 * A token is allowed when the text may go on with its bytes; an end-of-generation token when the
 * text may end; other tokens without a text (control tokens) never are. Belongs to one sequence,
 * and is used by whoever uses its sampler. */
#ifndef DAEMON_MODEL_CONSTRAINT_H
#define DAEMON_MODEL_CONSTRAINT_H

#include "daemon/model/grammar.h"
#include "daemon/model/tokenizer.h"

struct constraint;

/* Both are borrowed and must outlive it. -ENOMEM; -E2BIG: more than GRAMMAR_PLACES_MAX places. */
int constraint_create(const struct grammar *g, const struct tokenizer *t, struct constraint **ret);
void constraint_destroy(struct constraint *c); /* NULL is legal */

/* 1 or 0; -ENOMEM, -E2BIG. An id outside the vocabulary is not allowed. */
int constraint_allows(struct constraint *c, int32_t token);

/* Sets the logits (n) of the tokens that are not allowed to -inf. -ENOMEM, -E2BIG. */
int constraint_mask(struct constraint *c, float *logits, size_t n);

/* The token is generated. -EINVAL when it is not allowed; -ENOMEM, -E2BIG. */
int constraint_accept(struct constraint *c, int32_t token);

/* The text is whole: nothing can follow but its end. */
bool constraint_is_complete(const struct constraint *c);

#endif
