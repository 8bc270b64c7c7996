/* daemon/kv/sequence_prefix.c - what a sequence takes from the prefix tree, and gives to it. */
#include "daemon/kv/cache_internal.h"
#include "daemon/kv/sequence_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK        GQA_KV_BLOCK_TOKENS
#define CHILDREN_MAX 64u /* looked at for a common beginning */

const char *kv_miss_text(enum kv_miss miss)
{
    switch (miss) {
    case KV_MISS_NONE:
        return "";
    case KV_MISS_OFF:
        return "the request does not share the cache";
    case KV_MISS_NEW:
        return "these tokens were not computed before";
    case KV_MISS_EVICTED:
        return "the blocks were evicted";
    case KV_MISS_WINDOW:
        return "the windowed layers' blocks are not kept at this place";
    case KV_MISS_INEXACT:
        return "the blocks were generated, and cache_exact is set";
    }
    return "";
}

/* What a block of this sequence at that index is made by: a prompt's whole blocks are of class P.
 */
static uint32_t flags_at(const struct kv_text *text, uint32_t index)
{
    return index < text->n_prompt / BLOCK ? 0 : KV_BLOCK_GENERATED;
}

/* ---- nodes of a sequence ----------------------------------------------------------------- */

bool kv_sequence_grow_nodes(struct kv_sequence *s, uint32_t n)
{
    if (n <= s->nodes_capacity) {
        return true;
    }
    uint32_t capacity = 2 * s->nodes_capacity > n ? 2 * s->nodes_capacity : n;
    struct kv_node **nodes = realloc(s->nodes, capacity * sizeof(struct kv_node *));
    if (nodes == NULL) {
        return false;
    }
    s->nodes = nodes;
    s->nodes_capacity = capacity;
    return true;
}

static void hold(struct kv_sequence *s, struct kv_node *n)
{
    n->users++;
    s->nodes[s->n_sealed++] = n;
    s->last_key = n->key;
}

/* ---- giving ------------------------------------------------------------------------------ */

/* Another continuation of the same prefix: those who come will start from there, so what the
 * windowed classes need at that place is saved too. */
static void note_branch(struct kv_sequence *s, const struct kv_node *n)
{
    struct kv_node *parent = n->parent;
    if (parent != NULL && parent != s->space->tree.root &&
        parent->first_child->next_sibling != NULL) {
        kv_space_save_windows(s->space, parent);
    }
}

/* Hands the block at index n_sealed to the tree. On failure the sequence keeps it for itself, and
 * shares nothing further: later blocks would lack a parent. */
static bool seal_one(struct kv_sequence *s, const struct kv_text *text)
{
    struct kv_space *space = s->space;
    uint32_t i = s->n_sealed;
    const int32_t *tokens = text->tokens + (size_t)i * BLOCK;
    uint32_t flags = flags_at(text, i);
    struct kv_key key = kv_tree_next_key(&space->tree, s->last_key, tokens, flags);
    struct kv_node *n;
    int rc = kv_sequence_grow_nodes(s, i + 1)
                 ? kv_tree_insert(&space->tree, key, s->last_key, i, flags, tokens, &n)
                 : -ENOMEM;
    if (rc == -EEXIST && memcmp(n->tokens, tokens, sizeof(n->tokens)) != 0) {
        return false; /* two texts with one key: the first one keeps it */
    }
    if (rc < 0 && rc != -EEXIST) {
        return false;
    }
    atomic_fetch_add(&space->cache->n_nodes, rc == 0);
    n->used_s = kv_now_s();
    hold(s, n);
    for (uint32_t c = 0; c < space->n_classes; c++) {
        struct kv_block_list *list = &s->lists[c];
        if (!kv_place_is_there(&n->places[c]) && list->blocks[i] != NULL) {
            n->places[c].block = kv_block_ref(list->blocks[i]);
            atomic_fetch_add(&space->cache->bytes_cached, space->block_bytes[c]);
        }
        if (space->windows[c] == 0) {
            kv_space_save(space, n, c);
        }
    }
    note_branch(s, n);
    return true;
}

void kv_sequence_seal(struct kv_sequence *s, const struct kv_text *text)
{
    while (s->space != NULL && !s->detached && !s->view.begun &&
           (s->n_sealed + 1) * BLOCK <= s->n_tokens) {
        if (!seal_one(s, text)) {
            /* Its blocks stay its own; what it holds of the tree stays held until it ends. */
            s->sealing_failed = true;
            return;
        }
    }
}

void kv_sequence_checkpoint(struct kv_sequence *s)
{
    if (s->space != NULL && s->n_sealed > 0) {
        kv_space_save_windows(s->space, s->nodes[s->n_sealed - 1]);
    }
}

uint32_t kv_sequence_pin(struct kv_sequence *s, uint32_t n_tokens, bool pinned)
{
    uint32_t n = n_tokens / BLOCK < s->n_sealed ? n_tokens / BLOCK : s->n_sealed;
    uint64_t room = pinned && n > 0 ? kv_space_room_for_pins(s->space) : 0;
    for (uint32_t i = 0; i < n; i++) {
        struct kv_node *node = s->nodes[i];
        uint64_t bytes = node->flags & KV_BLOCK_PINNED ? 0 : kv_space_node_bytes(s->space);
        if (pinned && bytes > room) {
            n = i;
            break;
        }
        room -= pinned ? bytes : 0;
        kv_space_pin(s->space, node, pinned);
        kv_space_note_flags(s->space, node);
    }
    return n * BLOCK;
}

/* ---- finding ----------------------------------------------------------------------------- */

/* The node that holds block index of the text after the block with key parent, or NULL with the
 * reason. A prompt's own block is preferred to one that a generation made. */
static struct kv_node *find_block(struct kv_sequence *s, const struct kv_text *text, uint32_t index,
                                  struct kv_key parent)
{
    const struct kv_tree *t = &s->space->tree;
    const int32_t *tokens = text->tokens + (size_t)index * BLOCK;
    uint32_t flags = flags_at(text, index);
    struct kv_node *n = kv_tree_find(t, kv_tree_next_key(t, parent, tokens, flags), tokens);
    if (n == NULL && t->classes_differ && flags == 0) {
        n = kv_tree_find(t, kv_tree_next_key(t, parent, tokens, KV_BLOCK_GENERATED), tokens);
        if (n != NULL && s->exact) {
            s->miss = KV_MISS_INEXACT;
            return NULL;
        }
    }
    if (n == NULL) {
        s->miss = KV_MISS_NEW;
        return NULL;
    }
    for (uint32_t c = 0; c < t->n_classes; c++) {
        if (s->space->windows[c] == 0 && !kv_place_is_there(&n->places[c])) {
            s->miss = KV_MISS_EVICTED;
            return NULL;
        }
    }
    return n;
}

uint32_t kv_space_known_tokens(const struct kv_space *s, const struct kv_text *text, bool exact)
{
    const struct kv_tree *t = &s->tree;
    struct kv_key parent = t->root->key;
    uint32_t i = 0;
    for (; ((size_t)i + 1) * BLOCK <= text->n_tokens; i++) {
        const int32_t *tokens = text->tokens + (size_t)i * BLOCK;
        uint32_t flags = flags_at(text, i);
        const struct kv_node *n =
            kv_tree_find(t, kv_tree_next_key(t, parent, tokens, flags), tokens);
        if (n == NULL && flags == 0 && t->classes_differ && !exact) {
            n = kv_tree_find(t, kv_tree_next_key(t, parent, tokens, KV_BLOCK_GENERATED), tokens);
        }
        if (n == NULL) {
            break;
        }
        parent = n->key;
    }
    return i * BLOCK;
}

/* How many of the n found nodes, which follow the sequence's blocks, can be adopted: as many as
 * leave every windowed class with all the blocks that the next token sees. */
static uint32_t trim_to_windows(const struct kv_sequence *s, struct kv_node *const *found,
                                uint32_t n)
{
    uint32_t first = s->n_tokens / BLOCK;
    uint32_t run[KV_MAX_CLASSES] = {0}; /* found nodes in a row that have the class's block */
    uint32_t best = 0;
    for (uint32_t i = 0; i < n; i++) {
        bool whole = true;
        for (uint32_t c = 0; c < s->space->n_classes; c++) {
            run[c] = kv_place_is_there(&found[i]->places[c]) ? run[c] + 1 : 0;
            uint32_t needed = kv_first_needed(s->space->windows[c], (first + i + 1) * BLOCK);
            uint32_t from = needed > first ? needed : first;
            whole = whole && run[c] >= first + i + 1 - from;
        }
        best = whole ? i + 1 : best;
    }
    return best;
}

/* ---- taking ------------------------------------------------------------------------------ */

/* Versions of what the store's mappings hold: a key stands for the content. Those of the arena are
 * smaller. */
#define STORE_VERSION ((uint64_t)1 << 63)

/* Puts a node's block into the sequence's list of the class, or a gap where it is not needed. */
static void take_place(struct kv_sequence *s, struct kv_node *n, uint32_t c, bool needed)
{
    struct kv_block_list *list = &s->lists[c];
    const struct kv_place *p = &n->places[c];
    uint32_t i = list->n++;
    list->blocks[i] = NULL;
    list->pages[i] = NULL;
    list->versions[i] = 0;
    if (!needed) {
        return;
    }
    atomic_fetch_add(&s->cache->blocks_held, 1);
    if (p->block != NULL) {
        list->blocks[i] = kv_block_ref(p->block);
        list->pages[i] = p->block->data;
        list->versions[i] = p->block->version;
    } else {
        /* Read-only: full blocks are never written. */
        list->pages[i] = (void *)(uintptr_t)kv_store_data(s->space->store, c, p->slot);
        list->versions[i] = n->key.low | STORE_VERSION;
    }
}

static int grow_for(struct kv_sequence *s, uint32_t n_blocks)
{
    for (uint32_t c = 0; c < s->space->n_classes; c++) {
        if (kv_list_grow(&s->lists[c], n_blocks) < 0) {
            return -ENOMEM;
        }
    }
    return kv_sequence_grow_nodes(s, n_blocks) ? 0 : -ENOMEM;
}

/* Blocks that were reserved but not written give way to adopted ones. */
static void drop_reserved(struct kv_sequence *s)
{
    uint32_t keep = s->n_tokens / BLOCK;
    for (uint32_t c = 0; c < s->space->n_classes; c++) {
        struct kv_block_list *list = &s->lists[c];
        while (list->n > keep) {
            kv_block_unref(kv_cache_arena(s->cache), list->blocks[--list->n]);
            atomic_fetch_sub(&s->cache->blocks_held, 1);
        }
    }
}

static int take_nodes(struct kv_sequence *s, const struct kv_text *text,
                      struct kv_node *const *found, uint32_t n, const uint32_t *first_needed)
{
    drop_reserved(s);
    int rc = grow_for(s, s->n_sealed + n);
    if (rc < 0) {
        return rc;
    }
    uint64_t now_s = kv_now_s();
    for (uint32_t i = 0; i < n; i++) {
        struct kv_node *node = found[i];
        bool from_store = false;
        for (uint32_t c = 0; c < s->space->n_classes; c++) {
            bool needed = node->position >= first_needed[c];
            take_place(s, node, c, needed);
            from_store |= needed && node->places[c].block == NULL;
        }
        node->hits++;
        node->used_s = now_s;
        kv_space_note_use(s->space, node);
        hold(s, node);
        s->n_from_store += from_store;
        s->took_generated |= (node->flags & ~flags_at(text, node->position)) & KV_BLOCK_GENERATED;
    }
    s->n_tokens += n * BLOCK;
    s->n_adopted_blocks += n;
    s->n_adopted_tokens += n * BLOCK;
    kv_sequence_leave_windows(s);
    kv_sequence_set_tables(s);
    return 0;
}

/* ---- a part of a block ------------------------------------------------------------------- */

static uint32_t common_tokens(const struct kv_node *n, const int32_t *tokens, uint32_t most)
{
    uint32_t i = 0;
    while (i < most && n->tokens[i] == tokens[i]) {
        i++;
    }
    return i;
}

/* Whether the beginning of that node's block may stand for this sequence's own rows. */
static bool may_copy(const struct kv_sequence *s, const struct kv_text *text,
                     const struct kv_node *n, uint32_t n_common)
{
    uint32_t index = s->n_tokens / BLOCK;
    const struct kv_tree *t = &s->space->tree;
    if (t->classes_differ && ((n->flags ^ flags_at(text, index)) & KV_BLOCK_GENERATED) != 0) {
        return false;
    }
    for (uint32_t c = 0; c < t->n_classes; c++) {
        const struct kv_place *p = &n->places[c];
        uint32_t needed = kv_first_needed(s->space->windows[c], s->n_tokens + n_common);
        bool readable = p->block != NULL || (p->state == KV_SAVED && p->verified);
        if (needed <= index && !readable) {
            return false;
        }
    }
    return true;
}

/* The child of the sequence's last block with the longest common beginning. */
static struct kv_node *find_beginning(const struct kv_sequence *s, const struct kv_text *text,
                                      uint32_t most, uint32_t *ret_common)
{
    const struct kv_node *last = s->n_sealed > 0 ? s->nodes[s->n_sealed - 1] : s->space->tree.root;
    struct kv_node *best = NULL;
    uint32_t looked_at = 0;
    *ret_common = 0;
    for (struct kv_node *n = last->first_child; n != NULL && looked_at < CHILDREN_MAX;
         n = n->next_sibling, looked_at++) {
        uint32_t common = common_tokens(n, text->tokens + s->n_tokens, most);
        if (common > *ret_common && may_copy(s, text, n, common)) {
            *ret_common = common;
            best = n;
        }
    }
    return best;
}

/* Copies the beginning of a block that goes on differently (copy on write). Without memory, it is
 * computed instead. */
static void copy_beginning(struct kv_sequence *s, const struct kv_text *text, uint32_t limit)
{
    uint32_t most = limit - s->n_tokens < BLOCK ? limit - s->n_tokens : BLOCK;
    uint32_t common;
    struct kv_node *n = find_beginning(s, text, most, &common);
    if (n == NULL) {
        return;
    }
    n->users++; /* room is made by evicting what nobody holds */
    int rc = kv_sequence_reserve(s, common);
    n->users--;
    if (rc < 0) {
        return;
    }
    uint32_t index = s->n_tokens / BLOCK;
    for (uint32_t c = 0; c < s->space->n_classes; c++) {
        const struct kv_place *p = &n->places[c];
        uint32_t needed = kv_first_needed(s->space->windows[c], s->n_tokens + common);
        if (needed <= index) {
            const void *src =
                p->block != NULL ? p->block->data : kv_store_data(s->space->store, c, p->slot);
            memcpy(s->lists[c].pages[index], src, s->space->block_bytes[c]);
        }
    }
    n->hits++;
    n->used_s = kv_now_s();
    s->n_tokens += common;
    s->n_adopted_tokens += common;
    kv_sequence_leave_windows(s);
}

/* ---- adoption ---------------------------------------------------------------------------- */

static bool all_verified(const struct kv_sequence *s, const struct kv_node *n,
                         const uint32_t *first_needed)
{
    for (uint32_t c = 0; c < s->space->n_classes; c++) {
        const struct kv_place *p = &n->places[c];
        if (n->position >= first_needed[c] && p->block == NULL && !p->verified) {
            return false;
        }
    }
    return true;
}

static void needed_at(const struct kv_sequence *s, uint32_t n_tokens, uint32_t *ret)
{
    for (uint32_t c = 0; c < s->space->n_classes; c++) {
        ret[c] = kv_first_needed(s->space->windows[c], n_tokens);
    }
}

/* Finds the nodes of blocks [n_tokens / 64, limit / 64). Returns how many. */
static uint32_t find_blocks(struct kv_sequence *s, const struct kv_text *text, uint32_t limit,
                            struct kv_node **found)
{
    struct kv_key parent = s->last_key;
    uint32_t first = s->n_tokens / BLOCK, n = 0;
    s->miss = KV_MISS_NONE;
    while (first + n < limit / BLOCK) {
        struct kv_node *node = find_block(s, text, first + n, parent);
        if (node == NULL) {
            break;
        }
        parent = node->key;
        found[n++] = node;
    }
    uint32_t whole = trim_to_windows(s, found, n);
    s->miss = whole < n ? KV_MISS_WINDOW : s->miss;
    return whole;
}

int kv_sequence_adopt(struct kv_sequence *s, const struct kv_text *text, uint32_t limit, bool alone)
{
    if (s->space == NULL || s->sealing_failed || s->n_tokens % BLOCK != 0 ||
        s->n_sealed != s->n_tokens / BLOCK || limit <= s->n_tokens) {
        return 0;
    }
    uint32_t n_blocks = (limit - s->n_tokens) / BLOCK;
    struct kv_node **found = malloc((n_blocks + 1) * sizeof(*found));
    if (found == NULL) {
        return 0;
    }
    uint32_t first_needed[KV_MAX_CLASSES];
    uint32_t n = find_blocks(s, text, limit, found);
    needed_at(s, s->n_tokens + n * BLOCK, first_needed);
    if (n > 0 && !kv_space_check(s->space, found, first_needed, n, alone)) {
        free(found);
        return -EAGAIN;
    }
    /* Some may have turned out bad, and then those before them may not be enough. */
    n = find_blocks(s, text, limit, found);
    needed_at(s, s->n_tokens + n * BLOCK, first_needed);
    uint32_t verified = 0;
    while (verified < n && all_verified(s, found[verified], first_needed)) {
        verified++;
    }
    if (verified == n && n > 0) {
        take_nodes(s, text, found, n, first_needed); /* without memory they are computed instead */
    }
    free(found);
    if (s->n_tokens < limit && !s->whole_blocks) {
        copy_beginning(s, text, limit);
    }
    return 0;
}

/* ---- following --------------------------------------------------------------------------- */

bool kv_sequence_follows(const struct kv_sequence *s, const struct kv_text *text, uint32_t limit,
                         const struct kv_sequence *other, const struct kv_text *other_text,
                         uint32_t other_limit)
{
    uint32_t end = s->n_tokens + BLOCK;
    if (s->space == NULL || s->space != other->space || s->n_tokens % BLOCK != 0 || end > limit ||
        end > other_limit || other->n_tokens > s->n_tokens || other->sealing_failed ||
        s->sealing_failed) {
        return false;
    }
    /* The same history: what both have sealed, then the tokens that other is still to compute. */
    uint32_t sealed = other->n_sealed;
    bool same_start =
        sealed == 0 || (s->n_sealed >= sealed && s->nodes[sealed - 1] == other->nodes[sealed - 1]);
    size_t from = (size_t)sealed * BLOCK;
    return same_start && memcmp(text->tokens + from, other_text->tokens + from,
                                (end - from) * sizeof(*text->tokens)) == 0;
}
