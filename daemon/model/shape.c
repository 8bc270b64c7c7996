/* daemon/model/shape.c - a model's numbers from the keys of its file.
 *
 * Every key of the architecture's own prefix must be understood or known to be harmless: a key that
 * we would ignore could change what the model computes. */
#include "daemon/model/arch.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MAX_LAYERS 1024u
#define MAX_HEADS  4096u
#define MAX_DIM    1024u /* of a head */
#define MAX_EMBD   (1u << 17)
#define MAX_FF     (1u << 20)
#define MAX_VOCAB  (1u << 24)
#define MAX_CTX    (1u << 28)

#define KEY_BYTES 128

/* Keys that are read below, or that say nothing about the computation of these architectures. */
static const char *const understood_keys[] = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "interleave_moe_layer_step",
    "attention.causal",
};

struct reader {
    const struct gguf *g;
    const char *arch;
    struct fmt_error *err;
    int rc; /* the first failure; later reads do nothing */
};

static void arch_key(const struct reader *r, const char *suffix, char key[KEY_BYTES])
{
    snprintf(key, KEY_BYTES, "%s.%s", r->arch, suffix);
}

/* Reads an integer in [min, max]. A missing key keeps *value when optional. */
static void read_u32(struct reader *r, const char *suffix, bool required, uint32_t min,
                     uint32_t max, uint32_t *value)
{
    if (r->rc < 0) {
        return;
    }
    char key[KEY_BYTES];
    arch_key(r, suffix, key);
    uint32_t v = 0;
    int rc = gguf_get_u32(r->g, key, &v);
    if (rc == -ENOENT && !required) {
        return;
    }
    if (rc == -ENOENT) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is missing", gguf_path(r->g), key);
    } else if (rc < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not one integer of 32 bits",
                         gguf_path(r->g), key);
    } else if (v < min || v > max) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is %u, must lie in %u..%u", gguf_path(r->g),
                         key, v, min, max);
    } else {
        *value = v;
    }
}

/* Reads a finite number in [min, max]. */
static void read_f32(struct reader *r, const char *suffix, bool required, float min, float max,
                     float *value)
{
    if (r->rc < 0) {
        return;
    }
    char key[KEY_BYTES];
    arch_key(r, suffix, key);
    float v = 0;
    int rc = gguf_get_f32(r->g, key, &v);
    if (rc == -ENOENT && !required) {
        return;
    }
    if (rc == -ENOENT) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is missing", gguf_path(r->g), key);
    } else if (rc < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not a number", gguf_path(r->g), key);
    } else if (!(v >= min && v <= max)) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is %g, must lie in %g..%g", gguf_path(r->g),
                         key, (double)v, (double)min, (double)max);
    } else {
        *value = v;
    }
}

/* One number, or an array of equal ones: per-layer head counts that differ are refused. */
static void read_u32_or_equal(struct reader *r, const char *suffix, uint32_t n_layers, uint32_t max,
                              uint32_t *value)
{
    char key[KEY_BYTES];
    arch_key(r, suffix, key);
    enum gguf_value_type type;
    uint64_t count;
    if (r->rc < 0 || gguf_get_array(r->g, key, &type, &count) < 0) {
        read_u32(r, suffix, false, 1, max, value);
        return;
    }
    int32_t items[MAX_LAYERS];
    if (count != n_layers || gguf_get_i32s(r->g, key, items, count) < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not an array of %u integers",
                         gguf_path(r->g), key, n_layers);
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        if (items[i] != items[0] || items[i] < 1 || (uint32_t)items[i] > max) {
            r->rc = fmt_fail(r->err, -ENOTSUP,
                             "%s: key %s gives layer %llu the value %d: layers that differ are not "
                             "supported",
                             gguf_path(r->g), key, (unsigned long long)i, (int)items[i]);
            return;
        }
    }
    *value = (uint32_t)items[0];
}

static int check_understood(const struct gguf *g, const char *arch, struct fmt_error *err)
{
    size_t prefix = strlen(arch);
    for (size_t i = 0; i < gguf_n_keys(g); i++) {
        struct gguf_string key = gguf_key_at(g, i);
        if (key.bytes <= prefix || memcmp(key.data, arch, prefix) != 0 || key.data[prefix] != '.') {
            continue;
        }
        const char *suffix = key.data + prefix + 1;
        size_t bytes = key.bytes - prefix - 1;
        bool known = false;
        for (size_t k = 0; !known && k < sizeof(understood_keys) / sizeof(*understood_keys); k++) {
            known = strlen(understood_keys[k]) == bytes &&
                    memcmp(understood_keys[k], suffix, bytes) == 0;
        }
        if (!known) {
            return fmt_fail(err, -ENOTSUP,
                            "%s: key %.*s is not understood and could change the result",
                            gguf_path(g), (int)(key.bytes < 96 ? key.bytes : 96), key.data);
        }
    }
    return 0;
}

static int find_arch(const struct gguf *g, const struct arch **ret, struct fmt_error *err)
{
    struct gguf_string name;
    if (gguf_get_string(g, "general.architecture", &name) < 0) {
        return fmt_fail(err, -EINVAL, "%s: key general.architecture is missing", gguf_path(g));
    }
    *ret = arch_find(name);
    if (*ret != NULL) {
        return 0;
    }
    char known[160] = "";
    size_t used = 0;
    for (size_t i = 0; arch_at(i) != NULL && used < sizeof(known); i++) {
        used += (size_t)snprintf(known + used, sizeof(known) - used, "%s%s", i > 0 ? ", " : "",
                                 arch_at(i)->name);
    }
    return fmt_fail(err, -ENOTSUP, "%s: architecture '%.*s' is unknown; known are %s", gguf_path(g),
                    (int)(name.bytes < 40 ? name.bytes : 40), name.data, known);
}

static void read_rope(struct reader *r, struct model_shape *s)
{
    s->n_rot = s->k_dim;
    s->rope_base = 10000;
    s->rope_factor = 1;
    s->rope_n_ctx_orig = s->n_ctx_train;
    s->yarn_beta_fast = 32;
    s->yarn_beta_slow = 1;
    read_u32(r, "rope.dimension_count", false, 2, s->k_dim, &s->n_rot);
    read_f32(r, "rope.freq_base", false, 2, 1e12f, &s->rope_base);
    read_f32(r, "rope.scale_linear", false, 1e-3f, 1e6f, &s->rope_factor);
    read_f32(r, "rope.scaling.factor", false, 1e-3f, 1e6f, &s->rope_factor);
    if (s->rope_factor != 1) {
        s->rope_scaling = ROPE_SCALING_LINEAR; /* a factor without a type */
    }
    read_f32(r, "rope.scaling.attn_factor", false, 1e-3f, 1e3f, &s->rope_attn_factor);
    read_u32(r, "rope.scaling.original_context_length", false, 1, MAX_CTX, &s->rope_n_ctx_orig);
    read_f32(r, "rope.scaling.yarn_beta_fast", false, 1e-3f, 1e6f, &s->yarn_beta_fast);
    read_f32(r, "rope.scaling.yarn_beta_slow", false, 1e-3f, 1e6f, &s->yarn_beta_slow);
    if (r->rc == 0 && s->n_rot % 2 != 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s.rope.dimension_count is %u, must be even",
                         gguf_path(r->g), r->arch, s->n_rot);
    }
    char key[KEY_BYTES];
    struct gguf_string type;
    arch_key(r, "rope.scaling.type", key);
    int rc = r->rc < 0 ? r->rc : gguf_get_string(r->g, key, &type);
    if (r->rc < 0 || rc == -ENOENT) {
        return;
    }
    if (rc < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not a string", gguf_path(r->g), key);
        return;
    }
    static const struct {
        const char *name;
        enum rope_scaling scaling;
    } types[] = {
        {"none", ROPE_SCALING_NONE},
        {"linear", ROPE_SCALING_LINEAR},
        {"yarn", ROPE_SCALING_YARN},
        {"longrope", ROPE_SCALING_NONE},
    };
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        if (strlen(types[i].name) == type.bytes &&
            memcmp(types[i].name, type.data, type.bytes) == 0) {
            s->rope_scaling = types[i].scaling;
            return;
        }
    }
    r->rc =
        fmt_fail(r->err, -ENOTSUP, "%s: key %s is '%.*s'; known are none, linear, yarn, longrope",
                 gguf_path(r->g), key, (int)(type.bytes < 40 ? type.bytes : 40), type.data);
}

static void read_scales(struct reader *r, struct model_shape *s)
{
    s->embed_scale = s->arch->flags & ARCH_EMBED_SQRT ? sqrtf((float)s->n_embd) : 1;
    s->residual_scale = 1;
    s->logit_scale = 1;
    s->attn_scale = 1 / sqrtf((float)s->k_dim);
    read_f32(r, "attn_logit_softcapping", false, 0, 1e6f, &s->attn_softcap);
    read_f32(r, "final_logit_softcapping", false, 0, 1e6f, &s->logit_softcap);
    read_f32(r, "attention.scale", false, 1e-6f, 1e6f, &s->attn_scale);
    if (s->arch->flags & ARCH_SCALES) {
        float divisor = 1;
        read_f32(r, "embedding_scale", false, 1e-6f, 1e6f, &s->embed_scale);
        read_f32(r, "residual_scale", false, 1e-6f, 1e6f, &s->residual_scale);
        read_f32(r, "logit_scale", false, 1e-6f, 1e6f, &divisor);
        s->logit_scale = 1 / divisor;
    }
}

static void read_sizes(struct reader *r, struct model_shape *s)
{
    read_u32(r, "block_count", true, 1, MAX_LAYERS, &s->n_layers);
    read_u32(r, "embedding_length", true, 1, MAX_EMBD, &s->n_embd);
    read_u32(r, "context_length", true, 1, MAX_CTX, &s->n_ctx_train);
    read_u32(r, "attention.head_count", true, 1, MAX_HEADS, &s->n_heads);
    s->n_kv_heads = s->n_heads;
    read_u32_or_equal(r, "attention.head_count_kv", s->n_layers, MAX_HEADS, &s->n_kv_heads);
    read_u32_or_equal(r, "feed_forward_length", s->n_layers, MAX_FF, &s->n_ff);
    read_f32(r, "attention.layer_norm_rms_epsilon", true, 0, 1, &s->norm_eps);
    if (r->rc < 0) {
        return;
    }
    if (s->n_ff == 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s.feed_forward_length is missing",
                         gguf_path(r->g), r->arch);
        return;
    }
    if (s->n_heads % s->n_kv_heads != 0) {
        r->rc =
            fmt_fail(r->err, -EINVAL, "%s: %u heads cannot be shared out evenly over %u KV heads",
                     gguf_path(r->g), s->n_heads, s->n_kv_heads);
        return;
    }
    s->k_dim = s->n_embd / s->n_heads;
    if (s->k_dim == 0 || s->k_dim > MAX_DIM) {
        s->k_dim = 0;
    }
    s->v_dim = s->k_dim;
    read_u32(r, "attention.key_length", s->k_dim == 0, 1, MAX_DIM, &s->k_dim);
    read_u32(r, "attention.value_length", s->v_dim == 0, 1, MAX_DIM, &s->v_dim);
    read_u32(r, "attention.sliding_window", false, 0, MAX_CTX, &s->window);
}

/* Attention looks back only. */
static void check_causal(struct reader *r)
{
    char key[KEY_BYTES];
    bool causal = true;
    arch_key(r, "attention.causal", key);
    int rc = r->rc < 0 ? r->rc : gguf_get_bool(r->g, key, &causal);
    if (r->rc == 0 && rc < 0 && rc != -ENOENT) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not a bool", gguf_path(r->g), key);
    } else if (r->rc == 0 && !causal) {
        r->rc = fmt_fail(r->err, -ENOTSUP,
                         "%s: key %s is false: attention in both directions is not supported",
                         gguf_path(r->g), key);
    }
}

int model_shape_read(const struct gguf *g, struct model_shape *ret, struct fmt_error *err)
{
    struct model_shape s = {0};
    int rc = find_arch(g, &s.arch, err);
    rc = rc < 0 ? rc : check_understood(g, s.arch->name, err);
    if (rc < 0) {
        return rc;
    }
    struct reader r = {.g = g, .arch = s.arch->name, .err = err};
    uint32_t n_experts = 0;
    read_u32(&r, "expert_count", false, 0, UINT32_MAX, &n_experts);
    check_causal(&r);
    if (r.rc == 0 && n_experts > 0) {
        return fmt_fail(err, -ENOTSUP, "%s: key %s.expert_count is %u: experts are not supported",
                        gguf_path(g), s.arch->name, n_experts);
    }
    read_sizes(&r, &s);
    if (r.rc == 0) {
        read_rope(&r, &s);
        read_scales(&r, &s);
    }
    const struct gguf_tensor *embd = gguf_find_tensor(g, "token_embd.weight");
    if (r.rc == 0 && embd == NULL) {
        r.rc = fmt_fail(err, -EINVAL, "%s: tensor token_embd.weight is missing", gguf_path(g));
    }
    if (r.rc == 0 && (embd->ne[1] < 1 || embd->ne[1] > MAX_VOCAB)) {
        r.rc = fmt_fail(err, -EINVAL, "%s: tensor token_embd.weight has %llu rows, limit %u",
                        gguf_path(g), (unsigned long long)embd->ne[1], MAX_VOCAB);
    }
    if (r.rc == 0) {
        s.n_vocab = (uint32_t)embd->ne[1];
        uint32_t stated = s.n_vocab;
        read_u32(&r, "vocab_size", false, 1, MAX_VOCAB, &stated);
        if (r.rc == 0 && stated != s.n_vocab) {
            r.rc =
                fmt_fail(err, -EINVAL, "%s: key %s.vocab_size is %u, token_embd.weight has %u rows",
                         gguf_path(g), s.arch->name, stated, s.n_vocab);
        }
    }
    if (r.rc == 0) {
        *ret = s;
    }
    return r.rc;
}
