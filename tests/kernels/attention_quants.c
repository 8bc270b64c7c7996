/* tests/kernels/attention_quants.c - Q8_0 and Q4_0 caches: the bytes that are stored, the bits that
 * come of them, and what they cost. */
#include "tests/kernels/attention_cpu.h"
#include "tests/kernels/attention_stored.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEED 20260802u

static void run(struct attn_problem *p, enum cpu_isa isa, enum attn_host_kind kind,
                uint32_t n_threads, uint32_t chunk, float *out)
{
    struct gqa_host host;
    struct cpu_attention *a = NULL;

    attn_host_init(&host, kind, n_threads);
    cr_assert_eq(cpu_attention_create(&host, isa, &a), 0);
    attn_problem_forget(p);
    cr_assert_eq(attn_cpu_run(p, a, chunk, out), 0);
    cpu_attention_destroy(a);
}

#define FOR_EACH_LEVEL(isa)                                                   \
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++)            \
        if (!cpu_isa_usable(isa)) {                                           \
            printf("%s does not run on this processor\n", cpu_isa_name(isa)); \
        } else

static const uint32_t types[] = {GQA_TYPE_Q8_0, GQA_TYPE_Q4_0};

/* ---- bytes ------------------------------------------------------------------------------- */

static float float_of(uint32_t bits)
{
    float f;

    memcpy(&f, &bits, sizeof(f));
    return f;
}

/* Rows of every kind: ordinary, with ties, tiny, huge, empty, and not finite. */
static void awkward_values(uint64_t *state, float *x, uint32_t n_rows, uint32_t dim)
{
    for (uint32_t row = 0; row < n_rows; row++, x += dim) {
        uint64_t kind = attn_random(state) % 12;

        for (uint32_t d = 0; d < dim; d++) {
            uint32_t bits = (uint32_t)attn_random(state);
            x[d] = attn_random_normal(state);
            x[d] = kind == 1   ? (float)((int)(bits % 512) - 256) * 0.5f /* codes and a half */
                   : kind == 2 ? x[d] * 1e-6f                            /* F16's subnormals */
                   : kind == 3 ? x[d] * 1e-9f                            /* nothing of F16's */
                   : kind == 4 ? x[d] * 1e8f                             /* past F16's largest */
                   : kind == 5 ? (d % 2 ? 0.0f : -0.0f)
                   : kind == 6 ? float_of(bits & 0xbfffffffu) /* any size up to 2 */
                   : kind == 7 ? (bits & 1 ? 3.25f : -3.25f)  /* all of them the largest */
                               : x[d];
        }
        if (kind == 8) {
            x[attn_random(state) % dim] = attn_random(state) % 2 ? NAN : -INFINITY;
        }
    }
}

static void rotate_rows(uint32_t type, const float *from, float *to, uint32_t dim)
{
    double *rotated = attn_allocate(dim * sizeof(*rotated));

    attn_as_stored(GQA_TYPE_F32, type == GQA_TYPE_Q4_0, from, dim, rotated);
    for (uint32_t d = 0; d < dim; d++) {
        to[d] = (float)rotated[d];
    }
    free(rotated);
}

/* The sequence's pages as a stranger writes them, over what forget() leaves. */
static void check_pages(const struct attn_problem *p, enum cpu_isa isa)
{
    const struct gqa_attn_layer *l = &p->layer;
    const struct attn_problem_seq *s = &p->seqs[0];
    unsigned char *page = attn_allocate(p->page_bytes);
    float *row = attn_allocate((l->k_dim + l->v_dim) * sizeof(*row));

    for (uint32_t b = 0; b < s->n_pages; b++) {
        memset(page, 0xff, p->page_bytes);
        for (uint32_t t = 0; t < 64 && b * 64 + t < s->n_tokens; t++) {
            for (uint32_t g = 0; g < l->n_kv_heads; g++) {
                size_t at = (size_t)(b * 64 + t) * l->n_kv_heads + g;

                rotate_rows(l->k_type, s->k + at * l->k_dim, row, l->k_dim);
                attn_store_k(l->k_type, row, l->k_dim, t, page + l->k_offset + g * l->k_head_bytes);
                rotate_rows(l->v_type, s->v + at * l->v_dim, row, l->v_dim);
                attn_store_v(l->v_type, row, l->v_dim, t, page + l->v_offset + g * l->v_head_bytes);
            }
        }
        for (size_t i = 0; i < p->page_bytes; i++) {
            unsigned char got = ((const unsigned char *)s->pages[b])[i];
            cr_assert_eq(
                got, page[i], "%s: types %u/%u, dims %u/%u, block %u, byte %zu: %u, not %u",
                cpu_isa_name(isa), l->k_type, l->v_type, l->k_dim, l->v_dim, b, i, got, page[i]);
        }
    }
    free(page);
    free(row);
}

Test(attention_quants, stored_bytes_are_those_of_the_document)
{
    static const uint32_t dims[] = {1, 7, 16, 31, 32, 40, 64, 80, 96, 100, 112, 128, 192, 256};
    uint64_t state = SEED;

    printf("seed %u\n", SEED);
    for (uint32_t i = 0; i < 2 * sizeof(dims) / sizeof(*dims); i++) {
        struct attn_spec spec = {.n_heads = 2,
                                 .n_kv_heads = 2,
                                 .k_dim = dims[i / 2],
                                 .v_dim = dims[(i + 5) / 2 % 14],
                                 .k_type = types[i % 2],
                                 .v_type = types[(i / 2 + 1) % 2],
                                 .magnitude = 1.0f,
                                 .n_seqs = 1,
                                 .seqs = {{70, 20}},
                                 .seed = SEED + i};
        struct attn_problem p;

        attn_problem_init(&p, &spec);
        awkward_values(&state, p.seqs[0].k, 2 * 90, spec.k_dim);
        awkward_values(&state, p.seqs[0].v, 2 * 90, spec.v_dim);
        float *out = attn_allocate((size_t)20 * 2 * spec.v_dim * sizeof(*out));
        FOR_EACH_LEVEL(isa)
        {
            run(&p, isa, ATTN_HOST_THREADS, 3, 7, out);
            check_pages(&p, isa);
        }
        free(out);
        attn_problem_finish(&p);
    }
}

/* ---- bits -------------------------------------------------------------------------------- */

/* Chunks and workers, whole blocks and pieces of tiles. */
Test(attention_quants, neither_chunks_nor_workers_change_a_bit)
{
    static const uint32_t chunks[] = {1, 2, 3, 5, 16, 17, 33, 64, 100};
    static const uint32_t groups[] = {1, 2, 3, 7, 8};

    for (uint32_t i = 0; i < 10; i++) {
        struct attn_spec spec = {.n_heads = 2 * groups[i / 2],
                                 .n_kv_heads = 2,
                                 .k_dim = i % 3 == 0 ? 64 : 48,
                                 .v_dim = i % 3 == 1 ? 64 : 40,
                                 .k_type = types[i % 2],
                                 .v_type = types[i / 2 % 2],
                                 .window = i % 4 == 3 ? 33 : 0,
                                 .sinks = i % 4 == 3,
                                 .magnitude = 2.0f,
                                 .n_seqs = 1,
                                 .seqs = {{200, 110}},
                                 .seed = SEED + i};
        struct attn_problem p;

        attn_problem_init(&p, &spec);
        size_t bytes = (size_t)110 * spec.n_heads * spec.v_dim * sizeof(float);
        float *whole = attn_allocate(bytes), *out = attn_allocate(bytes);
        FOR_EACH_LEVEL(isa)
        {
            run(&p, isa, ATTN_HOST_BACKWARDS, 1, 110, whole);
            for (uint32_t c = 0; c < sizeof(chunks) / sizeof(*chunks); c++) {
                run(&p, isa, ATTN_HOST_THREADS, 1 + c % 4, chunks[c], out);
                cr_assert(memcmp(whole, out, bytes) == 0, "%s, types %u/%u: chunks of %u",
                          cpu_isa_name(isa), spec.k_type, spec.v_type, chunks[c]);
            }
        }
        free(whole);
        free(out);
        attn_problem_finish(&p);
    }
}

/* ---- what it costs ----------------------------------------------------------------------- */

/* Some channels of K and V are many times the others, as in models with outliers. */
static void add_outliers(struct attn_problem *p, float times)
{
    const struct attn_spec *s = &p->spec;
    size_t n = (size_t)p->seqs[0].n_tokens * s->n_kv_heads;

    for (size_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < 2; c++) {
            p->seqs[0].k[i * s->k_dim + 5 + 37 * c] *= times;
            p->seqs[0].v[i * s->v_dim + 11 + 41 * c] *= times;
        }
    }
}

/* Root mean square error of the outputs against those of an exact cache. */
static double error_of(struct attn_spec spec, uint32_t type, int unrotated, float outliers)
{
    struct attn_problem p;
    size_t n = (size_t)spec.seqs[0].n_rows * spec.n_heads * spec.v_dim;
    double *exact = attn_allocate(n * sizeof(*exact)), *got = attn_allocate(n * sizeof(*got));
    double *bound = attn_allocate(n * sizeof(*bound)), sum = 0;

    spec.unrotated = unrotated;
    spec.k_type = spec.v_type = GQA_TYPE_F32;
    attn_problem_init(&p, &spec);
    add_outliers(&p, outliers);
    attn_problem_truth(&p, exact, bound);
    p.spec.k_type = p.layer.k_type = p.spec.v_type = p.layer.v_type = type;
    attn_problem_truth(&p, got, bound);
    for (size_t i = 0; i < n; i++) {
        sum += (got[i] - exact[i]) * (got[i] - exact[i]);
    }
    attn_problem_finish(&p);
    free(exact);
    free(got);
    free(bound);
    return sqrt(sum / (double)n);
}

/* The truth here is what levels_agree_* hold every level to. */
Test(attention_quants, the_rotation_makes_4_bits_of_outliers_usable)
{
    struct attn_spec spec = {.n_heads = 4,
                             .n_kv_heads = 2,
                             .k_dim = 64,
                             .v_dim = 64,
                             .magnitude = 1.0f,
                             .n_seqs = 1,
                             .seqs = {{300, 20}}};

    for (spec.seed = SEED; spec.seed < SEED + 5; spec.seed++) {
        double f16 = error_of(spec, GQA_TYPE_F16, 0, 10), q8 = error_of(spec, GQA_TYPE_Q8_0, 0, 10);
        double rotated = error_of(spec, GQA_TYPE_Q4_0, 0, 10);
        double plain = error_of(spec, GQA_TYPE_Q4_0, 1, 10);
        double calm = error_of(spec, GQA_TYPE_Q4_0, 0, 1),
               calm_plain = error_of(spec, GQA_TYPE_Q4_0, 1, 1);

        printf("rms errors with outliers: f16 %.3g, q8_0 %.3g, q4_0 rotated %.3g, plain %.3g; "
               "without: q4_0 rotated %.3g, plain %.3g\n",
               f16, q8, rotated, plain, calm, calm_plain);
        cr_assert(f16 < q8 / 4 && q8 < rotated / 4 && rotated < plain / 1.5, "seed %u",
                  (unsigned)spec.seed);
    }
}
