/* tests/kernels/attention.c - every level of the cpu's attention against the reference, and the
 * reference against float64. */
#include "plugins/cpu/attention_kernels.h"
#include "tests/kernels/attention_cpu.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEED 20260731u

static void run_level(struct attn_problem *p, enum cpu_isa isa, float *out)
{
    struct gqa_host host;
    struct cpu_attention *a = NULL;

    attn_host_init(&host, ATTN_HOST_BACKWARDS, 3);
    cr_assert_eq(cpu_attention_create(&host, isa, &a), 0);
    attn_problem_forget(p);
    cr_assert_eq(attn_cpu_run(p, a, UINT32_MAX, out), 0);
    cpu_attention_destroy(a);
}

/* |a - b| <= times * bound + 1e-6 |b| everywhere; the bound is the truth's, see truth_of_query().
 */
static void expect_close(const struct attn_spec *s, const char *what, const float *a,
                         const double *b, const double *bound, double times, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        cr_assert(fabs(a[i] - b[i]) <= times * bound[i] + 1e-6 * fabs(b[i]),
                  "%s: value %zu is %.9g, expected %.9g +- %.3g (seed %" PRIu64
                  ", heads %u/%u, dims %u/%u, types %u/%u, window %u, softcap %g, sinks %d)",
                  what, i, (double)a[i], b[i], times * bound[i], s->seed, s->n_heads, s->n_kv_heads,
                  s->k_dim, s->v_dim, s->k_type, s->v_type, s->window, (double)s->softcap,
                  s->sinks);
    }
}

/* The reference against the truth, then every usable level against both. */
static void check_spec(const struct attn_spec *spec)
{
    struct attn_problem p;

    attn_problem_init(&p, spec);
    size_t n = (size_t)p.n_rows * spec->n_heads * spec->v_dim;
    double *truth = calloc(n, sizeof(*truth)), *bound = calloc(n, sizeof(*bound));
    double *reference = calloc(n, sizeof(*reference));
    float *out = calloc(n, sizeof(*out));
    cr_assert(truth && bound && reference && out);

    attn_problem_truth(&p, truth, bound);
    for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_usable((enum cpu_isa)isa)) {
            continue;
        }
        run_level(&p, (enum cpu_isa)isa, out);
        expect_close(spec, cpu_isa_name((enum cpu_isa)isa), out, truth, bound, 1, n);
        if (isa == CPU_ISA_C) {
            for (size_t i = 0; i < n; i++) {
                reference[i] = out[i];
            }
        }
        expect_close(spec, "against the reference", out, reference, bound, 2, n);
    }
    free(truth);
    free(bound);
    free(reference);
    free(out);
    attn_problem_finish(&p);
}

static uint32_t pick(uint64_t *state, const uint32_t *from, size_t n)
{
    return from[attn_random(state) % n];
}

#define PICK(state, ...)                         \
    pick(state, (const uint32_t[]){__VA_ARGS__}, \
         sizeof((const uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t))

/* A random shape around the one asked for; several sequences, of which some decode. */
static struct attn_spec random_spec(uint64_t *state, uint32_t group_size, uint32_t k_dim,
                                    uint32_t v_dim)
{
    struct attn_spec s = {.k_dim = k_dim, .v_dim = v_dim, .magnitude = 1.0f};

    s.n_kv_heads = PICK(state, 1, 2, 3);
    s.n_heads = s.n_kv_heads * group_size;
    s.k_type = PICK(state, GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0, GQA_TYPE_Q4_0);
    s.v_type = PICK(state, GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0, GQA_TYPE_Q4_0);
    s.window = PICK(state, 0, 0, 1, 2, 17, 64, 100, 256, 300);
    s.softcap = PICK(state, 0, 0, 1) != 0 ? 3.0f : 0.0f;
    s.sinks = PICK(state, 0, 1) != 0;
    s.n_seqs = PICK(state, 1, 2, 3);
    for (uint32_t i = 0; i < s.n_seqs; i++) {
        s.seqs[i].n_past = PICK(state, 0, 0, 1, 15, 63, 64, 200, 255, 256, 257, 511, 530);
        s.seqs[i].n_rows = PICK(state, 1, 1, 2, 5, 16, 19, 40);
    }
    s.seed = attn_random(state);
    return s;
}

Test(attention, levels_agree_on_awkward_groups)
{
    static const uint32_t groups[] = {1, 2, 3, 5, 7, 8, 9, 12, 16, 25};
    uint64_t state = SEED;

    printf("seed %u\n", SEED);
    for (size_t i = 0; i < sizeof(groups) / sizeof(*groups); i++) {
        for (int j = 0; j < 4; j++) {
            struct attn_spec s = random_spec(&state, groups[i], 32, 32);
            check_spec(&s);
        }
    }
}

Test(attention, levels_agree_on_awkward_dimensions)
{
    static const uint32_t dims[] = {1, 7, 8, 16, 24, 31, 32, 40, 64, 80, 96, 100, 128, 192, 256};
    uint64_t state = SEED + 1;

    printf("seed %u\n", SEED + 1);
    for (size_t i = 0; i < sizeof(dims) / sizeof(*dims); i++) {
        for (int j = 0; j < 3; j++) {
            uint32_t other = PICK(&state, 16, 64, 80);
            struct attn_spec s =
                random_spec(&state, 1 + attn_random(&state) % 8, dims[i], j == 0 ? dims[i] : other);
            check_spec(&s);
            s = random_spec(&state, 2, other, dims[i]);
            check_spec(&s);
        }
    }
}

Test(attention, levels_agree_on_long_contexts)
{
    struct attn_spec s = {.n_heads = 8,
                          .n_kv_heads = 1,
                          .k_dim = 64,
                          .v_dim = 64,
                          .k_type = GQA_TYPE_F16,
                          .v_type = GQA_TYPE_F16,
                          .magnitude = 2.0f,
                          .n_seqs = 2,
                          .seqs = {{4000, 3}, {1023, 2}},
                          .seed = SEED + 2};

    check_spec(&s);
    s.window = 1000;
    s.sinks = 1;
    check_spec(&s);
}

/* Scores of about +-10,000: one token takes all, and nothing overflows. */
Test(attention, huge_scores_stay_finite)
{
    struct attn_spec s = {.n_heads = 4,
                          .n_kv_heads = 2,
                          .k_dim = 64,
                          .v_dim = 48,
                          .k_type = GQA_TYPE_F32,
                          .v_type = GQA_TYPE_F16,
                          .magnitude = 8000.0f,
                          .n_seqs = 1,
                          .seqs = {{600, 20}},
                          .seed = SEED + 3};

    check_spec(&s);
    s.softcap = 50.0f;
    check_spec(&s);
    s.softcap = 0.0f;
    s.window = 3;
    s.sinks = 1;
    check_spec(&s);
}

/* A lone pair of scores 0 and x, values 0 and 1: the result is 1 / (1 + exp(-x)), so every bit of
 * exp shows where x is very negative. 4,096 heads try as many x. */
static void check_exp(enum cpu_isa isa, float softcap, double tolerance)
{
    struct attn_spec spec = {.n_heads = 4096,
                             .n_kv_heads = 1,
                             .k_dim = 1,
                             .v_dim = 1,
                             .softcap = softcap,
                             .magnitude = 1.0f,
                             .n_seqs = 1,
                             .seqs = {{1, 1}},
                             .seed = 1};
    struct attn_problem p;
    float *out = calloc(spec.n_heads, sizeof(*out));

    attn_problem_init(&p, &spec);
    p.seqs[0].k[0] = p.seqs[0].v[0] = 0.0f;
    p.seqs[0].k[1] = p.seqs[0].v[1] = 1.0f;
    for (uint32_t h = 0; h < spec.n_heads; h++) {
        p.seqs[0].q[spec.n_heads + h] = -86.0f * (float)h / (float)spec.n_heads;
    }
    run_level(&p, isa, out);
    for (uint32_t h = 0; h < spec.n_heads; h++) {
        double x = p.seqs[0].q[spec.n_heads + h];
        double e = exp(softcap > 0 ? softcap * tanh(x / softcap) : x), expected = e / (1 + e);

        cr_assert(fabs(out[h] - expected) <= tolerance * expected, "%s: exp(%g): %.9g, not %.9g",
                  cpu_isa_name(isa), x, (double)out[h], expected);
    }
    attn_problem_finish(&p);
    free(out);
}

Test(attention, exp_and_tanh_are_accurate)
{
    for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        if (cpu_isa_usable((enum cpu_isa)isa)) {
            check_exp((enum cpu_isa)isa, 0.0f, 3e-7);    /* exp 1e-7, a sum and a quotient */
            check_exp((enum cpu_isa)isa, 30.0f, 1.5e-5); /* 4 half-units of a score of 30 */
        }
    }
}

/* Rows of F16 and BF16 that come from every level must be the same bytes: KV outlives a swap. */
Test(attention, levels_store_the_same_bytes)
{
    const struct cpu_attn_kernels *levels[] = {
        &cpu_attn_kernels_c,
#if defined(__x86_64__)
        &cpu_attn_kernels_avx2,
        &cpu_attn_kernels_avx512,
#endif
    };
    static const uint32_t types[] = {GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16};
    uint64_t state = SEED + 4;

    for (uint32_t round = 0; round < 3 * 20000; round++) {
        uint32_t bits[37], n = 1 + round % 37;
        float src[37];
        unsigned char expected[4 * 37] = {0}, got[4 * 37];

        for (uint32_t i = 0; i < n; i++) {
            bits[i] = (uint32_t)attn_random(&state);
            if ((bits[i] & 0x7f800000u) == 0x7f800000u) {
                bits[i] &= 0xff800000u; /* infinity: a NaN's payload may differ */
            } else if (i % 2 == 0) {    /* F16's own range, and ties */
                bits[i] = (bits[i] & 0x80ffffffu) + (0x32000000u + (bits[i] >> 4 & 0x17000000u));
                bits[i] &= i % 4 == 0 ? 0xfffff000u : 0xffffffffu;
            }
        }
        memcpy(src, bits, sizeof(src));
        levels[0]->store(types[round % 3], src, expected, n);
        for (size_t l = 1; l < sizeof(levels) / sizeof(*levels); l++) {
            if (!cpu_isa_usable(levels[l]->isa)) {
                continue;
            }
            memset(got, 0, sizeof(got));
            levels[l]->store(types[round % 3], src, got, n);
            cr_assert(memcmp(expected, got, sizeof(got)) == 0, "%s, type %u, round %u",
                      cpu_isa_name(levels[l]->isa), types[round % 3], round);
        }
    }
}

static int run_layer(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                     const struct gqa_page_table *table, const struct gqa_attn_batch *batch,
                     struct gqa_attn_seq seq)
{
    float values[64] = {0}, out[64];
    struct gqa_attn_io io = {.q = values,
                             .k = values,
                             .v = values,
                             .out = out,
                             .q_stride = 16,
                             .k_stride = 16,
                             .v_stride = 16,
                             .out_stride = 16};
    struct gqa_attn_batch b = *batch;

    seq.tables = table;
    b.seqs = &seq;
    int rc = cpu_attention_append(a, layer, &b, &io);
    int rc2 = cpu_attention_attend(a, layer, &b, &io);
    cr_assert_eq(rc, rc2, "append says %d, attend %d", rc, rc2);
    return rc;
}

Test(attention, refuses_what_it_cannot_do)
{
    struct gqa_host host;
    struct cpu_attention *a = NULL;
    struct attn_problem p;
    struct attn_spec spec = {.n_heads = 1,
                             .n_kv_heads = 1,
                             .k_dim = 16,
                             .v_dim = 16,
                             .n_seqs = 1,
                             .seqs = {{60, 4}},
                             .seed = 5};

    attn_problem_init(&p, &spec);
    attn_host_init(&host, ATTN_HOST_BACKWARDS, 1);
    cr_assert_eq(cpu_attention_create(&host, CPU_ISA_C, &a), 0);
    struct gqa_page_table table = {.n_pages = 1, .pages = p.seqs[0].pages};
    struct gqa_attn_batch batch = {
        .struct_size = sizeof(batch), .n_rows = 1, .n_seqs = 1, .commit = 1};
    struct gqa_attn_seq seq = {.n_rows = 1, .n_past = 0};

    cr_assert_eq(run_layer(a, &p.layer, &table, &batch, seq), 0);
    table.n_dropped = 1; /* of none */
    cr_assert_eq(run_layer(a, &p.layer, &table, &batch, seq), -EINVAL);
    table.n_dropped = 0;
    table.turned = 1; /* towards nothing */
    cr_assert_eq(run_layer(a, &p.layer, &table, &batch, seq), -EINVAL);
    table.turned = 0;
    table.recent = 1;
    seq.mutual = 1;
    cr_assert_eq(run_layer(a, &p.layer, &table, &batch, seq), -ENOTSUP);
    seq.mutual = 0;
    table.recent = 0;
    seq.n_past = 64; /* past the table */
    cr_assert_eq(run_layer(a, &p.layer, &table, &batch, seq), -EINVAL);
    seq.n_past = UINT32_MAX;
    cr_assert_eq(run_layer(a, &p.layer, &table, &batch, seq), -EINVAL);
    seq.n_past = 3;
    void *missing = NULL;
    table.pages = &missing;
    cr_assert_eq(run_layer(a, &p.layer, &table, &batch, seq), -EINVAL);
    table.pages = p.seqs[0].pages;
    seq.n_rows = 2; /* more than the batch has */
    cr_assert_eq(run_layer(a, &p.layer, &table, &batch, seq), -EINVAL);
    cpu_attention_destroy(a);
    attn_problem_finish(&p);
}

Test(attention, names_what_a_layer_lacks)
{
    struct attn_spec spec = {.n_heads = 6, .n_kv_heads = 2, .k_dim = 16, .v_dim = 16, .seed = 6};
    struct attn_problem p;
    struct gqa_reason reason = {""};

    attn_problem_init(&p, &spec);
    cr_assert_eq(cpu_attention_supports(&p.layer, &reason), 0);
    struct gqa_attn_layer layer = p.layer;
    layer.k_type = GQA_TYPE_Q4_K;
    cr_assert_eq(cpu_attention_supports(&layer, &reason), -ENOTSUP);
    cr_assert(strstr(reason.text, "types") != NULL, "%s", reason.text);
    layer = p.layer;
    layer.n_heads = 5;
    cr_assert_eq(cpu_attention_supports(&layer, &reason), -ENOTSUP);
    cr_assert(strstr(reason.text, "heads") != NULL, "%s", reason.text);
    layer = p.layer;
    layer.k_dim = 0;
    cr_assert_eq(cpu_attention_supports(&layer, &reason), -ENOTSUP);
    layer.k_dim = 1025;
    cr_assert_eq(cpu_attention_supports(&layer, &reason), -ENOTSUP);
    cr_assert(strstr(reason.text, "dimensions") != NULL, "%s", reason.text);
    layer = p.layer;
    layer.softcap = NAN;
    cr_assert_eq(cpu_attention_supports(&layer, &reason), -ENOTSUP);
    attn_problem_finish(&p);
}
