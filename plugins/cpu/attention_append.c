/* plugins/cpu/attention_append.c - stores new tokens' K and V in their blocks. */
#include "plugins/cpu/attention.h"

#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/attention_job.h"
#include "plugins/cpu/attention_sight.h"

#include <string.h>

/* Values that a worker takes at once: a few microseconds of work. */
#define CPU_ATTN_APPEND_VALUES 16384u

/* A copy of the values, rotated, where the type wants that. */
static const float *as_type_wants(uint32_t type, const float *values, uint32_t dim, float *row)
{
    if (!gqa_kv_rotates(type)) {
        return values;
    }
    memcpy(row, values, dim * sizeof(*row));
    gqa_kv_rotate(row, dim);
    return row;
}

/* One row's K of one group into its block. */
static void store_k(const struct cpu_attn_job *job, const float *k, uint32_t token,
                    const struct cpu_attn_worker *w, char *to)
{
    const struct gqa_attn_layer *layer = job->layer;
    size_t first = gqa_k_index(layer->k_dim, token, 0);

    if (cpu_kv_is_quant(layer->k_type)) {
        k = as_type_wants(layer->k_type, k, layer->k_dim, w->row);
        gqa_k_store_quants(layer->k_type, to, layer->k_dim, token, k);
        return;
    }
    job->a->kernels->store(layer->k_type, k, w->stored, layer->k_dim);
    if (layer->k_type != GQA_TYPE_F32) {
        uint16_t *tile = (uint16_t *)to + first;
        const uint16_t *half = (const uint16_t *)w->stored;
        for (uint32_t d = 0; d < layer->k_dim; d++) {
            tile[d * GQA_KV_TILE_TOKENS] = half[d];
        }
    } else {
        float *tile = (float *)to + first;
        for (uint32_t d = 0; d < layer->k_dim; d++) {
            tile[d * GQA_KV_TILE_TOKENS] = w->stored[d];
        }
    }
}

static void store_v(const struct cpu_attn_job *job, const float *v, uint32_t token,
                    const struct cpu_attn_worker *w, char *to)
{
    const struct gqa_attn_layer *layer = job->layer;

    if (cpu_kv_is_quant(layer->v_type)) {
        v = as_type_wants(layer->v_type, v, layer->v_dim, w->row);
        gqa_v_store_quants(layer->v_type, to, layer->v_dim, token, v);
        return;
    }
    to += token * gqa_kv_token_bytes(layer->v_type, layer->v_dim);
    job->a->kernels->store(layer->v_type, v, to, layer->v_dim);
}

void cpu_attn_store_rows(const struct cpu_attn_job *job, uint32_t seq, uint32_t group,
                         uint32_t first, uint32_t end, const struct cpu_attn_worker *w)
{
    const struct gqa_attn_layer *layer = job->layer;
    const struct gqa_attn_seq *s = &job->batch->seqs[seq];
    const struct gqa_attn_io *io = job->io;
    uint32_t past = plugin_past(layer, s);
    uint32_t block = (past + first) / GQA_KV_BLOCK_TOKENS;
    struct cpu_attn_home home = cpu_attn_home_of(job, seq, block, group);

    for (uint32_t i = first; i < end; i++) {
        size_t row = (size_t)s->first_row + i;
        uint32_t token = (past + i) % GQA_KV_BLOCK_TOKENS;

        store_k(job, io->k + row * io->k_stride + (size_t)group * layer->k_dim, token, w, home.k);
        store_v(job, io->v + row * io->v_stride + (size_t)group * layer->v_dim, token, w, home.v);
    }
}

/* A task is append_rows rows of the batch in all groups, whatever sequences they belong to. */
static void append_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct cpu_attn_job *job = arg;
    struct cpu_attn_worker w = cpu_attn_worker_of(job, worker);
    const struct gqa_attn_batch *batch = job->batch;
    uint32_t first = index * job->append_rows;
    uint32_t end =
        batch->n_rows - first < job->append_rows ? batch->n_rows : first + job->append_rows;

    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        const struct gqa_attn_seq *seq = &batch->seqs[s];
        uint32_t seq_end = seq->first_row + seq->n_rows;

        for (uint32_t row = first > seq->first_row ? first : seq->first_row;
             row < end && row < seq_end; row++) {
            for (uint32_t group = 0; group < job->layer->n_kv_heads; group++) {
                cpu_attn_store_rows(job, s, group, row - seq->first_row, row - seq->first_row + 1,
                                    &w);
            }
        }
    }
}

int cpu_attention_append(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                         const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    struct cpu_attn_job job;
    int rc = cpu_attn_job_init(&job, a, layer, batch, io);

    if (rc < 0 || batch->n_rows == 0 || !batch->commit) {
        return rc;
    }
    job.append_rows =
        1 + CPU_ATTN_APPEND_VALUES / (layer->n_kv_heads * (layer->k_dim + layer->v_dim));
    uint32_t n_tasks = (batch->n_rows + job.append_rows - 1) / job.append_rows;
    if (n_tasks == 1) {
        append_task(&job, 0, 0); /* not worth waking anybody */
    } else {
        a->host->parallel(a->host->data, append_task, &job, n_tasks);
    }
    return 0;
}
