/* tests/cuda/bench_attention.c - attention over pages of zeros, and votes: 32 heads of 128
 * dimensions over 8 groups.
 *
 * Pages of sequences lie one after the other in most of the pool, and begin again where it ends:
 * what comes back is far beyond the second-level cache. */
#include "tests/cuda/bench.h"

#include "plugins/cuda/attention.h"

#include <math.h>
#include <stdlib.h>

#define N_HEADS  32u
#define N_GROUPS 8u
#define HEAD_DIM 128u
#define WIDTH    ((uint64_t)N_HEADS * HEAD_DIM)

/* Sequences that are alike: so many of them, tokens before their rows, and rows. */
struct shape {
    uint32_t n_seqs, n_past, n_rows;
    uint32_t n_sinks, recent; /* of a view whose queries turn; recent 0: all is seen */
    uint32_t type;            /* of K and V */
    double wanted;            /* see struct bench_line */
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
    double freqs[HEAD_DIM / 2];
    struct gqa_rope_table rope;
    uint32_t n_votes;
    float *votes; /* on the host */
};

static void *array(size_t n, size_t size)
{
    void *p = calloc(n, size);
    bench_check(p == NULL ? -1 : 0, "host memory");
    return p;
}

static void set_layer(struct attention *a, uint32_t type)
{
    uint64_t head_bytes = gqa_kv_head_bytes(type, HEAD_DIM);

    for (uint32_t i = 0; i < HEAD_DIM / 2; i++) {
        a->freqs[i] = pow(10000, -2.0 * i / HEAD_DIM);
    }
    a->rope = (struct gqa_rope_table){.n_freqs = HEAD_DIM / 2, .freqs = a->freqs, .magnitude = 1};
    a->host_layer = (struct gqa_attn_layer){.struct_size = sizeof(a->host_layer),
                                            .n_heads = N_HEADS,
                                            .n_kv_heads = N_GROUPS,
                                            .k_dim = HEAD_DIM,
                                            .v_dim = HEAD_DIM,
                                            .k_type = type,
                                            .v_type = type,
                                            .scale = 0.088f,
                                            .v_offset = N_GROUPS * head_bytes,
                                            .k_head_bytes = head_bytes,
                                            .v_head_bytes = head_bytes,
                                            .rope = &a->rope,
                                            .rope_kind = GQA_ROPE_HALF};
    a->layer = cuda_layer_of(&a->host_layer, 0);
}

/* Sequence i's pages, the used-th of all and on. Gives how many are used then. */
static uint64_t set_pages(struct bench *b, struct attention *a, uint32_t i, uint64_t used)
{
    uint64_t page_bytes = 2 * a->host_layer.v_offset, room = b->pool_bytes / 4 * 3 - page_bytes;
    uint32_t n = cuda_seq_pages(&a->host_layer, &a->seqs[i]);

    a->pages[i] = array(n, sizeof(**a->pages));
    for (uint32_t k = 0; k < n; k++, used++) {
        a->pages[i][k] = b->pool + used * page_bytes % room / 256 * 256;
    }
    return used;
}

/* a stays where it is until it is finished. */
static void attention_init(struct bench *b, const struct shape *shape, struct attention *a)
{
    CUdeviceptr io = b->pool + b->pool_bytes / 4 * 3;
    uint64_t used = 0;

    *a = (struct attention){
        .io = {.q = cuda_pointer(io),
               .out = cuda_pointer(io + b->pool_bytes / 8),
               .q_stride = WIDTH,
               .out_stride = WIDTH},
        .table = {.n_sinks = shape->n_sinks, .recent = shape->recent, .turned = shape->recent > 0},
        .seqs = array(shape->n_seqs, sizeof(*a->seqs)),
        .pages = array(shape->n_seqs, sizeof(*a->pages))};
    set_layer(a, shape->type);
    for (uint32_t i = 0; i < shape->n_seqs; i++) {
        a->seqs[i] = (struct gqa_attn_seq){.first_row = i * shape->n_rows,
                                           .n_rows = shape->n_rows,
                                           .n_past = shape->n_past,
                                           .tables = &a->table};
        used = set_pages(b, a, i, used);
    }
    a->batch = (struct gqa_attn_batch){.struct_size = sizeof(a->batch),
                                       .n_rows = shape->n_seqs * shape->n_rows,
                                       .n_seqs = shape->n_seqs,
                                       .commit = 1,
                                       .seqs = a->seqs};
    bench_check(cuda_plan_make(b->c, &a->plan, &a->host_layer, &a->batch,
                               (const uint64_t *const *)a->pages),
                "a plan");
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

static void measure(struct bench *b, const struct shape *shape)
{
    struct attention a;
    char name[96], view[40] = "";
    uint32_t n_past = shape->n_past, n_rows = shape->n_rows;
    double tokens = (double)n_past * n_rows + 0.5 * n_rows * n_rows; /* seen, of all rows */
    double held = (double)n_past + n_rows;

    attention_init(b, shape, &a);
    if (shape->recent > 0) {
        held = (double)shape->n_sinks + shape->recent + n_rows - 1;
        tokens = ((double)shape->n_sinks + shape->recent) * n_rows;
        snprintf(view, sizeof(view), ", sees %u + %u", shape->n_sinks, shape->recent);
    }
    const struct bench_line l = {
        .seconds = bench_seconds(b, attend, &a),
        .bytes = shape->n_seqs * (2.0 * held * N_GROUPS * 2 * HEAD_DIM + 8.0 * n_rows * WIDTH),
        .flops = 4.0 * shape->n_seqs * tokens * WIDTH,
        .peak = b->half_flops_per_s,
        .wanted = shape->wanted};
    snprintf(name, sizeof(name), "attention 32/8 x 128 %s, %u x %u rows at %u%s",
             shape->type == GQA_TYPE_BF16 ? "bf16" : "f16", shape->n_seqs, n_rows, n_past + n_rows,
             view);
    bench_report(b, name, &l);
    attention_finish(b, &a);
}

static int vote(struct bench *b, void *arg, int i)
{
    struct attention *a = arg;
    return cuda_plan_observe(b->c, &a->plan, &a->host_layer, &a->layer, &a->batch, &a->io, 0,
                             a->batch.n_rows, a->n_votes, a->votes);
}

/* Votes come from the host and go back to it: that is part of what is measured. */
static void measure_votes(struct bench *b, uint32_t n_past, uint32_t n_rows)
{
    const struct shape shape = {1, n_past, n_rows, 0, 0, GQA_TYPE_F16, 0};
    struct attention a;
    char name[96];

    attention_init(b, &shape, &a);
    a.n_votes = n_past;
    a.votes = array((size_t)N_GROUPS * n_past, sizeof(*a.votes));
    const struct bench_line l = {.seconds = bench_seconds(b, vote, &a),
                                 .bytes = 2.0 * ((double)n_past + n_rows) * N_GROUPS * HEAD_DIM +
                                          4.0 * n_rows * WIDTH,
                                 .flops = 2.0 * n_past * n_rows * WIDTH,
                                 .peak = b->half_flops_per_s};
    snprintf(name, sizeof(name), "votes 32/8 x 128 f16, %u rows over %u", n_rows, n_past);
    bench_report(b, name, &l);
    attention_finish(b, &a);
}

static void measure_all(struct bench *b, const struct shape *shapes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct shape s = shapes[i];
        if (b->tiny) { /* the same kinds of work, over less */
            s.n_past = s.n_past / 256 + s.n_sinks + s.recent / 16;
            s.recent /= 16;
            s.n_rows = s.n_rows > 9 ? 9 : s.n_rows;
            s.n_seqs = s.n_seqs > 2 ? 2 : s.n_seqs;
        }
        measure(b, &s);
    }
}

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

void bench_attention_floors(struct bench *b)
{
    static const struct shape shapes[] = {
        {1, 65535, 1, 0, 0, GQA_TYPE_BF16, 0.8},
        {64, 8191, 1, 0, 0, GQA_TYPE_BF16, 0.8},
    };

    measure_all(b, shapes, COUNT(shapes));
}

void bench_attention(struct bench *b)
{
    static const struct shape shapes[] = {
        {1, 4095, 1, 0, 0, GQA_TYPE_F16, 0},      {1, 16383, 1, 0, 0, GQA_TYPE_F16, 0},
        {1, 131071, 1, 0, 0, GQA_TYPE_F16, 0},    {16, 8191, 1, 0, 0, GQA_TYPE_F16, 0},
        {64, 2047, 1, 0, 0, GQA_TYPE_F16, 0},     {1, 0, 2048, 0, 0, GQA_TYPE_F16, 0},
        {1, 14336, 2048, 0, 0, GQA_TYPE_F16, 0},  {16, 65535, 1, 64, 4032, GQA_TYPE_F16, 0},
        {64, 65535, 1, 4, 2044, GQA_TYPE_F16, 0}, {1, 30720, 512, 4, 4092, GQA_TYPE_F16, 0},
    };

    bench_attention_floors(b);
    measure_all(b, shapes, COUNT(shapes));
    measure_votes(b, b->tiny ? 100 : 8192, b->tiny ? 5 : 32);
    if (!b->tiny) {
        measure_votes(b, 65536, 32);
    }
}
