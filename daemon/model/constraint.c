#include "daemon/model/constraint.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

struct constraint {
    struct grammar_state *state;
    const struct tokenizer *tokenizer;
};

int constraint_create(const struct grammar *g, const struct tokenizer *t, struct constraint **ret)
{
    struct constraint *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        return -ENOMEM;
    }
    c->tokenizer = t;
    int rc = grammar_state_create(g, &c->state);
    if (rc < 0) {
        constraint_destroy(c);
        return rc;
    }
    *ret = c;
    return 0;
}

void constraint_destroy(struct constraint *c)
{
    if (c == NULL) {
        return;
    }
    grammar_state_destroy(c->state);
    free(c);
}

/* A token's text; empty where it has none. */
static struct gguf_string piece_of(const struct constraint *c, int32_t token)
{
    struct gguf_string piece = {"", 0};
    tokenizer_piece(c->tokenizer, token, false, &piece);
    return piece;
}

static bool is_end(const struct constraint *c, int32_t token)
{
    return token >= 0 && (uint32_t)token < tokenizer_n_vocab(c->tokenizer) &&
           tokenizer_is_eog(c->tokenizer, token);
}

int constraint_allows(struct constraint *c, int32_t token)
{
    if (is_end(c, token)) {
        return grammar_state_may_end(c->state);
    }
    struct gguf_string piece = piece_of(c, token);
    return piece.bytes > 0 ? grammar_state_allows(c->state, piece.data, piece.bytes) : 0;
}

int constraint_mask(struct constraint *c, float *logits, size_t n)
{
    bool first[256];
    grammar_state_first_bytes(c->state, first);
    for (size_t i = 0; i < n; i++) {
        struct gguf_string piece = piece_of(c, (int32_t)i);
        int rc = 0;
        if (logits[i] == -INFINITY) {
            continue;
        }
        if (is_end(c, (int32_t)i)) {
            rc = grammar_state_may_end(c->state);
        } else if (piece.bytes > 0 && first[(unsigned char)piece.data[0]]) {
            rc = grammar_state_allows(c->state, piece.data, piece.bytes);
        }
        if (rc < 0) {
            return rc;
        }
        logits[i] = rc > 0 ? logits[i] : -INFINITY;
    }
    return 0;
}

int constraint_accept(struct constraint *c, int32_t token)
{
    if (is_end(c, token)) {
        return grammar_state_may_end(c->state) ? 0 : -EINVAL;
    }
    struct gguf_string piece = piece_of(c, token);
    return piece.bytes > 0 ? grammar_state_accept(c->state, piece.data, piece.bytes) : -EINVAL;
}

bool constraint_is_complete(const struct constraint *c)
{
    return grammar_state_may_end(c->state) && !grammar_state_may_go_on(c->state);
}
