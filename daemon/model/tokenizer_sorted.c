/* daemon/model/tokenizer_sorted.c - pieces in byte order, searched byte by byte.
 *
 * What a trie does, in memory that no vocabulary can blow up: the pieces that begin with the bytes
 * seen so far are a range of the sorted list, and each byte narrows it. */
#include "daemon/model/tokenizer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int compare_pieces(const struct token_entry *a, const struct token_entry *b)
{
    int order = memcmp(a->piece, b->piece, a->bytes < b->bytes ? a->bytes : b->bytes);
    return order ? order : (a->bytes > b->bytes) - (a->bytes < b->bytes);
}

static int by_text(const void *a, const void *b, void *tokenizer)
{
    const struct tokenizer *t = tokenizer;
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    int order = compare_pieces(&t->tokens[x], &t->tokens[y]);
    return order ? order : (x > y) - (x < y);
}

int sorted_pieces_init(struct sorted_pieces *set, const struct tokenizer *t, uint8_t flag)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        n += (t->tokens[i].flags & flag) != 0;
    }
    set->ids = calloc((size_t)n + 1, sizeof(*set->ids));
    if (!set->ids) {
        return -ENOMEM;
    }
    set->n = 0;
    for (uint32_t i = 0; i < t->n_vocab; i++) {
        if (t->tokens[i].flags & flag) {
            set->ids[set->n++] = (int32_t)i;
        }
    }
    qsort_r(set->ids, n, sizeof(*set->ids), by_text, (void *)t);
    for (uint32_t i = 0, byte = 0; byte < 257; byte++) {
        while (i < n && (unsigned char)t->tokens[set->ids[i]].piece[0] < byte) {
            i++;
        }
        set->first[byte] = i;
    }
    return 0;
}

void sorted_pieces_finish(struct sorted_pieces *set)
{
    free(set->ids);
}

/* The first of ids[low..high), which agree in depth bytes, whose next byte is >= byte. */
static uint32_t lower_bound(const struct tokenizer *t, const struct sorted_pieces *set,
                            struct piece_walk w, unsigned byte)
{
    while (w.low < w.high) {
        uint32_t middle = w.low + (w.high - w.low) / 2;
        const struct token_entry *e = &t->tokens[set->ids[middle]];
        if (e->bytes <= w.depth || (unsigned char)e->piece[w.depth] < byte) {
            w.low = middle + 1;
        } else {
            w.high = middle;
        }
    }
    return w.low;
}

void sorted_pieces_step(const struct tokenizer *t, const struct sorted_pieces *set,
                        struct piece_walk *w, char byte)
{
    unsigned b = (unsigned char)byte;
    if (w->high - w->low == 1) {
        const struct token_entry *e = &t->tokens[set->ids[w->low]];
        if (e->bytes <= w->depth || e->piece[w->depth] != byte) {
            w->low = w->high;
        }
    } else {
        w->low = lower_bound(t, set, *w, b);
        w->high = lower_bound(t, set, *w, b + 1);
    }
    w->depth++;
}
