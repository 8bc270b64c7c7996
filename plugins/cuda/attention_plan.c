/* plugins/cuda/attention_plan.c - who computes what of a batch's attention.
 *
 * Packed queries of a sequence go to blocks of 16. Where that makes too few blocks for the device,
 * every segment of 256 tokens gets a block of its own, and merge() joins the parts (split KV): a
 * choice of speed alone, the bits are the same. Whole segments that neighbouring sequences share
 * are attended to once, by blocks over the queries of all of them. Rows that a view sets apart meet
 * the segments of its sinks first, and then, from whole segments of their own, the recent places.
 */
#include "plugins/cuda/attention.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Blocks for each multiprocessor below which segments are split. */
#define BLOCKS_WANTED 2u

/* A run of rows and the segments that are theirs: of sinks, then others. */
struct run {
    uint32_t first_row, n_rows, seq, n_sinks, seg_first, seg_last, part;
    uint32_t split;
};

struct sizes {
    size_t n_pages, n_masks, n_depths, n_turns, n_items, n_parts;
};

static uint32_t tiles_of(const struct gqa_attn_layer *l, uint32_t n_rows)
{
    return (n_rows * (l->n_heads / l->n_kv_heads) + CUDA_QUERIES - 1) / CUDA_QUERIES;
}

static uint32_t segments_of(uint64_t n_tokens)
{
    return (uint32_t)((n_tokens + GQA_ATTN_SEGMENT_TOKENS - 1) / GQA_ATTN_SEGMENT_TOKENS);
}

static uint32_t segments_of_run(const struct run *run)
{
    return run->n_sinks + run->seg_last - run->seg_first;
}

/* Rows of the sequence that are turned back; 0 where none is. */
static uint32_t turns_of(const struct gqa_attn_layer *l, const struct gqa_attn_seq *s)
{
    return plugin_turns(l, s) ? s->n_rows - plugin_first_apart(l, s) : 0;
}

/* Windowed layers and views read little, and by their own place. */
static bool may_share(const struct gqa_attn_layer *l, const struct gqa_attn_seq *s,
                      uint32_t n_tokens)
{
    return l->window == 0 && s->tables != NULL && s->n_past >= n_tokens &&
           !plugin_is_view(plugin_table(l, s));
}

/* The run of whole segments that sequences share from i on, by the hint, as far as it holds.
 * Returns how many sequences those are; below 2, nobody shares. */
static uint32_t shared_run(const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                           const struct gqa_attn_shared *hint, uint32_t i, struct run *ret)
{
    uint32_t n_segs = hint->n_tokens / GQA_ATTN_SEGMENT_TOKENS, end = i;

    while (n_segs > 0 && end < b->n_seqs && end <= hint->seq_last &&
           may_share(l, &b->seqs[end], hint->n_tokens)) {
        end++;
    }
    if (end - i >= 2) {
        const struct gqa_attn_seq *first = &b->seqs[i], *last = &b->seqs[end - 1];
        *ret = (struct run){.first_row = first->first_row,
                            .n_rows = last->first_row + last->n_rows - first->first_row,
                            .seq = i,
                            .seg_last = n_segs,
                            .split = 1};
    }
    return end - i;
}

/* What is left of a sequence behind the segments that it shares. */
static struct run own_run(const struct gqa_attn_layer *l, const struct gqa_attn_seq *s, uint32_t i,
                          uint32_t n_shared)
{
    uint32_t first = plugin_first_seen(l, s, 0) / GQA_ATTN_SEGMENT_TOKENS;
    bool apart = plugin_first_apart(l, s) < s->n_rows;

    return (struct run){
        .first_row = s->first_row,
        .n_rows = s->n_rows,
        .seq = i,
        .n_sinks = apart ? segments_of(plugin_table(l, s)->n_sinks) : 0,
        .seg_first = first > n_shared ? first : n_shared,
        .seg_last = segments_of((uint64_t)plugin_past(l, s) + s->n_rows),
        .split = n_shared > 0,
    };
}

/* Fills runs (n_seqs of shared ones at most, then one a sequence) and returns how many. Hints that
 * overlap an earlier one are left: nested sharing is used at its outermost level. */
static uint32_t make_runs(const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                          uint32_t wanted, struct run *runs)
{
    uint32_t n = 0, next = 0, n_shared = 0, n_tiles = 0, hint = 0;

    for (uint32_t i = 0; i < b->n_seqs; i++) {
        n_tiles += tiles_of(l, b->seqs[i].n_rows);
    }
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        while (hint < b->n_shared && b->shared[hint].seq_last < i) {
            hint++;
        }
        n_shared = i < next ? n_shared : 0;
        if (i >= next && hint < b->n_shared && b->shared[hint].seq_first <= i) {
            uint32_t n_seqs = shared_run(l, b, &b->shared[hint], i, &runs[n]);
            if (n_seqs >= 2) {
                n_shared = runs[n++].seg_last;
                next = i + n_seqs;
            }
        }
        struct run run = own_run(l, &b->seqs[i], i, n_shared);
        run.split |= segments_of_run(&run) > 1 && n_tiles * l->n_kv_heads < wanted;
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
        uint32_t tiles = tiles_of(l, run->n_rows), n_segs = segments_of_run(run);

        run->part = (uint32_t)ret->n_parts;
        ret->n_items += run->split ? (size_t)tiles * n_segs : tiles;
        ret->n_parts += run->split ? (size_t)tiles * n_segs : 0;
    }
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const struct gqa_attn_seq *s = &b->seqs[i];
        ret->n_pages += cuda_seq_pages(l, s);
        ret->n_turns += turns_of(l, s);
        if (s->new_mask != NULL) {
            ret->n_masks += (size_t)s->n_rows * ((s->n_rows + 63) / 64);
            ret->n_depths += s->n_rows;
        }
    }
}

/* The segments that a tile of one sequence's rows sees. */
static void trim_item(const struct gqa_attn_layer *l, const struct gqa_attn_seq *s,
                      const struct run *run, struct cuda_attn_item *item)
{
    uint32_t r = l->n_heads / l->n_kv_heads, first_row = item->first / r;
    uint32_t last_row = (item->first + CUDA_QUERIES - 1) / r;

    last_row = last_row < s->n_rows ? last_row : s->n_rows - 1;
    uint32_t first = plugin_first_seen(l, s, first_row) / GQA_ATTN_SEGMENT_TOKENS;
    uint32_t last = segments_of((uint64_t)plugin_last_seen(l, s, last_row) + 1);
    item->seg_first = first > run->seg_first ? first : run->seg_first;
    item->seg_last = last < run->seg_last ? last : run->seg_last;
    item->sink_last = plugin_first_apart(l, s) <= last_row ? run->n_sinks : 0;
}

static void fill_items(const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                       const struct run *runs, uint32_t n_runs, struct cuda_attn_item *to)
{
    uint32_t r = l->n_heads / l->n_kv_heads;

    for (uint32_t i = 0; i < n_runs; i++) {
        const struct run *run = &runs[i];
        uint32_t n_segs = segments_of_run(run);

        for (uint32_t tile = 0; tile < tiles_of(l, run->n_rows); tile++) {
            struct cuda_attn_item item = {.first_row = run->first_row,
                                          .n_packed = run->n_rows * r,
                                          .first = tile * CUDA_QUERIES,
                                          .seq = run->seq,
                                          .part = CUDA_NONE};
            if (!run->split) {
                trim_item(l, &b->seqs[run->seq], run, &item);
                *to++ = item;
                continue;
            }
            for (uint32_t s = 0; s < n_segs; s++) {
                bool of_sinks = s < run->n_sinks;
                uint32_t segment = of_sinks ? s : run->seg_first + s - run->n_sinks;
                item.sink_first = of_sinks ? segment : 0;
                item.sink_last = of_sinks ? segment + 1 : 0;
                item.seg_first = of_sinks ? 0 : segment;
                item.seg_last = of_sinks ? 0 : segment + 1;
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
            to[row].run[k].n_segs = segments_of_run(run);
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

struct room {
    struct cuda_seq *seqs;
    uint32_t *row_seq;
    uint64_t *pages, *masks;
    uint32_t *depths;
    float *turns;
    struct cuda_attn_item *items;
    struct cuda_merge_row *rows;
};

/* The sequence as kernels know it, but for where its things are. A view that leaves nothing out at
 * any place is none. */
static struct cuda_seq seq_of(const struct gqa_attn_layer *l, const struct gqa_attn_seq *s)
{
    const struct gqa_page_table *table = plugin_table(l, s);
    bool ends = (uint64_t)table->n_sinks + table->recent <= UINT32_MAX;

    return (struct cuda_seq){.first_row = s->first_row,
                             .n_rows = s->n_rows,
                             .n_past = plugin_past(l, s),
                             .mutual = s->mutual,
                             .mask = CUDA_NONE,
                             .turns = CUDA_NONE,
                             .n_sinks = ends ? table->n_sinks : 0,
                             .recent = ends ? table->recent : 0};
}

static void fill_seqs(const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                      const uint64_t *const *pages, const struct room *to)
{
    uint32_t page = 0, mask = 0, depth = 0, turn = 0;

    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const struct gqa_attn_seq *s = &b->seqs[i];
        struct cuda_seq *seq = &to->seqs[i];
        uint32_t n_turns = turns_of(l, s);

        *seq = seq_of(l, s);
        seq->table = page;
        for (uint32_t row = 0; row < s->n_rows; row++) {
            to->row_seq[s->first_row + row] = i;
        }
        memcpy(to->pages + page, pages[i], cuda_seq_pages(l, s) * sizeof(*to->pages));
        page += cuda_seq_pages(l, s);
        seq->turns = n_turns > 0 ? turn : CUDA_NONE;
        for (uint32_t k = 0; k < n_turns; k++, turn++) {
            plugin_find_turn(l, s, s->n_rows - n_turns + k,
                             to->turns + 2 * (size_t)turn * l->rope->n_freqs);
        }
        if (s->new_mask != NULL) {
            seq->mask = mask;
            seq->depths = depth;
            uint32_t n_words = s->n_rows * ((s->n_rows + 63) / 64);
            memcpy(to->masks + mask, s->new_mask, n_words * sizeof(*to->masks));
            plugin_count_depths(s, to->depths + depth);
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

static size_t lay_out(char *base, const struct gqa_attn_layer *l, const struct gqa_attn_batch *b,
                      const struct sizes *n, struct room *ret)
{
    size_t at = 0, turn_floats = n->n_turns > 0 ? 2 * (size_t)l->rope->n_freqs : 0;

    ret->seqs = place(base, &at, b->n_seqs, sizeof(*ret->seqs));
    ret->row_seq = place(base, &at, b->n_rows, sizeof(*ret->row_seq));
    ret->pages = place(base, &at, rounded(n->n_pages, PAGES_STEP), sizeof(*ret->pages));
    ret->masks = place(base, &at, n->n_masks, sizeof(*ret->masks));
    ret->depths = place(base, &at, n->n_depths, sizeof(*ret->depths));
    ret->turns = place(base, &at, n->n_turns * turn_floats, sizeof(*ret->turns));
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
    lay_out(cuda_pointer(plan->device.at), layer, b, n, &on_device);
    plan->batch = (struct cuda_attn_batch){on_device.seqs,  on_device.row_seq, on_device.pages,
                                           on_device.masks, on_device.depths,  on_device.turns};
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
    size_t bytes = lay_out(NULL, layer, batch, &n, &room);
    int r = 0;
    if (bytes > plan->host_bytes) {
        char *grown = realloc(plan->host, bytes);
        r = grown == NULL ? -ENOMEM : 0;
        plan->host = grown != NULL ? grown : plan->host;
        plan->host_bytes = grown != NULL ? bytes : plan->host_bytes;
    }
    if (r == 0) {
        lay_out(plan->host, layer, batch, &n, &room);
        fill_seqs(layer, batch, pages, &room);
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
    cuda_buffer_finish(c, &plan->observed);
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
        .n_freqs = l->rope != NULL ? l->rope->n_freqs : 0,
        .rope_neighbour = l->rope_kind == GQA_ROPE_NEIGHBOUR,
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
