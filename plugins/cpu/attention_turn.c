#include "plugins/cpu/attention_turn.h"

#include <stddef.h>

void cpu_attn_turn(const struct gqa_attn_layer *layer, const float *turn, float *q)
{
    uint32_t n = layer->rope->n_freqs;
    int neighbours = layer->rope_kind == GQA_ROPE_NEIGHBOUR;
    uint32_t step = neighbours ? 2 : 1, other = neighbours ? 1 : n;

    for (uint32_t i = 0; i < n; i++) {
        float *x = q + (size_t)i * step, *y = x + other, a = *x, b = *y;

        *x = a * turn[i] + b * turn[n + i]; /* by the angle's negative */
        *y = b * turn[i] - a * turn[n + i];
    }
}
