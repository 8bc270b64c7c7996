/* tools/synth/plan.h - which tensors a model of some shape has, in which type and how large their
 * values are. */
#ifndef TOOLS_SYNTH_PLAN_H
#define TOOLS_SYNTH_PLAN_H

#include "tools/synth/shape.h"

/* A choice of --type. */
struct synth_mixture {
    const char *name;   /* "q4_k_m" */
    uint32_t file_type; /* the value of general.file_type */
    uint32_t type;      /* enum fmt_type of most matrices */
    uint32_t head_type; /* of the output head, or of the embedding where it is the head */
    bool more_bits;     /* some attn_v and ffn_down in Q6_K */
};

/* NULL when there is none of that name. */
const struct synth_mixture *synth_mixture_by_name(const char *name);

/* The i-th mixture, or NULL past the end. */
const struct synth_mixture *synth_mixture_at(size_t i);

struct synth_tensor {
    char name[64];
    uint32_t type; /* enum fmt_type */
    uint32_t n_dims;
    uint64_t ne[3];
    float mean, deviation; /* of the values */
};

struct synth_plan {
    struct synth_tensor *tensors; /* owned */
    size_t n_tensors;
    uint64_t n_parameters;
};

/* 0 or -ENOMEM. */
int synth_plan_init(const struct synth_shape *shape, const struct synth_mixture *mixture,
                    struct synth_plan *ret);
void synth_plan_finish(struct synth_plan *plan);

#endif
