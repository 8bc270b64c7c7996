#include "tools/convert/checkpoint.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int checkpoint_open(const char *path, struct checkpoint **ret, struct fmt_error *err)
{
    struct stat st;
    if (stat(path, &st) < 0) {
        return fmt_fail(err, -errno, "%s: %s", path, strerror(errno));
    }
    return S_ISDIR(st.st_mode) ? hf_checkpoint_open(path, ret, err)
                               : gguf_checkpoint_open(path, ret, err);
}

void checkpoint_close(struct checkpoint *c)
{
    if (c != NULL) {
        c->container->close(c);
    }
}

enum ck_pairs ck_gguf_pairs(const char *architecture)
{
    static const char *const neighbours[] = {"llama",   "mistral",    "mistral3",
                                             "granite", "granitemoe", "smollm3"};
    static const char *const halves[] = {"qwen2", "qwen2moe", "qwen3",  "qwen3moe",
                                         "gemma", "gemma2",   "gemma3", "gemma3_text",
                                         "phi3",  "gpt-oss",  "gpt_oss"};
    for (size_t i = 0; i < sizeof(neighbours) / sizeof(neighbours[0]); i++) {
        if (strcmp(neighbours[i], architecture) == 0) {
            return CK_PAIRS_NEIGHBOURS;
        }
    }
    for (size_t i = 0; i < sizeof(halves) / sizeof(halves[0]); i++) {
        if (strcmp(halves[i], architecture) == 0) {
            return CK_PAIRS_HALVES;
        }
    }
    return CK_PAIRS_UNKNOWN;
}

const struct ck_tensor *checkpoint_find(const struct checkpoint *c, enum ck_role role,
                                        uint32_t layer, bool is_matrix)
{
    for (size_t i = 0; i < c->n_tensors; i++) {
        const struct ck_tensor *t = &c->tensors[i];
        if (t->role == role && t->layer == layer && t->is_matrix == is_matrix) {
            return t;
        }
    }
    return NULL;
}

void ck_tensor_release(const struct ck_tensor *t)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)t->data + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)t->data + t->bytes) & ~(page - 1);
    if (end > first) {
        madvise((void *)first, end - first, MADV_DONTNEED); /* advice: a refusal costs memory */
    }
}

/* ---- names ------------------------------------------------------------------------------- */

/* What follows "blk.N." in a GGUF, or "layers.N." in a checkpoint of Hugging Face. */
static const struct {
    const char *name;
    enum ck_role role;
} role_names[] = {
    {"attn_q.weight", CK_Q},
    {"attn_q.bias", CK_Q},
    {"attn_k.weight", CK_K},
    {"attn_k.bias", CK_K},
    {"attn_v.weight", CK_V},
    {"attn_v.bias", CK_V},
    {"attn_qkv.weight", CK_QKV},
    {"attn_qkv.bias", CK_QKV},
    {"attn_output.weight", CK_OUT},
    {"attn_sinks.weight", CK_SINKS},
    {"attn_k_norm.weight", CK_K_NORM},
    {"self_attn.q_proj.weight", CK_Q},
    {"self_attn.q_proj.bias", CK_Q},
    {"self_attn.k_proj.weight", CK_K},
    {"self_attn.k_proj.bias", CK_K},
    {"self_attn.v_proj.weight", CK_V},
    {"self_attn.v_proj.bias", CK_V},
    {"self_attn.qkv_proj.weight", CK_QKV},
    {"self_attn.qkv_proj.bias", CK_QKV},
    {"self_attn.o_proj.weight", CK_OUT},
    {"self_attn.sinks", CK_SINKS},
    {"self_attn.k_norm.weight", CK_K_NORM},
};

/* The text after "blk." or "layers.", and the number there. NULL: none. */
static const char *after_layer(const char *name, uint32_t *ret_layer)
{
    const char *at = strncmp(name, "blk.", 4) == 0 ? name + 4 : strstr(name, "layers.");
    if (at == NULL) {
        return NULL;
    }
    at += *at == 'l' ? strlen("layers.") : 0;
    char *end;
    unsigned long layer = strtoul(at, &end, 10);
    if (*at < '0' || *at > '9' || *end != '.' || layer >= CK_MAX_LAYERS) {
        return NULL;
    }
    *ret_layer = (uint32_t)layer;
    return end + 1;
}

void ck_role_by_name(struct ck_tensor *t)
{
    const char *rest = after_layer(t->name, &t->layer);
    t->role = CK_OTHER;
    for (size_t i = 0; rest != NULL && i < sizeof(role_names) / sizeof(role_names[0]); i++) {
        if (strcmp(rest, role_names[i].name) == 0) {
            t->role = role_names[i].role;
        }
    }
}

/* ---- is it attention as we know it? ------------------------------------------------------ */

/* How many rows (columns of an output matrix) the role has for the shape; 0: any. */
static uint64_t wanted_rows(const struct ck_shape *s, const struct ck_tensor *t)
{
    const uint64_t q = (uint64_t)s->n_heads * s->k_dim, k = (uint64_t)s->n_kv_heads * s->k_dim,
                   v = (uint64_t)s->n_kv_heads * s->v_dim;
    switch (t->role) {
    case CK_Q:
        return q;
    case CK_K:
        return k;
    case CK_V:
        return v;
    case CK_QKV:
        return q + k + v;
    case CK_OUT:
        return (uint64_t)s->n_heads * s->v_dim;
    case CK_SINKS:
        return s->n_heads;
    case CK_K_NORM:
        return s->k_dim;
    default:
        return 0;
    }
}

static int check_tensor(const struct ck_shape *s, const struct ck_tensor *t, struct fmt_error *err)
{
    uint64_t wanted = wanted_rows(s, t);
    uint64_t there = t->role == CK_OUT ? t->row_values : t->n_rows;
    if (t->role == CK_OTHER || (t->role == CK_OUT && !t->is_matrix)) {
        return 0;
    }
    if (t->layer >= s->n_layers) {
        return fmt_fail(err, -EINVAL, "tensor %s: the model has %u layers", t->name, s->n_layers);
    }
    if (t->type == NULL) {
        return fmt_fail(err, -ENOTSUP, "tensor %s: its type is not known", t->name);
    }
    if (t->role == CK_K_NORM && there != wanted) {
        return fmt_fail(err, -ENOTSUP,
                        "tensor %s: a norm over all heads together (%" PRIu64 " gains, a head has "
                        "%u): heads cannot be pooled under it without changing what it divides by",
                        t->name, there, s->k_dim);
    }
    if (there != wanted) {
        return fmt_fail(err, -EINVAL,
                        "tensor %s: %" PRIu64 " %s, %u heads and %u KV heads of %u and %u values "
                        "need %" PRIu64,
                        t->name, there, t->role == CK_OUT ? "columns" : "rows", s->n_heads,
                        s->n_kv_heads, s->k_dim, s->v_dim, wanted);
    }
    return 0;
}

int checkpoint_check(const struct checkpoint *c, struct fmt_error *err)
{
    for (size_t i = 0; i < c->n_tensors; i++) {
        int rc = check_tensor(&c->shape, &c->tensors[i], err);
        if (rc < 0) {
            return rc;
        }
    }
    for (uint32_t layer = 0; layer < c->shape.n_layers; layer++) {
        bool fused = checkpoint_find(c, CK_QKV, layer, true) != NULL;
        bool apart = checkpoint_find(c, CK_Q, layer, true) != NULL &&
                     checkpoint_find(c, CK_K, layer, true) != NULL &&
                     checkpoint_find(c, CK_V, layer, true) != NULL;
        if (fused == apart || checkpoint_find(c, CK_OUT, layer, true) == NULL) {
            return fmt_fail(err, -ENOTSUP,
                            "layer %u of this %s model: q, k, v and output are not among its "
                            "tensors under the names that are known, once each",
                            layer, c->shape.architecture);
        }
    }
    return 0;
}
