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
    if (plan->mergers != NULL) {
        host->release(host->data, plan->mergers, plan->mergers_bytes);
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

    return (uint64_t)piece->n_segments * piece->n_groups * (n_queries < 4 ? 4 : n_queries);
}

/* So many that nobody waits long for the last. One worker shares with nobody: nothing is cut. */
static uint32_t items_wanted(const struct cpu_attn_plan *plan)
{
    uint32_t n_workers = plan->host->n_threads;

    return n_workers > 1 ? n_workers * CPU_ATTN_ITEMS_PER_WORKER : 1;
}

struct rows {
    uint32_t from, to; /* of one sequence */
    uint32_t max;      /* of them to a piece */
    int resumes;       /* see struct cpu_attn_piece */
    uint32_t n_shared; /* segments that shared pieces have done for them */
};

/* Pieces of one sequence and all groups, the longest (last rows) first, so that no long one starts
 * late. */
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

        first = rows->n_shared > 0 ? rows->n_shared : first;
        pieces[n++] = (struct cpu_attn_piece){
            .seq = seq_index,
            .first_row = seq->first_row + first_row,
            .n_rows = n_rows,
            .first_segment = first,
            .n_segments = last - first + 1,
            .resumes = rows->resumes,
        };
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

        for (uint32_t row = first; row < seq->n_rows; row += rows_max, n++) {
            if (pieces == NULL) {
                continue;
            }
            pieces[n] = (struct cpu_attn_piece){
                .seq = s,
                .first_row = seq->first_row + row,
                .n_rows = seq->n_rows - row < rows_max ? seq->n_rows - row : rows_max,
                .n_segments = (n_sinks - 1) / GQA_ATTN_SEGMENT_TOKENS + 1,
                .shared = 1,
                .sinks = 1,
            };
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
static uint32_t list_shared_pieces(const struct gqa_attn_batch *batch, uint32_t rows_max,
                                   uint32_t first, uint32_t end, uint32_t n_segments,
                                   struct cpu_attn_piece *pieces)
{
    const struct gqa_attn_seq *seqs = batch->seqs;
    uint32_t end_row = seqs[end - 1].first_row + seqs[end - 1].n_rows, n = 0;

    for (uint32_t row = seqs[first].first_row; row < end_row; row += rows_max, n++) {
        if (pieces == NULL) {
            continue;
        }
        pieces[n] = (struct cpu_attn_piece){
            .seq = first,
            .first_row = row,
            .n_rows = end_row - row < rows_max ? end_row - row : rows_max,
            .n_segments = n_segments,
            .shared = 1,
        };
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
            n += list_shared_pieces(batch, rows_max, first, run_end, n_segments,
                                    pieces != NULL ? pieces + n : NULL);
            for (uint32_t s = first; pieces != NULL && s < run_end; s++) {
                plan->n_shared[s] = n_segments;
            }
        }
    }
    return n;
}

/* ---- groups ------------------------------------------------------------------------------ */

/* Groups that a worker can take through a segment together, with this piece's rows. */
static uint32_t groups_max(const struct cpu_attn_piece *piece, uint32_t group_size)
{
    uint32_t n_queries = piece->n_rows * group_size;
    uint32_t n_packs = (n_queries + CPU_ATTN_PACK_MAX - 1) / CPU_ATTN_PACK_MAX;
    uint32_t by_queries = CPU_ATTN_PIECE_QUERIES / n_queries;
    uint32_t by_packs = CPU_ATTN_PACKS_MAX / n_packs;
    uint32_t n = by_queries < by_packs ? by_queries : by_packs;

    return n > 0 ? n : 1;
}

/* Sets n_groups of pieces [first, end), which are to have all groups between them. Returns how many
 * pieces that makes. */
static uint32_t size_groups(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                            uint32_t first, uint32_t end)
{
    uint32_t n_groups = layer->n_kv_heads, group_size = layer->n_heads / n_groups, n = 0;
    uint64_t wanted = items_wanted(plan), n_segments = 0;

    for (uint32_t i = first; i < end; i++) {
        n_segments += plan->pieces[i].n_segments;
    }
    /* No item is less than a segment: where these are few, groups make up for it. */
    uint64_t spared = n_segments < wanted ? n_groups * n_segments / wanted : n_groups;
    for (uint32_t i = first; i < end; i++) {
        uint32_t most = groups_max(&plan->pieces[i], group_size);
        most = most < spared ? most : spared > 0 ? (uint32_t)spared : 1;
        uint32_t n_parts = (n_groups + most - 1) / most;
        plan->pieces[i].n_groups = (n_groups + n_parts - 1) / n_parts;
        n += (n_groups + plan->pieces[i].n_groups - 1) / plan->pieces[i].n_groups;
    }
    return n;
}

/* Makes n_after pieces of n, so that all groups have theirs. */
static void part_groups(struct cpu_attn_plan *plan, uint32_t n_kv_heads, uint32_t n,
                        uint32_t n_after)
{
    for (uint32_t i = n; i > 0; i--) {
        struct cpu_attn_piece piece = plan->pieces[i - 1];

        for (uint32_t end = n_kv_heads; end > 0; end = piece.group) {
            piece.group = (end - 1) / piece.n_groups * piece.n_groups;
            plan->pieces[--n_after] = piece;
            plan->pieces[n_after].n_groups = end - piece.group;
        }
    }
}

/* ---- items ------------------------------------------------------------------------------- */

/* Sets n_items of pieces [first, end), some of which are to be cut, and counts. */
static void size_items(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                       uint32_t first, uint32_t end)
{
    uint32_t group_size = layer->n_heads / layer->n_kv_heads;
    uint32_t n_wanted = items_wanted(plan);
    size_t part_floats = cpu_attn_part_floats(layer->v_dim);
    uint64_t cost = 0;

    for (uint32_t i = first; i < end; i++) {
        cost += piece_cost(&plan->pieces[i], group_size);
    }
    /* The most that one item should cost. */
    uint64_t target = n_wanted > 1 ? (cost + n_wanted - 1) / n_wanted : UINT64_MAX / 2;
    for (uint32_t i = first; i < end; i++) {
        struct cpu_attn_piece *piece = &plan->pieces[i];
        uint64_t wanted = (piece_cost(piece, group_size) + target - 1) / target;

        piece->n_items = wanted < piece->n_segments ? (uint32_t)wanted : piece->n_segments;
        if (piece->n_items > 1) {
            piece->parts = plan->n_part_floats;
            plan->n_mergers += piece->n_groups;
            plan->n_part_floats +=
                part_floats * piece->n_segments * piece->n_groups * piece->n_rows * group_size;
        }
        plan->n_items += piece->n_items;
    }
}

static void list_items(struct cpu_attn_plan *plan)
{
    uint32_t n = 0, n_mergers = 0;

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
        for (uint32_t g = 0; piece->n_items > 1 && g < piece->n_groups; g++) {
            plan->mergers[n_mergers++] = (struct cpu_attn_merger){i, piece->group + g};
        }
    }
}

/* Memory for a batch's pieces, of which there are n_shared_pieces shared ones in each group. 0 or
 * -ENOMEM. */
static int grow_pieces(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                       const struct gqa_attn_batch *batch, uint32_t rows_max)
{
    size_t n_pieces = plan->n_shared_pieces;
    int rc = 0;

    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        /* One more where a view sets some of the rows apart. */
        n_pieces += 1 + ((size_t)batch->seqs[s].n_rows + rows_max - 1) / rows_max;
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
                           n_pieces * layer->n_kv_heads * sizeof(*plan->pieces));
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
    uint32_t n_shared = size_groups(plan, layer, 0, plan->n_shared_pieces);
    uint32_t n_own = size_groups(plan, layer, plan->n_shared_pieces, plan->n_pieces);
    part_groups(plan, layer->n_kv_heads, plan->n_pieces, n_shared + n_own);
    plan->n_shared_pieces = n_shared;
    plan->n_pieces = n_shared + n_own;
    plan->n_items = plan->n_mergers = 0;
    plan->n_part_floats = 0;
    size_items(plan, layer, 0, plan->n_shared_pieces);
    plan->n_shared_items = plan->n_items;
    plan->n_shared_mergers = plan->n_mergers;
    size_items(plan, layer, plan->n_shared_pieces, plan->n_pieces);
    rc = cpu_attn_grow(plan->host, (void **)&plan->items, &plan->items_bytes,
                       plan->n_items * sizeof(*plan->items));
    if (rc == 0) {
        rc = cpu_attn_grow(plan->host, (void **)&plan->mergers, &plan->mergers_bytes,
                           plan->n_mergers * sizeof(*plan->mergers));
    }
    if (rc == 0) {
        rc = cpu_attn_grow(plan->host, (void **)&plan->parts, &plan->parts_bytes,
                           plan->n_part_floats * sizeof(*plan->parts));
    }
    if (rc == 0) {
        list_items(plan);
    }
    return rc;
}
