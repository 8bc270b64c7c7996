#include "daemon/kv/prefix.h"

#include "daemon/kv/store.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define MIN_BUCKETS 256u

static uint32_t bucket_of(const struct kv_tree *t, struct kv_key key)
{
    return (uint32_t)(key.low & (t->n_buckets - 1));
}

static struct kv_node *node_create(uint32_t n_classes)
{
    return calloc(1, sizeof(struct kv_node) + n_classes * sizeof(struct kv_place));
}

int kv_tree_init(struct kv_tree *t, struct kv_key seed, uint32_t n_classes, bool classes_differ)
{
    *t = (struct kv_tree){
        .n_classes = n_classes,
        .classes_differ = classes_differ,
        .n_buckets = MIN_BUCKETS,
        .root = node_create(0),
        .buckets = calloc(MIN_BUCKETS, sizeof(*t->buckets)),
    };
    if (t->root == NULL || t->buckets == NULL) {
        kv_tree_finish(t);
        return -ENOMEM;
    }
    t->root->key = seed;
    return 0;
}

void kv_tree_finish(struct kv_tree *t)
{
    free(t->root);
    free(t->buckets);
    memset(t, 0, sizeof(*t));
}

struct kv_key kv_tree_next_key(const struct kv_tree *t, struct kv_key parent, const int32_t *tokens,
                               uint32_t flags)
{
    struct { /* without padding: every byte is hashed */
        struct kv_key parent;
        uint64_t generated;
        int32_t tokens[GQA_KV_BLOCK_TOKENS];
    } chain = {.parent = parent};
    chain.generated = t->classes_differ && (flags & KV_BLOCK_GENERATED);
    memcpy(chain.tokens, tokens, sizeof(chain.tokens));
    XXH128_hash_t hash = XXH3_128bits(&chain, sizeof(chain));
    return (struct kv_key){.low = hash.low64, .high = hash.high64};
}

static struct kv_node *find_key(const struct kv_tree *t, struct kv_key key)
{
    struct kv_node *n = t->buckets[bucket_of(t, key)];
    while (n != NULL && !kv_key_equal(n->key, key)) {
        n = n->next_in_bucket;
    }
    return n;
}

struct kv_node *kv_tree_find(const struct kv_tree *t, struct kv_key key, const int32_t *tokens)
{
    struct kv_node *n = find_key(t, key);
    return n != NULL && memcmp(n->tokens, tokens, sizeof(n->tokens)) == 0 ? n : NULL;
}

static void link_child(struct kv_node *parent, struct kv_node *n)
{
    n->parent = parent;
    n->prev_sibling = NULL;
    n->next_sibling = parent->first_child;
    if (n->next_sibling != NULL) {
        n->next_sibling->prev_sibling = n;
    }
    parent->first_child = n;
}

static void unlink_child(struct kv_node *n)
{
    if (n->parent == NULL) {
        return;
    }
    if (n->prev_sibling != NULL) {
        n->prev_sibling->next_sibling = n->next_sibling;
    } else {
        n->parent->first_child = n->next_sibling;
    }
    if (n->next_sibling != NULL) {
        n->next_sibling->prev_sibling = n->prev_sibling;
    }
    n->parent = n->next_sibling = n->prev_sibling = NULL;
}

/* Without memory for more buckets, the chains only get longer. */
static void grow(struct kv_tree *t, uint32_t n_buckets)
{
    struct kv_node **buckets = calloc(n_buckets, sizeof(*buckets));
    if (buckets == NULL) {
        return;
    }
    struct kv_tree bigger = *t;
    bigger.buckets = buckets;
    bigger.n_buckets = n_buckets;
    for (uint32_t i = 0; i < t->n_buckets; i++) {
        for (struct kv_node *n = t->buckets[i], *next; n != NULL; n = next) {
            next = n->next_in_bucket;
            uint32_t bucket = bucket_of(&bigger, n->key);
            n->next_in_bucket = buckets[bucket];
            buckets[bucket] = n;
        }
    }
    free(t->buckets);
    *t = bigger;
}

/* The node that a parent key names: zeros are the root's. A parent must lie one place before its
 * child, whatever a file says: so no cycle can come about. */
static struct kv_node *find_parent(const struct kv_tree *t, struct kv_key parent_key,
                                   uint32_t position)
{
    if (kv_key_is_none(parent_key) || kv_key_equal(parent_key, t->root->key)) {
        return position == 0 ? t->root : NULL;
    }
    struct kv_node *parent = find_key(t, parent_key);
    return parent != NULL && parent->position + 1 == position ? parent : NULL;
}

void kv_tree_reserve(struct kv_tree *t, uint32_t n_nodes)
{
    uint32_t n_buckets = t->n_buckets;
    while (n_buckets < n_nodes && n_buckets <= UINT32_MAX / 2) {
        n_buckets *= 2;
    }
    if (n_buckets > t->n_buckets) {
        grow(t, n_buckets);
    }
}

int kv_tree_insert(struct kv_tree *t, struct kv_key key, struct kv_key parent_key,
                   uint32_t position, uint32_t flags, const int32_t *tokens, struct kv_node **ret)
{
    struct kv_node *n = find_key(t, key);
    if (n != NULL) {
        *ret = n;
        return -EEXIST;
    }
    n = node_create(t->n_classes);
    if (n == NULL) {
        return -ENOMEM;
    }
    n->key = key;
    n->position = position;
    n->flags = flags & ~(uint32_t)KV_BLOCK_PINNED;
    memcpy(n->tokens, tokens, sizeof(n->tokens));
    struct kv_node *parent = find_parent(t, parent_key, position);
    if (parent != NULL) {
        link_child(parent, n);
    }
    if (t->n_nodes >= t->n_buckets) {
        grow(t, t->n_buckets * 2);
    }
    uint32_t bucket = bucket_of(t, key);
    n->next_in_bucket = t->buckets[bucket];
    t->buckets[bucket] = n;
    t->n_nodes++;
    *ret = n;
    return 0;
}

void kv_tree_remove(struct kv_tree *t, struct kv_node *n)
{
    struct kv_node **link = &t->buckets[bucket_of(t, n->key)];
    while (*link != n) {
        link = &(*link)->next_in_bucket;
    }
    *link = n->next_in_bucket;
    while (n->first_child != NULL) {
        unlink_child(n->first_child);
    }
    unlink_child(n);
    t->n_nodes--;
    free(n);
}

void kv_tree_link_orphans(struct kv_tree *t, const struct kv_key *parent_keys,
                          struct kv_node *const *nodes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct kv_node *n_i = nodes[i];
        struct kv_node *parent =
            n_i->parent == NULL ? find_parent(t, parent_keys[i], n_i->position) : NULL;
        if (parent != NULL) {
            link_child(parent, n_i);
        }
    }
}

struct kv_node *kv_tree_next(const struct kv_tree *t, uint32_t *bucket, struct kv_node *n)
{
    n = n != NULL ? n->next_in_bucket : t->buckets[*bucket];
    while (n == NULL && ++*bucket < t->n_buckets) {
        n = t->buckets[*bucket];
    }
    return n;
}

static int by_position(const void *a, const void *b)
{
    const struct kv_node *x = *(struct kv_node *const *)a, *y = *(struct kv_node *const *)b;
    return x->position < y->position ? -1 : x->position > y->position;
}

struct kv_node **kv_tree_by_position(const struct kv_tree *t, kv_node_filter_fn wanted,
                                     const void *arg, size_t *ret_count)
{
    struct kv_node **nodes = malloc(((size_t)t->n_nodes + 1) * sizeof(struct kv_node *));
    uint32_t bucket = 0;
    *ret_count = 0;
    if (nodes == NULL) {
        return NULL;
    }
    for (struct kv_node *n = NULL; (n = kv_tree_next(t, &bucket, n)) != NULL;) {
        if (wanted == NULL || wanted(arg, n)) {
            nodes[(*ret_count)++] = n;
        }
    }
    if (*ret_count > 0) {
        qsort(nodes, *ret_count, sizeof(struct kv_node *), by_position);
    }
    return nodes;
}
