/* daemon/kv/cache_check.c - whether what was restored is what was written: before it is adopted, on
 * the pool while nothing else runs, else on the io thread.
 *
 * A job lives from its submission until its news are taken in; meanwhile the space and the nodes
 * that it points to stay (n_pending, checking). */
#include "daemon/backend/pool.h"
#include "daemon/io/io.h"
#include "daemon/kv/cache_internal.h"
#include "daemon/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct check_item {
    struct kv_node *node;
    struct kv_store_block block;
    int result;
};

struct checking {
    struct kv_news news;
    struct io_call_job call;
    struct kv_space *space;
    uint32_t n;
    struct check_item items[];
};

/* A worker of the pool, or the io thread. */
static void check_one(void *arg, uint32_t index, uint32_t worker)
{
    struct checking *k = arg;
    struct check_item *item = &k->items[index];
    item->result = kv_store_verify(k->space->store, &item->block);
}

static int check_all(void *arg)
{
    struct checking *k = arg;
    for (uint32_t i = 0; i < k->n; i++) {
        check_one(k, i, 0);
    }
    return 0;
}

/* Uses what was found; what is not to be believed is forgotten. */
static void apply_checks(struct checking *k)
{
    struct kv_space *s = k->space;
    for (uint32_t i = 0; i < k->n; i++) {
        const struct check_item *item = &k->items[i];
        struct kv_place *p = &item->node->places[item->block.layer_class];
        p->checking = false;
        if (p->state != KV_SAVED) {
            continue; /* forgotten meanwhile */
        }
        if (item->result == 0 && !kv_store_marked(s->store, &item->block)) {
            p->verified = true;
        } else if (item->result != -ECANCELED) {
            atomic_fetch_add(&s->cache->n_corrupt, 1);
            log_warning("KV cache of %s: a block of the store is not what was written (%s): it "
                        "will be computed again",
                        s->realm, strerror(-item->result));
            kv_space_forget(s, item->node, item->block.layer_class);
        }
    }
}

static void check_done(void *arg, int result)
{
    struct checking *k = arg;
    for (uint32_t i = 0; result < 0 && i < k->n; i++) {
        k->items[i].result = -ECANCELED;
    }
    kv_cache_post(k->space->cache, &k->news);
}

static void take_checked(struct kv_news *news)
{
    struct checking *k = (struct checking *)news;
    kv_space_end_job(k->space);
    apply_checks(k);
    free(k);
}

static bool needs_check(const struct kv_place *p)
{
    return p->block == NULL && p->state == KV_SAVED && !p->verified;
}

/* Counts (items NULL) or collects the places to be checked; *ret_waiting: others check some. */
static uint32_t find_unchecked(const struct kv_space *s, struct kv_node *const *nodes,
                               const uint32_t *first_needed, uint32_t n, struct check_item *items,
                               bool *ret_waiting)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t c = 0; c < s->n_classes; c++) {
            struct kv_place *p = &nodes[i]->places[c];
            if (nodes[i]->position < first_needed[c] || !needs_check(p)) {
                continue;
            }
            *ret_waiting |= p->checking;
            if (p->checking) {
                continue;
            }
            if (items != NULL) {
                items[count].node = nodes[i];
                items[count].block = (struct kv_store_block){
                    .key = nodes[i]->key,
                    .layer_class = c,
                    .slot = p->slot,
                    .checksum = p->checksum,
                    .position = nodes[i]->position,
                };
            }
            count++;
        }
    }
    return count;
}

bool kv_space_check(struct kv_space *s, struct kv_node *const *nodes, const uint32_t *first_needed,
                    uint32_t n, bool alone)
{
    struct kv_cache *c = s->cache;
    bool waiting = false;
    uint32_t count = find_unchecked(s, nodes, first_needed, n, NULL, &waiting);
    if (count == 0) {
        return !waiting;
    }
    struct checking *k = calloc(1, sizeof(*k) + count * sizeof(k->items[0]));
    if (k == NULL) {
        return true; /* the caller finds them unverified, and does without */
    }
    k->news.take = take_checked;
    k->space = s;
    k->n = count;
    find_unchecked(s, nodes, first_needed, n, k->items, &waiting);
    for (uint32_t i = 0; i < count; i++) {
        kv_store_will_need(s->store, &k->items[i].block);
    }
    if (alone && c->options.pool != NULL) {
        pool_parallel(c->options.pool, check_one, k, count);
        apply_checks(k);
        free(k);
        return !waiting;
    }
    for (uint32_t i = 0; i < count; i++) {
        k->items[i].node->places[k->items[i].block.layer_class].checking = true;
    }
    k->call = (struct io_call_job){.fn = check_all, .done = check_done, .arg = k};
    kv_space_begin_job(s);
    if (io_submit_call(c->options.io, &k->call) < 0) {
        kv_space_end_job(s);
        check_all(k);
        apply_checks(k);
        free(k);
        return !waiting;
    }
    return false;
}
