/* plugins/cpu/ops.c - the ops that work on one row at a time. Views have been checked by prepare.
 */
#include "plugins/cpu/program.h"

#include <math.h>
#include <string.h>

static uint64_t embed_row(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    switch (op->op.u.embed.row) {
    case GQA_EMBED_TOKEN:
        return (uint32_t)p->batch->tokens[row];
    case GQA_EMBED_POSITION:
        return p->batch->positions[row];
    default:
        return 0;
    }
}

/* Rows of given embeddings are taken as they are: scale belongs to the token table. */
void cpu_op_embed(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    uint32_t width = op->op.dst.width;
    float *dst = cpu_view_row(p, &op->op.dst, row);

    if (p->batch->embeddings != NULL && op->op.u.embed.row == GQA_EMBED_TOKEN) {
        memcpy(dst, p->batch->embeddings + (size_t)row * width, width * sizeof(*dst));
        return;
    }
    uint64_t row_bytes = (uint64_t)(width / op->type->n_block) * op->type->block_bytes;

    op->type->dequantise((const uint8_t *)op->table.data + embed_row(p, op, row) * row_bytes, dst,
                         width);
    if (op->op.scale != 1.0f) {
        for (uint32_t i = 0; i < width; i++) {
            dst[i] *= op->op.scale;
        }
    }
}

void cpu_op_norm(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    const float *src = cpu_view_row(p, &op->op.src, row);
    float *dst = cpu_view_row(p, &op->op.dst, row);
    uint32_t dim = op->op.u.norm.dim;
    const struct cpu_norm norm = {
        .centred = op->op.u.norm.kind == GQA_NORM_LAYER,
        .eps = op->op.u.norm.eps,
        .weight = op->weight,
        .bias = op->bias,
    };

    for (uint32_t i = 0; i < op->op.src.width; i += dim) {
        p->rows.norm(&norm, src + i, dst + i, dim);
    }
}

void cpu_op_glu(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    const float *up = op->op.src2.reg != GQA_NONE ? cpu_view_row(p, &op->op.src2, row) : NULL;

    p->glu.act[op->op.u.glu.kind](cpu_view_row(p, &op->op.src, row), up,
                                  cpu_view_row(p, &op->op.dst, row), op->op.dst.width,
                                  op->op.u.glu.alpha, op->op.u.glu.limit);
}

void cpu_op_add(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    const float *a = cpu_view_row(p, &op->op.src, row);
    const float *b = cpu_view_row(p, &op->op.src2, row);

    p->rows.add(a, b, op->op.scale, cpu_view_row(p, &op->op.dst, row), op->op.dst.width);
}

void cpu_op_scale(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    const float *src = cpu_view_row(p, &op->op.src, row);
    float *dst = cpu_view_row(p, &op->op.dst, row);

    for (uint32_t i = 0; i < op->op.dst.width; i++) {
        dst[i] = op->op.scale * src[i];
    }
}

void cpu_op_softcap(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    const float *src = cpu_view_row(p, &op->op.src, row);
    float *dst = cpu_view_row(p, &op->op.dst, row);

    for (uint32_t i = 0; i < op->op.dst.width; i++) {
        dst[i] = op->op.scale * tanhf(src[i] / op->op.scale);
    }
}

void cpu_op_gather(const struct cpu_program *p, const struct cpu_op *op, uint32_t row)
{
    memcpy(cpu_view_row(p, &op->op.dst, row), cpu_view_row(p, &op->op.src, p->batch->out_rows[row]),
           op->op.dst.width * sizeof(float));
}
