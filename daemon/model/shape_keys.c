#include "daemon/model/shape_keys.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define ANY 0u /* every architecture's */
#define MOE (ARCH_EXPERTS | ARCH_EXPERTS_IF_COUNT)

/* Keys that shape.c reads, or that say nothing about the computation of these architectures; with
 * the flags of which a row needs one for the key to mean something. */
static const struct {
    const char *suffix;
    uint32_t flags;
} understood_keys[] = {
    {"vocab_size", ANY},
    {"context_length", ANY},
    {"embedding_length", ANY},
    {"block_count", ANY},
    {"feed_forward_length", ANY},
    {"attention.head_count", ANY},
    {"attention.head_count_kv", ANY},
    {"attention.key_length", ANY},
    {"attention.value_length", ANY},
    {"attention.layer_norm_epsilon", ANY},
    {"attention.layer_norm_rms_epsilon", ANY},
    {"attention.sliding_window", ANY},
    {"attention.sliding_window_pattern", ANY},
    {"attention.scale", ANY},
    {"attention.causal", ANY},
    {"pooling_type", ANY},
    {"classifier.output_labels", ANY},
    {"attention.temperature_scale", ARCH_TEMPERATURE},
    {"attn_logit_softcapping", ANY},
    {"final_logit_softcapping", ANY},
    {"embedding_scale", ARCH_SCALES},
    {"residual_scale", ARCH_SCALES},
    {"logit_scale", ARCH_SCALES},
    {"expert_count", ANY},
    {"expert_used_count", ANY},
    {"expert_feed_forward_length", MOE},
    {"expert_shared_feed_forward_length", ARCH_SHARED_EXPERT},
    {"expert_gating_func", MOE},
    {"expert_weights_norm", MOE},
    {"expert_weights_scale", MOE},
    {"interleave_moe_layer_step", ANY},
    {"rope.dimension_count", ANY},
    {"rope.freq_base", ANY},
    {"rope.freq_base_swa", ARCH_LOCAL_ROPE},
    {"rope.scale_linear", ANY},
    {"rope.scaling.type", ANY},
    {"rope.scaling.factor", ANY},
    {"rope.scaling.attn_factor", ANY},
    {"rope.scaling.original_context_length", ANY},
    {"rope.scaling.yarn_beta_fast", ANY},
    {"rope.scaling.yarn_beta_slow", ANY},
    {"rope.scaling.yarn_log_multiplier", ANY},
    {"rope.scaling.finetuned", ANY},
    {"tensor_data_layout", ANY},
    /* Converters write a default; the tensors tell what is so. */
    {"use_parallel_residual", ARCH_NORM_BIAS},
};

#define N_UNDERSTOOD (sizeof(understood_keys) / sizeof(understood_keys[0]))

void shape_key(const struct shape_reader *r, const char *suffix, char key[SHAPE_KEY_BYTES])
{
    snprintf(key, SHAPE_KEY_BYTES, "%s.%s", r->arch->name, suffix);
}

void shape_read_u32(struct shape_reader *r, const char *suffix, bool required, uint32_t min,
                    uint32_t max, uint32_t *value)
{
    if (r->rc < 0) {
        return;
    }
    char key[SHAPE_KEY_BYTES];
    shape_key(r, suffix, key);
    uint32_t v = 0;
    int rc = gguf_get_u32(r->g, key, &v);
    if (rc == -ENOENT && !required) {
        return;
    }
    if (rc == -ENOENT) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is missing", gguf_name(r->g), key);
    } else if (rc < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not one integer of 32 bits",
                         gguf_name(r->g), key);
    } else if (v < min || v > max) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is %u, must lie in %u..%u", gguf_name(r->g),
                         key, v, min, max);
    } else {
        *value = v;
    }
}

void shape_read_f32(struct shape_reader *r, const char *suffix, bool required, float min, float max,
                    float *value)
{
    if (r->rc < 0) {
        return;
    }
    char key[SHAPE_KEY_BYTES];
    shape_key(r, suffix, key);
    float v = 0;
    int rc = gguf_get_f32(r->g, key, &v);
    if (rc == -ENOENT && !required) {
        return;
    }
    if (rc == -ENOENT) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is missing", gguf_name(r->g), key);
    } else if (rc < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not a number", gguf_name(r->g), key);
    } else if (!(v >= min && v <= max)) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is %g, must lie in %g..%g", gguf_name(r->g),
                         key, (double)v, (double)min, (double)max);
    } else {
        *value = v;
    }
}

void shape_read_bool(struct shape_reader *r, const char *suffix, bool *value)
{
    if (r->rc < 0) {
        return;
    }
    char key[SHAPE_KEY_BYTES];
    shape_key(r, suffix, key);
    int rc = gguf_get_bool(r->g, key, value);
    if (rc < 0 && rc != -ENOENT) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not a bool", gguf_name(r->g), key);
    }
}

void shape_read_u32_or_equal(struct shape_reader *r, const char *suffix, uint32_t n_layers,
                             uint32_t max, uint32_t *value)
{
    char key[SHAPE_KEY_BYTES];
    shape_key(r, suffix, key);
    enum gguf_value_type type;
    uint64_t count;
    if (r->rc < 0 || gguf_get_array(r->g, key, &type, &count) < 0) {
        shape_read_u32(r, suffix, false, 1, max, value);
        return;
    }
    int32_t items[MODEL_MAX_LAYERS];
    if (count != n_layers || gguf_get_i32s(r->g, key, items, count) < 0) {
        r->rc = fmt_fail(r->err, -EINVAL, "%s: key %s is not an array of %u integers",
                         gguf_name(r->g), key, n_layers);
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        if (items[i] != items[0] || items[i] < 1 || (uint32_t)items[i] > max) {
            r->rc = fmt_fail(r->err, -ENOTSUP,
                             "%s: key %s gives layer %llu the value %d: layers that differ are not "
                             "supported",
                             gguf_name(r->g), key, (unsigned long long)i, (int)items[i]);
            return;
        }
    }
    *value = (uint32_t)items[0];
}

static bool is_understood(const struct arch *arch, const char *suffix, size_t bytes)
{
    for (size_t i = 0; i < N_UNDERSTOOD; i++) {
        if (strlen(understood_keys[i].suffix) == bytes &&
            memcmp(understood_keys[i].suffix, suffix, bytes) == 0) {
            return understood_keys[i].flags == ANY || (understood_keys[i].flags & arch->flags) != 0;
        }
    }
    return false;
}

int shape_check_understood(const struct gguf *g, const struct arch *arch, struct fmt_error *err)
{
    size_t prefix = strlen(arch->name);
    for (size_t i = 0; i < gguf_n_keys(g); i++) {
        struct gguf_string key = gguf_key_at(g, i);
        if (key.bytes <= prefix || memcmp(key.data, arch->name, prefix) != 0 ||
            key.data[prefix] != '.') {
            continue;
        }
        if (!is_understood(arch, key.data + prefix + 1, key.bytes - prefix - 1)) {
            return fmt_fail(err, -ENOTSUP,
                            "%s: key %.*s is not understood and could change the result",
                            gguf_name(g), (int)(key.bytes < 96 ? key.bytes : 96), key.data);
        }
    }
    return 0;
}
