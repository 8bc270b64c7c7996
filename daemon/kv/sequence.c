#include "daemon/kv/sequence.h"

#include "daemon/kv/cache_internal.h"
#include "daemon/kv/sequence_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void kv_sequence_init(struct kv_sequence *s, const struct kv_layout *layout, struct kv_cache *cache,
                      struct kv_space *space, bool exact)
{
    memset(s, 0, sizeof(*s));
    s->layout = layout;
    s->cache = cache;
    s->space = space;
    s->exact = exact;
    s->miss = space != NULL ? KV_MISS_NONE : KV_MISS_OFF;
    if (space != NULL) {
        space->n_holders++;
        s->last_key = space->tree.root->key;
    }
}

void kv_list_give_back(struct kv_sequence *s, uint32_t layer_class, uint32_t first_live)
{
    struct kv_block_list *list = &s->lists[layer_class];
    for (; list->first_live < first_live && list->first_live < list->n; list->first_live++) {
        uint32_t i = list->first_live;
        atomic_fetch_sub(&s->cache->blocks_held, list->pages[i] != NULL);
        kv_block_unref(kv_cache_arena(s->cache), list->blocks[i]);
        list->blocks[i] = NULL;
        list->pages[i] = NULL;
        if (i < s->n_sealed) {
            kv_space_release_saved(s->space, s->nodes[i], layer_class);
        }
    }
}

static void release_all(struct kv_sequence *s)
{
    for (uint32_t c = 0; s->layout != NULL && c < s->layout->n_classes; c++) {
        s->lists[c].first_live = s->view.begun ? 0 : s->lists[c].first_live; /* the sinks too */
        kv_list_give_back(s, c, s->lists[c].n);
        s->lists[c].n = s->lists[c].first_live = s->lists[c].n_dropped = 0;
        s->tables[c] = (struct gqa_page_table){0};
    }
    while (s->n_sealed > 0) { /* leaves first: an empty node goes when its children have gone */
        struct kv_node *n = s->nodes[--s->n_sealed];
        n->users--;
        kv_space_prune(s->space, n);
    }
    s->n_tokens = 0;
    kv_view_reset(s);
}

void kv_sequence_reset(struct kv_sequence *s)
{
    release_all(s);
    s->sealing_failed = s->detached;
    if (s->space != NULL) {
        s->last_key = s->space->tree.root->key;
    }
}

void kv_sequence_detach(struct kv_sequence *s)
{
    s->detached = s->sealing_failed = true;
}

void kv_sequence_finish(struct kv_sequence *s)
{
    release_all(s);
    if (s->space != NULL) {
        s->space->n_holders--;
    }
    for (uint32_t c = 0; c < KV_MAX_CLASSES; c++) {
        free(s->lists[c].blocks);
        free(s->lists[c].pages);
        free(s->lists[c].versions);
    }
    free(s->nodes);
    memset(s, 0, sizeof(*s));
}

static uint32_t blocks_for(uint32_t n_tokens)
{
    return n_tokens / GQA_KV_BLOCK_TOKENS + (n_tokens % GQA_KV_BLOCK_TOKENS != 0);
}

int kv_list_grow(struct kv_block_list *list, uint32_t n)
{
    if (n <= list->capacity) {
        return 0;
    }
    uint32_t capacity = list->capacity * 2 > n ? list->capacity * 2 : n;
    struct kv_block **blocks = realloc(list->blocks, capacity * sizeof(*blocks));
    if (blocks == NULL) {
        return -ENOMEM;
    }
    list->blocks = blocks;
    void **pages = realloc(list->pages, capacity * sizeof(*pages));
    if (pages == NULL) {
        return -ENOMEM;
    }
    list->pages = pages;
    uint64_t *versions = realloc(list->versions, capacity * sizeof(*versions));
    if (versions == NULL) {
        return -ENOMEM;
    }
    list->versions = versions;
    list->capacity = capacity;
    return 0;
}

void kv_sequence_set_tables(struct kv_sequence *s)
{
    for (uint32_t c = 0; c < s->layout->n_classes; c++) {
        struct kv_block_list *list = &s->lists[c];
        bool is_view = s->view.begun && s->layout->classes[c].desc.window == 0;
        s->tables[c] = (struct gqa_page_table){
            .n_pages = list->n,
            .pages = list->pages,
            .n_dropped = list->n_dropped,
            .versions = list->versions,
        };
        if (is_view && s->view.recent > 0) {
            s->tables[c].n_sinks = s->view.n_sinks;
            s->tables[c].recent = s->view.recent;
            s->tables[c].turned = s->view.policy.cache_positions;
        }
    }
}

int kv_sequence_reserve(struct kv_sequence *s, uint32_t n_new)
{
    int rc = 0;
    for (uint32_t c = 0; rc == 0 && c < s->layout->n_classes; c++) {
        struct kv_block_list *list = &s->lists[c];
        uint32_t n_blocks = blocks_for(s->n_tokens - list->n_dropped + n_new);
        rc = kv_list_grow(list, n_blocks);
        while (rc == 0 && list->n < n_blocks) {
            struct kv_block *block;
            rc = kv_cache_alloc(s->cache, s->layout->classes[c].block_bytes, &block);
            if (rc == 0) {
                list->blocks[list->n] = block;
                list->pages[list->n] = block->data;
                list->versions[list->n] = block->version;
                list->n++;
                atomic_fetch_add(&s->cache->blocks_held, 1);
            }
        }
    }
    kv_sequence_set_tables(s);
    return rc;
}

void kv_sequence_leave_windows(struct kv_sequence *s)
{
    for (uint32_t c = 0; c < s->layout->n_classes; c++) {
        uint32_t window = s->layout->classes[c].desc.window;
        uint32_t n_slots = s->n_tokens - s->lists[c].n_dropped;
        if (window > 0) {
            kv_list_give_back(s, c, kv_first_needed(window, n_slots));
        }
    }
    kv_view_slide(s);
}

void kv_sequence_commit(struct kv_sequence *s, uint32_t n_new, const struct kv_text *text)
{
    s->n_tokens += n_new;
    if (s->space != NULL) {
        kv_sequence_seal(s, text);
    }
    kv_sequence_leave_windows(s);
}

static uint64_t blocks_held(const struct kv_extent *e, uint32_t window)
{
    return kv_policy_blocks(e->policy, window, e->n_prompt, e->n_tokens, e->step_rows, e->begun);
}

uint64_t kv_sequence_aside_bytes(const struct kv_layout *layout, const struct kv_extent *e)
{
    return e->begun ? 0 : kv_view_votes_bytes(layout, e->policy, e->n_prompt);
}

uint64_t kv_sequence_block_bytes(const struct kv_layout *layout, const struct kv_extent *extent)
{
    uint64_t bytes = 0;
    for (uint32_t c = 0; c < layout->n_classes; c++) {
        const struct kv_class *class = &layout->classes[c];
        bytes += class->block_bytes * blocks_held(extent, class->desc.window);
    }
    return bytes;
}

uint64_t kv_sequence_bytes_for(const struct kv_layout *layout, const struct kv_extent *extent)
{
    uint64_t bytes = kv_sequence_aside_bytes(layout, extent);
    for (uint32_t c = 0; c < layout->n_classes; c++) {
        const struct kv_class *class = &layout->classes[c];
        uint64_t of_class =
            kv_arena_bytes_for(class->block_bytes, blocks_held(extent, class->desc.window));
        if (__builtin_add_overflow(bytes, of_class, &bytes)) {
            return UINT64_MAX;
        }
    }
    return bytes;
}
