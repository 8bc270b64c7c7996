#include "plugins/cuda/products.h"

enum cuda_input_kind cuda_input_kind_of(enum cuda_weight_type type)
{
    return type == CUDA_W_F16    ? CUDA_INPUT_F16
           : type == CUDA_W_BF16 ? CUDA_INPUT_BF16
                                 : CUDA_INPUT_INT8;
}

static uint32_t blocks_of(uint32_t k)
{
    return (k + CUDA_BLOCK - 1) / CUDA_BLOCK;
}

static uint32_t segments_of(uint32_t k)
{
    return (blocks_of(k) + CUDA_SEGMENT - 1) / CUDA_SEGMENT;
}

/* A product may read up to 7 tiles behind the last row's. */
int cuda_inputs_reserve(struct cuda_context *c, struct cuda_inputs *in, enum cuda_input_kind kind,
                        uint64_t n_rows, uint32_t k)
{
    uint64_t rows = (n_rows + CUDA_TILE - 1) / CUDA_TILE * CUDA_TILE + 7 * CUDA_TILE;
    uint64_t values = rows * blocks_of(k) * CUDA_BLOCK;
    bool halves = kind != CUDA_INPUT_INT8;

    int r = cuda_buffer_reserve(c, &in->quants, halves ? values * 4 : values);
    r = r < 0 ? r : cuda_buffer_reserve(c, &in->scales, rows * (halves ? 1 : blocks_of(k)) * 4);
    return r < 0 || halves ? r : cuda_buffer_reserve(c, &in->sums, rows * blocks_of(k) * 8);
}

void cuda_inputs_finish(struct cuda_context *c, struct cuda_inputs *in)
{
    cuda_buffer_finish(c, &in->quants);
    cuda_buffer_finish(c, &in->scales);
    cuda_buffer_finish(c, &in->sums);
}

int cuda_inputs_lay_out(struct cuda_context *c, const struct cuda_inputs *in,
                        enum cuda_input_kind kind, struct cuda_quantise_args *args)
{
    args->n_blocks = blocks_of(args->k);
    args->bf16 = kind == CUDA_INPUT_BF16;
    args->q = cuda_pointer(in->quants.at);
    args->scales = cuda_pointer(in->scales.at);
    args->sums = cuda_pointer(in->sums.at);
    if (kind == CUDA_INPUT_INT8) {
        return cuda_launch(c, c->kernels[CUDA_KERNEL_quantise],
                           (struct cuda_grid){args->n_rows, (args->n_blocks + 7) / 8, 256, 0},
                           args);
    }
    return cuda_launch(c, c->kernels[CUDA_KERNEL_halve],
                       (struct cuda_grid){args->n_rows, 1, 256, 0}, args);
}

static struct cuda_product_args product_args(const struct cuda_inputs *in,
                                             const struct cuda_matrix *m, float *dst,
                                             uint64_t stride)
{
    return (struct cuda_product_args){
        .weight = cuda_pointer(m->weight),
        .q = cuda_pointer(in->quants.at),
        .scales = cuda_pointer(in->scales.at),
        .sums = cuda_pointer(in->sums.at),
        .bias = cuda_pointer(m->bias),
        .dst = dst,
        .stride = stride,
        .n_outs = m->n_outputs,
        .n_blocks = blocks_of(m->n_inputs),
    };
}

/* columns: blocks for each strip. */
static int launch(struct cuda_context *c, const struct cuda_matrix *m, uint32_t n_strips,
                  uint32_t columns, uint32_t log_tiles, struct cuda_product_args *args)
{
    uint32_t strips = CUDA_WARPS / args->split;

    return cuda_launch(
        c, c->products[m->type][log_tiles],
        (struct cuda_grid){(n_strips + strips - 1) / strips, columns, 32 * CUDA_WARPS, 0}, args);
}

int cuda_multiply(struct cuda_context *c, const struct cuda_inputs *in, const struct cuda_matrix *m,
                  float *dst, uint64_t stride, uint32_t n_rows)
{
    uint32_t tiles = (n_rows + CUDA_TILE - 1) / CUDA_TILE, log_tiles;
    uint32_t n_strips = (m->n_outputs + CUDA_STRIP - 1) / CUDA_STRIP;
    struct cuda_product_args args = product_args(in, m, dst, stride);

    args.n_rows = n_rows;
    cuda_product_shape(c, n_strips, segments_of(m->n_inputs), tiles, &log_tiles, &args.split);
    return launch(c, m, n_strips, (tiles + (1u << log_tiles) - 1) >> log_tiles, log_tiles, &args);
}

int cuda_multiply_groups(struct cuda_context *c, const struct cuda_inputs *in,
                         const struct cuda_matrix *m, float *dst, uint64_t stride,
                         const struct cuda_product_groups *groups)
{
    /* A matrix that does not begin with a strip has a part of one more. */
    uint32_t skipped = m->n_outputs % CUDA_STRIP != 0 ? CUDA_STRIP - 1 : 0;
    uint32_t n_strips = (m->n_outputs + skipped + CUDA_STRIP - 1) / CUDA_STRIP;
    struct cuda_product_args args = product_args(in, m, dst, stride);

    args.items = cuda_pointer(groups->items);
    args.split = cuda_product_split(c, n_strips, segments_of(m->n_inputs), groups->log_tiles,
                                    groups->n_likely);
    return launch(c, m, n_strips, groups->n_items, groups->log_tiles, &args);
}
