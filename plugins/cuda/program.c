/* plugins/cuda/program.c - runs ops as kernels on the context's stream. */
#include "plugins/cuda/program.h"

#include <errno.h>

static int run_embed(struct cuda_program *p, const struct cuda_op *op)
{
    struct cuda_map_args args = {
        .a = cuda_pointer(op->embeddings.at),
        .a_stride = op->op.dst.width,
        .dst = cuda_view(p, &op->op.dst),
        .dst_stride = p->regs[op->op.dst.reg].width,
        .width = op->op.dst.width,
        .kind = CUDA_MAP_SCALE,
        .scale = 1.0f,
    };

    return cuda_launch(p->context, p->context->kernels[CUDA_KERNEL_map],
                       (struct cuda_grid){(args.width + 255) / 256, p->step.batch->n_rows, 256, 0},
                       &args);
}

static int run_norm(struct cuda_program *p, const struct cuda_op *op)
{
    struct cuda_norm_args args = {
        .src = cuda_view(p, &op->op.src),
        .dst = cuda_view(p, &op->op.dst),
        .weight = cuda_pointer(op->matrix.weight),
        .bias = cuda_pointer(op->matrix.bias),
        .src_stride = p->regs[op->op.src.reg].width,
        .dst_stride = p->regs[op->op.dst.reg].width,
        .width = op->op.dst.width,
        .dim = op->op.u.norm.dim,
        .layer = op->op.u.norm.kind == GQA_NORM_LAYER,
        .eps = op->op.u.norm.eps,
    };

    return cuda_launch(
        p->context, p->context->kernels[CUDA_KERNEL_norm],
        (struct cuda_grid){args.width / args.dim, cuda_view_rows(p, &op->op.dst), 256, 0}, &args);
}

static int run_rope(struct cuda_program *p, const struct cuda_op *op)
{
    const struct cuda_rope *rope = &p->ropes[op->op.u.rope.table];
    uint32_t n_rows = p->step.batch->n_rows;
    float *angles = cuda_pointer(rope->angles.at);
    struct cuda_rope_args args = {
        .dst = cuda_view(p, &op->op.dst),
        .stride = p->regs[op->op.dst.reg].width,
        .cosines = angles,
        .sines = angles + (size_t)n_rows * rope->n_freqs,
        .width = op->op.dst.width,
        .head_dim = op->op.u.rope.head_dim,
        .n_freqs = rope->n_freqs,
        .half = op->op.u.rope.kind == GQA_ROPE_HALF,
    };

    return cuda_launch(p->context, p->context->kernels[CUDA_KERNEL_rope],
                       (struct cuda_grid){n_rows, 1, 256, 0}, &args);
}

static int run_map(struct cuda_program *p, const struct cuda_op *op)
{
    const struct gqa_op *o = &op->op;
    bool both = o->kind == GQA_OP_ADD || (o->kind == GQA_OP_GLU && o->src2.reg != GQA_NONE);
    struct cuda_map_args args = {
        .a = cuda_view(p, &o->src),
        .b = both ? cuda_view(p, &o->src2) : NULL,
        .dst = cuda_view(p, &o->dst),
        .rows = o->kind == GQA_OP_GATHER ? cuda_pointer(p->out_rows.at) : NULL,
        .a_stride = p->regs[o->src.reg].width,
        .b_stride = both ? p->regs[o->src2.reg].width : 0,
        .dst_stride = p->regs[o->dst.reg].width,
        .width = o->dst.width,
        .kind = CUDA_MAP_SCALE,
        .scale = o->kind == GQA_OP_GATHER ? 1.0f : o->scale,
    };

    if (o->kind == GQA_OP_ADD) {
        args.kind = CUDA_MAP_ADD;
    } else if (o->kind == GQA_OP_SOFTCAP) {
        args.kind = CUDA_MAP_SOFTCAP;
    } else if (o->kind == GQA_OP_GLU) {
        args.kind = cuda_map_of_act(o->u.glu.kind);
        args.alpha = o->u.glu.alpha;
        args.limit = o->u.glu.limit;
    }
    return cuda_launch(
        p->context, p->context->kernels[CUDA_KERNEL_map],
        (struct cuda_grid){(args.width + 255) / 256, cuda_view_rows(p, &o->dst), 256, 0}, &args);
}

/* ---- products ---------------------------------------------------------------------------- */

static bool is_same_view(const struct gqa_view *a, const struct gqa_view *b)
{
    return a->reg == b->reg && a->first == b->first && a->width == b->width;
}

/* Neighbouring rows of a step's products. */
struct rows {
    uint32_t first, n;
    bool prompt; /* all of class P, which ops that have a shape of cuBLASLt's leave to it */
};

/* Rows of a product by cuBLASLt, which wants their halves: once for all ops. 1: it has failed. */
static int multiply_apart(struct cuda_program *p, const struct cuda_op *op, const struct rows *rows,
                          bool *rounded)
{
    const struct gqa_view *src = &op->op.src, *dst = &op->op.dst;
    uint64_t src_stride = p->regs[src->reg].width, dst_stride = p->regs[dst->reg].width;
    const struct cuda_lt_rows from = {cuda_view(p, src) + rows->first * src_stride, src_stride,
                                      rows->n};
    int r = 0;

    if (!*rounded) {
        r = cuda_lt_round(p->context, &p->lt_room, cuda_input_kind_of(op->matrix.type), src->width,
                          &from);
        *rounded = true;
    }
    return r < 0 ? r
                 : cuda_lt_multiply(p->context, &p->lt_room, op->lt, &op->matrix, rows->n,
                                    cuda_view(p, dst) + rows->first * dst_stride, dst_stride);
}

/* Products of one input, which is laid out once. */
static int multiply(struct cuda_program *p, const struct cuda_op *ops, uint32_t n,
                    const struct rows *rows)
{
    const struct gqa_view *src = &ops[0].op.src;
    uint64_t stride = p->regs[src->reg].width;
    enum cuda_input_kind kind = cuda_input_kind_of(ops[0].matrix.type);
    struct cuda_quantise_args input = {.src = cuda_view(p, src) + rows->first * stride,
                                       .stride = stride,
                                       .n_rows = rows->n,
                                       .k = src->width};
    bool rounded = false, laid_out = false;
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < n; i++) {
        const struct gqa_view *dst = &ops[i].op.dst;
        uint64_t dst_stride = p->regs[dst->reg].width;
        bool apart = rows->prompt && ops[i].lt != NULL && cuda_lt_works(ops[i].lt);

        r = apart ? multiply_apart(p, &ops[i], rows, &rounded) : 1;
        if (r == 1 && !laid_out) {
            r = cuda_inputs_lay_out(p->context, &p->inputs, kind, &input);
            laid_out = true;
            r = r < 0 ? r : 1;
        }
        if (r == 1) {
            r = cuda_multiply(p->context, &p->inputs, &ops[i].matrix,
                              cuda_view(p, dst) + rows->first * dst_stride, dst_stride, rows->n);
        }
    }
    return r;
}

/* The rows from `first` on that go one way. */
static struct rows rows_from(const struct cuda_program *p, uint32_t first, uint32_t n_rows)
{
    const uint8_t *classes = p->step.apart ? p->step.batch->attention->row_class : NULL;
    struct rows rows = {first, n_rows - first, false};

    if (classes != NULL) {
        rows.prompt = classes[first] == GQA_ROW_P;
        for (rows.n = 1; first + rows.n < n_rows; rows.n++) {
            if ((classes[first + rows.n] == GQA_ROW_P) != rows.prompt) {
                break;
            }
        }
    }
    return rows;
}

/* Runs ops[0], a LINEAR, and those after it that read the same view. *ret_n: how many those were.
 */
static int run_linears(struct cuda_program *p, const struct cuda_op *ops, uint32_t n_ops,
                       uint32_t *ret_n)
{
    const struct gqa_view *src = &ops[0].op.src;
    enum cuda_input_kind kind = cuda_input_kind_of(ops[0].matrix.type);
    bool out = p->regs[src->reg].flags & GQA_REG_OUT; /* those have no classes */
    uint32_t n_rows = cuda_view_rows(p, src), n = 1;
    int r = 0;

    while (n < n_ops && ops[n].op.kind == GQA_OP_LINEAR && is_same_view(&ops[n].op.src, src) &&
           cuda_input_kind_of(ops[n].matrix.type) == kind) {
        n++;
    }
    for (uint32_t first = 0; r == 0 && first < n_rows;) {
        struct rows rows = out ? (struct rows){0, n_rows, false} : rows_from(p, first, n_rows);
        r = multiply(p, ops, n, &rows);
        first += rows.n;
    }
    for (uint32_t i = 0; r == 0 && n_rows > 0 && i < n; i++) {
        r = cuda_adapters_run(p, &ops[i]);
    }
    *ret_n = n;
    return r;
}

/* ---- attention --------------------------------------------------------------------------- */

static int run_attention(struct cuda_program *p, const struct cuda_op *op)
{
    const struct gqa_op *o = &op->op;
    const struct cuda_layer *l = &p->layers[o->layer];
    struct gqa_attn_io io = {
        .q = cuda_view(p, &o->src),
        .k = cuda_view(p, &o->src2),
        .v = cuda_view(p, &o->src3),
        .out = cuda_view(p, &o->dst),
        .q_stride = p->regs[o->src.reg].width,
        .k_stride = p->regs[o->src2.reg].width,
        .v_stride = p->regs[o->src3.reg].width,
        .out_stride = p->regs[o->dst.reg].width,
    };
    bool commit = p->step.batch->attention->commit != 0;
    CUdeviceptr log = p->log.at + l->log_at * p->step.batch->n_rows;

    int r = cuda_plan_append(p->context, &p->plans[l->kind], &l->device, &io, commit ? log : 0);
    return r < 0 ? r : cuda_plan_attend(p->context, &p->plans[l->kind], &l->device, &io);
}

int cuda_program_observe(struct cuda_program *p, uint32_t op, uint32_t seq, uint32_t n_observed,
                         uint32_t n_votes, float *votes)
{
    if (p->step.batch == NULL || op >= p->n_ops || p->ops[op].op.kind != GQA_OP_ATTENTION) {
        return -EINVAL;
    }
    const struct gqa_attn_batch *batch = p->step.batch->attention;
    const struct gqa_op *o = &p->ops[op].op;
    const struct cuda_layer *l = &p->layers[o->layer];
    const struct gqa_attn_io io = {.q = cuda_view(p, &o->src),
                                   .q_stride = p->regs[o->src.reg].width};
    int r = plugin_check_observed(&l->host, batch, seq, n_observed, n_votes);

    r = r < 0 ? r : cuda_enter(p->context);
    if (r < 0) {
        return r;
    }
    r = cuda_plan_observe(p->context, &p->plans[l->kind], &l->host, &l->device, batch, &io, seq,
                          n_observed, n_votes, votes);
    cuda_leave(p->context);
    p->step.failed = p->step.failed || r < 0;
    return r;
}

static int run_op(struct cuda_program *p, const struct cuda_op *op, uint32_t n_ops, uint32_t *ret_n)
{
    *ret_n = 1;
    switch (op->op.kind) {
    case GQA_OP_EMBED:
        return run_embed(p, op);
    case GQA_OP_NORM:
        return run_norm(p, op);
    case GQA_OP_LINEAR:
        return run_linears(p, op, n_ops, ret_n);
    case GQA_OP_ROPE:
        return run_rope(p, op);
    case GQA_OP_ATTENTION:
        return run_attention(p, op);
    case GQA_OP_EXPERTS:
        return cuda_experts_run(p, op);
    default:
        return run_map(p, op);
    }
}

static int run_ops(struct cuda_program *p, uint32_t first, uint32_t last)
{
    int r = 0;

    for (uint32_t i = first, n = 1; r == 0 && i < last; i += n) {
        r = cuda_times_mark(p, first, i);
        r = r < 0 ? r : run_op(p, &p->ops[i], last - i, &n);
    }
    return r < 0 ? r : cuda_times_close(p, last);
}

int cuda_program_run(struct cuda_program *p, uint32_t first, uint32_t last)
{
    int r = p->step.batch == NULL || first > last || last > p->n_ops ? -EINVAL : 0;

    r = r < 0 ? r : cuda_enter(p->context);
    if (r < 0) {
        return r;
    }
    r = cuda_graphs_run(p, first, last, run_ops);
    cuda_leave(p->context);
    if (r == 0) {
        cuda_times_note(p, first, last);
    }
    p->step.failed = p->step.failed || r < 0;
    return r;
}
