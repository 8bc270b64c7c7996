/* plugins/cpu/ops_rope.c - rotary position embeddings.
 *
 * Angles are computed in double: a position times a frequency reaches 10^5 and more, of which
 * float32 would leave few fractional digits. Once per step and table, for all layers and heads.
 *
 * Source: RoFormer (Su et al., 2021); the two pairings are those of GPT-J and GPT-NeoX. */
#include "plugins/cpu/program.h"

#include <math.h>

void cpu_rope_fill(const struct cpu_rope *rope, uint32_t row, uint32_t position)
{
    float *cosines = rope->cosines + (size_t)row * rope->n_freqs;
    float *sines = rope->sines + (size_t)row * rope->n_freqs;

    for (uint32_t i = 0; i < rope->n_freqs; i++) {
        double angle = (double)position * rope->freqs[i];
        cosines[i] = (float)(cos(angle) * (double)rope->magnitude);
        sines[i] = (float)(sin(angle) * (double)rope->magnitude);
    }
}

/* Rotates n pairs: pair i is a[i * step], b[i * step]. */
static void rotate(float *a, float *b, uint32_t step, uint32_t n, const float *cosines,
                   const float *sines)
{
    for (uint32_t i = 0; i < n; i++) {
        float x = a[i * step], y = b[i * step];
        a[i * step] = x * cosines[i] - y * sines[i];
        b[i * step] = x * sines[i] + y * cosines[i];
    }
}

void cpu_op_rope(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    const struct cpu_rope *rope = &p->ropes[op->op.u.rope.table];
    const float *cosines = rope->cosines + (size_t)row * rope->n_freqs;
    const float *sines = rope->sines + (size_t)row * rope->n_freqs;
    float *view = cpu_view_row(p, &op->op.dst, row);

    for (uint32_t i = 0; i < op->op.dst.width; i += op->op.u.rope.head_dim) {
        float *head = view + i;
        if (op->op.u.rope.kind == GQA_ROPE_NEIGHBOUR) {
            rotate(head, head + 1, 2, rope->n_freqs, cosines, sines);
        } else {
            rotate(head, head + rope->n_freqs, 1, rope->n_freqs, cosines, sines);
        }
    }
}
