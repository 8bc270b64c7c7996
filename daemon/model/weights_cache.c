#include "daemon/model/weights_cache.h"

#include "daemon/log.h"
#include "daemon/model/weights_file.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUFFIX        ".packed"
#define UNFINISHED    ".new" /* locked by whoever writes it */
#define NAME_BYTES    80
#define LISTED_MAX    65536u
#define TROUBLE_BYTES 192
#define BEGIN_TRIES   8

struct weights_cache {
    char *folder;
    uint64_t bytes_max;
    struct io_files files;
    pthread_mutex_t lock;        /* of what follows */
    char trouble[TROUBLE_BYTES]; /* as it was told last, or "" */
    uint32_t n_unfinished;       /* files begun by this process: parts of their names */
};

int weights_cache_create(const struct weights_cache_options *options, struct weights_cache **ret)
{
    struct weights_cache *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        return -ENOMEM;
    }
    c->folder = strdup(options->folder);
    if (c->folder == NULL) {
        free(c);
        return -ENOMEM;
    }
    c->bytes_max = options->bytes_max;
    if (options->files != NULL) {
        c->files = *options->files;
    } else {
        io_files_system(NULL, &c->files);
    }
    pthread_mutex_init(&c->lock, NULL);
    *ret = c;
    return 0;
}

void weights_cache_destroy(struct weights_cache *c)
{
    if (c != NULL) {
        pthread_mutex_destroy(&c->lock);
        free(c->folder);
        free(c);
    }
}

static const char *why(int rc)
{
    return rc == -EPERM ? "it belongs to somebody else, or others have access to it"
                        : strerrordesc_np(-rc);
}

/* Weights are not kept, and why. Told when that is news. */
static void tell_trouble(struct weights_cache *c, const char *reason)
{
    char text[TROUBLE_BYTES];
    snprintf(text, sizeof(text), "%s", reason);
    pthread_mutex_lock(&c->lock);
    bool news = strcmp(text, c->trouble) != 0;
    memcpy(c->trouble, text, sizeof(text));
    pthread_mutex_unlock(&c->lock);
    if (news && text[0] != '\0') {
        log_warning("packed weights are not kept in %s: %s: every start packs them again",
                    c->folder, text);
    }
}

static void file_name(const struct weights_want *want, char ret[NAME_BYTES])
{
    for (size_t i = 0; i < sizeof(want->key); i++) {
        snprintf(ret + 2 * i, 3, "%02x", want->key[i]);
    }
    strcat(ret, SUFFIX);
}

/* ---- finding ----------------------------------------------------------------------------- */

static int map_file(const struct weights_cache *c, int fd, const struct weights_want *want,
                    struct weights_room *room, const atomic_bool *cancel,
                    void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                    bool *ret_verified, struct fmt_error *err)
{
    struct weights_layout l;
    uint64_t *table = NULL;
    bool trusted = false;
    int rc = weights_file_check(&c->files, fd, want, &table, &trusted, err);
    if (rc < 0) {
        return rc;
    }
    rc = weights_layout_of(want->data_bytes, &l);
    rc = rc < 0 ? rc : weights_room_map(room, &c->files, fd, l.data_offset);
    if (rc < 0) {
        fmt_fail(err, rc, "it cannot be mapped: %s", strerror(-rc));
    } else if (trusted) {
        rc = weights_room_populate(room);
        rc = rc < 0 ? fmt_fail(err, rc, "the disk cannot read it") : 0;
    } else {
        rc = weights_file_verify(room, table, cancel, progress, arg, err);
        *ret_verified = rc == 0;
    }
    free(table);
    return rc;
}

/* The mark is advice: a folder that cannot be written has none, and files are checked every time.
 */
static void mark_verified(struct weights_cache *c, int folder, const char *name)
{
    int fd;
    if (c->files.open(c->files.self, folder, name, IO_OPEN_EXISTING, &fd) == 0) {
        weights_file_mark(&c->files, fd);
        c->files.close(c->files.self, fd);
    }
}

/* -ENOENT where there is no folder either: save will say what is wrong with it. */
static int open_wanted(const struct weights_cache *c, const char *name, int *ret_folder,
                       int *ret_fd)
{
    int rc = c->files.open_folder(c->files.self, c->folder, ret_folder);
    if (rc < 0) {
        return -ENOENT;
    }
    rc = c->files.open(c->files.self, *ret_folder, name, IO_OPEN_READ, ret_fd);
    if (rc < 0) {
        c->files.close(c->files.self, *ret_folder);
    }
    return rc;
}

int weights_cache_map(struct weights_cache *c, const struct weights_want *want,
                      struct weights_room *room, const atomic_bool *cancel,
                      void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg)
{
    char name[NAME_BYTES];
    struct fmt_error err = {""};
    bool verified = false;
    int folder, fd;
    file_name(want, name);
    int rc = open_wanted(c, name, &folder, &fd);
    if (rc < 0) {
        if (rc != -ENOENT) {
            log_warning("packed weights %s/%s: %s", c->folder, name, why(rc));
        }
        return -ENOENT;
    }
    rc = map_file(c, fd, want, room, cancel, progress, arg, &verified, &err);
    if (rc == 0) {
        c->files.set_times(c->files.self, fd, weights_now_ns(), IO_TIME_KEEP);
    }
    c->files.close(c->files.self, fd);
    if (verified) {
        mark_verified(c, folder, name);
    }
    if (rc < 0 && rc != -ECANCELED) {
        log_warning("packed weights %s/%s: %s: they are packed anew", c->folder, name, err.text);
        c->files.unlink(c->files.self, folder, name);
        rc = -ENOENT;
    }
    c->files.close(c->files.self, folder);
    return rc;
}

void weights_cache_discard(struct weights_cache *c, const struct weights_want *want)
{
    char name[NAME_BYTES];
    int folder;
    file_name(want, name);
    if (c->files.open_folder(c->files.self, c->folder, &folder) == 0) {
        log_warning("packed weights %s/%s: the file was cut, or the disk cannot read it: it is "
                    "removed",
                    c->folder, name);
        c->files.unlink(c->files.self, folder, name);
        c->files.close(c->files.self, folder);
    }
}

/* ---- the bound --------------------------------------------------------------------------- */

struct listed {
    char name[NAME_BYTES];
    uint64_t bytes;
    int64_t used_ns;
};

struct listing {
    struct listed *files; /* (n) */
    uint32_t n, capacity;
    uint64_t bytes; /* of all */
};

static bool ends_with(const char *name, const char *suffix)
{
    size_t n = strlen(name), k = strlen(suffix);
    return n > k && strcmp(name + n - k, suffix) == 0;
}

static int on_name(void *arg, const char *name, uint64_t bytes)
{
    struct listing *l = arg;
    if (strlen(name) >= NAME_BYTES || l->n == LISTED_MAX ||
        (!ends_with(name, SUFFIX) && !ends_with(name, UNFINISHED))) {
        return 0;
    }
    if (l->n == l->capacity) {
        uint32_t capacity = 2 * l->capacity + 16;
        struct listed *files = realloc(l->files, capacity * sizeof(*files));
        if (files == NULL) {
            return -ENOMEM;
        }
        l->files = files;
        l->capacity = capacity;
    }
    struct listed *f = &l->files[l->n++];
    *f = (struct listed){.bytes = bytes};
    memcpy(f->name, name, strlen(name) + 1);
    l->bytes += bytes;
    return 0;
}

static int by_use(const void *a, const void *b)
{
    const struct listed *x = a, *y = b;
    return (x->used_ns > y->used_ns) - (x->used_ns < y->used_ns);
}

/* Notes when a file was used. One that nobody will finish any more is removed: true. That happens
 * under its lock, so that begin_new() can tell. */
static bool look_at(struct weights_cache *c, int folder, struct listed *f)
{
    int fd;
    int64_t written;
    bool unfinished = ends_with(f->name, UNFINISHED), removed = false;
    f->used_ns = INT64_MAX; /* one that is being written stays */
    if (c->files.open(c->files.self, folder, f->name, unfinished ? IO_OPEN_EXISTING : IO_OPEN_READ,
                      &fd) < 0) {
        return false;
    }
    if (unfinished) {
        removed = c->files.lock(c->files.self, fd) == 0 &&
                  c->files.unlink(c->files.self, folder, f->name) == 0;
    } else {
        c->files.times(c->files.self, fd, &f->used_ns, &written);
    }
    c->files.close(c->files.self, fd);
    return removed;
}

/* Removes what is left over, and of the rest what was used longest ago, until so many bytes more
 * fit the bound. Mappings of removed files stay good. */
static int make_room(struct weights_cache *c, int folder, const char *keep, uint64_t bytes)
{
    struct listing l = {0};
    if (c->bytes_max != 0 && bytes > c->bytes_max) {
        return -EFBIG;
    }
    int rc = c->files.list(c->files.self, folder, on_name, &l);
    for (uint32_t i = 0; rc == 0 && i < l.n; i++) {
        struct listed *f = &l.files[i];
        bool removed = look_at(c, folder, f);
        bool replaced = strcmp(f->name, keep) == 0; /* by the one to come */
        if (replaced || removed) {
            l.bytes -= f->bytes;
            f->used_ns = INT64_MAX;
        }
    }
    if (l.n > 0) {
        qsort(l.files, l.n, sizeof(*l.files), by_use);
    }
    for (uint32_t i = 0; rc == 0 && c->bytes_max != 0 && i < l.n; i++) {
        const struct listed *f = &l.files[i];
        if (l.bytes <= c->bytes_max - bytes || f->used_ns == INT64_MAX) {
            break;
        }
        if (c->files.unlink(c->files.self, folder, f->name) == 0) {
            l.bytes -= f->bytes;
            log_info("packed weights %s/%s made room (%llu MiB)", c->folder, f->name,
                     (unsigned long long)(f->bytes >> 20));
        }
    }
    free(l.files);
    return rc;
}

/* ---- saving ------------------------------------------------------------------------------ */

/* Whether the file that this process has just made and locked still has its name. */
static int still_there(struct weights_cache *c, int folder, const char *new_name)
{
    int fd;
    int rc = c->files.open(c->files.self, folder, new_name, IO_OPEN_READ, &fd);
    if (rc == 0) {
        c->files.close(c->files.self, fd);
    }
    return rc;
}

/* A new file for the weights called name, locked. Another writer who makes room between its
 * making and its locking takes it for one that was left over, and so it is begun again. */
static int begin_new(struct weights_cache *c, int folder, const char *name,
                     char new_name[NAME_BYTES], int *ret_fd)
{
    int rc = -ENOENT;
    for (int tries = 0; tries < BEGIN_TRIES && (rc == -ENOENT || rc == -EWOULDBLOCK); tries++) {
        pthread_mutex_lock(&c->lock);
        uint32_t n = c->n_unfinished++;
        pthread_mutex_unlock(&c->lock);
        snprintf(new_name, NAME_BYTES, "%.32s.%d-%u" UNFINISHED, name, (int)getpid(), n);
        rc = c->files.open(c->files.self, folder, new_name, IO_OPEN_EMPTY, ret_fd);
        if (rc < 0) {
            continue;
        }
        rc = c->files.lock(c->files.self, *ret_fd);
        rc = rc < 0 ? rc : still_there(c, folder, new_name);
        if (rc == 0) {
            return 0;
        }
        c->files.unlink(c->files.self, folder, new_name);
        c->files.close(c->files.self, *ret_fd);
    }
    return rc;
}

static int write_new(struct weights_cache *c, int folder, const struct weights_want *want,
                     struct weights_room *room, const atomic_bool *cancel)
{
    char name[NAME_BYTES], new_name[NAME_BYTES];
    struct weights_layout l;
    int fd;
    file_name(want, name);
    int rc = weights_layout_of(want->data_bytes, &l);
    rc = rc < 0 ? rc : make_room(c, folder, name, l.file_bytes);
    rc = rc < 0 ? rc : begin_new(c, folder, name, new_name, &fd);
    if (rc < 0) {
        return rc;
    }
    rc = weights_file_write(&c->files, fd, want, room, cancel);
    rc = rc < 0 ? rc : c->files.rename(c->files.self, folder, new_name, name);
    if (rc < 0) {
        c->files.unlink(c->files.self, folder, new_name);
    } else {
        c->files.sync_folder(c->files.self, folder); /* without it, the file is packed again */
        weights_room_map(room, &c->files, fd, l.data_offset);
        weights_room_populate(room);
    }
    c->files.close(c->files.self, fd);
    return rc;
}

int weights_cache_save(struct weights_cache *c, const struct weights_want *want,
                       struct weights_room *room, const atomic_bool *cancel)
{
    char text[TROUBLE_BYTES];
    int folder;
    int rc = c->files.open_folder(c->files.self, c->folder, &folder);
    if (rc == 0) {
        rc = write_new(c, folder, want, room, cancel);
        c->files.close(c->files.self, folder);
    }
    if (rc == -EFBIG) {
        snprintf(text, sizeof(text), "%llu MiB are more than weights_cache_bytes allows",
                 (unsigned long long)(want->data_bytes >> 20));
        tell_trouble(c, text);
    } else if (rc != -ECANCELED) {
        tell_trouble(c, rc < 0 ? why(rc) : "");
    }
    return rc;
}
