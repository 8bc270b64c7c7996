/* plugins/cuda/experts.c - runs a mixture of experts (see experts.h). */
#include "plugins/cuda/program.h"

#define SORT_THREADS 256u /* of few choices */

/* A step's mixture. */
struct job {
    struct cuda_program *program;
    const struct gqa_op *op;
    const struct cuda_mixture *mixture;
    uint32_t n_rows;
    uint64_t width; /* of a row of hidden */
    struct cuda_product_groups groups;
};

static int route(const struct job *job)
{
    struct cuda_program *p = job->program;
    const struct gqa_op_experts *e = &job->op->u.experts;
    const struct cuda_mixture_room *room = &p->mixture_room;
    const struct cuda_matrix *router = &job->mixture->router;
    struct cuda_quantise_args input = {
        .src = cuda_view(p, &job->op->src),
        .stride = p->regs[job->op->src.reg].width,
        .n_rows = job->n_rows,
        .k = router->n_inputs,
    };
    struct cuda_route_args args = {
        .logits = cuda_pointer(room->logits.at),
        .router_bias = cuda_pointer(job->mixture->router_bias.at),
        .selection_bias = cuda_pointer(job->mixture->selection_bias.at),
        .chosen = cuda_pointer(room->chosen.at),
        .weights = cuda_pointer(room->weights.at),
        .n_experts = e->n_experts,
        .n_used = e->n_used,
        .gating = e->gating,
        .renormalise = e->renormalise,
        .weight_scale = e->weight_scale,
    };

    int r = cuda_inputs_lay_out(p->context, &p->inputs, cuda_input_kind_of(router->type), &input);
    r = r < 0 ? r
              : cuda_multiply(p->context, &p->inputs, router, cuda_pointer(room->logits.at),
                              router->n_outputs, job->n_rows);
    return r < 0 ? r
                 : cuda_launch(
                       p->context, p->context->kernels[CUDA_KERNEL_route],
                       (struct cuda_grid){job->n_rows, 1, 256, CUDA_ROUTE_BYTES(e->n_experts)},
                       &args);
}

static int sort(struct job *job)
{
    const struct cuda_mixture_room *room = &job->program->mixture_room;
    const struct gqa_op_experts *e = &job->op->u.experts;
    uint64_t n = (uint64_t)job->n_rows * e->n_used, n_chosen = n < e->n_experts ? n : e->n_experts;
    uint32_t log_tiles = cuda_mixture_log_tiles(n, e->n_experts);
    uint64_t n_full = n / (CUDA_TILE << log_tiles);

    job->groups = (struct cuda_product_groups){
        .items = room->items.at,
        .n_items = (uint32_t)cuda_groups_max(n, e->n_experts, CUDA_TILE << log_tiles),
        .log_tiles = log_tiles,
        .n_likely = (uint32_t)(n_chosen > n_full ? n_chosen : n_full),
    };
    struct cuda_sort_args args = {
        .chosen = cuda_pointer(room->chosen.at),
        .slots = cuda_pointer(room->slots.at),
        .items = cuda_pointer(room->items.at),
        .n = (uint32_t)n,
        .n_items = job->groups.n_items,
        .n_experts = e->n_experts,
        .item_tiles = 1u << log_tiles,
        .n_threads = n > SORT_THREADS ? CUDA_SORT_THREADS_MAX : SORT_THREADS,
    };
    return cuda_launch(job->program->context, job->program->context->kernels[CUDA_KERNEL_sort],
                       (struct cuda_grid){1, 1, args.n_threads, 0}, &args);
}

/* Lays out the choices' rows of src (n_each = n_used) or of the slots themselves (0). */
static int lay_out(const struct job *job, enum cuda_input_kind kind,
                   struct cuda_quantise_args *input)
{
    struct cuda_program *p = job->program;

    input->n_rows = job->n_rows * job->op->u.experts.n_used;
    input->slots = cuda_pointer(p->mixture_room.slots.at);
    return cuda_inputs_lay_out(p->context, &p->inputs, kind, input);
}

static int multiply(const struct job *job, const struct cuda_matrix *m, uint32_t column)
{
    struct cuda_program *p = job->program;
    float *hidden = cuda_pointer(p->mixture_room.hidden.at);

    return cuda_multiply_groups(p->context, &p->inputs, m, hidden + column, job->width,
                                &job->groups);
}

static int run_up(const struct job *job)
{
    struct cuda_program *p = job->program;
    const struct cuda_mixture *m = job->mixture;
    enum cuda_input_kind up = cuda_input_kind_of(m->up.type), kind = up;
    struct cuda_quantise_args input = {
        .src = cuda_view(p, &job->op->src),
        .stride = p->regs[job->op->src.reg].width,
        .k = m->up.n_inputs,
        .n_each = job->op->u.experts.n_used,
    };
    int r = 0;

    if (m->gate.weight != 0) {
        kind = cuda_input_kind_of(m->gate.type);
        r = lay_out(job, kind, &input);
        r = r < 0 ? r : multiply(job, &m->gate, 0);
    }
    if (r == 0 && (m->gate.weight == 0 || kind != up)) {
        r = lay_out(job, up, &input);
    }
    return r < 0 ? r : multiply(job, &m->up, m->gate.weight != 0 ? m->n_ff : 0);
}

static int run_down(const struct job *job)
{
    const struct cuda_mixture *m = job->mixture;
    const struct gqa_op_experts *e = &job->op->u.experts;
    struct cuda_quantise_args input = {
        .src = cuda_pointer(job->program->mixture_room.hidden.at),
        .stride = job->width,
        .k = m->n_ff,
        .act = cuda_map_of_act(e->act),
        .up = m->gated ? m->n_ff : 0,
        .alpha = e->alpha,
        .limit = e->limit,
    };

    int r = lay_out(job, cuda_input_kind_of(m->down.type), &input);
    return r < 0 ? r : multiply(job, &m->down, 0);
}

static int combine(const struct job *job)
{
    struct cuda_program *p = job->program;
    const struct gqa_view *dst = &job->op->dst;
    struct cuda_combine_args args = {
        .y = cuda_pointer(p->mixture_room.hidden.at),
        .slots = cuda_pointer(p->mixture_room.slots.at),
        .weights = cuda_pointer(p->mixture_room.weights.at),
        .dst = cuda_view(p, dst),
        .y_stride = job->width,
        .dst_stride = p->regs[dst->reg].width,
        .width = dst->width,
        .n_used = job->op->u.experts.n_used,
    };

    return cuda_launch(p->context, p->context->kernels[CUDA_KERNEL_combine],
                       (struct cuda_grid){(dst->width + 255) / 256, job->n_rows, 256, 0}, &args);
}

int cuda_experts_run(struct cuda_program *p, const struct cuda_op *op)
{
    const struct cuda_mixture *m = op->mixture;
    struct job job = {
        .program = p,
        .op = &op->op,
        .mixture = m,
        .n_rows = cuda_view_rows(p, &op->op.dst),
        .width = cuda_mixture_width(m),
    };

    if (job.n_rows == 0) {
        return 0;
    }
    int r = route(&job);
    r = r < 0 ? r : sort(&job);
    r = r < 0 ? r : run_up(&job);
    r = r < 0 ? r : run_down(&job);
    return r < 0 ? r : combine(&job);
}
