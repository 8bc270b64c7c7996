/* Where the daemon keeps and finds things: the cache folder, the folders of models. */
#include "daemon/server_internal.h"

#include "daemon/log.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define STORE_BYTES_DEFAULT (32ull << 30)

/* Makes the folder and its parents; only the last one's mode matters to us. */
static int make_dirs(const char *path)
{
    char copy[4096];
    if (snprintf(copy, sizeof(copy), "%s", path) >= (int)sizeof(copy)) {
        return -ENAMETOOLONG;
    }
    for (char *slash = strchr(copy + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        if (mkdir(copy, 0700) < 0 && errno != EEXIST) {
            return -errno;
        }
        *slash = '/';
    }
    return mkdir(copy, 0700) < 0 && errno != EEXIST ? -errno : 0;
}

/* What users said to the models lies in there: nobody else may look. */
static int check_private(const char *path)
{
    struct stat st;
    if (stat(path, &st) < 0) {
        return -errno;
    }
    if (!S_ISDIR(st.st_mode)) {
        return -ENOTDIR;
    }
    if (st.st_uid != geteuid()) {
        return -EPERM;
    }
    return (st.st_mode & 077) && chmod(path, 0700) < 0 ? -errno : 0;
}

int places_make_private(const char *path)
{
    int rc = make_dirs(path);
    return rc < 0 ? rc : check_private(path);
}

int places_create(const struct server *s)
{
    if (s->in_memory) {
        return 0;
    }
    const char *path = s->config->cache_dir;
    int rc = places_make_private(path);
    if (rc < 0) {
        log_error("cache_dir %s: %s", path, strerror(-rc));
    }
    return rc;
}

void places_tell_missing(const struct config *c)
{
    for (size_t i = 0; i < c->models_dir.count; i++) {
        DIR *dir = opendir(c->models_dir.items[i]);
        if (dir) {
            closedir(dir);
        } else {
            log_warning("models_dir %s: %s", c->models_dir.items[i], strerror(errno));
        }
    }
}

/* Bytes that are free where the cache lies; 0: nobody knows. */
static uint64_t free_bytes(const struct config *c)
{
    struct statvfs fs;
    return statvfs(c->cache_dir, &fs) < 0 ? 0 : (uint64_t)fs.f_bavail * fs.f_frsize;
}

uint64_t places_store_bytes(const struct config *c)
{
    if (c->kv_store_bytes != 0) {
        return c->kv_store_bytes;
    }
    uint64_t tenth = free_bytes(c) / 10;
    return tenth != 0 && tenth < STORE_BYTES_DEFAULT ? tenth : STORE_BYTES_DEFAULT;
}

uint64_t places_weights_bytes(const struct config *c)
{
    return c->weights_cache_bytes != 0 ? c->weights_cache_bytes : free_bytes(c) / 4;
}
