/* plugins/cuda/experts_prepare.c - puts mixtures of experts on the device, and the room that they
 * work in. */
#include "plugins/cuda/program.h"

#include "plugins/common/weights.h"

#include "format/types.h"

#include <errno.h>
#include <stdlib.h>

uint64_t cuda_mixture_items_max(uint32_t max_rows, uint32_t n_experts, uint32_t n_used)
{
    uint64_t n = (uint64_t)max_rows * n_used;
    /* Items of fewer tiles than the most have room for twice the average: E / 2 more than one each.
     */
    uint64_t most = n_experts + n_experts / 2 + n / (CUDA_TILE << (CUDA_PRODUCT_TILES - 1));
    return most < n ? most : n;
}

/* ---- weights ----------------------------------------------------------------------------- */

static int upload_matrix(struct cuda_program *p, const struct gqa_weight *w, uint32_t n_outputs,
                         struct cuda_buffer *memory, struct cuda_matrix *ret)
{
    int r = cuda_program_upload_matrix(p, w, memory);

    *ret = (struct cuda_matrix){.type = cuda_weight_type_of(w->type),
                                .n_inputs = (uint32_t)w->ne[0],
                                .n_outputs = n_outputs,
                                .weight = memory->at};
    return r;
}

/* A float32 router as two matrices of F16 in one, of n_experts outputs each: what F16 keeps of a
 * value, and CUDA_ROUTER_LOW times the rest. */
static void split_router(const float *values, uint64_t n, uint16_t *ret)
{
    for (uint64_t i = 0; i < n; i++) {
        ret[i] = fmt_f32_to_f16(values[i]);
        ret[n + i] = fmt_f32_to_f16((values[i] - fmt_f16_to_f32(ret[i])) * CUDA_ROUTER_LOW);
    }
}

static int upload_router(struct cuda_program *p, const struct gqa_program_desc *desc,
                         uint32_t weight, struct cuda_mixture *m)
{
    const struct gqa_weight *w = &desc->weights[weight];
    uint64_t n = plugin_weight_values(w);
    uint16_t *halves = malloc(2 * n * sizeof(*halves));
    struct gqa_weight both = {
        .type = GQA_TYPE_F16, .n_dims = 2, .ne = {w->ne[0], 2 * w->ne[1], 1, 1}, .data = halves};
    float *values = NULL;

    int r = halves == NULL ? -ENOMEM : plugin_weight_floats(desc, weight, &values);
    if (r == 0) {
        split_router(values, n, halves);
        r = upload_matrix(p, &both, (uint32_t)both.ne[1], &m->memory[0], &m->router);
    }
    free(values);
    free(halves);
    return r;
}

/* Gate's outputs in front of up's, expert by expert. */
static int join(struct cuda_program *p, const struct gqa_weight *gate, const struct gqa_weight *up,
                struct cuda_buffer *memory)
{
    const struct gqa_weight *weights[2] = {gate, up};
    uint64_t bytes = up->ne[1] / CUDA_STRIP * cuda_strip_bytes(up); /* of one expert */
    int r = cuda_buffer_reserve(p->context, memory, 2 * up->ne[2] * bytes);

    for (uint32_t i = 0; r == 0 && i < 2; i++) {
        const void *packed;
        void *made;

        r = cuda_weights_packed(weights[i], &packed, &made);
        for (uint64_t e = 0; r == 0 && e < up->ne[2]; e++) {
            r = cuda_upload(p->context, memory->at + (2 * e + i) * bytes,
                            (const uint8_t *)packed + e * bytes, bytes);
        }
        r = r < 0 ? r : cuda_synchronise(p->context); /* before what was made goes */
        free(made);
    }
    return r;
}

/* (n_experts, 2 n_ff) of two, of which either may be GQA_NONE. */
static int join_biases(struct cuda_program *p, const struct gqa_program_desc *desc,
                       const struct gqa_op_experts *op, uint32_t n_ff, struct cuda_buffer *to)
{
    const uint32_t biases[2] = {op->gate_bias, op->up_bias};
    uint64_t n = 2 * (uint64_t)n_ff * op->n_experts;
    float *both = calloc(n, sizeof(*both));
    int r = both == NULL ? -ENOMEM : 0;

    for (uint32_t i = 0; r == 0 && i < 2; i++) {
        float *values = NULL;
        r = plugin_weight_floats(desc, biases[i], &values);
        for (uint64_t k = 0; values != NULL && k < n / 2; k++) {
            both[k / n_ff * 2 * n_ff + i * n_ff + k % n_ff] = values[k];
        }
        free(values);
    }
    r = r < 0 ? r : cuda_program_upload(p, both, n * sizeof(*both), to);
    free(both);
    return r;
}

/* Both as one matrix: one product instead of two. */
static int upload_joined(struct cuda_program *p, const struct gqa_program_desc *desc,
                         const struct gqa_op_experts *op, struct cuda_mixture *m)
{
    const struct gqa_weight *gate = &desc->weights[op->gate], *up = &desc->weights[op->up];
    int r = join(p, gate, up, &m->memory[1]);

    if (r == 0 && (op->gate_bias != GQA_NONE || op->up_bias != GQA_NONE)) {
        r = join_biases(p, desc, op, m->n_ff, &m->memory[2]);
    }
    m->up = (struct cuda_matrix){.type = cuda_weight_type_of(up->type),
                                 .n_inputs = (uint32_t)up->ne[0],
                                 .n_outputs = 2 * m->n_ff,
                                 .weight = m->memory[1].at,
                                 .bias = m->memory[2].at};
    return r;
}

/* The matrices of all experts; weight may be GQA_NONE. */
static int upload_experts(struct cuda_program *p, const struct gqa_program_desc *desc,
                          uint32_t weight, uint32_t bias, struct cuda_buffer memory[2],
                          struct cuda_matrix *ret)
{
    if (weight == GQA_NONE) {
        return 0;
    }
    const struct gqa_weight *w = &desc->weights[weight];
    int r = upload_matrix(p, w, (uint32_t)w->ne[1], &memory[0], ret);
    r = r < 0 ? r : cuda_program_upload_floats(p, desc, bias, &memory[1]);
    ret->bias = memory[1].at;
    return r;
}

static bool can_join(const struct gqa_program_desc *desc, const struct gqa_op_experts *op)
{
    if (op->gate == GQA_NONE) {
        return false;
    }
    const struct gqa_weight *gate = &desc->weights[op->gate], *up = &desc->weights[op->up];
    return cuda_weight_type_of(gate->type) == cuda_weight_type_of(up->type) &&
           up->ne[1] % CUDA_STRIP == 0;
}

int cuda_mixture_create(struct cuda_program *p, const struct gqa_program_desc *desc, uint32_t index,
                        struct cuda_mixture **ret)
{
    const struct gqa_op_experts *op = &desc->ops[index].u.experts;
    struct cuda_mixture *m = calloc(1, sizeof(*m));

    *ret = m;
    if (m == NULL) {
        return -ENOMEM;
    }
    m->n_ff = (uint32_t)desc->weights[op->down].ne[0];
    m->gated = op->fused || op->gate != GQA_NONE;
    int r = upload_router(p, desc, op->router, m);
    r = r < 0 ? r : cuda_program_upload_floats(p, desc, op->router_bias, &m->router_bias);
    r = r < 0 ? r : cuda_program_upload_floats(p, desc, op->selection_bias, &m->selection_bias);
    if (r == 0 && can_join(desc, op)) {
        r = upload_joined(p, desc, op, m);
    } else if (r == 0) {
        r = upload_experts(p, desc, op->up, op->up_bias, &m->memory[1], &m->up);
        r = r < 0 ? r : upload_experts(p, desc, op->gate, op->gate_bias, &m->memory[3], &m->gate);
    }
    return r < 0 ? r : upload_experts(p, desc, op->down, op->down_bias, &m->memory[5], &m->down);
}

void cuda_mixture_finish(struct cuda_context *c, struct cuda_mixture *m)
{
    if (m == NULL) {
        return;
    }
    cuda_buffer_finish(c, &m->router_bias);
    cuda_buffer_finish(c, &m->selection_bias);
    for (size_t i = 0; i < sizeof(m->memory) / sizeof(m->memory[0]); i++) {
        cuda_buffer_finish(c, &m->memory[i]);
    }
}

/* ---- room -------------------------------------------------------------------------------- */

static int reserve_inputs(struct cuda_program *p, const struct cuda_mixture *m, uint64_t n_slots)
{
    const struct cuda_matrix *all[] = {&m->router, &m->gate, &m->up, &m->down};
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < sizeof(all) / sizeof(all[0]); i++) {
        if (all[i]->weight != 0) {
            r = cuda_inputs_reserve(p->context, &p->inputs, cuda_input_kind_of(all[i]->type),
                                    i == 0 ? p->max_rows : n_slots, all[i]->n_inputs);
        }
    }
    return r;
}

static int reserve(struct cuda_program *p, const struct gqa_op_experts *op,
                   const struct cuda_mixture *m)
{
    struct cuda_mixture_room *room = &p->mixture_room;
    uint64_t n = (uint64_t)p->max_rows * op->n_used;
    uint64_t n_slots = cuda_groups_max(n, op->n_experts, CUDA_TILE) * CUDA_TILE;
    const struct {
        struct cuda_buffer *to;
        uint64_t bytes;
    } wanted[] = {
        {&room->logits, (uint64_t)p->max_rows * m->router.n_outputs * sizeof(float)},
        {&room->chosen, n * sizeof(uint32_t)},
        {&room->weights, n * sizeof(float)},
        {&room->slots, n * sizeof(uint32_t)},
        {&room->items, cuda_mixture_items_max(p->max_rows, op->n_experts, op->n_used) *
                           sizeof(struct cuda_product_item)},
        {&room->hidden, n_slots * cuda_mixture_width(m) * sizeof(float)},
    };
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        r = cuda_buffer_reserve(p->context, wanted[i].to, wanted[i].bytes);
    }
    return r < 0 ? r : reserve_inputs(p, m, n_slots);
}

int cuda_mixture_room_init(struct cuda_program *p)
{
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < p->n_ops; i++) {
        if (p->ops[i].mixture != NULL) {
            r = reserve(p, &p->ops[i].op.u.experts, p->ops[i].mixture);
        }
    }
    return r;
}

void cuda_mixture_room_finish(struct cuda_context *c, struct cuda_mixture_room *room)
{
    struct cuda_buffer *all[] = {&room->logits, &room->chosen, &room->weights,
                                 &room->slots,  &room->items,  &room->hidden};

    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        cuda_buffer_finish(c, all[i]);
    }
}
