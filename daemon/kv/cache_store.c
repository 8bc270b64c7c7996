/* daemon/kv/cache_store.c - what the cache has the io thread do: save blocks, and forget them.
 *
 * A job lives from its submission until its news are taken in; meanwhile the space and the node
 * that it points to stay (n_pending, SAVING). */
#include "daemon/kv/cache_internal.h"

#include "daemon/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SAVE_RETRY_NS (4ull * 1000000000u) /* a little after the store's own pause */
#define EVICT_PART    64u                  /* of a bound, at once: a scan costs more than a block */

void kv_space_set_trouble(struct kv_space *s, const char *why)
{
    if (strcmp(s->trouble, why) == 0) {
        return;
    }
    snprintf(s->trouble, sizeof(s->trouble), "%s", why);
    if (why[0] != '\0') {
        log_warning("KV cache of %s: blocks are not saved: %s", s->realm, why);
    } else {
        log_info("KV cache of %s: blocks are saved again", s->realm);
    }
    struct kv_cache *c = s->cache;
    const char *shown = why;
    for (const struct kv_space *other = c->spaces; other != NULL && shown[0] == '\0';
         other = other->next) {
        shown = other->trouble;
    }
    pthread_mutex_lock(&c->lock);
    snprintf(c->trouble, sizeof(c->trouble), "%s", shown);
    pthread_mutex_unlock(&c->lock);
}

void kv_space_count_saved(struct kv_space *s, uint32_t layer_class, bool more)
{
    uint64_t bytes = s->block_bytes[layer_class];
    s->saved_bytes += more ? bytes : -bytes;
    atomic_fetch_add(&s->cache->store_bytes, more ? bytes : -bytes);
}

void kv_space_count_synced(struct kv_space *s, uint32_t layer_class, bool more)
{
    uint64_t bytes = s->block_bytes[layer_class];
    s->synced_bytes += more ? bytes : -bytes;
    atomic_fetch_add(&s->cache->store_bytes_synced, more ? bytes : -bytes);
}

/* ---- saving ------------------------------------------------------------------------------ */

struct saving {
    struct kv_news news;
    struct kv_store_write write;
    struct kv_space *space;
    struct kv_node *node;
    struct kv_block *block; /* with a reference */
    int result;
};

static void save_done(void *arg, int result)
{
    struct saving *w = arg;
    w->result = result;
    kv_cache_post(w->space->cache, &w->news);
}

/* Adds what the store has written since the last time. */
static void count_written(struct kv_space *s, const struct kv_store_stats *stats)
{
    uint64_t written = stats->bytes_data_written + stats->bytes_index_written;
    atomic_fetch_add(&s->cache->store_bytes_written, written - s->written_bytes);
    s->written_bytes = written;
}

/* The place's block is to be saved when the disk is well again, or when there is room: both may
 * come without news. */
static void postpone(struct kv_space *s, struct kv_place *p)
{
    p->wanted = true;
    s->backlog = true;
    if (s->state == KV_SPACE_OPEN && s->retry_ns == 0) {
        s->retry_ns = kv_now_ns() + SAVE_RETRY_NS;
    }
}

/* The store has no slot left, though the bounds allow more bytes: its index and what pads the files
 * count there. Once for all writes that were under way. */
static void make_slots(struct kv_space *s, uint32_t layer_class, uint64_t bytes_max)
{
    uint64_t now = kv_now_ns();
    if (s->retry_ns == 0) {
        bool some = kv_space_evict_store(s, layer_class,
                                         s->block_bytes[layer_class] + bytes_max / EVICT_PART) > 0;
        s->retry_ns = some ? now : now + SAVE_RETRY_NS; /* all of it is in use, or pinned */
    }
}

static void take_saved(struct kv_news *news)
{
    struct saving *w = (struct saving *)news;
    struct kv_space *s = w->space;
    uint32_t layer_class = w->write.block.layer_class;
    struct kv_place *p = &w->node->places[layer_class];
    struct kv_store_stats stats;
    kv_store_stats(s->store, &stats);
    count_written(s, &stats);
    kv_space_end_job(s);
    kv_block_unref(s->cache->arena, w->block);
    if (w->result == 0) {
        p->state = KV_SAVED;
        p->verified = true;
        p->slot = w->write.block.slot;
        p->checksum = w->write.block.checksum;
        kv_space_count_synced(s, layer_class, true);
        if (kv_store_marked(s->store, &w->write.block)) {
            kv_space_forget(s, w->node, layer_class); /* the file was cut since */
        }
        atomic_fetch_add(&s->cache->n_saved_bytes, s->block_bytes[layer_class]);
        if (w->write.block.flags != w->node->flags) {
            kv_space_note_flags(s, w->node); /* pinned meanwhile */
        }
        kv_space_release_saved(s, w->node, layer_class);
        kv_space_set_trouble(s, "");
    } else {
        p->state = KV_UNSAVED;
        kv_space_count_saved(s, layer_class, false);
        if (w->result == -EDQUOT) {
            make_slots(s, layer_class, stats.bytes_max);
        }
        postpone(s, p);
        if (w->result != -EDQUOT && w->result != -ECANCELED) {
            kv_space_set_trouble(s,
                                 stats.sentence[0] != '\0' ? stats.sentence : strerror(-w->result));
        }
    }
    free(w);
}

/* Bytes that all spaces, or those of one realm, have in their stores. */
static uint64_t bytes_saved(const struct kv_cache *c, const char *realm)
{
    uint64_t bytes = 0;
    for (const struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        bytes += realm == NULL || strcmp(s->realm, realm) == 0 ? s->saved_bytes : 0;
    }
    return bytes;
}

/* Evicts a little more than one block, since the scan costs more than that. */
static bool make_room_for(struct kv_cache *c, const char *realm, uint64_t bound, uint64_t bytes)
{
    if (bound == 0) {
        return true;
    }
    if (realm == NULL) {
        kv_folder_make_room(c, bytes);
    }
    uint64_t used = bytes_saved(c, realm);
    if (bytes <= bound && used <= bound - bytes) {
        return true;
    }
    kv_cache_evict_store(c, realm, bytes + bound / EVICT_PART);
    used = bytes_saved(c, realm);
    return bytes <= bound && used <= bound - bytes;
}

static int submit_write(struct kv_space *s, struct kv_node *n, uint32_t layer_class)
{
    struct kv_place *p = &n->places[layer_class];
    struct saving *w = calloc(1, sizeof(*w));
    if (w == NULL) {
        return -ENOMEM;
    }
    *w = (struct saving){
        .news.take = take_saved,
        .write = {.data = p->block->data, .done = save_done, .arg = w},
        .space = s,
        .node = n,
        .block = p->block,
    };
    struct kv_store_block *b = &w->write.block;
    *b = (struct kv_store_block){
        .key = n->key,
        .layer_class = layer_class,
        .flags = n->flags,
        .position = n->position,
        .used_s = n->used_s,
        .hits = n->hits,
    };
    if (n->parent != NULL && n->parent != s->tree.root) {
        b->parent = n->parent->key;
    }
    memcpy(b->tokens, n->tokens, sizeof(b->tokens));
    int rc = kv_store_write(s->store, &w->write);
    if (rc < 0) {
        free(w);
        return rc;
    }
    kv_block_ref(w->block);
    p->state = KV_SAVING;
    p->wanted = false;
    kv_space_count_saved(s, layer_class, true);
    kv_space_begin_job(s);
    return 0;
}

void kv_space_save(struct kv_space *s, struct kv_node *n, uint32_t layer_class)
{
    struct kv_cache *c = s->cache;
    struct kv_place *p = &n->places[layer_class];
    if (s->state == KV_SPACE_RAM || c->closing || p->state != KV_UNSAVED || p->block == NULL) {
        return;
    }
    uint64_t bytes = s->block_bytes[layer_class];
    bool room = s->state == KV_SPACE_OPEN && s->retry_ns == 0 &&
                make_room_for(c, NULL, c->options.store_bytes_max, bytes) &&
                make_room_for(c, s->realm, c->options.store_bytes_per_realm, bytes);
    if (!room || submit_write(s, n, layer_class) < 0) {
        postpone(s, p);
    }
}

/* A windowed class's block only where somebody goes on from: that was known when it was tried. */
static bool is_unsaved(const struct kv_space *s, const struct kv_node *n, uint32_t layer_class)
{
    const struct kv_place *p = &n->places[layer_class];
    return p->state == KV_UNSAVED && p->block != NULL &&
           (s->windows[layer_class] == 0 || p->wanted);
}

static bool has_unsaved(const void *arg, const struct kv_node *n)
{
    const struct kv_space *s = arg;
    for (uint32_t c = 0; c < s->n_classes; c++) {
        if (is_unsaved(s, n, c)) {
            return true;
        }
    }
    return false;
}

/* Parents first, so that a crash in the midst leaves prefixes. Saving makes room by forgetting what
 * nobody holds, and with it nodes: those that are still to be saved are held. */
void kv_space_save_backlog(struct kv_space *s)
{
    if (!s->backlog || s->state != KV_SPACE_OPEN || s->retry_ns != 0) {
        return;
    }
    size_t n;
    struct kv_node **nodes = kv_tree_by_position(&s->tree, has_unsaved, s, &n);
    if (nodes == NULL) {
        s->retry_ns = kv_now_ns() + SAVE_RETRY_NS;
        return;
    }
    s->backlog = false;
    for (size_t i = 0; i < n; i++) {
        nodes[i]->users++;
    }
    for (size_t i = 0; i < n && !s->backlog; i++) {
        for (uint32_t c = 0; c < s->n_classes; c++) {
            if (is_unsaved(s, nodes[i], c)) {
                kv_space_save(s, nodes[i], c);
            }
        }
    }
    for (size_t i = 0; i < n; i++) {
        nodes[i]->users--;
    }
    free(nodes);
}

void kv_space_save_windows(struct kv_space *s, struct kv_node *n)
{
    for (uint32_t c = 0; c < s->n_classes; c++) {
        uint32_t n_tokens = (n->position + 1) * GQA_KV_BLOCK_TOKENS;
        uint32_t first = kv_first_needed(s->windows[c], n_tokens);
        for (struct kv_node *at = n;
             s->windows[c] > 0 && at != NULL && at != s->tree.root && at->position >= first;
             at = at->parent) {
            kv_space_save(s, at, c);
        }
    }
}

void kv_space_forget(struct kv_space *s, struct kv_node *n, uint32_t layer_class)
{
    struct kv_place *p = &n->places[layer_class];
    struct kv_store_block b = {.layer_class = layer_class, .slot = p->slot, .key = n->key};
    kv_store_forget(s->store, &b);
    p->state = KV_UNSAVED;
    p->verified = false;
    kv_space_count_saved(s, layer_class, false);
    kv_space_count_synced(s, layer_class, false);
}

/* Calls fn for every block of the node that the store has. */
static void for_saved(struct kv_space *s, const struct kv_node *n,
                      void (*fn)(struct kv_store *store, const struct kv_store_block *block))
{
    for (uint32_t c = 0; c < s->n_classes; c++) {
        if (n->places[c].state == KV_SAVED) {
            const struct kv_store_block b = {
                .key = n->key,
                .layer_class = c,
                .slot = n->places[c].slot,
                .flags = n->flags,
                .hits = n->hits,
                .used_s = n->used_s,
            };
            fn(s->store, &b);
        }
    }
}

void kv_space_note_use(struct kv_space *s, const struct kv_node *n)
{
    for_saved(s, n, kv_store_use);
}

void kv_space_note_flags(struct kv_space *s, const struct kv_node *n)
{
    for_saved(s, n, kv_store_flag);
}
