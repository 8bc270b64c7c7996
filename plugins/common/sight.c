#include "plugins/common/sight.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>

const struct gqa_page_table *plugin_table(const struct gqa_attn_layer *layer,
                                          const struct gqa_attn_seq *seq)
{
    static const struct gqa_page_table none;

    return seq->tables != NULL ? &seq->tables[layer->layer_class] : &none;
}

/* ---- checks ------------------------------------------------------------------------------ */

int plugin_check_sight(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq)
{
    const struct gqa_page_table *table = plugin_table(layer, seq);

    if (table->n_dropped > seq->n_past || (table->turned && table->recent == 0)) {
        return -EINVAL;
    }
    int is_odd = seq->mutual || seq->new_mask != NULL || (table->recent > 0 && layer->window > 0);
    return table->flags != 0 || (plugin_is_view(table) && is_odd) ? -ENOTSUP : 0;
}

int plugin_check_observed(const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                          uint32_t seq, uint32_t n_observed, uint32_t n_votes)
{
    if (seq >= batch->n_seqs || n_observed == 0 || n_observed > batch->seqs[seq].n_rows ||
        n_votes == 0) {
        return -EINVAL;
    }
    const struct gqa_attn_seq *s = &batch->seqs[seq];
    int r = plugin_check_sight(layer, s);
    if (r < 0) {
        return r;
    }
    if (n_votes > (uint64_t)plugin_past(layer, s) + s->n_rows - n_observed) {
        return -EINVAL;
    }
    bool is_odd = !batch->commit || s->new_mask != NULL || s->mutual;
    return is_odd || plugin_table(layer, s)->recent > 0 ? -ENOTSUP : 0;
}

/* ---- places ------------------------------------------------------------------------------ */

/* The first slot whose row sees not all of the view before it. */
static uint64_t first_slot_apart(const struct gqa_page_table *table)
{
    return table->recent > 0 ? (uint64_t)table->n_sinks + table->recent : UINT64_MAX;
}

uint32_t plugin_first_apart(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq)
{
    uint64_t apart = first_slot_apart(plugin_table(layer, seq));
    uint32_t past = plugin_past(layer, seq);
    uint64_t row = apart > past ? apart - past : 0;

    return row < seq->n_rows ? (uint32_t)row : seq->n_rows;
}

uint32_t plugin_first_in_window(const struct gqa_attn_layer *layer, uint32_t place)
{
    return layer->window != 0 && place >= layer->window ? place - layer->window + 1 : 0;
}

uint32_t plugin_first_seen(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                           uint32_t row)
{
    const struct gqa_page_table *table = plugin_table(layer, seq);
    /* With a mask any row may have the position of the first. */
    uint32_t slot = plugin_past(layer, seq) + (seq->new_mask != NULL ? 0 : row);

    if (slot >= first_slot_apart(table)) {
        return slot - table->recent + 1;
    }
    return plugin_first_in_window(layer, slot);
}

uint32_t plugin_last_seen(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                          uint32_t row)
{
    uint64_t position = (uint64_t)plugin_past(layer, seq) + row;
    uint64_t last = (uint64_t)plugin_past(layer, seq) + seq->n_rows - 1;

    if (seq->mutual) {
        uint64_t reach = position + layer->window - 1;
        return (uint32_t)(layer->window != 0 && reach < last ? reach : last);
    }
    return (uint32_t)(seq->new_mask != NULL ? last : position);
}

/* ---- masks ------------------------------------------------------------------------------- */

void plugin_count_depths(const struct gqa_attn_seq *seq, uint32_t *depths)
{
    uint32_t tail = seq->n_rows % 64;

    for (uint32_t row = 0; row < seq->n_rows; row++) {
        const uint64_t *mask = seq->new_mask + (size_t)row * ((seq->n_rows + 63) / 64);
        uint32_t n = 0;

        for (uint32_t w = 0; w < seq->n_rows / 64; w++) {
            n += (uint32_t)__builtin_popcountll(mask[w]);
        }
        if (tail != 0) { /* bits past the last row mean nothing */
            n += (uint32_t)__builtin_popcountll(mask[seq->n_rows / 64] << (64 - tail));
        }
        depths[row] = n - (uint32_t)(mask[row / 64] >> row % 64 & 1);
    }
}

/* ---- turning ----------------------------------------------------------------------------- */

void plugin_find_turn(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                      uint32_t row, float *turn)
{
    const struct gqa_page_table *table = plugin_table(layer, seq);
    const struct gqa_rope_table *rope = layer->rope;
    uint64_t position = (uint64_t)seq->n_past + row;
    double back = (double)(position - ((uint64_t)table->n_sinks + table->recent - 1));

    for (uint32_t i = 0; i < rope->n_freqs; i++) {
        turn[i] = (float)cos(back * rope->freqs[i]);
        turn[rope->n_freqs + i] = (float)sin(back * rope->freqs[i]);
    }
}
