/* daemon/kv/cache_evict.c - who gives way when the arena or the stores are full.
 *
 * A victim is one layer class's block of a node that no sequence uses. Interior blocks of windowed
 * classes go first: only who goes on from that very place misses them. Full classes are evicted
 * from the leaves, since a block is of no use without those before it; among leaves the one of the
 * least value goes: tokens saved (64 a block) times how often it was used, against its bytes and
 * the time since. */
#include "daemon/kv/cache_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct victim {
    struct kv_space *space;
    struct kv_node *node;
    uint32_t layer_class;
    double value;
};

struct victims {
    struct victim *items;
    size_t n, capacity;
};

void kv_space_drop_if_empty(struct kv_space *s, struct kv_node *n)
{
    for (uint32_t i = 0; i < s->n_classes; i++) {
        const struct kv_place *p = &n->places[i];
        if (kv_place_is_there(p) || p->state != KV_UNSAVED || p->checking) {
            return;
        }
    }
    if (n->users == 0 && n->first_child == NULL) {
        kv_tree_remove(&s->tree, n);
        atomic_fetch_sub(&s->cache->n_nodes, 1);
    }
}

void kv_space_drop_copy(struct kv_space *s, struct kv_node *n, uint32_t layer_class)
{
    struct kv_place *p = &n->places[layer_class];
    if (p->block != NULL) {
        kv_block_unref(s->cache->arena, p->block);
        p->block = NULL;
        atomic_fetch_sub(&s->cache->bytes_cached, s->block_bytes[layer_class]);
    }
}

void kv_space_release_saved(struct kv_space *s, struct kv_node *n, uint32_t layer_class)
{
    struct kv_place *p = &n->places[layer_class];
    if (p->state == KV_SAVED && p->block != NULL && p->block->refs == 1) {
        kv_space_drop_copy(s, n, layer_class);
    }
}

static bool is_interior_of_window(const struct kv_space *s, const struct kv_node *n, uint32_t c)
{
    return s->windows[c] > 0 && n->first_child != NULL;
}

/* Whether this place's block may go, and what it is worth. What others are at work on stays, and so
 * do pinned nodes. any: running requests need the room, and the leaves are no help (they are in the
 * store, say, while the disk refuses those before them): then also from the midst of a prefix, and
 * what is pinned. */
static bool may_go(const struct kv_space *s, const struct kv_node *n, uint32_t c, bool any,
                   uint64_t now_s, double *ret_value)
{
    const struct kv_place *p = &n->places[c];
    bool interior = is_interior_of_window(s, n, c);
    bool kept = (n->flags & KV_BLOCK_PINNED) || (n->first_child != NULL && !interior);
    if (n->users > 0 || p->state == KV_SAVING || p->checking || (kept && !any)) {
        return false;
    }
    double age = now_s > n->used_s ? (double)(now_s - n->used_s) : 0;
    double value = GQA_KV_BLOCK_TOKENS * (1.0 + n->hits) / ((double)s->block_bytes[c] * (1 + age));
    *ret_value = interior ? -1 / (1 + value) : value; /* below every other, in the same order */
    return true;
}

static bool add_victim(struct victims *v, const struct victim *item)
{
    if (v->n == v->capacity) {
        size_t capacity = v->capacity > 0 ? 2 * v->capacity : 256;
        struct victim *items = realloc(v->items, capacity * sizeof(*items));
        if (items == NULL) {
            return false;
        }
        v->items = items;
        v->capacity = capacity;
    }
    v->items[v->n++] = *item;
    return true;
}

static int by_value(const void *a, const void *b)
{
    const struct victim *x = a, *y = b;
    return x->value < y->value ? -1 : x->value > y->value;
}

/* Where room is to be made. */
struct scope {
    bool in_store;          /* else in the arena */
    const char *realm;      /* NULL: of all */
    struct kv_space *space; /* NULL: of all */
    uint32_t layer_class;   /* of that one's blocks; ALL_CLASSES */
};
#define ALL_CLASSES UINT32_MAX

static bool is_in(const struct scope *where, const struct kv_space *s)
{
    return (where->space == NULL || where->space == s) &&
           (where->realm == NULL || strcmp(s->realm, where->realm) == 0);
}

/* Collects what may go from one space. */
static void collect(struct kv_space *s, const struct scope *where, bool any, struct victims *v)
{
    uint64_t now_s = kv_now_s();
    uint32_t bucket = 0;
    for (struct kv_node *n = NULL; (n = kv_tree_next(&s->tree, &bucket, n)) != NULL;) {
        for (uint32_t c = 0; c < s->n_classes; c++) {
            const struct kv_place *p = &n->places[c];
            struct victim item = {s, n, c, 0};
            bool holds =
                where->in_store ? p->state == KV_SAVED : p->block != NULL && p->block->refs == 1;
            holds = holds && (where->layer_class == ALL_CLASSES || where->layer_class == c);
            if (holds && may_go(s, n, c, any, now_s, &item.value) && !add_victim(v, &item)) {
                return;
            }
        }
    }
}

/* Evicts victims in the order of their value until so many bytes are free. A node that is empty
 * afterwards makes its parent a leaf: the caller collects again. */
static uint64_t evict(struct victims *v, bool in_store, uint64_t bytes)
{
    uint64_t freed = 0;
    if (v->n > 0) {
        qsort(v->items, v->n, sizeof(*v->items), by_value);
    }
    for (size_t i = 0; i < v->n && freed < bytes; i++) {
        struct kv_space *s = v->items[i].space;
        uint32_t c = v->items[i].layer_class;
        if (in_store) {
            kv_space_forget(s, v->items[i].node, c);
            atomic_fetch_add(&s->cache->n_evicted_store, 1);
        } else {
            kv_space_drop_copy(s, v->items[i].node, c);
            atomic_fetch_add(&s->cache->n_evicted_arena, 1);
        }
        freed += s->block_bytes[c];
    }
    return freed;
}

/* Takes out the nodes that say nothing any more, so that their parents become leaves. */
static void sweep(const struct victims *v)
{
    for (size_t i = 0; i < v->n; i++) {
        bool last_of_node = i + 1 == v->n || v->items[i + 1].node != v->items[i].node;
        if (last_of_node) {
            kv_space_drop_if_empty(v->items[i].space, v->items[i].node);
        }
    }
}

static int by_node(const void *a, const void *b)
{
    const struct victim *x = a, *y = b;
    return x->node < y->node ? -1 : x->node > y->node;
}

static uint64_t evict_from(struct kv_cache *c, const struct scope *where, uint64_t bytes)
{
    uint64_t freed = 0;
    bool any = false, in_store = where->in_store;
    struct victims v = {NULL, 0, 0};
    while (freed < bytes) {
        v.n = 0;
        for (struct kv_space *s = c->spaces; s != NULL; s = s->next) {
            if (is_in(where, s)) {
                collect(s, where, any, &v);
            }
        }
        uint64_t round = evict(&v, in_store, bytes - freed);
        freed += round;
        if (v.n > 0) {
            qsort(v.items, v.n, sizeof(*v.items), by_node);
        }
        sweep(&v);
        if (round == 0 && (any || in_store)) {
            break;
        }
        any = round == 0;
    }
    free(v.items);
    return freed;
}

uint64_t kv_cache_evict_arena(struct kv_cache *c, uint64_t bytes)
{
    const struct scope where = {.layer_class = ALL_CLASSES};
    return evict_from(c, &where, bytes);
}

uint64_t kv_cache_evict_store(struct kv_cache *c, const char *realm, uint64_t bytes)
{
    const struct scope where = {.in_store = true, .realm = realm, .layer_class = ALL_CLASSES};
    return evict_from(c, &where, bytes);
}

uint64_t kv_space_evict_store(struct kv_space *s, uint32_t layer_class, uint64_t bytes)
{
    const struct scope where = {.in_store = true, .space = s, .layer_class = layer_class};
    return evict_from(s->cache, &where, bytes);
}

uint64_t kv_cache_pinned_bytes(const struct kv_cache *c)
{
    uint64_t bytes = 0;
    for (const struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        uint32_t bucket = 0;
        for (struct kv_node *n = NULL; (n = kv_tree_next(&s->tree, &bucket, n)) != NULL;) {
            bytes += n->flags & KV_BLOCK_PINNED ? kv_space_node_bytes(s) : 0;
        }
    }
    return bytes;
}

void kv_space_clear(struct kv_space *s)
{
    bool removed = true;
    while (removed) {
        removed = false;
        uint32_t bucket = 0;
        for (struct kv_node *n = kv_tree_next(&s->tree, &bucket, NULL), *next; n != NULL;
             n = next) {
            next = kv_tree_next(&s->tree, &bucket, n);
            if (n->users > 0) {
                continue;
            }
            for (uint32_t c = 0; c < s->n_classes; c++) {
                kv_space_drop_copy(s, n, c);
            }
            kv_tree_remove(&s->tree, n);
            atomic_fetch_sub(&s->cache->n_nodes, 1);
            removed = true;
        }
    }
}
