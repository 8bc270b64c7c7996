/* daemon/sched/engine_transfer.c - prefixes on their way out of the cache, and into it.
 *
 * The engine finds, holds, makes room and admits; no byte of a block is copied in its thread, and
 * nothing here waits for a disk. Bounds: an uid has at most EXPORTS_PER_USER exports and one import
 * at a time; all imports together hold at most half of the arena. What either holds there counts as
 * committed, so that they never take what a running sequence was promised. */
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define EXPORTS_PER_USER 2u

struct engine_import {
    struct engine_import *next;
    uint64_t number;
    uint32_t uid;
    uint64_t bytes; /* of the arena's bound, a part of bytes_committed */
    uint64_t touched_ns;
    bool keeping;        /* it is whole, and enters the tree: not idle */
    atomic_bool writing; /* set here; cleared by whoever writes the piece, as the last touch */
    struct kv_import *blocks;
};

static const char memory_is_taken[] =
    "the memory of the KV cache is taken by running requests and transfers";
static const char no_memory[] = "no memory for blocks of the KV cache";

/* ---- exports ----------------------------------------------------------------------------- */

static int begin_export(struct engine *e, struct engine_kv_call *call)
{
    uint32_t n = 0;
    for (const struct kv_export *x = e->exports; x != NULL; x = x->next) {
        n += x->uid == call->uid;
    }
    if (n >= EXPORTS_PER_USER) {
        return fmt_fail(&call->err, -EBUSY, "uid %u has %u exports under way, which is the limit",
                        call->uid, n);
    }
    struct kv_space *space = kv_cache_space(e->cache, call->realm, call->model, call->layout);
    struct kv_export *x;
    int rc = space != NULL
                 ? kv_export_create(e->cache, space, call->layout, call->tokens, call->n_tokens, &x)
                 : -ENOMEM;
    if (rc < 0) {
        return fmt_fail(&call->err, rc, no_memory);
    }
    x->uid = call->uid;
    x->next = e->exports;
    e->exports = x;
    call->export = x;
    return 0;
}

static void end_export(struct engine *e, struct kv_export *x)
{
    struct kv_export **link = &e->exports;
    while (*link != x) {
        link = &(*link)->next;
    }
    *link = x->next;
    e->bytes_committed -= x->committed_bytes;
    kv_export_destroy(x);
}

static int run_export(struct engine *e, struct engine_kv_call *call)
{
    int rc = call->export == NULL ? begin_export(e, call) : 0;
    if (rc < 0) {
        return rc;
    }
    rc = kv_export_find(call->export);
    if (rc == -EAGAIN) {
        return rc;
    }
    if (rc < 0) {
        fmt_fail(&call->err, rc, no_memory);
    } else if (call->export->n_tokens == 0) {
        const char *why = kv_miss_text(call->export->sequence.miss);
        rc = call->n_tokens < GQA_KV_BLOCK_TOKENS
                 ? fmt_fail(&call->err, -ENOENT,
                            "the prompt has %zu tokens: it fills no block, which has %u",
                            call->n_tokens, GQA_KV_BLOCK_TOKENS)
                 : fmt_fail(&call->err, -ENOENT, "nothing of this prompt is cached: %s", why);
    }
    if (rc == 0 && call->export->arena_bytes > engine_bytes_free(e)) {
        rc = fmt_fail(&call->err, -EBUSY, memory_is_taken);
    }
    if (rc == 0) {
        call->export->committed_bytes = call->export->arena_bytes;
        e->bytes_committed += call->export->committed_bytes;
    } else {
        end_export(e, call->export);
        call->export = NULL;
    }
    return rc;
}

bool engine_release_exports(struct engine *e, const char *realm)
{
    for (struct kv_export *x = e->exports; x != NULL; x = x->next) {
        bool concerned = realm == NULL || kv_export_is_of(x, realm);
        if (concerned && !kv_export_release(x)) {
            return false;
        }
        if (concerned) {
            e->bytes_committed -= x->committed_bytes;
            x->committed_bytes = 0;
        }
    }
    return true;
}

/* ---- imports ----------------------------------------------------------------------------- */

static struct engine_import *find_import(struct engine *e, uint64_t number)
{
    struct engine_import *im = e->imports;
    while (im != NULL && im->number != number) {
        im = im->next;
    }
    return im;
}

static void drop_import(struct engine *e, struct engine_import *im)
{
    struct engine_import **link = &e->imports;
    while (*link != im) {
        link = &(*link)->next;
    }
    *link = im->next;
    e->bytes_committed -= im->bytes;
    kv_import_destroy(im->blocks);
    free(im);
}

/* -EAGAIN: what the space's store holds is not known yet. */
static int begin_import(struct engine *e, struct engine_kv_call *call, struct engine_import **ret)
{
    for (const struct engine_import *im = e->imports; im != NULL; im = im->next) {
        if (im->uid == call->uid) {
            return fmt_fail(&call->err, -EBUSY,
                            "uid %u has an import under way, which is the limit", call->uid);
        }
    }
    struct kv_space *space = kv_cache_space(e->cache, call->realm, call->model, call->layout);
    if (space != NULL && !kv_space_is_ready(space)) {
        return -EAGAIN;
    }
    struct engine_import *im = calloc(1, sizeof(*im));
    int rc = space != NULL && im != NULL ? kv_import_create(e->cache, space, &im->blocks) : -ENOMEM;
    if (rc < 0) {
        free(im);
        return fmt_fail(&call->err, rc, no_memory);
    }
    im->number = ++e->n_imports;
    im->uid = call->uid;
    im->next = e->imports;
    e->imports = im;
    *ret = im;
    return 0;
}

/* Commits what the import will hold with this piece. */
static int reserve(struct engine *e, struct engine_import *im, struct engine_kv_call *call)
{
    uint64_t bytes = kv_import_bytes_with(im->blocks, &call->piece), others = 0;
    uint64_t bytes_max = e->options.kv.arena_bytes_max;
    for (const struct engine_import *other = e->imports; other != NULL; other = other->next) {
        others += other != im ? other->bytes : 0;
    }
    if (bytes > bytes_max / 2) {
        return fmt_fail(&call->err, -ENOMEM,
                        "the import needs more than %" PRIu64 " bytes, which is half of the memory "
                        "of the KV cache",
                        bytes_max / 2);
    }
    if (bytes > bytes_max / 2 - others ||
        (bytes > im->bytes && bytes - im->bytes > engine_bytes_free(e))) {
        return fmt_fail(&call->err, -EBUSY, memory_is_taken);
    }
    e->bytes_committed += bytes - im->bytes;
    im->bytes = bytes;
    return 0;
}

static int take_piece(struct engine *e, struct engine_kv_call *call)
{
    struct engine_import *im = find_import(e, call->import);
    if (call->import == 0) {
        int rc = begin_import(e, call, &im);
        if (rc < 0) {
            return rc;
        }
    }
    if (im == NULL) {
        return fmt_fail(&call->err, -ESTALE,
                        "the import was dropped: no piece came for %u s, or the cache was purged",
                        (unsigned)(KV_IMPORT_IDLE_NS / 1000000000u));
    }
    int rc =
        kv_import_is_of(im->blocks, call->model)
            ? 0
            : fmt_fail(&call->err, -EINVAL, "'model' is another one than with the first piece");
    rc = rc < 0 ? rc : reserve(e, im, call);
    rc = rc < 0
             ? rc
             : kv_import_take(im->blocks, &call->piece, call->positions_max, &call->to, &call->err);
    if (rc < 0 && call->err.text[0] == '\0') {
        fmt_fail(&call->err, rc, no_memory);
    }
    if (rc < 0) {
        if (rc != -EBUSY || call->import == 0) {
            drop_import(e, im);
            call->import = 0;
        }
        return rc;
    }
    if (call->to != NULL) {
        atomic_store_explicit(&im->writing, true, memory_order_relaxed); /* handed over by done */
        call->writing = &im->writing;
    }
    im->touched_ns = engine_now_ns();
    call->import = im->number;
    return 0;
}

static int keep_import(struct engine *e, struct engine_kv_call *call)
{
    struct engine_import *im = find_import(e, call->import);
    if (im == NULL) {
        return fmt_fail(&call->err, -ESTALE, "the import was dropped, as when the cache is purged");
    }
    int rc = im->keeping ? 0 : kv_import_check(im->blocks, &call->err);
    im->keeping = true;
    rc = rc < 0 ? rc : kv_import_keep(im->blocks, &call->n_kept_tokens, &call->n_new_tokens);
    if (rc == -EAGAIN) {
        engine_kick(e); /* after the next step, or at once */
        return rc;
    }
    if (rc < 0 && call->err.text[0] == '\0') {
        fmt_fail(&call->err, rc, no_memory);
    }
    drop_import(e, im);
    return rc;
}

/* The acquire pairs with the writer's release, after which it touches nothing of the import, but
 * kicks the engine. */
static bool is_written(const struct engine_import *im)
{
    return atomic_load_explicit(&im->writing, memory_order_acquire);
}

bool engine_drop_imports(struct engine *e, const char *realm)
{
    bool all = true;
    for (struct engine_import *im = e->imports, *next; im != NULL; im = next) {
        next = im->next;
        if (realm != NULL && !kv_import_is_for(im->blocks, realm)) {
            continue;
        }
        if (is_written(im)) {
            all = false;
        } else {
            drop_import(e, im);
        }
    }
    return all;
}

void engine_drop_idle_imports(struct engine *e)
{
    uint64_t now = e->imports != NULL ? engine_now_ns() : 0;
    for (struct engine_import *im = e->imports, *next; im != NULL; im = next) {
        next = im->next;
        if (!im->keeping && !is_written(im) && now - im->touched_ns >= KV_IMPORT_IDLE_NS) {
            drop_import(e, im);
        }
    }
}

int engine_transfer_timeout_ms(const struct engine *e)
{
    uint64_t now = engine_now_ns(), first = UINT64_MAX;
    for (const struct engine_import *im = e->imports; im != NULL; im = im->next) {
        uint64_t due = im->touched_ns + KV_IMPORT_IDLE_NS;
        bool idle = !im->keeping && !is_written(im); /* else somebody kicks */
        first = idle && due < first ? due : first;
    }
    if (first == UINT64_MAX) {
        return -1;
    }
    return first <= now ? 0 : (int)((first - now) / 1000000u) + 1;
}

/* ---- both -------------------------------------------------------------------------------- */

int engine_transfer(struct engine *e, struct engine_kv_call *call)
{
    struct engine_import *im;
    switch (call->op) {
    case ENGINE_KV_EXPORT:
        return run_export(e, call);
    case ENGINE_KV_EXPORT_END:
        end_export(e, call->export);
        return 0;
    case ENGINE_KV_IMPORT:
        return take_piece(e, call);
    case ENGINE_KV_IMPORT_KEEP:
        return keep_import(e, call);
    case ENGINE_KV_IMPORT_DROP:
        im = find_import(e, call->import);
        if (im != NULL) {
            drop_import(e, im);
        }
        return 0;
    default:
        return -EINVAL;
    }
}

void engine_end_transfers(struct engine *e)
{
    while (e->exports != NULL) {
        end_export(e, e->exports);
    }
    while (e->imports != NULL) {
        drop_import(e, e->imports);
    }
}
