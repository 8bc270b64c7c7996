/* plugins/cuda/program_end.c - waits for a step, and brings what it made to the host: K and V of
 * the new tokens into the host's blocks, registers of output rows when they are asked for. */
#include "plugins/cuda/program.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

/* Rows of the log on their way to the blocks: a task for each layer. */
struct scatter {
    const struct cuda_program *p;
    const struct gqa_attn_batch *batch;
    atomic_uint not_finite;
};

/* Whether a half is no number: a value, or a quant's scale. */
static uint32_t half_is_odd(uint16_t h, bool bf16)
{
    uint32_t all = bf16 ? 0x7f80u : 0x7c00u;
    return (h & all) == all;
}

/* A token's values as they were stored: halves, or quants one after the other. */
static uint32_t is_odd(uint32_t type, const uint8_t *log, uint32_t dim)
{
    size_t bytes = gqa_kv_token_bytes(type, dim);
    size_t step = cuda_kv_is_quantised(type) ? gqa_kv_token_bytes(type, GQA_KV_QUANT_DIMS) : 2;
    uint32_t odd = 0;

    for (size_t i = 0; i < bytes; i += step) {
        odd |= half_is_odd(*(const uint16_t *)(log + i), type == GQA_TYPE_BF16);
    }
    return odd;
}

/* K lies in tiles of 16 tokens: a token's halves are 32 bytes apart, its bytes of quants 16. */
static void scatter_k(uint32_t type, const uint8_t *log, char *head, uint32_t dim, uint32_t token)
{
    if (!cuda_kv_is_quantised(type)) {
        uint16_t *k = (uint16_t *)head + gqa_k_index(dim, token, 0);
        for (uint32_t d = 0; d < dim; d++) {
            k[d * GQA_KV_TILE_TOKENS] = ((const uint16_t *)log)[d];
        }
        return;
    }
    size_t quant_bytes = gqa_kv_token_bytes(type, GQA_KV_QUANT_DIMS);
    for (uint32_t d = 0; d < dim; d += GQA_KV_QUANT_DIMS, log += quant_bytes) {
        char *k = head + gqa_k_quant_byte(type, dim, token, d);
        memcpy(head + gqa_k_quant_scale(type, dim, token, d), log, 2);
        for (size_t i = 0; i < quant_bytes - 2; i++) {
            k[i * GQA_KV_TILE_TOKENS] = (char)log[2 + i];
        }
    }
}

static uint32_t scatter_row(const struct gqa_attn_layer *l, const uint8_t *log, char *page,
                            uint32_t token)
{
    size_t k_bytes = gqa_kv_token_bytes(l->k_type, l->k_dim);
    size_t v_bytes = gqa_kv_token_bytes(l->v_type, l->v_dim);
    uint32_t odd = 0;

    for (uint32_t g = 0; g < l->n_kv_heads; g++, log += k_bytes + v_bytes) {
        scatter_k(l->k_type, log, page + l->k_offset + g * l->k_head_bytes, l->k_dim, token);
        memcpy(page + l->v_offset + g * l->v_head_bytes + token * v_bytes, log + k_bytes, v_bytes);
        odd |= is_odd(l->k_type, log, l->k_dim) | is_odd(l->v_type, log + k_bytes, l->v_dim);
    }
    return odd;
}

static const struct gqa_attn_seq *seq_of_row(const struct gqa_attn_batch *b, uint32_t row)
{
    uint32_t low = 0, high = b->n_seqs - 1;

    while (low < high) {
        uint32_t middle = (low + high + 1) / 2;
        if (b->seqs[middle].first_row <= row) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return &b->seqs[low];
}

static void scatter_task(void *arg, uint32_t index, uint32_t worker)
{
    struct scatter *s = arg;
    const struct cuda_layer *l = &s->p->layers[index];
    uint32_t n_rows = s->batch->n_rows, odd = 0;
    const uint8_t *log = (const uint8_t *)s->p->host_log.at + l->log_at * n_rows;

    for (uint32_t row = 0; row < n_rows; row++) {
        const struct gqa_attn_seq *seq = seq_of_row(s->batch, row);
        uint32_t place = plugin_past(&l->host, seq) + row - seq->first_row;
        char *page = seq->tables[l->host.layer_class].pages[place / CUDA_PAGE];
        odd |= scatter_row(&l->host, log + row * cuda_log_row_bytes(&l->host), page,
                           place % CUDA_PAGE);
    }
    if (odd) {
        atomic_fetch_or_explicit(&s->not_finite, 1, memory_order_relaxed);
    }
}

/* The copies have the new tokens from now on. */
static void mark_valid(struct cuda_program *p, const struct gqa_attn_batch *b)
{
    size_t used = 0;

    for (uint32_t class = 0; class < p->n_classes; class ++) {
        const struct gqa_attn_layer l = cuda_class_layer(class);
        for (uint32_t i = 0; i < b->n_seqs; i++) {
            uint64_t past = plugin_past(&l, &b->seqs[i]), n_tokens = past + b->seqs[i].n_rows;
            for (uint32_t k = 0; k < cuda_seq_pages(&l, &b->seqs[i]); k++, used++) {
                uint64_t first = (uint64_t)k * CUDA_PAGE;
                if (p->step.page_index[used] == CUDA_NONE || first + CUDA_PAGE <= past) {
                    continue;
                }
                uint64_t n = n_tokens - first;
                cuda_pages_at(p->context->pages, p->step.page_index[used])->n_valid =
                    n < CUDA_PAGE ? (uint32_t)n : CUDA_PAGE;
            }
        }
    }
}

/* Numbers that are none are left to the host to find: what it puts into its blocks in their place
 * is copied again, since the copies do not count as valid then. */
static int bring_back(struct cuda_program *p, const struct gqa_attn_batch *b)
{
    struct scatter s = {.p = p, .batch = b};
    const struct gqa_host *host = p->context->host;
    uint64_t bytes = p->log_row_bytes * b->n_rows;

    int r = cuda_pinned_reserve(p->context, &p->host_log, bytes);
    r = r < 0 ? r : cuda_download(p->context, p->host_log.at, p->log.at, bytes);
    r = r < 0 ? r : cuda_synchronise(p->context);
    if (r < 0) {
        return r;
    }
    atomic_init(&s.not_finite, 0);
    host->parallel(host->data, scatter_task, &s, p->n_layers);
    if (atomic_load_explicit(&s.not_finite, memory_order_relaxed) == 0) {
        mark_valid(p, b);
    }
    return 0;
}

int cuda_program_end(struct cuda_program *p)
{
    if (p->step.batch == NULL) {
        return -EINVAL;
    }
    const struct gqa_attn_batch *b = p->step.batch->attention;
    int r = cuda_enter(p->context);
    if (r == 0) {
        bool appended = p->n_layers > 0 && b->commit && !p->step.failed;
        r = appended ? bring_back(p, b) : cuda_synchronise(p->context);
        if (r == 0) {
            cuda_times_end(p);
        }
        cuda_leave(p->context);
    }
    p->step.batch = NULL;
    return r;
}

float *cuda_program_data(struct cuda_program *p, uint32_t reg)
{
    if (reg >= p->n_regs || !(p->regs[reg].flags & GQA_REG_OUT)) {
        return NULL;
    }
    struct cuda_pinned *to = &p->downloads[reg];
    uint64_t bytes = (uint64_t)p->n_out * p->regs[reg].width * sizeof(float);
    int r = cuda_enter(p->context);
    if (r < 0) {
        return NULL;
    }
    /* No rows are no error: the pointer must not be NULL then either. */
    r = cuda_pinned_reserve(p->context, to, bytes > 0 ? bytes : sizeof(float));
    r = r < 0 ? r : cuda_download(p->context, to->at, p->regs[reg].rows.at, bytes);
    r = r < 0 ? r : cuda_synchronise(p->context);
    cuda_leave(p->context);
    return r == 0 ? to->at : NULL;
}
