/* daemon/model/plan_step.c - one step of a plan: the program's ops in order, attention by its own
 * backend where the plan has two. */
#include "daemon/model/plan_internal.h"

#include "daemon/model/model_internal.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

/* An op of attention, as backends take it: the program's registers in host memory. */
static int io_of(const struct plan *p, const struct gqa_op *op, struct gqa_attn_io *ret)
{
    const struct gqa_program *iface = backend_program(p->backend);
    void *context = backend_context(p->backend);
    const struct gqa_reg *regs = p->program.regs;
    const float *q = iface->data(context, p->prepared, op->src.reg);
    const float *k = iface->data(context, p->prepared, op->src2.reg);
    const float *v = iface->data(context, p->prepared, op->src3.reg);
    float *out = iface->data(context, p->prepared, op->dst.reg);
    if (q == NULL || k == NULL || v == NULL || out == NULL) {
        return -ENOTSUP;
    }
    *ret = (struct gqa_attn_io){
        .q = q + op->src.first,
        .k = k + op->src2.first,
        .v = v + op->src3.first,
        .out = out + op->dst.first,
        .q_stride = regs[op->src.reg].width,
        .k_stride = regs[op->src2.reg].width,
        .v_stride = regs[op->src3.reg].width,
        .out_stride = regs[op->dst.reg].width,
    };
    return 0;
}

/* Runs attention of one op on the other backend. */
static int foreign_attention(struct plan *p, const struct gqa_op *op,
                             const struct gqa_attn_batch *batch, struct backend **ret_blame)
{
    const struct gqa_attention *attention = backend_attention(p->attention);
    const struct gqa_attn_layer *layer = &p->program.attn_layers[op->layer];
    void *other = backend_context(p->attention);
    struct gqa_attn_io io;
    int rc = io_of(p, op, &io);
    if (rc < 0) {
        return rc;
    }
    rc = attention->append(other, layer, batch, &io);
    rc = rc < 0 ? rc : attention->attend(other, layer, batch, &io);
    *ret_blame = rc < 0 ? p->attention : *ret_blame;
    return rc;
}

/* One observer's votes on op, by whoever has the op's registers. */
static int observe_one(struct plan *p, uint32_t op, const struct model_batch *batch,
                       const struct model_observer *o)
{
    const struct gqa_op *of = &p->program.ops[op];
    const struct gqa_program *iface = backend_program(p->backend);
    const struct gqa_attention *attention = backend_attention(plan_attention(p));
    float *votes = o->votes[of->layer];
    struct gqa_attn_io io;
    if (p->attention == NULL && iface->observe != NULL) {
        return iface->observe(backend_context(p->backend), p->prepared, op, o->seq, o->n_rows,
                              o->n_votes, votes);
    }
    int rc = io_of(p, of, &io);
    return rc < 0 ? rc
                  : attention->observe(backend_context(plan_attention(p)),
                                       &p->program.attn_layers[of->layer], batch->attention, &io,
                                       o->seq, o->n_rows, o->n_votes, votes);
}

/* Whom the op's rows have looked at, for those who ask. */
static int observe(struct plan *p, uint32_t op, const struct model_batch *batch,
                   struct backend **ret_blame)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < batch->n_observers; i++) {
        const struct model_observer *o = &batch->observers[i];
        if (o->votes[p->program.ops[op].layer] != NULL) {
            rc = observe_one(p, op, batch, o);
            *ret_blame = rc < 0 ? plan_attention(p) : *ret_blame;
        }
    }
    return rc;
}

/* The ops up to the hidden states. Without another backend for attention, and nobody who looks on,
 * they are one range. */
static int run_body(struct plan *p, const struct model_batch *batch, struct backend **ret_blame)
{
    const struct gqa_program *iface = backend_program(p->backend);
    void *context = backend_context(p->backend);
    bool apart = p->attention != NULL || batch->n_observers > 0;
    uint32_t first = 0;
    for (uint32_t i = 0; apart && i < p->program.head_op; i++) {
        const struct gqa_op *op = &p->program.ops[i];
        if (op->kind != GQA_OP_ATTENTION) {
            continue;
        }
        int rc = iface->run(context, p->prepared, first, p->attention != NULL ? i : i + 1);
        if (rc == 0 && p->attention != NULL) {
            rc = foreign_attention(p, op, batch->attention, ret_blame);
        }
        rc = rc < 0 ? rc : observe(p, i, batch, ret_blame);
        if (rc < 0) {
            return rc;
        }
        first = i + 1;
    }
    return iface->run(context, p->prepared, first, p->program.head_op);
}

bool plan_has(const struct plan *p, uint32_t caps)
{
    const struct gqa_attention *a = backend_attention(plan_attention(p));
    uint32_t has = a->observe != NULL ? a->caps : a->caps & ~(uint32_t)GQA_ATTN_CAP_OBSERVE;
    return (caps & ~has) == 0;
}

static int run_ops(struct plan *p, const struct model_batch *batch, struct backend **ret_blame)
{
    const struct gqa_program *iface = backend_program(p->backend);
    const struct model_program *program = &p->program;
    void *context = backend_context(p->backend);
    int rc = run_body(p, batch, ret_blame);
    if (rc == 0 && (batch->wants & MODEL_WANTS_LOGITS)) {
        rc = iface->run(context, p->prepared, program->head_op, program->scores_op);
    }
    if (rc == 0 && (batch->wants & MODEL_WANTS_SCORES)) {
        rc = iface->run(context, p->prepared, program->scores_op, program->n_ops);
    }
    return rc;
}

static const float *register_of(const struct plan *p, uint32_t reg)
{
    return backend_program(p->backend)->data(backend_context(p->backend), p->prepared, reg);
}

/* *ret stays NULL where nobody wants it. */
static int take_output(struct plan *p, bool wanted, uint32_t reg, const float **ret)
{
    if (wanted) {
        *ret = register_of(p, reg);
    }
    return wanted && *ret == NULL ? -ENOTSUP : 0;
}

static int run(struct plan *p, const struct model_batch *batch, struct backend **ret_blame)
{
    const struct gqa_program *iface = backend_program(p->backend);
    void *context = backend_context(p->backend);
    const struct gqa_batch b = {
        .struct_size = sizeof(b),
        .n_rows = batch->n_rows,
        .n_out = batch->n_out,
        .tokens = batch->tokens,
        .positions = batch->positions,
        .out_rows = batch->out_rows,
        .attention = batch->attention,
    };
    int rc = iface->begin(context, p->prepared, &b);
    if (rc < 0) {
        return rc;
    }
    rc = run_ops(p, batch, ret_blame);
    int end = iface->end(context, p->prepared);
    return rc < 0 ? rc : end;
}

int plan_step(struct plan *p, const struct model_batch *batch, struct model_outputs *ret,
              struct backend **ret_blame)
{
    struct backend *blame = p->backend;
    struct model_outputs out = {NULL};
    const struct model_program *program = &p->program;
    int rc = run(p, batch, &blame);
    rc = rc < 0
             ? rc
             : take_output(p, batch->wants & MODEL_WANTS_LOGITS, program->logits_reg, &out.logits);
    rc = rc < 0 ? rc
                : take_output(p, batch->wants & MODEL_WANTS_EMBEDDINGS, program->embd_reg,
                              &out.embeddings);
    rc = rc < 0
             ? rc
             : take_output(p, batch->wants & MODEL_WANTS_SCORES, program->scores_reg, &out.scores);
    if (rc < 0) {
        *ret_blame = blame;
        return rc;
    }
    *ret = out;
    return 0;
}

/* ---- numbers ----------------------------------------------------------------------------- */

/* Infinities and what is no number have all bits of the exponent: adding one to it overflows. */
static bool all_finite(const float *values, size_t n)
{
    uint32_t seen = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof(bits));
        seen |= (bits & 0x7fffffffu) + 0x00800000u;
    }
    return (seen & 0x80000000u) == 0;
}

struct finite_job {
    const float *rows;
    size_t width;
    atomic_bool fails;
};

/* Any worker. */
static void check_row(void *arg, uint32_t index, uint32_t worker)
{
    struct finite_job *job = arg;
    if (!all_finite(job->rows + index * job->width, job->width)) {
        atomic_store_explicit(&job->fails, true, memory_order_relaxed);
    }
}

/* Rows that are as wide as a vocabulary are megabytes, which all workers look through. */
static bool wide_rows_finite(const struct plan *p, const float *rows, uint32_t n, size_t width)
{
    struct finite_job job = {.rows = rows, .width = width};
    backend_parallel(p->backend, check_row, &job, n);
    return !atomic_load(&job.fails);
}

/* What attention gave in its last layer: a row sees its own K and V and those of every layer before
 * through the residual stream, so that one that is no number shows there. */
static bool rows_are_sound(const struct plan *p, uint32_t n_rows)
{
    const struct gqa_op *last = NULL;
    for (uint32_t i = 0; i < p->program.head_op; i++) {
        last = p->program.ops[i].kind == GQA_OP_ATTENTION ? &p->program.ops[i] : last;
    }
    const float *rows = last != NULL ? register_of(p, last->dst.reg) : NULL;
    return rows == NULL || all_finite(rows, (size_t)n_rows * p->program.regs[last->dst.reg].width);
}

bool plan_step_is_sound(const struct plan *p, const struct model_batch *batch,
                        const struct model_outputs *out)
{
    const struct model_shape *s = &p->model->shape;
    size_t n = batch->n_out;
    return (out->logits == NULL || wide_rows_finite(p, out->logits, batch->n_out, s->n_vocab)) &&
           (out->embeddings == NULL || all_finite(out->embeddings, n * s->n_embd)) &&
           (out->scores == NULL || all_finite(out->scores, n * p->program.n_scores)) &&
           rows_are_sound(p, batch->n_rows);
}
