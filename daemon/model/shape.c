/* daemon/model/shape.c - a model's numbers from the keys of its file. */
#include "daemon/model/shape_keys.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MAX_HEADS   4096u
#define MAX_DIM     1024u /* of a head */
#define MAX_EMBD    (1u << 17)
#define MAX_FF      (1u << 20)
#define MAX_VOCAB   (1u << 24)
#define MAX_CTX     (1u << 28)
#define MAX_EXPERTS 4096u

/* Values of expert_gating_func. */
enum file_gating { FILE_GATING_SOFTMAX = 1, FILE_GATING_SOFTMAX_WEIGHT = 3 };

static int find_arch(const struct gguf *g, const struct arch **ret, struct fmt_error *err)
{
    struct gguf_string name;
    if (gguf_get_string(g, "general.architecture", &name) < 0) {
        return fmt_fail(err, -EINVAL, "%s: key general.architecture is missing", gguf_name(g));
    }
    *ret = arch_find(name);
    if (*ret != NULL) {
        return 0;
    }
    char known[256] = "";
    size_t used = 0;
    for (size_t i = 0; arch_at(i) != NULL && used < sizeof(known); i++) {
        used += (size_t)snprintf(known + used, sizeof(known) - used, "%s%s", i > 0 ? ", " : "",
                                 arch_at(i)->name);
    }
    return fmt_fail(err, -ENOTSUP, "%s: architecture '%.*s' is unknown; known are %s", gguf_name(g),
                    (int)(name.bytes < 40 ? name.bytes : 40), name.data, known);
}

/* ---- rotation ---------------------------------------------------------------------------- */

static void read_rope_scaling_type(struct shape_reader *r, struct model_shape *s)
{
    char key[SHAPE_KEY_BYTES];
    struct gguf_string type;
    shape_key(r, "rope.scaling.type", key);
    int rc = r->rc < 0 ? r->rc : gguf_get_string(r->g, key, &type);
    if (r->rc < 0 || rc == -ENOENT) {
        return;
    }
    if (rc < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not a string", gguf_name(r->g), key);
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
                 gguf_name(r->g), key, (int)(type.bytes < 40 ? type.bytes : 40), type.data);
}

static void read_rope(struct shape_reader *r, struct model_shape *s)
{
    s->n_rot = s->k_dim;
    s->rope_base = 10000;
    s->rope_factor = 1;
    s->rope_n_ctx_orig = s->n_ctx_train;
    s->yarn_beta_fast = 32;
    s->yarn_beta_slow = 1;
    shape_read_u32(r, "rope.dimension_count", false, 2, s->k_dim, &s->n_rot);
    shape_read_f32(r, "rope.freq_base", false, 2, 1e12f, &s->rope_base);
    s->rope_base_local = r->arch->local_base > 0 ? r->arch->local_base : s->rope_base;
    shape_read_f32(r, "rope.freq_base_swa", false, 2, 1e12f, &s->rope_base_local);
    shape_read_f32(r, "rope.scale_linear", false, 1e-3f, 1e6f, &s->rope_factor);
    shape_read_f32(r, "rope.scaling.factor", false, 1e-3f, 1e6f, &s->rope_factor);
    if (s->rope_factor != 1) {
        s->rope_scaling = ROPE_SCALING_LINEAR; /* a factor without a type */
    }
    shape_read_f32(r, "rope.scaling.attn_factor", false, 1e-3f, 1e3f, &s->rope_attn_factor);
    shape_read_u32(r, "rope.scaling.original_context_length", false, 1, MAX_CTX,
                   &s->rope_n_ctx_orig);
    shape_read_f32(r, "rope.scaling.yarn_beta_fast", false, 1e-3f, 1e6f, &s->yarn_beta_fast);
    shape_read_f32(r, "rope.scaling.yarn_beta_slow", false, 1e-3f, 1e6f, &s->yarn_beta_slow);
    shape_read_f32(r, "rope.scaling.yarn_log_multiplier", false, 0, 1e3f, &s->yarn_log_mul);
    if (r->rc == 0 && s->n_rot % 2 != 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s.rope.dimension_count is %u, must be even",
                         gguf_name(r->g), r->arch->name, s->n_rot);
    }
    read_rope_scaling_type(r, s);
    if (r->arch->flags & ARCH_ROPE_SWITCH) {
        bool rotates = true;
        shape_read_bool(r, "rope.scaling.finetuned", &rotates);
        s->n_rot = rotates ? s->n_rot : 0;
    }
    if (r->arch->flags & ARCH_POSITIONS) {
        s->n_rot = 0;
    }
}

/* Scores are scaled by 1 + scale * ln(1 + floor(position / original context)): by nothing within
 * the original context, and that is as far as such a model goes here. */
static void read_temperature(struct shape_reader *r, struct model_shape *s)
{
    float scale = 0;
    shape_read_f32(r, "attention.temperature_scale", false, 0, 1e3f, &scale);
    s->n_ctx_max = scale > 0 ? s->rope_n_ctx_orig : 0;
}

static void read_scales(struct shape_reader *r, struct model_shape *s)
{
    s->embed_scale = s->arch->flags & ARCH_EMBED_SQRT ? sqrtf((float)s->n_embd) : 1;
    s->residual_scale = 1;
    s->logit_scale = 1;
    s->attn_scale = 1 / sqrtf((float)s->k_dim);
    shape_read_f32(r, "attn_logit_softcapping", false, 0, 1e6f, &s->attn_softcap);
    shape_read_f32(r, "final_logit_softcapping", false, 0, 1e6f, &s->logit_softcap);
    shape_read_f32(r, "attention.scale", false, 1e-6f, 1e6f, &s->attn_scale);
    float divisor = 1;
    shape_read_f32(r, "embedding_scale", false, 1e-6f, 1e6f, &s->embed_scale);
    shape_read_f32(r, "residual_scale", false, 1e-6f, 1e6f, &s->residual_scale);
    shape_read_f32(r, "logit_scale", false, 1e-6f, 1e6f, &divisor);
    s->logit_scale = 1 / divisor;
}

/* ---- windows ----------------------------------------------------------------------------- */

static void set_windowed(struct model_shape *s, uint32_t layer)
{
    s->window_layers[layer / 8] |= (uint8_t)(1u << layer % 8);
}

/* The file's own pattern: a bool for every layer, or a period whose last layer sees everything (1:
 * all do; 0: none does). */
static bool read_window_pattern(struct shape_reader *r, struct model_shape *s)
{
    char key[SHAPE_KEY_BYTES];
    shape_key(r, "attention.sliding_window_pattern", key);
    if (r->rc < 0 || !gguf_has_key(r->g, key)) {
        return false;
    }
    enum gguf_value_type type;
    uint64_t count;
    if (gguf_get_array(r->g, key, &type, &count) < 0) {
        uint32_t period = 0;
        shape_read_u32(r, "attention.sliding_window_pattern", true, 0, MODEL_MAX_LAYERS, &period);
        for (uint32_t i = 0; r->rc == 0 && i < s->n_layers; i++) {
            if (period == 0 || i % period != period - 1) {
                set_windowed(s, i);
            }
        }
        return true;
    }
    int32_t items[MODEL_MAX_LAYERS];
    if (count != s->n_layers || gguf_get_i32s(r->g, key, items, count) < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not an array of %u bools", gguf_name(r->g),
                         key, s->n_layers);
        return true;
    }
    for (uint32_t i = 0; i < s->n_layers; i++) {
        if (items[i] != 0) {
            set_windowed(s, i);
        }
    }
    return true;
}

static void read_windows(struct shape_reader *r, struct model_shape *s)
{
    uint32_t pattern = s->arch->window_pattern;
    shape_read_u32(r, "attention.sliding_window", false, 0, MAX_CTX, &s->window);
    if (read_window_pattern(r, s) || r->rc < 0 || s->window == 0) {
        return;
    }
    if (pattern == 0 && s->window < s->n_ctx_train) {
        r->rc = fmt_fail(r->err, -ENOTSUP,
                         "%s: key %s.attention.sliding_window is %u, and nothing says which layers "
                         "of this architecture are windowed",
                         gguf_name(r->g), r->arch->name, s->window);
    }
    for (uint32_t i = 0; pattern > 0 && i < s->n_layers; i++) {
        if (pattern == 1 || i % pattern != pattern - 1) {
            set_windowed(s, i);
        }
    }
}

/* ---- experts ----------------------------------------------------------------------------- */

static void read_gating(struct shape_reader *r, struct model_shape *s)
{
    uint32_t gating = FILE_GATING_SOFTMAX, step = 1;
    s->expert_scale = 1;
    s->expert_renormalise = (s->arch->flags & ARCH_EXPERTS_RAW) == 0;
    shape_read_f32(r, "expert_weights_scale", false, 0, 1e6f, &s->expert_scale);
    s->expert_scale = s->expert_scale > 0 ? s->expert_scale : 1;
    shape_read_bool(r, "expert_weights_norm", &s->expert_renormalise);
    shape_read_u32(r, "interleave_moe_layer_step", false, 0, 1, &step);
    shape_read_u32(r, "expert_gating_func", false, 0, UINT32_MAX, &gating);
    if (gating == FILE_GATING_SOFTMAX_WEIGHT) {
        s->expert_renormalise = true; /* softmax over the chosen ones is just that */
    } else if (r->rc == 0 && gating > FILE_GATING_SOFTMAX) {
        r->rc = fmt_fail(r->err, -ENOTSUP, "%s: key %s.expert_gating_func is %u; known are 1, 3",
                         gguf_name(r->g), r->arch->name, gating);
    }
}

static void read_experts(struct shape_reader *r, struct model_shape *s)
{
    uint32_t flags = s->arch->flags;
    bool required = (flags & ARCH_EXPERTS) != 0;
    shape_read_u32(r, "expert_count", required, required, MAX_EXPERTS, &s->n_experts);
    if (r->rc < 0 || s->n_experts == 0) {
        return;
    }
    if ((flags & (ARCH_EXPERTS | ARCH_EXPERTS_IF_COUNT)) == 0) {
        r->rc = fmt_fail(r->err, -ENOTSUP,
                         "%s: key %s.expert_count is %u: experts are not supported for this "
                         "architecture",
                         gguf_name(r->g), r->arch->name, s->n_experts);
        return;
    }
    shape_read_u32(r, "expert_used_count", true, 1, s->n_experts, &s->n_experts_used);
    s->n_ff_expert = s->n_ff;
    shape_read_u32_or_equal(r, "expert_feed_forward_length", s->n_layers, MAX_FF, &s->n_ff_expert);
    if (flags & ARCH_SHARED_EXPERT) {
        bool always = (flags & ARCH_SHARED_GATE) != 0;
        s->n_ff_shared = always ? s->n_ff : 0;
        shape_read_u32(r, "expert_shared_feed_forward_length", false, always, MAX_FF,
                       &s->n_ff_shared);
    }
    read_gating(r, s);
}

/* ---- the rest ---------------------------------------------------------------------------- */

static void check_feed_forward(struct shape_reader *r, const struct model_shape *s)
{
    bool moe = s->n_experts > 0;
    if (r->rc == 0 && (moe ? s->n_ff_expert == 0 : s->n_ff == 0)) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s.%s is missing", gguf_name(r->g),
                         r->arch->name, moe ? "expert_feed_forward_length" : "feed_forward_length");
    }
    if (r->rc == 0 && (s->arch->flags & ARCH_SHARED_GATE) && s->n_ff_shared == 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s.expert_shared_feed_forward_length is missing",
                         gguf_name(r->g), r->arch->name);
    }
}

static void read_sizes(struct shape_reader *r, struct model_shape *s)
{
    const char *eps = s->arch->norm == GQA_NORM_LAYER ? "attention.layer_norm_epsilon"
                                                      : "attention.layer_norm_rms_epsilon";
    shape_read_u32(r, "block_count", true, 1, MODEL_MAX_LAYERS, &s->n_layers);
    shape_read_u32(r, "embedding_length", true, 1, MAX_EMBD, &s->n_embd);
    shape_read_u32(r, "context_length", true, 1, MAX_CTX, &s->n_ctx_train);
    shape_read_u32(r, "attention.head_count", true, 1, MAX_HEADS, &s->n_heads);
    s->n_kv_heads = s->n_heads;
    shape_read_u32_or_equal(r, "attention.head_count_kv", s->n_layers, MAX_HEADS, &s->n_kv_heads);
    shape_read_u32_or_equal(r, "feed_forward_length", s->n_layers, MAX_FF, &s->n_ff);
    shape_read_f32(r, eps, true, 0, 1, &s->norm_eps);
    read_experts(r, s);
    check_feed_forward(r, s);
    if (r->rc < 0) {
        return;
    }
    if (s->n_heads % s->n_kv_heads != 0) {
        r->rc =
            fmt_fail(r->err, -EINVAL, "%s: %u heads cannot be shared out evenly over %u KV heads",
                     gguf_name(r->g), s->n_heads, s->n_kv_heads);
        return;
    }
    s->k_dim = s->n_embd / s->n_heads;
    if (s->k_dim == 0 || s->k_dim > MAX_DIM) {
        s->k_dim = 0;
    }
    s->v_dim = s->k_dim;
    shape_read_u32(r, "attention.key_length", s->k_dim == 0, 1, MAX_DIM, &s->k_dim);
    shape_read_u32(r, "attention.value_length", s->v_dim == 0, 1, MAX_DIM, &s->v_dim);
}

/* Attention of decoders looks back only, that of encoders to both sides. */
static void check_causal(struct shape_reader *r)
{
    bool looks_back = (r->arch->flags & ARCH_ENCODER) == 0, causal = looks_back;
    shape_read_bool(r, "attention.causal", &causal);
    if (r->rc == 0 && causal != looks_back) {
        r->rc =
            fmt_fail(r->err, -ENOTSUP,
                     "%s: key %s.attention.causal is %s: attention %s is not supported for this "
                     "architecture",
                     gguf_name(r->g), r->arch->name, causal ? "true" : "false",
                     causal ? "that looks back only" : "in both directions");
    }
}

static void read_vocabulary(struct shape_reader *r, struct model_shape *s)
{
    const struct gguf_tensor *embd = gguf_find_tensor(r->g, "token_embd.weight");
    if (r->rc == 0 && embd == NULL) {
        r->rc =
            fmt_fail(r->err, -EINVAL, "%s: tensor token_embd.weight is missing", gguf_name(r->g));
    }
    if (r->rc == 0 && (embd->ne[1] < 1 || embd->ne[1] > MAX_VOCAB)) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: tensor token_embd.weight has %llu rows, limit %u",
                         gguf_name(r->g), (unsigned long long)embd->ne[1], MAX_VOCAB);
    }
    if (r->rc < 0) {
        return;
    }
    s->n_vocab = (uint32_t)embd->ne[1];
    uint32_t stated = s->n_vocab;
    shape_read_u32(r, "vocab_size", false, 1, MAX_VOCAB, &stated);
    if (r->rc == 0 && stated != s->n_vocab) {
        r->rc =
            fmt_fail(r->err, -EINVAL, "%s: key %s.vocab_size is %u, token_embd.weight has %u rows",
                     gguf_name(r->g), r->arch->name, stated, s->n_vocab);
    }
}

/* Decoders speak with their last token, which has seen all the others; in encoders each has. */
static void read_pooling(struct shape_reader *r, struct model_shape *s)
{
    uint32_t pooling = r->arch->flags & ARCH_ENCODER ? POOLING_MEAN : POOLING_LAST;
    shape_read_u32(r, "pooling_type", false, POOLING_NONE, POOLING_COUNT - 1, &pooling);
    s->pooling = (enum pooling)pooling;
}

int model_shape_read(const struct gguf *g, struct model_shape *ret, struct fmt_error *err)
{
    struct model_shape s = {0};
    int rc = find_arch(g, &s.arch, err);
    rc = rc < 0 ? rc : shape_check_understood(g, s.arch, err);
    if (rc < 0) {
        return rc;
    }
    struct shape_reader r = {.g = g, .arch = s.arch, .err = err};
    check_causal(&r);
    read_sizes(&r, &s);
    if (r.rc == 0) {
        read_windows(&r, &s);
        read_rope(&r, &s);
        read_temperature(&r, &s);
        read_scales(&r, &s);
        read_pooling(&r, &s);
    }
    read_vocabulary(&r, &s);
    if (r.rc == 0) {
        *ret = s;
    }
    return r.rc;
}
