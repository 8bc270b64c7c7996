#include "daemon/sched/shared.h"

/* Whole blocks of the past with which both sequences begin. */
static uint32_t common_tokens(const struct gqa_attn_seq *a, const struct gqa_attn_seq *b,
                              uint32_t n_classes)
{
    uint32_t past = a->n_past < b->n_past ? a->n_past : b->n_past;
    uint32_t n = past / GQA_KV_BLOCK_TOKENS;

    if (a->tables == NULL || b->tables == NULL) {
        return 0;
    }
    for (uint32_t c = 0; c < n_classes; c++) {
        const struct gqa_page_table *x = &a->tables[c], *y = &b->tables[c];
        uint32_t same = 0;

        if (x->n_dropped + x->recent + y->n_dropped + y->recent > 0) {
            return 0; /* views: slots are not positions, and pages their own */
        }
        while (same < n && same < x->n_pages && same < y->n_pages &&
               x->pages[same] == y->pages[same]) {
            same++;
        }
        n = same;
    }
    return n * GQA_KV_BLOCK_TOKENS;
}

uint32_t shared_find(const struct gqa_attn_seq *seqs, uint32_t n_seqs, uint32_t n_classes,
                     struct gqa_attn_shared *ret)
{
    uint32_t n = 0;
    struct gqa_attn_shared run = {0};

    for (uint32_t s = 0; s < n_seqs; s++) {
        uint32_t with_next = s + 1 < n_seqs ? common_tokens(&seqs[s], &seqs[s + 1], n_classes) : 0;
        uint32_t with_run = run.seq_last == s ? run.n_tokens : 0;

        if (with_run > 0 && with_next >= with_run) {
            run.seq_last = s + 1; /* all have the run's tokens: the next one has them too */
            continue;
        }
        if (with_run > 0) {
            ret[n++] = run;
            run = (struct gqa_attn_shared){0};
            continue; /* taken */
        }
        if (with_next >= SHARED_TOKENS_LEAST) {
            run =
                (struct gqa_attn_shared){.n_tokens = with_next, .seq_first = s, .seq_last = s + 1};
        }
    }
    return n;
}
