/* tests/kernels/attention_cpu.h - the cpu backend's attention as attn_problem_run() wants it. */
#ifndef TESTS_KERNELS_ATTENTION_CPU_H
#define TESTS_KERNELS_ATTENTION_CPU_H

#include "plugins/cpu/attention.h"
#include "tests/kernels/attention_problem.h"

static inline int attn_cpu_append(void *context, const struct gqa_attn_layer *layer,
                                  const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    return cpu_attention_append(context, layer, batch, io);
}

static inline int attn_cpu_attend(void *context, const struct gqa_attn_layer *layer,
                                  const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    return cpu_attention_attend(context, layer, batch, io);
}

static inline struct attn_backend attn_cpu_backend(struct cpu_attention *a)
{
    return (struct attn_backend){a, attn_cpu_append, attn_cpu_attend};
}

static inline int attn_cpu_run(struct attn_problem *p, struct cpu_attention *a, uint32_t chunk,
                               float *out)
{
    struct attn_backend backend = attn_cpu_backend(a);

    return attn_problem_run(p, &backend, chunk, out);
}

#endif
