/* daemon/model/registry_list.c - names, files and folders of models. */
#include "daemon/model/registry_internal.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SUFFIX ".gguf"

/* ---- names ------------------------------------------------------------------------------- */

static bool has_suffix(const char *name)
{
    size_t bytes = strlen(name);
    return bytes > strlen(SUFFIX) && strcmp(name + bytes - strlen(SUFFIX), SUFFIX) == 0;
}

/* They are quoted in errors and in the log. */
static bool has_control_characters(const char *name)
{
    for (const char *c = name; *c != '\0'; c++) {
        if ((unsigned char)*c < ' ' || *c == 0x7f) {
            return true;
        }
    }
    return false;
}

bool registry_is_plain_name(const char *name)
{
    return !has_control_characters(name) && name[0] != '\0' && name[0] != '.' &&
           strchr(name, '/') == NULL &&
           strlen(name) < sizeof(((struct registry_entry *)NULL)->name);
}

int registry_check_name(const struct registry *r, const char *asked, struct fmt_error *err)
{
    if (has_control_characters(asked)) {
        return fmt_fail(err, -EINVAL, "a model's name has no control characters");
    }
    if (asked[0] == '/') {
        return r->options.allow_paths
                   ? 0
                   : fmt_fail(err, -EACCES,
                              "'%s' is a path: this daemon takes names of its models folders",
                              asked);
    }
    if (!registry_is_plain_name(asked)) {
        return fmt_fail(err, -EINVAL, "'%s' is neither a model's name nor an absolute path", asked);
    }
    return r->n_dirs > 0
               ? 0
               : fmt_fail(err, -ENOENT, "no model '%s' in any folder: none is configured", asked);
}

int registry_locate(const char *asked, char *const *dirs, size_t n_dirs, char path[PATH_MAX],
                    struct fmt_error *err)
{
    if (asked[0] == '/') {
        if (realpath(asked, path) == NULL) {
            return fmt_fail(err, -errno, "%s: %s", asked, strerror(errno));
        }
        return 0;
    }
    for (size_t i = 0; i < n_dirs; i++) {
        int n =
            snprintf(path, PATH_MAX, "%s/%s%s", dirs[i], asked, has_suffix(asked) ? "" : SUFFIX);
        if (n > 0 && n < PATH_MAX && access(path, F_OK) == 0) {
            return 0;
        }
    }
    return fmt_fail(err, -ENOENT, "no model '%s' in the models folders", asked);
}

int registry_fail_taken(const struct entry *e, struct fmt_error *err)
{
    return fmt_fail(err, -EEXIST, "the name '%s' is taken by %s", e->name,
                    fmt_file_name(e->path != NULL ? e->path : e->asked));
}

char *registry_base_name(const char *path)
{
    char *name = strdup(fmt_file_name(path));
    if (name != NULL && has_suffix(name)) {
        name[strlen(name) - strlen(SUFFIX)] = '\0';
    }
    return name;
}

bool registry_is_same_name(const char *a, const char *b)
{
    size_t a_bytes = strlen(a), b_bytes = strlen(b);
    a_bytes -= has_suffix(a) ? strlen(SUFFIX) : 0;
    b_bytes -= has_suffix(b) ? strlen(SUFFIX) : 0;
    return a_bytes == b_bytes && memcmp(a, b, a_bytes) == 0;
}

struct entry *registry_find(struct registry *r, const char *name)
{
    struct entry *loading = NULL;
    for (struct entry *e = r->entries; e != NULL; e = e->next) {
        size_t bytes = strlen(e->name);
        bool same = strncmp(name, e->name, bytes) == 0 &&
                    (name[bytes] == '\0' || strcmp(name + bytes, SUFFIX) == 0);
        if (!same && strcmp(name, e->path != NULL ? e->path : e->asked) != 0) {
            continue;
        }
        if (e->model != NULL) {
            return e;
        }
        loading = loading != NULL ? loading : e;
    }
    return loading;
}

/* ---- listing ----------------------------------------------------------------------------- */

struct listing {
    struct registry_entry *items;
    size_t count, capacity;
};

static int list_add(struct listing *l, const char *name, const char *path,
                    enum registry_state state, struct model *model)
{
    if (l->count == l->capacity) {
        size_t capacity = l->capacity > 0 ? l->capacity * 2 : 16;
        struct registry_entry *items = realloc(l->items, capacity * sizeof(*items));
        if (items == NULL) {
            return -ENOMEM;
        }
        l->items = items;
        l->capacity = capacity;
    }
    struct registry_entry *item = &l->items[l->count++];
    *item = (struct registry_entry){.state = state};
    snprintf(item->name, sizeof(item->name), "%s", name);
    snprintf(item->path, sizeof(item->path), "%s", path);
    item->model = model != NULL ? model_ref(model) : NULL;
    return 0;
}

static void list_finish(struct listing *l)
{
    for (size_t i = 0; i < l->count; i++) {
        model_unref(l->items[i].model);
    }
    free(l->items);
}

/* "NAME-00002-of-00003.gguf": a later part of a split model is no model of its own. */
static bool is_later_part(const char *name)
{
    static const char form[] = "-NNNNN-of-NNNNN";
    size_t bytes = strlen(name) - strlen(SUFFIX), n = sizeof(form) - 1;
    if (bytes < n) {
        return false;
    }
    const char *at = name + bytes - n;
    for (size_t i = 0; i < n; i++) {
        bool fits = form[i] == 'N' ? at[i] >= '0' && at[i] <= '9' : at[i] == form[i];
        if (!fits) {
            return false;
        }
    }
    return strncmp(at, "-00001", 6) != 0;
}

static bool is_listed(const struct listing *l, const char *name, const char *path)
{
    for (size_t i = 0; i < l->count; i++) {
        if (strcmp(l->items[i].name, name) == 0 || strcmp(l->items[i].path, path) == 0) {
            return true;
        }
    }
    return false;
}

/* Models of one folder that are not listed yet; of one name, the first folder's counts. */
static int list_folder(const char *dir, struct listing *l)
{
    DIR *d = opendir(dir);
    if (d == NULL) {
        return 0; /* an absent folder holds no models */
    }
    int rc = 0;
    for (struct dirent *file; rc == 0 && (file = readdir(d)) != NULL;) {
        char path[PATH_MAX];
        int n = snprintf(path, sizeof(path), "%s/%s", dir, file->d_name);
        if (!has_suffix(file->d_name) || file->d_name[0] == '.' || is_later_part(file->d_name) ||
            n < 0 || n >= (int)sizeof(path)) {
            continue;
        }
        char *name = registry_base_name(path);
        rc = name == NULL ? -ENOMEM : 0;
        if (rc == 0 && !is_listed(l, name, path)) {
            rc = list_add(l, name, path, REGISTRY_AVAILABLE, NULL);
        }
        free(name);
    }
    closedir(d);
    return rc;
}

/* Under the lock. */
static int list_entries(struct registry *r, bool loaded_only, struct listing *l)
{
    int rc = 0;
    for (struct entry *e = r->entries; rc == 0 && e != NULL; e = e->next) {
        if (e->model != NULL || !loaded_only) {
            rc = list_add(l, e->name, e->path != NULL ? e->path : e->asked,
                          e->model != NULL ? REGISTRY_LOADED : REGISTRY_LOADING, e->model);
        }
    }
    return rc;
}

int registry_copy_dirs(const struct registry *r, char ***ret, size_t *ret_n)
{
    char **dirs = calloc(r->n_dirs + 1, sizeof(*dirs));
    for (size_t i = 0; dirs != NULL && i < r->n_dirs; i++) {
        dirs[i] = strdup(r->dirs[i]);
        if (dirs[i] == NULL) {
            registry_free_dirs(dirs, i);
            return -ENOMEM;
        }
    }
    *ret = dirs;
    *ret_n = r->n_dirs;
    return dirs != NULL ? 0 : -ENOMEM;
}

int registry_list(struct registry *r, struct registry_entry **ret, size_t *ret_count)
{
    struct listing l = {0};
    char **dirs = NULL;
    size_t n_dirs = 0;
    pthread_mutex_lock(&r->lock);
    int rc = list_entries(r, false, &l);
    rc = rc < 0 ? rc : registry_copy_dirs(r, &dirs, &n_dirs);
    pthread_mutex_unlock(&r->lock);
    for (size_t i = 0; rc == 0 && i < n_dirs; i++) {
        rc = list_folder(dirs[i], &l);
    }
    registry_free_dirs(dirs, n_dirs);
    if (rc < 0) {
        list_finish(&l);
        return rc;
    }
    for (size_t i = 0; i < l.count; i++) {
        struct stat st;
        l.items[i].bytes = stat(l.items[i].path, &st) == 0 ? (uint64_t)st.st_size : 0;
    }
    *ret = l.items;
    *ret_count = l.count;
    return 0;
}

int registry_loaded(struct registry *r, struct registry_entry **ret, size_t *ret_count)
{
    struct listing l = {0};
    pthread_mutex_lock(&r->lock);
    int rc = list_entries(r, true, &l);
    pthread_mutex_unlock(&r->lock);
    if (rc < 0) {
        list_finish(&l);
        return rc;
    }
    *ret = l.items;
    *ret_count = l.count;
    return 0;
}
