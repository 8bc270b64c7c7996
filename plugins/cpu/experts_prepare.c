/* plugins/cpu/experts_prepare.c - builds mixtures of experts and the room that they work in. */
#include "plugins/cpu/program.h"
#include "plugins/common/check.h"
#include "plugins/common/weights.h"

#include <errno.h>
#include <stdlib.h>

/* One expert's matrix of a weight that holds all of them. */
static struct gqa_weight slice_of(const struct gqa_weight *all, uint32_t expert)
{
    const struct fmt_type_info *type = fmt_type_info(all->type);
    struct gqa_weight one = *all;

    one.n_dims = 2;
    one.ne[2] = 1;
    if (all->data != NULL && type != NULL) {
        uint64_t bytes = fmt_type_bytes(type, all->ne[0]) * all->ne[1];
        one.data = (const uint8_t *)all->data + bytes * expert;
    }
    if (all->packed != NULL) {
        one.packed_bytes = all->packed_bytes / all->ne[2];
        one.packed = (const uint8_t *)all->packed + one.packed_bytes * expert;
    }
    return one;
}

/* The matrices of a weight of all experts, into ret (n_experts); bias (n_experts, outputs) or NULL.
 */
static int init_matrices(const struct gqa_program_desc *desc, uint32_t index, uint32_t weight,
                         const float *bias, struct cpu_matrix *ret, struct gqa_reason *reason)
{
    const struct gqa_weight *all = &desc->weights[weight];
    struct gqa_reason why = {""};

    if (cpu_layout_of(all->type) != CPU_LAYOUT_COUNT && all->ne[1] % CPU_STRIP_ROWS != 0) {
        return plugin_refuse_op(desc, index, weight, -ENOTSUP, reason,
                                "%llu outputs of an expert are no multiple of %u",
                                (unsigned long long)all->ne[1], CPU_STRIP_ROWS);
    }
    for (uint32_t e = 0; e < all->ne[2]; e++) {
        struct gqa_weight one = slice_of(all, e);
        int r = cpu_matrix_init(&ret[e], &one, &why);
        if (r < 0) {
            return plugin_refuse_op(desc, index, weight, r, reason, "expert %u: %.100s", e,
                                    why.text);
        }
        ret[e].bias = bias != NULL ? bias + (size_t)e * ret[e].n : NULL;
    }
    return 0;
}

static int init_vectors(struct cpu_mixture *m, const struct gqa_program_desc *desc,
                        const struct gqa_op_experts *op)
{
    const struct {
        uint32_t weight;
        float **ret;
    } vectors[] = {
        {op->router_bias, &m->router_bias}, {op->selection_bias, &m->selection_bias},
        {op->gate_bias, &m->gate_bias},     {op->up_bias, &m->up_bias},
        {op->down_bias, &m->down_bias},
    };

    for (uint32_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++) {
        int r = plugin_weight_floats(desc, vectors[i].weight, vectors[i].ret);
        if (r < 0) {
            return r;
        }
    }
    return 0;
}

static int init_router(struct cpu_mixture *m, const struct gqa_program_desc *desc, uint32_t index,
                       struct gqa_reason *reason)
{
    uint32_t router = desc->ops[index].u.experts.router;
    struct gqa_reason why = {""};

    int r = cpu_matrix_init(&m->router, &desc->weights[router], &why);
    if (r < 0) {
        return plugin_refuse_op(desc, index, router, r, reason, "%.120s", why.text);
    }
    m->router.bias = m->router_bias;
    return 0;
}

int cpu_mixture_create(const struct gqa_program_desc *desc, uint32_t index,
                       struct cpu_mixture **ret, struct gqa_reason *reason)
{
    const struct gqa_op_experts *op = &desc->ops[index].u.experts;
    uint32_t n_sets = op->gate != GQA_NONE ? 3 : 2;

    struct cpu_mixture *m = calloc(1, sizeof(*m));
    if (m == NULL) {
        return -ENOMEM;
    }
    *ret = m;
    m->n_in = (uint32_t)desc->weights[op->up].ne[0];
    m->n_ff = (uint32_t)desc->weights[op->down].ne[0];
    m->n_out = (uint32_t)desc->weights[op->down].ne[1];
    struct cpu_matrix *matrices = calloc((size_t)n_sets * op->n_experts, sizeof(*matrices));
    if (matrices == NULL) {
        return -ENOMEM;
    }
    m->gate = n_sets == 3 ? matrices : NULL;
    m->up = matrices + (size_t)(n_sets - 2) * op->n_experts;
    m->down = m->up + op->n_experts;
    m->router_bytes = cpu_weight_read_bytes(&desc->weights[op->router]);
    m->expert_bytes = (cpu_weight_read_bytes(&desc->weights[op->up]) +
                       cpu_weight_read_bytes(&desc->weights[op->down]) +
                       (m->gate != NULL ? cpu_weight_read_bytes(&desc->weights[op->gate]) : 0)) /
                      op->n_experts;
    int r = init_vectors(m, desc, op);
    if (r == 0) {
        r = init_router(m, desc, index, reason);
    }
    if (r == 0 && m->gate != NULL) {
        r = init_matrices(desc, index, op->gate, m->gate_bias, m->gate, reason);
    }
    if (r == 0) {
        r = init_matrices(desc, index, op->up, m->up_bias, m->up, reason);
    }
    return r == 0 ? init_matrices(desc, index, op->down, m->down_bias, m->down, reason) : r;
}

void cpu_mixture_destroy(struct cpu_mixture *m)
{
    if (m == NULL) {
        return;
    }
    free(m->gate != NULL ? m->gate : m->up);
    free(m->router_bias);
    free(m->selection_bias);
    free(m->gate_bias);
    free(m->up_bias);
    free(m->down_bias);
    free(m);
}

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* All matrices of a set have one type and shape: the first of each tells. */
uint32_t cpu_mixture_quantised_k(const struct cpu_mixture *m)
{
    const struct cpu_matrix *sets[] = {&m->router, m->gate, m->up, m->down};
    uint32_t k = 0;

    for (uint32_t i = 0; i < sizeof(sets) / sizeof(sets[0]); i++) {
        if (sets[i] != NULL && sets[i]->layout != CPU_LAYOUT_COUNT) {
            k = larger(k, sets[i]->k);
        }
    }
    return k;
}

/* The largest of all mixtures' sizes; n_experts 0: there are none. */
struct sizes {
    uint32_t n_experts, n_used;
};

static struct sizes find_sizes(const struct cpu_program *p, struct cpu_mixture_room *room)
{
    struct sizes s = {0, 0};

    for (uint32_t i = 0; i < p->n_ops; i++) {
        const struct cpu_mixture *m = p->ops[i].mixture;
        if (m == NULL) {
            continue;
        }
        s.n_experts = larger(s.n_experts, p->ops[i].op.u.experts.n_experts);
        s.n_used = larger(s.n_used, p->ops[i].op.u.experts.n_used);
        room->x_width = larger(room->x_width, larger(m->n_in, m->n_out));
        /* A gate's outputs lie beside up's. */
        room->h_width = larger(room->h_width, m->up[0].n + (m->gate != NULL ? m->n_ff : 0));
    }
    return s;
}

int cpu_mixture_room_init(struct cpu_program *p)
{
    const struct gqa_host *host = p->context->host;
    struct cpu_mixture_room *room = &p->mixture_room;
    struct sizes s = find_sizes(p, room);
    size_t rows = p->max_rows, choices = rows * s.n_used;

    if (s.n_experts == 0) {
        return 0;
    }
    room->n_slots = larger(p->max_rows, CPU_WAVE_SLOTS);
    room->n_slots = room->n_slots < choices ? room->n_slots : (uint32_t)choices;
    room->logits = calloc(rows * s.n_experts, sizeof(*room->logits));
    room->chosen = calloc(choices, sizeof(*room->chosen));
    room->weights = calloc(choices, sizeof(*room->weights));
    room->slots = calloc(choices, sizeof(*room->slots));
    room->rows = calloc(choices, sizeof(*room->rows));
    room->first = calloc((size_t)s.n_experts + 1, sizeof(*room->first));
    room->next = calloc((size_t)s.n_experts + 1, sizeof(*room->next));
    room->products = calloc((size_t)2 * s.n_experts, sizeof(*room->products));
    if (room->logits == NULL || room->chosen == NULL || room->weights == NULL ||
        room->slots == NULL || room->rows == NULL || room->first == NULL || room->next == NULL ||
        room->products == NULL) {
        return -ENOMEM;
    }
    room->x = host->allocate(host->data, sizeof(float) * room->n_slots * room->x_width);
    room->hidden = host->allocate(host->data, sizeof(float) * room->n_slots * room->h_width);
    return room->x != NULL && room->hidden != NULL ? 0 : -ENOMEM;
}

void cpu_mixture_room_finish(struct cpu_program *p)
{
    const struct gqa_host *host = p->context->host;
    struct cpu_mixture_room *room = &p->mixture_room;

    if (room->x != NULL) {
        host->release(host->data, room->x, sizeof(float) * room->n_slots * room->x_width);
    }
    if (room->hidden != NULL) {
        host->release(host->data, room->hidden, sizeof(float) * room->n_slots * room->h_width);
    }
    free(room->logits);
    free(room->chosen);
    free(room->weights);
    free(room->slots);
    free(room->rows);
    free(room->first);
    free(room->next);
    free(room->products);
}
