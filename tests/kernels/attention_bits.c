/* tests/kernels/attention_bits.c - a row's result is the same bits whatever runs beside it: alone
 * or in a batch, in any chunks, on any number of workers, in any order. */
#include "tests/kernels/attention_cpu.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static size_t out_floats(const struct attn_problem *p)
{
    return (size_t)p->n_rows * p->spec.n_heads * p->spec.v_dim;
}

/* The spec with everything that could disturb a bit, in its small variations. */
static struct attn_spec spec_of(uint32_t group_size, uint32_t window, uint32_t type)
{
    return (struct attn_spec){
        .n_heads = 2 * group_size,
        .n_kv_heads = 2,
        .k_dim = 48,
        .v_dim = 40,
        .k_type = type,
        .v_type = type,
        .window = window,
        .softcap = window != 0 ? 20.0f : 0.0f,
        .sinks = window != 0,
        .magnitude = 2.0f,
        .seed = 7 + group_size,
    };
}

#define FOR_EACH_LEVEL(isa)                                                   \
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++)            \
        if (!cpu_isa_usable(isa)) {                                           \
            printf("%s does not run on this processor\n", cpu_isa_name(isa)); \
        } else

static void expect_same(const float *a, const float *b, size_t n, enum cpu_isa isa,
                        const char *what, uint32_t which)
{
    for (size_t i = 0; i < n; i++) {
        cr_assert(memcmp(&a[i], &b[i], sizeof(*a)) == 0, "%s, %s %u: value %zu is %a, not %a",
                  cpu_isa_name(isa), what, which, i, (double)a[i], (double)b[i]);
    }
}

Test(attention_bits, every_chunking_of_a_prompt)
{
    static const uint32_t groups[] = {1, 3, 8};

    FOR_EACH_LEVEL(isa)
    {
        for (uint32_t g = 0; g < 6; g++) {
            struct attn_spec spec = spec_of(groups[g % 3], g < 3 ? 0 : 33, GQA_TYPE_F16);
            struct attn_problem p;

            spec.n_seqs = 1;
            spec.seqs[0].n_rows = 70;
            attn_problem_init(&p, &spec);
            float *whole = calloc(out_floats(&p), sizeof(float));
            float *out = calloc(out_floats(&p), sizeof(float));
            run(&p, isa, ATTN_HOST_BACKWARDS, 1, 70, whole);
            for (uint32_t chunk = 1; chunk < 70; chunk++) {
                run(&p, isa, ATTN_HOST_BACKWARDS, 1, chunk, out);
                expect_same(out, whole, out_floats(&p), isa, "chunks of", chunk);
            }
            free(whole);
            free(out);
            attn_problem_finish(&p);
        }
    }
}

/* Across segments' borders, where chunks and segments cut each other. */
Test(attention_bits, chunks_across_segments)
{
    static const uint32_t chunks[] = {1, 7, 64, 100, 256, 300};

    FOR_EACH_LEVEL(isa)
    {
        for (uint32_t w = 0; w < 3; w++) {
            struct attn_spec spec = spec_of(2, w * 150, w == 1 ? GQA_TYPE_BF16 : GQA_TYPE_F32);
            struct attn_problem p;

            spec.n_seqs = 1;
            spec.seqs[0].n_past = 100;
            spec.seqs[0].n_rows = 500;
            attn_problem_init(&p, &spec);
            float *whole = calloc(out_floats(&p), sizeof(float));
            float *out = calloc(out_floats(&p), sizeof(float));
            run(&p, isa, ATTN_HOST_BACKWARDS, 2, 500, whole);
            for (size_t c = 0; c < sizeof(chunks) / sizeof(*chunks); c++) {
                run(&p, isa, ATTN_HOST_BACKWARDS, 2, chunks[c], out);
                expect_same(out, whole, out_floats(&p), isa, "chunks of", chunks[c]);
            }
            free(whole);
            free(out);
            attn_problem_finish(&p);
        }
    }
}

/* Few groups and a long context, so that pieces are cut; many workers, in order, out of it, and in
 * parallel. */
Test(attention_bits, any_number_of_workers)
{
    static const uint32_t n_threads[] = {1, 2, 3, 5, 16};

    FOR_EACH_LEVEL(isa)
    {
        struct attn_spec spec = spec_of(4, 0, GQA_TYPE_F16);
        struct attn_problem p;

        spec.n_seqs = 2;
        spec.seqs[0].n_past = 3000;
        spec.seqs[0].n_rows = 1;
        spec.seqs[1].n_past = 700;
        spec.seqs[1].n_rows = 30;
        attn_problem_init(&p, &spec);
        float *alone = calloc(out_floats(&p), sizeof(float));
        float *out = calloc(out_floats(&p), sizeof(float));
        run(&p, isa, ATTN_HOST_BACKWARDS, 1, 30, alone);
        for (size_t i = 0; i < sizeof(n_threads) / sizeof(*n_threads); i++) {
            run(&p, isa, ATTN_HOST_BACKWARDS, n_threads[i], 30, out);
            expect_same(out, alone, out_floats(&p), isa, "workers one by one:", n_threads[i]);
            run(&p, isa, ATTN_HOST_THREADS, n_threads[i], 30, out);
            expect_same(out, alone, out_floats(&p), isa, "threads:", n_threads[i]);
        }
        free(alone);
        free(out);
        attn_problem_finish(&p);
    }
}

/* Each sequence's rows in a batch of all, against the same sequence with nobody else. */
Test(attention_bits, alone_and_in_a_batch)
{
    FOR_EACH_LEVEL(isa)
    {
        for (uint32_t group_size = 1; group_size <= 9; group_size += 2) {
            struct attn_spec spec = spec_of(group_size, group_size == 5 ? 90 : 0, GQA_TYPE_F16);
            struct attn_problem p, single;
            static const uint32_t shapes[][2] = {{0, 9}, {255, 1}, {256, 1}, {300, 20}, {63, 2}};
            size_t row = (size_t)spec.n_heads * spec.v_dim, first = 0;

            spec.n_seqs = 5;
            for (uint32_t i = 0; i < 5; i++) {
                spec.seqs[i].n_past = shapes[i][0];
                spec.seqs[i].n_rows = shapes[i][1];
            }
            attn_problem_init(&p, &spec);
            float *batch = calloc(out_floats(&p), sizeof(float));
            float *alone = calloc(out_floats(&p), sizeof(float));
            run(&p, isa, ATTN_HOST_BACKWARDS, 2, UINT32_MAX, batch);
            for (uint32_t i = 0; i < 5; i++) {
                single = p;
                single.spec.n_seqs = 1;
                single.spec.seqs[0] = p.spec.seqs[i];
                single.seqs[0] = p.seqs[i];
                run(&single, isa, ATTN_HOST_BACKWARDS, 1, UINT32_MAX, alone);
                expect_same(alone, batch + first, shapes[i][1] * row, isa, "sequence", i);
                first += shapes[i][1] * row;
            }
            free(batch);
            free(alone);
            attn_problem_finish(&p);
        }
    }
}
