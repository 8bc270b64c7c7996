#include "daemon/kv/store_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAUSE_MS_DEFAULT 3000u

static uint64_t monotonic_ms(void *arg)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static int run_fn(void *arg);
static void run_done(void *arg, int result);

/* ---- opening -------------------------------------------------------------------------------- */

static bool name_valid(const char *name)
{
    size_t n = strlen(name);
    return n > 0 && n <= KV_STORE_NAME_MAX &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") == n;
}

static int check_options(const struct kv_store_options *o, struct fmt_error *err)
{
    if (!name_valid(o->name)) {
        return fmt_fail(err, -EINVAL,
                        "the name of a block store has other characters than letters, "
                        "digits, _ and -, or more than %d",
                        KV_STORE_NAME_MAX);
    }
    if (o->identity->n_classes == 0 || o->identity->n_classes > KV_MAX_CLASSES) {
        return fmt_fail(err, -EINVAL, "%s: %u layer classes, not 1 to %d", o->name,
                        o->identity->n_classes, KV_MAX_CLASSES);
    }
    for (uint32_t i = 0; i < o->identity->n_classes; i++) {
        uint64_t bytes = o->identity->block_bytes[i];
        if (bytes == 0 || o->bytes_max < STORE_PAGE_BYTES ||
            bytes > o->bytes_max - STORE_PAGE_BYTES || o->bytes_max > INT64_MAX) {
            return fmt_fail(err, -EINVAL,
                            "%s: a block of class %u takes %llu bytes, and the store may take %llu",
                            o->name, i, (unsigned long long)bytes,
                            (unsigned long long)o->bytes_max);
        }
    }
    return 0;
}

static void release(struct kv_store *s)
{
    for (uint32_t i = 0; i < s->n_classes; i++) {
        store_class_close(s, i);
    }
    if (s->index.fd >= 0) {
        s->files.close(s->files.self, s->index.fd);
    }
    if (s->lock_fd >= 0) {
        s->files.close(s->files.self, s->lock_fd);
    }
    if (s->folder >= 0) {
        s->files.close(s->files.self, s->folder);
    }
    s->n_classes = 0;
    s->index.fd = s->lock_fd = s->folder = -1;
}

static void destroy(struct kv_store *s)
{
    release(s);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->closed_wake);
    free(s->buffer);
    free(s->output);
    free(s);
}

static int make(const struct kv_store_options *o, struct kv_store **ret)
{
    struct kv_store *s = calloc(1, sizeof(*s));
    if (s == NULL) {
        return -ENOMEM;
    }
    s->index.fd = s->lock_fd = s->folder = -1;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->closed_wake, NULL);
    s->buffer = calloc(STORE_BUFFER_RECORDS, STORE_RECORD_BYTES);
    s->output = calloc(STORE_BUFFER_RECORDS, STORE_RECORD_BYTES);
    if (s->buffer == NULL || s->output == NULL) {
        destroy(s);
        return -ENOMEM;
    }
    snprintf(s->name, sizeof(s->name), "%s", o->name);
    s->identity = *o->identity;
    s->io = o->io;
    if (o->files != NULL) {
        s->files = *o->files;
    } else {
        io_files_system(o->io, &s->files);
    }
    s->bytes_max = o->bytes_max;
    s->pause_ms = o->pause_ms != 0 ? o->pause_ms : PAUSE_MS_DEFAULT;
    s->now_ms = o->now_ms != NULL ? o->now_ms : monotonic_ms;
    s->now_arg = o->now_arg;
    s->shared.writes_end = &s->shared.writes;
    s->shared.calls_end = &s->shared.calls;
    s->run = (struct io_call_job){.fn = run_fn, .done = run_done, .arg = s};
    *ret = s;
    return 0;
}

static const char *explain(int rc)
{
    switch (rc) {
    case -EPERM:
        return "it belongs to somebody else, or others have access to it";
    case -EWOULDBLOCK:
        return "another process has it open";
    default:
        return strerrordesc_np(-rc);
    }
}

static int open_folder(struct kv_store *s, const char *path, struct fmt_error *err)
{
    char name[STORE_FILE_NAME_BYTES];
    int rc = s->files.open_folder(s->files.self, path, &s->folder);
    if (rc < 0) {
        return fmt_fail(err, rc, "%s: %s", path, explain(rc));
    }
    /* A file of its own: the index is replaced now and then, and a lock would stay with the old
     * one. */
    store_file_name(s, "lock", name);
    rc = s->files.open(s->files.self, s->folder, name, IO_OPEN_CREATE, &s->lock_fd);
    rc = rc < 0 ? rc : s->files.lock(s->files.self, s->lock_fd);
    return rc < 0 ? fmt_fail(err, rc, "%s: %s", name, explain(rc)) : 0;
}

/* Data files of classes that this identity does not have, beside no index: nobody's. */
static void remove_strays(struct kv_store *s)
{
    for (uint32_t i = s->identity.n_classes; i < KV_MAX_CLASSES; i++) {
        char what[8], name[STORE_FILE_NAME_BYTES];
        snprintf(what, sizeof(what), "c%u", i);
        store_file_name(s, what, name);
        s->files.unlink(s->files.self, s->folder, name);
    }
}

/* A process that was killed between a write and its sync, or a rename and the folder's, leaves what
 * the kernel shows and a loss of power takes back. Nothing may build on that before it is on the
 * disk; where it cannot be brought there, a new index replaces it. */
static void settle(struct kv_store *s)
{
    int rc = s->files.sync(s->files.self, s->index.fd);
    rc = rc < 0 ? rc : s->files.sync_folder(s->files.self, s->folder);
    s->index.broken = rc < 0;
}

static int open_files(struct kv_store *s, struct fmt_error *err)
{
    int fresh = store_index_open(s, err);
    bool made_any = false;
    if (fresh < 0) {
        return fresh;
    }
    if (fresh > 0) {
        remove_strays(s);
    }
    for (uint32_t i = 0; i < s->identity.n_classes; i++) {
        bool made;
        int rc = store_class_open(s, i, fresh > 0, &made, err);
        if (rc < 0) {
            return rc;
        }
        made_any |= made;
    }
    int rc = fresh > 0 ? 0 : store_index_read(s, err);
    /* The first batch writes a new index, and syncs the folder with it. */
    s->index.broken |= fresh > 0 || made_any;
    if (rc == 0 && !s->index.broken) {
        settle(s);
    }
    return rc;
}

int kv_store_open(const struct kv_store_options *options,
                  void (*on_block)(void *arg, const struct kv_store_block *block), void *arg,
                  struct kv_store **ret_store, struct fmt_error *err)
{
    struct kv_store *s;
    int rc = check_options(options, err);
    if (rc < 0) {
        return rc;
    }
    rc = make(options, &s);
    if (rc < 0) {
        return fmt_fail(err, rc, "%s: out of memory", options->name);
    }
    rc = open_folder(s, options->folder, err);
    rc = rc < 0 ? rc : open_files(s, err);
    if (rc == 0) {
        rc = store_aside_keep(s, KV_STORE_ASIDE_MAX);
        rc = rc < 0 ? rc : store_index_list(s, on_block, arg);
        if (rc < 0) {
            fmt_fail(err, rc, "%s.index: %s", s->name, explain(rc));
        }
    }
    if (rc < 0) {
        destroy(s);
        return rc;
    }
    s->uses_ms = s->now_ms(s->now_arg);
    s->rewrite_slack = STORE_REWRITE_SLACK;
    store_publish(s);
    *ret_store = s;
    return 0;
}

/* ---- the queue ------------------------------------------------------------------------------ */

static int run_fn(void *arg)
{
    struct kv_store *s = arg;
    pthread_mutex_lock(&s->lock);
    bool closed = s->shared.closed;
    pthread_mutex_unlock(&s->lock);
    if (!closed) {
        store_run_once(s);
    }
    return 0;
}

/* Under the lock, on the io thread. What waits for the end of a pause comes with the next call. */
static bool has_work(struct kv_store *s)
{
    return s->shared.writes != NULL || s->shared.calls != NULL || s->shared.drops != 0 ||
           (atomic_load(&s->flags_wait) && s->pause_code == 0);
}

/* Under the lock: the io thread will come by. */
static void schedule(struct kv_store *s)
{
    if (s->io != NULL && !s->shared.scheduled && !s->shared.closing) {
        s->shared.scheduled = io_submit_call(s->io, &s->run) == 0;
    }
}

/* One batch per call: other jobs of the io thread get their turn in between. */
static void run_done(void *arg, int result)
{
    struct kv_store *s = arg;
    if (result == -ECANCELED) {
        store_cancel(s); /* the io thread ends before the store was closed */
    }
    pthread_mutex_lock(&s->lock);
    s->shared.scheduled = false;
    if (has_work(s) && result != -ECANCELED) {
        schedule(s);
    }
    bool last = s->shared.closed;
    pthread_mutex_unlock(&s->lock);
    if (last) {
        destroy(s);
    }
}

int kv_store_write(struct kv_store *s, struct kv_store_write *w)
{
    if (w->block.layer_class >= s->identity.n_classes) {
        return -EINVAL;
    }
    pthread_mutex_lock(&s->lock);
    int rc = s->shared.closing ? -ECANCELED : 0;
    if (rc == 0) {
        w->next = NULL;
        w->turn = s->shared.turn++;
        *s->shared.writes_end = w;
        s->shared.writes_end = &w->next;
        schedule(s);
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

static struct store_slot *slot_of(struct kv_store *s, const struct kv_store_block *b)
{
    return b->layer_class < s->identity.n_classes && b->slot < s->classes[b->layer_class].n_max
               ? &s->classes[b->layer_class].slots[b->slot]
               : NULL;
}

void kv_store_forget(struct kv_store *s, const struct kv_store_block *block)
{
    struct store_slot *p = slot_of(s, block);
    pthread_mutex_lock(&s->lock);
    if (p != NULL && !p->forgotten && !s->shared.closing) {
        p->forgotten = true;
        p->next_drop = s->shared.drops;
        s->shared.drops = store_ref(block->layer_class, block->slot);
        schedule(s);
    }
    pthread_mutex_unlock(&s->lock);
}

void kv_store_use(struct kv_store *s, const struct kv_store_block *block)
{
    struct store_slot *p = slot_of(s, block);
    if (p != NULL) {
        atomic_store(&p->hits, block->hits);
        atomic_store(&p->used_s, block->used_s);
        atomic_store(&p->dirty, true);
        atomic_store(&s->uses_wait, true);
    }
}

void kv_store_flag(struct kv_store *s, const struct kv_store_block *block)
{
    struct store_slot *p = slot_of(s, block);
    if (p != NULL) {
        atomic_store(&p->flags, block->flags);
        atomic_store(&p->dirty, true);
        atomic_store(&s->flags_wait, true);
        pthread_mutex_lock(&s->lock);
        schedule(s);
        pthread_mutex_unlock(&s->lock);
    }
}

static void submit_call(struct kv_store *s, struct kv_store_call *call, bool purge)
{
    pthread_mutex_lock(&s->lock);
    bool closing = s->shared.closing;
    if (!closing) {
        call->purge = purge;
        call->next = NULL;
        call->turn = s->shared.turn++;
        *s->shared.calls_end = call;
        s->shared.calls_end = &call->next;
        schedule(s);
    }
    pthread_mutex_unlock(&s->lock);
    if (closing) {
        call->done(call->arg, -ECANCELED);
    } else if (s->io == NULL) {
        while (store_run_once(s)) {
        }
    }
}

void kv_store_flush(struct kv_store *s, struct kv_store_call *call)
{
    submit_call(s, call, false);
}

void kv_store_purge(struct kv_store *s, struct kv_store_call *call)
{
    submit_call(s, call, true);
}

/* ---- closing -------------------------------------------------------------------------------- */

/* Where the store's files may be touched. A disk that is slow, not dead, is waited for a while. */
static int close_files(void *arg)
{
    struct kv_store *s = arg;
    uint64_t end = s->now_ms(s->now_arg) + STORE_CLOSE_MS;
    while (store_run_once(s) && s->now_ms(s->now_arg) < end) {
    }
    store_cancel(s);
    store_persist_uses(s);
    release(s);
    return 0;
}

static void close_done(void *arg, int result)
{
    struct kv_store *s = arg;
    if (result == -ECANCELED) {
        store_cancel(s);
        release(s);
    }
    if (s->close_done != NULL) {
        void (*done)(void *arg) = s->close_done;
        void *done_arg = s->close_arg;
        destroy(s);
        done(done_arg);
        return;
    }
    pthread_mutex_lock(&s->lock);
    s->shared.closed = true;
    pthread_cond_signal(&s->closed_wake);
    pthread_mutex_unlock(&s->lock);
}

/* Behind everything that the store has submitted, so that nothing of it is left. */
static int submit_close(struct kv_store *s)
{
    pthread_mutex_lock(&s->lock);
    s->shared.closing = true;
    pthread_mutex_unlock(&s->lock);
    s->close = (struct io_call_job){.fn = close_files, .done = close_done, .arg = s};
    return s->io != NULL && !io_on_thread(s->io) ? io_submit_call(s->io, &s->close) : -ECANCELED;
}

int kv_store_close_begin(struct kv_store *s, void (*done)(void *arg), void *arg)
{
    s->close_done = done;
    s->close_arg = arg;
    int rc = submit_close(s);
    if (rc < 0) {
        s->close_done = NULL;
    }
    return rc;
}

void kv_store_close(struct kv_store *s)
{
    if (s == NULL) {
        return;
    }
    if (submit_close(s) == 0) {
        pthread_mutex_lock(&s->lock);
        while (!s->shared.closed) {
            pthread_cond_wait(&s->closed_wake, &s->lock);
        }
        pthread_mutex_unlock(&s->lock);
        destroy(s);
        return;
    }
    close_files(s);
    pthread_mutex_lock(&s->lock);
    s->shared.closed = true;
    bool last = !s->shared.scheduled; /* else run_done() is still to come, on this thread */
    pthread_mutex_unlock(&s->lock);
    if (last) {
        destroy(s);
    }
}
