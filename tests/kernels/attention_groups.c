/* tests/kernels/attention_groups.c - groups that a worker takes through their segments together:
 * every group, row and segment once, enough for all workers, and the same bits as one by one. */
#include "plugins/cpu/attention_plan.h"
#include "tests/kernels/attention_cpu.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

/* Attends with a layer of one group at a time, which is all that it then knows of. */
static int attend_one_by_one(void *context, const struct gqa_attn_layer *layer,
                             const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    uint32_t group_size = layer->n_heads / layer->n_kv_heads;
    int rc = 0;

    for (uint32_t g = 0; rc == 0 && g < layer->n_kv_heads; g++) {
        struct gqa_attn_layer group = *layer;
        struct gqa_attn_io part = *io;

        group.n_heads = group_size;
        group.n_kv_heads = 1;
        group.k_offset += g * layer->k_head_bytes;
        group.v_offset += g * layer->v_head_bytes;
        group.sinks = layer->sinks != NULL ? layer->sinks + (size_t)g * group_size : NULL;
        part.q += (size_t)g * group_size * layer->k_dim;
        part.out += (size_t)g * group_size * layer->v_dim;
        rc = cpu_attention_attend(context, &group, batch, &part);
    }
    return rc;
}

static struct attn_spec spec_of(uint32_t n_groups, uint32_t group_size, uint32_t type)
{
    return (struct attn_spec){.n_heads = n_groups * group_size,
                              .n_kv_heads = n_groups,
                              .k_dim = 40,
                              .v_dim = 56,
                              .k_type = type,
                              .v_type = type,
                              .magnitude = 2.0f,
                              .seed = 90 + n_groups};
}

/* ---- bits -------------------------------------------------------------------------------- */

static void run(struct attn_problem *p, enum cpu_isa isa, uint32_t n_threads, int one_by_one,
                float *out)
{
    struct gqa_host host;
    struct cpu_attention *a = NULL;

    attn_host_init(&host, n_threads > 1 ? ATTN_HOST_THREADS : ATTN_HOST_BACKWARDS, n_threads);
    cr_assert_eq(cpu_attention_create(&host, isa, &a), 0);
    struct attn_backend backend = attn_cpu_backend(a);
    if (one_by_one) {
        backend.attend = attend_one_by_one;
    }
    attn_problem_forget(p);
    cr_assert_eq(attn_problem_run(p, &backend, 40, out), 0);
    cpu_attention_destroy(a);
}

/* Rows that need one pack and several, that end in a segment's first and last block, and windows
 * that leave some packs nothing to see. */
Test(attention_groups, together_or_one_by_one)
{
    static const struct {
        uint32_t n_groups, group_size, type, window;
    } cases[] = {
        {9, 1, GQA_TYPE_F16, 0},   {5, 3, GQA_TYPE_BF16, 0},  {3, 8, GQA_TYPE_Q8_0, 0},
        {2, 32, GQA_TYPE_F32, 0},  {4, 13, GQA_TYPE_F16, 20}, {7, 4, GQA_TYPE_Q4_0, 300},
        {33, 1, GQA_TYPE_Q8_0, 0}, {1, 112, GQA_TYPE_F16, 0},
    };

    for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        for (size_t i = 0; cpu_isa_usable((enum cpu_isa)isa) && i < sizeof(cases) / sizeof(*cases);
             i++) {
            struct attn_spec spec = spec_of(cases[i].n_groups, cases[i].group_size, cases[i].type);
            struct attn_problem p;

            spec.window = cases[i].window;
            spec.sinks = i % 2 == 0;
            spec.n_seqs = 3;
            spec.seqs[0].n_past = 1100;
            spec.seqs[0].n_rows = 1;
            spec.seqs[1].n_past = 250;
            spec.seqs[1].n_rows = 40;
            spec.seqs[2].n_past = 511;
            spec.seqs[2].n_rows = 2;
            attn_problem_init(&p, &spec);
            size_t n = (size_t)p.n_rows * spec.n_heads * spec.v_dim;
            float *alone = calloc(n, sizeof(float)), *out = calloc(n, sizeof(float));
            run(&p, (enum cpu_isa)isa, 1, 1, alone);
            for (uint32_t n_threads = 1; n_threads <= 3; n_threads++) {
                run(&p, (enum cpu_isa)isa, n_threads, 0, out);
                cr_assert(memcmp(out, alone, n * sizeof(float)) == 0, "%s, case %zu, %u threads",
                          cpu_isa_name((enum cpu_isa)isa), i, n_threads);
            }
            free(alone);
            free(out);
            attn_problem_finish(&p);
        }
    }
}

/* ---- the plan ---------------------------------------------------------------------------- */

#define ROWS_MAX     64u
#define GROUPS_MAX   40u
#define SEGMENTS_MAX 80u

/* How often each is attended. */
struct tally {
    uint8_t n[ROWS_MAX][GROUPS_MAX][SEGMENTS_MAX];
};

static void count(const struct cpu_attn_plan *plan, struct tally *tally)
{
    memset(tally, 0, sizeof(*tally));
    for (uint32_t i = 0; i < plan->n_items; i++) {
        const struct cpu_attn_item *item = &plan->items[i];
        const struct cpu_attn_piece *piece = &plan->pieces[item->piece];

        for (uint32_t row = 0; row < piece->n_rows; row++) {
            for (uint32_t g = 0; g < piece->n_groups; g++) {
                for (uint32_t s = 0; s < item->n_segments; s++) {
                    tally->n[piece->first_row + row][piece->group + g][item->first_segment + s]++;
                }
            }
        }
    }
}

/* One sequence's plan; pages are not looked at. */
static void make_plan(struct cpu_attn_plan *plan, const struct gqa_host *host, uint32_t n_groups,
                      uint32_t group_size, uint32_t n_past, uint32_t n_rows)
{
    static const struct gqa_page_table none;
    struct gqa_attn_layer layer = {.struct_size = sizeof(layer),
                                   .n_heads = n_groups * group_size,
                                   .n_kv_heads = n_groups,
                                   .k_dim = 64,
                                   .v_dim = 64,
                                   .k_type = GQA_TYPE_F16,
                                   .v_type = GQA_TYPE_F16};
    struct gqa_attn_seq seq = {.n_rows = n_rows, .n_past = n_past, .tables = &none};
    struct gqa_attn_batch batch = {
        .struct_size = sizeof(batch), .n_rows = n_rows, .n_seqs = 1, .commit = 1, .seqs = &seq};

    cpu_attn_plan_init(plan, host);
    cr_assert_eq(cpu_attn_plan_make(plan, &layer, &batch), 0);
}

Test(attention_groups, everything_is_attended_once)
{
    static const uint32_t groups[] = {1, 3, 4, 7, 32, 33, 40}, sizes[] = {1, 4, 8, 13, 32, 100};
    static const uint32_t depths[] = {0, 200, 255, 511, 4095, 16383}, rows[] = {1, 5, 64};
    struct tally *tally = malloc(sizeof(*tally));

    for (uint32_t i = 0; i < 7 * 6 * 6 * 3 * 3; i++) {
        uint32_t n_groups = groups[i % 7], size = sizes[i / 7 % 6], depth = depths[i / 42 % 6];
        uint32_t n_rows = rows[i / 252 % 3], n_threads = 1 + i / 756 * 3;
        struct cpu_attn_plan plan;
        struct gqa_host host;

        attn_host_init(&host, ATTN_HOST_BACKWARDS, n_threads);
        make_plan(&plan, &host, n_groups, size, depth, n_rows);
        count(&plan, tally);
        for (uint32_t row = 0; row < ROWS_MAX; row++) {
            for (uint32_t g = 0; g < GROUPS_MAX; g++) {
                for (uint32_t s = 0; s < SEGMENTS_MAX; s++) {
                    int wanted = row < n_rows && g < n_groups &&
                                 s <= (depth + row) / GQA_ATTN_SEGMENT_TOKENS;
                    int more = s <= (depth + n_rows - 1) / GQA_ATTN_SEGMENT_TOKENS;
                    uint32_t n = tally->n[row][g][s];

                    /* A row's piece may reach into a segment that only a later row sees. */
                    cr_assert(wanted ? n == 1 : n <= (row < n_rows && g < n_groups && more),
                              "%u groups of %u at %u, %u rows: row %u, group %u, segment %u: %u",
                              n_groups, size, depth, n_rows, row, g, s, n);
                }
            }
        }
        cpu_attn_plan_finish(&plan);
    }
    free(tally);
}

/* One row of a short context is shared out as far as its segments and groups go. */
Test(attention_groups, short_contexts_feed_all_workers)
{
    static const uint32_t groups[] = {1, 4, 8, 32}, depths[] = {100, 300, 511, 900, 4095};

    for (uint32_t i = 0; i < 4 * 5 * 7; i++) {
        uint32_t n_groups = groups[i % 4], depth = depths[i / 4 % 5], n_threads = 2 + i / 20;
        uint32_t most = n_groups * (depth / GQA_ATTN_SEGMENT_TOKENS + 1);
        uint32_t wanted = n_threads * CPU_ATTN_ITEMS_PER_WORKER;
        struct cpu_attn_plan plan;
        struct gqa_host host;

        attn_host_init(&host, ATTN_HOST_BACKWARDS, n_threads);
        make_plan(&plan, &host, n_groups, 8, depth, 1);
        cr_assert(plan.n_items >= (most < wanted ? most : wanted),
                  "%u groups at %u, %u threads: %u items", n_groups, depth, n_threads,
                  plan.n_items);
        cpu_attn_plan_finish(&plan);
    }
}

/* Long ones are read straight ahead: all groups that fit, side by side. */
Test(attention_groups, long_contexts_take_groups_together)
{
    static const uint32_t shapes[][3] = {{4, 8, 4}, {32, 1, 32}, {8, 4, 8},  {8, 32, 3},
                                         {1, 8, 1}, {40, 1, 20}, {12, 8, 12}};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
        struct cpu_attn_plan plan;
        struct gqa_host host;

        attn_host_init(&host, ATTN_HOST_BACKWARDS, 2);
        make_plan(&plan, &host, shapes[i][0], shapes[i][1], 4095, 1);
        cr_expect_eq(plan.pieces[0].n_groups, shapes[i][2], "%u x %u: %u groups", shapes[i][0],
                     shapes[i][1], plan.pieces[0].n_groups);
        cpu_attn_plan_finish(&plan);
    }
}
