#include "plugins/cpu/attention_turn.h"

#include "plugins/cpu/attention_sight.h"

#include <math.h>

int cpu_attn_turns(const struct cpu_attn_job *job, uint32_t seq)
{
    return job->layer->rope != NULL && cpu_attn_table(job->layer, &job->batch->seqs[seq])->turned;
}

void cpu_attn_find_turn(const struct cpu_attn_job *job, uint32_t seq, uint32_t row, float *turn)
{
    const struct gqa_attn_seq *s = &job->batch->seqs[seq];
    const struct gqa_page_table *table = cpu_attn_table(job->layer, s);
    const struct gqa_rope_table *rope = job->layer->rope;
    uint64_t position = (uint64_t)s->n_past + row - s->first_row;
    double back = (double)(position - ((uint64_t)table->n_sinks + table->recent - 1));

    for (uint32_t i = 0; i < rope->n_freqs; i++) {
        turn[i] = (float)cos(back * rope->freqs[i]);
        turn[rope->n_freqs + i] = (float)sin(back * rope->freqs[i]);
    }
}

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
