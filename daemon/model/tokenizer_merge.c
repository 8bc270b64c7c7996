/* daemon/model/tokenizer_merge.c - a word's symbols, merged pair by pair, best pair first.
 *
 * Both kinds of tokenizer are this algorithm with other symbols and other priorities (Sennrich,
 * Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016). Pairs wait
 * in a binary heap; a pair whose symbols have changed meanwhile is recognised by its size and
 * skipped, so a word of n symbols costs O(n log n). */
#include "daemon/model/tokenizer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define EXPECTED_TOKEN_BYTES 4
#define MIN_OUT_TOKENS       16
#define MIN_SYMBOLS          64
#define HEAP_PER_SYMBOL      2 /* n - 1 at first; each merge takes one away and adds two */

int scratch_init(struct scratch *s, const struct tokenizer *t, size_t text_bytes, size_t max_tokens)
{
    *s = (struct scratch){.max_tokens = max_tokens};
    int rc = word_cache_init(&s->cache, text_bytes);
    s->out_capacity = text_bytes / EXPECTED_TOKEN_BYTES + MIN_OUT_TOKENS;
    s->out = malloc(s->out_capacity * sizeof(*s->out));
    if (!s->out) {
        rc = -ENOMEM;
    }
    if (rc == 0 && t->pre) {
        rc = pre_scratch_create(t->pre, &s->pre);
    }
    if (rc < 0) {
        scratch_finish(s);
    }
    return rc;
}

void scratch_finish(struct scratch *s)
{
    free(s->out);
    free(s->symbols);
    free(s->heap);
    free(s->word);
    free(s->lattice);
    word_cache_finish(&s->cache);
    while (s->blocks) {
        struct scratch_block *next = s->blocks->next;
        free(s->blocks);
        s->blocks = next;
    }
    pre_scratch_destroy(s->pre);
}

char *scratch_keep(struct scratch *s, size_t bytes)
{
    struct scratch_block *block = malloc(sizeof(*block) + bytes);
    if (!block) {
        return NULL;
    }
    block->next = s->blocks;
    s->blocks = block;
    return block->data;
}

int scratch_push_slowly(struct scratch *s, int32_t token)
{
    if (s->n_out == s->max_tokens) {
        return -E2BIG;
    }
    if (s->n_out == s->out_capacity) {
        int32_t *out = reallocarray(s->out, s->out_capacity * 2, sizeof(*out));
        if (!out) {
            return -ENOMEM;
        }
        s->out = out;
        s->out_capacity *= 2;
    }
    s->out[s->n_out++] = token;
    return 0;
}

static int reserve_symbols(struct scratch *s, size_t n)
{
    if (n <= s->symbol_capacity) {
        return 0;
    }
    size_t capacity = n * 2 > MIN_SYMBOLS ? n * 2 : MIN_SYMBOLS;
    struct symbol *symbols = reallocarray(s->symbols, capacity, sizeof(*symbols));
    if (!symbols) {
        return -ENOMEM;
    }
    s->symbols = symbols;
    struct merge_candidate *heap = reallocarray(s->heap, capacity * HEAP_PER_SYMBOL, sizeof(*heap));
    if (!heap) {
        return -ENOMEM;
    }
    s->heap = heap;
    s->symbol_capacity = capacity;
    return 0;
}

/* Best priority first, then the leftmost pair. */
static bool comes_before(const struct merge_candidate *a, const struct merge_candidate *b)
{
    return a->priority < b->priority || (a->priority == b->priority && a->left < b->left);
}

static void heap_push(struct scratch *s, struct merge_candidate c)
{
    size_t i = s->n_heap++;
    while (i > 0) {
        size_t parent = (i - 1) / 2;
        if (!comes_before(&c, &s->heap[parent])) {
            break;
        }
        s->heap[i] = s->heap[parent];
        i = parent;
    }
    s->heap[i] = c;
}

static struct merge_candidate heap_pop(struct scratch *s)
{
    struct merge_candidate top = s->heap[0];
    struct merge_candidate moved = s->heap[--s->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= s->n_heap) {
            break;
        }
        if (child + 1 < s->n_heap && comes_before(&s->heap[child + 1], &s->heap[child])) {
            child++;
        }
        if (!comes_before(&s->heap[child], &moved)) {
            break;
        }
        s->heap[i] = s->heap[child];
        i = child;
    }
    s->heap[i] = moved;
    return top;
}

static void queue_pair(const struct tokenizer *t, struct scratch *s,
                       const struct merge_rules *rules, const char *word, uint32_t left,
                       uint32_t right)
{
    if (left == SYMBOL_END || right == SYMBOL_END) {
        return;
    }
    s->n_steps++;
    const struct symbol *l = &s->symbols[left], *r = &s->symbols[right];
    struct merge_candidate c = {.left = left, .right = right, .bytes = l->bytes + r->bytes};
    if (rules->may_merge(t, word, l, r, &c.priority, &c.token)) {
        heap_push(s, c);
    }
}

static void merge_all(const struct tokenizer *t, struct scratch *s, const struct merge_rules *rules,
                      const char *word)
{
    s->n_heap = 0;
    for (uint32_t i = 1; i < s->n_symbols; i++) {
        queue_pair(t, s, rules, word, i - 1, i);
    }
    while (s->n_heap > 0) {
        struct merge_candidate c = heap_pop(s);
        struct symbol *l = &s->symbols[c.left], *r = &s->symbols[c.right];
        if (l->bytes == 0 || r->bytes == 0 || l->bytes + r->bytes != c.bytes) {
            continue;
        }
        l->bytes = c.bytes;
        l->token = c.token;
        l->next = r->next;
        r->bytes = 0;
        if (l->next != SYMBOL_END) {
            s->symbols[l->next].prev = c.left;
        }
        queue_pair(t, s, rules, word, l->prev, c.left);
        queue_pair(t, s, rules, word, c.left, l->next);
    }
}

int tokenizer_push_bytes(const struct tokenizer *t, struct scratch *s, const char *bytes, size_t n)
{
    const unsigned char *p = (const unsigned char *)bytes;
    for (size_t i = 0; i < n; i++) {
        if (t->byte_token[p[i]] == TOKEN_NONE) {
            return t->unk == TOKEN_NONE ? -EILSEQ : scratch_push(s, t->unk);
        }
    }
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++) {
        rc = scratch_push(s, t->byte_token[p[i]]);
    }
    return rc;
}

int tokenizer_merge_word(const struct tokenizer *t, struct scratch *s,
                         const struct merge_rules *rules, const char *word, size_t bytes)
{
    int rc = reserve_symbols(s, bytes);
    if (rc < 0) {
        return rc;
    }
    s->n_symbols = rules->split(t, s->symbols, word, bytes);
    merge_all(t, s, rules, word);
    for (uint32_t i = 0; i != SYMBOL_END && rc == 0; i = s->symbols[i].next) {
        const struct symbol *y = &s->symbols[i];
        rc = y->token != TOKEN_NONE ? scratch_push(s, y->token)
                                    : tokenizer_push_bytes(t, s, word + y->start, y->bytes);
    }
    return rc;
}
