/* daemon/kv/view_compress.c - see view_compress.h. */
#include "daemon/kv/view_compress.h"

#include "daemon/backend/pool.h"
#include "daemon/kv/cache_internal.h"
#include "daemon/kv/view_gather.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK GQA_KV_BLOCK_TOKENS

/* What becomes of a prompt, in every layer and group. */
struct plan {
    uint32_t n_first, n_chosen, n_last; /* the first tokens, the best of those between, the last */
    uint32_t n_kept;                    /* all three */
};

static struct plan plan_of(const struct kv_view *v)
{
    const struct kv_policy *p = &v->policy;
    struct plan plan = {.n_chosen = p->budget - p->observed, .n_last = p->observed};
    if (p->kind == KV_POLICY_SNAPSTREAM) {
        uint32_t between = v->n_prompt - p->sinks - p->recent;
        plan.n_first = p->sinks;
        plan.n_chosen = p->topk < between ? p->topk : between;
        plan.n_last = p->recent;
    }
    plan.n_kept = plan.n_first + plan.n_chosen + plan.n_last;
    return plan;
}

/* Choosing for each layer and group, and copying of one class, a task for each. */
struct copying {
    const struct kv_sequence *s;
    struct plan plan;
    uint32_t layer_class, n_votes;
    struct kv_block *const *to;
    /* Of each worker: */
    uint32_t *tokens; /* (n_kept), those of its task */
    float *room;      /* (2 n_votes), of kv_select() */
};

static int make_room(struct copying *c)
{
    struct pool *pool = c->s->cache->options.pool;
    uint32_t n_workers = pool != NULL ? pool_n_threads(pool) : 1;
    c->n_votes = kv_policy_n_votes(&c->s->view.policy, c->s->view.n_prompt);
    c->tokens = calloc((size_t)n_workers * c->plan.n_kept, sizeof(*c->tokens));
    c->room = calloc((size_t)n_workers * 2 * c->n_votes, sizeof(*c->room));
    return c->tokens != NULL && c->room != NULL ? 0 : -ENOMEM;
}

/* The tokens that stay, ascending. */
static void choose(const struct copying *c, const float *votes, float *room, uint32_t *tokens)
{
    const struct kv_view *v = &c->s->view;
    const struct plan *p = &c->plan;
    uint32_t between = v->n_prompt - p->n_first - p->n_last;
    uint32_t *chosen = tokens + p->n_first, *last = chosen + p->n_chosen;
    kv_select(votes + p->n_first, between, &v->policy, p->n_chosen, room, chosen);
    for (uint32_t i = 0; i < p->n_first; i++) {
        tokens[i] = i;
    }
    for (uint32_t i = 0; i < p->n_chosen; i++) {
        chosen[i] += p->n_first;
    }
    for (uint32_t i = 0; i < p->n_last; i++) {
        last[i] = v->n_prompt - p->n_last + i;
    }
}

static void copy_task(void *arg, uint32_t index, uint32_t worker)
{
    const struct copying *c = arg;
    const struct kv_sequence *s = c->s;
    uint32_t n_groups = s->layout->classes[c->layer_class].desc.n_kv_heads;
    uint32_t layer = index / n_groups, group = index % n_groups;
    uint32_t *tokens = c->tokens + (size_t)worker * c->plan.n_kept;
    if (s->layout->layer_class[layer] != c->layer_class) {
        return;
    }
    choose(c, s->view.votes[layer] + (size_t)group * c->n_votes,
           c->room + (size_t)worker * 2 * c->n_votes, tokens);
    kv_gather(s->layout, layer, group, s->lists[c->layer_class].pages, tokens, c->plan.n_kept,
              c->to);
}

static void copy_choices(struct copying *c)
{
    const struct kv_layout *l = c->s->layout;
    uint32_t n_tasks = l->n_layers * l->classes[c->layer_class].desc.n_kv_heads;
    struct pool *pool = c->s->cache->options.pool;
    if (pool != NULL) {
        pool_parallel(pool, copy_task, c, n_tasks);
        return;
    }
    for (uint32_t i = 0; i < n_tasks; i++) {
        copy_task(c, i, 0);
    }
}

/* ---- telling ----------------------------------------------------------------------------- */

static void tell_choices(const struct copying *c, float *ret)
{
    const struct kv_layout *l = c->s->layout;
    uint32_t n_choices = 0;
    for (uint32_t layer = 0; layer < l->n_layers; layer++) {
        const struct kv_layer_desc *d = &l->classes[l->layer_class[layer]].desc;
        for (uint32_t g = 0; d->window == 0 && g < d->n_kv_heads; g++, n_choices++) {
            choose(c, c->s->view.votes[layer] + (size_t)g * c->n_votes, c->room, c->tokens);
            for (uint32_t i = 0; i < c->plan.n_kept; i++) {
                ret[c->tokens[i]]++;
            }
        }
    }
    for (uint32_t i = 0; i < c->s->view.n_prompt; i++) {
        ret[i] = n_choices > 0 ? ret[i] / (float)n_choices : 1;
    }
}

int kv_view_shares(const struct kv_sequence *s, float *ret)
{
    const struct kv_view *v = &s->view;
    const struct kv_policy *p = &v->policy;
    bool slides = p->kind == KV_POLICY_WINDOW && v->n_prompt > (uint64_t)p->sinks + p->recent;
    if (kv_policy_n_votes(p, v->n_prompt) == 0) {
        for (uint32_t i = 0; i < v->n_prompt; i++) {
            ret[i] = !slides || i < p->sinks || v->n_prompt - i <= p->recent;
        }
        return 0;
    }
    if (v->spoiled || v->votes == NULL) {
        return -ENODATA;
    }
    struct copying c = {.s = s, .plan = plan_of(v)};
    int rc = make_room(&c);
    memset(ret, 0, v->n_prompt * sizeof(*ret));
    if (rc == 0) {
        tell_choices(&c, ret);
    }
    free(c.tokens);
    free(c.room);
    return rc;
}

/* ---- blocks ------------------------------------------------------------------------------ */

static void release_blocks(struct kv_sequence *s, struct kv_block **blocks, uint32_t n)
{
    for (uint32_t i = 0; blocks != NULL && i < n; i++) {
        kv_block_unref(kv_cache_arena(s->cache), blocks[i]);
    }
    free(blocks);
}

/* Blocks for what is kept of a class; NULL: no memory. */
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
        list->versions[i] = blocks[i]->version;
    }
    atomic_fetch_add(&s->cache->blocks_held, n);
    list->n = n;
    list->first_live = 0;
    list->n_dropped = s->n_tokens - n_slots;
    free(blocks);
}

/* ---- all classes ------------------------------------------------------------------------- */

int kv_view_compress(struct kv_sequence *s)
{
    struct kv_block **blocks[KV_MAX_CLASSES] = {NULL};
    struct copying copying = {.s = s, .plan = plan_of(&s->view)};
    uint32_t n_kept = copying.plan.n_kept, n = n_kept / BLOCK + (n_kept % BLOCK != 0);
    int rc = make_room(&copying);
    for (uint32_t c = 0; rc == 0 && c < s->layout->n_classes; c++) {
        if (s->layout->classes[c].desc.window == 0) {
            blocks[c] = take_blocks(s, c, n);
            rc = blocks[c] != NULL ? 0 : -ENOMEM;
        }
    }
    for (uint32_t c = 0; c < s->layout->n_classes; c++) {
        if (rc == 0 && blocks[c] != NULL) {
            copying.layer_class = c;
            copying.to = blocks[c];
            copy_choices(&copying);
            replace_blocks(s, c, blocks[c], n, n_kept);
        } else {
            release_blocks(s, blocks[c], n);
        }
    }
    if (rc == 0 && s->view.policy.kind == KV_POLICY_SNAPSTREAM) {
        s->view.n_sinks = copying.plan.n_first + copying.plan.n_chosen;
        s->view.recent = copying.plan.n_last;
    }
    free(copying.tokens);
    free(copying.room);
    return rc;
}
