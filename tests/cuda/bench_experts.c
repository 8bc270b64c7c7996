/* tests/cuda/bench_experts.c - whole ops of mixtures of experts: routing, sorting, products and
 * their sum. Weights are zeros but for the router, whose values, like the rows, are random: other
 * experts are chosen in each run, so that what they read is not in the second-level cache already.
 */
#include "tests/cuda/bench.h"

#include "plugins/cuda/program.h"
#include "plugins/cuda/weights.h"

#include <math.h>
#include <stdlib.h>

#define SETS 16u /* of rows */

struct shape {
    const char *name;
    uint32_t n_experts, n_used, n_in, n_ff;
    enum cuda_weight_type type;
};

struct experts {
    struct cuda_program program;
    struct cuda_op op;
    struct cuda_register regs[2];
    struct cuda_mixture mixture;
    struct gqa_batch batch;
    struct cuda_buffer rows, router;
};

static struct cuda_matrix matrix(enum cuda_weight_type type, uint32_t n_in, uint32_t n_out,
                                 CUdeviceptr at)
{
    return (struct cuda_matrix){.type = type, .n_inputs = n_in, .n_outputs = n_out, .weight = at};
}

static uint64_t bytes_of(const struct cuda_matrix *m, uint32_t n)
{
    return (uint64_t)n * m->n_outputs / CUDA_STRIP * (m->n_inputs / CUDA_BLOCK) *
           cuda_block_bytes(m->type);
}

/* Random values, as bits of F16 between -1 and 1, or float32. */
static int fill(struct bench *b, struct cuda_buffer *to, uint64_t n, bool halves)
{
    float *values = malloc(n * sizeof(*values));
    uint16_t *packed = (uint16_t *)values;
    int r = values == NULL ? -1 : cuda_buffer_reserve(b->c, to, n * (halves ? 2 : 4));

    for (uint64_t i = 0; r == 0 && i < n; i++) {
        float x = bench_random();
        if (halves) {
            packed[i] = gqa_f32_to_f16(x); /* in front of the float that would be there */
        } else {
            values[i] = x;
        }
    }
    r = r < 0 ? r : cuda_upload(b->c, to->at, values, n * (halves ? 2 : 4));
    r = r < 0 ? r : cuda_synchronise(b->c);
    free(values);
    return r;
}

static int start(struct bench *b, struct experts *e, const struct shape *s, uint32_t n_rows)
{
    struct cuda_program *p = &e->program;
    struct cuda_mixture *m = &e->mixture;

    m->n_ff = s->n_ff;
    m->gated = true;
    m->up = matrix(s->type, s->n_in, 2 * s->n_ff, b->pool);
    m->down = matrix(s->type, s->n_ff, s->n_in, b->pool + bytes_of(&m->up, s->n_experts));
    m->router = matrix(CUDA_W_F16, s->n_in, 2 * s->n_experts, 0);
    e->op = (struct cuda_op){.op = {.kind = GQA_OP_EXPERTS,
                                    .src = {0, 0, s->n_in},
                                    .dst = {1, 0, s->n_in},
                                    .u.experts = {.n_experts = s->n_experts,
                                                  .n_used = s->n_used,
                                                  .renormalise = 1,
                                                  .weight_scale = 1.0f}},
                             .mixture = m};
    e->batch = (struct gqa_batch){.struct_size = sizeof(e->batch), .n_rows = n_rows};
    e->regs[0].width = e->regs[1].width = s->n_in;
    *p = (struct cuda_program){.context = b->c,
                               .max_rows = n_rows,
                               .n_ops = 1,
                               .n_regs = 2,
                               .ops = &e->op,
                               .regs = e->regs,
                               .step.batch = &e->batch};
    int r = fill(b, &e->rows, (uint64_t)SETS * n_rows * s->n_in, false);
    r = r < 0 ? r : fill(b, &e->router, 2ull * s->n_experts * s->n_in, true);
    m->router.weight = e->router.at;
    r = r < 0 ? r
              : cuda_buffer_reserve(b->c, &e->regs[1].rows,
                                    (uint64_t)n_rows * s->n_in * sizeof(float));
    return r < 0 ? r : cuda_mixture_room_init(p);
}

static void finish(struct bench *b, struct experts *e)
{
    cuda_mixture_room_finish(b->c, &e->program.mixture_room);
    cuda_inputs_finish(b->c, &e->program.inputs);
    cuda_buffer_finish(b->c, &e->regs[1].rows);
    cuda_buffer_finish(b->c, &e->rows);
    cuda_buffer_finish(b->c, &e->router);
}

static int run(struct bench *b, void *arg, int i)
{
    struct experts *e = arg;
    uint64_t row_bytes = e->regs[0].width * sizeof(float);

    e->regs[0].rows.at = e->rows.at + (uint64_t)i % SETS * e->batch.n_rows * row_bytes;
    return cuda_experts_run(&e->program, &e->op);
}

/* Bytes: the router, and as many experts as rows that choose at random reach on average. */
static void bench_mixture(struct bench *b, const struct shape *s, uint32_t n_rows)
{
    struct experts e = {0};
    char line[96];

    bench_check(start(b, &e, s, n_rows), s->name);
    double n = s->n_experts, share = (double)s->n_used / n;
    double n_read = n * (1.0 - pow(1.0 - share, n_rows));
    double bytes = (double)bytes_of(&e.mixture.router, 1) +
                   n_read * (double)(bytes_of(&e.mixture.up, 1) + bytes_of(&e.mixture.down, 1));
    double flops = 6.0 * n_rows * s->n_used * s->n_in * s->n_ff;
    bool halves = s->type == CUDA_W_F16 || s->type == CUDA_W_BF16;
    const struct bench_line l = {.seconds = bench_seconds(b, run, &e),
                                 .bytes = bytes,
                                 .flops = flops,
                                 .peak = halves ? b->half_flops_per_s : b->int8_flops_per_s};
    snprintf(line, sizeof(line), "%s, %u rows", s->name, n_rows);
    bench_report(b, line, &l);
    finish(b, &e);
}

void bench_experts(struct bench *b)
{
    static const struct shape shapes[] = {
        {"experts 8/128 2048x768 Q4_K", 128, 8, 2048, 768, CUDA_W_Q4_K},
        {"experts 8/64 2048x768 F16", 64, 8, 2048, 768, CUDA_W_F16},
        {"experts 4/32 2880x2880 MXFP4", 32, 4, 2880, 2880, CUDA_W_MXFP4},
        {"experts 2/8 4096x14336 Q4_0", 8, 2, 4096, 14336, CUDA_W_Q4_0},
    };
    static const struct shape tiny = {"experts 2/4 64x32 Q4_0", 4, 2, 64, 32, CUDA_W_Q4_0};
    static const uint32_t rows[] = {1, 4, 8, 64, 512};

    if (b->tiny) {
        bench_mixture(b, &tiny, 5);
        return;
    }
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        for (size_t k = 0; k < sizeof(rows) / sizeof(rows[0]); k++) {
            bench_mixture(b, &shapes[i], rows[k]);
        }
    }
}
