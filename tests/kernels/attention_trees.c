/* tests/kernels/attention_trees.c - new rows that see each other otherwise than causally: trees,
 * encoders; and batches that leave nothing behind. */
#include "tests/kernels/attention_cpu.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEED     20260801u
#define MASK_MAX 300u /* rows */

static void run(struct attn_problem *p, enum cpu_isa isa, enum attn_host_kind kind,
                uint32_t n_threads, float *out)
{
    struct gqa_host host;
    struct cpu_attention *a = NULL;

    attn_host_init(&host, kind, n_threads);
    cr_assert_eq(cpu_attention_create(&host, isa, &a), 0);
    attn_problem_forget(p);
    cr_assert_eq(attn_cpu_run(p, a, UINT32_MAX, out), 0);
    cpu_attention_destroy(a);
}

static size_t out_floats(const struct attn_spec *s)
{
    size_t n = 0;

    for (uint32_t i = 0; i < s->n_seqs; i++) {
        n += (size_t)s->seqs[i].n_rows * s->n_heads * s->v_dim;
    }
    return n;
}

static float *results(const struct attn_spec *s, enum cpu_isa isa, enum attn_host_kind kind,
                      uint32_t n_threads)
{
    struct attn_problem p;
    float *out = calloc(out_floats(s) + 1, sizeof(*out));

    cr_assert_not_null(out);
    attn_problem_init(&p, s);
    run(&p, isa, kind, n_threads, out);
    attn_problem_finish(&p);
    return out;
}

#define FOR_EACH_LEVEL(isa)                                                   \
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++)            \
        if (!cpu_isa_usable(isa)) {                                           \
            printf("%s does not run on this processor\n", cpu_isa_name(isa)); \
        } else

/* The same bits from both specs, on every level and on threads. */
static void expect_same(const struct attn_spec *a, const struct attn_spec *b, const char *what)
{
    FOR_EACH_LEVEL(isa)
    {
        float *x = results(a, isa, ATTN_HOST_BACKWARDS, 1);
        float *y = results(b, isa, ATTN_HOST_BACKWARDS, 3);
        float *z = results(b, isa, ATTN_HOST_THREADS, 4);

        for (size_t i = 0; i < out_floats(a); i++) {
            cr_assert(memcmp(&x[i], &y[i], sizeof(*x)) == 0 &&
                          memcmp(&x[i], &z[i], sizeof(*x)) == 0,
                      "%s, %s: value %zu is %a, then %a, on threads %a (seed %" PRIu64
                      ", types %u/%u, window %u)",
                      what, cpu_isa_name(isa), i, (double)x[i], (double)y[i], (double)z[i], a->seed,
                      a->k_type, a->v_type, a->window);
        }
        free(x);
        free(y);
        free(z);
    }
}

/* Every level against float64, committed or not alike. */
static void check_spec(const struct attn_spec *spec)
{
    struct attn_problem p;
    size_t n = out_floats(spec);
    double *truth = calloc(n, sizeof(*truth)), *bound = calloc(n, sizeof(*bound));
    struct attn_spec other = *spec;

    cr_assert(truth && bound);
    attn_problem_init(&p, spec);
    attn_problem_truth(&p, truth, bound);
    attn_problem_finish(&p);
    FOR_EACH_LEVEL(isa)
    {
        float *out = results(spec, isa, ATTN_HOST_BACKWARDS, 2);
        for (size_t i = 0; i < n; i++) {
            cr_assert(fabs(out[i] - truth[i]) <= bound[i] + 1e-6 * fabs(truth[i]),
                      "%s: value %zu is %.9g, expected %.9g +- %.3g (seed %" PRIu64
                      ", heads %u/%u, types %u/%u, window %u, softcap %g, sinks %d)",
                      cpu_isa_name(isa), i, (double)out[i], truth[i], bound[i], spec->seed,
                      spec->n_heads, spec->n_kv_heads, spec->k_type, spec->v_type, spec->window,
                      (double)spec->softcap, spec->sinks);
        }
        free(out);
    }
    other.no_commit = !spec->no_commit;
    expect_same(spec, &other, "committed or not");
    free(truth);
    free(bound);
}

/* ---- masks ------------------------------------------------------------------------------- */

struct mask {
    uint32_t n_rows;
    uint64_t words[MASK_MAX * ((MASK_MAX + 63) / 64)];
};

static void mask_init(struct mask *m, uint32_t n_rows)
{
    memset(m, 0, sizeof(*m));
    m->n_rows = n_rows;
}

static void mask_set(struct mask *m, uint32_t row, uint32_t other)
{
    m->words[(size_t)row * ((m->n_rows + 63) / 64) + other / 64] |= (uint64_t)1 << other % 64;
}

static void mask_chain(struct mask *m, uint32_t n_rows)
{
    mask_init(m, n_rows);
    for (uint32_t i = 0; i < n_rows; i++) {
        for (uint32_t j = 0; j <= i; j++) {
            mask_set(m, i, j);
        }
    }
}

static void mask_ones(struct mask *m, uint32_t n_rows)
{
    mask_init(m, n_rows);
    for (uint32_t i = 0; i < n_rows; i++) {
        for (uint32_t j = 0; j < n_rows; j++) {
            mask_set(m, i, j);
        }
    }
}

/* Each row under a random earlier one, or a root of its own. */
static void mask_tree(struct mask *m, uint32_t n_rows, uint64_t *state)
{
    uint32_t parent[MASK_MAX];

    mask_init(m, n_rows);
    for (uint32_t i = 0; i < n_rows; i++) {
        parent[i] =
            i == 0 || attn_random(state) % 8 == 0 ? UINT32_MAX : (uint32_t)(attn_random(state) % i);
        for (uint32_t j = i; j != UINT32_MAX; j = parent[j]) {
            mask_set(m, i, j);
        }
    }
}

/* Anything, rows that see nothing included. */
static void mask_random(struct mask *m, uint32_t n_rows, uint64_t *state)
{
    mask_init(m, n_rows);
    for (uint32_t i = 0; i < n_rows; i++) {
        uint64_t density = attn_random(state) % 5;
        for (uint32_t j = 0; j < n_rows; j++) {
            if (attn_random(state) % 4 < density) {
                mask_set(m, i, j);
            }
        }
    }
    m->words[(n_rows - 1) / 64] |= n_rows % 64 != 0 ? UINT64_MAX << n_rows % 64 : 0; /* not a row */
}

static uint32_t pick(uint64_t *state, const uint32_t *from, size_t n)
{
    return from[attn_random(state) % n];
}

#define PICK(state, ...)                         \
    pick(state, (const uint32_t[]){__VA_ARGS__}, \
         sizeof((const uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t))

static struct attn_spec random_spec(uint64_t *state, uint32_t group_size)
{
    struct attn_spec s = {.k_dim = PICK(state, 32, 48, 64), .v_dim = PICK(state, 32, 40, 64)};

    s.magnitude = 1.0f;
    s.n_kv_heads = PICK(state, 1, 2);
    s.n_heads = s.n_kv_heads * group_size;
    s.k_type = PICK(state, GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0, GQA_TYPE_Q4_0);
    s.v_type = PICK(state, GQA_TYPE_F32, GQA_TYPE_F16, GQA_TYPE_BF16, GQA_TYPE_Q8_0, GQA_TYPE_Q4_0);
    s.window = PICK(state, 0, 0, 1, 2, 5, 40, 300);
    s.softcap = PICK(state, 0, 1) != 0 ? 3.0f : 0.0f;
    s.sinks = PICK(state, 0, 1) != 0;
    s.no_commit = PICK(state, 0, 1) != 0;
    s.n_seqs = PICK(state, 1, 2, 3);
    for (uint32_t i = 0; i < s.n_seqs; i++) {
        s.seqs[i].n_past = PICK(state, 0, 1, 15, 63, 64, 100, 250, 256, 500, 530);
        s.seqs[i].n_rows = PICK(state, 1, 2, 5, 13, 17, 40, 66);
    }
    s.seed = attn_random(state);
    return s;
}

static const uint32_t groups[] = {1, 2, 3, 7, 8};

Test(attention_trees, a_chain_is_causal)
{
    static struct mask masks[ATTN_SEQS_MAX];
    uint64_t state = SEED;

    printf("seed %u\n", SEED);
    for (uint32_t round = 0; round < 20; round++) {
        struct attn_spec causal = random_spec(&state, groups[round % 5]), chain;

        chain = causal;
        for (uint32_t i = 0; i < chain.n_seqs; i++) {
            mask_chain(&masks[i], chain.seqs[i].n_rows);
            chain.seqs[i].mask = masks[i].words;
        }
        expect_same(&causal, &chain, "a chain and no mask");
    }
}

Test(attention_trees, levels_agree_on_trees)
{
    static struct mask masks[ATTN_SEQS_MAX];
    uint64_t state = SEED + 1;

    printf("seed %u\n", SEED + 1);
    for (uint32_t round = 0; round < 30; round++) {
        struct attn_spec s = random_spec(&state, groups[round % 5]);

        for (uint32_t i = 0; i < s.n_seqs; i++) {
            if (round % 3 != 0) {
                mask_tree(&masks[i], s.seqs[i].n_rows, &state);
            } else {
                mask_random(&masks[i], s.seqs[i].n_rows, &state);
            }
            /* Neighbours of a tree may be causal. */
            s.seqs[i].mask = i == 1 ? NULL : masks[i].words;
        }
        check_spec(&s);
    }
}

/* A path of a tree is what it would be alone: to rounding, for its rows lie elsewhere. Row i of the
 * path lies in row 3 i of the tree; between them are guesses that nobody on the path sees. */
Test(attention_trees, a_path_has_the_window_that_it_would_have_alone)
{
    static struct mask mask;
    struct attn_spec spec = {.n_heads = 4,
                             .n_kv_heads = 2,
                             .k_dim = 32,
                             .v_dim = 32,
                             .magnitude = 1.0f,
                             .n_seqs = 1,
                             .seqs = {{100, 30}},
                             .seed = SEED + 2};
    const size_t row = (size_t)spec.n_heads * spec.v_dim, kv = 64;

    for (spec.window = 0; spec.window < 15; spec.window++) {
        struct attn_problem tree, path;

        mask_init(&mask, 30);
        for (uint32_t i = 0; i < 30; i++) {
            for (uint32_t j = 0; j <= i; j += 3) {
                mask_set(&mask, i, j);
            }
            mask_set(&mask, i, i);
        }
        spec.seqs[0].n_rows = 30;
        spec.seqs[0].mask = mask.words;
        attn_problem_init(&tree, &spec);
        spec.seqs[0].n_rows = 10;
        spec.seqs[0].mask = NULL;
        attn_problem_init(&path, &spec);
        memcpy(path.seqs[0].k, tree.seqs[0].k, 100 * kv * sizeof(float));
        memcpy(path.seqs[0].v, tree.seqs[0].v, 100 * kv * sizeof(float));
        for (uint32_t i = 0; i < 10; i++) {
            uint32_t to = 100 + i, from = 100 + 3 * i;
            memcpy(path.seqs[0].q + to * row, tree.seqs[0].q + from * row, row * sizeof(float));
            memcpy(path.seqs[0].k + to * kv, tree.seqs[0].k + from * kv, kv * sizeof(float));
            memcpy(path.seqs[0].v + to * kv, tree.seqs[0].v + from * kv, kv * sizeof(float));
        }
        FOR_EACH_LEVEL(isa)
        {
            float in_tree[30 * 128], alone[10 * 128];

            run(&tree, isa, ATTN_HOST_BACKWARDS, 1, in_tree);
            run(&path, isa, ATTN_HOST_BACKWARDS, 1, alone);
            for (uint32_t i = 0; i < 10 * row; i++) {
                float got = in_tree[i / row * 3 * row + i % row];
                cr_assert(fabsf(got - alone[i]) <= 2e-6f, "%s, window %u: value %u is %g, not %g",
                          cpu_isa_name(isa), spec.window, i, (double)got, (double)alone[i]);
            }
        }
        attn_problem_finish(&tree);
        attn_problem_finish(&path);
    }
}

/* NaN in K or V of a row reaches those rows that see it, and no other. */
Test(attention_trees, what_a_row_does_not_see_never_reaches_it)
{
    static struct mask mask;
    uint64_t state = SEED + 3;
    struct attn_spec spec = {.n_heads = 6,
                             .n_kv_heads = 2,
                             .k_dim = 32,
                             .v_dim = 32,
                             .k_type = GQA_TYPE_F16,
                             .v_type = GQA_TYPE_F16,
                             .magnitude = 1.0f,
                             .n_seqs = 1,
                             .seqs = {{230, 60}},
                             .seed = SEED + 3};

    mask_tree(&mask, 60, &state);
    spec.seqs[0].mask = mask.words;
    for (uint32_t bad = 0; bad < 60; bad += 7) {
        for (spec.no_commit = 0; spec.no_commit < 2; spec.no_commit++) {
            FOR_EACH_LEVEL(isa)
            {
                static float out[60 * 6 * 32];
                struct attn_problem p;

                attn_problem_init(&p, &spec);
                p.seqs[0].k[(230 + bad) * 64 + 5] = bad % 2 ? NAN : 1.0f;
                p.seqs[0].v[(230 + bad) * 64 + 5] = NAN;
                run(&p, isa, ATTN_HOST_BACKWARDS, 2, out);
                for (uint32_t row = 0; row < 60; row++) {
                    int hit = isnan(out[row * 192 + 5]) != 0;
                    int expected = (int)(mask.words[row] >> bad & 1);
                    cr_assert_eq(hit, expected, "%s: row %u, NaN in row %u", cpu_isa_name(isa), row,
                                 bad);
                }
                attn_problem_finish(&p);
            }
        }
    }
}

Test(attention_trees, rows_that_see_nothing_give_zeros)
{
    static struct mask mask;
    struct attn_spec spec = {.n_heads = 3,
                             .n_kv_heads = 1,
                             .k_dim = 16,
                             .v_dim = 24,
                             .magnitude = 1.0f,
                             .n_seqs = 1,
                             .seqs = {{0, 5}},
                             .seed = SEED + 4};

    mask_init(&mask, 5);
    mask_set(&mask, 3, 1);
    spec.seqs[0].mask = mask.words;
    FOR_EACH_LEVEL(isa)
    {
        float *out = results(&spec, isa, ATTN_HOST_BACKWARDS, 1);
        for (uint32_t i = 0; i < 5 * 3 * 24; i++) {
            cr_assert(i / 72 == 3 ? out[i] != 0.0f : out[i] == 0.0f, "%s: value %u is %g",
                      cpu_isa_name(isa), i, (double)out[i]);
        }
        free(out);
    }
    check_spec(&spec);
}

/* ---- encoders ---------------------------------------------------------------------------- */

Test(attention_trees, levels_agree_on_encoders)
{
    uint64_t state = SEED + 5;

    printf("seed %u\n", SEED + 5);
    for (uint32_t round = 0; round < 25; round++) {
        struct attn_spec s = random_spec(&state, groups[round % 5]);

        for (uint32_t i = 0; i < s.n_seqs; i++) {
            s.seqs[i].n_past = round % 2 ? 0 : s.seqs[i].n_past;
            s.seqs[i].n_rows = PICK(&state, 1, 17, 64, 130, 257, 300);
            s.seqs[i].mutual = i != 1;
        }
        check_spec(&s);
    }
}

Test(attention_trees, mutual_is_a_mask_of_ones)
{
    static struct mask masks[ATTN_SEQS_MAX];
    uint64_t state = SEED + 6;

    for (uint32_t round = 0; round < 10; round++) {
        struct attn_spec mutual = random_spec(&state, groups[round % 5]), ones;

        mutual.window = 0;
        ones = mutual;
        for (uint32_t i = 0; i < ones.n_seqs; i++) {
            mask_ones(&masks[i], ones.seqs[i].n_rows);
            ones.seqs[i].mask = masks[i].words;
            mutual.seqs[i].mutual = 1;
        }
        expect_same(&mutual, &ones, "mutual and a mask of ones");
    }
}

/* A whole document: long enough that a matrix of its scores would show. */
Test(attention_trees, long_encoders)
{
    struct attn_spec spec = {.n_heads = 1,
                             .n_kv_heads = 1,
                             .k_dim = 16,
                             .v_dim = 16,
                             .magnitude = 1.0f,
                             .no_commit = 1,
                             .n_seqs = 1,
                             .seqs = {{.n_rows = 1500, .mutual = 1}},
                             .seed = SEED + 7};

    check_spec(&spec);
    spec.window = 65;
    check_spec(&spec);
}

/* ---- no commit --------------------------------------------------------------------------- */

/* append() and attend() with commit = 0 change no byte of a page. */
Test(attention_trees, without_a_commit_pages_stay_as_they_are)
{
    struct attn_spec spec = {.n_heads = 4,
                             .n_kv_heads = 2,
                             .k_dim = 32,
                             .v_dim = 32,
                             .magnitude = 1.0f,
                             .n_seqs = 1,
                             .seqs = {{70, 100}},
                             .seed = SEED + 8};

    FOR_EACH_LEVEL(isa)
    {
        static float out[100 * 4 * 32], again[100 * 4 * 32];
        struct attn_problem p;
        struct gqa_host host;
        struct cpu_attention *a = NULL;

        attn_problem_init(&p, &spec);
        attn_host_init(&host, ATTN_HOST_BACKWARDS, 2);
        cr_assert_eq(cpu_attention_create(&host, isa, &a), 0);
        p.spec.no_commit = 1;
        cr_assert_eq(attn_cpu_run(&p, a, UINT32_MAX, out), 0);
        for (uint32_t b = 1; b < p.seqs[0].n_pages; b++) {
            uint32_t past = b == 1 ? 6 : 0;
            for (uint32_t t = past; t < GQA_KV_BLOCK_TOKENS; t++) {
                for (uint32_t d = 0; d < 64; d++) {
                    const char *page = p.seqs[0].pages[b];
                    float k, v;

                    memcpy(&k,
                           page + p.layer.k_offset + d / 32 * p.layer.k_head_bytes +
                               4 * gqa_k_index(32, t, d % 32),
                           4);
                    memcpy(&v,
                           page + p.layer.v_offset + d / 32 * p.layer.v_head_bytes +
                               4 * gqa_v_index(32, t, d % 32),
                           4);
                    cr_assert(isnan(k) && isnan(v), "block %u, token %u was written", b, t);
                }
            }
        }
        /* The guess taken back, the same rows committed: nothing of it is left. */
        p.spec.no_commit = 0;
        cr_assert_eq(attn_cpu_run(&p, a, UINT32_MAX, again), 0);
        cr_assert(memcmp(out, again, sizeof(out)) == 0);
        cpu_attention_destroy(a);
        attn_problem_finish(&p);
    }
}

Test(attention_trees, refuses_contradictions)
{
    float values[64] = {0};
    uint64_t mask[2] = {1, 3};
    struct gqa_host host;
    struct cpu_attention *a = NULL;
    struct attn_problem p;
    struct attn_spec spec = {.n_heads = 1, .n_kv_heads = 1, .k_dim = 16, .v_dim = 16, .seed = 9};
    struct gqa_attn_seq seq = {.n_rows = 2, .mutual = 1, .new_mask = mask};
    struct gqa_attn_batch batch = {
        .struct_size = sizeof(batch), .n_rows = 2, .n_seqs = 1, .seqs = &seq};
    struct gqa_attn_io io = {values, values, values, values, 16, 16, 16, 16};

    attn_problem_init(&p, &spec);
    attn_host_init(&host, ATTN_HOST_BACKWARDS, 1);
    cr_assert_eq(cpu_attention_create(&host, CPU_ISA_C, &a), 0);
    cr_assert_eq(cpu_attention_attend(a, &p.layer, &batch, &io), -EINVAL);
    seq.mutual = 0;
    cr_assert_eq(cpu_attention_attend(a, &p.layer, &batch, &io), 0);
    cr_assert_eq(cpu_attention_append(a, &p.layer, &batch, &io), 0);
    seq.n_past = 1; /* a past without a table */
    cr_assert_eq(cpu_attention_attend(a, &p.layer, &batch, &io), -EINVAL);
    seq.n_past = 0;
    batch.commit = 1;
    cr_assert_eq(cpu_attention_append(a, &p.layer, &batch, &io), -EINVAL);
    cpu_attention_destroy(a);
    attn_problem_finish(&p);
}
