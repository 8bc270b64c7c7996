#include "daemon/kv/sequence.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void kv_sequence_init(struct kv_sequence *s, const struct kv_layout *layout, struct kv_arena *arena)
{
    memset(s, 0, sizeof(*s));
    s->layout = layout;
    s->arena = arena;
}

void kv_sequence_finish(struct kv_sequence *s)
{
    for (uint32_t c = 0; c < KV_MAX_CLASSES; c++) {
        struct kv_block_list *list = &s->lists[c];
        for (uint32_t i = list->first_live; i < list->n; i++) {
            kv_block_unref(s->arena, list->blocks[i]);
        }
        free(list->blocks);
        free(list->pages);
    }
    memset(s, 0, sizeof(*s));
}

static uint64_t blocks_for(uint64_t n_tokens)
{
    return n_tokens / GQA_KV_BLOCK_TOKENS + (n_tokens % GQA_KV_BLOCK_TOKENS != 0);
}

static int list_grow(struct kv_block_list *list, uint32_t n)
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
    list->capacity = capacity;
    return 0;
}

int kv_sequence_reserve(struct kv_sequence *s, uint32_t n_new)
{
    uint32_t n_blocks = (uint32_t)blocks_for((uint64_t)s->n_tokens + n_new);
    int rc = 0;
    for (uint32_t c = 0; rc == 0 && c < s->layout->n_classes; c++) {
        struct kv_block_list *list = &s->lists[c];
        rc = list_grow(list, n_blocks);
        while (rc == 0 && list->n < n_blocks) {
            struct kv_block *block;
            rc = kv_arena_alloc(s->arena, s->layout->classes[c].block_bytes, &block);
            if (rc == 0) {
                list->blocks[list->n] = block;
                list->pages[list->n] = block->data;
                list->n++;
            }
        }
        s->tables[c] = (struct gqa_page_table){.n_pages = list->n, .pages = list->pages};
    }
    return rc;
}

void kv_sequence_commit(struct kv_sequence *s, uint32_t n_new)
{
    s->n_tokens += n_new;
    for (uint32_t c = 0; c < s->layout->n_classes; c++) {
        uint32_t window = s->layout->classes[c].desc.window;
        if (window == 0 || s->n_tokens < window) {
            continue;
        }
        /* The next token's position is n_tokens: it sees positions from n_tokens - window + 1. */
        uint32_t first_seen = s->n_tokens - window + 1;
        uint32_t first_live = first_seen / GQA_KV_BLOCK_TOKENS;
        struct kv_block_list *list = &s->lists[c];
        for (; list->first_live < first_live && list->first_live < list->n; list->first_live++) {
            kv_block_unref(s->arena, list->blocks[list->first_live]);
            list->blocks[list->first_live] = NULL;
            list->pages[list->first_live] = NULL;
        }
    }
}

uint64_t kv_sequence_bytes_for(const struct kv_layout *layout, uint64_t n_tokens)
{
    uint64_t bytes = 0;
    for (uint32_t c = 0; c < layout->n_classes; c++) {
        uint64_t of_class =
            kv_arena_bytes_for(layout->classes[c].block_bytes, blocks_for(n_tokens));
        if (__builtin_add_overflow(bytes, of_class, &bytes)) {
            return UINT64_MAX;
        }
    }
    return bytes;
}
