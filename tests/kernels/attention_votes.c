/* tests/kernels/attention_votes.c - SnapKV's votes on every level, against float64; and the same
 * bits however the rows that vote were cut into batches. */
#include "plugins/cpu/attention.h"
#include "tests/kernels/attention_problem.h"
#include "tests/kernels/attention_stored.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define N_TOKENS 700u
#define N_ROWS   20u /* that vote */
#define N_VOTES  (N_TOKENS - N_ROWS)
#define N_GROUPS 2u
#define DIM      48u

static struct attn_spec spec_of(uint32_t group_size, uint32_t type)
{
    return (struct attn_spec){.n_heads = N_GROUPS * group_size,
                              .n_kv_heads = N_GROUPS,
                              .k_dim = DIM,
                              .v_dim = 40,
                              .k_type = type,
                              .v_type = type,
                              .softcap = group_size == 3 ? 15.0f : 0.0f,
                              .sinks = group_size == 8,
                              .magnitude = 2.0f,
                              .n_seqs = 1,
                              .seqs = {{0, N_TOKENS}},
                              .seed = 3 + group_size};
}

/* Appends all tokens in chunks, the voting rows in chunks of their own. */
static float *run(struct attn_problem *p, enum cpu_isa isa, enum attn_host_kind kind,
                  uint32_t n_threads, uint32_t chunk)
{
    const struct attn_problem_seq *s = &p->seqs[0];
    const struct gqa_page_table table = {.n_pages = s->n_pages, .pages = s->pages};
    struct cpu_attention *a = NULL;
    struct gqa_host host;
    float *votes = calloc(N_GROUPS * N_VOTES, sizeof(*votes));

    attn_host_init(&host, kind, n_threads);
    cr_assert_eq(cpu_attention_create(&host, isa, &a), 0);
    attn_problem_forget(p);
    for (uint32_t first = 0, n; first < N_TOKENS; first += n) {
        uint32_t end = first < N_VOTES ? N_VOTES : N_TOKENS;
        n = first < N_VOTES ? end : end - first < chunk ? end - first : chunk;
        const struct gqa_attn_seq seq = {.n_rows = n, .n_past = first, .tables = &table};
        const struct gqa_attn_batch batch = {
            .struct_size = sizeof(batch), .n_rows = n, .n_seqs = 1, .commit = 1, .seqs = &seq};
        const struct gqa_attn_io io = {.q = s->q + (size_t)first * p->spec.n_heads * DIM,
                                       .k = s->k + (size_t)first * N_GROUPS * DIM,
                                       .v = s->v + (size_t)first * N_GROUPS * 40,
                                       .q_stride = (size_t)p->spec.n_heads * DIM,
                                       .k_stride = N_GROUPS * DIM,
                                       .v_stride = N_GROUPS * 40};
        cr_assert_eq(cpu_attention_append(a, &p->layer, &batch, &io), 0);
        if (first >= N_VOTES) {
            cr_assert_eq(cpu_attention_observe(a, &p->layer, &batch, &io, 0, n, N_VOTES, votes), 0);
            cr_assert_eq(cpu_attention_observe(a, &p->layer, &batch, &io, 0, n + 1, N_VOTES, votes),
                         -EINVAL);
            cr_assert_eq(cpu_attention_observe(a, &p->layer, &batch, &io, 1, n, N_VOTES, votes),
                         -EINVAL);
            cr_assert_eq(cpu_attention_observe(a, &p->layer, &batch, &io, 0, n, first + 1, votes),
                         -EINVAL);
        }
    }
    cpu_attention_destroy(a);
    return votes;
}

static void stored_k(const struct attn_problem *p, uint32_t t, uint32_t group, double *k)
{
    uint32_t type = p->spec.k_type;
    attn_as_stored(type, type == GQA_TYPE_Q4_0, p->seqs[0].k + ((size_t)t * N_GROUPS + group) * DIM,
                   DIM, k);
    if (type == GQA_TYPE_Q4_0) {
        attn_rotate(k, DIM);
    }
}

/* The paper's sum, by the book. */
static void truth(const struct attn_problem *p, double *votes)
{
    uint32_t r = p->spec.n_heads / N_GROUPS;
    const struct gqa_attn_layer *l = &p->layer;

    memset(votes, 0, N_GROUPS * N_VOTES * sizeof(*votes));
    for (uint32_t row = N_VOTES; row < N_TOKENS; row++) {
        for (uint32_t head = 0; head < p->spec.n_heads; head++) {
            const float *q = p->seqs[0].q + ((size_t)row * p->spec.n_heads + head) * DIM;
            double weights[N_TOKENS], sum = l->sinks != NULL ? exp(l->sinks[head]) : 0;
            for (uint32_t t = 0; t <= row; t++) {
                double k[DIM], score = 0;
                stored_k(p, t, head / r, k);
                for (uint32_t d = 0; d < DIM; d++) {
                    score += q[d] * k[d] * l->scale;
                }
                score = l->softcap > 0 ? l->softcap * tanh(score / l->softcap) : score;
                sum += weights[t] = exp(score);
            }
            for (uint32_t t = 0; t < N_VOTES; t++) {
                votes[head / r * N_VOTES + t] += weights[t] / sum;
            }
        }
    }
}

#define FOR_EACH_LEVEL(isa)                                        \
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) \
        if (cpu_isa_usable(isa))

static const uint32_t types[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0,
                                 GQA_TYPE_Q4_0};
static const uint32_t groups[] = {1, 3, 8, 2, 4};

Test(votes, are_the_weights_that_attention_gives)
{
    for (size_t i = 0; i < 5; i++) {
        const struct attn_spec spec = spec_of(groups[i], types[i]);
        double *right = calloc(N_GROUPS * N_VOTES, sizeof(*right));
        struct attn_problem p;

        attn_problem_init(&p, &spec);
        truth(&p, right);
        FOR_EACH_LEVEL(isa)
        {
            float *votes = run(&p, isa, ATTN_HOST_BACKWARDS, 3, N_ROWS);
            for (uint32_t t = 0; t < N_GROUPS * N_VOTES; t++) {
                cr_assert(fabs(votes[t] - right[t]) <= 1e-6 + 1e-4 * right[t],
                          "%s, group %u, token %u: %.9g is %.9g", cpu_isa_name(isa), t / N_VOTES,
                          t % N_VOTES, right[t], (double)votes[t]);
            }
            free(votes);
        }
        free(right);
        attn_problem_finish(&p);
    }
}

Test(votes, depend_on_neither_chunks_nor_threads)
{
    for (size_t i = 0; i < 5; i++) {
        const struct attn_spec spec = spec_of(groups[i], types[i]);
        struct attn_problem p;

        attn_problem_init(&p, &spec);
        FOR_EACH_LEVEL(isa)
        {
            float *whole = run(&p, isa, ATTN_HOST_THREADS, 4, N_ROWS);
            float *ones = run(&p, isa, ATTN_HOST_BACKWARDS, 1, 1);
            float *some = run(&p, isa, ATTN_HOST_BACKWARDS, 2, 7);
            cr_assert_eq(memcmp(whole, ones, N_GROUPS * N_VOTES * sizeof(float)), 0);
            cr_assert_eq(memcmp(whole, some, N_GROUPS * N_VOTES * sizeof(float)), 0);
            free(whole);
            free(ones);
            free(some);
        }
        attn_problem_finish(&p);
    }
}
