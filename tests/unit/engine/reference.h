/* tests/unit/engine/reference.h - an independent forward pass in float64, and models for it.
 *
 * A spec describes a small decoder by what it computes; the reference makes random tensors for it,
 * writes them as a GGUF file under the names that such files use, and computes the logits with the
 * plainest loops. It knows nothing of the daemon's table of architectures. */
#ifndef TESTS_UNIT_ENGINE_REFERENCE_H
#define TESTS_UNIT_ENGINE_REFERENCE_H

#include "tests/unit/engine/tiny.h"

#include <stdbool.h>

#define REFERENCE_LAYERS  6
#define REFERENCE_TENSORS 160

enum reference_qk_norm { REFERENCE_QK_PLAIN, REFERENCE_QK_PER_HEAD, REFERENCE_QK_WIDE };
enum reference_act { REFERENCE_SILU, REFERENCE_GELU_TANH, REFERENCE_SWIGLU_OAI };

struct reference_spec {
    const char *arch;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_rot, n_ff;
    uint32_t n_experts, n_used, n_ff_expert, n_ff_shared;
    enum reference_act act;
    enum reference_qk_norm qk_norm;
    /* norms */
    bool layer_norm, norm_bias, no_pre_norms, post_norms, parallel, second_norm_is_post_attention;
    /* tensors */
    bool qkv_bias, out_bias, ff_bias, head_bias, fused_qkv, fused_gate_up, ungated, untied, sinks;
    bool shared_gate, fused_experts;
    bool raw_experts; /* chosen experts keep their weights of the softmax over all */
    /* rotation */
    bool rotate_halves;      /* pairs (i, i + n_rot / 2); else (2i, 2i + 1) */
    uint32_t nope_step;      /* every so many layers the last one does not rotate */
    double base, local_base; /* local_base: of windowed layers, unscaled; 0: as the others */
    double yarn_factor;      /* 0: no scaling */
    double yarn_log_mul, n_ctx_orig;
    /* windows */
    uint32_t window;
    bool windowed[REFERENCE_LAYERS];
    /* scales; 0: none */
    double embed_scale, residual_scale, attn_scale, logit_divisor;
    void (*add_keys)(struct gguf_writer *w); /* beyond those that every model has; or NULL */
    uint64_t seed;
};

struct reference {
    struct reference_spec spec;
    struct {
        char name[64];
        uint32_t n_dims;
        uint64_t ne[3];
        float *values;
    } tensors[REFERENCE_TENSORS];
    size_t n_tensors;
};

/* Makes the tensors. Errors end the process, here and below. */
void reference_init(struct reference *r, const struct reference_spec *spec);
void reference_finish(struct reference *r);

/* Writes the model to one file, or to "STEM-00001-of-0000N.gguf" and its siblings. */
void reference_write(const struct reference *r, const char *path);
void reference_write_parts(const struct reference *r, const char *stem, uint32_t n_parts);

/* ret (n, TINY_VOCAB): logits after every token, as spec (usually r's own) has them computed. */
void reference_logits(const struct reference *r, const struct reference_spec *spec,
                      const int32_t *tokens, size_t n, double *ret);

#endif
