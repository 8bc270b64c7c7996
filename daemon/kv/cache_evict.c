/* daemon/kv/cache_evict.c - who gives way when the arena or the stores are full.
 *
 * A victim is one layer class's block of a node that no sequence uses. Interior blocks of windowed
 * classes go first: only who goes on from that very place misses them. Full classes are evicted
 * from the leaves, since a block is of no use without those before it; among leaves the one of the
 * least value goes: tokens saved (64 a block) times how often it was used, against its bytes and
 * the time since; among equals, one of the model that was asked for longest ago. */
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

struct victims { /* a heap: none is worth less than the first */
    struct victim *items;
    size_t n, capacity;
};

static void remove_node(struct kv_space *s, struct kv_node *n)
{
    kv_space_pin(s, n, false);
    kv_tree_remove(&s->tree, n);
    atomic_fetch_sub(&s->cache->n_nodes, 1);
}

bool kv_space_drop_if_empty(struct kv_space *s, struct kv_node *n)
{
    for (uint32_t i = 0; i < s->n_classes; i++) {
        const struct kv_place *p = &n->places[i];
        if (kv_place_is_there(p) || p->state != KV_UNSAVED || p->checking) {
            return false;
        }
    }
    if (n->users > 0 || n->first_child != NULL) {
        return false;
    }
    remove_node(s, n);
    return true;
}

struct kv_node *kv_space_prune(struct kv_space *s, struct kv_node *n)
{
    while (n != NULL && n != s->tree.root) {
        struct kv_node *parent = n->parent;
        if (!kv_space_drop_if_empty(s, n)) {
            return n;
        }
        n = parent;
    }
    return NULL;
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

static bool goes_before(const struct victim *a, const struct victim *b)
{
    return a->value < b->value ||
           (a->value == b->value && a->space->last_turn < b->space->last_turn);
}

static void swap_victims(struct victim *a, struct victim *b)
{
    struct victim held = *a;
    *a = *b;
    *b = held;
}

/* False: no memory. */
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
    size_t at = v->n++;
    v->items[at] = *item;
    for (; at > 0 && goes_before(&v->items[at], &v->items[(at - 1) / 2]); at = (at - 1) / 2) {
        swap_victims(&v->items[at], &v->items[(at - 1) / 2]);
    }
    return true;
}

static struct victim take_victim(struct victims *v)
{
    struct victim first = v->items[0];
    v->items[0] = v->items[--v->n];
    for (size_t at = 0, child; (child = 2 * at + 1) < v->n; at = child) {
        child += child + 1 < v->n && goes_before(&v->items[child + 1], &v->items[child]);
        if (!goes_before(&v->items[child], &v->items[at])) {
            break;
        }
        swap_victims(&v->items[at], &v->items[child]);
    }
    return first;
}

/* Where room is to be made. */
struct scope {
    bool in_store;          /* else in the arena */
    const char *realm;      /* NULL: of all */
    struct kv_space *space; /* NULL: of all */
    uint32_t layer_class;   /* of that one's blocks; ALL_CLASSES */
    uint64_t now_s;         /* which ages count from; evict_from()'s */
};
#define ALL_CLASSES UINT32_MAX

/* Of a store whose index is being added nobody knows yet which nodes are leaves. */
static bool is_in(const struct scope *where, const struct kv_space *s)
{
    return !(where->in_store && s->state == KV_SPACE_OPENING) &&
           (where->space == NULL || where->space == s) &&
           (where->realm == NULL || strcmp(s->realm, where->realm) == 0);
}

/* Collects what may go from one node: of full classes alone, or of all. False: no memory. */
static bool collect_node(struct kv_space *s, struct kv_node *n, const struct scope *where, bool any,
                         bool full_alone, struct victims *v)
{
    for (uint32_t c = 0; c < s->n_classes; c++) {
        const struct kv_place *p = &n->places[c];
        struct victim item = {s, n, c, 0};
        bool holds =
            where->in_store ? p->state == KV_SAVED : p->block != NULL && p->block->refs == 1;
        holds = holds && (where->layer_class == ALL_CLASSES || where->layer_class == c);
        holds = holds && !(full_alone && s->windows[c] > 0);
        if (holds && may_go(s, n, c, any, where->now_s, &item.value) && !add_victim(v, &item)) {
            return false;
        }
    }
    return true;
}

/* Every node once. Without memory: fewer of them. */
static void collect(struct kv_cache *cache, const struct scope *where, bool any, struct victims *v)
{
    for (struct kv_space *s = cache->spaces; s != NULL; s = s->next) {
        uint32_t bucket = 0;
        struct kv_node *n = is_in(where, s) ? kv_tree_next(&s->tree, &bucket, NULL) : NULL;
        for (; n != NULL; n = kv_tree_next(&s->tree, &bucket, n)) {
            if (!collect_node(s, n, where, any, false, v)) {
                return;
            }
        }
    }
}

/* Evicts in the order of values until so many bytes are free. A node that is empty afterwards goes,
 * and where its parent has become a leaf by that, the parent's blocks of full classes may go as
 * well: those of windowed ones were collected while it was none, and have gone before any leaf. */
static uint64_t evict(struct victims *v, const struct scope *where, bool any, uint64_t bytes)
{
    uint64_t freed = 0;
    while (v->n > 0 && freed < bytes) {
        struct victim item = take_victim(v);
        struct kv_space *s = item.space;
        if (where->in_store) {
            kv_space_forget(s, item.node, item.layer_class);
            atomic_fetch_add(&s->cache->n_evicted_store, 1);
        } else {
            kv_space_drop_copy(s, item.node, item.layer_class);
            atomic_fetch_add(&s->cache->n_evicted_arena, 1);
        }
        freed += s->block_bytes[item.layer_class];
        struct kv_node *stays = kv_space_prune(s, item.node);
        if (stays != NULL && stays != item.node && stays->first_child == NULL && !any) {
            collect_node(s, stays, where, any, true, v);
        }
    }
    return freed;
}

static uint64_t evict_from(struct kv_cache *c, struct scope where, uint64_t bytes)
{
    struct victims v = {NULL, 0, 0};
    where.now_s = kv_now_s();
    collect(c, &where, false, &v);
    uint64_t freed = evict(&v, &where, false, bytes);
    if (freed < bytes && !where.in_store) {
        collect(c, &where, true, &v);
        freed += evict(&v, &where, true, bytes - freed);
    }
    free(v.items);
    return freed;
}

uint64_t kv_cache_evict_arena(struct kv_cache *c, uint64_t bytes)
{
    const struct scope where = {.layer_class = ALL_CLASSES};
    return evict_from(c, where, bytes);
}

uint64_t kv_cache_evict_store(struct kv_cache *c, const char *realm, uint64_t bytes)
{
    const struct scope where = {.in_store = true, .realm = realm, .layer_class = ALL_CLASSES};
    return evict_from(c, where, bytes);
}

uint64_t kv_space_evict_store(struct kv_space *s, uint32_t layer_class, uint64_t bytes)
{
    struct scope where = {.in_store = true, .space = s, .layer_class = layer_class};
    uint64_t freed = evict_from(s->cache, where, bytes);
    if (freed == 0) { /* leaves hold none of the class, but keep those before them from going */
        where.layer_class = ALL_CLASSES;
        freed = evict_from(s->cache, where, bytes);
    }
    return freed;
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
            remove_node(s, n);
            removed = true;
        }
    }
}
