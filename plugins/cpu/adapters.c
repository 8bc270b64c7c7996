/* plugins/cpu/adapters.c - runs the adapters of a LINEAR (see adapters.h). */
#include "plugins/cpu/program.h"

#include <string.h>

struct job {
    struct cpu_program *program;
    const struct cpu_op *op;
    uint32_t n_slots;
};

/* Which of the op's adapters has the id, or GQA_NONE. */
static uint32_t find_entry(const struct cpu_op *op, uint32_t id)
{
    uint32_t low = 0, high = op->n_adapters;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (op->adapters[middle].id == id) {
            return middle;
        }
        if (op->adapters[middle].id < id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return GQA_NONE;
}

/* Sorts the rows by adapter, and leaves out those without. Returns how many slots there are. */
static uint32_t give_slots(const struct cpu_program *p, const struct cpu_op *op)
{
    const struct cpu_adapter_room *room = &p->adapter_room;
    int out_rows = p->regs[op->op.src.reg].flags & GQA_REG_OUT;
    uint32_t n_rows = cpu_view_n_rows(p, &op->op.src);

    memset(room->first, 0, (op->n_adapters + 1) * sizeof(*room->first));
    for (uint32_t row = 0; row < n_rows; row++) {
        uint32_t id = p->batch->adapters[out_rows ? p->batch->out_rows[row] : row];
        room->entries[row] = id != GQA_NONE ? find_entry(op, id) : GQA_NONE;
        if (room->entries[row] != GQA_NONE) {
            room->first[room->entries[row] + 1]++;
        }
    }
    for (uint32_t i = 0; i < op->n_adapters; i++) {
        room->first[i + 1] += room->first[i];
    }
    memcpy(room->next, room->first, op->n_adapters * sizeof(*room->next));
    for (uint32_t row = 0; row < n_rows; row++) {
        if (room->entries[row] != GQA_NONE) {
            room->rows[room->next[room->entries[row]]++] = row;
        }
    }
    return room->first[op->n_adapters];
}

static void gather_slots(void *arg, uint32_t first, uint32_t last)
{
    const struct job *job = arg;
    const struct cpu_adapter_room *room = &job->program->adapter_room;

    for (uint32_t slot = first; slot < last; slot++) {
        memcpy(room->x + (size_t)slot * room->x_width,
               cpu_view_row(job->program, &job->op->op.src, room->rows[slot]),
               job->op->op.src.width * sizeof(float));
    }
}

static void add_slots(void *arg, uint32_t first, uint32_t last)
{
    const struct job *job = arg;
    const struct cpu_adapter_room *room = &job->program->adapter_room;

    for (uint32_t slot = first; slot < last; slot++) {
        uint32_t row = room->rows[slot];
        float scale = job->op->adapters[room->entries[row]].scale;
        const float *y = room->y + (size_t)slot * room->y_width;
        float *dst = cpu_view_row(job->program, &job->op->op.dst, row);
        for (uint32_t i = 0; i < job->op->op.dst.width; i++) {
            dst[i] += scale * y[i];
        }
    }
}

/* The product of each adapter that a row carries with all of its rows. */
static void multiply(const struct job *job, int second, const float *x, uint32_t x_stride,
                     float *dst, uint32_t dst_stride)
{
    const struct cpu_adapter_room *room = &job->program->adapter_room;
    uint32_t n = 0;

    for (uint32_t i = 0; i < job->op->n_adapters; i++) {
        const struct cpu_adapter *a = &job->op->adapters[i];
        if (room->first[i] == room->first[i + 1]) {
            continue;
        }
        room->products[n++] = (struct cpu_product){
            .matrix = second ? &a->b : &a->a,
            .dst = dst + (size_t)room->first[i] * dst_stride,
            .dst_stride = dst_stride,
            .group = i,
        };
    }
    cpu_linear_run_groups(&job->program->linear, x, x_stride, room->first, job->op->n_adapters,
                          room->products, n);
}

void cpu_adapters_run(struct cpu_program *p, const struct cpu_op *op)
{
    const struct gqa_host *host = p->context->host;
    const struct cpu_adapter_room *room = &p->adapter_room;
    struct job job = {.program = p, .op = op};

    if (op->n_adapters == 0 || p->batch->adapters == NULL) {
        return;
    }
    job.n_slots = give_slots(p, op);
    if (job.n_slots == 0) {
        return;
    }
    cpu_spread(host, gather_slots, &job, job.n_slots, op->op.src.width);
    multiply(&job, 0, room->x, room->x_width, room->t, room->t_width);
    multiply(&job, 1, room->t, room->t_width, room->y, room->y_width);
    cpu_spread(host, add_slots, &job, job.n_slots, op->op.dst.width);
}
