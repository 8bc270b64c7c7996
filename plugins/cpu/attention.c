/* plugins/cpu/attention.c - the context: checks of layers and batches, and the workers' memory. */
#include "plugins/cpu/attention.h"

#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/attention_job.h"
#include "plugins/cpu/attention_sight.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CPU_ATTN_HEADS_MAX 4096u
#define CPU_ATTN_ROWS_MAX  (1u << 20)

static const struct cpu_attn_kernels *kernels_of(enum cpu_isa isa)
{
#if defined(__x86_64__)
    if (isa == CPU_ISA_AVX512 || isa == CPU_ISA_AMX) { /* tiles do not attend */
        return &cpu_attn_kernels_avx512;
    }
    if (isa == CPU_ISA_AVX2 || isa == CPU_ISA_AVXVNNI) { /* nor do products of bytes */
        return &cpu_attn_kernels_avx2;
    }
#endif
    return isa == CPU_ISA_C ? &cpu_attn_kernels_c : NULL;
}

int cpu_attention_create(const struct gqa_host *host, enum cpu_isa isa, struct cpu_attention **ret)
{
    const struct cpu_attn_kernels *kernels = kernels_of(isa);

    if (kernels == NULL || !cpu_isa_usable(isa)) {
        return -ENOTSUP;
    }
    struct cpu_attention *a = calloc(1, sizeof(*a));
    if (a == NULL) {
        return -ENOMEM;
    }
    a->host = host;
    a->kernels = kernels;
    cpu_attn_plan_init(&a->plan, host);
    *ret = a;
    return 0;
}

void cpu_attention_destroy(struct cpu_attention *a)
{
    if (a == NULL) {
        return;
    }
    if (a->scratch != NULL) {
        a->host->release(a->host->data, a->scratch, a->scratch_bytes);
    }
    if (a->depths != NULL) {
        a->host->release(a->host->data, a->depths, a->depths_bytes);
    }
    if (a->wholes != NULL) {
        a->host->release(a->host->data, a->wholes, a->wholes_bytes);
    }
    cpu_attn_fresh_finish(&a->fresh, a->host);
    cpu_attn_plan_finish(&a->plan);
    free(a);
}

/* ---- checks ------------------------------------------------------------------------------ */

static const char *unsupported(const struct gqa_attn_layer *layer)
{
    uint32_t k_alignment = cpu_kv_type_alignment(layer->k_type);
    uint32_t v_alignment = cpu_kv_type_alignment(layer->v_type);

    if (layer->struct_size < GQA_SIZE_TO(struct gqa_attn_layer, flags)) {
        return "a struct gqa_attn_layer that is shorter than in ABI 1.0";
    }
    if (layer->flags != 0) {
        return "flags of the layer that nobody had defined";
    }
    if (gqa_kv_token_bytes(layer->k_type, 1) == 0 || gqa_kv_token_bytes(layer->v_type, 1) == 0) {
        return "KV types other than F32, F16, BF16, Q8_0 and Q4_0";
    }
    if (layer->k_dim - 1 >= CPU_ATTN_DIM_MAX || layer->v_dim - 1 >= CPU_ATTN_DIM_MAX) {
        return "head dimensions outside 1..1024";
    }
    if (layer->n_kv_heads == 0 || layer->n_heads == 0 || layer->n_heads > CPU_ATTN_HEADS_MAX ||
        layer->n_heads % layer->n_kv_heads != 0) {
        return "heads that are not a multiple of the groups, or more than 4096";
    }
    if (layer->k_offset % k_alignment != 0 || layer->k_head_bytes % k_alignment != 0 ||
        layer->v_offset % v_alignment != 0 || layer->v_head_bytes % v_alignment != 0) {
        return "K or V at offsets that are not a multiple of their element";
    }
    if (!isfinite(layer->scale) || !isfinite(layer->softcap) || layer->softcap < 0.0f) {
        return "a scale or softcap that is not finite, or a negative softcap";
    }
    if (layer->rope != NULL && layer->rope->n_freqs > layer->k_dim / 2) {
        return "a rope of more dimensions than the head has";
    }
    return NULL;
}

int cpu_attention_supports(const struct gqa_attn_layer *layer, struct gqa_reason *reason)
{
    const char *what = unsupported(layer);

    if (what == NULL) {
        return 0;
    }
    if (reason != NULL) {
        snprintf(reason->text, sizeof(reason->text), "cpu attention, layer %u: no support for %s",
                 layer->layer, what);
    }
    return -ENOTSUP;
}

/* Whether all pages that hold slots [first, end) are there. */
static int has_pages(const struct gqa_page_table *table, uint64_t first, uint64_t end)
{
    if (end > (uint64_t)table->n_pages * GQA_KV_BLOCK_TOKENS) {
        return 0;
    }
    for (uint64_t i = first / GQA_KV_BLOCK_TOKENS; i * GQA_KV_BLOCK_TOKENS < end; i++) {
        if (table->pages[i] == NULL) {
            return 0;
        }
    }
    return 1;
}

/* Every page that the batch reads or writes is present; n_tokens: with the new rows, where these
 * are written. */
static int check_pages(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                       uint64_t n_tokens)
{
    if (n_tokens == 0) {
        return 0; /* nothing committed, now or before: there need be no table */
    }
    if (seq->tables == NULL) {
        return -EINVAL;
    }
    int rc = plugin_check_sight(layer, seq);
    if (rc < 0) {
        return rc;
    }
    const struct gqa_page_table *table = &seq->tables[layer->layer_class];
    int apart = plugin_first_apart(layer, seq) < seq->n_rows;
    if (!has_pages(table, plugin_first_seen(layer, seq, 0), n_tokens - table->n_dropped) ||
        (apart && !has_pages(table, 0, table->n_sinks))) {
        return -EINVAL;
    }
    return 0;
}

/* Rows in order and inside the batch. */
static int check_seq(const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                     const struct gqa_attn_seq *seq, uint32_t expected_row)
{
    uint64_t n_tokens = (uint64_t)seq->n_past + seq->n_rows;

    if (seq->first_row != expected_row || seq->n_rows > batch->n_rows - expected_row ||
        n_tokens > UINT32_MAX || (seq->mutual && seq->new_mask != NULL)) {
        return -EINVAL;
    }
    return seq->n_rows > 0 ? check_pages(layer, seq, batch->commit ? n_tokens : seq->n_past) : 0;
}

static int check(const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch)
{
    uint32_t row = 0;

    if (unsupported(layer) != NULL) {
        return -ENOTSUP;
    }
    if (batch->struct_size < GQA_SIZE_TO(struct gqa_attn_batch, shared) ||
        batch->n_rows > CPU_ATTN_ROWS_MAX) {
        return -EINVAL;
    }
    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        int rc = check_seq(layer, batch, &batch->seqs[s], row);
        if (rc < 0) {
            return rc;
        }
        row += batch->seqs[s].n_rows;
    }
    return row == batch->n_rows ? 0 : -EINVAL;
}

/* ---- scratch ----------------------------------------------------------------------------- */

static size_t round_floats(size_t n)
{
    return (n + GQA_KV_QUANT_DIMS - 1) & ~(size_t)(GQA_KV_QUANT_DIMS - 1);
}

#define LINE_FLOATS 16u /* of the cache */

struct cpu_attn_worker cpu_attn_worker_of(const struct cpu_attn_job *job, uint32_t index)
{
    float *base = (float *)job->a->scratch + index * job->worker_floats;
    size_t part = cpu_attn_part_floats(job->layer->v_dim);
    size_t n_queries = cpu_attn_piece_queries_max(job->group_size);
    struct cpu_attn_worker w;

    w.packed = (uint32_t *)(void *)base;
    w.scores = base + LINE_FLOATS;
    w.parts = w.scores + CPU_ATTN_PIECE_QUERIES * GQA_ATTN_SEGMENT_TOKENS;
    w.states = w.parts + CPU_ATTN_PIECE_QUERIES * part;
    w.row = w.states + n_queries * part;
    w.stored = w.row + job->width;
    w.q = w.stored + job->width;
    return w;
}

/* Lays out and, when a layer needs more than any before it, grows the workers' memory. */
static int grow_scratch(struct cpu_attn_job *job)
{
    const struct gqa_attn_layer *layer = job->layer;
    size_t part = cpu_attn_part_floats(layer->v_dim);
    size_t n_queries = cpu_attn_piece_queries_max(job->group_size);

    job->width = round_floats(layer->k_dim > layer->v_dim ? layer->k_dim : layer->v_dim);
    job->worker_floats = LINE_FLOATS + CPU_ATTN_PIECE_QUERIES * (GQA_ATTN_SEGMENT_TOKENS + part) +
                         n_queries * part + 2 * job->width + round_floats(n_queries * layer->k_dim);
    int rc = cpu_attn_grow(job->a->host, &job->a->scratch, &job->a->scratch_bytes,
                           job->worker_floats * sizeof(float) * job->a->host->n_threads);
    for (uint32_t i = 0; rc == 0 && i < job->a->host->n_threads; i++) {
        *cpu_attn_worker_of(job, i).packed = CPU_ATTN_NOT_PACKED;
    }
    return rc;
}

int cpu_attn_job_init(struct cpu_attn_job *job, struct cpu_attention *a,
                      const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                      const struct gqa_attn_io *io)
{
    int rc = check(layer, batch);

    if (rc < 0) {
        return rc;
    }
    *job = (struct cpu_attn_job){
        .a = a,
        .layer = layer,
        .batch = batch,
        .io = io,
        .group_size = layer->n_heads / layer->n_kv_heads,
    };
    return grow_scratch(job);
}
