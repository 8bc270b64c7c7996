/* Products of a program, one row and many: matrices one after the other, as a model's layers are.
 */
#include "tools/plugin-check/bench.h"

#include "format/types.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SIDE         2048u /* of a square matrix */
#define MATRICES_MAX 64u
#define PROMPT_ROWS  512u

struct products {
    const struct bench *bench;
    struct gqa_reg regs[3];
    struct gqa_op ops[MATRICES_MAX + 2];
    struct gqa_weight weights[MATRICES_MAX + 1];
    void *memory[MATRICES_MAX]; /* a copy of the matrix for each, as the backend reads it */
    uint8_t *file;              /* the matrix as it lies in a file */
    float *floats;              /* the table of embeddings, and the rows */
    int32_t *tokens;
    uint32_t *positions;
    uint8_t *row_class;
    uint32_t n_matrices, n_rows;
    uint64_t bytes; /* of one matrix, as it is read */
    void *program;
};

static void products_finish(struct products *p)
{
    if (p->program != NULL) {
        p->bench->program->release(p->bench->context, p->program);
    }
    for (uint32_t i = 0; i < MATRICES_MAX; i++) {
        free(p->memory[i]);
    }
    free(p->file);
    free(p->floats);
    free(p->tokens);
    free(p->positions);
    free(p->row_class);
    free(p);
}

/* The matrix once, and copies of what the backend makes of it. */
static int make_matrices(struct products *p, uint32_t type)
{
    const struct gqa_program *g = p->bench->program;
    const struct fmt_type_info *info = fmt_type_info(type);
    const uint64_t file_bytes = fmt_type_bytes(info, (uint64_t)SIDE * SIDE);
    float x[FMT_MAX_BLOCK_VALUES];
    p->file = malloc(file_bytes);
    if (p->file == NULL) {
        return -ENOMEM;
    }
    for (uint64_t at = 0, k = 0; at < file_bytes; at += info->block_bytes) {
        for (uint32_t i = 0; i < info->n_block; i++, k++) {
            x[i] = 0.001f * (float)((k * 2654435761u >> 7) % 101) - 0.05f;
        }
        info->quantise(x, p->file + at, info->n_block);
    }
    struct gqa_weight w = {
        .name = "matrix", .type = type, .n_dims = 2, .ne = {SIDE, SIDE, 1, 1}, .data = p->file};
    w.packed_bytes = g->pack_bytes(p->bench->context, &w);
    p->bytes = w.packed_bytes > 0 ? w.packed_bytes : file_bytes;
    uint64_t n = BENCH_SPREAD_BYTES / p->bytes + 1;
    p->n_matrices = n < MATRICES_MAX ? (uint32_t)n : MATRICES_MAX;
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < p->n_matrices; i++) {
        p->memory[i] = aligned_alloc(4096, (p->bytes + 4095) & ~4095ull);
        if (p->memory[i] == NULL) {
            return -ENOMEM;
        }
        if (i > 0 || w.packed_bytes == 0) {
            memcpy(p->memory[i], i > 0 ? p->memory[0] : p->file, p->bytes);
        } else {
            rc = g->pack(p->bench->context, &w, 0, SIDE, p->memory[0]);
        }
        p->weights[i] = w;
        *(w.packed_bytes > 0 ? &p->weights[i].packed : &p->weights[i].data) = p->memory[i];
    }
    return rc;
}

static struct gqa_op plain_op(uint32_t kind, uint32_t src, uint32_t dst)
{
    const struct gqa_view none = {GQA_NONE, 0, 0};
    return (struct gqa_op){.kind = kind,
                           .layer = GQA_NONE,
                           .src = src != GQA_NONE ? (struct gqa_view){src, 0, SIDE} : none,
                           .src2 = none,
                           .src3 = none,
                           .dst = {dst, 0, SIDE},
                           .weight = GQA_NONE,
                           .bias = GQA_NONE,
                           .scale = 1};
}

/* Embeds into register 0, multiplies from 0 to 1 and back, and gathers one row. */
static int make_program(struct products *p, struct gqa_reason *reason)
{
    uint32_t n_ops = 0, at = 0;
    for (uint32_t i = 0; i < 3; i++) {
        p->regs[i] = (struct gqa_reg){SIDE, i == 2 ? GQA_REG_OUT : 0};
    }
    p->weights[p->n_matrices] = (struct gqa_weight){.name = "table",
                                                    .type = GQA_TYPE_F32,
                                                    .n_dims = 2,
                                                    .ne = {SIDE, 1, 1, 1},
                                                    .data = p->floats};
    p->ops[n_ops] = plain_op(GQA_OP_EMBED, GQA_NONE, 0);
    p->ops[n_ops++].weight = p->n_matrices;
    for (uint32_t i = 0; i < p->n_matrices; i++, at = !at) {
        p->ops[n_ops] = plain_op(GQA_OP_LINEAR, at, !at);
        p->ops[n_ops++].weight = i;
    }
    p->ops[n_ops++] = plain_op(GQA_OP_GATHER, at, 2);
    const struct gqa_program_desc desc = {
        .struct_size = sizeof(desc),
        .max_rows = p->n_rows,
        .max_out_rows = 1,
        .n_ops = n_ops,
        .n_regs = 3,
        .n_weights = p->n_matrices + 1,
        .ops = p->ops,
        .regs = p->regs,
        .weights = p->weights,
    };
    return p->bench->program->prepare(p->bench->context, &desc, &p->program, reason);
}

static int one_step(void *arg)
{
    struct products *p = arg;
    const struct gqa_program *g = p->bench->program;
    const struct gqa_attn_seq seq = {.n_rows = p->n_rows};
    const struct gqa_attn_batch attention = {.struct_size = sizeof(attention),
                                             .n_rows = p->n_rows,
                                             .n_seqs = 1,
                                             .seqs = &seq,
                                             .row_class = p->row_class};
    const uint32_t last = p->n_rows - 1;
    const struct gqa_batch batch = {.struct_size = sizeof(batch),
                                    .n_rows = p->n_rows,
                                    .n_out = 1,
                                    .tokens = p->tokens,
                                    .positions = p->positions,
                                    .out_rows = &last,
                                    .embeddings = p->floats + SIDE,
                                    .attention = &attention};
    int rc = g->begin(p->bench->context, p->program, &batch);
    if (rc == 0) {
        rc = g->run(p->bench->context, p->program, 0, p->n_matrices + 2);
        int ended = g->end(p->bench->context, p->program);
        rc = rc < 0 ? rc : ended;
    }
    return rc;
}

static void tell(const struct products *p, const struct bench_limits *l, uint32_t type,
                 double seconds)
{
    char what[96];
    const bool quantised = fmt_type_info(type)->n_block > 1;
    struct results_speed speed = {.what = what, .us = seconds * 1e6 / p->n_matrices};
    snprintf(what, sizeof(what), "linear, %s, %u x %u, %u row%s", fmt_type_info(type)->name, SIDE,
             SIDE, p->n_rows, p->n_rows > 1 ? "s" : "");
    if (p->n_rows == 1) {
        speed.unit = "GB/s";
        speed.rate = (double)p->bytes * p->n_matrices / seconds / 1e9;
        speed.limit = l->bytes / 1e9;
    } else {
        speed.unit = quantised ? "GOP/s" : "GFLOP/s";
        speed.rate = 2.0 * SIDE * SIDE * p->n_rows * p->n_matrices / seconds / 1e9;
        speed.limit = (quantised && l->int8_ops > 0 ? l->int8_ops : l->f32_flops) / 1e9;
    }
    results_speed(p->bench->results, &speed);
}

static int run_type(const struct bench *b, const struct bench_limits *l, uint32_t type,
                    uint32_t n_rows, struct gqa_reason *reason)
{
    double seconds;
    struct products *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        return -ENOMEM;
    }
    p->bench = b;
    p->n_rows = n_rows;
    p->floats = calloc((size_t)(n_rows + 1) * SIDE, sizeof(float));
    p->tokens = calloc(n_rows, sizeof(*p->tokens));
    p->positions = calloc(n_rows, sizeof(*p->positions));
    p->row_class = calloc(n_rows, 1);
    int rc = p->floats == NULL || p->tokens == NULL || p->positions == NULL || p->row_class == NULL
                 ? -ENOMEM
                 : make_matrices(p, type);
    for (size_t i = 0; rc == 0 && i < (size_t)(n_rows + 1) * SIDE; i++) {
        p->floats[i] = 0.01f * (float)(i % 103) - 0.5f;
    }
    rc = rc < 0 ? rc : make_program(p, reason);
    rc = rc < 0 ? rc : bench_time(one_step, p, &seconds);
    if (rc == 0) {
        tell(p, l, type, seconds);
    }
    products_finish(p);
    return rc == -ENOTSUP ? 0 : rc;
}

int bench_program_run(const struct bench *b, const struct bench_limits *l,
                      struct gqa_reason *reason)
{
    static const uint32_t types[] = {GQA_TYPE_Q4_0, GQA_TYPE_Q8_0, GQA_TYPE_Q4_K, GQA_TYPE_F16};
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < sizeof(types) / sizeof(types[0]); i++) {
        rc = run_type(b, l, types[i], 1, reason);
        rc = rc < 0 ? rc : run_type(b, l, types[i], PROMPT_ROWS, reason);
    }
    return rc;
}
