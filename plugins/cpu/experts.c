/* plugins/cpu/experts.c - runs a mixture of experts (see experts.h). */
#include "plugins/cpu/program.h"

#include <string.h>

/* An exponential costs as much as tens of plain values. */
#define ROUTE_VALUES 32u

/* A step's mixture, and the wave that is under way. */
struct job {
    struct cpu_program *program;
    const struct gqa_op *op;
    const struct cpu_mixture *mixture;
    const struct cpu_mixture_room *room;
    uint32_t n_rows;
    uint32_t first_expert, last_expert; /* of the wave */
    uint32_t first_slot, n_slots;       /* of the wave, among all experts' rows */
};

static void route_rows(void *arg, uint32_t first, uint32_t last)
{
    const struct job *job = arg;
    const struct gqa_op_experts *e = &job->op->u.experts;

    for (uint32_t row = first; row < last; row++) {
        size_t at = (size_t)row * e->n_used;
        cpu_experts_route(e, job->room->logits + (size_t)row * e->n_experts,
                          job->mixture->selection_bias, job->room->chosen + at,
                          job->room->weights + at);
        float *dst = cpu_view_row(job->program, &job->op->dst, row);
        memset(dst, 0, job->mixture->n_out * sizeof(*dst));
    }
}

/* Sorts the choices by expert: ascending rows within each. */
static void give_slots(const struct job *job)
{
    const struct cpu_mixture_room *room = job->room;
    uint32_t n_experts = job->op->u.experts.n_experts, n_used = job->op->u.experts.n_used;
    size_t n = (size_t)job->n_rows * n_used;

    memset(room->first, 0, (n_experts + 1) * sizeof(*room->first));
    for (size_t i = 0; i < n; i++) {
        room->first[room->chosen[i] + 1]++;
    }
    for (uint32_t e = 0; e < n_experts; e++) {
        room->first[e + 1] += room->first[e];
    }
    memcpy(room->next, room->first, n_experts * sizeof(*room->next));
    for (size_t i = 0; i < n; i++) {
        room->slots[i] = room->next[room->chosen[i]]++;
        room->rows[room->slots[i]] = (uint32_t)(i / n_used);
    }
}

static void gather_slots(void *arg, uint32_t first, uint32_t last)
{
    const struct job *job = arg;
    const struct cpu_mixture_room *room = job->room;

    for (uint32_t slot = first; slot < last; slot++) {
        const float *src =
            cpu_view_row(job->program, &job->op->src, room->rows[job->first_slot + slot]);
        memcpy(room->x + (size_t)slot * room->x_width, src, job->mixture->n_in * sizeof(*src));
    }
}

/* Without a gate, up's outputs are where a gate's would be. */
static void act_slots(void *arg, uint32_t first, uint32_t last)
{
    const struct job *job = arg;
    const struct gqa_op_experts *e = &job->op->u.experts;
    int gated = job->mixture->gate != NULL || e->fused;

    for (uint32_t slot = first; slot < last; slot++) {
        float *h = job->room->hidden + (size_t)slot * job->room->h_width;
        job->program->glu.act[e->act](h, gated ? h + job->mixture->n_ff : NULL, h,
                                      job->mixture->n_ff, e->alpha, e->limit);
    }
}

/* Of the wave's experts only; earlier waves have added theirs. */
static void scatter_rows(void *arg, uint32_t first, uint32_t last)
{
    const struct job *job = arg;
    const struct cpu_mixture_room *room = job->room;
    uint32_t n_used = job->op->u.experts.n_used;

    for (uint32_t row = first; row < last; row++) {
        float *dst = cpu_view_row(job->program, &job->op->dst, row);
        for (size_t i = (size_t)row * n_used; i < (size_t)(row + 1) * n_used; i++) {
            if (room->chosen[i] < job->first_expert || room->chosen[i] >= job->last_expert) {
                continue;
            }
            const float *y = room->x + (size_t)(room->slots[i] - job->first_slot) * room->x_width;
            for (uint32_t j = 0; j < job->mixture->n_out; j++) {
                dst[j] += room->weights[i] * y[j];
            }
        }
    }
}

/* Adds a product for each expert of the wave that a row chose; returns how many there are now. */
static uint32_t add_products(const struct job *job, const struct cpu_matrix *matrices, float *dst,
                             uint32_t dst_stride, uint32_t n)
{
    const uint32_t *first = job->room->first;

    for (uint32_t e = job->first_expert; e < job->last_expert; e++) {
        if (first[e] == first[e + 1]) {
            continue;
        }
        job->room->products[n++] = (struct cpu_product){
            .matrix = &matrices[e],
            .dst = dst + (size_t)(first[e] - job->first_slot) * dst_stride,
            .dst_stride = dst_stride,
            .group = e - job->first_expert,
        };
    }
    return n;
}

static void multiply(const struct job *job, const float *x, uint32_t x_stride, uint32_t n_products)
{
    cpu_linear_run_groups(&job->program->linear, x, x_stride, job->room->first + job->first_expert,
                          job->last_expert - job->first_expert, job->room->products, n_products);
}

static void run_wave(struct job *job)
{
    const struct gqa_host *host = job->program->context->host;
    const struct cpu_mixture *m = job->mixture;
    const struct cpu_mixture_room *room = job->room;
    uint32_t n = 0;

    cpu_spread(host, gather_slots, job, job->n_slots, m->n_in);
    if (m->gate != NULL) {
        n = add_products(job, m->gate, room->hidden, room->h_width, n);
    }
    n = add_products(job, m->up, room->hidden + (m->gate != NULL ? m->n_ff : 0), room->h_width, n);
    multiply(job, room->x, room->x_width, n);
    cpu_spread(host, act_slots, job, job->n_slots, m->n_ff);
    n = add_products(job, m->down, room->x, room->x_width, 0);
    multiply(job, room->hidden, room->h_width, n);
    cpu_spread(host, scatter_rows, job, job->n_rows, m->n_out);
}

uint64_t cpu_experts_run(struct cpu_program *p, const struct cpu_op *op)
{
    const struct cpu_mixture_room *room = &p->mixture_room;
    const struct gqa_op_experts *e = &op->op.u.experts;
    struct job job = {.program = p,
                      .op = &op->op,
                      .mixture = op->mixture,
                      .room = room,
                      .n_rows = cpu_view_n_rows(p, &op->op.src)};
    struct cpu_product router = {
        .matrix = &op->mixture->router, .dst = room->logits, .dst_stride = e->n_experts};

    if (job.n_rows == 0) {
        return 0;
    }
    cpu_linear_run(&p->linear, cpu_view_row(p, &op->op.src, 0), p->regs[op->op.src.reg].width,
                   job.n_rows, &router, 1);
    cpu_spread(p->context->host, route_rows, &job, job.n_rows, ROUTE_VALUES * e->n_experts);
    give_slots(&job);
    /* One expert's rows always fit: there are no more of them than rows. */
    for (uint32_t first = 0, last = 0; first < e->n_experts; first = last) {
        while (last < e->n_experts && room->first[last + 1] - room->first[first] <= room->n_slots) {
            last++;
        }
        job.first_expert = first;
        job.last_expert = last;
        job.first_slot = room->first[first];
        job.n_slots = room->first[last] - room->first[first];
        if (job.n_slots > 0) {
            run_wave(&job);
        }
    }
    uint64_t n_read = 0;
    for (uint32_t i = 0; i < e->n_experts; i++) {
        n_read += room->first[i + 1] > room->first[i];
    }
    return op->mixture->router_bytes + n_read * op->mixture->expert_bytes;
}
