/* tests/kernels/attention_shared.c - sequences that begin with the same pages: attended together
 * or one by one, the same bits; whatever the hint says. */
#include "plugins/cpu/attention_plan.h"
#include "tests/kernels/attention_cpu.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_SEQS   5u
#define N_COMMON 2u /* segments */
#define N_BLOCKS (N_COMMON * CPU_ATTN_SEGMENT_BLOCKS)

/* A problem whose KV is all there, and a batch of its sequences' new rows that is yet to be
 * attended. Sequences 1.. have the first pages of sequence 0, N_BLOCKS and one more. */
struct company {
    struct attn_problem problem;
    void *pages[N_SEQS][32];
    struct gqa_page_table tables[N_SEQS];
    struct gqa_attn_seq seqs[N_SEQS];
    struct gqa_attn_batch batch;
    struct gqa_attn_io io;
    float *q, *out;
    size_t n_out;
};

/* Of the second sequence: three guesses, of which the last does not see the second. */
static const uint64_t tree[] = {1, 3, 5};

static void company_init(struct company *c, uint32_t group_size, uint32_t type, uint32_t window)
{
    static const uint32_t shapes[N_SEQS][2] = {{600, 1}, {700, 3}, {576, 1}, {1030, 1}, {610, 2}};
    struct attn_spec spec = {.n_heads = 2 * group_size,
                             .n_kv_heads = 2,
                             .k_dim = 40,
                             .v_dim = 48,
                             .k_type = type,
                             .v_type = type,
                             .window = window,
                             .softcap = group_size == 3 ? 20.0f : 0.0f,
                             .sinks = group_size == 8,
                             .magnitude = 2.0f,
                             .n_seqs = N_SEQS,
                             .seed = 40 + group_size};
    struct attn_problem *p = &c->problem;
    struct cpu_attention *a = NULL;
    struct gqa_host host;

    memset(c, 0, sizeof(*c));
    for (uint32_t i = 0; i < N_SEQS; i++) {
        spec.seqs[i].n_past = shapes[i][0];
        spec.seqs[i].n_rows = shapes[i][1];
    }
    attn_problem_init(p, &spec);
    size_t q_row = (size_t)spec.n_heads * spec.k_dim, out_row = (size_t)spec.n_heads * spec.v_dim;
    c->n_out = p->n_rows * out_row;
    c->q = calloc(p->n_rows, q_row * sizeof(float));
    c->out = calloc(c->n_out, sizeof(float));
    attn_host_init(&host, ATTN_HOST_BACKWARDS, 2);
    cr_assert_eq(cpu_attention_create(&host, cpu_isa_best(), &a), 0);
    cr_assert_eq(attn_cpu_run(p, a, 9, c->out), 0);
    cpu_attention_destroy(a);
    for (uint32_t i = 0, row = 0; i < N_SEQS; row += shapes[i++][1]) {
        const struct attn_problem_seq *s = &p->seqs[i];
        for (uint32_t b = 0; b < s->n_pages; b++) {
            c->pages[i][b] = b <= N_BLOCKS && p->seqs[0].pages[b] != NULL && s->pages[b] != NULL
                                 ? p->seqs[0].pages[b]
                                 : s->pages[b];
        }
        c->tables[i] = (struct gqa_page_table){.n_pages = s->n_pages, .pages = c->pages[i]};
        c->seqs[i] = (struct gqa_attn_seq){.first_row = row,
                                           .n_rows = shapes[i][1],
                                           .n_past = shapes[i][0],
                                           .tables = &c->tables[i],
                                           .new_mask = i == 1 ? tree : NULL};
        memcpy(c->q + row * q_row, s->q + shapes[i][0] * q_row,
               shapes[i][1] * q_row * sizeof(float));
    }
    c->batch = (struct gqa_attn_batch){.struct_size = sizeof(c->batch),
                                       .n_rows = p->n_rows,
                                       .n_seqs = N_SEQS,
                                       .commit = 1,
                                       .seqs = c->seqs};
    c->io =
        (struct gqa_attn_io){.q = c->q, .out = c->out, .q_stride = q_row, .out_stride = out_row};
}

static void company_finish(struct company *c)
{
    attn_problem_finish(&c->problem);
    free(c->q);
    free(c->out);
}

static void run(struct company *c, enum cpu_isa isa, enum attn_host_kind kind, uint32_t n_threads,
                const struct gqa_attn_shared *shared, uint32_t n_shared)
{
    struct cpu_attention *a = NULL;
    struct gqa_host host;

    c->batch.shared = shared;
    c->batch.n_shared = n_shared;
    memset(c->out, 0xff, c->n_out * sizeof(float));
    attn_host_init(&host, kind, n_threads);
    cr_assert_eq(cpu_attention_create(&host, isa, &a), 0);
    cr_assert_eq(cpu_attention_attend(a, &c->problem.layer, &c->batch, &c->io), 0);
    cpu_attention_destroy(a);
}

/* True ones, and some that nobody should send. */
static const struct {
    uint32_t n;
    struct gqa_attn_shared shared[3];
} hints[] = {
    {1, {{512, 0, 4}}},
    {1, {{576, 0, 4}}},
    {1, {{256, 1, 3}}},
    {2, {{512, 0, 1}, {512, 2, 4}}},
    {3, {{256, 0, 4}, {512, 0, 1}, {512, 2, 3}}}, /* nested */
    {2, {{512, 3, 4}, {256, 0, 2}}},              /* out of order */
    {1, {{63, 0, 4}}},                            /* less than a segment */
    {1, {{1024, 0, 4}}},                          /* more than they share */
    {1, {{512, 0, UINT32_MAX}}},
    {1, {{512, 7, 9}}},
    {1, {{512, 3, 1}}},
    {1, {{UINT32_MAX, 2, 2}}},
    {1, {{0, 0, 4}}},
};

Test(attention_shared, no_hint_changes_a_bit)
{
    static const uint32_t groups[] = {1, 3, 8, 32};
    static const uint32_t types[] = {GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0, GQA_TYPE_Q4_0};

    for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        for (uint32_t g = 0; cpu_isa_usable((enum cpu_isa)isa) && g < 5;
             g += isa == CPU_ISA_C ? 4 : 1) { /* the reference is slow */
            struct company c;

            company_init(&c, groups[g % 4], types[g % 4], g == 4 ? 300 : 0);
            size_t bytes = c.n_out * sizeof(float);
            float *alone = malloc(bytes);
            run(&c, (enum cpu_isa)isa, ATTN_HOST_BACKWARDS, 1, NULL, 0);
            memcpy(alone, c.out, bytes);
            for (size_t h = 0; h < sizeof(hints) / sizeof(*hints); h++) {
                for (uint32_t n_threads = 1; n_threads <= 3; n_threads += 2) {
                    run(&c, (enum cpu_isa)isa,
                        n_threads == 3 ? ATTN_HOST_THREADS : ATTN_HOST_BACKWARDS, n_threads,
                        hints[h].shared, hints[h].n);
                    cr_assert(memcmp(alone, c.out, bytes) == 0,
                              "%s, %u queries a group, hint %zu, %u threads",
                              cpu_isa_name((enum cpu_isa)isa), groups[g % 4], h, n_threads);
                }
            }
            free(alone);
            company_finish(&c);
        }
    }
}

/* n_groups: of the shared pieces, which have each group once for all rows. */
static void expect_shared(const struct company *c, const struct gqa_attn_shared *shared,
                          uint32_t n_groups, const uint32_t *n_segments)
{
    struct gqa_attn_batch batch = c->batch;
    struct cpu_attn_plan plan;
    struct gqa_host host;
    uint32_t n = 0;

    batch.n_shared = 1;
    batch.shared = shared;
    attn_host_init(&host, ATTN_HOST_BACKWARDS, 1);
    cpu_attn_plan_init(&plan, &host);
    cr_assert_eq(cpu_attn_plan_make(&plan, &c->problem.layer, &batch), 0);
    for (uint32_t i = 0; i < plan.n_shared_pieces; i++) {
        n += plan.pieces[i].n_groups;
    }
    cr_expect_eq(n, n_groups, "%u groups", n);
    for (uint32_t s = 0; s < N_SEQS; s++) {
        cr_expect_eq(plan.n_shared[s], n_segments[s], "sequence %u: %u", s, plan.n_shared[s]);
    }
    cpu_attn_plan_finish(&plan);
}

Test(attention_shared, what_is_common_is_read_once)
{
    struct company c;

    company_init(&c, 8, GQA_TYPE_F16, 0);
    expect_shared(&c, &(struct gqa_attn_shared){576, 0, 4}, 2, (uint32_t[]){2, 2, 2, 2, 2});
    expect_shared(&c, &(struct gqa_attn_shared){511, 1, 3}, 2, (uint32_t[]){0, 1, 1, 1, 0});
    expect_shared(&c, &(struct gqa_attn_shared){255, 0, 4}, 0, (uint32_t[]){0, 0, 0, 0, 0});
    company_finish(&c);
}

/* A page that differs ends what is taken as common, whatever the hint says. */
Test(attention_shared, pages_are_compared)
{
    struct company c;

    company_init(&c, 8, GQA_TYPE_F16, 0);
    c.pages[3][1] = c.problem.seqs[3].pages[1];
    expect_shared(&c, &(struct gqa_attn_shared){512, 0, 4}, 2, (uint32_t[]){2, 2, 2, 0, 0});
    c.pages[3][1] = c.pages[0][1];
    c.pages[4][N_BLOCKS - 1] = c.problem.seqs[4].pages[N_BLOCKS - 1];
    expect_shared(&c, &(struct gqa_attn_shared){512, 0, 4}, 2, (uint32_t[]){1, 1, 1, 1, 1});
    company_finish(&c);
}
