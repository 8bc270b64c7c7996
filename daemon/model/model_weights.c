/* daemon/model/model_weights.c - a model's weights: read, named, packed.
 *
 * A file that is met for the first time is read from its beginning to its end: its bytes get a
 * name, and weights that are no numbers are found. Both are remembered by the file's stamp
 * (digest.h), so that later loads need only what they use: packed weights from the cache, and of
 * the file what is used as it lies there. */
#include "daemon/kv/guard.h"
#include "daemon/model/model_internal.h"
#include "format/types.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GUARD_UNIT_BYTES (2u << 20)

void loading_report(struct loading *l, const char *stage, uint64_t done, uint64_t total)
{
    if (l->progress != NULL) {
        l->progress(l->progress_arg, stage, done, total);
    }
}

static void on_packing(void *arg, const char *stage, uint64_t done, uint64_t total)
{
    loading_report(arg, stage, done, total);
}

/* ---- the guard --------------------------------------------------------------------------- */

int model_guard_init(struct model *m, struct fmt_error *err)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint32_t n = gguf_n_files(m->gguf);
    m->guards = calloc(n, sizeof(*m->guards));
    if (m->guards == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory");
    }
    for (uint32_t i = 0; i < n; i++) {
        uint64_t bytes = (gguf_one_file_bytes(m->gguf, i) + page - 1) & ~(page - 1);
        int rc = kv_guard_add((void *)gguf_file_map(m->gguf, i), (size_t)bytes, GUARD_UNIT_BYTES,
                              &m->guards[i]);
        if (rc < 0) {
            return fmt_fail(err, rc, "%s: its mapping cannot be guarded: %s", gguf_name(m->gguf),
                            strerror(-rc));
        }
        m->n_guards++;
    }
    return 0;
}

bool model_is_damaged(const struct model *m)
{
    for (uint32_t i = 0; i < m->n_guards; i++) {
        if (kv_guard_marked(m->guards[i], 0, (size_t)gguf_one_file_bytes(m->gguf, i))) {
            return true;
        }
    }
    model_lock(m);
    bool damaged = packed_weights_are_damaged(m->plan->packed);
    model_unlock(m);
    return damaged;
}

/* ---- reading ----------------------------------------------------------------------------- */

static int on_read(void *arg, uint64_t offset, const void *data, size_t bytes)
{
    struct loading *l = arg;
    l->done += bytes;
    if (l->digest != NULL) {
        digest_update(l->digest, data, bytes);
    }
    loading_report(l, "read", l->done, l->total);
    return weight_scan_bytes(&l->scan, offset, data, bytes);
}

/* Reads every byte once: the page cache is warm then, a bad disk is an error, not a fault, and
 * weights that are no numbers are found. */
static int read_through(struct model *m, struct loading *l)
{
    l->total = gguf_file_bytes(m->gguf);
    for (uint32_t i = 0; i < gguf_n_files(m->gguf); i++) {
        struct io_read_job job = {
            .fd = gguf_file_fd(m->gguf, i),
            .bytes = gguf_one_file_bytes(m->gguf, i),
            .on_data = on_read,
            .arg = l,
            .cancel = l->cancel,
        };
        struct fmt_error why = {""};
        int rc = weight_scan_init(&l->scan, m->gguf, i, &why);
        rc = rc < 0 ? rc : io_read_wait(l->io, &job);
        weight_scan_finish(&l->scan);
        if (rc < 0 && why.text[0] != '\0') {
            return fmt_fail(l->err, rc, "%s", why.text);
        }
        if (rc < 0) {
            return fmt_fail(l->err, rc, "%s: cannot be read: %s",
                            fmt_file_name(gguf_file_path(m->gguf, i)), strerror(-rc));
        }
    }
    return 0;
}

/* Reads the files, and names their contents on the way. */
static int read_and_digest(struct model *m, struct loading *l, bool known)
{
    int rc = known ? 0 : digest_create(&l->digest);
    rc = rc < 0 ? fmt_fail(l->err, rc, "no memory") : read_through(m, l);
    if (rc == 0 && !known) {
        m->digest = digest_value(l->digest);
        digest_remember(l->options->digests, m->gguf, &m->digest);
    }
    digest_destroy(l->digest);
    l->digest = NULL;
    return rc;
}

/* ---- what is not packed ------------------------------------------------------------------ */

/* The whole pages of a weight in the mapped file. */
static size_t pages_of(const struct gqa_weight *w, void **ret)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uint64_t values = w->ne[0] * w->ne[1] * w->ne[2] * w->ne[3];
    uintptr_t first = ((uintptr_t)w->data + page - 1) & ~(page - 1);
    uintptr_t end =
        ((uintptr_t)w->data + fmt_type_bytes(fmt_type_info(w->type), values)) & ~(page - 1);
    *ret = (void *)first;
    return first < end ? end - first : 0;
}

/* The file's pages whose contents were packed are not needed again soon. */
static void drop_packed_sources(const struct plan *p)
{
    for (uint32_t i = 0; i < p->program.n_weights; i++) {
        void *pages;
        size_t bytes = pages_of(&p->program.weights[i], &pages);
        if (p->program.weights[i].packed_bytes > 0 && bytes > 0) {
            madvise(pages, bytes, MADV_DONTNEED);
        }
    }
}

/* Brings in what is used as it lies in the file, where memory has room for it. A disk that cannot
 * read is an error here rather than a fault later. */
static int fetch_unpacked(struct model *m, const struct plan *p, struct loading *l)
{
    uint64_t memory_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    if (gguf_file_bytes(m->gguf) > memory_bytes / 2) {
        return 0;
    }
    for (uint32_t i = 0; i < p->program.n_weights; i++) {
        void *pages;
        size_t bytes = pages_of(&p->program.weights[i], &pages);
        if (l->cancel != NULL && *l->cancel) {
            return -ECANCELED;
        }
        if (p->program.weights[i].packed_bytes == 0 && bytes > 0 &&
            madvise(pages, bytes, MADV_POPULATE_READ) < 0 &&
            (errno == EFAULT || errno == EHWPOISON)) {
            return fmt_fail(l->err, -EIO, "%s: cannot be read: %s", gguf_name(m->gguf),
                            strerror(EIO));
        }
    }
    return 0;
}

/* ---- together ---------------------------------------------------------------------------- */

static int pack(struct model *m, struct plan *p, struct loading *l, const struct packed_request *r)
{
    int rc = packed_weights_make(r, &p->packed);
    if (rc < 0) {
        return fmt_fail(l->err, rc, "%s: packing the weights failed: %s", gguf_name(m->gguf),
                        strerror(-rc));
    }
    drop_packed_sources(p);
    return 0;
}

int model_weights_init(struct model *m, struct plan *p, struct loading *l)
{
    const struct packed_request request = {
        .cache = l->options->weights,
        .digest = &m->digest,
        .backend = p->backend,
        .program = &p->program,
        .n_threads = m->n_threads,
        .cancel = l->cancel,
        .progress = on_packing,
        .arg = l,
    };
    bool known = digest_recall(l->options->digests, m->gguf, &m->digest);
    int rc = known ? packed_weights_find(&request, &p->packed) : -ENOENT;
    if (rc == 0) {
        rc = fetch_unpacked(m, p, l);
    } else if (rc == -ENOENT) {
        rc = read_and_digest(m, l, known);
        if (rc == 0) {
            /* A copy of the file, or another name of it, may have been packed. */
            rc = known ? -ENOENT : packed_weights_find(&request, &p->packed);
            rc = rc == -ENOENT ? pack(m, p, l, &request) : rc;
        }
    }
    if (rc < 0 && l->err->text[0] == '\0') {
        fmt_fail(l->err, rc, "%s: its packed weights cannot be mapped: %s", gguf_name(m->gguf),
                 strerror(-rc));
    }
    return rc;
}

void model_guard_finish(struct model *m)
{
    for (uint32_t i = 0; i < m->n_guards; i++) {
        kv_guard_remove(m->guards[i]);
    }
    free(m->guards);
}
