/* plugins/cpu/attention_fresh.c - blocks for the new rows of a batch that is not to be committed.
 *
 * Kernels read blocks and nothing else: so the new rows' K and V are stored as append() would store
 * them, but in blocks of the context's, beside copies of the past tokens that share a block with
 * them. Results are those of a committed batch because the bytes are. */
#include "plugins/cpu/attention_job.h"
#include "plugins/cpu/attention_sight.h"

#include <string.h>

/* Bytes below which waking the workers costs more than it saves. */
#define CPU_ATTN_FRESH_ALONE_BYTES 65536u

static uint32_t first_block(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq)
{
    return plugin_past(layer, seq) / GQA_KV_BLOCK_TOKENS;
}

static uint32_t count_blocks(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq)
{
    uint64_t end = (uint64_t)plugin_past(layer, seq) + seq->n_rows;

    return (uint32_t)((end + GQA_KV_BLOCK_TOKENS - 1) / GQA_KV_BLOCK_TOKENS) -
           first_block(layer, seq);
}

struct cpu_attn_home cpu_attn_home_of(const struct cpu_attn_job *job, uint32_t seq, uint32_t block,
                                      uint32_t group)
{
    const struct gqa_attn_layer *layer = job->layer;
    const struct gqa_attn_seq *s = &job->batch->seqs[seq];

    if (!job->batch->commit && s->n_rows > 0 && block >= first_block(layer, s)) {
        const struct cpu_attn_fresh *fresh = &job->a->fresh;
        size_t i = (size_t)fresh->first[seq] + block - first_block(layer, s);

        if (i >= fresh->first[seq + 1]) {
            return (struct cpu_attn_home){NULL, NULL};
        }
        char *k =
            fresh->memory + (i * layer->n_kv_heads + group) * (fresh->k_bytes + fresh->v_bytes);
        return (struct cpu_attn_home){k, k + fresh->k_bytes};
    }
    const struct gqa_page_table *table = &s->tables[layer->layer_class];
    char *page = block < table->n_pages ? table->pages[block] : NULL;
    if (page == NULL) {
        return (struct cpu_attn_home){NULL, NULL};
    }
    return (struct cpu_attn_home){page + layer->k_offset + group * layer->k_head_bytes,
                                  page + layer->v_offset + group * layer->v_head_bytes};
}

/* The past tokens of a sequence's first fresh block, from their page: whole tiles of K. */
static void copy_past(const struct cpu_attn_job *job, const struct gqa_attn_seq *seq,
                      uint32_t group, struct cpu_attn_home to)
{
    const struct gqa_attn_layer *layer = job->layer;
    uint32_t n_tokens = plugin_past(layer, seq) % GQA_KV_BLOCK_TOKENS;
    uint32_t n_tiles = (n_tokens + GQA_KV_TILE_TOKENS - 1) / GQA_KV_TILE_TOKENS;
    const char *page =
        n_tokens > 0 ? seq->tables[layer->layer_class].pages[first_block(job->layer, seq)] : NULL;

    if (page != NULL) {
        memcpy(to.k, page + layer->k_offset + group * layer->k_head_bytes,
               job->a->fresh.k_bytes / (GQA_KV_BLOCK_TOKENS / GQA_KV_TILE_TOKENS) * n_tiles);
        memcpy(to.v, page + layer->v_offset + group * layer->v_head_bytes,
               job->a->fresh.v_bytes / GQA_KV_BLOCK_TOKENS * n_tokens);
    }
}

/* A task is one group of one block. */
static void fresh_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct cpu_attn_job *job = arg;
    const uint32_t *first = job->a->fresh.first;
    struct cpu_attn_worker w = cpu_attn_worker_of(job, worker);
    uint32_t block = index / job->layer->n_kv_heads, group = index % job->layer->n_kv_heads;
    uint32_t s = 0;

    while (block >= first[s + 1]) {
        s++;
    }
    const struct gqa_attn_seq *seq = &job->batch->seqs[s];
    uint32_t past = plugin_past(job->layer, seq);
    uint32_t place = (first_block(job->layer, seq) + block - first[s]) * GQA_KV_BLOCK_TOKENS;
    uint32_t row = place > past ? place - past : 0;
    uint32_t end = place + GQA_KV_BLOCK_TOKENS - past;

    if (block == first[s]) {
        copy_past(job, seq, group, cpu_attn_home_of(job, s, first_block(job->layer, seq), group));
    }
    cpu_attn_store_rows(job, s, group, row, end < seq->n_rows ? end : seq->n_rows, &w);
}

int cpu_attn_fresh_make(struct cpu_attn_job *job)
{
    const struct gqa_host *host = job->a->host;
    const struct gqa_attn_layer *layer = job->layer;
    const struct gqa_attn_batch *batch = job->batch;
    struct cpu_attn_fresh *fresh = &job->a->fresh;
    uint32_t n_blocks = 0;
    int rc = cpu_attn_grow(host, (void **)&fresh->first, &fresh->first_bytes,
                           ((size_t)batch->n_seqs + 1) * sizeof(*fresh->first));

    if (rc < 0) {
        return rc;
    }
    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        fresh->first[s] = n_blocks;
        n_blocks += batch->seqs[s].n_rows > 0 ? count_blocks(layer, &batch->seqs[s]) : 0;
    }
    fresh->first[batch->n_seqs] = n_blocks;
    fresh->k_bytes = gqa_kv_head_bytes(layer->k_type, layer->k_dim);
    fresh->v_bytes = gqa_kv_head_bytes(layer->v_type, layer->v_dim);
    size_t bytes = (size_t)n_blocks * layer->n_kv_heads * (fresh->k_bytes + fresh->v_bytes);
    rc = cpu_attn_grow(host, (void **)&fresh->memory, &fresh->memory_bytes, bytes);
    if (rc < 0) {
        return rc;
    }
    if (bytes <= CPU_ATTN_FRESH_ALONE_BYTES) {
        for (uint32_t i = 0; i < n_blocks * layer->n_kv_heads; i++) {
            fresh_task(job, i, 0);
        }
    } else {
        host->parallel(host->data, fresh_task, job, n_blocks * layer->n_kv_heads);
    }
    return 0;
}

void cpu_attn_fresh_finish(struct cpu_attn_fresh *fresh, const struct gqa_host *host)
{
    if (fresh->memory != NULL) {
        host->release(host->data, fresh->memory, fresh->memory_bytes);
    }
    if (fresh->first != NULL) {
        host->release(host->data, fresh->first, fresh->first_bytes);
    }
    *fresh = (struct cpu_attn_fresh){0};
}
