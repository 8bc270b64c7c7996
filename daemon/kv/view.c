/* daemon/kv/view.c - a sequence's view: when it begins, what it copies, how it slides. */
#include "daemon/kv/view.h"

#include "daemon/kv/cache_internal.h"
#include "daemon/kv/sequence_internal.h"
#include "daemon/kv/view_copy.h"

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
    return v->votes != NULL ? 0 : make_votes(s);
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
        kv_space_drop_if_empty(s->space, n);
    }
    s->sealing_failed = true;
}

/* ---- compressing ------------------------------------------------------------------------- */

/* What becomes of a prompt: which tokens, in which order, of one group and layer. */
struct choice {
    uint32_t n_first, n_chosen, n_last; /* the first tokens, the best of those between, the last */
    uint32_t *tokens;                   /* (all three) */
    float *room;                        /* (2 n_votes) */
};

static uint32_t n_kept(const struct choice *c)
{
    return c->n_first + c->n_chosen + c->n_last;
}

static void choice_finish(struct choice *c)
{
    free(c->tokens);
    free(c->room);
    *c = (struct choice){0};
}

static int choice_init(struct choice *c, const struct kv_view *v)
{
    const struct kv_policy *p = &v->policy;
    uint32_t n_votes = kv_policy_n_votes(p, v->n_prompt);
    *c = (struct choice){.n_chosen = p->budget - p->observed, .n_last = p->observed};
    if (p->kind == KV_POLICY_SNAPSTREAM) {
        uint32_t between = v->n_prompt - p->sinks - p->recent;
        *c =
            (struct choice){p->sinks, p->topk < between ? p->topk : between, p->recent, NULL, NULL};
    }
    c->tokens = calloc(n_kept(c) + 1, sizeof(*c->tokens));
    c->room = calloc(2 * (size_t)n_votes + 1, sizeof(*c->room));
    if (c->tokens == NULL || c->room == NULL) {
        choice_finish(c);
        return -ENOMEM;
    }
    return 0;
}

static void choose(struct choice *c, const struct kv_view *v, const float *votes)
{
    uint32_t between = v->n_prompt - c->n_first - c->n_last;
    uint32_t *chosen = c->tokens + c->n_first;
    kv_select(votes + c->n_first, between, &v->policy, c->n_chosen, c->room, chosen);
    for (uint32_t i = 0; i < c->n_first; i++) {
        c->tokens[i] = i;
    }
    for (uint32_t i = 0; i < c->n_chosen; i++) {
        chosen[i] += c->n_first;
    }
    for (uint32_t i = 0; i < c->n_last; i++) {
        chosen[c->n_chosen + i] = v->n_prompt - c->n_last + i;
    }
}

static void release_blocks(struct kv_sequence *s, struct kv_block **blocks, uint32_t n)
{
    for (uint32_t i = 0; blocks != NULL && i < n; i++) {
        kv_block_unref(kv_cache_arena(s->cache), blocks[i]);
    }
    free(blocks);
}

/* Blocks for what is kept of a class. */
static struct kv_block **take_blocks(struct kv_sequence *s, uint32_t c, uint32_t n)
{
    struct kv_block **blocks = calloc(n, sizeof(struct kv_block *));
    for (uint32_t i = 0; blocks != NULL && i < n; i++) {
        if (kv_cache_alloc(s->cache, s->layout->classes[c].block_bytes, &blocks[i]) < 0) {
            release_blocks(s, blocks, n);
            return NULL;
        }
    }
    return blocks;
}

/* Copies every layer's and group's choice of the prompt into the blocks. */
static void copy_choices(const struct kv_sequence *s, uint32_t c, struct choice *choice,
                         struct kv_block *const *blocks)
{
    const struct kv_class *class = &s->layout->classes[c];
    uint32_t n_votes = kv_policy_n_votes(&s->view.policy, s->view.n_prompt);
    for (uint32_t layer = 0; layer < s->layout->n_layers; layer++) {
        for (uint32_t g = 0; s->layout->layer_class[layer] == c && g < class->desc.n_kv_heads;
             g++) {
            choose(choice, &s->view, s->view.votes[layer] + (size_t)g * n_votes);
            for (uint32_t slot = 0; slot < n_kept(choice); slot++) {
                uint32_t token = choice->tokens[slot];
                const struct kv_place_of from = {s->lists[c].pages[token / BLOCK], token % BLOCK};
                const struct kv_place_of to = {blocks[slot / BLOCK]->data, slot % BLOCK};
                kv_copy_token(s->layout, layer, g, from, to);
            }
        }
    }
}

/* The blocks take the place of the prompt's. */
static void replace_blocks(struct kv_sequence *s, uint32_t c, struct kv_block **blocks, uint32_t n,
                           uint32_t n_slots)
{
    struct kv_block_list *list = &s->lists[c];
    for (uint32_t i = 0; i < list->n; i++) {
        atomic_fetch_sub(&s->cache->blocks_held, list->pages[i] != NULL);
        kv_block_unref(kv_cache_arena(s->cache), list->blocks[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        list->blocks[i] = blocks[i];
        list->pages[i] = blocks[i]->data;
    }
    atomic_fetch_add(&s->cache->blocks_held, n);
    list->n = n;
    list->first_live = 0;
    list->n_dropped = s->n_tokens - n_slots;
    free(blocks);
}

/* All of it, or nothing: memory first. */
static int compress(struct kv_sequence *s, struct choice *choice)
{
    struct kv_block **blocks[KV_MAX_CLASSES] = {NULL};
    uint32_t n = blocks_for(n_kept(choice)), n_classes = s->layout->n_classes;
    int rc = 0;
    for (uint32_t c = 0; rc == 0 && c < n_classes; c++) {
        if (s->layout->classes[c].desc.window > 0) {
            rc = own_pages(s, c);
            continue;
        }
        blocks[c] = take_blocks(s, c, n);
        rc = blocks[c] != NULL ? 0 : -ENOMEM;
    }
    for (uint32_t c = 0; c < n_classes; c++) {
        if (rc == 0 && blocks[c] != NULL) {
            copy_choices(s, c, choice, blocks[c]);
            replace_blocks(s, c, blocks[c], n, n_kept(choice));
        } else {
            release_blocks(s, blocks[c], blocks[c] != NULL ? n : 0);
        }
    }
    return rc;
}

static int begin_choice(struct kv_sequence *s)
{
    struct kv_view *v = &s->view;
    struct choice choice;
    int rc = choice_init(&choice, v);
    rc = rc < 0 ? rc : compress(s, &choice);
    if (rc == 0 && v->policy.kind == KV_POLICY_SNAPSTREAM) {
        v->n_sinks = choice.n_first + choice.n_chosen;
        v->recent = choice.n_last;
    }
    if (rc == 0) {
        drop_votes(s);
    }
    choice_finish(&choice);
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
