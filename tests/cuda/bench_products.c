/* tests/cuda/bench_products.c - products alone, from activations that are laid out already, by type
 * of weights and number of rows. */
#include "tests/cuda/bench.h"

#include "plugins/cuda/weights.h"

struct product {
    struct cuda_product_args args;
    enum cuda_weight_type type;
    uint32_t log_tiles;
    uint64_t weight_bytes;
    CUdeviceptr weights;
};

/* Another copy of the weights each time, as a model's layers are. */
static int product(struct bench *b, void *arg, int i)
{
    struct product *p = arg;
    uint64_t room = (p->weight_bytes + 255) & ~255ull, copies = b->pool_bytes / 2 / room;
    uint32_t tiles = (p->args.n_rows + 7) / 8, strips = (p->args.n_outs + 31) / 32,
             per_block = 8 / p->args.split;

    p->args.weight = cuda_pointer(b->pool + (copies > 0 ? (uint64_t)i % copies : 0) * room);
    return cuda_launch(b->c, b->c->products[p->type][p->log_tiles],
                       (struct cuda_grid){(strips + per_block - 1) / per_block,
                                          (tiles + (1u << p->log_tiles) - 1) >> p->log_tiles, 256,
                                          0},
                       &p->args);
}

static void bench_product(struct bench *b, enum cuda_weight_type type, const char *name, uint32_t n,
                          uint32_t k, uint32_t rows)
{
    uint32_t blocks = k / 32, strips = n / 32, tiles = (rows + 7) / 8, log_tiles = 0, split = 1;
    CUdeviceptr at = b->pool + b->pool_bytes / 2;
    uint64_t room = b->pool_bytes / 16; /* of each of the operands */
    char line[96];
    struct product p = {.type = type,
                        .weight_bytes = (uint64_t)strips * blocks * cuda_block_bytes(type)};

    cuda_product_shape(b->c, strips, (blocks + 7) / 8, tiles, &log_tiles, &split);
    p.log_tiles = log_tiles;
    p.args = (struct cuda_product_args){
        .q = cuda_pointer(at),
        .scales = cuda_pointer(at + 2 * room),
        .sums = cuda_pointer(at + 3 * room),
        .dst = cuda_pointer(at + 4 * room),
        .stride = n,
        .n_rows = rows,
        .n_outs = n,
        .n_blocks = blocks,
        .split = split,
    };
    bool halves = type == CUDA_W_F16 || type == CUDA_W_BF16;
    const struct bench_line l = {
        .seconds = bench_seconds(b, product, &p),
        .bytes = (double)p.weight_bytes + 4.0 * rows * n + (double)rows * k * (halves ? 4 : 1),
        .flops = 2.0 * rows * n * k,
        .peak = halves ? b->half_flops_per_s : b->int8_flops_per_s,
    };
    snprintf(line, sizeof(line), "product %s %ux%u, %u rows", name, n, k, rows);
    bench_report(b, line, &l);
}

void bench_products(struct bench *b)
{
    static const struct {
        enum cuda_weight_type type;
        const char *name;
    } types[] = {{CUDA_W_Q4_0, "Q4_0"}, {CUDA_W_Q8_0, "Q8_0"},   {CUDA_W_Q4_K, "Q4_K"},
                 {CUDA_W_Q6_K, "Q6_K"}, {CUDA_W_MXFP4, "MXFP4"}, {CUDA_W_F16, "F16"},
                 {CUDA_W_BF16, "BF16"}};
    static const uint32_t rows[] = {1, 4, 8, 32, 64, 512, 2048};

    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        if (b->tiny) {
            bench_product(b, types[i].type, types[i].name, 64, 256, 9);
            continue;
        }
        for (size_t k = 0; k < sizeof(rows) / sizeof(rows[0]); k++) {
            bench_product(b, types[i].type, types[i].name, 4096, 4096, rows[k]);
        }
        bench_product(b, types[i].type, types[i].name, 14336, 4096, 1);
        bench_product(b, types[i].type, types[i].name, 4096, 14336, 1);
    }
}
