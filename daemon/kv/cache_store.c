/* daemon/kv/cache_store.c - what the cache has the io thread do: open stores and save blocks.
 *
 * A job lives from its submission until its news are taken in; meanwhile the space and the node
 * that it points to stay (n_pending, SAVING). */
#include "daemon/kv/cache_internal.h"

#include "daemon/io/io.h"
#include "daemon/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OPEN_RETRY_NS (30ull * 1000000000u)
#define SAVE_RETRY_NS (4ull * 1000000000u) /* a little after the store's own pause */
#define EVICT_PART    64u                  /* of a bound, at once: a scan costs more than a block */

/* Notes why nothing is saved ("": it is), and logs it once. */
static void set_trouble(struct kv_space *s, const char *why)
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

static void count_saved(struct kv_space *s, uint32_t layer_class, bool more)
{
    uint64_t bytes = s->block_bytes[layer_class];
    s->saved_bytes += more ? bytes : -bytes;
    atomic_fetch_add(&s->cache->store_bytes, more ? bytes : -bytes);
}

static void count_synced(struct kv_space *s, uint32_t layer_class, bool more)
{
    uint64_t bytes = s->block_bytes[layer_class];
    s->synced_bytes += more ? bytes : -bytes;
    atomic_fetch_add(&s->cache->store_bytes_synced, more ? bytes : -bytes);
}

/* ---- opening ----------------------------------------------------------------------------- */

struct opening {
    struct kv_news news;
    struct io_call_job call;
    struct kv_space *space;
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
    count_saved(s, b->layer_class, true);
    count_synced(s, b->layer_class, true);
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
            kv_tree_reserve(&s->tree, (uint32_t)o->n_blocks);
        }
        if (add_some_restored(s, o) && !s->cache->closing) {
            kv_cache_post(s->cache, &o->news);
            return;
        }
        s->state = KV_SPACE_OPEN;
        set_trouble(s, "");
        kv_space_save_backlog(s);
    } else {
        s->state = KV_SPACE_FAILED;
        s->retry_ns = kv_now_ns() + OPEN_RETRY_NS;
        set_trouble(s, o->err.text);
    }
    kv_space_end_job(s);
    free(o->blocks);
    free(o);
}

void kv_space_store_name(const struct kv_space *s, char name[KV_STORE_NAME_MAX + 1])
{
    for (size_t i = 0; i < sizeof(s->identity.id); i++) {
        snprintf(name + 2 * i, 3, "%02x", s->identity.id[i]);
    }
}

void kv_space_open(struct kv_space *s)
{
    struct kv_cache *c = s->cache;
    if (c->folder == NULL || c->options.io == NULL) {
        s->state = KV_SPACE_RAM;
        return;
    }
    if (kv_cache_is_purging(c, s->realm)) {
        s->state = KV_SPACE_OPENING;
        s->awaits_purge = true;
        return;
    }
    struct opening *o = calloc(1, sizeof(*o));
    if (o == NULL) {
        s->state = KV_SPACE_FAILED;
        s->retry_ns = kv_now_ns() + OPEN_RETRY_NS;
        return;
    }
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
        free(o);
        s->state = KV_SPACE_RAM; /* the io thread ends, and so does the daemon */
        return;
    }
    s->state = KV_SPACE_OPENING;
}

/* ---- closing ----------------------------------------------------------------------------- */

static void closed(struct kv_space *s)
{
    s->store = NULL;
    atomic_fetch_sub(&s->cache->store_bytes, s->saved_bytes);
    atomic_fetch_sub(&s->cache->store_bytes_synced, s->synced_bytes);
    s->saved_bytes = s->synced_bytes = 0;
    s->state = KV_SPACE_RAM;
}

void kv_space_close(struct kv_space *s)
{
    kv_store_close(s->store);
    closed(s);
}

struct closing {
    struct kv_news news;
    struct kv_cache *cache;
};

static void take_closed(struct kv_news *news)
{
    struct closing *g = (struct closing *)news;
    g->cache->n_closing--;
    g->cache->n_pending--;
    free(g);
}

static void close_done(void *arg)
{
    struct closing *g = arg;
    kv_cache_post(g->cache, &g->news);
}

bool kv_space_begin_close(struct kv_space *s)
{
    struct kv_cache *c = s->cache;
    if (s->store == NULL) {
        closed(s);
        return true;
    }
    struct closing *g = c->n_closing < KV_CLOSING_MAX ? malloc(sizeof(*g)) : NULL;
    if (g == NULL) {
        return false;
    }
    *g = (struct closing){.news.take = take_closed, .cache = c};
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
        count_synced(s, layer_class, true);
        if (kv_store_marked(s->store, &w->write.block)) {
            kv_space_forget(s, w->node, layer_class); /* the file was cut since */
        }
        atomic_fetch_add(&s->cache->n_saved_bytes, s->block_bytes[layer_class]);
        if (w->write.block.flags != w->node->flags) {
            kv_space_note_flags(s, w->node); /* pinned meanwhile */
        }
        kv_space_release_saved(s, w->node, layer_class);
        set_trouble(s, "");
    } else {
        p->state = KV_UNSAVED;
        count_saved(s, layer_class, false);
        if (w->result == -EDQUOT) {
            make_slots(s, layer_class, stats.bytes_max);
        }
        postpone(s, p);
        if (w->result != -EDQUOT && w->result != -ECANCELED) {
            set_trouble(s, stats.sentence[0] != '\0' ? stats.sentence : strerror(-w->result));
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
    count_saved(s, layer_class, true);
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

static bool has_unsaved(const struct kv_space *s, const struct kv_node *n)
{
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
    size_t count, n = 0;
    struct kv_node **nodes = kv_tree_by_position(&s->tree, &count);
    if (nodes == NULL) {
        s->retry_ns = kv_now_ns() + SAVE_RETRY_NS;
        return;
    }
    s->backlog = false;
    for (size_t i = 0; i < count; i++) {
        if (has_unsaved(s, nodes[i])) {
            nodes[i]->users++;
            nodes[n++] = nodes[i];
        }
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
    count_saved(s, layer_class, false);
    count_synced(s, layer_class, false);
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
