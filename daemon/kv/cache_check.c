/* daemon/kv/cache_check.c - whether what was restored is what was written: before it is adopted.
 * The engine and its pool look themselves while nothing else runs and all of it is in memory; else
 * the io thread does, for a disk may take long, or never answer. In pieces: between two of them the
 * engine takes its steps and commands, and the io thread does what else it has.
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

#define DIRECT_PIECES 2u /* on the pool, many read and hash at once */

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
    uint32_t next; /* where the next piece begins; the io thread's */
    struct check_item items[];
};

/* A worker of the pool, or the io thread. */
static void check_one(void *arg, uint32_t index, uint32_t worker)
{
    struct checking *k = arg;
    struct check_item *item = &k->items[index];
    item->result = kv_store_verify(k->space->store, &item->block);
}

/* Where a piece of about so many bytes ends that begins there: at least one block. */
static uint32_t piece_end(const struct checking *k, uint32_t first, uint64_t bytes_max)
{
    uint64_t bytes = 0;
    uint32_t end = first;
    while (end < k->n && bytes < bytes_max) {
        bytes += k->space->block_bytes[k->items[end++].block.layer_class];
    }
    return end;
}

/* So that the disk is at work while the piece before is looked at. */
static void read_ahead(const struct checking *k, uint32_t first, uint32_t end)
{
    for (uint32_t i = first; i < end; i++) {
        kv_store_will_need(k->space->store, &k->items[i].block);
    }
}

/* The io thread. */
static int check_piece(void *arg)
{
    struct checking *k = arg;
    uint64_t bytes_max = k->space->cache->check_bytes_max;
    uint32_t end = piece_end(k, k->next, bytes_max);
    read_ahead(k, k->next, piece_end(k, end, bytes_max));
    while (k->next < end) {
        check_one(k, k->next++, 0);
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

/* The io thread: behind what others have queued meanwhile, the next piece. */
static void check_done(void *arg, int result)
{
    struct checking *k = arg;
    struct kv_cache *c = k->space->cache;
    bool more = result == 0 && k->next < k->n && !atomic_load(&c->closing);
    if (!more || io_submit_call(c->options.io, &k->call) < 0) {
        kv_cache_post(c, &k->news);
    }
}

static void take_checked(struct kv_news *news)
{
    struct checking *k = (struct checking *)news;
    kv_space_end_job(k->space);
    apply_checks(k);
    free(k);
}

/* A piece was checked directly: whoever wants the rest asks again. */
static void take_turn(struct kv_news *news)
{
    struct checking *k = (struct checking *)news;
    kv_space_end_job(k->space);
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
                items[count].result = -ECANCELED; /* until it is looked at */
            }
            count++;
        }
    }
    return count;
}

/* So much the engine checks at once. */
static uint32_t direct_end(const struct checking *k)
{
    return piece_end(k, 0, DIRECT_PIECES * k->space->cache->check_bytes_max);
}

static bool may_check_directly(const struct checking *k)
{
    bool may = k->space->cache->options.pool != NULL;
    for (uint32_t i = 0, end = direct_end(k); may && i < end; i++) {
        may = kv_store_in_memory(k->space->store, &k->items[i].block);
    }
    return may;
}

/* The first piece, on the pool; the engine does what else it has before the next. False: there is
 * more. */
static bool check_directly(struct checking *k)
{
    struct kv_space *s = k->space;
    uint32_t end = direct_end(k);
    bool more = end < k->n;
    pool_parallel(s->cache->options.pool, check_one, k, end);
    k->n = end;
    apply_checks(k);
    if (more) {
        k->news.take = take_turn;
        kv_space_begin_job(s);
        kv_cache_post(s->cache, &k->news);
    } else {
        free(k);
    }
    return !more;
}

/* Hands all to the io thread. False: it ends, and so does the daemon. */
static bool begin_check(struct checking *k)
{
    for (uint32_t i = 0; i < k->n; i++) {
        k->items[i].node->places[k->items[i].block.layer_class].checking = true;
    }
    k->call = (struct io_call_job){.fn = check_piece, .done = check_done, .arg = k};
    kv_space_begin_job(k->space);
    if (io_submit_call(k->space->cache->options.io, &k->call) < 0) {
        take_checked(&k->news);
        return false;
    }
    return true;
}

bool kv_space_check(struct kv_space *s, struct kv_node *const *nodes, const uint32_t *first_needed,
                    uint32_t n, bool alone)
{
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
    if (alone && may_check_directly(k)) {
        return check_directly(k) && !waiting;
    }
    return !begin_check(k) && !waiting;
}
