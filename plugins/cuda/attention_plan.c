/* plugins/cuda/attention_plan.c - who computes what of a batch's attention.
 *
 * Packed queries of a sequence go to blocks of 16. Where that makes too few blocks for the device,
 * every segment of 256 tokens gets a block of its own, and merge() joins the parts (split KV): a
 * choice of speed alone, the bits are the same. Whole segments that neighbouring sequences share
 * are attended to once, by blocks over the queries of all of them. */
#include "plugins/cuda/attention.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Blocks for each multiprocessor below which segments are split. */
#define BLOCKS_WANTED 2u

/* A run of rows and the segments that are theirs. */
struct run {
    uint32_t first_row, n_rows, seq, seg_first, seg_last, part;
    uint32_t split;
};

struct sizes {
    size_t n_pages, n_masks, n_depths, n_items, n_parts;
};

static uint32_t tiles_of(const struct gqa_attn_layer *l, uint32_t n_rows)
{
    return (n_rows * (l->n_heads / l->n_kv_heads) + CUDA_QUERIES - 1) / CUDA_QUERIES;
}

static uint32_t segments_of(uint64_t n_tokens)
{
    return (uint32_t)((n_tokens + GQA_ATTN_SEGMENT_TOKENS - 1) / GQA_ATTN_SEGMENT_TOKENS);
}

/* Fills runs (n_seqs of shared ones at most, then one a sequence) and returns how many. Hints that
 * overlap an earlier one are left: nested sharing is used at its outermost level. */
static uint32_t make_runs(const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                          uint32_t wanted, struct run *runs)
{
    uint32_t n = 0, next = 0, own = 0, n_tiles = 0, hint = 0;

    for (uint32_t i = 0; i < b->n_seqs; i++) {
        n_tiles += tiles_of(l, b->seqs[i].n_rows);
    }
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const struct gqa_attn_seq *s = &b->seqs[i];
        uint64_t n_tokens = (uint64_t)s->n_past + s->n_rows;

        while (hint < b->n_shared && b->shared[hint].seq_first < i) {
            hint++;
        }
        if (i >= next) {
            own = 0;
        }
        if (i >= next && hint < b->n_shared && b->shared[hint].seq_first == i &&
            b->shared[hint].seq_last > i && b->shared[hint].seq_last < b->n_seqs) {
            const struct gqa_attn_seq *last = &b->seqs[b->shared[hint].seq_last];
            next = b->shared[hint].seq_last + 1;
            own = b->shared[hint].n_tokens / GQA_ATTN_SEGMENT_TOKENS;
            if (own > 0) {
                runs[n++] = (struct run){
                    s->first_row, last->first_row + last->n_rows - s->first_row, i, 0, own, 0, 1};
            }
        }
        uint64_t from = l->window != 0 && s->n_past >= l->window ? s->n_past - l->window + 1 : 0;
        uint32_t first = (uint32_t)(from / GQA_ATTN_SEGMENT_TOKENS);
        struct run run = {s->first_row,          s->n_rows, i,      first > own ? first : own,
                          segments_of(n_tokens), 0,         own > 0};
        run.split |= run.seg_last - run.seg_first > 1 && n_tiles * l->n_kv_heads < wanted;
        runs[n++] = run;
    }
    return n;
}

static void count(const struct gqa_attn_layer *l, const struct gqa_attn_batch *b, struct run *runs,
                  uint32_t n_runs, struct sizes *ret)
{
    *ret = (struct sizes){0};
    for (uint32_t i = 0; i < n_runs; i++) {
        struct run *run = &runs[i];
        uint32_t tiles = tiles_of(l, run->n_rows), n_segs = run->seg_last - run->seg_first;

        run->part = (uint32_t)ret->n_parts;
        ret->n_items += run->split ? (size_t)tiles * n_segs : tiles;
        ret->n_parts += run->split ? (size_t)tiles * n_segs : 0;
    }
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const struct gqa_attn_seq *s = &b->seqs[i];
        ret->n_pages += cuda_seq_pages(s);
        if (s->new_mask != NULL) {
            ret->n_masks += (size_t)s->n_rows * ((s->n_rows + 63) / 64);
            ret->n_depths += s->n_rows;
        }
    }
}

/* Last segment that a tile's causal rows see, one past. */
static uint32_t tile_end(const struct gqa_attn_layer *l, const struct gqa_attn_seq *s,
                         const struct run *run, uint32_t tile)
{
    uint32_t r = l->n_heads / l->n_kv_heads;
    uint32_t last_row = ((tile + 1) * CUDA_QUERIES - 1) / r;

    if (s->mutual || s->new_mask != NULL || last_row >= s->n_rows) {
        return run->seg_last;
    }
    return segments_of((uint64_t)s->n_past + last_row + 1);
}

static void fill_items(const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                       const struct run *runs, uint32_t n_runs, struct cuda_attn_item *to)
{
    uint32_t r = l->n_heads / l->n_kv_heads;

    for (uint32_t i = 0; i < n_runs; i++) {
        const struct run *run = &runs[i];
        uint32_t n_segs = run->seg_last - run->seg_first;

        for (uint32_t tile = 0; tile < tiles_of(l, run->n_rows); tile++) {
            struct cuda_attn_item item = {
                run->first_row,      run->n_rows * r,
                tile * CUDA_QUERIES, run->seq,
                run->seg_first,      tile_end(l, &b->seqs[run->seq], run, tile),
                CUDA_NONE,           0};
            if (!run->split) {
                *to++ = item;
                continue;
            }
            for (uint32_t s = 0; s < n_segs; s++) {
                item.seg_first = run->seg_first + s;
                item.seg_last = item.seg_first + 1;
                item.part = run->part + tile * n_segs + s;
                *to++ = item;
            }
        }
    }
}

/* Runs come in ascending segments for each row: shared ones first. */
static void fill_merge_rows(const struct run *runs, uint32_t n_runs, uint32_t n_rows,
                            struct cuda_merge_row *to)
{
    memset(to, 0, n_rows * sizeof(*to));
    for (uint32_t i = 0; i < n_runs; i++) {
        const struct run *run = &runs[i];
        for (uint32_t row = run->first_row; run->split && row < run->first_row + run->n_rows;
             row++) {
            uint32_t k = to[row].run[0].n_segs > 0 ? 1 : 0;
            to[row].run[k].first_row = run->first_row;
            to[row].run[k].n_segs = run->seg_last - run->seg_first;
            to[row].run[k].part = run->part;
        }
    }
    for (uint32_t row = 0; row < n_rows; row++) {
        for (uint32_t k = 0; k < 2; k++) { /* so that no row reaches below its run */
            if (to[row].run[k].n_segs == 0) {
                to[row].run[k].first_row = row;
            }
        }
    }
}

/* How many other new rows each row of a mask sees; bits past the last row mean nothing. */
static void fill_depths(const struct gqa_attn_seq *s, uint32_t *depths)
{
    uint32_t n_words = (s->n_rows + 63) / 64, tail = s->n_rows % 64;

    for (uint32_t i = 0; i < s->n_rows; i++) {
        const uint64_t *mask = s->new_mask + (size_t)i * n_words;
        uint32_t n = 0;
        for (uint32_t w = 0; w < n_words; w++) {
            uint64_t word = w + 1 == n_words && tail != 0 ? mask[w] << (64 - tail) : mask[w];
            n += (uint32_t)__builtin_popcountll(word);
        }
        depths[i] = n - (uint32_t)(mask[i / 64] >> i % 64 & 1);
    }
}

struct room {
    struct cuda_seq *seqs;
    uint32_t *row_seq;
    uint64_t *pages, *masks;
    uint32_t *depths;
    struct cuda_attn_item *items;
    struct cuda_merge_row *rows;
};

static void fill_seqs(const struct gqa_attn_batch *b, const uint64_t *const *pages,
                      const struct room *to)
{
    uint32_t page = 0, mask = 0, depth = 0;

    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const struct gqa_attn_seq *s = &b->seqs[i];
        bool masked = s->new_mask != NULL;

        to->seqs[i] = (struct cuda_seq){
            s->first_row, s->n_rows, s->n_past, s->mutual, page, masked ? mask : CUDA_NONE,
            depth,        0,
        };
        for (uint32_t row = 0; row < s->n_rows; row++) {
            to->row_seq[s->first_row + row] = i;
        }
        memcpy(to->pages + page, pages[i], cuda_seq_pages(s) * sizeof(*to->pages));
        page += cuda_seq_pages(s);
        if (masked) {
            uint32_t n_words = s->n_rows * ((s->n_rows + 63) / 64);
            memcpy(to->masks + mask, s->new_mask, n_words * sizeof(*to->masks));
            fill_depths(s, to->depths + depth);
            mask += n_words;
            depth += s->n_rows;
        }
    }
}

/* Reserves n values of a size in what is uploaded; *at counts bytes, base may be NULL. */
static void *place(char *base, size_t *at, size_t n, size_t size)
{
    size_t offset = *at;

    *at = (offset + n * size + 15) & ~(size_t)15;
    return base + offset;
}

/* Numbers of things are rounded up, so that places and launches stay the same from token to token
 * (program_graph.h). Items past the last do nothing. */
#define PAGES_STEP 64u
#define ITEMS_STEP 16u

static size_t rounded(size_t n, size_t step)
{
    return (n + step - 1) / step * step;
}

static size_t lay_out(char *base, const struct gqa_attn_batch *b, const struct sizes *n,
                      struct room *ret)
{
    size_t at = 0;

    ret->seqs = place(base, &at, b->n_seqs, sizeof(*ret->seqs));
    ret->row_seq = place(base, &at, b->n_rows, sizeof(*ret->row_seq));
    ret->pages = place(base, &at, rounded(n->n_pages, PAGES_STEP), sizeof(*ret->pages));
    ret->masks = place(base, &at, n->n_masks, sizeof(*ret->masks));
    ret->depths = place(base, &at, n->n_depths, sizeof(*ret->depths));
    ret->items = place(base, &at, rounded(n->n_items, ITEMS_STEP), sizeof(*ret->items));
    ret->rows = place(base, &at, b->n_rows, sizeof(*ret->rows));
    return at;
}

static int upload(struct cuda_context *c, struct cuda_plan *plan,
                  const struct gqa_attn_layer *layer, const struct gqa_attn_batch *b,
                  const struct sizes *n, size_t bytes)
{
    struct room on_device;
    uint64_t parts = (uint64_t)n->n_parts * layer->n_kv_heads * CUDA_QUERIES * (layer->v_dim + 2);

    int r = cuda_buffer_reserve(c, &plan->device, bytes);
    r = r < 0 ? r : cuda_buffer_reserve(c, &plan->parts, parts * sizeof(float));
    r = r < 0 ? r : cuda_upload(c, plan->device.at, plan->host, bytes);
    if (r < 0) {
        return r;
    }
    lay_out(cuda_pointer(plan->device.at), b, n, &on_device);
    plan->batch = (struct cuda_attn_batch){on_device.seqs, on_device.row_seq, on_device.pages,
                                           on_device.masks, on_device.depths};
    plan->items = on_device.items;
    plan->merge_rows = on_device.rows;
    plan->n_items = (uint32_t)rounded(n->n_items, ITEMS_STEP);
    plan->n_rows = b->n_rows;
    plan->merges = n->n_parts > 0;
    return 0;
}

int cuda_plan_make(struct cuda_context *c, struct cuda_plan *plan,
                   const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                   const uint64_t *const *pages)
{
    struct sizes n;
    struct room room;

    struct run *runs = calloc(2 * (size_t)batch->n_seqs + 1, sizeof(*runs));
    if (runs == NULL) {
        return -ENOMEM;
    }
    uint32_t wanted = BLOCKS_WANTED * (uint32_t)c->device.n_multiprocessors;
    uint32_t n_runs = make_runs(layer, batch, wanted, runs);
    count(layer, batch, runs, n_runs, &n);
    size_t bytes = lay_out(NULL, batch, &n, &room);
    int r = 0;
    if (bytes > plan->host_bytes) {
        char *grown = realloc(plan->host, bytes);
        r = grown == NULL ? -ENOMEM : 0;
        plan->host = grown != NULL ? grown : plan->host;
        plan->host_bytes = grown != NULL ? bytes : plan->host_bytes;
    }
    if (r == 0) {
        lay_out(plan->host, batch, &n, &room);
        fill_seqs(batch, pages, &room);
        memset(room.items, 0, rounded(n.n_items, ITEMS_STEP) * sizeof(*room.items));
        fill_items(layer, batch, runs, n_runs, room.items);
        fill_merge_rows(runs, n_runs, batch->n_rows, room.rows);
        r = upload(c, plan, layer, batch, &n, bytes);
    }
    free(runs);
    return r;
}

void cuda_plan_finish(struct cuda_context *c, struct cuda_plan *plan)
{
    cuda_buffer_finish(c, &plan->device);
    cuda_buffer_finish(c, &plan->parts);
    free(plan->host);
    plan->host = NULL;
}

struct cuda_attn_layer cuda_layer_of(const struct gqa_attn_layer *l, CUdeviceptr sinks)
{
    return (struct cuda_attn_layer){
        .n_heads = l->n_heads,
        .n_kv_heads = l->n_kv_heads,
        .k_dim = l->k_dim,
        .v_dim = l->v_dim,
        .window = l->window,
        .k_type = l->k_type,
        .v_type = l->v_type,
        .scale = l->scale,
        .softcap = l->softcap,
        .k_offset = l->k_offset,
        .v_offset = l->v_offset,
        .k_head_bytes = l->k_head_bytes,
        .v_head_bytes = l->v_head_bytes,
        .sinks = cuda_pointer(sinks),
    };
}

int cuda_plan_append(struct cuda_context *c, const struct cuda_plan *plan,
                     const struct cuda_attn_layer *layer, const struct gqa_attn_io *io,
                     CUdeviceptr log)
{
    struct cuda_append_args args = {
        .layer = *layer,
        .batch = plan->batch,
        .k = io->k,
        .v = io->v,
        .k_stride = io->k_stride,
        .v_stride = io->v_stride,
        .log = cuda_pointer(log),
    };

    return cuda_launch(c, c->kernels[CUDA_KERNEL_append],
                       (struct cuda_grid){plan->n_rows, layer->n_kv_heads, 128, 0}, &args);
}

int cuda_plan_attend(struct cuda_context *c, const struct cuda_plan *plan,
                     const struct cuda_attn_layer *layer, const struct gqa_attn_io *io)
{
    struct cuda_attend_args attend = {
        .layer = *layer,
        .batch = plan->batch,
        .items = plan->items,
        .q = io->q,
        .out = io->out,
        .q_stride = io->q_stride,
        .out_stride = io->out_stride,
        .parts = cuda_pointer(plan->parts.at),
    };
    struct cuda_merge_args merge = {
        .layer = *layer,
        .rows = plan->merge_rows,
        .parts = cuda_pointer(plan->parts.at),
        .out = io->out,
        .out_stride = io->out_stride,
    };

    int r = cuda_launch(
        c, c->kernels[CUDA_KERNEL_attend],
        (struct cuda_grid){plan->n_items, layer->n_kv_heads, 128, CUDA_ATTEND_SHARED_BYTES},
        &attend);
    if (r < 0 || !plan->merges) {
        return r;
    }
    return cuda_launch(c, c->kernels[CUDA_KERNEL_merge],
                       (struct cuda_grid){plan->n_rows, layer->n_heads, 128, 0}, &merge);
}
