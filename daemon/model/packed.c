#include "daemon/model/packed.h"

#include "daemon/model/pack.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define ALIGN_BYTES WEIGHTS_PAGE_BYTES
/* A daemon that ends lets a file that is being written become whole: packing again would take
 * longer. No longer than this. */
#define SAVE_END_MS   10000
#define SAVE_NICENESS 10

struct packed_weights {
    atomic_uint refs;
    struct digest_value digest;
    struct weights_want want;
    struct weights_room room;
    enum packed_source source;
    struct weights_cache *cache;

    /* The thread that writes the file. */
    pthread_t saver;
    bool has_saver;
    atomic_bool cancel_save, in_file;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool save_ended; /* under the lock */
};

static uint64_t align_up(uint64_t bytes)
{
    return (bytes + ALIGN_BYTES - 1) & ~(uint64_t)(ALIGN_BYTES - 1);
}

/* ---- what is wanted ---------------------------------------------------------------------- */

/* Hashes what decides a weight's packed bytes, besides its own. */
static void add_weight(struct digest *d, const struct gqa_weight *w)
{
    const uint32_t kinds[] = {w->type, w->n_dims};
    digest_update(d, w->name, strlen(w->name) + 1);
    digest_update(d, kinds, sizeof(kinds));
    digest_update(d, w->ne, sizeof(w->ne));
    digest_update(d, &w->packed_bytes, sizeof(w->packed_bytes));
}

/* Asks the backend for the size of every weight, and names what that makes. */
static int plan(const struct digest_value *digest, struct backend *backend,
                struct model_program *program, struct weights_want *ret)
{
    const struct gqa_program *iface = backend_program(backend);
    struct weights_want want = {.data_bytes = 0};
    struct digest *d;
    const char *pack_id = iface->pack_id != NULL ? iface->pack_id : "";
    int rc = digest_create(&d);
    if (rc < 0) {
        return rc;
    }
    snprintf(want.backend, sizeof(want.backend), "%s", backend_name(backend));
    snprintf(want.pack_id, sizeof(want.pack_id), "%s", pack_id);
    memcpy(want.digest, digest->bytes, sizeof(want.digest));
    digest_update(d, digest->bytes, sizeof(digest->bytes));
    digest_update(d, want.backend, sizeof(want.backend));
    digest_update(d, pack_id, strlen(pack_id) + 1);
    for (uint32_t i = 0; rc == 0 && i < program->n_weights; i++) {
        struct gqa_weight *w = &program->weights[i];
        w->packed_bytes =
            program->weight_is_linear[i] ? iface->pack_bytes(backend_context(backend), w) : 0;
        w->packed = NULL;
        if (w->packed_bytes > 0) {
            add_weight(d, w);
        }
        if (w->packed_bytes > UINT64_MAX - ALIGN_BYTES ||
            __builtin_add_overflow(want.data_bytes, align_up(w->packed_bytes), &want.data_bytes)) {
            rc = -EOVERFLOW;
        }
    }
    struct digest_value key = digest_value(d);
    digest_destroy(d);
    memcpy(want.key, key.bytes, sizeof(want.key));
    *ret = rc == 0 ? want : *ret;
    return rc;
}

/* Tells the program where its weights lie. */
static void place(const struct packed_weights *w, struct model_program *program)
{
    uint64_t offset = 0;
    for (uint32_t i = 0; i < program->n_weights; i++) {
        struct gqa_weight *weight = &program->weights[i];
        if (weight->packed_bytes > 0) {
            weight->packed = (char *)w->room.memory + offset;
            offset += align_up(weight->packed_bytes);
        }
    }
}

static void destroy(struct packed_weights *w)
{
    weights_room_finish(&w->room);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->wake);
    free(w);
}

static int create(const struct packed_request *r, struct packed_weights **ret)
{
    pthread_condattr_t monotonic;
    struct packed_weights *w = calloc(1, sizeof(*w));
    if (w == NULL) {
        return -ENOMEM;
    }
    atomic_init(&w->refs, 1);
    w->digest = *r->digest;
    w->cache = r->cache;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    int rc = plan(r->digest, r->backend, r->program, &w->want);
    if (rc == 0 && w->want.data_bytes > 0) {
        rc = weights_room_init(&w->room, w->want.data_bytes);
    }
    if (rc < 0) {
        destroy(w);
        return rc;
    }
    place(w, r->program);
    *ret = w;
    return 0;
}

/* ---- finding, making --------------------------------------------------------------------- */

static void on_checked(void *arg, uint64_t done, uint64_t total)
{
    const struct packed_request *r = arg;
    if (r->progress != NULL) {
        r->progress(r->arg, "check", done, total);
    }
}

static void on_packed(void *arg, uint64_t done, uint64_t total)
{
    const struct packed_request *r = arg;
    if (r->progress != NULL) {
        r->progress(r->arg, "pack", done, total);
    }
}

int packed_weights_find(const struct packed_request *r, struct packed_weights **ret)
{
    struct packed_weights *w;
    int rc = create(r, &w);
    if (rc < 0) {
        return rc;
    }
    if (w->want.data_bytes > 0) {
        rc = r->cache == NULL ? -ENOENT
                              : weights_cache_map(r->cache, &w->want, &w->room, r->cancel,
                                                  on_checked, (void *)r);
        w->source = PACKED_FILE;
        atomic_store(&w->in_file, true);
    }
    if (rc < 0) {
        destroy(w);
        return rc;
    }
    *ret = w;
    return 0;
}

static void *saver_main(void *arg)
{
    struct packed_weights *w = arg;
    setpriority(PRIO_PROCESS, 0, SAVE_NICENESS); /* of this thread, on Linux */
    int rc = weights_cache_save(w->cache, &w->want, &w->room, &w->cancel_save);
    atomic_store(&w->in_file, rc == 0);
    pthread_mutex_lock(&w->lock);
    w->save_ended = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

int packed_weights_make(const struct packed_request *r, struct packed_weights **ret)
{
    struct packed_weights *w;
    int rc = create(r, &w);
    if (rc < 0) {
        return rc;
    }
    if (w->want.data_bytes > 0) {
        rc = weights_room_clear(&w->room);
        rc = rc < 0 ? rc
                    : pack_run(r->backend, r->program, w->want.data_bytes, r->n_threads, r->cancel,
                               on_packed, (void *)r);
        w->source = PACKED_NOW;
    }
    if (rc < 0) {
        destroy(w);
        return rc;
    }
    if (w->want.data_bytes > 0) {
        weights_room_seal(&w->room); /* from now on it is as constant as a file */
        w->has_saver = w->cache != NULL && pthread_create(&w->saver, NULL, saver_main, w) == 0;
    }
    *ret = w;
    return 0;
}

struct packed_weights *packed_weights_share(struct packed_weights *w, struct backend *backend,
                                            struct model_program *program)
{
    struct weights_want want;
    if (w == NULL || plan(&w->digest, backend, program, &want) < 0 ||
        memcmp(want.key, w->want.key, sizeof(want.key)) != 0 ||
        want.data_bytes != w->want.data_bytes) {
        return NULL;
    }
    place(w, program);
    return packed_weights_ref(w);
}

/* ---- sharing ----------------------------------------------------------------------------- */

struct packed_weights *packed_weights_ref(struct packed_weights *w)
{
    atomic_fetch_add_explicit(&w->refs, 1, memory_order_relaxed);
    return w;
}

static void end_save(struct packed_weights *w)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += SAVE_END_MS / 1000;
    pthread_mutex_lock(&w->lock);
    while (!w->save_ended && pthread_cond_timedwait(&w->wake, &w->lock, &until) == 0) {
    }
    pthread_mutex_unlock(&w->lock);
    atomic_store(&w->cancel_save, true);
    pthread_join(w->saver, NULL);
}

void packed_weights_unref(struct packed_weights *w)
{
    if (w == NULL || atomic_fetch_sub_explicit(&w->refs, 1, memory_order_acq_rel) > 1) {
        return;
    }
    if (w->has_saver) {
        end_save(w);
    }
    if (w->cache != NULL && packed_weights_are_damaged(w)) {
        weights_cache_discard(w->cache, &w->want);
    }
    destroy(w);
}

void packed_weights_facts(const struct packed_weights *w, struct packed_facts *ret)
{
    *ret = (struct packed_facts){
        .bytes = w->want.data_bytes,
        .source = w->source,
        .in_file = atomic_load(&w->in_file),
    };
}

bool packed_weights_are_damaged(const struct packed_weights *w)
{
    return w != NULL && weights_room_is_damaged(&w->room);
}
