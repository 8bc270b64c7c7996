/* tests/cuda/bench.c - each kernel's time against its floor, on a machine with a GPU.
 *
 *   bench-cuda [RESULTS.json]
 *   bench-cuda --probe          only says whether there is a GPU
 *
 * A floor is what the kernel's bytes take at the speed of a copy, measured in the same run, or its
 * operations at the tensor cores' peak (multiprocessors x clock x operations a clock), whichever is
 * longer. Times are the best of several runs of many launches, so that launches overlap; operands
 * are larger than the second-level cache where that is what a model's are. Exit status: 77 without
 * a GPU. */
#include "tests/cuda/bench.h"

#include "plugins/cuda/attention.h"
#include "plugins/cuda/weights.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define RUNS     5
#define LAUNCHES 20
#define POOL     BENCH_POOL_BYTES

static void host_log(void *data, int level, const char *message)
{
    fprintf(stderr, "%s\n", message);
}

static const struct gqa_host host = {.struct_size = sizeof(host), .n_threads = 1, .log = host_log};

double bench_seconds(struct bench *b, int (*fn)(struct bench *b, void *arg, int i), void *arg)
{
    const struct cuda_driver *d = &b->c->driver;
    CUevent first, last;
    double best = 1e9;

    CUDA(d, cuEventCreate)(&first, CU_EVENT_DEFAULT);
    CUDA(d, cuEventCreate)(&last, CU_EVENT_DEFAULT);
    for (int run = 0; run <= RUNS; run++) {
        float ms = 0;
        CUDA(d, cuEventRecord)(first, b->c->stream);
        for (int i = 0; i < LAUNCHES; i++) {
            if (fn(b, arg, i) < 0) {
                exit(1);
            }
        }
        CUDA(d, cuEventRecord)(last, b->c->stream);
        if (cuda_synchronise(b->c) < 0) {
            exit(1);
        }
        CUDA(d, cuEventElapsedTime)(&ms, first, last);
        double s = (double)ms / 1e3 / LAUNCHES;
        best = run > 0 && s < best ? s : best; /* the first one warms up */
    }
    CUDA(d, cuEventDestroy)(first);
    CUDA(d, cuEventDestroy)(last);
    return best;
}

void bench_report(struct bench *b, const char *name, double seconds, double bytes, double flops,
                  double peak)
{
    double by_bytes = bytes / b->copy_bytes_per_s, by_flops = flops / peak;
    double floor = by_bytes > by_flops ? by_bytes : by_flops;

    printf("%-44s %9.1f us  %7.0f GB/s  %7.1f Tflop/s  floor %9.1f us (%s)  %5.1f %%\n", name,
           seconds * 1e6, bytes / seconds / 1e9, flops / seconds / 1e12, floor * 1e6,
           by_bytes > by_flops ? "bytes" : "flops", 100 * floor / seconds);
    if (b->json != NULL) {
        fprintf(b->json,
                "%s\n    {\"name\": \"%s\", \"us\": %.3f, \"bytes\": %.0f, \"flops\": %.0f, "
                "\"floor_us\": %.3f, \"share\": %.4f}",
                b->n_lines++ > 0 ? "," : "", name, seconds * 1e6, bytes, flops, floor * 1e6,
                floor / seconds);
    }
}

/* ---- copies ------------------------------------------------------------------------------ */

static int copy(struct bench *b, void *arg, int i)
{
    return cuda_check(
        b->c,
        CUDA(&b->c->driver, cuMemcpyDtoDAsync)(b->pool + POOL / 2, b->pool, POOL / 2, b->c->stream),
        "copy");
}

/* ---- products ---------------------------------------------------------------------------- */

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
    uint64_t room = (p->weight_bytes + 255) & ~255ull, copies = POOL / 2 / room;
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
    CUdeviceptr at = b->pool + POOL / 2;
    char line[96];
    struct product p = {.type = type,
                        .weight_bytes = (uint64_t)strips * blocks * cuda_block_bytes(type)};

    cuda_product_shape(b->c, strips, (blocks + 7) / 8, tiles, &log_tiles, &split);
    p.log_tiles = log_tiles;
    p.args = (struct cuda_product_args){
        .q = cuda_pointer(at),
        .scales = cuda_pointer(at + (64ull << 20)),
        .sums = cuda_pointer(at + (96ull << 20)),
        .dst = cuda_pointer(at + (128ull << 20)),
        .stride = n,
        .n_rows = rows,
        .n_outs = n,
        .n_blocks = blocks,
        .split = split,
    };
    bool halves = type == CUDA_W_F16 || type == CUDA_W_BF16;
    double flops = 2.0 * rows * n * k;
    double bytes = (double)p.weight_bytes + 4.0 * rows * n + (double)rows * k * (halves ? 4 : 1);
    snprintf(line, sizeof(line), "product %s %ux%u, %u rows", name, n, k, rows);
    bench_report(b, line, bench_seconds(b, product, &p), bytes, flops,
                 halves ? b->half_flops_per_s : b->int8_flops_per_s);
}

/* ---- attention --------------------------------------------------------------------------- */

#define N_HEADS  32u
#define N_GROUPS 8u
#define HEAD_DIM 128u
#define WIDTH    ((uint64_t)N_HEADS * HEAD_DIM)

/* Sequences that are alike: so many of them, tokens before their rows, and rows. */
struct shape {
    uint32_t n_seqs, n_past, n_rows;
    uint32_t n_sinks, recent; /* of a view whose queries turn; recent 0: all is seen */
};

struct attention {
    struct cuda_plan plan;
    struct gqa_attn_layer host_layer;
    struct cuda_attn_layer layer;
    struct gqa_attn_io io;
    struct gqa_attn_seq *seqs;
    uint64_t **pages; /* of each sequence, in the pool */
    struct gqa_page_table table;
    struct gqa_attn_batch batch;
    uint32_t n_votes;
    float *votes; /* on the host */
};

static double freqs[HEAD_DIM / 2];
static const struct gqa_rope_table rope = {HEAD_DIM / 2, freqs, 1};

static void attention_init(struct bench *b, const struct shape *shape, struct attention *a)
{
    uint64_t head_bytes = gqa_kv_head_bytes(GQA_TYPE_F16, HEAD_DIM), used = 0;
    uint64_t page_bytes = 2 * N_GROUPS * head_bytes;
    CUdeviceptr io = b->pool + POOL / 2 + POOL / 4;

    *a = (struct attention){
        .host_layer = {.n_heads = N_HEADS,
                       .n_kv_heads = N_GROUPS,
                       .k_dim = HEAD_DIM,
                       .v_dim = HEAD_DIM,
                       .k_type = GQA_TYPE_F16,
                       .v_type = GQA_TYPE_F16,
                       .scale = 0.088f,
                       .v_offset = N_GROUPS * head_bytes,
                       .k_head_bytes = head_bytes,
                       .v_head_bytes = head_bytes,
                       .rope = &rope,
                       .rope_kind = GQA_ROPE_HALF},
        .io = {.q = cuda_pointer(io),
               .out = cuda_pointer(io + (128ull << 20)),
               .q_stride = WIDTH,
               .out_stride = WIDTH},
        .table = {.n_sinks = shape->n_sinks, .recent = shape->recent, .turned = shape->recent > 0},
        .seqs = calloc(shape->n_seqs, sizeof(*a->seqs)),
        .pages = calloc(shape->n_seqs, sizeof(*a->pages))};
    a->layer = cuda_layer_of(&a->host_layer, 0);
    for (uint32_t i = 0; i < shape->n_seqs; i++) {
        struct gqa_attn_seq *s = &a->seqs[i];
        *s = (struct gqa_attn_seq){.first_row = i * shape->n_rows,
                                   .n_rows = shape->n_rows,
                                   .n_past = shape->n_past,
                                   .tables = &a->table};
        a->pages[i] = calloc(cuda_seq_pages(&a->host_layer, s), sizeof(**a->pages));
        for (uint32_t k = 0; k < cuda_seq_pages(&a->host_layer, s); k++, used++) {
            a->pages[i][k] =
                b->pool + used * page_bytes % (POOL / 2 + POOL / 4 - page_bytes) / 256 * 256;
        }
    }
    a->batch = (struct gqa_attn_batch){.struct_size = sizeof(a->batch),
                                       .n_rows = shape->n_seqs * shape->n_rows,
                                       .n_seqs = shape->n_seqs,
                                       .commit = 1,
                                       .seqs = a->seqs};
    if (cuda_plan_make(b->c, &a->plan, &a->host_layer, &a->batch,
                       (const uint64_t *const *)a->pages) < 0) {
        exit(1);
    }
}

static void attention_finish(struct bench *b, struct attention *a)
{
    cuda_plan_finish(b->c, &a->plan);
    for (uint32_t i = 0; i < a->batch.n_seqs; i++) {
        free(a->pages[i]);
    }
    free(a->pages);
    free(a->seqs);
    free(a->votes);
}

static int attend(struct bench *b, void *arg, int i)
{
    struct attention *a = arg;
    return cuda_plan_attend(b->c, &a->plan, &a->layer, &a->io);
}

static void bench_attention(struct bench *b, const struct shape *shape)
{
    struct attention a;
    char line[96], view[40] = "";
    uint32_t n_past = shape->n_past, n_rows = shape->n_rows;

    attention_init(b, shape, &a);
    double tokens = (double)n_past * n_rows + 0.5 * n_rows * n_rows; /* seen, of all rows */
    double held = n_past + n_rows;
    if (shape->recent > 0) {
        held = (double)shape->n_sinks + shape->recent + n_rows - 1;
        tokens = ((double)shape->n_sinks + shape->recent) * n_rows;
        snprintf(view, sizeof(view), ", sees %u + %u", shape->n_sinks, shape->recent);
    }
    double bytes = shape->n_seqs * (2.0 * held * N_GROUPS * 2 * HEAD_DIM + 8.0 * n_rows * WIDTH);
    double flops = 4.0 * shape->n_seqs * tokens * WIDTH;
    snprintf(line, sizeof(line), "attention 32/8 heads, %u x %u rows at %u%s", shape->n_seqs,
             n_rows, n_past, view);
    bench_report(b, line, bench_seconds(b, attend, &a), bytes, flops, b->half_flops_per_s);
    attention_finish(b, &a);
}

static int vote(struct bench *b, void *arg, int i)
{
    struct attention *a = arg;
    return cuda_plan_observe(b->c, &a->plan, &a->host_layer, &a->layer, &a->batch, &a->io, 0,
                             a->batch.n_rows, a->n_votes, a->votes);
}

/* Votes come from the host and go back to it: that is part of what is measured. */
static void bench_votes(struct bench *b, uint32_t n_past, uint32_t n_rows)
{
    const struct shape shape = {1, n_past, n_rows, 0, 0};
    struct attention a;
    char line[96];

    attention_init(b, &shape, &a);
    a.n_votes = n_past;
    a.votes = calloc((size_t)N_GROUPS * n_past, sizeof(*a.votes));
    double bytes = 2.0 * (n_past + n_rows) * N_GROUPS * HEAD_DIM + 4.0 * n_rows * WIDTH;
    snprintf(line, sizeof(line), "votes 32/8 heads, %u rows over %u", n_rows, n_past);
    bench_report(b, line, bench_seconds(b, vote, &a), bytes, 2.0 * n_past * n_rows * WIDTH,
                 b->half_flops_per_s);
    attention_finish(b, &a);
}

/* ---- all of it --------------------------------------------------------------------------- */

static void bench_all(struct bench *b)
{
    static const struct {
        enum cuda_weight_type type;
        const char *name;
    } types[] = {{CUDA_W_Q4_0, "Q4_0"}, {CUDA_W_Q8_0, "Q8_0"},   {CUDA_W_Q4_K, "Q4_K"},
                 {CUDA_W_Q6_K, "Q6_K"}, {CUDA_W_MXFP4, "MXFP4"}, {CUDA_W_F16, "F16"},
                 {CUDA_W_BF16, "BF16"}};
    static const uint32_t rows[] = {1, 4, 8, 32, 64, 512, 2048};
    static const struct shape shapes[] = {
        {1, 4095, 1, 0, 0},       {1, 16383, 1, 0, 0},      {1, 131071, 1, 0, 0},
        {16, 8191, 1, 0, 0},      {64, 2047, 1, 0, 0},      {1, 0, 2048, 0, 0},
        {1, 14336, 2048, 0, 0},   {16, 65535, 1, 64, 4032}, {64, 65535, 1, 4, 2044},
        {1, 30720, 512, 4, 4092},
    };

    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        for (size_t k = 0; k < sizeof(rows) / sizeof(rows[0]); k++) {
            bench_product(b, types[i].type, types[i].name, 4096, 4096, rows[k]);
        }
        bench_product(b, types[i].type, types[i].name, 14336, 4096, 1);
        bench_product(b, types[i].type, types[i].name, 4096, 14336, 1);
    }
    bench_experts(b);
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        bench_attention(b, &shapes[i]);
    }
    bench_votes(b, 8192, 32);
    bench_votes(b, 65536, 32);
}

/* Dense operations a clock of one multiprocessor: A100 312 Tflop/s, H100 989 Tflop/s of f16. */
static void find_peaks(struct bench *b)
{
    const struct cuda_device *device = &b->c->device;
    int khz = 0;

    CUDA(&b->c->driver, cuDeviceGetAttribute)(&khz, CU_DEVICE_ATTRIBUTE_CLOCK_RATE, device->device);
    double a_clock = device->major >= 9 ? 4096 : device->minor == 0 ? 2048 : 1024;
    b->half_flops_per_s = a_clock * device->n_multiprocessors * khz * 1e3;
    b->int8_flops_per_s = 2 * b->half_flops_per_s;
}

int main(int argc, char **argv)
{
    struct gqa_reason reason = {""};
    struct bench b = {0};
    struct cuda_buffer pool = {0};

    int r = cuda_context_create(&host, "", &b.c, &reason);
    if (r < 0) {
        printf("SKIPPED: NO GPU HERE, NOTHING WAS MEASURED: %s\n", reason.text);
        return 77;
    }
    if (argc > 1 && strcmp(argv[1], "--probe") == 0) {
        cuda_context_destroy(b.c);
        return 0;
    }
    if (cuda_enter(b.c) < 0 || cuda_buffer_reserve(b.c, &pool, POOL) < 0) {
        return 1;
    }
    b.pool = pool.at;
    for (uint32_t i = 0; i < HEAD_DIM / 2; i++) {
        freqs[i] = pow(10000, -2.0 * i / HEAD_DIM);
    }
    find_peaks(&b);
    b.copy_bytes_per_s = (double)POOL / bench_seconds(&b, copy, NULL); /* read and written */
    printf("%s, sm_%d%d, %d multiprocessors; copies %.0f GB/s; peak f16 %.0f, int8 %.0f Tflop/s\n",
           b.c->device.name, b.c->device.major, b.c->device.minor, b.c->device.n_multiprocessors,
           b.copy_bytes_per_s / 1e9, b.half_flops_per_s / 1e12, b.int8_flops_per_s / 1e12);
    b.json = argc > 1 ? fopen(argv[1], "w") : NULL;
    if (b.json != NULL) {
        fprintf(b.json,
                "{\"device\": \"%s\", \"copy_bytes_per_s\": %.0f, \"half_flops_per_s\": %.0f,\n "
                "\"kernels\": [",
                b.c->device.name, b.copy_bytes_per_s, b.half_flops_per_s);
    }
    bench_all(&b);
    if (b.json != NULL) {
        fprintf(b.json, "\n]}\n");
        fclose(b.json);
    }
    cuda_buffer_finish(b.c, &pool);
    cuda_leave(b.c);
    cuda_context_destroy(b.c);
    return 0;
}
