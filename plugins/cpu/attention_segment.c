/* plugins/cpu/attention_segment.c - walks a segment's blocks for the vector levels. */
#include "plugins/cpu/attention_segment.h"

#include <math.h>
#include <string.h>

/* [first, end) is what some query sees; [all_first, all_end) what all see, empty when nothing is.
 */
struct hull {
    uint32_t first, end;
    uint32_t all_first, all_end;
};

static struct hull hull_of(const struct cpu_attn_pack *pack)
{
    struct hull h = {GQA_ATTN_SEGMENT_TOKENS, 0, 0, GQA_ATTN_SEGMENT_TOKENS};

    for (uint32_t i = 0; i < pack->n_queries; i++) {
        uint32_t begin = pack->begin[i], end = pack->end[i];

        if (begin < end) {
            h.first = begin < h.first ? begin : h.first;
            h.end = end > h.end ? end : h.end;
        }
        h.all_first = begin > h.all_first ? begin : h.all_first;
        h.all_end = end < h.all_end ? end : h.all_end;
    }
    if (h.all_first >= h.all_end || pack->seen != NULL) {
        h.all_first = h.all_end = GQA_ATTN_SEGMENT_TOKENS; /* everything is somebody's own */
    }
    return h;
}

static uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* Tokens [first, end) of one block for those queries only that see them. Neighbours of one range
 * (the heads of one row) go together. */
static void weigh_own(const struct cpu_attn_steps *steps, const struct cpu_attn_pack *pack,
                      uint32_t first, uint32_t end, const char *ahead)
{
    for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
        uint32_t from = max_u32(pack->begin[i], first), to = min_u32(pack->end[i], end);

        for (n = 1; i + n < pack->n_queries && pack->begin[i + n] == pack->begin[i] &&
                    pack->end[i + n] == pack->end[i];
             n++) {
        }
        if (from < to) {
            steps->weigh(pack, i, n, from, to, ahead);
        }
    }
}

static const uint64_t *mask_of(const struct cpu_attn_pack *pack, uint32_t query)
{
    return pack->seen != NULL ? pack->seen + (size_t)query * CPU_ATTN_SEGMENT_BLOCKS : NULL;
}

/* Runs of set bits of one block's word of a mask, for those queries whose words are the same. */
static void weigh_seen(const struct cpu_attn_steps *steps, const struct cpu_attn_pack *pack,
                       uint32_t block, const char *ahead)
{
    uint32_t first = block * GQA_KV_BLOCK_TOKENS;

    for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
        uint64_t bits = mask_of(pack, i)[block];

        for (n = 1; i + n < pack->n_queries && mask_of(pack, i + n)[block] == bits; n++) {
        }
        for (uint32_t from = 0, to; bits != 0; bits = to < 64 ? bits >> to << to : 0) {
            from = (uint32_t)__builtin_ctzll(bits);
            uint64_t rest = ~(bits >> from); /* bits above from, a set one where the run ends */
            to = rest != 0 ? from + (uint32_t)__builtin_ctzll(rest) : 64;
            steps->weigh(pack, i, n, first + from, first + to, ahead);
        }
    }
}

/* Each query meets its tokens in ascending order: its own before the common ones, the common ones,
 * its own after them. A weight of zero would not do for the unseen: their V may be anything. */
static void weigh_block(const struct cpu_attn_steps *steps, const struct cpu_attn_pack *pack,
                        const struct hull *h, uint32_t block, const char *ahead)
{
    uint32_t first = block * GQA_KV_BLOCK_TOKENS, end = first + GQA_KV_BLOCK_TOKENS;
    uint32_t from = max_u32(first, h->all_first), to = min_u32(end, h->all_end);

    if (pack->seen != NULL) {
        weigh_seen(steps, pack, block, ahead);
        return;
    }
    weigh_own(steps, pack, first, min_u32(end, h->all_first), ahead);
    if (from < to) {
        steps->weigh(pack, 0, pack->n_queries, from, to, ahead);
    }
    weigh_own(steps, pack, max_u32(first, h->all_end), end, ahead);
}

void cpu_attn_segment_by_blocks(const struct cpu_attn_steps *steps,
                                const struct cpu_attn_pack *pack)
{
    const struct gqa_attn_layer *layer = pack->layer;
    struct hull h = hull_of(pack);
    uint32_t first = h.first / GQA_KV_BLOCK_TOKENS;
    uint32_t last = h.end == 0 ? 0 : (h.end - 1) / GQA_KV_BLOCK_TOKENS;
    uint32_t v_pad = cpu_attn_v_pad(layer->v_dim), part_floats = cpu_attn_part_floats(layer->v_dim);

    memset(pack->parts, 0, (size_t)pack->n_queries * part_floats * sizeof(float));
    for (uint32_t b = first; b <= last && h.end > 0; b++) {
        steps->score(pack, b, b < last ? pack->k[b + 1] : pack->v[first]);
    }
    for (uint32_t i = 0; i < pack->n_queries; i++) {
        float *end = pack->parts + (size_t)i * part_floats + v_pad;

        if (pack->begin[i] < pack->end[i]) {
            steps->softmax(layer, mask_of(pack, i),
                           pack->scores + (size_t)i * GQA_ATTN_SEGMENT_TOKENS, pack->begin[i],
                           pack->end[i], end);
        } else {
            end[0] = -INFINITY;
        }
    }
    for (uint32_t b = first; b <= last && h.end > 0; b++) {
        const char *next = pack->next_k != NULL ? pack->next_k : pack->v[b];
        weigh_block(steps, pack, &h, b, b < last ? pack->v[b + 1] : next);
    }
}
