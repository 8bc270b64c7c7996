/* tests/unit/engine/test_shared.c - which neighbours of a batch are said to share their beginning.
 */
#include "daemon/sched/shared.h"

#include <criterion/criterion.h>

#define N_PAGES 12u

static char blocks[64];

/* Letters are pages: a sequence whose every whole block is past. */
struct letters {
    void *pages[N_PAGES];
    struct gqa_page_table tables[2];
    struct gqa_attn_seq seq;
};

static void spell(struct letters *l, const char *first_class, const char *second_class)
{
    const char *classes[] = {first_class, second_class};
    uint32_t n = 0;

    for (uint32_t c = 0; c < 2; c++) {
        l->tables[c] = (struct gqa_page_table){.pages = &l->pages[n]};
        for (const char *s = classes[c]; *s != '\0'; s++) {
            l->pages[n++] = *s == '.' ? NULL : &blocks[*s - 'A'];
            l->tables[c].n_pages++;
        }
    }
    l->seq = (struct gqa_attn_seq){
        .n_rows = 1, .n_past = l->tables[0].n_pages * GQA_KV_BLOCK_TOKENS, .tables = l->tables};
}

static void expect(const char *const *words, uint32_t n_seqs, uint32_t n_runs,
                   const struct gqa_attn_shared *runs)
{
    struct letters l[8];
    struct gqa_attn_seq seqs[8];
    struct gqa_attn_shared got[4];

    for (uint32_t s = 0; s < n_seqs; s++) {
        spell(&l[s], words[s], "");
        seqs[s] = l[s].seq;
    }
    uint32_t n = shared_find(seqs, n_seqs, 1, got);
    cr_assert_eq(n, n_runs, "%u runs", n);
    for (uint32_t i = 0; i < n; i++) {
        cr_expect_eq(got[i].n_tokens, runs[i].n_tokens, "run %u: %u tokens", i, got[i].n_tokens);
        cr_expect_eq(got[i].seq_first, runs[i].seq_first, "run %u", i);
        cr_expect_eq(got[i].seq_last, runs[i].seq_last, "run %u", i);
    }
}

Test(shared, runs_of_neighbours)
{
    expect((const char *[]){"ABCDX", "ABCDY", "ABCDZ"}, 3, 1,
           (struct gqa_attn_shared[]){{256, 0, 2}});
    expect((const char *[]){"QQQQQ", "ABCDEX", "ABCDEY", "RSTUV", "RSTUW"}, 5, 2,
           (struct gqa_attn_shared[]){{320, 1, 2}, {256, 3, 4}});
    expect((const char *[]){"ABCDX", "QRSTU", "ABCDY"}, 3, 0, NULL);
    expect((const char *[]){"ABCDX"}, 1, 0, NULL);
    expect(NULL, 0, 0, NULL);
}

Test(shared, less_than_a_segment_is_nothing)
{
    expect((const char *[]){"ABCX", "ABCY"}, 2, 0, NULL);
    expect((const char *[]){"ABC", "ABCD"}, 2, 0, NULL);
}

/* The second has more in common with the third than with the first, or less. */
Test(shared, a_sequence_goes_where_it_shares_most)
{
    expect((const char *[]){"ABCDEFX", "ABCDEFY", "ABCDZZ"}, 3, 1,
           (struct gqa_attn_shared[]){{384, 0, 1}});
    expect((const char *[]){"ABCDX", "ABCDEFY", "ABCDEFZ"}, 3, 1,
           (struct gqa_attn_shared[]){{256, 0, 2}});
}

Test(shared, only_what_is_past)
{
    struct letters l[2];
    struct gqa_attn_shared got;

    spell(&l[0], "ABCDEX", "");
    spell(&l[1], "ABCDEY", "");
    l[1].seq.n_past = 5 * GQA_KV_BLOCK_TOKENS - 1;
    cr_assert_eq(shared_find((struct gqa_attn_seq[]){l[0].seq, l[1].seq}, 2, 1, &got), 1);
    cr_assert_eq(got.n_tokens, 4 * GQA_KV_BLOCK_TOKENS);
    l[1].seq.tables = NULL;
    cr_assert_eq(shared_find((struct gqa_attn_seq[]){l[0].seq, l[1].seq}, 2, 1, &got), 0);
}

/* Blocks that a windowed class has let go of are nobody's: alike. */
Test(shared, in_all_layer_classes)
{
    struct letters l[2];
    struct gqa_attn_shared got;

    spell(&l[0], "ABCDE", "..HIJ");
    spell(&l[1], "ABCDE", "..HIK");
    cr_assert_eq(shared_find((struct gqa_attn_seq[]){l[0].seq, l[1].seq}, 2, 2, &got), 1);
    cr_assert_eq(got.n_tokens, 4 * GQA_KV_BLOCK_TOKENS);
    spell(&l[1], "ABCDE", "..XIJ");
    cr_assert_eq(shared_find((struct gqa_attn_seq[]){l[0].seq, l[1].seq}, 2, 2, &got), 0);
}
