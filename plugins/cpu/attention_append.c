/* plugins/cpu/attention_append.c - stores new tokens' K and V in their blocks. */
#include "plugins/cpu/attention.h"

#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/attention_job.h"

/* Values that a worker takes at once: a few microseconds of work. */
#define CPU_ATTN_APPEND_VALUES 16384u

/* One row's K and V of one group into its page; row is scratch for k_dim converted values. */
static void append_row(const struct cpu_attn_job *job, const struct gqa_attn_seq *seq,
                       uint32_t seq_row, uint32_t group, void *row)
{
    const struct gqa_attn_layer *layer = job->layer;
    const struct gqa_attn_io *io = job->io;
    size_t batch_row = (size_t)seq->first_row + seq_row;
    uint32_t position = seq->n_past + seq_row, token = position % GQA_KV_BLOCK_TOKENS;
    char *page = seq->tables[layer->layer_class].pages[position / GQA_KV_BLOCK_TOKENS];
    const float *k = io->k + batch_row * io->k_stride + (size_t)group * layer->k_dim;
    const float *v = io->v + batch_row * io->v_stride + (size_t)group * layer->v_dim;
    char *k_page = page + layer->k_offset + group * layer->k_head_bytes;
    char *v_page = page + layer->v_offset + group * layer->v_head_bytes;
    size_t first = gqa_k_index(layer->k_dim, token, 0);

    job->a->kernels->store(layer->k_type, k, row, layer->k_dim);
    if (cpu_kv_type_bytes(layer->k_type) == 2) {
        uint16_t *tile = (uint16_t *)k_page + first;
        for (uint32_t d = 0; d < layer->k_dim; d++) {
            tile[d * GQA_KV_TILE_TOKENS] = ((const uint16_t *)row)[d];
        }
    } else {
        float *tile = (float *)k_page + first;
        for (uint32_t d = 0; d < layer->k_dim; d++) {
            tile[d * GQA_KV_TILE_TOKENS] = ((const float *)row)[d];
        }
    }
    job->a->kernels->store(layer->v_type, v,
                           v_page + gqa_v_index(layer->v_dim, token, 0) *
                                        cpu_kv_type_bytes(layer->v_type),
                           layer->v_dim);
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
                append_row(job, seq, row - seq->first_row, group, w.q);
            }
        }
    }
}

int cpu_attention_append(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                         const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    struct cpu_attn_job job;
    int rc = cpu_attn_job_init(&job, a, layer, batch, io);

    if (rc < 0 || batch->n_rows == 0) {
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
