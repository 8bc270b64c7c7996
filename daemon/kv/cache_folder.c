/* daemon/kv/cache_folder.c - stores that lie in the folder but are not open: of models that were
 * not used since the start, or not for long. They count in the bound too, and are the first to go:
 * whole, the oldest before the others.
 *
 * The folder is listed once, on the io thread; afterwards the engine thread keeps the list. */
#include "daemon/io/files.h"
#include "daemon/io/io.h"
#include "daemon/kv/cache_internal.h"
#include "daemon/log.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CLOSED_MAX 65536u /* stores listed */

struct kv_closed_store {
    struct kv_closed_store *next;
    char realm[KV_REALM_BYTES];
    char name[KV_STORE_NAME_MAX + 1];
    uint64_t bytes;
    int64_t used_s; /* its newest file's time */
};

struct listing { /* the io thread's, then news */
    struct kv_news news;
    struct io_call_job call;
    struct kv_cache *cache;
    struct kv_closed_store *stores;
    uint32_t n;
};

struct removal {
    struct kv_news news;
    struct io_call_job call;
    struct kv_cache *cache;
    struct kv_closed_store *store;
    int result;
};

/* ---- listing ----------------------------------------------------------------------------- */

/* A file NAME.what counts for store NAME. */
static void count_file(struct listing *l, const char *realm, const char *file,
                       const struct stat *st)
{
    size_t stem = strcspn(file, ".");
    if (stem == 0 || stem > KV_STORE_NAME_MAX || strlen(realm) >= KV_REALM_BYTES) {
        return;
    }
    struct kv_closed_store *c = l->stores;
    while (c != NULL && (strcmp(c->realm, realm) != 0 || strlen(c->name) != stem ||
                         memcmp(c->name, file, stem) != 0)) {
        c = c->next;
    }
    if (c == NULL) {
        c = l->n < CLOSED_MAX ? calloc(1, sizeof(*c)) : NULL;
        if (c == NULL) {
            return;
        }
        snprintf(c->realm, sizeof(c->realm), "%s", realm);
        memcpy(c->name, file, stem);
        c->next = l->stores;
        l->stores = c;
        l->n++;
    }
    c->bytes += (uint64_t)st->st_blocks * 512;
    c->used_s = st->st_mtim.tv_sec > c->used_s ? st->st_mtim.tv_sec : c->used_s;
}

static void list_realm(struct listing *l, int folder, const char *realm)
{
    int fd = openat(folder, realm, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    if (dir == NULL) {
        if (fd >= 0) {
            close(fd);
        }
        return;
    }
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        struct stat st;
        if (e->d_name[0] != '.' && fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            S_ISREG(st.st_mode)) {
            count_file(l, realm, e->d_name, &st);
        }
    }
    closedir(dir);
}

static int list_folder(void *arg)
{
    struct listing *l = arg;
    DIR *dir = opendir(l->cache->folder);
    for (struct dirent *e; dir != NULL && (e = readdir(dir)) != NULL;) {
        if (e->d_name[0] != '.') {
            list_realm(l, dirfd(dir), e->d_name);
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return 0;
}

static void list_done(void *arg, int result)
{
    struct listing *l = arg;
    kv_cache_post(l->cache, &l->news);
}

/* What points to the entry, or NULL. */
static struct kv_closed_store **find_closed(struct kv_closed_store **link, const char *realm,
                                            const char *name)
{
    while (*link != NULL &&
           (strcmp((*link)->realm, realm) != 0 || strcmp((*link)->name, name) != 0)) {
        link = &(*link)->next;
    }
    return *link != NULL ? link : NULL;
}

static void take_listing(struct kv_news *news)
{
    struct listing *l = (struct listing *)news;
    struct kv_cache *c = l->cache;
    c->n_pending--;
    struct kv_closed_store *known = c->closed; /* closed meanwhile */
    while (l->stores != NULL) {
        struct kv_closed_store *s = l->stores;
        l->stores = s->next;
        if (find_closed(&known, s->realm, s->name) != NULL) {
            free(s);
            continue;
        }
        s->next = c->closed;
        c->closed = s;
        c->closed_bytes += s->bytes;
    }
    free(l);
    for (const struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        kv_folder_opened(c, s); /* it was opened meanwhile */
    }
    kv_folder_make_room(c, 0);
}

void kv_folder_list(struct kv_cache *c)
{
    struct listing *l = c->folder != NULL ? calloc(1, sizeof(*l)) : NULL;
    if (l == NULL) {
        return;
    }
    l->news.take = take_listing;
    l->cache = c;
    l->call = (struct io_call_job){.fn = list_folder, .done = list_done, .arg = l};
    c->n_pending++;
    if (io_submit_call(c->options.io, &l->call) < 0) {
        c->n_pending--;
        free(l);
    }
}

void kv_folder_opened(struct kv_cache *c, const struct kv_space *s)
{
    char name[KV_STORE_NAME_MAX + 1];
    kv_space_store_name(s, name);
    struct kv_closed_store **link = find_closed(&c->closed, s->realm, name);
    if (link != NULL) {
        struct kv_closed_store *closed = *link;
        *link = closed->next;
        c->closed_bytes -= closed->bytes;
        free(closed);
    }
}

void kv_folder_closes(struct kv_cache *c, const struct kv_space *s)
{
    struct kv_closed_store *closed = s->store != NULL ? calloc(1, sizeof(*closed)) : NULL;
    if (closed == NULL) {
        return; /* without memory the next start finds it */
    }
    struct kv_store_stats stats;
    kv_store_stats(s->store, &stats);
    snprintf(closed->realm, sizeof(closed->realm), "%s", s->realm);
    kv_space_store_name(s, closed->name);
    closed->bytes = stats.bytes_files;
    closed->used_s = (int64_t)kv_now_s();
    closed->next = c->closed;
    c->closed = closed;
    c->closed_bytes += closed->bytes;
}

void kv_folder_wiped(struct kv_cache *c, const char *realm)
{
    for (struct kv_closed_store **link = &c->closed; *link != NULL;) {
        struct kv_closed_store *closed = *link;
        if (realm != NULL && strcmp(closed->realm, realm) != 0) {
            link = &closed->next;
            continue;
        }
        *link = closed->next;
        c->closed_bytes -= closed->bytes;
        free(closed);
    }
}

/* ---- removing ---------------------------------------------------------------------------- */

static void unlink_files(const struct removal *r, const struct io_files *files, int folder,
                         const char *path)
{
    size_t stem = strlen(r->store->name);
    DIR *dir = opendir(path);
    for (struct dirent *e; dir != NULL && (e = readdir(dir)) != NULL;) {
        if (strncmp(e->d_name, r->store->name, stem) == 0 && e->d_name[stem] == '.') {
            files->unlink(files->self, folder, e->d_name);
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
}

/* The io thread. A store that another process has open stays. */
static int remove_store(void *arg)
{
    struct removal *r = arg;
    struct io_files files;
    char path[4096], lock[KV_STORE_NAME_MAX + 8];
    int folder, fd;
    io_files_system(r->cache->options.io, &files);
    snprintf(path, sizeof(path), "%s/%s", r->cache->folder, r->store->realm);
    snprintf(lock, sizeof(lock), "%s.lock", r->store->name);
    int rc = files.open_folder(files.self, path, &folder);
    if (rc < 0) {
        return rc;
    }
    rc = files.open(files.self, folder, lock, IO_OPEN_CREATE, &fd);
    if (rc == 0) {
        rc = files.lock(files.self, fd);
        if (rc == 0) {
            unlink_files(r, &files, folder, path);
        }
        files.close(files.self, fd);
    }
    files.close(files.self, folder);
    return rc;
}

static void remove_done(void *arg, int result)
{
    struct removal *r = arg;
    r->result = result;
    kv_cache_post(r->cache, &r->news);
}

static void take_removed(struct kv_news *news)
{
    struct removal *r = (struct removal *)news;
    r->cache->n_pending--;
    if (r->result == 0) {
        log_info("KV cache: the oldest store of %s made room (%llu MiB)", r->store->realm,
                 (unsigned long long)(r->store->bytes >> 20));
    }
    free(r->store);
    free(r);
}

static void remove_oldest(struct kv_cache *c)
{
    struct kv_closed_store **oldest = &c->closed;
    for (struct kv_closed_store **link = &c->closed; *link != NULL; link = &(*link)->next) {
        oldest = (*link)->used_s < (*oldest)->used_s ? link : oldest;
    }
    struct kv_closed_store *store = *oldest;
    *oldest = store->next;
    c->closed_bytes -= store->bytes;
    struct removal *r = calloc(1, sizeof(*r));
    if (r != NULL) {
        r->news.take = take_removed;
        r->cache = c;
        r->store = store;
        r->call = (struct io_call_job){.fn = remove_store, .done = remove_done, .arg = r};
        c->n_pending++;
        if (io_submit_call(c->options.io, &r->call) == 0) {
            return;
        }
        c->n_pending--;
    }
    free(r);
    free(store);
}

void kv_folder_make_room(struct kv_cache *c, uint64_t bytes)
{
    uint64_t bound = c->options.store_bytes_max;
    while (bound != 0 && c->closed != NULL &&
           (bytes > bound || atomic_load(&c->store_bytes) + c->closed_bytes > bound - bytes)) {
        remove_oldest(c);
    }
}

void kv_folder_finish(struct kv_cache *c)
{
    while (c->closed != NULL) {
        struct kv_closed_store *store = c->closed;
        c->closed = store->next;
        free(store);
    }
}
