/* daemon/model/model_facts.c - what a loaded model tells about itself. */
#include "daemon/model/model_internal.h"
#include "format/types.h"

#include <stdio.h>
#include <string.h>

static uint64_t bytes_of_type(const struct gguf *g, uint32_t type)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        bytes += t->type == type ? t->bytes : 0;
    }
    return bytes;
}

/* The type that most bytes of the file have, and a sentence for people. */
static void describe(struct model *m)
{
    uint64_t best = 0;
    const char *best_name = "";
    const struct fmt_type_info *type;
    for (size_t i = 0; (type = fmt_type_at(i)) != NULL; i++) {
        uint64_t bytes = bytes_of_type(m->gguf, type->type);
        if (bytes > best) {
            best = bytes;
            best_name = type->name;
        }
    }
    for (size_t i = 0; i < gguf_n_tensors(m->gguf); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(m->gguf, i);
        m->n_params += t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
    }
    snprintf(m->type_name, sizeof(m->type_name), "%s", best_name);
    double params = (double)m->n_params;
    bool billions = params >= 1e9;
    snprintf(m->description, sizeof(m->description), "%s %.2f%s %s", m->shape.arch->name,
             billions ? params / 1e9 : params / 1e6, billions ? "B" : "M", best_name);
}

/* Bytes that one decode step reads: packed ones for products, of experts' those of the chosen ones,
 * one row of the embeddings. */
static uint64_t weight_bytes_per_token(const struct model *m, const struct plan *p)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < p->program.n_weights; i++) {
        const struct gqa_weight *w = &p->program.weights[i];
        uint64_t values = w->ne[0] * w->ne[1] * w->ne[2] * w->ne[3];
        uint64_t as_stored = fmt_type_bytes(fmt_type_info(w->type), values);
        bool vector = w->n_dims == 1;
        if (p->program.weight_is_linear[i] || vector) {
            uint64_t all = w->packed_bytes > 0 ? w->packed_bytes : as_stored;
            bytes += w->ne[2] > 1 ? all / w->ne[2] * m->shape.n_experts_used : all;
        } else {
            bytes += as_stored / w->ne[1];
        }
    }
    return bytes;
}

/* The unit that bounds prompts: with tiles that of their class P rows. */
static const char *unit_name(const struct plan *p)
{
    const char *isa = backend_isa(p->backend);
    struct packed_facts packed;
    packed_weights_facts(p->packed, &packed);
    bool quantised = packed.bytes > 0;
    if (strcmp(isa, "amx") == 0) {
        return quantised ? "bf16-amx" : "f32-avx512";
    }
    if (strcmp(isa, "avx512") == 0) {
        return quantised ? "int8-vnni512" : "f32-avx512";
    }
    if (strcmp(isa, "avxvnni") == 0) {
        return quantised ? "int8-avxvnni" : "f32-avx2";
    }
    if (strcmp(isa, "avx2") == 0) {
        return quantised ? "int8-avx2" : "f32-avx2";
    }
    return "f32";
}

void model_facts_init(struct model *m)
{
    describe(m);
}

void model_facts(const struct model *m, struct model_facts *ret)
{
    static const char *const sources[] = {
        [PACKED_NONE] = "none",
        [PACKED_FILE] = "file",
        [PACKED_NOW] = "packed",
    };
    struct packed_facts packed;
    model_lock(m);
    const struct plan *p = m->plan;
    packed_weights_facts(p->packed, &packed);
    *ret = (struct model_facts){
        .path = m->path,
        .description = m->description,
        .type_name = m->type_name,
        .file_bytes = gguf_file_bytes(m->gguf),
        .n_params = m->n_params,
        .packed_bytes = packed.bytes,
        .packed_source = sources[packed.source],
        .packed_in_file = packed.in_file,
        .mapped_bytes = gguf_file_bytes(m->gguf),
        .weight_bytes_per_token = weight_bytes_per_token(m, p),
        .flops_per_token = m->program.flops_per_row,
        .n_ctx = m->n_ctx,
        .load_ms = m->load_ms,
        .unit = unit_name(p),
        .n_threads = m->n_threads,
    };
    snprintf(ret->program_backend, sizeof(ret->program_backend), "%s", backend_spec(p->backend));
    snprintf(ret->attention_backend, sizeof(ret->attention_backend), "%s",
             backend_spec(plan_attention(p)));
    snprintf(ret->isa, sizeof(ret->isa), "%s", backend_isa(p->backend));
    model_unlock(m);
}

const char *model_name(const struct model *m)
{
    return m->name;
}

const struct gguf *model_gguf(const struct model *m)
{
    return m->gguf;
}

const struct tokenizer *model_tokenizer(const struct model *m)
{
    return m->tokenizer;
}

const struct model_shape *model_shape(const struct model *m)
{
    return &m->shape;
}

const struct kv_layout *model_kv_layout(const struct model *m)
{
    return &m->layout;
}

uint32_t model_n_ctx(const struct model *m)
{
    return m->n_ctx;
}

uint32_t model_max_batch_rows(const struct model *m)
{
    return m->max_batch_rows;
}

uint32_t model_max_out_rows(const struct model *m)
{
    return m->max_out_rows;
}

bool model_is_encoder(const struct model *m)
{
    return (m->shape.arch->flags & ARCH_ENCODER) != 0;
}

uint32_t model_n_scores(const struct model *m)
{
    return m->program.n_scores;
}
