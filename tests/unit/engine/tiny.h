/* tests/unit/engine/tiny.h - tiny GGUF models, right or wrong in one way.
 *
 * Errors end the process: these are the test's own bugs or a machine without space. */
#ifndef TESTS_UNIT_ENGINE_TINY_H
#define TESTS_UNIT_ENGINE_TINY_H

#include "format/gguf_write.h"

#define TINY_VOCAB 300u
#define TINY_EOS   2

struct tiny {
    const char *arch; /* key prefix too */
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, n_ff, n_ctx;
    uint32_t n_embd_rows;                    /* of token_embd; the vocabulary has TINY_VOCAB */
    const char *without_key;                 /* without the prefix; NULL: all are there */
    const char *without_tensor;              /* NULL: all are there */
    const char *extra_tensor;                /* a vector of 4, or NULL */
    const char *wide_tensor;                 /* has one more row (a vector: value), or NULL */
    void (*add_keys)(struct gguf_writer *w); /* or NULL */
    uint32_t n_scores;                       /* of a classifier; 0: none */
    uint64_t seed;
};

/* A llama of two layers, 32 wide, 4 heads over 2 groups, context 512. */
struct tiny tiny_default(void);
void tiny_write(const struct tiny *t, const char *path);

/* The keys of a vocabulary of TINY_VOCAB pieces, for models that a test writes itself. */
void tiny_add_vocabulary(struct gguf_writer *w);

#endif
