#include "plugins/cuda/program.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- on the device ----------------------------------------------------------------------- */

/* (n_out, rank) as (rank, n_out), so that neighbouring threads read neighbouring values. */
static void transpose(const struct gqa_weight *w, void *ret)
{
    size_t value = w->type == GQA_TYPE_F32 ? 4 : 2;

    for (uint64_t out = 0; out < w->ne[1]; out++) {
        for (uint64_t r = 0; r < w->ne[0]; r++) {
            memcpy((char *)ret + (r * w->ne[1] + out) * value,
                   (const char *)w->data + (out * w->ne[0] + r) * value, value);
        }
    }
}

static int upload_factors(struct cuda_program *p, const struct gqa_program_desc *desc,
                          const struct gqa_adapter *from, struct cuda_buffer factors[2])
{
    const struct gqa_weight *a = &desc->weights[from->a], *b = &desc->weights[from->b];
    uint64_t a_bytes = a->ne[0] * a->ne[1] * (a->type == GQA_TYPE_F32 ? 4 : 2);
    uint64_t b_bytes = b->ne[0] * b->ne[1] * (b->type == GQA_TYPE_F32 ? 4 : 2);
    void *turned = malloc(b_bytes);
    int r = turned == NULL ? -ENOMEM : cuda_program_upload(p, a->data, a_bytes, &factors[0]);

    if (r == 0) {
        transpose(b, turned);
        r = cuda_program_upload(p, turned, b_bytes, &factors[1]);
    }
    free(turned);
    return r;
}

static int reserve_order(struct cuda_program *p, struct cuda_adapter_order *order, uint64_t n_rows)
{
    uint64_t n_tiles = cuda_groups_max(n_rows, p->adapters.all.n_ids, CUDA_TILE);
    int r = cuda_buffer_reserve(p->context, &order->rows, (n_rows + 1) * sizeof(uint32_t));

    return r < 0 ? r
                 : cuda_buffer_reserve(p->context, &order->tiles,
                                       (n_tiles + 1) * sizeof(struct cuda_adapter_tile));
}

int cuda_adapters_init(struct cuda_program *p, const struct gqa_program_desc *desc)
{
    struct cuda_adapters *a = &p->adapters;
    int r = 0;

    if (a->all.n == 0) {
        return 0;
    }
    a->factors = calloc(2 * (size_t)a->all.n, sizeof(*a->factors));
    if (a->factors == NULL) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; r == 0 && i < a->all.n; i++) {
        const struct gqa_adapter *from = &a->all.all[i];
        uint32_t rank = (uint32_t)desc->weights[from->a].ne[1];
        a->low_width = rank > a->low_width ? rank : a->low_width;
        r = upload_factors(p, desc, from, &a->factors[2 * i]);
    }
    r = r < 0 ? r : reserve_order(p, &a->rows, p->max_rows);
    r = r < 0 ? r : reserve_order(p, &a->out_rows, p->max_out_rows);
    return r < 0 ? r
                 : cuda_buffer_reserve(p->context, &a->low,
                                       (uint64_t)p->max_rows * a->low_width * sizeof(float));
}

void cuda_adapters_finish(struct cuda_program *p)
{
    struct cuda_adapters *a = &p->adapters;
    struct cuda_buffer *all[] = {&a->low, &a->rows.rows, &a->rows.tiles, &a->out_rows.rows,
                                 &a->out_rows.tiles};

    for (uint32_t i = 0; a->factors != NULL && i < 2 * a->all.n; i++) {
        cuda_buffer_finish(p->context, &a->factors[i]);
    }
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        cuda_buffer_finish(p->context, all[i]);
    }
}

int cuda_adapters_table(struct cuda_program *p, const struct gqa_program_desc *desc,
                        uint32_t weight, struct cuda_adapter_table *ret)
{
    struct cuda_adapters *a = &p->adapters;
    uint32_t n, first = plugin_adapters_of(&a->all, weight, &n);

    if (n == 0) {
        return 0;
    }
    struct cuda_adapter *entries = calloc(a->all.n_ids, sizeof(*entries));
    if (entries == NULL) {
        return -ENOMEM;
    }
    for (uint32_t i = first; i < first + n; i++) {
        const struct gqa_adapter *from = &a->all.all[i];
        uint32_t rank = (uint32_t)desc->weights[from->a].ne[1];
        entries[plugin_adapters_find(&a->all, from->id)] = (struct cuda_adapter){
            .a = cuda_pointer(a->factors[2 * i].at),
            .b = cuda_pointer(a->factors[2 * i + 1].at),
            .rank = rank,
            .a_type = desc->weights[from->a].type,
            .b_type = desc->weights[from->b].type,
            .scale = from->scale,
        };
        ret->rank = rank > ret->rank ? rank : ret->rank;
    }
    int r = cuda_program_upload(p, entries, a->all.n_ids * sizeof(*entries), &ret->entries);
    free(entries);
    return r;
}

/* ---- a step ------------------------------------------------------------------------------ */

/* n rows by their adapters' places; NULL out_rows: the batch's rows themselves. rows (n) and tiles
 * (order->n_tiles) are filled, and next (n_ids + 1) is room. */
static void sort_rows(const struct cuda_adapters *a, const struct gqa_batch *b,
                      const uint32_t *out_rows, uint32_t n, uint32_t n_tiles, uint32_t *next,
                      uint32_t *rows, struct cuda_adapter_tile *tiles)
{
    uint32_t n_ids = a->all.n_ids, used = 0;

    memset(next, 0, (n_ids + 1) * sizeof(*next));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t id = b->adapters[out_rows != NULL ? out_rows[i] : i];
        if (id != GQA_NONE) {
            next[plugin_adapters_find(&a->all, id) + 1]++;
        }
    }
    for (uint32_t k = 0; k < n_ids; k++) {
        uint32_t first = next[k], last = first + next[k + 1];
        for (uint32_t at = first; at < last; at += CUDA_TILE) {
            uint32_t left = last - at;
            tiles[used++] = (struct cuda_adapter_tile){at, left < CUDA_TILE ? left : CUDA_TILE, k};
        }
        next[k + 1] = last;
    }
    for (; used < n_tiles; used++) {
        tiles[used] = (struct cuda_adapter_tile){0, 0, 0};
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t id = b->adapters[out_rows != NULL ? out_rows[i] : i];
        if (id != GQA_NONE) {
            rows[next[plugin_adapters_find(&a->all, id)]++] = i;
        }
    }
}

static int upload_order(struct cuda_program *p, const struct gqa_batch *b, const uint32_t *out_rows,
                        uint32_t n, struct cuda_adapter_order *order)
{
    uint32_t n_ids = p->adapters.all.n_ids;

    order->n_tiles = (uint32_t)cuda_groups_max(n, n_ids, CUDA_TILE);
    uint32_t *next = calloc((size_t)n_ids + 1, sizeof(*next));
    uint32_t *rows = calloc((size_t)n + 1, sizeof(*rows));
    struct cuda_adapter_tile *tiles = calloc((size_t)order->n_tiles + 1, sizeof(*tiles));
    int r = next == NULL || rows == NULL || tiles == NULL ? -ENOMEM : 0;
    if (r == 0) {
        sort_rows(&p->adapters, b, out_rows, n, order->n_tiles, next, rows, tiles);
        r = cuda_upload(p->context, order->rows.at, rows, n * sizeof(*rows));
    }
    r = r < 0 ? r
              : cuda_upload(p->context, order->tiles.at, tiles, order->n_tiles * sizeof(*tiles));
    free(next);
    free(rows);
    free(tiles);
    return r;
}

int cuda_adapters_begin(struct cuda_program *p, const struct gqa_batch *batch, bool *ret)
{
    bool any = false;

    for (uint32_t i = 0; batch->adapters != NULL && i < batch->n_rows; i++) {
        any = any || batch->adapters[i] != GQA_NONE;
    }
    *ret = any;
    if (!any) {
        return 0;
    }
    int r = upload_order(p, batch, NULL, batch->n_rows, &p->adapters.rows);
    return r < 0 ? r : upload_order(p, batch, batch->out_rows, batch->n_out, &p->adapters.out_rows);
}

int cuda_adapters_run(struct cuda_program *p, const struct cuda_op *op)
{
    const struct gqa_view *src = &op->op.src, *dst = &op->op.dst;
    const struct cuda_adapter_order *order =
        p->regs[src->reg].flags & GQA_REG_OUT ? &p->adapters.out_rows : &p->adapters.rows;

    if (!p->step.adapted || op->adapters.rank == 0) {
        return 0;
    }
    struct cuda_adapt_args args = {
        .adapters = cuda_pointer(op->adapters.entries.at),
        .tiles = cuda_pointer(order->tiles.at),
        .rows = cuda_pointer(order->rows.at),
        .src = cuda_view(p, src),
        .dst = cuda_view(p, dst),
        .low = cuda_pointer(p->adapters.low.at),
        .src_stride = p->regs[src->reg].width,
        .dst_stride = p->regs[dst->reg].width,
        .low_stride = p->adapters.low_width,
        .n_in = src->width,
        .n_out = dst->width,
    };
    uint32_t ranks = (op->adapters.rank + CUDA_ADAPT_RANKS - 1) / CUDA_ADAPT_RANKS;
    int r = cuda_launch(p->context, p->context->kernels[CUDA_KERNEL_adapt_low],
                        (struct cuda_grid){ranks, order->n_tiles, 256, 0}, &args);
    return r < 0 ? r
                 : cuda_launch(p->context, p->context->kernels[CUDA_KERNEL_adapt_high],
                               (struct cuda_grid){(args.n_out + 255) / 256, order->n_tiles, 256, 0},
                               &args);
}
