/* tests/unit/engine/encoder.h - small random encoders and their forward pass in float64.
 *
 * A spec says what an encoder computes; the reference writes it as a GGUF file under the names that
 * such files use, and computes hidden states and scores with the plainest loops. It knows nothing
 * of the daemon's pass. Errors end the process. */
#ifndef TESTS_UNIT_ENGINE_ENCODER_H
#define TESTS_UNIT_ENGINE_ENCODER_H

#include "tests/unit/engine/tiny.h"

#include <stdbool.h>

#define ENCODER_TENSORS 128

struct encoder_spec {
    const char *arch;
    uint32_t n_layers, n_embd, n_heads, n_ff, n_ctx;
    uint32_t n_types;                        /* of tokens; 0: no such table */
    bool positions;                          /* learned ones; else q and k rotate by halves */
    bool biases;                             /* of all products */
    bool gated;                              /* silu(gate) * up; else gelu(up), the exact one */
    bool fused_qkv;                          /* one tensor for q, k and v */
    uint32_t n_scores;                       /* of the classifier; 0: none */
    bool dense_classifier;                   /* with a layer of its own before */
    double base;                             /* of the rotation */
    int pooling;                             /* for the key; -1: no key */
    const char *without;                     /* a tensor that is left out, or NULL */
    void (*add_keys)(struct gguf_writer *w); /* more keys, or NULL */
    uint64_t seed;
};

struct encoder {
    struct encoder_spec spec;
    struct {
        char name[64];
        uint64_t n_in, n_out; /* n_out 0: a vector */
        float *values;
    } tensors[ENCODER_TENSORS];
    size_t n_tensors;
};

/* "bert" with learned positions, biases and GELU; "nomic-bert" rotating, gated and fused. */
struct encoder_spec encoder_spec_bert(void);
struct encoder_spec encoder_spec_nomic(void);

void encoder_init(struct encoder *e, const struct encoder_spec *spec);
void encoder_finish(struct encoder *e);
void encoder_write(const struct encoder *e, const char *path);

/* ret (n, n_embd): hidden states after the last norm. */
void encoder_states(const struct encoder *e, const int32_t *tokens, uint32_t n, double *ret);
/* ret (n_scores): what the classifier says of one hidden state. */
void encoder_scores(const struct encoder *e, const double *state, double *ret);

#endif
