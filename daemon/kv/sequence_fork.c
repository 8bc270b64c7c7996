/* daemon/kv/sequence_fork.c - a second sequence that begins with another's blocks. */
#include "daemon/kv/cache_internal.h"
#include "daemon/kv/sequence_internal.h"

#include <errno.h>
#include <string.h>

#define BLOCK GQA_KV_BLOCK_TOKENS

static uint32_t first_needed(const struct kv_sequence *s, uint32_t layer_class, uint32_t n_tokens)
{
    return kv_first_needed(s->layout->classes[layer_class].desc.window, n_tokens);
}

bool kv_sequence_can_fork(const struct kv_sequence *s, const struct kv_sequence *from,
                          uint32_t n_tokens)
{
    if (from->n_tokens < n_tokens || (s->exact && from->took_generated)) {
        return false;
    }
    for (uint32_t c = 0; c < from->layout->n_classes; c++) {
        if (from->lists[c].first_live > first_needed(from, c, n_tokens)) {
            return false; /* what it sees by now begins behind that */
        }
    }
    return true;
}

/* The first n blocks of a class, from the first one that later tokens see. */
static void share_blocks(struct kv_sequence *s, const struct kv_sequence *from, uint32_t c,
                         uint32_t n, uint32_t first_live)
{
    struct kv_block_list *list = &s->lists[c];
    const struct kv_block_list *theirs = &from->lists[c];
    for (uint32_t i = 0; i < n; i++) {
        bool seen = i >= first_live;
        list->blocks[i] =
            seen && theirs->blocks[i] != NULL ? kv_block_ref(theirs->blocks[i]) : NULL;
        list->pages[i] = seen ? theirs->pages[i] : NULL;
        list->versions[i] = theirs->versions[i];
        atomic_fetch_add(&s->cache->blocks_held, list->pages[i] != NULL);
    }
    list->n = n;
    list->first_live = first_live < n ? first_live : n;
}

/* The nodes keep pages of the store's mapping where they are. */
static void share_nodes(struct kv_sequence *s, const struct kv_sequence *from, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        s->nodes[i] = from->nodes[i];
        s->nodes[i]->users++;
        s->last_key = s->nodes[i]->key;
    }
    s->n_sealed = n;
    /* What follows has no parent in the tree, where some of it is not there. */
    s->sealing_failed = s->detached || s->sealing_failed || n < s->n_tokens / BLOCK;
}

/* Both will write behind it: each has a copy of its own. */
static void copy_rest(struct kv_sequence *s, const struct kv_sequence *from, uint32_t n_rest)
{
    uint32_t index = s->n_tokens / BLOCK;
    if (n_rest == 0 || kv_sequence_reserve(s, n_rest) < 0) {
        return; /* without memory it is computed instead */
    }
    for (uint32_t c = 0; c < s->layout->n_classes; c++) {
        memcpy(s->lists[c].pages[index], from->lists[c].pages[index],
               s->layout->classes[c].block_bytes);
    }
    s->n_tokens += n_rest;
}

int kv_sequence_fork(struct kv_sequence *s, const struct kv_sequence *from, uint32_t n_tokens)
{
    uint32_t n_blocks = n_tokens / BLOCK;
    uint32_t n_nodes = from->n_sealed < n_blocks ? from->n_sealed : n_blocks;
    if (s->n_tokens > 0 || s->lists[0].n > 0) {
        return -EBUSY;
    }
    for (uint32_t c = 0; c < s->layout->n_classes; c++) {
        if (kv_list_grow(&s->lists[c], n_blocks + 1) < 0) {
            return -ENOMEM;
        }
    }
    if (!kv_sequence_grow_nodes(s, n_nodes)) {
        return -ENOMEM;
    }
    for (uint32_t c = 0; c < s->layout->n_classes; c++) {
        share_blocks(s, from, c, n_blocks, first_needed(s, c, n_tokens));
    }
    s->n_tokens = n_blocks * BLOCK;
    s->took_generated = from->took_generated;
    s->miss = from->miss;
    if (s->space != NULL) {
        share_nodes(s, from, n_nodes);
    }
    copy_rest(s, from, n_tokens % BLOCK);
    kv_sequence_set_tables(s);
    return 0;
}
