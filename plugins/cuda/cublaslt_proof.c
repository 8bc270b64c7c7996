#include "plugins/cuda/cublaslt_proof.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROWS CUDA_LT_PROOF_ROWS

struct proof {
    struct cuda_context *c;
    const struct cuda_lt_room *room;
    const struct cuda_inputs *inputs;
    struct cuda_lt_shape *shape;
    struct cuda_matrix matrix;    /* without bias */
    size_t n_results;             /* of all rows */
    struct cuda_buffer rows, dst; /* (ROWS, n_inputs), (ROWS, n_outputs) */
    float *together, *other;      /* results on the host */
};

static void proof_finish(struct proof *p)
{
    cuda_buffer_finish(p->c, &p->rows);
    cuda_buffer_finish(p->c, &p->dst);
    free(p->together);
    free(p->other);
}

/* Random rows on the device, and room for results. To be finished in both cases. */
static int proof_init(struct proof *p)
{
    size_t n = (size_t)ROWS * p->matrix.n_inputs;
    uint32_t random = 12345;
    float *rows = malloc(n * sizeof(*rows));

    p->together = malloc(p->n_results * sizeof(float));
    p->other = malloc(p->n_results * sizeof(float));
    int r = rows == NULL || p->together == NULL || p->other == NULL ? -ENOMEM : 0;
    for (size_t i = 0; r == 0 && i < n; i++) {
        random = random * 1664525u + 1013904223u;
        rows[i] = (float)(random >> 8) / 8388608.0f - 1.0f;
    }
    r = r < 0 ? r : cuda_buffer_reserve(p->c, &p->rows, n * sizeof(*rows));
    r = r < 0 ? r : cuda_buffer_reserve(p->c, &p->dst, p->n_results * sizeof(float));
    r = r < 0 ? r : cuda_upload(p->c, p->rows.at, rows, n * sizeof(*rows));
    r = r < 0 ? r : cuda_synchronise(p->c);
    free(rows);
    return r;
}

static float *row_at(CUdeviceptr rows, uint32_t row, uint32_t width)
{
    return (float *)cuda_pointer(rows) + (size_t)row * width;
}

/* Rows [first, end) by the library. */
static int run_library(struct proof *p, uint32_t first, uint32_t end)
{
    const struct cuda_matrix *m = &p->matrix;
    const struct cuda_lt_rows rows = {row_at(p->rows.at, first, m->n_inputs), m->n_inputs,
                                      end - first};

    int r = cuda_lt_round(p->c, p->room, cuda_input_kind_of(m->type), m->n_inputs, &rows);
    return r < 0 ? r
                 : cuda_lt_multiply(p->c, p->room, p->shape, m, rows.n_rows,
                                    row_at(p->dst.at, first, m->n_outputs), m->n_outputs);
}

/* All rows by product.cuh, as many at a time as any program's inputs have room for. */
static int run_own(struct proof *p)
{
    const struct cuda_matrix *m = &p->matrix;
    int r = 0;

    for (uint32_t first = 0; r == 0 && first < ROWS; first += CUDA_TILE) {
        struct cuda_quantise_args input = {.src = row_at(p->rows.at, first, m->n_inputs),
                                           .stride = m->n_inputs,
                                           .n_rows = CUDA_TILE,
                                           .k = m->n_inputs};
        r = cuda_inputs_lay_out(p->c, p->inputs, cuda_input_kind_of(m->type), &input);
        r = r < 0 ? r
                  : cuda_multiply(p->c, p->inputs, m, row_at(p->dst.at, first, m->n_outputs),
                                  m->n_outputs, CUDA_TILE);
    }
    return r;
}

static int take(struct proof *p, float *to)
{
    int r = cuda_download(p->c, to, p->dst.at, p->n_results * sizeof(*to));
    return r < 0 ? r : cuda_synchronise(p->c);
}

/* Both ways about the same: product.cuh's in `other`. */
static int compare(const struct proof *p, struct gqa_reason *why)
{
    float tolerance =
        p->matrix.type == CUDA_W_BF16 ? CUDA_LT_TOLERANCE_BF16 : CUDA_LT_TOLERANCE_F16;
    double squares = 0, worst = 0;

    for (size_t i = 0; i < p->n_results; i++) {
        double d = fabs((double)p->together[i] - (double)p->other[i]);
        worst = d > worst || isnan(d) ? d : worst;
        squares += (double)p->other[i] * (double)p->other[i];
    }
    double off = worst / (sqrt(squares / (double)p->n_results) + 1e-30);
    snprintf(why->text, sizeof(why->text), "it is off by %.3g of the values, %.3g at most", off,
             (double)tolerance);
    return !(off <= (double)tolerance);
}

static int prove(struct proof *p, struct gqa_reason *why)
{
    static const uint32_t cuts[] = {0, ROWS / 5, ROWS / 5 + 1, ROWS / 2, ROWS};

    int r = run_library(p, 0, ROWS);
    r = r != 0 ? r : take(p, p->together);
    for (size_t i = 0; r == 0 && i + 1 < sizeof(cuts) / sizeof(cuts[0]); i++) {
        r = run_library(p, cuts[i], cuts[i + 1]);
    }
    r = r != 0 ? r : take(p, p->other);
    if (r == 0 && memcmp(p->together, p->other, p->n_results * sizeof(float)) != 0) {
        snprintf(why->text, sizeof(why->text), "a row's bits depend on how many there are");
        return 1;
    }
    r = r != 0 ? r : run_own(p);
    r = r != 0 ? r : take(p, p->other);
    return r != 0 ? r : compare(p, why);
}

int cuda_lt_prove(struct cuda_context *c, const struct cuda_lt_room *room,
                  const struct cuda_inputs *inputs, struct cuda_lt_shape *shape,
                  const struct cuda_matrix *m, struct gqa_reason *why)
{
    struct proof p = {.c = c,
                      .room = room,
                      .inputs = inputs,
                      .shape = shape,
                      .matrix = *m,
                      .n_results = (size_t)ROWS * m->n_outputs};

    p.matrix.bias = 0;
    int r = proof_init(&p);
    r = r < 0 ? r : prove(&p, why);
    proof_finish(&p);
    return r;
}
