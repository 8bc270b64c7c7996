/* daemon/model/dry_breakers.h - texts that break a repetition, as tokens.
 *
 * The dry sampler does not look for repetitions across a breaker: a new line, a quotation mark. A
 * breaker is found where a token contains it, or where a token ends with its beginning and the
 * tokens of the rest follow. Immutable after creation; may be read from any thread. */
#ifndef DAEMON_MODEL_DRY_BREAKERS_H
#define DAEMON_MODEL_DRY_BREAKERS_H

#include "daemon/model/tokenizer.h"

#define DRY_BREAKERS_MAX      32
#define DRY_BREAKER_BYTES_MAX 40

struct dry_breakers;

/* llama.cpp's: new line, colon, quotation mark, asterisk. */
extern const struct gguf_string dry_breakers_default[4];

/* Looks at every token of the vocabulary, which takes milliseconds: off the loop and the engine.
 * texts: n_texts of 1 to DRY_BREAKER_BYTES_MAX bytes. 0 and *ret; -EINVAL: a text of another
 * length, or too many; -ENOMEM. */
int dry_breakers_create(const struct tokenizer *t, const struct gguf_string *texts, size_t n_texts,
                        struct dry_breakers **ret);
void dry_breakers_destroy(struct dry_breakers *b); /* NULL is legal */

/* recent: (n) tokens, the newest first. How many of them came after the last breaker; n without
 * one. b may be NULL. */
size_t dry_breakers_since(const struct dry_breakers *b, const int32_t *recent, size_t n);

/* Whether the token contains a breaker. b may be NULL. */
bool dry_breakers_in_token(const struct dry_breakers *b, int32_t token);

#endif
