/* plugins/cuda/program_begin.c - takes a batch to the device: rows of embeddings (whose tables stay
 * on the host: a step needs few of their rows), angles, and the copies of the KV blocks. */
#include "plugins/cuda/program.h"

#include "format/types.h"

#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static int check_batch(const struct cuda_program *p, const struct gqa_batch *b)
{
    if (b->n_rows == 0 || b->n_rows > p->max_rows || b->n_out > p->max_out_rows ||
        (b->tokens == NULL && b->embeddings == NULL) || (p->n_ropes > 0 && b->positions == NULL) ||
        (p->n_layers > 0 && (b->attention == NULL || b->attention->n_rows != b->n_rows))) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < b->n_out; i++) {
        if (b->out_rows[i] >= b->n_rows) {
            return -EINVAL;
        }
    }
    for (uint32_t i = 0; b->adapters != NULL && i < b->n_rows; i++) {
        if (b->adapters[i] != GQA_NONE &&
            plugin_adapters_find(&p->adapters.all, b->adapters[i]) == GQA_NONE) {
            return -EINVAL;
        }
    }
    return 0;
}

/* ---- embeddings and angles --------------------------------------------------------------- */

static int embed_row(const struct cuda_op *op, const struct gqa_batch *b, uint32_t row, float *to)
{
    const struct fmt_type_info *type = fmt_type_info(op->table.type);
    uint32_t width = op->op.dst.width, by = op->op.u.embed.row;
    int64_t index = 0;

    if (by == GQA_EMBED_TOKEN && b->embeddings != NULL) {
        memcpy(to, b->embeddings + (size_t)row * width, width * sizeof(*to));
        return 0;
    }
    if (by == GQA_EMBED_POSITION && b->positions == NULL) {
        return -EINVAL;
    }
    if (by != GQA_EMBED_FIRST) {
        index = by == GQA_EMBED_TOKEN ? (int64_t)b->tokens[row] : (int64_t)b->positions[row];
    }
    if (index < 0 || (uint64_t)index >= op->table.ne[1]) {
        return -EINVAL;
    }
    type->dequantise((const char *)op->table.data + (uint64_t)index * fmt_type_bytes(type, width),
                     to, width);
    for (uint32_t i = 0; op->op.scale != 1.0f && i < width; i++) {
        to[i] *= op->op.scale;
    }
    return 0;
}

static void fill_angles(const struct cuda_rope *rope, const struct gqa_batch *b, uint32_t row,
                        float *to)
{
    float *cosines = to + (size_t)row * rope->n_freqs;
    float *sines = cosines + (size_t)b->n_rows * rope->n_freqs;

    for (uint32_t i = 0; i < rope->n_freqs; i++) {
        double angle = (double)b->positions[row] * rope->freqs[i];
        cosines[i] = (float)(cos(angle) * (double)rope->magnitude);
        sines[i] = (float)(sin(angle) * (double)rope->magnitude);
    }
}

/* Floats of a row of what an op, or a table of angles, has in the staging memory. */
static uint32_t embed_width(const struct cuda_op *op)
{
    return op->op.kind == GQA_OP_EMBED ? op->op.dst.width : 0;
}

/* All that the host computes of a step, on its way: n_out output rows, then for each EMBED its
 * rows, then for each table cosines and sines. A task for some rows of all of these: a prompt's are
 * worth the host's workers. */
struct inputs {
    const struct cuda_program *p;
    const struct gqa_batch *batch;
    float *at; /* behind the output rows */
    atomic_int failed;
};

#define ROWS_OF_TASK 32u

static void fill_task(void *arg, uint32_t index, uint32_t worker)
{
    struct inputs *in = arg;
    const struct gqa_batch *b = in->batch;
    uint32_t first = index * ROWS_OF_TASK, left = b->n_rows - first;
    uint32_t end = first + (left < ROWS_OF_TASK ? left : ROWS_OF_TASK);
    float *at = in->at;
    int r = 0;

    for (uint32_t i = 0; i < in->p->n_ops; i++) {
        const struct cuda_op *op = &in->p->ops[i];
        uint32_t width = embed_width(op);
        for (uint32_t row = first; r == 0 && width > 0 && row < end; row++) {
            r = embed_row(op, b, row, at + (size_t)row * width);
        }
        at += (size_t)b->n_rows * width;
    }
    for (uint32_t i = 0; i < in->p->n_ropes; i++) {
        for (uint32_t row = first; row < end; row++) {
            fill_angles(&in->p->ropes[i], b, row, at);
        }
        at += 2 * (size_t)b->n_rows * in->p->ropes[i].n_freqs;
    }
    if (r < 0) {
        atomic_store_explicit(&in->failed, r, memory_order_relaxed);
    }
}

/* Into pinned memory, and from there to the device. */
static int upload_inputs(struct cuda_program *p, const struct gqa_batch *b)
{
    struct inputs in = {.p = p, .batch = b};
    uint64_t floats = b->n_out;

    for (uint32_t i = 0; i < p->n_ops; i++) {
        floats += (uint64_t)b->n_rows * embed_width(&p->ops[i]);
    }
    for (uint32_t i = 0; i < p->n_ropes; i++) {
        floats += 2 * (uint64_t)b->n_rows * p->ropes[i].n_freqs;
    }
    int r = cuda_pinned_reserve(p->context, &p->staging, floats * sizeof(float));
    if (r < 0) {
        return r;
    }
    if (b->n_out > 0) {
        memcpy(p->staging.at, b->out_rows, b->n_out * sizeof(uint32_t));
        r = cuda_upload(p->context, p->out_rows.at, p->staging.at, b->n_out * sizeof(uint32_t));
    }
    in.at = (float *)p->staging.at + b->n_out;
    p->context->host->parallel(p->context->host->data, fill_task, &in,
                               (b->n_rows + ROWS_OF_TASK - 1) / ROWS_OF_TASK);
    r = r < 0 ? r : atomic_load_explicit(&in.failed, memory_order_relaxed);
    for (uint32_t i = 0; r == 0 && i < p->n_ops; i++) {
        size_t n = (size_t)b->n_rows * embed_width(&p->ops[i]);
        r = cuda_upload(p->context, p->ops[i].embeddings.at, in.at, n * sizeof(float));
        in.at += n;
    }
    for (uint32_t i = 0; r == 0 && i < p->n_ropes; i++) {
        size_t n = 2 * (size_t)b->n_rows * p->ropes[i].n_freqs;
        r = cuda_upload(p->context, p->ropes[i].angles.at, in.at, n * sizeof(float));
        in.at += n;
    }
    return r;
}

/* ---- pages ------------------------------------------------------------------------------- */

/* One page of a sequence: its block's copy, or with commit = 0 a page for this batch alone where
 * new rows come. */
static int take_page(struct cuda_program *p, const struct gqa_attn_batch *b,
                     const struct gqa_attn_seq *s, uint32_t class, uint32_t i, uint32_t *ret)
{
    struct cuda_pages *pages = p->context->pages;
    const struct gqa_attn_layer l = cuda_class_layer(class);
    const struct gqa_page_table *table = plugin_table(&l, s);
    uint64_t bytes = p->class_bytes[class], first = (uint64_t)i * CUDA_PAGE;
    uint64_t past = plugin_past(&l, s);
    uint32_t n_there = past > first ? (uint32_t)(past - first) : 0;
    uint32_t index = CUDA_NONE;
    bool has_new = first + CUDA_PAGE > past;
    bool needed = n_there > 0 || b->commit;

    n_there = n_there < CUDA_PAGE ? n_there : CUDA_PAGE;
    *ret = CUDA_NONE;
    if (!cuda_page_is_seen(&l, s, i)) { /* between a view's sinks and what is recent */
        return 0;
    }
    if (needed && i >= table->n_pages) {
        return -EINVAL;
    }
    if (needed && table->pages[i] == NULL) { /* before the window of all rows */
        return has_new ? -EINVAL : 0;
    }
    int r = 0;
    if (needed) {
        uint64_t version = table->versions != NULL ? table->versions[i] : 0;
        r = cuda_pages_get(pages, table->pages[i], version, bytes, n_there, &index);
    }
    if (r == 0 && has_new && !b->commit) {
        uint32_t copied = index;
        r = cuda_pages_get(pages, NULL, 0, bytes, 0, &index);
        if (r == 0 && copied != CUDA_NONE) {
            r = cuda_check(p->context,
                           CUDA(&p->context->driver, cuMemcpyDtoDAsync)(
                               cuda_pages_at(pages, index)->at, cuda_pages_at(pages, copied)->at,
                               bytes, p->context->stream),
                           "copying a page");
        }
    }
    *ret = index;
    return r;
}

/* Views that make no sense are refused before anything is counted by them. */
static int check_sights(const struct cuda_program *p, const struct gqa_attn_batch *b)
{
    int r = 0;

    for (uint32_t k = 0; k < p->n_kinds; k++) {
        const struct gqa_attn_layer *l = &p->layers[p->kind_layers[k]].host;
        for (uint32_t i = 0; r == 0 && i < b->n_seqs; i++) {
            r = plugin_check_sight(l, &b->seqs[i]);
        }
    }
    return r;
}

static size_t pages_of_classes(const struct gqa_attn_batch *b, uint32_t n_classes)
{
    size_t n = 0;

    for (uint32_t class = 0; class < n_classes; class ++) {
        const struct gqa_attn_layer l = cuda_class_layer(class);
        for (uint32_t i = 0; i < b->n_seqs; i++) {
            n += cuda_seq_pages(&l, &b->seqs[i]);
        }
    }
    return n;
}

static int take_pages(struct cuda_program *p, const struct gqa_attn_batch *b)
{
    size_t n = pages_of_classes(b, p->n_classes), used = 0;
    int r = 0;

    if (n > p->step.n_pages) {
        free(p->step.page_index);
        free(p->step.page_at);
        p->step.page_index = calloc(n, sizeof(*p->step.page_index));
        p->step.page_at = calloc(n, sizeof(*p->step.page_at));
        bool there = p->step.page_index != NULL && p->step.page_at != NULL;
        p->step.n_pages = there ? n : 0;
        r = there ? 0 : -ENOMEM;
    }
    cuda_pages_begin(p->context->pages);
    for (uint32_t class = 0; r == 0 && class < p->n_classes; class ++) {
        const struct gqa_attn_layer l = cuda_class_layer(class);
        for (uint32_t i = 0; r == 0 && i < b->n_seqs; i++) {
            for (uint32_t k = 0; r == 0 && k < cuda_seq_pages(&l, &b->seqs[i]); k++, used++) {
                uint32_t index = CUDA_NONE;
                r = take_page(p, b, &b->seqs[i], class, k, &index);
                bool there = r == 0 && index != CUDA_NONE;
                p->step.page_index[used] = index;
                p->step.page_at[used] = there ? cuda_pages_at(p->context->pages, index)->at : 0;
            }
        }
    }
    return r;
}

static int make_plans(struct cuda_program *p, const struct gqa_attn_batch *b)
{
    const uint64_t **of_seq = calloc(b->n_seqs + 1, sizeof(*of_seq));
    int r = of_seq == NULL ? -ENOMEM : 0;

    for (uint32_t k = 0; r == 0 && k < p->n_kinds; k++) {
        const struct gqa_attn_layer *l = &p->layers[p->kind_layers[k]].host;
        size_t used = pages_of_classes(b, l->layer_class);
        for (uint32_t i = 0; i < b->n_seqs; i++) {
            of_seq[i] = p->step.page_at + used;
            used += cuda_seq_pages(l, &b->seqs[i]);
        }
        r = cuda_plan_make(p->context, &p->plans[k], l, b, of_seq);
    }
    free(of_seq);
    return r;
}

/* Whether rows of prompts go a way of their own, and there are some. */
static bool has_prompt(const struct cuda_program *p, const struct gqa_batch *b)
{
    const uint8_t *classes = p->has_lt && b->attention != NULL ? b->attention->row_class : NULL;

    return classes != NULL && memchr(classes, GQA_ROW_P, b->n_rows) != NULL;
}

int cuda_program_begin(struct cuda_program *p, const struct gqa_batch *batch)
{
    int r = check_batch(p, batch);

    r = r < 0 ? r : cuda_enter(p->context);
    if (r < 0) {
        return r;
    }
    r = p->n_layers > 0 ? check_sights(p, batch->attention) : 0;
    r = r < 0 ? r : upload_inputs(p, batch);
    r = r < 0 ? r : cuda_adapters_begin(p, batch, &p->step.adapted);
    if (r == 0 && p->n_layers > 0) {
        r = take_pages(p, batch->attention);
        r = r < 0 ? r : make_plans(p, batch->attention);
    }
    if (r < 0) {
        cuda_synchronise(p->context);
    }
    cuda_times_begin(p);
    cuda_leave(p->context);
    p->step.batch = r == 0 ? batch : NULL;
    p->step.failed = false;
    p->step.apart = has_prompt(p, batch);
    p->n_out = batch->n_out;
    return r;
}
