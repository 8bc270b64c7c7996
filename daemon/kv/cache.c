/* daemon/kv/cache.c - spaces, the arena with room made for it, the mailbox. */
#include "daemon/kv/cache_internal.h"

#include "daemon/kv/guard.h"
#include "daemon/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* How much is evicted at once, as a share of the arena: a scan over all nodes costs more than a
 * block. */
#define EVICT_SHARE 32u

uint64_t kv_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t kv_now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME_COARSE, &t);
    return (uint64_t)t.tv_sec;
}

/* ---- the whole --------------------------------------------------------------------------- */

/* Timed waits go by the clock that nobody sets. */
static void init_posted(pthread_cond_t *posted)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(posted, &attr);
    pthread_condattr_destroy(&attr);
}

int kv_cache_create(const struct kv_cache_options *options, struct kv_cache **ret)
{
    struct kv_cache *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        return -ENOMEM;
    }
    c->options = *options;
    c->news_end = &c->news;
    c->check_bytes_max = KV_CHECK_BYTES;
    c->n_restored_max = KV_RESTORED_MAX;
    c->patience_ns = KV_OPEN_PATIENCE_NS;
    c->end_s = KV_END_S;
    c->faults_seen = kv_guard_faults();
    int rc = kv_arena_create(options->arena_bytes_max, &c->arena);
    if (rc == 0 && options->folder != NULL) {
        c->folder = strdup(options->folder);
        rc = c->folder != NULL ? 0 : -ENOMEM;
    }
    if (rc < 0) {
        kv_arena_destroy(c->arena);
        free(c);
        return rc;
    }
    pthread_mutex_init(&c->lock, NULL);
    init_posted(&c->posted);
    kv_folder_list(c);
    *ret = c;
    return 0;
}

/* Jobs on the io thread point into the spaces: takes in their news until the last has come, or the
 * time has. False: some are under way. */
static bool wait_for_pending(struct kv_cache *c, const struct timespec *end)
{
    int rc = 0;
    while (c->n_pending > 0 && rc != ETIMEDOUT) {
        pthread_mutex_lock(&c->lock);
        while (c->news == NULL && rc != ETIMEDOUT) {
            rc = pthread_cond_timedwait(&c->posted, &c->lock, end);
        }
        pthread_mutex_unlock(&c->lock);
        kv_cache_poll(c);
    }
    return c->n_pending == 0;
}

/* False: the time has come before all are closed. */
static bool close_stores(struct kv_cache *c, const struct timespec *end)
{
    for (struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        while (!kv_space_begin_close(s)) { /* enough are being closed */
            if (!wait_for_pending(c, end)) {
                return false;
            }
        }
    }
    return wait_for_pending(c, end);
}

/* Its store is closed, or being closed. */
static void space_destroy(struct kv_space *s)
{
    kv_space_clear(s);
    kv_tree_finish(&s->tree);
    free(s);
}

/* The io thread is inside of the kernel, which may write from the arena and into what belongs to
 * its jobs whenever the disk answers: all of it stays as it is. Only the engine is told no more. */
static void leave(struct kv_cache *c)
{
    pthread_mutex_lock(&c->lock);
    c->options.wake = NULL;
    pthread_mutex_unlock(&c->lock);
    log_error(
        "KV cache: the disk has not done %u jobs within %u s: what was not saved is lost, and "
        "the memory that they use is left to them",
        (unsigned)c->n_pending, c->end_s);
}

static struct timespec begin_end(struct kv_cache *c)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += c->end_s;
    c->closing = true;
    return end;
}

bool kv_cache_settle(struct kv_cache *c)
{
    const struct timespec end = begin_end(c);
    if (!wait_for_pending(c, &end)) {
        leave(c);
        return false;
    }
    return true;
}

bool kv_cache_destroy(struct kv_cache *c)
{
    if (c == NULL) {
        return true;
    }
    const struct timespec end = begin_end(c);
    if (!wait_for_pending(c, &end) || !close_stores(c, &end)) {
        leave(c);
        return false;
    }
    while (c->spaces != NULL) {
        struct kv_space *s = c->spaces;
        c->spaces = s->next;
        space_destroy(s);
    }
    kv_folder_finish(c);
    kv_arena_destroy(c->arena);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->posted);
    free(c->folder);
    free(c);
    return true;
}

/* ---- spaces ------------------------------------------------------------------------------ */

static struct kv_space *space_create(struct kv_cache *c, const char *realm,
                                     const struct kv_identity *identity,
                                     const struct kv_layout *layout)
{
    struct kv_space *s = calloc(1, sizeof(*s));
    if (s == NULL) {
        return NULL;
    }
    struct kv_key seed;
    memcpy(&seed, identity->id, sizeof(seed));
    if (kv_tree_init(&s->tree, seed, layout->n_classes, identity->classes_differ) < 0) {
        free(s);
        return NULL;
    }
    s->cache = c;
    strncpy(s->realm, realm, sizeof(s->realm) - 1);
    s->identity = *identity;
    s->n_classes = layout->n_classes;
    for (uint32_t i = 0; i < s->n_classes; i++) {
        s->windows[i] = layout->classes[i].desc.window;
        s->block_bytes[i] = layout->classes[i].block_bytes;
    }
    return s;
}

/* What points to the space that was not used for longest, or NULL: all are in use. */
static struct kv_space **find_idle(struct kv_cache *c)
{
    struct kv_space **idle = NULL;
    for (struct kv_space **link = &c->spaces; *link != NULL; link = &(*link)->next) {
        struct kv_space *s = *link;
        bool busy = s->n_holders > 0 || s->n_pending > 0;
        if (!busy && (idle == NULL || s->last_turn < (*idle)->last_turn)) {
            idle = link;
        }
    }
    return idle;
}

/* Where too many are open. While the disk does not keep up with closing them, they stay. */
static void close_idle_spaces(struct kv_cache *c)
{
    while (c->n_spaces >= KV_SPACES_MAX) {
        struct kv_space **idle = find_idle(c);
        if (idle == NULL || !kv_space_begin_close(*idle)) {
            return;
        }
        struct kv_space *s = *idle;
        *idle = s->next;
        c->n_spaces--;
        space_destroy(s);
        kv_folder_make_room(c, 0);
    }
}

struct kv_space *kv_cache_space(struct kv_cache *c, const char *realm,
                                const struct kv_identity *identity, const struct kv_layout *layout)
{
    struct kv_space *s = c->spaces;
    while (s != NULL && (memcmp(s->identity.id, identity->id, sizeof(identity->id)) != 0 ||
                         strcmp(s->realm, realm) != 0)) {
        s = s->next;
    }
    if (s == NULL) {
        close_idle_spaces(c);
        s = space_create(c, realm, identity, layout);
        if (s == NULL) {
            return NULL;
        }
        s->next = c->spaces;
        c->spaces = s;
        c->n_spaces++;
        kv_folder_opened(c, s);
        kv_space_open(s);
    }
    s->last_turn = ++c->turn;
    return s;
}

bool kv_space_is_ready(const struct kv_space *s)
{
    return s->state != KV_SPACE_OPENING || s->overdue;
}

static bool may_become_overdue(const struct kv_space *s)
{
    return s->state == KV_SPACE_OPENING && !s->overdue;
}

/* ---- news -------------------------------------------------------------------------------- */

void kv_cache_post(struct kv_cache *c, struct kv_news *news)
{
    news->next = NULL;
    pthread_mutex_lock(&c->lock);
    *c->news_end = news;
    c->news_end = &news->next;
    pthread_cond_signal(&c->posted);
    /* Under the lock: whoever waits for this news to end the cache may not end it, and the engine,
     * before both have been told. */
    if (c->options.wake != NULL) {
        c->options.wake(c->options.wake_arg);
    }
    pthread_mutex_unlock(&c->lock);
}

void kv_cache_poll(struct kv_cache *c)
{
    pthread_mutex_lock(&c->lock);
    struct kv_news *news = c->news;
    c->news = NULL;
    c->news_end = &c->news;
    pthread_mutex_unlock(&c->lock);
    while (news != NULL) {
        struct kv_news *next = news->next;
        news->take(news);
        c->n_news++;
        news = next;
    }
    uint64_t now = 0;
    for (struct kv_space *s = c->spaces; s != NULL && !c->closing; s = s->next) {
        if (s->retry_ns == 0 && !may_become_overdue(s)) {
            continue;
        }
        now = now != 0 ? now : kv_now_ns();
        if (may_become_overdue(s) && now >= s->opening_ns + c->patience_ns) {
            s->overdue = true;
            c->n_news++; /* those that wait for it look again */
            kv_space_set_trouble(s, "the disk takes long to tell what it holds");
        }
        if (s->retry_ns == 0 || s->retry_ns > now) {
            continue;
        }
        s->retry_ns = 0;
        if (s->state == KV_SPACE_FAILED) {
            kv_space_open(s);
        } else if (s->backlog) {
            kv_space_save_backlog(s);
        }
    }
}

uint64_t kv_cache_news(const struct kv_cache *c)
{
    return c->n_news;
}

bool kv_cache_is_busy(const struct kv_cache *c)
{
    return c->n_pending > 0;
}

int kv_cache_timeout_ms(const struct kv_cache *c)
{
    uint64_t first = UINT64_MAX, now = kv_now_ns();
    for (const struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        first = s->retry_ns != 0 && s->retry_ns < first ? s->retry_ns : first;
        uint64_t overdue_ns = may_become_overdue(s) ? s->opening_ns + c->patience_ns : UINT64_MAX;
        first = overdue_ns < first ? overdue_ns : first;
    }
    if (first == UINT64_MAX) {
        return -1;
    }
    return first <= now ? 0 : (int)((first - now) / 1000000u) + 1;
}

bool kv_cache_has_faults(const struct kv_cache *c)
{
    for (const struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        if (s->store != NULL && s->n_holders > 0) {
            kv_store_intact(s->store); /* else its blocks are marked, and that is a fault */
        }
    }
    return kv_guard_faults() != c->faults_seen;
}

void kv_cache_drop_faulty(struct kv_cache *c)
{
    c->faults_seen = kv_guard_faults();
    atomic_fetch_add(&c->n_faults, 1);
    for (struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        uint32_t bucket = 0;
        struct kv_node *n = s->store != NULL ? kv_tree_next(&s->tree, &bucket, NULL) : NULL;
        for (; n != NULL; n = kv_tree_next(&s->tree, &bucket, n)) {
            for (uint32_t i = 0; i < s->n_classes; i++) {
                struct kv_store_block b = {.layer_class = i, .slot = n->places[i].slot};
                if (n->places[i].state == KV_SAVED && kv_store_marked(s->store, &b)) {
                    atomic_fetch_add(&c->n_corrupt, 1);
                    kv_space_forget(s, n, i);
                }
            }
        }
    }
}

/* ---- the arena --------------------------------------------------------------------------- */

/* Evicts more than is wanted where that is little. False: there is nothing to evict. */
static bool evict_for(struct kv_cache *c, uint64_t bytes)
{
    uint64_t share = c->options.arena_bytes_max / EVICT_SHARE;
    return kv_cache_evict_arena(c, share > bytes ? share : bytes) > 0;
}

int kv_cache_alloc(struct kv_cache *c, uint64_t block_bytes, struct kv_block **ret)
{
    int rc = kv_arena_alloc(c->arena, block_bytes, ret);
    while (rc == -ENOMEM && evict_for(c, block_bytes)) {
        rc = kv_arena_alloc(c->arena, block_bytes, ret);
    }
    return rc;
}

int kv_cache_set_aside(struct kv_cache *c, uint64_t bytes)
{
    int rc = kv_arena_set_aside(c->arena, bytes);
    while (rc == -ENOMEM && evict_for(c, bytes)) {
        rc = kv_arena_set_aside(c->arena, bytes);
    }
    return rc;
}

void kv_cache_trim(struct kv_cache *c)
{
    kv_arena_trim(c->arena);
}

struct kv_arena *kv_cache_arena(struct kv_cache *c)
{
    return c->arena;
}

void kv_cache_count(struct kv_cache *c, uint64_t n_tokens, uint64_t n_found)
{
    atomic_fetch_add(&c->queries, n_tokens);
    atomic_fetch_add(&c->hits, n_found);
}

void kv_cache_stats(struct kv_cache *c, struct kv_cache_stats *ret)
{
    *ret = (struct kv_cache_stats){
        .n_spaces = c->n_spaces,
        .n_pending = c->n_pending,
        .n_nodes = atomic_load(&c->n_nodes),
        .queries = atomic_load(&c->queries),
        .hits = atomic_load(&c->hits),
        .blocks_held = atomic_load(&c->blocks_held),
        .arena_bytes_cached = atomic_load(&c->bytes_cached),
        .store_bytes = atomic_load(&c->store_bytes),
        .store_bytes_synced = atomic_load(&c->store_bytes_synced),
        .store_bytes_written = atomic_load(&c->store_bytes_written),
        .store_bytes_max = c->options.store_bytes_max,
        .n_evicted_arena = atomic_load(&c->n_evicted_arena),
        .n_evicted_store = atomic_load(&c->n_evicted_store),
        .n_corrupt = atomic_load(&c->n_corrupt),
        .n_faults = atomic_load(&c->n_faults),
        .n_saved_bytes = atomic_load(&c->n_saved_bytes),
    };
    pthread_mutex_lock(&c->lock);
    snprintf(ret->store_state, sizeof(ret->store_state), "%s",
             c->folder == NULL       ? "off"
             : c->trouble[0] != '\0' ? c->trouble
                                     : "ok");
    pthread_mutex_unlock(&c->lock);
}
