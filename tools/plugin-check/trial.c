#include "tools/plugin-check/trial.h"

#include "format/types.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TABLE_ROWS   8u /* of the table that embeddings stand for */
#define POSITION_MAX 131071u
#define ADAPTER_ONE  7u
#define ADAPTER_TWO  9u

/* xorshift64*: the same numbers on every machine. */
static uint32_t next_random(struct trial *t)
{
    t->random ^= t->random >> 12;
    t->random ^= t->random << 25;
    t->random ^= t->random >> 27;
    return (uint32_t)((t->random * 0x2545f4914f6cdd1du) >> 32);
}

/* In -1..1. */
static float next_float(struct trial *t)
{
    return (float)(int32_t)next_random(t) / 2147483648.0f;
}

static void *room(struct trial *t, size_t n, size_t bytes)
{
    void *memory = calloc(n > 0 ? n : 1, bytes);
    t->no_memory = t->no_memory || memory == NULL;
    return memory;
}

void trial_init(struct trial *t, uint32_t n_rows, uint32_t width, bool embeddings, uint64_t seed)
{
    memset(t, 0, sizeof(*t));
    t->random = seed * 0x9e3779b97f4a7c15u + 1;
    t->n_rows = t->n_out = n_rows;
    t->tokens = room(t, n_rows, sizeof(*t->tokens));
    t->positions = room(t, n_rows, sizeof(*t->positions));
    t->out_rows = room(t, n_rows, sizeof(*t->out_rows));
    uint32_t reg = trial_reg(t, width, 0);
    if (embeddings) {
        t->inputs = room(t, (size_t)n_rows * width, sizeof(float));
        struct gqa_op *op = trial_op(t, GQA_OP_EMBED);
        op->weight = trial_weight(t, GQA_TYPE_F32, width, TABLE_ROWS, 0, 1);
        op->dst = trial_view(reg, 0, width);
    }
    if (t->no_memory) {
        return;
    }
    for (uint32_t i = 0; i < n_rows; i++) {
        t->tokens[i] = (int32_t)(next_random(t) % TABLE_ROWS);
        t->positions[i] = i < 3 ? i : next_random(t) % POSITION_MAX;
        t->out_rows[i] = i;
    }
    for (size_t i = 0; embeddings && i < (size_t)n_rows * width; i++) {
        t->inputs[i] = next_float(t);
    }
}

void trial_finish(struct trial *t)
{
    for (uint32_t i = 0; i < t->n_weights; i++) {
        free((void *)t->weights[i].data);
    }
    free(t->inputs);
    free(t->tokens);
    free(t->positions);
    free(t->out_rows);
    free(t->row_adapters);
}

uint32_t trial_reg(struct trial *t, uint32_t width, uint32_t flags)
{
    t->regs[t->n_regs] = (struct gqa_reg){width, flags};
    return t->n_regs++;
}

struct gqa_view trial_view(uint32_t reg, uint32_t first, uint32_t width)
{
    return (struct gqa_view){reg, first, width};
}

struct gqa_op *trial_op(struct trial *t, uint32_t kind)
{
    const struct gqa_view none = {GQA_NONE, 0, 0};
    struct gqa_op *op = &t->ops[t->n_ops++];
    *op = (struct gqa_op){
        .kind = kind,
        .layer = GQA_NONE,
        .src = none,
        .src2 = none,
        .src3 = none,
        .dst = none,
        .weight = GQA_NONE,
        .bias = GQA_NONE,
        .scale = 1,
    };
    return op;
}

/* A block of a type that format/ does not write: any bytes are one, behind its scale (and minimum),
 * which stand in front. */
static void random_block(struct trial *t, const struct fmt_type_info *type, float deviation,
                         uint8_t *block)
{
    const uint16_t scale = fmt_f32_to_f16(deviation / 16 * (1.5f + next_float(t)) / 2);
    for (uint32_t i = 0; i < type->block_bytes; i++) {
        block[i] = (uint8_t)next_random(t);
    }
    memcpy(block, &scale, sizeof(scale));
    if (type->type != GQA_TYPE_Q5_0) {
        const uint16_t minimum = fmt_f32_to_f16(deviation * next_float(t) / 16);
        memcpy(block + sizeof(scale), &minimum, sizeof(minimum));
    }
}

uint32_t trial_weight(struct trial *t, uint32_t type, uint32_t ne0, uint32_t ne1, uint32_t ne2,
                      float deviation)
{
    static const char *const names[TRIAL_WEIGHTS_MAX] = {
        "weight 0",  "weight 1",  "weight 2",  "weight 3", "weight 4",  "weight 5",
        "weight 6",  "weight 7",  "weight 8",  "weight 9", "weight 10", "weight 11",
        "weight 12", "weight 13", "weight 14", "weight 15"};
    const struct fmt_type_info *info = fmt_type_info(type);
    uint64_t n_blocks = (uint64_t)ne0 * (ne1 > 0 ? ne1 : 1) * (ne2 > 0 ? ne2 : 1) / info->n_block;
    uint8_t *data = room(t, n_blocks, info->block_bytes);
    float x[FMT_MAX_BLOCK_VALUES];
    for (uint64_t b = 0; data != NULL && b < n_blocks; b++) {
        uint8_t *block = data + b * info->block_bytes;
        for (uint32_t i = 0; i < info->n_block; i++) {
            x[i] = deviation * next_float(t);
        }
        if (info->quantise != NULL) {
            info->quantise(x, block, info->n_block);
        } else {
            random_block(t, info, deviation, block);
        }
    }
    t->weights[t->n_weights] = (struct gqa_weight){
        .name = names[t->n_weights],
        .type = type,
        .n_dims = ne2 > 0   ? 3
                  : ne1 > 0 ? 2
                            : 1,
        .ne = {ne0, ne1 > 0 ? ne1 : 1, ne2 > 0 ? ne2 : 1, 1},
        .data = data,
    };
    return t->n_weights++;
}

void trial_gather(struct trial *t, uint32_t reg)
{
    t->result = trial_reg(t, t->regs[reg].width, GQA_REG_OUT);
    struct gqa_op *op = trial_op(t, GQA_OP_GATHER);
    op->src = trial_view(reg, 0, t->regs[reg].width);
    op->dst = trial_view(t->result, 0, t->regs[reg].width);
}

void trial_adapters(struct trial *t, uint32_t weight, uint32_t type, uint32_t rank)
{
    static const uint32_t ids[3] = {ADAPTER_ONE, GQA_NONE, ADAPTER_TWO};
    uint32_t n_in = (uint32_t)t->weights[weight].ne[0], n_out = (uint32_t)t->weights[weight].ne[1];
    for (uint32_t i = 0; i < 3; i += 2) {
        t->adapters[t->n_adapters++] = (struct gqa_adapter){
            .id = ids[i],
            .weight = weight,
            .a = trial_weight(t, type, n_in, rank, 0, 0.1f),
            .b = trial_weight(t, type, rank, n_out, 0, 0.1f),
            .scale = 2,
        };
    }
    t->row_adapters = room(t, t->n_rows, sizeof(*t->row_adapters));
    for (uint32_t i = 0; t->row_adapters != NULL && i < t->n_rows; i++) {
        t->row_adapters[i] = ids[i % 3];
    }
}

void trial_widen(struct trial *t)
{
    for (uint32_t i = 0; i < t->n_weights; i++) {
        struct gqa_weight *w = &t->weights[i];
        const struct fmt_type_info *info = fmt_type_info(w->type);
        size_t n = (size_t)(w->ne[0] * w->ne[1] * w->ne[2]);
        float *values = info->n_block > 1 ? room(t, n, sizeof(*values)) : NULL;
        if (values != NULL) {
            info->dequantise(w->data, values, n);
            free((void *)w->data);
            w->data = values;
            w->type = GQA_TYPE_F32;
        }
    }
}

/* ---- running ----------------------------------------------------------------------------- */

/* Which weights are products' matrices: those a backend may want packed. */
static bool is_matrix(const struct trial *t, uint32_t weight)
{
    for (uint32_t i = 0; i < t->n_ops; i++) {
        const struct gqa_op *op = &t->ops[i];
        const struct gqa_op_experts *e = &op->u.experts;
        if ((op->kind == GQA_OP_LINEAR && op->weight == weight) ||
            (op->kind == GQA_OP_EXPERTS &&
             (e->router == weight || e->gate == weight || e->up == weight || e->down == weight))) {
            return true;
        }
    }
    return false;
}

/* In two ranges where there are rows for two, as the daemon's workers do it. */
static int pack_one(const struct gqa_program *p, void *context, struct gqa_weight *w, void **ret)
{
    w->packed_bytes = p->pack_bytes(context, w);
    if (w->packed_bytes == 0) {
        return 0;
    }
    void *packed = aligned_alloc(4096, (w->packed_bytes + 4095) & ~(uint64_t)4095);
    if (packed == NULL) {
        return -ENOMEM;
    }
    *ret = packed;
    w->packed = packed;
    uint64_t n_rows = w->ne[1] * w->ne[2], step = p->pack_rows > 0 ? p->pack_rows : 1;
    uint64_t half = n_rows / 2 / step * step;
    int rc = half > 0 ? p->pack(context, w, 0, half, packed) : 0;
    return rc < 0 ? rc : p->pack(context, w, half, n_rows - half, packed);
}

/* Rows [first, first + n) as one step; the output rows among them are added to out. */
static int run_rows(const struct trial *t, const struct gqa_program *p, void *context,
                    void *program, uint32_t first, uint32_t n, float *out)
{
    uint32_t begin = 0, end = 0, width = t->regs[t->result].width;
    while (begin < t->n_out && t->out_rows[begin] < first) {
        begin++;
    }
    for (end = begin; end < t->n_out && t->out_rows[end] < first + n; end++) {
    }
    uint32_t *rows = calloc(end - begin + 1, sizeof(*rows));
    uint8_t *row_class = calloc(n, 1);
    if (rows == NULL || row_class == NULL) {
        free(rows);
        free(row_class);
        return -ENOMEM;
    }
    for (uint32_t i = begin; i < end; i++) {
        rows[i - begin] = t->out_rows[i] - first;
    }
    if (t->row_classes != NULL) {
        memcpy(row_class, t->row_classes + first, n);
    }
    const struct gqa_attn_seq seq = {.n_rows = n};
    const struct gqa_attn_batch attention = {.struct_size = sizeof(attention),
                                             .n_rows = n,
                                             .n_seqs = 1,
                                             .seqs = &seq,
                                             .row_class = row_class};
    const struct gqa_batch batch = {
        .struct_size = sizeof(batch),
        .n_rows = n,
        .n_out = end - begin,
        .tokens = t->tokens + first,
        .positions = t->positions + first,
        .out_rows = rows,
        .embeddings = t->inputs != NULL ? t->inputs + (size_t)first * t->regs[0].width : NULL,
        .adapters = t->row_adapters != NULL ? t->row_adapters + first : NULL,
        .attention = &attention,
    };
    int rc = p->begin(context, program, &batch);
    if (rc == 0) {
        rc = p->run(context, program, 0, t->n_ops);
        int ended = p->end(context, program);
        rc = rc < 0 ? rc : ended;
    }
    const float *data = rc == 0 ? p->data(context, program, t->result) : NULL;
    if (rc == 0 && data == NULL) {
        rc = -ENODATA;
    } else if (rc == 0) {
        memcpy(out + (size_t)begin * width, data, (size_t)(end - begin) * width * sizeof(*out));
    }
    free(rows);
    free(row_class);
    return rc;
}

static int prepare(const struct trial *t, const struct gqa_program *p, void *context,
                   const struct gqa_weight *weights, void **ret, struct gqa_reason *reason)
{
    const struct gqa_program_desc desc = {
        .struct_size = sizeof(desc),
        .max_rows = t->n_rows,
        .max_out_rows = t->n_rows,
        .n_ops = t->n_ops,
        .n_regs = t->n_regs,
        .n_weights = t->n_weights,
        .n_rope_tables = t->n_ropes,
        .ops = t->ops,
        .regs = t->regs,
        .weights = weights,
        .rope_tables = &t->rope,
        .n_adapters = t->n_adapters,
        .adapters = t->adapters,
    };
    return p->prepare(context, &desc, ret, reason);
}

int trial_run(struct trial *t, const struct gqa_program *p, void *context, uint32_t chunk,
              float **ret, struct gqa_reason *reason)
{
    struct gqa_weight weights[TRIAL_WEIGHTS_MAX];
    void *packed[TRIAL_WEIGHTS_MAX] = {NULL}, *program = NULL;
    int rc = t->no_memory ? -ENOMEM : 0;
    memcpy(weights, t->weights, sizeof(weights));
    for (uint32_t i = 0; rc == 0 && i < t->n_weights; i++) {
        rc = is_matrix(t, i) ? pack_one(p, context, &weights[i], &packed[i]) : 0;
    }
    rc = rc < 0 ? rc : prepare(t, p, context, weights, &program, reason);
    float *out = calloc((size_t)t->n_out * t->regs[t->result].width, sizeof(*out));
    rc = rc == 0 && out == NULL ? -ENOMEM : rc;
    uint32_t step = chunk > 0 ? chunk : t->n_rows;
    for (uint32_t first = 0; rc == 0 && first < t->n_rows; first += step) {
        uint32_t n = t->n_rows - first < step ? t->n_rows - first : step;
        rc = run_rows(t, p, context, program, first, n, out);
    }
    if (program != NULL) {
        p->release(context, program);
    }
    for (uint32_t i = 0; i < t->n_weights; i++) {
        free(packed[i]);
    }
    if (rc < 0) {
        free(out);
        return rc;
    }
    *ret = out;
    return 0;
}
