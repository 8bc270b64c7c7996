#include "tests/unit/engine/tiny.h"

#include "format/types.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TENSORS 128

struct plan {
    struct {
        char name[64];
        uint32_t n_dims;
        uint64_t ne[2];
    } items[MAX_TENSORS];
    size_t n;
};

static void need(int rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "tiny model: %s: %s\n", what, strerror(-rc));
        exit(99);
    }
}

struct tiny tiny_default(void)
{
    return (struct tiny){
        .arch = "llama",
        .n_layers = 2,
        .n_embd = 32,
        .n_heads = 4,
        .n_kv_heads = 2,
        .n_ff = 64,
        .n_ctx = 512,
        .n_embd_rows = TINY_VOCAB,
        .seed = 1,
    };
}

static bool is(const char *wanted, const char *name)
{
    return wanted != NULL && strcmp(wanted, name) == 0;
}

static void add_u32(struct gguf_writer *w, const struct tiny *t, const char *key, uint32_t value)
{
    char name[96];
    snprintf(name, sizeof(name), "%s.%s", t->arch, key);
    if (!is(t->without_key, key)) {
        need(gguf_writer_add_u32(w, name, value), name);
    }
}

void tiny_add_vocabulary(struct gguf_writer *w)
{
    static char pieces[TINY_VOCAB][16];
    struct gguf_string tokens[TINY_VOCAB];
    float scores[TINY_VOCAB];
    int32_t kinds[TINY_VOCAB];
    for (uint32_t i = 0; i < TINY_VOCAB; i++) {
        static const char *const control[] = {"<unk>", "<s>", "</s>"};
        if (i < 3) {
            snprintf(pieces[i], sizeof(pieces[i]), "%s", control[i]);
        } else if (i < 259) {
            snprintf(pieces[i], sizeof(pieces[i]), "<0x%02X>", i - 3);
        } else {
            snprintf(pieces[i], sizeof(pieces[i]), "w%u", i);
        }
        tokens[i] = (struct gguf_string){pieces[i], strlen(pieces[i])};
        scores[i] = -(float)i;
        kinds[i] = i == 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1;
    }
    gguf_writer_add_string(w, "tokenizer.ggml.model", "llama");
    gguf_writer_add_strings(w, "tokenizer.ggml.tokens", tokens, TINY_VOCAB);
    gguf_writer_add_f32s(w, "tokenizer.ggml.scores", scores, TINY_VOCAB);
    gguf_writer_add_i32s(w, "tokenizer.ggml.token_type", kinds, TINY_VOCAB);
    gguf_writer_add_u32(w, "tokenizer.ggml.bos_token_id", 1);
    need(gguf_writer_add_u32(w, "tokenizer.ggml.eos_token_id", TINY_EOS), "vocabulary");
}

static void plan_tensor(struct plan *p, const struct tiny *t, const char *name, uint64_t n_in,
                        uint64_t n_out)
{
    bool wide = is(t->wide_tensor, name);
    if (is(t->without_tensor, name)) {
        return;
    }
    snprintf(p->items[p->n].name, sizeof(p->items[p->n].name), "%s", name);
    p->items[p->n].n_dims = n_out > 0 ? 2 : 1;
    p->items[p->n].ne[0] = n_in + (wide && n_out == 0);
    p->items[p->n].ne[1] = n_out > 0 ? n_out + wide : 1;
    p->n++;
}

static void plan_model(struct plan *p, const struct tiny *t)
{
    uint32_t dim = t->n_embd / t->n_heads, kv = dim * t->n_kv_heads;
    const struct {
        const char *name;
        uint32_t n_in, n_out;
    } parts[] = {
        {"attn_norm", t->n_embd, 0},
        {"attn_q", t->n_embd, dim * t->n_heads},
        {"attn_k", t->n_embd, kv},
        {"attn_v", t->n_embd, kv},
        {"attn_output", dim * t->n_heads, t->n_embd},
        {"ffn_norm", t->n_embd, 0},
        {"ffn_gate", t->n_embd, t->n_ff},
        {"ffn_up", t->n_embd, t->n_ff},
        {"ffn_down", t->n_ff, t->n_embd},
    };
    plan_tensor(p, t, "token_embd.weight", t->n_embd, t->n_embd_rows);
    for (uint32_t layer = 0; layer < t->n_layers; layer++) {
        for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
            char name[64];
            snprintf(name, sizeof(name), "blk.%u.%s.weight", layer, parts[i].name);
            plan_tensor(p, t, name, parts[i].n_in, parts[i].n_out);
        }
    }
    plan_tensor(p, t, "output_norm.weight", t->n_embd, 0);
    plan_tensor(p, t, "output.weight", t->n_embd, t->n_embd_rows);
    if (t->n_scores > 0) {
        plan_tensor(p, t, "cls.weight", t->n_embd, t->n_embd);
        plan_tensor(p, t, "cls.bias", t->n_embd, 0);
        plan_tensor(p, t, "cls.output.weight", t->n_embd, t->n_scores);
        plan_tensor(p, t, "cls.output.bias", t->n_scores, 0);
    }
    if (t->extra_tensor != NULL) {
        plan_tensor(p, t, t->extra_tensor, 4, 0);
    }
}

/* Vectors are ones; matrices random, wide enough that tokens differ. */
static void write_values(struct gguf_writer *w, uint64_t n_in, uint64_t n_out, uint32_t n_dims,
                         uint64_t *x)
{
    size_t n = n_in * n_out;
    float *values = malloc(n * sizeof(*values));
    need(values == NULL ? -12 : 0, "memory");
    float scale = 3.0f / sqrtf((float)n_in);
    for (size_t i = 0; i < n; i++) {
        *x ^= *x << 13;
        *x ^= *x >> 7;
        *x ^= *x << 17;
        values[i] = n_dims == 1 ? 1 : scale * ((float)(*x >> 40) / 8388608.0f - 1);
    }
    need(gguf_writer_write(w, values, n * sizeof(*values)), "values");
    free(values);
}

void tiny_write(const struct tiny *t, const char *path)
{
    struct gguf_writer *w;
    struct plan plan = {.n = 0};
    uint64_t x = t->seed * 0x9e3779b97f4a7c15u + 1;
    need(gguf_writer_create(path, &w), path);
    gguf_writer_add_string(w, "general.architecture", t->arch);
    add_u32(w, t, "context_length", t->n_ctx);
    add_u32(w, t, "embedding_length", t->n_embd);
    add_u32(w, t, "block_count", t->n_layers);
    add_u32(w, t, "feed_forward_length", t->n_ff);
    add_u32(w, t, "attention.head_count", t->n_heads);
    add_u32(w, t, "attention.head_count_kv", t->n_kv_heads);
    char name[96];
    snprintf(name, sizeof(name), "%s.attention.layer_norm_rms_epsilon", t->arch);
    need(gguf_writer_add_f32(w, name, 1e-5f), name);
    tiny_add_vocabulary(w);
    if (t->add_keys != NULL) {
        t->add_keys(w);
    }
    plan_model(&plan, t);
    for (size_t i = 0; i < plan.n; i++) {
        need(gguf_writer_add_tensor(w, plan.items[i].name, FMT_TYPE_F32, plan.items[i].n_dims,
                                    plan.items[i].ne),
             plan.items[i].name);
    }
    need(gguf_writer_begin_data(w), "data");
    for (size_t i = 0; i < plan.n; i++) {
        write_values(w, plan.items[i].ne[0], plan.items[i].ne[1], plan.items[i].n_dims, &x);
    }
    need(gguf_writer_finish(w), path);
    gguf_writer_destroy(w);
}
