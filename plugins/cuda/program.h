/* plugins/cuda/program.h - programs: a model's ops over registers on the device.
 *
 * program_prepare.c refuses what cannot run and puts weights and registers on the device;
 * program_begin.c takes a batch there (tokens' embeddings, angles, pages); program.c runs ops as
 * kernels on one stream, program_graph.c replays them, program_times.c times them; program_end.c
 * brings K and V of the new tokens back to the host's blocks. The host waits for the device once a
 * step, at its end.
 *
 * Row classes P and D have the same arithmetic here, unless the context has cublaslt=on
 * (cublaslt.h). */
#ifndef PLUGINS_CUDA_PROGRAM_H
#define PLUGINS_CUDA_PROGRAM_H

#include "plugins/cuda/adapters.h"
#include "plugins/cuda/attention.h"
#include "plugins/cuda/cublaslt.h"
#include "plugins/cuda/experts.h"
#include "plugins/cuda/pages.h"
#include "plugins/cuda/products.h"
#include "plugins/cuda/program_graph.h"
#include "plugins/cuda/program_times.h"
#include "plugins/cuda/weights.h"

#define CUDA_PROGRAM_NUMERICS 2u
#define CUDA_PROGRAM_ROWS_MAX 65535u /* a grid's second dimension */

/* Host memory that the device reads and writes by itself. */
struct cuda_pinned {
    void *at;
    uint64_t bytes;
};

struct cuda_register {
    uint32_t width, flags;
    struct cuda_buffer rows; /* (max rows, width) */
};

struct cuda_op {
    struct gqa_op op;
    struct gqa_weight table;            /* EMBED */
    struct cuda_matrix matrix;          /* LINEAR; NORM: weight and bias. The program's weights */
    struct cuda_adapter_table adapters; /* LINEAR */
    struct cuda_lt_shape *lt;           /* LINEAR: how its rows of prompts are; NULL: as all */
    struct cuda_mixture *mixture;       /* EXPERTS */
    struct cuda_buffer embeddings;      /* EMBED: the batch's rows */
};

struct cuda_rope {
    uint32_t n_freqs;
    float magnitude;
    double *freqs;
    struct cuda_buffer angles; /* cosines (n_rows, n_freqs), then sines */
};

/* A layer, and what its kind shares. */
struct cuda_layer {
    struct gqa_attn_layer host; /* without sinks */
    struct cuda_attn_layer device;
    uint32_t kind;   /* index of its plan */
    uint64_t log_at; /* of its part of the log, in bytes for each row of the batch */
};

/* What began with a batch and ends with it. */
struct cuda_step {
    const struct gqa_batch *batch; /* NULL: none */
    bool failed;
    bool adapted;         /* some row carries an adapter */
    bool apart;           /* some row is a prompt's, and those go another way */
    uint32_t *page_index; /* by class and sequence, ascending; CUDA_NONE: none */
    uint64_t *page_at;    /* their addresses */
    size_t n_pages;       /* of all classes */
};

struct cuda_program {
    struct cuda_context *context;
    uint32_t max_rows, max_out_rows;
    uint32_t n_ops, n_regs, n_layers, n_ropes, n_kinds, n_classes;
    struct cuda_op *ops;
    struct cuda_register *regs;
    struct cuda_layer *layers;
    struct cuda_rope *ropes;
    struct cuda_plan *plans;     /* (n_kinds) */
    uint32_t *kind_layers;       /* (n_kinds) a layer of each */
    uint64_t *class_bytes;       /* (n_classes) of a block */
    struct cuda_buffer *weights; /* (n_weights) uploaded matrices and vectors */
    uint32_t n_weights;
    struct cuda_buffer *sinks; /* (n_layers) */
    struct cuda_inputs inputs;
    struct cuda_lt_room lt_room;
    bool has_lt; /* some op has a shape of the library's */
    struct cuda_mixture_room mixture_room;
    struct cuda_adapters adapters;
    struct cuda_buffer out_rows;
    struct cuda_buffer log;        /* new K and V by layer, as stored */
    uint64_t log_row_bytes;        /* of all layers */
    struct cuda_pinned host_log;   /* the log, on the host */
    struct cuda_pinned staging;    /* embeddings and angles on their way */
    uint32_t n_out;                /* of the last batch */
    struct cuda_pinned *downloads; /* (n_regs) copies of output registers */
    struct cuda_step step;
    struct cuda_graphs graphs;
    struct cuda_times times;
};

int cuda_program_prepare(struct cuda_context *c, const struct gqa_program_desc *desc,
                         struct cuda_program **ret, struct gqa_reason *reason);
void cuda_program_release(struct cuda_program *p);

int cuda_program_begin(struct cuda_program *p, const struct gqa_batch *batch);
int cuda_program_run(struct cuda_program *p, uint32_t first, uint32_t last);
int cuda_program_end(struct cuda_program *p);
float *cuda_program_data(struct cuda_program *p, uint32_t reg);
/* See gqa_program.observe. */
int cuda_program_observe(struct cuda_program *p, uint32_t op, uint32_t seq, uint32_t n_observed,
                         uint32_t n_votes, float *votes);

/* Bytes to the device, into a buffer that is made large enough; from may be freed then. */
int cuda_program_upload(struct cuda_program *p, const void *from, uint64_t bytes,
                        struct cuda_buffer *to);
/* A matrix in our layout, and a vector, or one of each expert, as float32: once, whatever the
 * number of ops that use it. weight may be GQA_NONE. */
int cuda_program_upload_matrix(struct cuda_program *p, const struct gqa_weight *w,
                               struct cuda_buffer *to);
int cuda_program_upload_floats(struct cuda_program *p, const struct gqa_program_desc *desc,
                               uint32_t weight, struct cuda_buffer *to);

/* At least so many bytes; what it held is lost when it grows. */
int cuda_pinned_reserve(struct cuda_context *c, struct cuda_pinned *p, uint64_t bytes);

/* A GLU's activation as kernels know it. */
static inline uint32_t cuda_map_of_act(uint32_t act)
{
    static const uint32_t acts[] = {
        [GQA_ACT_SILU] = CUDA_MAP_SILU, [GQA_ACT_GELU_TANH] = CUDA_MAP_GELU_TANH,
        [GQA_ACT_GELU] = CUDA_MAP_GELU, [GQA_ACT_SWIGLU_OAI] = CUDA_MAP_SWIGLU_OAI,
        [GQA_ACT_RELU] = CUDA_MAP_RELU,
    };
    return acts[act];
}

/* A layer of a class, for what its sequences' tables say of pages, whatever the layers' windows. */
static inline struct gqa_attn_layer cuda_class_layer(uint32_t class)
{
    return (struct gqa_attn_layer){.layer_class = class};
}

/* A view's first value on the device. */
static inline float *cuda_view(const struct cuda_program *p, const struct gqa_view *v)
{
    return (float *)cuda_pointer(p->regs[v->reg].rows.at) + v->first;
}

static inline uint32_t cuda_view_rows(const struct cuda_program *p, const struct gqa_view *v)
{
    return p->regs[v->reg].flags & GQA_REG_OUT ? p->step.batch->n_out : p->step.batch->n_rows;
}

#endif
