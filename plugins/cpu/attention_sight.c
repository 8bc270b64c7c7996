/* plugins/cpu/attention_sight.c - what a row sees: causal, mutual or by a mask, in a window or
 * view.
 */
#include "plugins/cpu/attention_sight.h"

/* ---- masks ------------------------------------------------------------------------------- */

static const uint64_t *mask_row(const struct gqa_attn_seq *seq, uint32_t row)
{
    return seq->new_mask + (size_t)row * ((seq->n_rows + 63) / 64);
}

static uint32_t mask_bit(const uint64_t *mask, uint32_t i)
{
    return mask[i / 64] >> i % 64 & 1;
}

static void sight_of_mask(struct cpu_attn_sight *ret, const struct gqa_attn_layer *layer,
                          const struct gqa_attn_seq *seq, const uint32_t *depths, uint32_t row,
                          uint64_t first)
{
    const uint64_t *mask = mask_row(seq, row);
    uint64_t from = plugin_first_in_window(layer, seq->n_past + depths[row]);
    uint64_t n_tokens = (uint64_t)seq->n_past + seq->n_rows;

    *ret = (struct cpu_attn_sight){.masked = 1};
    for (uint32_t i = 0; i < GQA_ATTN_SEGMENT_TOKENS && first + i < n_tokens; i++) {
        uint64_t place = first + i, position = place;

        if (place >= seq->n_past) {
            uint32_t j = (uint32_t)(place - seq->n_past);
            position = seq->n_past + depths[j];
            if (!mask_bit(mask, j)) {
                continue;
            }
        }
        if (position >= from) {
            ret->begin = ret->end == 0 ? (uint16_t)i : ret->begin;
            ret->end = (uint16_t)(i + 1);
            ret->seen[i / GQA_KV_BLOCK_TOKENS] |= (uint64_t)1 << i % GQA_KV_BLOCK_TOKENS;
        }
    }
}

/* ---- sights ------------------------------------------------------------------------------ */

void cpu_attn_sight_of(struct cpu_attn_sight *ret, const struct gqa_attn_layer *layer,
                       const struct gqa_attn_seq *seq, const uint32_t *depths, uint32_t row,
                       uint32_t segment)
{
    uint64_t first = (uint64_t)segment * GQA_ATTN_SEGMENT_TOKENS;
    uint64_t end = first + GQA_ATTN_SEGMENT_TOKENS;
    uint64_t from, to;

    if (seq->new_mask != NULL && end > seq->n_past) {
        sight_of_mask(ret, layer, seq, depths, row, first);
        return;
    }
    if (seq->new_mask != NULL) { /* the past: a window is all that there is to see to */
        from = plugin_first_in_window(layer, seq->n_past + depths[row]);
        to = seq->n_past;
    } else {
        from = plugin_first_seen(layer, seq, row);
        to = (uint64_t)plugin_last_seen(layer, seq, row) + 1;
    }
    from = from < first ? first : from;
    to = to > end ? end : to;
    *ret = (struct cpu_attn_sight){0};
    if (from < to) {
        ret->begin = (uint16_t)(from - first);
        ret->end = (uint16_t)(to - first);
    }
}

void cpu_attn_sight_of_sinks(struct cpu_attn_sight *ret, const struct gqa_attn_layer *layer,
                             const struct gqa_attn_seq *seq, uint32_t segment)
{
    uint64_t first = (uint64_t)segment * GQA_ATTN_SEGMENT_TOKENS;
    uint32_t n_sinks = plugin_table(layer, seq)->n_sinks;

    *ret = (struct cpu_attn_sight){0};
    if (first < n_sinks) {
        uint64_t left = n_sinks - first;
        ret->end = (uint16_t)(left < GQA_ATTN_SEGMENT_TOKENS ? left : GQA_ATTN_SEGMENT_TOKENS);
    }
}
