/* tests/kernels/attention_views.c - views of a cache: sinks and recent slots, slots that are gone,
 * queries turned back to meet the sinks. Against float64, where keys are rotated anew instead. */
#include "plugins/cpu/attention.h"
#include "tests/kernels/attention_problem.h"
#include "tests/kernels/attention_stored.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define N_TOKENS 1160u
#define N_HEADS  6u
#define N_GROUPS 2u
#define DIM      64u
#define N_FREQS  24u /* fewer than the head has pairs */

static double freqs[N_FREQS];
static const struct gqa_rope_table rope = {.n_freqs = N_FREQS, .freqs = freqs, .magnitude = 1.0f};

/* One sequence, all of whose tokens are appended, and a view of it. */
struct sight {
    struct attn_problem p;
    struct gqa_page_table table;
    uint32_t first_row; /* the rows that are attended: [first_row, N_TOKENS) */
    void *pages[(N_TOKENS + 63) / 64];
};

static void sight_init(struct sight *s, uint32_t type, enum gqa_rope_kind kind, uint32_t n_sinks,
                       uint32_t recent, int turned)
{
    const struct attn_spec spec = {.n_heads = N_HEADS,
                                   .n_kv_heads = N_GROUPS,
                                   .k_dim = DIM,
                                   .v_dim = DIM,
                                   .k_type = type,
                                   .v_type = type,
                                   .softcap = n_sinks == 4 ? 20.0f : 0.0f,
                                   .sinks = n_sinks == 300,
                                   .magnitude = 2.0f,
                                   .n_seqs = 1,
                                   .seqs = {{0, N_TOKENS}},
                                   .seed = 11 + n_sinks};
    memset(s, 0, sizeof(*s));
    attn_problem_init(&s->p, &spec);
    for (uint32_t i = 0; i < N_FREQS; i++) {
        freqs[i] = pow(10000.0, -2.0 * i / (2 * N_FREQS));
    }
    s->p.layer.rope = &rope;
    s->p.layer.rope_kind = kind;
    memcpy(s->pages, s->p.seqs[0].pages, sizeof(s->pages));
    s->table = (struct gqa_page_table){.n_pages = (N_TOKENS + 63) / 64,
                                       .pages = s->pages,
                                       .n_sinks = n_sinks,
                                       .recent = recent,
                                       .turned = (uint32_t)turned};
}

/* Appends rows [first, end) of the sequence, and where out is not NULL, attends them. */
static void step(struct sight *s, struct cpu_attention *a, const struct gqa_page_table *table,
                 uint32_t first, uint32_t end, float *out)
{
    const struct attn_problem_seq *seq = &s->p.seqs[0];
    const struct gqa_attn_seq rows = {.n_rows = end - first, .n_past = first, .tables = table};
    const struct gqa_attn_batch batch = {.struct_size = sizeof(batch),
                                         .n_rows = end - first,
                                         .n_seqs = 1,
                                         .commit = 1,
                                         .seqs = &rows};
    const struct gqa_attn_io io = {.q = seq->q + (size_t)first * N_HEADS * DIM,
                                   .k = seq->k + (size_t)first * N_GROUPS * DIM,
                                   .v = seq->v + (size_t)first * N_GROUPS * DIM,
                                   .out = out,
                                   .q_stride = N_HEADS * DIM,
                                   .k_stride = N_GROUPS * DIM,
                                   .v_stride = N_GROUPS * DIM,
                                   .out_stride = N_HEADS * DIM};
    cr_assert_eq(cpu_attention_append(a, &s->p.layer, &batch, &io), 0);
    if (out != NULL) {
        cr_assert_eq(cpu_attention_attend(a, &s->p.layer, &batch, &io), 0);
    }
}

static struct cpu_attention *open_level(struct gqa_host *host, enum cpu_isa isa,
                                        enum attn_host_kind kind, uint32_t n_threads)
{
    struct cpu_attention *a = NULL;

    attn_host_init(host, kind, n_threads);
    cr_assert_eq(cpu_attention_create(host, isa, &a), 0);
    return a;
}

/* What the view gives for rows [from, N_TOKENS), in chunks. */
static float *run(struct sight *s, enum cpu_isa isa, enum attn_host_kind kind, uint32_t n_threads,
                  uint32_t from, uint32_t chunk)
{
    struct gqa_host host;
    struct cpu_attention *a = open_level(&host, isa, kind, n_threads);
    float *out = calloc((size_t)N_TOKENS * N_HEADS * DIM, sizeof(*out));

    attn_problem_forget(&s->p);
    memcpy(s->pages, s->p.seqs[0].pages, sizeof(s->pages));
    for (uint32_t first = 0, end; first < N_TOKENS; first = end) {
        end = first < from && first + chunk > from ? from : first + chunk;
        end = end < N_TOKENS ? end : N_TOKENS;
        step(s, a, &s->table, first, end,
             first < from ? NULL : out + (size_t)first * N_HEADS * DIM);
    }
    cpu_attention_destroy(a);
    return out;
}

/* ---- the truth --------------------------------------------------------------------------- */

/* Rotates a key on by so many positions. */
static void rotate_on(double *k, enum gqa_rope_kind kind, double positions)
{
    for (uint32_t i = 0; i < N_FREQS; i++) {
        uint32_t x = kind == GQA_ROPE_NEIGHBOUR ? 2 * i : i;
        uint32_t y = kind == GQA_ROPE_NEIGHBOUR ? 2 * i + 1 : i + N_FREQS;
        double c = cos(positions * freqs[i]), d = sin(positions * freqs[i]), a = k[x], b = k[y];
        k[x] = a * c - b * d;
        k[y] = a * d + b * c;
    }
}

static void stored(uint32_t type, const float *x, double *ret)
{
    attn_as_stored(type, type == GQA_TYPE_Q4_0, x, DIM, ret);
    if (type == GQA_TYPE_Q4_0) {
        attn_rotate(ret, DIM); /* back */
    }
}

static void truth_of(const struct sight *s, uint32_t p, uint32_t head, double *out)
{
    const struct gqa_attn_layer *l = &s->p.layer;
    const struct attn_problem_seq *seq = &s->p.seqs[0];
    uint32_t group = head / (N_HEADS / N_GROUPS), full = s->table.n_sinks + s->table.recent;
    double scores[N_TOKENS], max = -INFINITY, sum = 0;

    for (uint32_t t = 0; t <= p; t++) {
        const float *q = seq->q + ((size_t)p * N_HEADS + head) * DIM;
        double k[DIM];

        scores[t] = -INFINITY;
        if (t >= s->table.n_sinks && t + s->table.recent <= p) {
            continue;
        }
        stored(l->k_type, seq->k + ((size_t)t * N_GROUPS + group) * DIM, k);
        if (s->table.turned && t < s->table.n_sinks && p >= full) {
            rotate_on(k, (enum gqa_rope_kind)l->rope_kind, p - (full - 1));
        }
        scores[t] = 0;
        for (uint32_t d = 0; d < DIM; d++) {
            scores[t] += (double)q[d] * k[d] * l->scale;
        }
        scores[t] = l->softcap > 0 ? l->softcap * tanh(scores[t] / l->softcap) : scores[t];
        max = fmax(max, scores[t]);
    }
    memset(out, 0, DIM * sizeof(*out));
    for (uint32_t t = 0; t <= p; t++) {
        double v[DIM], weight = exp(scores[t] - max);

        sum += weight;
        stored(l->v_type, seq->v + ((size_t)t * N_GROUPS + group) * DIM, v);
        for (uint32_t d = 0; d < DIM; d++) {
            out[d] += weight * v[d];
        }
    }
    sum += l->sinks != NULL ? exp(l->sinks[head] - max) : 0;
    for (uint32_t d = 0; d < DIM; d++) {
        out[d] /= sum;
    }
}

/* Some rows of many: the first, those about where the view is full, the last. */
static void expect_truth(const struct sight *s, const float *out, uint32_t from)
{
    uint32_t full = s->table.n_sinks + s->table.recent;
    const uint32_t rows[] = {0, full - 1, full, full + 1, full + 100, N_TOKENS - 1};

    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        bool there = rows[i] >= from && rows[i] < N_TOKENS;
        for (uint32_t head = 0; there && head < N_HEADS; head++) {
            const float *got = out + ((size_t)rows[i] * N_HEADS + head) * DIM;
            double truth[DIM];

            truth_of(s, rows[i], head, truth);
            for (uint32_t d = 0; d < DIM; d++) {
                /* Scores are sums of 64 products of size 2: off by 1e-5 at most, and so weights. */
                cr_assert(fabs(truth[d] - got[d]) < 1e-4, "row %u, head %u, dim %u: %.9g is %.9g",
                          rows[i], head, d, truth[d], got[d]);
            }
        }
    }
}

/* ---- tests ------------------------------------------------------------------------------- */

#define FOR_EACH_LEVEL(isa)                                        \
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) \
        if (cpu_isa_usable(isa))

/* The plain level is slow: its rows from just before the view is full. */
static uint32_t from_of(const struct sight *s, enum cpu_isa isa)
{
    uint32_t full = s->table.n_sinks + s->table.recent;
    uint32_t from = isa == CPU_ISA_C ? full - 1 : 0;
    return from < N_TOKENS ? from : N_TOKENS - 1;
}

static const uint32_t types[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_Q8_0, GQA_TYPE_Q4_0};
static const uint32_t shapes[][2] = {{0, 100}, {4, 256},   {64, 512},
                                     {300, 1}, {300, 700}, {7, 3000}};

Test(views, are_the_truth_on_every_level)
{
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        FOR_EACH_LEVEL(isa)
        {
            struct sight s;

            sight_init(&s, types[i % 4], GQA_ROPE_HALF, shapes[i][0], shapes[i][1], 0);
            uint32_t from = from_of(&s, isa);
            float *out = run(&s, isa, ATTN_HOST_BACKWARDS, 3, from, 512);
            expect_truth(&s, out, from);
            free(out);
            attn_problem_finish(&s.p);
        }
    }
}

Test(views, turned_queries_equal_rotated_keys)
{
    for (size_t i = 0; i < 2 * sizeof(types) / sizeof(types[0]); i++) {
        FOR_EACH_LEVEL(isa)
        {
            struct sight s;

            sight_init(&s, types[i / 2], i % 2 ? GQA_ROPE_HALF : GQA_ROPE_NEIGHBOUR,
                       i < 4 ? 5 : 300, 256, 1);
            uint32_t from = from_of(&s, isa);
            float *out = run(&s, isa, ATTN_HOST_BACKWARDS, 2, from, 300);
            expect_truth(&s, out, from);
            free(out);
            attn_problem_finish(&s.p);
        }
    }
}

Test(views, bits_depend_on_neither_chunks_nor_threads)
{
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        FOR_EACH_LEVEL(isa)
        {
            uint32_t from = isa == CPU_ISA_C ? 1000 : 0;
            struct sight s;

            sight_init(&s, types[i % 4], GQA_ROPE_HALF, shapes[i][0], shapes[i][1], 1);
            float *whole = run(&s, isa, ATTN_HOST_THREADS, 4, from, N_TOKENS);
            float *chunks = run(&s, isa, ATTN_HOST_BACKWARDS, 1, from, 37);
            cr_assert_eq(memcmp(whole, chunks, sizeof(float) * N_TOKENS * N_HEADS * DIM), 0);
            free(whole);
            free(chunks);
            attn_problem_finish(&s.p);
        }
    }
}

/* Until something is left out, a view gives the bits of no view. */
Test(views, that_leave_nothing_out_change_no_bit)
{
    struct sight s;

    sight_init(&s, GQA_TYPE_F16, GQA_ROPE_HALF, 70, 400, 1);
    float *view = run(&s, cpu_isa_best(), ATTN_HOST_BACKWARDS, 2, 0, 512);
    s.table.n_sinks = s.table.recent = s.table.turned = 0;
    float *full = run(&s, cpu_isa_best(), ATTN_HOST_BACKWARDS, 2, 0, 512);
    size_t n = (size_t)470 * N_HEADS * DIM;
    cr_assert_eq(memcmp(view, full, n * sizeof(float)), 0);
    cr_assert_neq(memcmp(view + n, full + n, N_HEADS * DIM * sizeof(float)), 0);
    free(view);
    free(full);
    attn_problem_finish(&s.p);
}

/* Whole segments that nobody sees may leave the table, and pages that nobody sees may be NULL: not
 * a bit of what follows changes. New rows are appended where the view has them. */
Test(views, lose_segments_without_a_trace)
{
    FOR_EACH_LEVEL(isa)
    {
        const uint32_t first = 1070, gone = 512; /* slots [256, 768) */
        size_t n = (size_t)(N_TOKENS - first) * N_HEADS * DIM;
        struct gqa_host host;
        struct sight s;

        sight_init(&s, GQA_TYPE_F16, GQA_ROPE_NEIGHBOUR, 200, 300, 1);
        float *full = run(&s, isa, ATTN_HOST_BACKWARDS, 2, first, N_TOKENS);
        float *kept = run(&s, isa, ATTN_HOST_BACKWARDS, 2, N_TOKENS, first);
        struct cpu_attention *a = open_level(&host, isa, ATTN_HOST_BACKWARDS, 2);
        void *pages[(N_TOKENS + 63) / 64] = {NULL};
        struct gqa_page_table table = s.table;

        memcpy(pages, s.pages, 4 * sizeof(void *));
        for (uint32_t i = (first - 299) / 64; i < s.table.n_pages; i++) {
            pages[i - gone / 64] = s.pages[i];
        }
        table.pages = pages;
        table.n_pages -= gone / 64;
        table.n_dropped = gone;
        step(&s, a, &table, first, N_TOKENS, kept);
        cr_assert_eq(memcmp(full + (size_t)first * N_HEADS * DIM, kept, n * sizeof(float)), 0);
        cpu_attention_destroy(a);
        free(full);
        free(kept);
        attn_problem_finish(&s.p);
    }
}
