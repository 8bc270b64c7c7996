/* plugins/cpu/attention_plan.c - cuts a batch into pieces and items. Runs on the calling thread. */
#include "plugins/cpu/attention_plan.h"

#include "plugins/cpu/attention_sight.h"

#include <errno.h>
#include <string.h>

void cpu_attn_plan_init(struct cpu_attn_plan *plan, const struct gqa_host *host)
{
    *plan = (struct cpu_attn_plan){.host = host};
}

void cpu_attn_plan_finish(struct cpu_attn_plan *plan)
{
    const struct gqa_host *host = plan->host;

    if (plan->pieces != NULL) {
        host->release(host->data, plan->pieces, plan->pieces_bytes);
    }
    if (plan->items != NULL) {
        host->release(host->data, plan->items, plan->items_bytes);
    }
    if (plan->parts != NULL) {
        host->release(host->data, plan->parts, plan->parts_bytes);
    }
    if (plan->states != NULL) {
        host->release(host->data, plan->states, plan->states_bytes);
    }
    if (plan->n_shared != NULL) {
        host->release(host->data, plan->n_shared, plan->n_shared_bytes);
    }
    *plan = (struct cpu_attn_plan){0};
}

int cpu_attn_grow(const struct gqa_host *host, void **memory, size_t *allocated, size_t bytes)
{
    if (bytes <= *allocated) {
        return 0;
    }
    bytes += bytes / 2; /* so that a growing context does not come back for every block */
    void *larger = host->allocate(host->data, bytes);
    if (larger == NULL) {
        return -ENOMEM;
    }
    if (*memory != NULL) {
        host->release(host->data, *memory, *allocated);
    }
    *memory = larger;
    *allocated = bytes;
    return 0;
}

/* Work of a piece, in segments times queries; a lone query costs its segment's memory traffic. */
static uint64_t piece_cost(const struct cpu_attn_piece *piece, uint32_t group_size)
{
    uint64_t n_queries = (uint64_t)piece->n_rows * group_size;

    return piece->n_segments * (n_queries < 4 ? 4 : n_queries);
}

struct rows {
    uint32_t from, to; /* of one sequence */
    uint32_t max;      /* of them to a piece */
    int resumes;       /* see struct cpu_attn_piece */
    uint32_t n_shared; /* segments that shared pieces have done for them */
};

/* Pieces of one sequence, the longest (last rows) first, so that no long one starts late. */
static uint32_t list_pieces(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                            uint32_t seq_index, const struct rows *rows,
                            struct cpu_attn_piece *pieces)
{
    uint32_t n = 0;

    for (uint32_t end = rows->to; end > rows->from;) {
        uint32_t n_rows = (end - rows->from - 1) % rows->max + 1;
        uint32_t first_row = end - n_rows;
        uint32_t first = plugin_first_seen(layer, seq, first_row) / GQA_ATTN_SEGMENT_TOKENS;
        uint32_t last = plugin_last_seen(layer, seq, end - 1) / GQA_ATTN_SEGMENT_TOKENS;

        for (uint32_t group = 0; group < layer->n_kv_heads; group++) {
            struct cpu_attn_piece *piece = &pieces[n++];

            piece->seq = seq_index;
            piece->group = group;
            piece->first_row = seq->first_row + first_row;
            piece->n_rows = n_rows;
            piece->first_segment = rows->n_shared > 0 ? rows->n_shared : first;
            piece->n_segments = last - piece->first_segment + 1;
            piece->shared = 0;
            piece->sinks = 0;
            piece->resumes = rows->resumes;
            piece->parts = 0;
        }
        end = first_row;
    }
    return n;
}

/* Of rows that a view sets apart, sinks first. */
static uint32_t list_own_pieces(const struct cpu_attn_plan *plan,
                                const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                                uint32_t seq_index, uint32_t rows_max,
                                struct cpu_attn_piece *pieces)
{
    uint32_t apart = plugin_first_apart(layer, seq), n_shared = plan->n_shared[seq_index];
    const struct rows whole = {0, apart, rows_max, n_shared > 0, n_shared};
    const struct rows view = {apart, seq->n_rows, rows_max, plugin_table(layer, seq)->n_sinks > 0,
                              0};
    uint32_t n = list_pieces(layer, seq, seq_index, &view, pieces);

    return n + list_pieces(layer, seq, seq_index, &whole, pieces + n);
}

/* Pieces of the sinks of rows that are apart; pieces NULL: only counts them. */
static uint32_t list_sinks(const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                           uint32_t rows_max, struct cpu_attn_piece *pieces)
{
    uint32_t n = 0;

    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        const struct gqa_attn_seq *seq = &batch->seqs[s];
        uint32_t n_sinks = plugin_table(layer, seq)->n_sinks;
        uint32_t first = n_sinks > 0 ? plugin_first_apart(layer, seq) : seq->n_rows;

        for (uint32_t row = first, n_rows; row < seq->n_rows; row += n_rows) {
            n_rows = seq->n_rows - row < rows_max ? seq->n_rows - row : rows_max;
            for (uint32_t group = 0; group < layer->n_kv_heads; group++, n++) {
                if (pieces == NULL) {
                    continue;
                }
                pieces[n].seq = s;
                pieces[n].group = group;
                pieces[n].first_row = seq->first_row + row;
                pieces[n].n_rows = n_rows;
                pieces[n].first_segment = 0;
                pieces[n].n_segments = (n_sinks - 1) / GQA_ATTN_SEGMENT_TOKENS + 1;
                pieces[n].shared = 1;
                pieces[n].sinks = 1;
                pieces[n].resumes = 0;
                pieces[n].parts = 0;
            }
        }
    }
    return n;
}

/* ---- what sequences share ---------------------------------------------------------------- */

/* Whether a sequence gains from others' company. Windowed layers and views read little, and by
 * their own place; rows that fill a piece read K and V but once for it anyway. */
static int may_share(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                     uint32_t rows_max)
{
    const struct gqa_page_table *table = plugin_table(layer, seq);
    int is_view = table->n_dropped > 0 || table->recent > 0;

    return layer->window == 0 && seq->n_rows > 0 && seq->n_rows < rows_max && seq->n_past > 0 &&
           !is_view;
}

/* The first so many of n whole segments whose pages are the same in both sequences, and past. */
static uint32_t common_segments(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *a,
                                const struct gqa_attn_seq *b, uint32_t n)
{
    void *const *a_pages = a->tables[layer->layer_class].pages;
    void *const *b_pages = b->tables[layer->layer_class].pages;
    uint32_t past = a->n_past < b->n_past ? a->n_past : b->n_past, block = 0;

    n = n < past / GQA_ATTN_SEGMENT_TOKENS ? n : past / GQA_ATTN_SEGMENT_TOKENS;
    while (block < n * CPU_ATTN_SEGMENT_BLOCKS && a_pages[block] == b_pages[block]) {
        block++;
    }
    return block / CPU_ATTN_SEGMENT_BLOCKS;
}

/* The sequences [first, ret) share *ret_segments segments: as many sequences as the hint, which
 * ends at end, has in a row. */
static uint32_t find_run(const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                         uint32_t rows_max, uint32_t n_tokens, uint32_t first, uint32_t end,
                         uint32_t *ret_segments)
{
    const struct gqa_attn_seq *seqs = batch->seqs;
    uint32_t n = n_tokens / GQA_ATTN_SEGMENT_TOKENS, s = first;

    for (; s < end && n > 0 && may_share(layer, &seqs[s], rows_max); s++) {
        uint32_t common = common_segments(layer, &seqs[first], &seqs[s], n);
        if (common == 0) {
            break;
        }
        n = common;
    }
    *ret_segments = n;
    return s > first ? s : first + 1;
}

/* Pieces of the rows of sequences [first, end); pieces NULL: only counts them. */
static uint32_t list_shared_pieces(const struct gqa_attn_layer *layer,
                                   const struct gqa_attn_batch *batch, uint32_t rows_max,
                                   uint32_t first, uint32_t end, uint32_t n_segments,
                                   struct cpu_attn_piece *pieces)
{
    const struct gqa_attn_seq *seqs = batch->seqs;
    uint32_t end_row = seqs[end - 1].first_row + seqs[end - 1].n_rows, n = 0;

    for (uint32_t row = seqs[first].first_row; row < end_row; row += rows_max) {
        for (uint32_t group = 0; group < layer->n_kv_heads; group++, n++) {
            if (pieces == NULL) {
                continue;
            }
            pieces[n].seq = first;
            pieces[n].group = group;
            pieces[n].first_row = row;
            pieces[n].n_rows = end_row - row < rows_max ? end_row - row : rows_max;
            pieces[n].first_segment = 0;
            pieces[n].n_segments = n_segments;
            pieces[n].shared = 1;
            pieces[n].sinks = 0;
            pieces[n].resumes = 0;
            pieces[n].parts = 0;
        }
    }
    return n;
}

/* Follows the batch's hints, as far as they hold; of those that overlap, the earlier one. Sets
 * plan->n_shared unless pieces is NULL, which only counts. Returns the number of shared pieces. */
static uint32_t list_shared(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                            const struct gqa_attn_batch *batch, uint32_t rows_max,
                            struct cpu_attn_piece *pieces)
{
    uint32_t n = 0, next = 0; /* no sequence before next is to be had */

    for (uint32_t i = 0; i < batch->n_shared; i++) {
        const struct gqa_attn_shared *hint = &batch->shared[i];
        uint32_t end = hint->seq_last < batch->n_seqs ? hint->seq_last + 1 : batch->n_seqs;
        uint32_t first = hint->seq_first > next ? hint->seq_first : next;

        for (uint32_t run_end, n_segments; first < end; first = run_end) {
            run_end = find_run(layer, batch, rows_max, hint->n_tokens, first, end, &n_segments);
            next = run_end;
            if (run_end - first < 2) {
                continue;
            }
            n += list_shared_pieces(layer, batch, rows_max, first, run_end, n_segments,
                                    pieces != NULL ? pieces + n : NULL);
            for (uint32_t s = first; pieces != NULL && s < run_end; s++) {
                plan->n_shared[s] = n_segments;
            }
        }
    }
    return n;
}

/* ---- items ------------------------------------------------------------------------------- */

/* Sets n_items of pieces [first, end), some of which are to be cut, and counts. */
static void size_items(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                       uint32_t first, uint32_t end)
{
    uint32_t group_size = layer->n_heads / layer->n_kv_heads;
    uint32_t n_workers = plan->host->n_threads;
    size_t part_floats = cpu_attn_part_floats(layer->v_dim);
    uint64_t cost = 0;

    for (uint32_t i = first; i < end; i++) {
        cost += piece_cost(&plan->pieces[i], group_size);
    }
    /* The most that one item should cost. One worker shares with nobody: nothing is cut. */
    uint64_t target =
        n_workers > 1 ? cost / (n_workers * CPU_ATTN_ITEMS_PER_WORKER) + 1 : UINT64_MAX / 2;
    for (uint32_t i = first; i < end; i++) {
        struct cpu_attn_piece *piece = &plan->pieces[i];
        uint64_t wanted = (piece_cost(piece, group_size) + target - 1) / target;

        piece->n_items = wanted < piece->n_segments ? (uint32_t)wanted : piece->n_segments;
        if (piece->n_items > 1) {
            piece->parts = plan->n_part_floats;
            plan->n_part_floats += part_floats * piece->n_segments * piece->n_rows * group_size;
        }
        plan->n_items += piece->n_items;
        atomic_init(&piece->items_left, piece->n_items);
    }
}

static void list_items(struct cpu_attn_plan *plan)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < plan->n_pieces; i++) {
        const struct cpu_attn_piece *piece = &plan->pieces[i];

        for (uint32_t j = 0; j < piece->n_items; j++) {
            uint64_t n_segments = piece->n_segments;
            uint32_t first = (uint32_t)(n_segments * j / piece->n_items);
            uint32_t end = (uint32_t)(n_segments * (j + 1) / piece->n_items);

            plan->items[n++] = (struct cpu_attn_item){
                .piece = i,
                .first_segment = piece->first_segment + first,
                .n_segments = end - first,
            };
        }
    }
}

/* Memory for a batch's pieces, of which there are n_shared_pieces shared ones. 0 or -ENOMEM. */
static int grow_pieces(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                       const struct gqa_attn_batch *batch, uint32_t rows_max)
{
    size_t n_pieces = plan->n_shared_pieces;
    int rc = 0;

    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        /* One more where a view sets some of the rows apart. */
        n_pieces +=
            (1 + ((size_t)batch->seqs[s].n_rows + rows_max - 1) / rows_max) * layer->n_kv_heads;
    }
    if (plan->n_shared_pieces > 0) {
        rc = cpu_attn_grow(plan->host, (void **)&plan->states, &plan->states_bytes,
                           sizeof(float) * cpu_attn_part_floats(layer->v_dim) * batch->n_rows *
                               layer->n_heads);
    }
    if (rc == 0) {
        rc = cpu_attn_grow(plan->host, (void **)&plan->n_shared, &plan->n_shared_bytes,
                           batch->n_seqs * sizeof(*plan->n_shared));
    }
    if (rc == 0) {
        rc = cpu_attn_grow(plan->host, (void **)&plan->pieces, &plan->pieces_bytes,
                           n_pieces * sizeof(*plan->pieces));
    }
    return rc;
}

int cpu_attn_plan_make(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                       const struct gqa_attn_batch *batch)
{
    uint32_t group_size = layer->n_heads / layer->n_kv_heads;
    uint32_t rows_max =
        group_size < CPU_ATTN_PIECE_QUERIES ? CPU_ATTN_PIECE_QUERIES / group_size : 1;
    int rc;

    plan->n_shared_pieces =
        list_shared(plan, layer, batch, rows_max, NULL) + list_sinks(layer, batch, rows_max, NULL);
    rc = grow_pieces(plan, layer, batch, rows_max);
    if (rc < 0) {
        return rc;
    }
    memset(plan->n_shared, 0, batch->n_seqs * sizeof(*plan->n_shared));
    plan->n_pieces = list_shared(plan, layer, batch, rows_max, plan->pieces);
    plan->n_pieces += list_sinks(layer, batch, rows_max, plan->pieces + plan->n_pieces);
    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        plan->n_pieces += list_own_pieces(plan, layer, &batch->seqs[s], s, rows_max,
                                          plan->pieces + plan->n_pieces);
    }
    plan->n_items = 0;
    plan->n_part_floats = 0;
    size_items(plan, layer, 0, plan->n_shared_pieces);
    plan->n_shared_items = plan->n_items;
    size_items(plan, layer, plan->n_shared_pieces, plan->n_pieces);
    rc = cpu_attn_grow(plan->host, (void **)&plan->items, &plan->items_bytes,
                       plan->n_items * sizeof(*plan->items));
    if (rc == 0) {
        rc = cpu_attn_grow(plan->host, (void **)&plan->parts, &plan->parts_bytes,
                           plan->n_part_floats * sizeof(*plan->parts));
    }
    if (rc == 0) {
        list_items(plan);
    }
    return rc;
}
