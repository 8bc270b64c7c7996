#include "daemon/kv/import.h"

#include "daemon/kv/cache_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define BLOCK         GQA_KV_BLOCK_TOKENS
#define KEEP_AT_ONCE  64u /* blocks given to the tree between two steps */
#define ITEMS_MINIMUM 64u

struct item {
    struct kv_block *block; /* NULL: this class's block is not needed, or was given to the tree */
    uint32_t layer_class, position, flags;
    uint64_t checksum;
    int32_t tokens[BLOCK];
};

struct kv_import {
    struct kv_cache *cache;
    struct kv_space *space;
    struct item *items; /* (n) ascending by position, then class */
    uint32_t n, capacity;
    uint64_t filled;                         /* bytes of the last item that have come */
    uint32_t n_of_class[KV_MAX_CLASSES];     /* blocks held */
    uint32_t first_of_class[KV_MAX_CLASSES]; /* position of the first of them */
    /* Keeping. */
    struct kv_key last_key;
    uint32_t n_given, n_new;
};

int kv_import_create(struct kv_cache *cache, struct kv_space *space, struct kv_import **ret)
{
    struct kv_import *im = calloc(1, sizeof(*im));
    if (im == NULL) {
        return -ENOMEM;
    }
    im->cache = cache;
    im->space = space;
    im->last_key = space->tree.root->key;
    space->n_holders++;
    *ret = im;
    return 0;
}

void kv_import_destroy(struct kv_import *im)
{
    if (im == NULL) {
        return;
    }
    for (uint32_t i = 0; i < im->n; i++) {
        kv_block_unref(im->cache->arena, im->items[i].block);
    }
    im->space->n_holders--;
    free(im->items);
    free(im);
}

bool kv_import_is_of(const struct kv_import *im, const struct kv_identity *identity)
{
    return memcmp(im->space->identity.id, identity->id, sizeof(identity->id)) == 0;
}

bool kv_import_is_for(const struct kv_import *im, const char *realm)
{
    return strcmp(im->space->realm, realm) == 0;
}

bool kv_import_is_sound(const void *block, uint64_t bytes, uint64_t checksum)
{
    return XXH3_64bits(block, bytes) == checksum;
}

/* ---- pieces ------------------------------------------------------------------------------ */

uint64_t kv_import_bytes_with(const struct kv_import *im, const struct kv_import_piece *piece)
{
    uint64_t bytes = 0;
    for (uint32_t c = 0; c < im->space->n_classes; c++) {
        uint32_t n = im->n_of_class[c];
        n += c == piece->layer_class && piece->offset == 0 && piece->bytes > 0;
        bytes += n > 0 ? kv_arena_bytes_for(im->space->block_bytes[c], n) : 0;
    }
    return bytes;
}

/* Of a piece that goes on with the last block. */
static int check_rest(const struct kv_import *im, const struct kv_import_piece *p,
                      struct fmt_error *err)
{
    const struct item *last = im->n > 0 ? &im->items[im->n - 1] : NULL;
    if (last == NULL || last->position != p->position || last->layer_class != p->layer_class) {
        return fmt_fail(err, -EINVAL,
                        "'offset' is %" PRIu64 " at position %u, class %u: the beginning of that "
                        "block has not come",
                        p->offset, p->position, p->layer_class);
    }
    if (p->offset != im->filled) {
        return fmt_fail(err, -EINVAL,
                        "'offset' is %" PRIu64 " at position %u, class %u: byte %" PRIu64
                        " is the next",
                        p->offset, p->position, p->layer_class, im->filled);
    }
    if (last->checksum != p->checksum || last->flags != p->flags ||
        memcmp(last->tokens, p->tokens, sizeof(last->tokens)) != 0) {
        return fmt_fail(err, -EINVAL,
                        "position %u, class %u: the pieces of a block differ in 'checksum', "
                        "'flags' or 'tokens'",
                        p->position, p->layer_class);
    }
    return 0;
}

/* Of a piece that begins a block: it must be the next one, and the one before it whole. */
static int check_first(const struct kv_import *im, const struct kv_import_piece *p,
                       struct fmt_error *err)
{
    const struct item *last = im->n > 0 ? &im->items[im->n - 1] : NULL;
    bool same_position = last != NULL && last->position == p->position;
    uint32_t next = last != NULL ? last->position + 1 : 0;
    bool follows =
        same_position ? p->layer_class > last->layer_class && p->bytes > 0 : p->position == next;
    if (!follows) {
        return fmt_fail(err, -EINVAL,
                        "'position' is %u, class %u: a block of position %u must come, or a "
                        "further class of the one before",
                        p->position, p->layer_class, next);
    }
    if (last != NULL && last->block != NULL &&
        im->filled < im->space->block_bytes[last->layer_class]) {
        return fmt_fail(err, -EINVAL,
                        "position %u, class %u: only %" PRIu64 " of %" PRIu64 " bytes have come",
                        last->position, last->layer_class, im->filled,
                        im->space->block_bytes[last->layer_class]);
    }
    if (same_position &&
        (last->flags != p->flags || memcmp(last->tokens, p->tokens, sizeof(last->tokens)) != 0)) {
        return fmt_fail(err, -EINVAL, "position %u: its classes differ in 'flags' or 'tokens'",
                        p->position);
    }
    return 0;
}

static int check_sizes(const struct kv_import *im, const struct kv_import_piece *p,
                       uint32_t positions_max, struct fmt_error *err)
{
    const struct kv_space *s = im->space;
    if (p->layer_class >= s->n_classes) {
        return fmt_fail(err, -EINVAL, "'layer_class' is %u: the model has 0 to %u", p->layer_class,
                        s->n_classes - 1);
    }
    if (p->position >= positions_max) {
        return fmt_fail(err, -EINVAL, "'position' is %u: the context has 0 to %u", p->position,
                        positions_max - 1);
    }
    uint64_t bytes = s->block_bytes[p->layer_class];
    bool absent = p->bytes == 0 && s->windows[p->layer_class] > 0;
    if (p->bytes != bytes && !absent) {
        return fmt_fail(err, -EINVAL,
                        "'bytes' is %" PRIu64 " at position %u: a block of class %u has %" PRIu64,
                        p->bytes, p->position, p->layer_class, bytes);
    }
    if (p->offset > p->bytes || p->data_bytes > p->bytes - p->offset) {
        return fmt_fail(err, -EINVAL,
                        "'data' has %" PRIu64 " bytes at offset %" PRIu64 " of position %u, class "
                        "%u: the block has %" PRIu64,
                        p->data_bytes, p->offset, p->position, p->layer_class, p->bytes);
    }
    if (p->data_bytes == 0 && p->bytes > 0) {
        return fmt_fail(err, -EINVAL, "'data' is empty at position %u, class %u", p->position,
                        p->layer_class);
    }
    return 0;
}

static int begin_block(struct kv_import *im, const struct kv_import_piece *p)
{
    if (im->n == im->capacity) {
        uint32_t capacity = im->capacity > 0 ? 2 * im->capacity : ITEMS_MINIMUM;
        struct item *items = realloc(im->items, capacity * sizeof(*items));
        if (items == NULL) {
            return -ENOMEM;
        }
        im->items = items;
        im->capacity = capacity;
    }
    struct kv_block *block = NULL;
    int rc = p->bytes > 0 ? kv_cache_alloc(im->cache, p->bytes, &block) : 0;
    if (rc < 0) {
        return rc;
    }
    struct item *item = &im->items[im->n++];
    *item = (struct item){
        .block = block,
        .layer_class = p->layer_class,
        .position = p->position,
        .flags = p->flags,
        .checksum = p->checksum,
    };
    memcpy(item->tokens, p->tokens, sizeof(item->tokens));
    if (block != NULL && im->n_of_class[p->layer_class]++ == 0) {
        im->first_of_class[p->layer_class] = p->position;
    }
    im->filled = 0;
    return 0;
}

/* A windowed class, once it has a block, has one at every later position: what a hole would mean is
 * nowhere needed. */
static int check_gap(const struct kv_import *im, const struct kv_import_piece *p,
                     struct fmt_error *err)
{
    uint32_t c = p->layer_class;
    bool holds = p->bytes > 0 && im->n_of_class[c] > 0;
    if (holds && im->first_of_class[c] + im->n_of_class[c] != p->position) {
        return fmt_fail(err, -EINVAL, "class %u has no block of position %u, but one before it", c,
                        im->first_of_class[c] + im->n_of_class[c]);
    }
    return 0;
}

int kv_import_take(struct kv_import *im, const struct kv_import_piece *p, uint32_t positions_max,
                   void **ret_to, struct fmt_error *err)
{
    int rc = check_sizes(im, p, positions_max, err);
    if (rc < 0) {
        return rc;
    }
    if (p->offset > 0) {
        rc = check_rest(im, p, err);
    } else {
        rc = check_first(im, p, err);
        rc = rc < 0 ? rc : check_gap(im, p, err);
        rc = rc < 0 ? rc : begin_block(im, p);
    }
    if (rc < 0) {
        return rc;
    }
    const struct item *item = &im->items[im->n - 1];
    im->filled += p->data_bytes;
    *ret_to = item->block != NULL ? (char *)item->block->data + p->offset : NULL;
    return 0;
}

/* ---- the whole --------------------------------------------------------------------------- */

int kv_import_check(const struct kv_import *im, struct fmt_error *err)
{
    const struct kv_space *s = im->space;
    if (im->n == 0) {
        return fmt_fail(err, -EINVAL, "no block has come");
    }
    const struct item *last = &im->items[im->n - 1];
    if (last->block != NULL && im->filled < s->block_bytes[last->layer_class]) {
        return fmt_fail(
            err, -EINVAL, "position %u, class %u: only %" PRIu64 " of %" PRIu64 " bytes have come",
            last->position, last->layer_class, im->filled, s->block_bytes[last->layer_class]);
    }
    uint32_t end = last->position + 1;
    for (uint32_t c = 0; c < s->n_classes; c++) {
        /* Without holes: who has the last one and enough of them has all that are needed. */
        uint32_t needed = kv_first_needed(s->windows[c], end * BLOCK);
        bool has_last = im->n_of_class[c] > 0 && im->first_of_class[c] + im->n_of_class[c] == end;
        if (needed < end && (!has_last || im->first_of_class[c] > needed)) {
            return fmt_fail(err, -EINVAL,
                            "class %u lacks blocks: a prefix of %u tokens needs those of positions "
                            "%u to %u",
                            c, end * BLOCK, needed, end - 1);
        }
    }
    return 0;
}

/* Puts a block into its place of the node; one that is there already stays. */
static bool give_place(struct kv_import *im, struct kv_node *n, struct item *item)
{
    struct kv_space *s = im->space;
    struct kv_place *p = &n->places[item->layer_class];
    struct kv_block *block = item->block;
    item->block = NULL;
    if (block == NULL || kv_place_is_there(p) || p->checking) {
        kv_block_unref(im->cache->arena, block);
        return false;
    }
    p->block = block;
    atomic_fetch_add(&im->cache->bytes_cached, s->block_bytes[item->layer_class]);
    return true;
}

/* The blocks of one position. */
static int keep_position(struct kv_import *im)
{
    struct kv_space *s = im->space;
    const struct item *first = &im->items[im->n_given];
    struct kv_key key = kv_tree_next_key(&s->tree, im->last_key, first->tokens, first->flags);
    struct kv_node *n;
    int rc = kv_tree_insert(&s->tree, key, im->last_key, first->position, first->flags,
                            first->tokens, &n);
    if (rc < 0 && rc != -EEXIST) {
        return rc;
    }
    if (rc == -EEXIST && memcmp(n->tokens, first->tokens, sizeof(n->tokens)) != 0) {
        return -EEXIST; /* two texts with one key: the first one keeps it */
    }
    atomic_fetch_add(&im->cache->n_nodes, rc == 0);
    im->last_key = key;
    n->used_s = kv_now_s();
    bool is_new = rc == 0;
    uint32_t position = first->position;
    while (im->n_given < im->n && im->items[im->n_given].position == position) {
        struct item *item = &im->items[im->n_given++];
        is_new |= give_place(im, n, item);
        if (s->windows[item->layer_class] == 0) {
            kv_space_save(s, n, item->layer_class);
        }
    }
    im->n_new += is_new;
    if (im->n_given == im->n) {
        kv_space_save_windows(s, n); /* others will go on from here */
    }
    return 0;
}

int kv_import_keep(struct kv_import *im, uint32_t *ret_tokens, uint32_t *ret_new)
{
    for (uint32_t i = 0; i < KEEP_AT_ONCE && im->n_given < im->n; i++) {
        int rc = keep_position(im);
        if (rc < 0) {
            return rc;
        }
    }
    if (im->n_given < im->n) {
        return -EAGAIN;
    }
    *ret_tokens = (im->items[im->n - 1].position + 1) * BLOCK;
    *ret_new = im->n_new * BLOCK;
    return 0;
}
