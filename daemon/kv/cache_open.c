/* daemon/kv/cache_open.c - stores are opened and closed by the io thread, and what their indices
 * name goes into the trees. */
#include "daemon/kv/cache_internal.h"

#include "daemon/io/io.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OPEN_RETRY_NS (30ull * 1000000000u)

/* ---- opening ----------------------------------------------------------------------------- */

/* What the io thread tells when it has closed a store. It outlives the space. */
struct kv_closing {
    struct kv_news news;
    struct kv_cache *cache;
};

struct opening {
    struct kv_news news;
    struct io_call_job call;
    struct kv_space *space;
    struct kv_closing *closing; /* for the store's end, which so needs no memory */
    char folder[4096];
    char name[KV_STORE_NAME_MAX + 1];
    struct kv_store_identity identity;
    struct kv_store *store;
    struct kv_store_block *blocks; /* what the index names; then orphans at its beginning */
    size_t n_blocks, capacity;
    size_t n_added, n_orphans, n_linked;
    int result;
    struct fmt_error err;
};

static void free_opening(struct opening *o)
{
    free(o->closing);
    free(o->blocks);
    free(o);
}

static void on_block(void *arg, const struct kv_store_block *block)
{
    struct opening *o = arg;
    if (o->n_blocks == o->capacity) {
        size_t capacity = o->capacity > 0 ? 2 * o->capacity : 256;
        struct kv_store_block *blocks = realloc(o->blocks, capacity * sizeof(*blocks));
        if (blocks == NULL) {
            return; /* the store has it, the tree does not: its slot is idle until the next open */
        }
        o->blocks = blocks;
        o->capacity = capacity;
    }
    o->blocks[o->n_blocks++] = *block;
}

/* The io thread. */
static int open_store(void *arg)
{
    struct opening *o = arg;
    const struct kv_cache_options *c = &o->space->cache->options;
    const struct kv_store_options options = {
        .folder = o->folder,
        .name = o->name,
        .identity = &o->identity,
        .io = c->io,
        .bytes_max = c->store_bytes_per_realm != 0 && c->store_bytes_per_realm < c->store_bytes_max
                         ? c->store_bytes_per_realm
                         : c->store_bytes_max,
    };
    return kv_store_open(&options, on_block, o, &o->store, &o->err);
}

static void open_done(void *arg, int result)
{
    struct opening *o = arg;
    o->result = result;
    kv_cache_post(o->space->cache, &o->news);
}

/* Puts a block that the index names into the tree. Returns whether its parent is not known. */
static bool add_restored(struct kv_space *s, const struct kv_store_block *b)
{
    struct kv_node *node = NULL;
    int rc = kv_tree_insert(&s->tree, b->key, b->parent, b->position, b->flags, b->tokens, &node);
    bool foreign = rc == -EEXIST && memcmp(node->tokens, b->tokens, sizeof(b->tokens)) != 0;
    if ((rc < 0 && rc != -EEXIST) || foreign || node->places[b->layer_class].state != KV_UNSAVED) {
        return false;
    }
    if (rc == 0) {
        node->hits = b->hits;
        node->used_s = b->used_s;
        atomic_fetch_add(&s->cache->n_nodes, 1);
    }
    struct kv_place *p = &node->places[b->layer_class];
    p->state = KV_SAVED;
    p->verified = false;
    p->slot = b->slot;
    p->checksum = b->checksum;
    if (b->flags & KV_BLOCK_PINNED) {
        kv_space_pin(s, node, true);
    }
    kv_space_count_saved(s, b->layer_class, true);
    kv_space_count_synced(s, b->layer_class, true);
    return rc == 0 && node->parent == NULL;
}

static void link_orphan(struct kv_space *s, const struct kv_store_block *b)
{
    struct kv_node *node = kv_tree_find(&s->tree, b->key, b->tokens);
    if (node != NULL) { /* not evicted meanwhile */
        kv_tree_link_orphans(&s->tree, &b->parent, &node, 1);
    }
}

/* A part of what the index names, so that the engine's steps go on in between. Parents come before
 * children, as a rule; the others find theirs in the end. False: that was all. */
static bool add_some_restored(struct kv_space *s, struct opening *o)
{
    for (uint32_t i = 0; i < s->cache->n_restored_max; i++) {
        if (o->n_added < o->n_blocks) {
            const struct kv_store_block *b = &o->blocks[o->n_added++];
            if (add_restored(s, b)) {
                o->blocks[o->n_orphans++] = *b; /* its own place, or one that was added before */
            }
        } else if (o->n_linked < o->n_orphans) {
            link_orphan(s, &o->blocks[o->n_linked++]);
        } else {
            return false;
        }
    }
    return o->n_added < o->n_blocks || o->n_linked < o->n_orphans;
}

/* The space is open when all is known that its store has: who asks before would compute it. */
static void take_opened(struct kv_news *news)
{
    struct opening *o = (struct opening *)news;
    struct kv_space *s = o->space;
    if (o->result == 0) {
        if (s->store == NULL) {
            s->store = o->store;
            s->closing = o->closing;
            o->closing = NULL;
            kv_tree_reserve(&s->tree, (uint32_t)o->n_blocks);
        }
        if (add_some_restored(s, o) && !s->cache->closing) {
            kv_cache_post(s->cache, &o->news);
            return;
        }
        s->state = KV_SPACE_OPEN;
        kv_space_set_trouble(s, "");
        kv_space_save_backlog(s);
    } else {
        s->state = KV_SPACE_FAILED;
        s->retry_ns = kv_now_ns() + OPEN_RETRY_NS;
        kv_space_set_trouble(s, o->err.text);
    }
    kv_space_end_job(s);
    free_opening(o);
}

void kv_space_store_name(const struct kv_space *s, char name[KV_STORE_NAME_MAX + 1])
{
    for (size_t i = 0; i < sizeof(s->identity.id); i++) {
        snprintf(name + 2 * i, 3, "%02x", s->identity.id[i]);
    }
}

static void note_opening(struct kv_space *s)
{
    s->state = KV_SPACE_OPENING;
    s->overdue = false;
    s->opening_ns = kv_now_ns();
}

void kv_space_open(struct kv_space *s)
{
    struct kv_cache *c = s->cache;
    if (c->folder == NULL || c->options.io == NULL) {
        s->state = KV_SPACE_RAM;
        return;
    }
    if (kv_cache_is_purging(c, s->realm)) {
        note_opening(s);
        s->awaits_purge = true;
        return;
    }
    struct opening *o = calloc(1, sizeof(*o));
    struct kv_closing *closing = calloc(1, sizeof(*closing));
    if (o == NULL || closing == NULL) {
        free(o);
        free(closing);
        s->state = KV_SPACE_FAILED;
        s->retry_ns = kv_now_ns() + OPEN_RETRY_NS;
        return;
    }
    o->closing = closing;
    o->news.take = take_opened;
    o->space = s;
    snprintf(o->folder, sizeof(o->folder), "%s/%s", c->folder, s->realm);
    kv_space_store_name(s, o->name);
    memcpy(o->identity.id, s->identity.id, sizeof(o->identity.id));
    o->identity.layout_version = GQA_KV_LAYOUT_VERSION;
    o->identity.n_classes = s->n_classes;
    memcpy(o->identity.block_bytes, s->block_bytes, sizeof(o->identity.block_bytes));
    snprintf(o->identity.about, sizeof(o->identity.about), "%s", s->identity.about);
    o->call = (struct io_call_job){.fn = open_store, .done = open_done, .arg = o};
    kv_space_begin_job(s);
    if (io_submit_call(c->options.io, &o->call) < 0) {
        kv_space_end_job(s);
        free_opening(o);
        s->state = KV_SPACE_RAM; /* the io thread ends, and so does the daemon */
        return;
    }
    note_opening(s);
}

/* ---- closing ----------------------------------------------------------------------------- */

static void closed(struct kv_space *s)
{
    s->store = NULL;
    s->closing = NULL;
    atomic_fetch_sub(&s->cache->store_bytes, s->saved_bytes);
    atomic_fetch_sub(&s->cache->store_bytes_synced, s->synced_bytes);
    s->saved_bytes = s->synced_bytes = 0;
    s->state = KV_SPACE_RAM;
}

static void take_closed(struct kv_news *news)
{
    struct kv_closing *g = (struct kv_closing *)news;
    g->cache->n_closing--;
    g->cache->n_pending--;
    free(g);
}

static void close_done(void *arg)
{
    struct kv_closing *g = arg;
    kv_cache_post(g->cache, &g->news);
}

bool kv_space_begin_close(struct kv_space *s)
{
    struct kv_cache *c = s->cache;
    if (s->store == NULL) {
        closed(s);
        return true;
    }
    if (c->n_closing >= KV_CLOSING_MAX) {
        return false;
    }
    struct kv_closing *g = s->closing;
    *g = (struct kv_closing){.news.take = take_closed, .cache = c};
    kv_folder_closes(c, s);
    c->n_closing++;
    c->n_pending++;
    if (kv_store_close_begin(s->store, close_done, g) < 0) { /* the io thread ends: it runs here */
        take_closed(&g->news);
        kv_store_close(s->store);
    }
    closed(s);
    return true;
}
