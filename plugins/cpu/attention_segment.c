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

/* How many queries from query on, neighbours (the heads of one row), see one range. */
static uint32_t count_alike(const struct cpu_attn_pack *pack, uint32_t query)
{
    uint32_t i = query + 1;

    while (i < pack->n_queries && pack->begin[i] == pack->begin[query] &&
           pack->end[i] == pack->end[query]) {
        i++;
    }
    return i - query;
}

/* Tokens [first, end) of one block for those queries only that see them. */
static void weigh_own(const struct cpu_attn_steps *steps, const struct cpu_attn_pack *pack,
                      uint32_t first, uint32_t end, const char *ahead)
{
    for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
        uint32_t from = max_u32(pack->begin[i], first), to = min_u32(pack->end[i], end);

        n = count_alike(pack, i);
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

static void softmax(const struct cpu_attn_steps *steps, const struct cpu_attn_pack *pack)
{
    const size_t part_floats = cpu_attn_part_floats(pack->layer->v_dim);
    float *ends = pack->parts + cpu_attn_v_pad(pack->layer->v_dim);

    for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
        n = pack->seen == NULL ? count_alike(pack, i) : 1;
        if (pack->begin[i] < pack->end[i]) {
            steps->softmax(pack->layer, mask_of(pack, i), n,
                           pack->scores + (size_t)i * GQA_ATTN_SEGMENT_TOKENS, pack->begin[i],
                           pack->end[i], ends + i * part_floats, part_floats);
            continue;
        }
        for (uint32_t j = i; j < i + n; j++) {
            ends[j * part_floats] = -INFINITY;
        }
    }
}

/* Packs on their way through a segment's blocks [first, end). */
struct way {
    const struct cpu_attn_pack *packs;
    uint32_t n_packs, first, end;
    struct hull hulls[CPU_ATTN_PACKS_MAX];
};

static int meets(const struct hull *h, uint32_t block)
{
    return h->first < (block + 1) * GQA_KV_BLOCK_TOKENS && h->end > block * GQA_KV_BLOCK_TOKENS;
}

/* K or V that is read next, from pack i of a block on, and does not lie here. NULL: nothing. */
static const char *next_on(const struct way *way, uint32_t block, uint32_t i, int of_v,
                           const char *here)
{
    for (; block < way->end; block++, i = 0) {
        for (; i < way->n_packs; i++) {
            const struct cpu_attn_pack *pack = &way->packs[i];
            const char *there = of_v ? pack->v[block] : pack->k[block];

            if (there != here && meets(&way->hulls[i], block)) {
                return there;
            }
        }
    }
    return NULL;
}

static const char *after_k(const struct way *way, uint32_t block, uint32_t i)
{
    const char *next = next_on(way, block, i + 1, 0, way->packs[i].k[block]);

    return next != NULL ? next : next_on(way, way->first, 0, 1, NULL);
}

static const char *after_v(const struct way *way, uint32_t block, uint32_t i)
{
    const char *next = next_on(way, block, i + 1, 1, way->packs[i].v[block]);

    return next != NULL ? next : way->packs[way->n_packs - 1].next_k;
}

static void set_out(struct way *way, const struct cpu_attn_pack *packs, uint32_t n_packs)
{
    way->packs = packs;
    way->n_packs = n_packs;
    way->first = CPU_ATTN_SEGMENT_BLOCKS;
    way->end = 0;
    for (uint32_t i = 0; i < n_packs; i++) {
        const struct cpu_attn_pack *pack = &packs[i];
        struct hull h = hull_of(pack);

        memset(pack->parts, 0,
               (size_t)pack->n_queries * cpu_attn_part_floats(pack->layer->v_dim) * sizeof(float));
        way->hulls[i] = h;
        if (h.first < h.end) {
            way->first = min_u32(way->first, h.first / GQA_KV_BLOCK_TOKENS);
            way->end = max_u32(way->end, (h.end - 1) / GQA_KV_BLOCK_TOKENS + 1);
        }
    }
}

/* K of all packs in a block, then in the next one; then V: as they lie in memory, where the packs
 * are of neighbouring groups. */
void cpu_attn_segment_by_blocks(const struct cpu_attn_steps *steps,
                                const struct cpu_attn_pack *packs, uint32_t n_packs)
{
    struct way way;

    set_out(&way, packs, n_packs);
    for (uint32_t block = way.first; block < way.end; block++) {
        for (uint32_t i = 0; i < n_packs; i++) {
            if (meets(&way.hulls[i], block)) {
                steps->score(&packs[i], block, after_k(&way, block, i));
            }
        }
    }
    for (uint32_t i = 0; i < n_packs; i++) {
        softmax(steps, &packs[i]);
    }
    for (uint32_t block = way.first; block < way.end; block++) {
        for (uint32_t i = 0; i < n_packs; i++) {
            if (meets(&way.hulls[i], block)) {
                weigh_block(steps, &packs[i], &way.hulls[i], block, after_v(&way, block, i));
            }
        }
    }
}
