/* plugins/cpu/program.h - programs: a model's ops over float32 registers.
 *
 * program_prepare.c checks a description and builds everything that a step needs, so that a step
 * allocates nothing and its ops have nothing left to refuse. program.c runs steps; ops.c,
 * ops_rope.c, rows*.c, glu*.c, experts*.c and adapters.c hold the ops. Every op but LINEAR, EXPERTS
 * and ATTENTION is a function of one row, and rows are lent to the host's workers where there is
 * enough to do.
 *
 * Rows of class P differ from those of class D in LINEAR ops of the batch's rows only, and where
 * the level has panels (panels.h); elsewhere both use the arithmetic of linear.h. */
#ifndef PLUGINS_CPU_PROGRAM_H
#define PLUGINS_CPU_PROGRAM_H

#include "plugins/cpu/adapters.h"
#include "plugins/cpu/context.h"
#include "plugins/cpu/experts.h"
#include "plugins/cpu/glu.h"
#include "plugins/cpu/linear.h"
#include "plugins/common/op_times.h"
#include "plugins/cpu/panels.h"
#include "plugins/cpu/rows.h"

#include "format/types.h"

#include <gqa/plugin.h>

#define CPU_PROGRAM_NUMERICS 2u

#define CPU_PROGRAM_ROWS_MAX (1u << 20) /* of a batch; see plugins/common/check.h */

/* An op, with what it uses already looked up. */
struct cpu_op {
    struct gqa_op op;
    struct cpu_matrix matrix; /* LINEAR */
    /* NORM's weight and NORM's and LINEAR's bias as float32, or NULL. Owned by the program. */
    float *weight, *bias;
    struct gqa_weight table;          /* EMBED: (ne[1], ne[0]) */
    const struct fmt_type_info *type; /* EMBED: how to read a row of it */
    struct cpu_mixture *mixture;      /* EXPERTS; owned by the program */
    /* LINEAR: what adapters do to its weight, by ascending id; part of the program's list. */
    const struct cpu_adapter *adapters;
    uint32_t n_adapters;
    uint64_t weight_bytes; /* LINEAR: of the whole matrix, as it is read */
};

struct cpu_register {
    uint32_t width, flags;
    float *rows; /* (max rows, width) */
};

/* Cosines and sines of a batch's rows, filled by begin. */
struct cpu_rope {
    uint32_t n_freqs;
    double *freqs;
    float magnitude;
    float *cosines, *sines; /* (max_rows, n_freqs), times magnitude */
};

struct cpu_program {
    struct cpu_context *context;
    uint32_t max_rows, max_out_rows;
    uint32_t n_ops, n_regs, n_layers, n_ropes;
    struct cpu_op *ops;
    struct cpu_register *regs;
    struct gqa_attn_layer *layers;
    float *sinks; /* the layers' own copies, one after the other */
    struct cpu_rope *ropes;
    struct cpu_linear linear;
    struct cpu_panels panels;
    struct cpu_glu_kernels glu;
    struct cpu_row_kernels rows;
    struct cpu_mixture_room mixture_room;
    struct cpu_adapter_list adapters;
    struct cpu_adapter_room adapter_room;
    const struct gqa_batch *batch; /* between begin and end */
    struct plugin_op_times times;
};

int cpu_program_prepare(void *context, const struct gqa_program_desc *desc, void **ret_program,
                        struct gqa_reason *reason);
void cpu_program_release(void *context, void *program);
int cpu_program_begin(void *context, void *program, const struct gqa_batch *batch);
int cpu_program_run(void *context, void *program, uint32_t first_op, uint32_t last_op);
int cpu_program_end(void *context, void *program);
float *cpu_program_data(void *context, void *program, uint32_t reg);
uint32_t cpu_program_op_times(void *context, void *program, struct gqa_op_time *ret, uint32_t max);

/* Runs ops[0], a LINEAR, with all its followers among n_ops that read the same view; returns how
 * many ops that were. */
uint32_t cpu_program_run_linears(struct cpu_program *p, const struct cpu_op *ops, uint32_t n_ops);

/* A view's first value in a row. */
static inline float *cpu_view_row(const struct cpu_program *p, const struct gqa_view *v,
                                  uint32_t row)
{
    const struct cpu_register *reg = &p->regs[v->reg];
    return reg->rows + (size_t)row * reg->width + v->first;
}

/* How many rows a view has in the batch. */
static inline uint32_t cpu_view_n_rows(const struct cpu_program *p, const struct gqa_view *v)
{
    return p->regs[v->reg].flags & GQA_REG_OUT ? p->batch->n_out : p->batch->n_rows;
}

/* Calls fn for ranges that make up [0, n), on the host's workers where that is worth while: one
 * index is work like that on so many plain values. */
typedef void (*cpu_range_fn)(void *arg, uint32_t first, uint32_t last);
void cpu_spread(const struct gqa_host *host, cpu_range_fn fn, void *arg, uint32_t n,
                uint32_t values);

/* The ops on one row; for GATHER a row of dst. */
typedef void (*cpu_row_op)(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);

void cpu_op_embed(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);
void cpu_op_norm(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);
void cpu_op_rope(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);
void cpu_op_glu(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);
void cpu_op_add(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);
void cpu_op_scale(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);
void cpu_op_softcap(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);
void cpu_op_gather(const struct cpu_program *p, const struct cpu_op *op, uint32_t row);

/* Bytes of a matrix, or of all experts' ones, as they are read: packed, or as they lie in the file.
 */
static inline uint64_t cpu_weight_read_bytes(const struct gqa_weight *w)
{
    uint64_t n = w->ne[0] * w->ne[1] * (w->n_dims > 2 ? w->ne[2] : 1);
    return w->packed_bytes > 0 ? w->packed_bytes : fmt_type_bytes(fmt_type_info(w->type), n);
}

/* Fills a table's row of angles for a position. */
void cpu_rope_fill(const struct cpu_rope *rope, uint32_t row, uint32_t position);

#endif
