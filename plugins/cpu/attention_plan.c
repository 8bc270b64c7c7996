/* plugins/cpu/attention_plan.c - cuts a batch into pieces and items. Runs on the calling thread. */
#include "plugins/cpu/attention_plan.h"

#include "plugins/cpu/attention_sight.h"

#include <errno.h>

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

/* Pieces of one sequence, the longest (last rows) first, so that no long one starts late. */
static uint32_t list_pieces(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                            uint32_t seq_index, uint32_t rows_max, struct cpu_attn_piece *pieces)
{
    uint32_t n = 0;

    for (uint32_t end = seq->n_rows; end > 0;) {
        uint32_t n_rows = (end - 1) % rows_max + 1;
        uint32_t first_row = end - n_rows;
        uint32_t first = cpu_attn_first_seen(layer, seq, first_row);
        uint32_t last = cpu_attn_last_seen(layer, seq, end - 1);

        for (uint32_t group = 0; group < layer->n_kv_heads; group++) {
            struct cpu_attn_piece *piece = &pieces[n++];

            piece->seq = seq_index;
            piece->group = group;
            piece->first_row = first_row;
            piece->n_rows = n_rows;
            piece->first_segment = first / GQA_ATTN_SEGMENT_TOKENS;
            piece->n_segments = last / GQA_ATTN_SEGMENT_TOKENS - piece->first_segment + 1;
            piece->n_items = 1;
            piece->parts = 0;
        }
        end = first_row;
    }
    return n;
}

/* Sets n_items of the pieces that are to be cut, and counts. target: the most that one item should
 * cost. */
static void size_items(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                       uint64_t target)
{
    uint32_t group_size = layer->n_heads / layer->n_kv_heads;
    size_t part_floats = cpu_attn_part_floats(layer->v_dim);

    plan->n_items = 0;
    plan->n_part_floats = 0;
    for (uint32_t i = 0; i < plan->n_pieces; i++) {
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

int cpu_attn_plan_make(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                       const struct gqa_attn_batch *batch)
{
    uint32_t group_size = layer->n_heads / layer->n_kv_heads;
    uint32_t rows_max =
        group_size < CPU_ATTN_PIECE_QUERIES ? CPU_ATTN_PIECE_QUERIES / group_size : 1;
    uint32_t n_workers = plan->host->n_threads;
    size_t n_pieces = 0;
    uint64_t cost = 0;
    int rc;

    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        n_pieces += ((size_t)batch->seqs[s].n_rows + rows_max - 1) / rows_max * layer->n_kv_heads;
    }
    rc = cpu_attn_grow(plan->host, (void **)&plan->pieces, &plan->pieces_bytes,
                       n_pieces * sizeof(*plan->pieces));
    if (rc < 0) {
        return rc;
    }
    plan->n_pieces = 0;
    for (uint32_t s = 0; s < batch->n_seqs; s++) {
        plan->n_pieces +=
            list_pieces(layer, &batch->seqs[s], s, rows_max, plan->pieces + plan->n_pieces);
    }
    for (uint32_t i = 0; i < plan->n_pieces; i++) {
        cost += piece_cost(&plan->pieces[i], group_size);
    }
    /* One worker shares with nobody: nothing is cut. */
    size_items(plan, layer,
               n_workers > 1 ? cost / (n_workers * CPU_ATTN_ITEMS_PER_WORKER) + 1 : UINT64_MAX / 2);
    rc = cpu_attn_grow(plan->host, (void **)&plan->items, &plan->items_bytes,
                       plan->n_items * sizeof(*plan->items));
    if (rc < 0) {
        return rc;
    }
    rc = cpu_attn_grow(plan->host, (void **)&plan->parts, &plan->parts_bytes,
                       plan->n_part_floats * sizeof(*plan->parts));
    if (rc < 0) {
        return rc;
    }
    list_items(plan);
    return 0;
}
