/* daemon/kv/view.c - a sequence's view: when it begins, how it slides. */
#include "daemon/kv/view.h"

#include "daemon/kv/cache_internal.h"
#include "daemon/kv/sequence_internal.h"
#include "daemon/kv/view_compress.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK          GQA_KV_BLOCK_TOKENS
#define SEGMENT_BLOCKS (GQA_ATTN_SEGMENT_TOKENS / BLOCK)

static uint32_t blocks_for(uint32_t n_tokens)
{
    return n_tokens / BLOCK + (n_tokens % BLOCK != 0);
}

uint32_t kv_view_rows_max(const struct kv_sequence *s)
{
    const struct kv_view *v = &s->view;
    return v->begun ? UINT32_MAX : kv_view_n_common(&v->policy, v->n_prompt) - s->n_tokens;
}

/* ---- votes ------------------------------------------------------------------------------- */

static void drop_votes(struct kv_sequence *s)
{
    for (uint32_t i = 0; s->view.votes != NULL && i < s->layout->n_layers; i++) {
        free(s->view.votes[i]);
    }
    free(s->view.votes);
    s->view.votes = NULL;
    if (s->view.votes_bytes > 0) {
        kv_arena_give_aside(kv_cache_arena(s->cache), s->view.votes_bytes);
        s->view.votes_bytes = 0;
    }
}

uint64_t kv_view_votes_bytes(const struct kv_layout *layout, const struct kv_policy *p,
                             uint64_t n_prompt)
{
    uint64_t n = n_prompt <= UINT32_MAX ? kv_policy_n_votes(p, (uint32_t)n_prompt) : 0, bytes = 0;
    for (uint32_t i = 0; n > 0 && i < layout->n_layers; i++) {
        const struct kv_layer_desc *d = &layout->classes[layout->layer_class[i]].desc;
        bytes += d->window == 0 ? n * d->n_kv_heads * sizeof(float) : 0;
    }
    return bytes;
}

int kv_view_prepare(struct kv_sequence *s)
{
    struct kv_view *v = &s->view;
    if (v->begun || v->votes_bytes > 0) {
        return 0;
    }
    uint64_t bytes = kv_view_votes_bytes(s->layout, &v->policy, v->n_prompt);
    int rc = bytes > 0 ? kv_cache_set_aside(s->cache, bytes) : 0;
    v->votes_bytes = rc == 0 ? bytes : 0;
    return rc;
}

static const struct kv_class *class_of(const struct kv_sequence *s, uint32_t layer)
{
    return &s->layout->classes[s->layout->layer_class[layer]];
}

static int make_votes(struct kv_sequence *s)
{
    struct kv_view *v = &s->view;
    uint32_t n = kv_policy_n_votes(&v->policy, v->n_prompt);
    v->votes = calloc(s->layout->n_layers, sizeof(*v->votes));
    for (uint32_t i = 0; v->votes != NULL && i < s->layout->n_layers; i++) {
        const struct kv_layer_desc *d = &class_of(s, i)->desc;
        v->votes[i] = d->window == 0 ? calloc((size_t)n * d->n_kv_heads, sizeof(float)) : NULL;
        if (d->window == 0 && v->votes[i] == NULL) {
            drop_votes(s);
        }
    }
    return v->votes != NULL ? 0 : -ENOMEM;
}

int kv_view_votes(struct kv_sequence *s, uint32_t n_new, uint32_t *ret_rows)
{
    const struct kv_view *v = &s->view;
    uint32_t first = kv_policy_n_votes(&v->policy, v->n_prompt), end = s->n_tokens + n_new;
    *ret_rows = 0;
    if (first == 0 || v->begun || end <= first) {
        return 0;
    }
    *ret_rows = s->n_tokens > first ? n_new : end - first;
    int rc = kv_view_prepare(s);
    return rc < 0 || v->votes != NULL ? rc : make_votes(s);
}

void kv_view_reset(struct kv_sequence *s)
{
    drop_votes(s);
    s->view.begun = s->view.spoiled = false;
    s->view.n_sinks = s->view.recent = 0;
}

/* ---- leaving the tree -------------------------------------------------------------------- */

/* Pages of the store's mapping belong to nodes: copies of them are the sequence's own. */
static int own_pages(struct kv_sequence *s, uint32_t c)
{
    struct kv_block_list *list = &s->lists[c];
    for (uint32_t i = list->first_live; i < list->n; i++) {
        if (list->pages[i] != NULL && list->blocks[i] == NULL) {
            struct kv_block *block;
            int rc = kv_cache_alloc(s->cache, s->layout->classes[c].block_bytes, &block);
            if (rc < 0) {
                return rc;
            }
            memcpy(block->data, list->pages[i], s->layout->classes[c].block_bytes);
            list->blocks[i] = block;
            list->pages[i] = block->data;
            list->versions[i] = block->version;
        }
    }
    return 0;
}

/* The nodes go on without it; it shares nothing until it starts anew. */
static void leave_tree(struct kv_sequence *s)
{
    while (s->n_sealed > 0) {
        struct kv_node *n = s->nodes[--s->n_sealed];
        for (uint32_t c = 0; c < s->layout->n_classes; c++) {
            kv_space_release_saved(s->space, n, c);
        }
        n->users--;
        kv_space_prune(s->space, n);
    }
    s->sealing_failed = true;
}

/* ---- the beginning ----------------------------------------------------------------------- */

/* Of the prompt a choice is kept, and windowed classes keep what they have. */
static int begin_choice(struct kv_sequence *s)
{
    int rc = 0;
    for (uint32_t c = 0; rc == 0 && c < s->layout->n_classes; c++) {
        rc = s->layout->classes[c].desc.window > 0 ? own_pages(s, c) : 0;
    }
    rc = rc < 0 ? rc : kv_view_compress(s);
    if (rc == 0) {
        drop_votes(s);
    }
    return rc;
}

static int begin_window(struct kv_sequence *s)
{
    int rc = 0;
    for (uint32_t c = 0; rc == 0 && c < s->layout->n_classes; c++) {
        rc = own_pages(s, c);
    }
    if (rc == 0) {
        s->view.n_sinks = s->view.policy.sinks;
        s->view.recent = s->view.policy.recent;
    }
    return rc;
}

int kv_view_begin(struct kv_sequence *s)
{
    struct kv_view *v = &s->view;
    bool chooses = kv_policy_n_votes(&v->policy, v->n_prompt) > 0;
    if (kv_view_rows_max(s) > 0) {
        return 0;
    }
    if (chooses && (v->spoiled || v->votes == NULL)) {
        kv_sequence_reset(s);
        return -EAGAIN;
    }
    int rc = chooses ? begin_choice(s) : begin_window(s);
    if (rc < 0) {
        return rc;
    }
    leave_tree(s);
    v->begun = true;
    for (uint32_t c = 0; c < s->layout->n_classes; c++) {
        if (s->layout->classes[c].desc.window == 0) {
            s->lists[c].first_live = blocks_for(v->n_sinks);
        }
    }
    kv_sequence_set_tables(s);
    return 0;
}

/* ---- sliding ----------------------------------------------------------------------------- */

/* Whole segments between the sinks and what is live leave the list: no row sees anything there, so
 * no bit changes, and tables stay small however long the sequence gets. */
static void close_gap(struct kv_block_list *list, uint32_t n_sinks)
{
    uint32_t first = blocks_for(n_sinks) + SEGMENT_BLOCKS - 1;
    uint32_t end = list->first_live / SEGMENT_BLOCKS * SEGMENT_BLOCKS;
    first = first / SEGMENT_BLOCKS * SEGMENT_BLOCKS;
    if (end <= first) {
        return;
    }
    memmove(list->blocks + first, list->blocks + end, (list->n - end) * sizeof(*list->blocks));
    memmove(list->pages + first, list->pages + end, (list->n - end) * sizeof(*list->pages));
    memmove(list->versions + first, list->versions + end,
            (list->n - end) * sizeof(*list->versions));
    list->n -= end - first;
    list->first_live -= end - first;
    list->n_dropped += (end - first) * BLOCK;
}

void kv_view_slide(struct kv_sequence *s)
{
    const struct kv_view *v = &s->view;
    for (uint32_t c = 0; v->begun && c < s->layout->n_classes; c++) {
        uint32_t window = s->layout->classes[c].desc.window;
        uint32_t n_slots = s->n_tokens - s->lists[c].n_dropped;
        if (window == 0 && v->recent > 0 && n_slots - v->n_sinks >= v->recent) {
            kv_list_give_back(s, c, (n_slots - v->recent + 1) / BLOCK);
        }
        close_gap(&s->lists[c], window == 0 ? v->n_sinks : 0);
    }
    if (v->begun) {
        kv_sequence_set_tables(s);
    }
}

uint32_t kv_view_n_kept(const struct kv_sequence *s)
{
    for (uint32_t c = 0; s->view.begun && c < s->layout->n_classes; c++) {
        if (s->layout->classes[c].desc.window == 0) {
            uint32_t n_slots = s->n_tokens - s->lists[c].n_dropped;
            uint32_t most = s->view.n_sinks + s->view.recent;
            return s->view.recent > 0 && n_slots > most ? most : n_slots;
        }
    }
    return s->n_tokens;
}
