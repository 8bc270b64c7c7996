#include "daemon/kv/export.h"

#include "daemon/kv/cache_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define BLOCK GQA_KV_BLOCK_TOKENS

int kv_export_create(struct kv_cache *cache, struct kv_space *space, const struct kv_layout *layout,
                     const int32_t *tokens, size_t n_tokens, struct kv_export **ret)
{
    struct kv_export *x = calloc(1, sizeof(*x));
    if (x == NULL) {
        return -ENOMEM;
    }
    x->n_tokens = (uint32_t)(n_tokens / BLOCK * BLOCK);
    x->tokens = malloc((x->n_tokens + 1) * sizeof(*x->tokens));
    if (x->tokens == NULL) {
        free(x);
        return -ENOMEM;
    }
    memcpy(x->tokens, tokens, x->n_tokens * sizeof(*x->tokens));
    x->layout = *layout;
    x->layout.n_layers = 0;
    x->layout.layer_class = NULL;
    x->layout.layer_offset = NULL;
    x->news_seen = UINT64_MAX;
    pthread_mutex_init(&x->lock, NULL);
    kv_sequence_init(&x->sequence, &x->layout, cache, space, false);
    x->sequence.whole_blocks = true;
    *ret = x;
    return 0;
}

void kv_export_destroy(struct kv_export *x)
{
    if (x == NULL) {
        return;
    }
    kv_sequence_finish(&x->sequence);
    pthread_mutex_destroy(&x->lock);
    free(x->tokens);
    free(x->blocks);
    free(x);
}

/* ---- what is there ----------------------------------------------------------------------- */

static void add_block(struct kv_export *x, const struct kv_node *n, uint32_t layer_class,
                      const void *data)
{
    const struct kv_place *p = &n->places[layer_class];
    x->blocks[x->n_blocks++] = (struct kv_export_block){
        .data = data,
        .bytes = data != NULL ? x->layout.classes[layer_class].block_bytes : 0,
        .layer_class = layer_class,
        .position = n->position,
        .flags = n->flags & KV_BLOCK_GENERATED,
        .is_saved = data != NULL && p->state == KV_SAVED,
        .checksum = p->checksum,
    };
    x->bytes += x->blocks[x->n_blocks - 1].bytes;
}

/* A position whose blocks lie before all windows is told too: its tokens are a part of the prefix.
 */
static void list_blocks(struct kv_export *x)
{
    const struct kv_sequence *s = &x->sequence;
    uint32_t n_in_arena[KV_MAX_CLASSES] = {0};
    for (uint32_t i = 0; i < s->n_sealed; i++) {
        uint32_t before = x->n_blocks;
        for (uint32_t c = 0; c < x->layout.n_classes; c++) {
            if (s->lists[c].pages[i] != NULL) {
                add_block(x, s->nodes[i], c, s->lists[c].pages[i]);
                n_in_arena[c] += s->lists[c].blocks[i] != NULL;
            }
        }
        if (x->n_blocks == before) {
            add_block(x, s->nodes[i], 0, NULL);
        }
    }
    for (uint32_t c = 0; c < x->layout.n_classes; c++) {
        uint32_t n = n_in_arena[c];
        x->arena_bytes += n > 0 ? kv_arena_bytes_for(x->layout.classes[c].block_bytes, n) : 0;
    }
}

int kv_export_find(struct kv_export *x)
{
    struct kv_sequence *s = &x->sequence;
    uint64_t news = kv_cache_news(s->cache);
    if (!kv_space_is_ready(s->space) || x->news_seen == news) {
        return -EAGAIN;
    }
    x->news_seen = news;
    const struct kv_text text = {x->tokens, x->n_tokens, x->n_tokens};
    if (kv_sequence_adopt(s, &text, x->n_tokens, false) == -EAGAIN) {
        return -EAGAIN;
    }
    x->n_tokens = s->n_tokens;
    x->blocks = calloc((size_t)s->n_sealed * x->layout.n_classes + 1, sizeof(*x->blocks));
    if (x->blocks == NULL) {
        return -ENOMEM;
    }
    list_blocks(x);
    return 0;
}

bool kv_export_is_of(const struct kv_export *x, const char *realm)
{
    return strcmp(x->sequence.space->realm, realm) == 0;
}

bool kv_export_release(struct kv_export *x)
{
    if (pthread_mutex_trylock(&x->lock) != 0) {
        return false;
    }
    x->released = true;
    pthread_mutex_unlock(&x->lock);
    kv_sequence_reset(&x->sequence);
    return true;
}

/* ---- reading ----------------------------------------------------------------------------- */

int kv_export_checksum(struct kv_export *x, uint32_t index, uint64_t *ret)
{
    const struct kv_export_block *b = &x->blocks[index];
    int rc = -ECANCELED;
    pthread_mutex_lock(&x->lock);
    if (!x->released) {
        uint64_t checksum = b->bytes > 0 ? XXH3_64bits(b->data, b->bytes) : 0;
        rc = b->is_saved && checksum != b->checksum ? -EBADMSG : 0;
        *ret = rc == 0 ? checksum : *ret;
    }
    pthread_mutex_unlock(&x->lock);
    return rc;
}

int kv_export_read(struct kv_export *x, uint32_t index, uint64_t offset, size_t bytes, void *to)
{
    const struct kv_export_block *b = &x->blocks[index];
    int rc = -ECANCELED;
    pthread_mutex_lock(&x->lock);
    if (!x->released) {
        if (bytes > 0) {
            memcpy(to, (const char *)b->data + offset, bytes);
        }
        rc = 0;
    }
    pthread_mutex_unlock(&x->lock);
    return rc;
}
