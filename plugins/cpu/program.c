/* plugins/cpu/program.c - runs the steps of a prepared program. */
#include "plugins/cpu/program.h"

#include <errno.h>

/* Values per task from which rows are lent to the workers; less is quicker on the spot. */
#define TASK_VALUES 8192u

static const cpu_row_op row_ops[] = {
    [GQA_OP_EMBED] = cpu_op_embed,     [GQA_OP_NORM] = cpu_op_norm,
    [GQA_OP_ROPE] = cpu_op_rope,       [GQA_OP_GLU] = cpu_op_glu,
    [GQA_OP_ADD] = cpu_op_add,         [GQA_OP_SCALE] = cpu_op_scale,
    [GQA_OP_SOFTCAP] = cpu_op_softcap, [GQA_OP_GATHER] = cpu_op_gather,
};

struct spread {
    cpu_range_fn fn;
    void *arg;
    uint32_t n, step;
};

static void run_range(void *arg, uint32_t index, uint32_t worker)
{
    const struct spread *spread = arg;
    uint32_t first = index * spread->step;
    uint32_t left = spread->n - first;

    spread->fn(spread->arg, first, first + (left < spread->step ? left : spread->step));
}

void cpu_spread(const struct gqa_host *host, cpu_range_fn fn, void *arg, uint32_t n,
                uint32_t values)
{
    uint32_t step = values < TASK_VALUES ? TASK_VALUES / (values + 1) + 1 : 1;
    struct spread spread = {fn, arg, n, step};

    if (n <= step || host->n_threads == 1) {
        fn(arg, 0, n);
        return;
    }
    host->parallel(host->data, run_range, &spread, (n + step - 1) / step);
}

struct row_job {
    const struct cpu_program *program;
    const struct cpu_op *op;
};

static void run_rows(void *arg, uint32_t first, uint32_t last)
{
    const struct row_job *job = arg;

    for (uint32_t row = first; row < last; row++) {
        row_ops[job->op->op.kind](job->program, job->op, row);
    }
}

static void fill_ropes(void *arg, uint32_t first, uint32_t last)
{
    const struct cpu_program *p = arg;

    for (uint32_t row = first; row < last; row++) {
        for (uint32_t i = 0; i < p->n_ropes; i++) {
            cpu_rope_fill(&p->ropes[i], row, p->batch->positions[row]);
        }
    }
}

static int check_batch(const struct cpu_program *p, const struct gqa_batch *batch)
{
    if (batch->n_rows == 0 || batch->n_rows > p->max_rows || batch->n_out > p->max_out_rows ||
        (batch->tokens == NULL && batch->embeddings == NULL) ||
        (p->n_ropes > 0 && batch->positions == NULL) ||
        (p->n_layers > 0 &&
         (batch->attention == NULL || batch->attention->n_rows != batch->n_rows))) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < batch->n_out; i++) {
        if (batch->out_rows[i] >= batch->n_rows) {
            return -EINVAL;
        }
    }
    for (uint32_t i = 0; batch->adapters != NULL && i < batch->n_rows; i++) {
        if (batch->adapters[i] != GQA_NONE &&
            !cpu_adapters_have(&p->adapters, batch->adapters[i])) {
            return -EINVAL;
        }
    }
    return 0;
}

/* Tokens and positions are checked against every table that they index, although the host has done
 * so: a wrong one would read outside the file. */
static int check_table(const struct cpu_op *op, const struct gqa_batch *batch)
{
    uint64_t n = op->table.ne[1];
    uint32_t by = op->op.u.embed.row;

    if (by == GQA_EMBED_FIRST || (by == GQA_EMBED_TOKEN && batch->embeddings != NULL)) {
        return 0;
    }
    if (by == GQA_EMBED_POSITION && batch->positions == NULL) {
        return -EINVAL;
    }
    for (uint32_t row = 0; row < batch->n_rows; row++) {
        int64_t index =
            by == GQA_EMBED_TOKEN ? (int64_t)batch->tokens[row] : (int64_t)batch->positions[row];
        if (index < 0 || (uint64_t)index >= n) {
            return -EINVAL;
        }
    }
    return 0;
}

static int check_tables(const struct cpu_program *p, const struct gqa_batch *batch)
{
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < p->n_ops; i++) {
        if (p->ops[i].op.kind == GQA_OP_EMBED) {
            r = check_table(&p->ops[i], batch);
        }
    }
    return r;
}

int cpu_program_begin(void *context, void *program, const struct gqa_batch *batch)
{
    struct cpu_program *p = program;
    uint32_t n_angles = 0;

    int r = check_batch(p, batch);
    if (r == 0) {
        r = check_tables(p, batch);
    }
    if (r < 0) {
        return r;
    }
    p->batch = batch;
    for (uint32_t i = 0; i < p->n_ropes; i++) {
        n_angles += p->ropes[i].n_freqs;
    }
    if (n_angles > 0) {
        /* A sine costs as much as tens of plain values. */
        cpu_spread(p->context->host, fill_ropes, p, batch->n_rows, 32 * n_angles);
    }
    return 0;
}

static int run_attention(const struct cpu_program *p, const struct cpu_op *op)
{
    const struct gqa_op *o = &op->op;
    const struct gqa_attn_layer *layer = &p->layers[o->layer];
    struct gqa_attn_io io = {
        .q = cpu_view_row(p, &o->src, 0),
        .k = cpu_view_row(p, &o->src2, 0),
        .v = cpu_view_row(p, &o->src3, 0),
        .out = cpu_view_row(p, &o->dst, 0),
        .q_stride = p->regs[o->src.reg].width,
        .k_stride = p->regs[o->src2.reg].width,
        .v_stride = p->regs[o->src3.reg].width,
        .out_stride = p->regs[o->dst.reg].width,
    };

    int r = cpu_attention_append(p->context->attention, layer, p->batch->attention, &io);
    if (r < 0) {
        return r;
    }
    return cpu_attention_attend(p->context->attention, layer, p->batch->attention, &io);
}

int cpu_program_run(void *context, void *program, uint32_t first_op, uint32_t last_op)
{
    struct cpu_program *p = program;

    if (p->batch == NULL || first_op > last_op || last_op > p->n_ops) {
        return -EINVAL;
    }
    uint64_t at = plugin_now_ns();
    for (uint32_t i = first_op; i < last_op;) {
        const struct cpu_op *op = &p->ops[i];
        uint32_t n = 1;
        uint64_t bytes = 0;

        if (op->op.kind == GQA_OP_LINEAR) {
            n = cpu_program_run_linears(p, op, last_op - i);
            for (uint32_t k = 0; k < n; k++) {
                bytes += op[k].weight_bytes;
            }
        } else if (op->op.kind == GQA_OP_ATTENTION) {
            int r = run_attention(p, op);
            if (r < 0) {
                return r;
            }
            bytes = plugin_attention_bytes(&p->layers[op->op.layer], p->batch->attention);
        } else if (op->op.kind == GQA_OP_EXPERTS) {
            bytes = cpu_experts_run(p, op);
        } else {
            struct row_job job = {p, op};
            cpu_spread(p->context->host, run_rows, &job, cpu_view_n_rows(p, &op->op.dst),
                       op->op.dst.width);
        }
        uint64_t rows = (uint64_t)n * cpu_view_n_rows(p, &op->op.dst);
        plugin_op_times_add(&p->times, op->op.kind, n, rows, rows > 0 ? bytes : 0, &at);
        i += n;
    }
    return 0;
}

int cpu_program_end(void *context, void *program)
{
    struct cpu_program *p = program;

    if (p->batch == NULL) {
        return -EINVAL;
    }
    p->batch = NULL;
    return 0;
}

float *cpu_program_data(void *context, void *program, uint32_t reg)
{
    const struct cpu_program *p = program;

    return reg < p->n_regs ? p->regs[reg].rows : NULL;
}

uint32_t cpu_program_op_times(void *context, void *program, struct gqa_op_time *ret, uint32_t max)
{
    const struct cpu_program *p = program;

    return plugin_op_times_read(&p->times, ret, max);
}
