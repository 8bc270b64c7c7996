#include "daemon/kv/cache_admin.h"

#include "daemon/io/files.h"
#include "daemon/io/io.h"
#include "daemon/kv/cache_internal.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool is_of(const struct kv_space *s, const char *realm)
{
    return realm == NULL || strcmp(s->realm, realm) == 0;
}

/* ---- facts ------------------------------------------------------------------------------- */

static void count_node(const struct kv_space *s, const struct kv_node *n, struct kv_space_facts *f)
{
    uint32_t end = (n->position + 1) * GQA_KV_BLOCK_TOKENS;
    f->n_blocks++;
    f->n_pinned += (n->flags & KV_BLOCK_PINNED) != 0;
    f->n_prefixes += n->first_child == NULL;
    f->n_tokens_max = end > f->n_tokens_max ? end : f->n_tokens_max;
    f->hits += n->hits;
    for (uint32_t c = 0; c < s->n_classes; c++) {
        f->memory_bytes += n->places[c].block != NULL ? s->block_bytes[c] : 0;
        f->store_bytes += n->places[c].state == KV_SAVED ? s->block_bytes[c] : 0;
    }
}

size_t kv_cache_list(const struct kv_cache *c, const char *realm, struct kv_space_facts *ret,
                     size_t max)
{
    size_t count = 0;
    for (const struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        if (!is_of(s, realm)) {
            continue;
        }
        if (count < max) {
            struct kv_space_facts *f = &ret[count];
            *f = (struct kv_space_facts){0};
            snprintf(f->realm, sizeof(f->realm), "%s", s->realm);
            snprintf(f->about, sizeof(f->about), "%s", s->identity.about);
            snprintf(f->trouble, sizeof(f->trouble), "%s", s->trouble);
            memcpy(f->id, s->identity.id, sizeof(f->id));
            uint32_t bucket = 0;
            for (struct kv_node *n = NULL; (n = kv_tree_next(&s->tree, &bucket, n)) != NULL;) {
                count_node(s, n, f);
            }
        }
        count++;
    }
    return count;
}

/* ---- drop -------------------------------------------------------------------------------- */

static void drop_node(struct kv_space *s, struct kv_node *n, struct kv_removed *removed)
{
    for (uint32_t c = 0; c < s->n_classes; c++) {
        struct kv_place *p = &n->places[c];
        if (p->state == KV_SAVING || p->checking) {
            continue;
        }
        removed->bytes += kv_place_is_there(p) ? s->block_bytes[c] : 0;
        if (p->state == KV_SAVED) {
            kv_space_forget(s, n, c);
        }
        kv_space_drop_copy(s, n, c);
    }
    uint32_t before = s->tree.n_nodes;
    kv_space_drop_if_empty(s, n);
    removed->n_blocks += before - s->tree.n_nodes;
}

/* Deepest first, so that a node has lost its children when its turn comes. -ENOMEM: nothing was
 * dropped. */
static int drop_space(struct kv_space *s, bool pinned_too, struct kv_removed *removed)
{
    size_t count;
    struct kv_node **nodes = kv_tree_by_position(&s->tree, NULL, NULL, &count);
    if (nodes == NULL) {
        return -ENOMEM;
    }
    while (count > 0) {
        struct kv_node *n = nodes[--count];
        bool leads_on = n->first_child != NULL; /* to something that stays */
        bool stays = n->users > 0 || leads_on || ((n->flags & KV_BLOCK_PINNED) && !pinned_too);
        if (!stays) {
            drop_node(s, n, removed);
        }
    }
    free(nodes);
    return 0;
}

int kv_cache_drop(struct kv_cache *c, const char *realm, const uint8_t *id, struct kv_removed *ret)
{
    int rc = 0;
    *ret = (struct kv_removed){0};
    for (struct kv_space *s = c->spaces; s != NULL && rc == 0; s = s->next) {
        if (is_of(s, realm) &&
            (id == NULL || memcmp(id, s->identity.id, sizeof(s->identity.id)) == 0)) {
            rc = drop_space(s, false, ret);
        }
    }
    return rc;
}

/* ---- purge ------------------------------------------------------------------------------- */

struct open_store {
    char realm[KV_REALM_BYTES];
    char name[KV_STORE_NAME_MAX + 1];
};

/* One purge: the open stores one after the other, then the files of those that are not open. */
struct purging {
    struct kv_news news;
    struct purging *next; /* of the cache's */
    struct kv_store_call call;
    struct io_call_job files_call;
    struct kv_cache *cache;
    struct kv_purge purge;
    struct kv_removed removed;
    bool all;
    char realm[KV_REALM_BYTES];
    struct kv_space *space; /* whose store is being purged; NULL: the files */
    int result;
    uint32_t n_open; /* stores that were open when the files' turn came: not to be touched */
    struct open_store *open; /* (n_open) */
};

static void purge_next(struct purging *p, struct kv_space *s);

bool kv_cache_is_quiet(const struct kv_cache *c, const char *realm)
{
    for (const struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        if (is_of(s, realm) && s->n_pending > 0) {
            return false;
        }
    }
    return true;
}

static bool is_held(const struct kv_cache *c, const char *realm)
{
    for (const struct kv_space *s = c->spaces; s != NULL; s = s->next) {
        uint32_t bucket = 0;
        struct kv_node *n = is_of(s, realm) ? kv_tree_next(&s->tree, &bucket, NULL) : NULL;
        for (; n != NULL; n = kv_tree_next(&s->tree, &bucket, n)) {
            if (n->users > 0) {
                return true;
            }
        }
    }
    return false;
}

/* A store's files are NAME.index, NAME.lock, NAME.cN, NAME.aside-N.*: NAME is the identity. */
static bool is_open(const struct purging *p, const char *realm, const char *file)
{
    for (uint32_t i = 0; i < p->n_open; i++) {
        const struct open_store *o = &p->open[i];
        if (strcmp(o->realm, realm) == 0 && strncmp(file, o->name, strlen(o->name)) == 0) {
            return true;
        }
    }
    return false;
}

static int note_open_stores(struct purging *p)
{
    p->open = calloc(p->cache->n_spaces + 1, sizeof(*p->open));
    if (p->open == NULL) {
        return -ENOMEM;
    }
    for (const struct kv_space *s = p->cache->spaces; s != NULL; s = s->next) {
        bool is_open = s->store != NULL || (s->state == KV_SPACE_OPENING && !s->awaits_purge);
        if (is_open) {
            struct open_store *o = &p->open[p->n_open++];
            snprintf(o->realm, sizeof(o->realm), "%s", s->realm);
            kv_space_store_name(s, o->name);
        }
    }
    return 0;
}

static int wipe_file(const struct io_files *files, int folder, const char *name)
{
    int fd;
    uint64_t bytes = 0;
    int rc = files->open(files->self, folder, name, IO_OPEN_EXISTING, &fd);
    if (rc < 0) {
        return rc;
    }
    rc = files->size(files->self, fd, &bytes);
    rc = rc < 0 || bytes == 0 ? rc : files->punch(files->self, fd, 0, bytes);
    rc = rc < 0 ? rc : files->sync(files->self, fd);
    files->close(files->self, fd);
    int gone = files->unlink(files->self, folder, name);
    return rc < 0 ? rc : gone;
}

/* Unless another process has its store open: -EWOULDBLOCK. */
static int wipe_closed(const struct io_files *files, int folder, const char *name)
{
    char lock[KV_STORE_NAME_MAX + 8];
    size_t stem = strcspn(name, ".");
    int fd;
    if (stem > KV_STORE_NAME_MAX) {
        return wipe_file(files, folder, name);
    }
    snprintf(lock, sizeof(lock), "%.*s.lock", (int)stem, name);
    int rc = files->open(files->self, folder, lock, IO_OPEN_EXISTING, &fd);
    if (rc < 0) {
        return rc == -ENOENT ? wipe_file(files, folder, name) : rc;
    }
    rc = files->lock(files->self, fd);
    rc = rc < 0 ? rc : wipe_file(files, folder, name);
    files->close(files->self, fd);
    return rc;
}

/* The io thread. Stores that are opened from now on come after this call. */
static int wipe_realm(struct purging *p, const char *realm)
{
    struct io_files files;
    char path[4096];
    int folder, rc = 0;
    io_files_system(p->cache->options.io, &files);
    snprintf(path, sizeof(path), "%s/%s", p->cache->folder, realm);
    DIR *dir = opendir(path);
    if (dir == NULL) {
        return errno == ENOENT ? 0 : -errno;
    }
    rc = files.open_folder(files.self, path, &folder);
    if (rc < 0) {
        closedir(dir);
        return rc;
    }
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        if (e->d_name[0] != '.' && !is_open(p, realm, e->d_name)) {
            int one = wipe_closed(&files, folder, e->d_name);
            rc = rc < 0 ? rc : one;
        }
    }
    closedir(dir);
    int synced = files.sync_folder(files.self, folder);
    files.close(files.self, folder);
    return rc < 0 ? rc : synced;
}

static int wipe_files(void *arg)
{
    struct purging *p = arg;
    if (!p->all) {
        return wipe_realm(p, p->realm);
    }
    DIR *dir = opendir(p->cache->folder);
    int rc = 0;
    for (struct dirent *e; dir != NULL && (e = readdir(dir)) != NULL;) {
        int one = e->d_name[0] != '.' ? wipe_realm(p, e->d_name) : 0;
        rc = rc < 0 ? rc : one;
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return rc;
}

static void note_result(void *arg, int result)
{
    struct purging *p = arg;
    p->result = p->result < 0 ? p->result : result;
    kv_cache_post(p->cache, &p->news);
}

/* Stores that were wanted meanwhile are opened now. */
static void finish(struct purging *p)
{
    struct kv_cache *c = p->cache;
    struct purging **link = &c->purges;
    while (*link != p) {
        link = &(*link)->next;
    }
    *link = p->next;
    for (struct kv_space *s = c->spaces; s != NULL && !c->closing; s = s->next) {
        if (s->awaits_purge && !kv_cache_is_purging(c, s->realm)) {
            s->awaits_purge = false;
            kv_space_open(s);
        }
    }
    p->purge.done(p->purge.arg, p->result, &p->removed);
    free(p->open);
    free(p);
}

bool kv_cache_is_purging(const struct kv_cache *c, const char *realm)
{
    for (const struct purging *p = c->purges; p != NULL; p = p->next) {
        if (p->all || strcmp(p->realm, realm) == 0) {
            return true;
        }
    }
    return false;
}

static void take_wiped(struct kv_news *news)
{
    struct purging *p = (struct purging *)news;
    p->cache->n_pending--;
    if (p->result == 0) {
        kv_folder_wiped(p->cache, p->all ? NULL : p->realm);
    }
    finish(p);
}

static void take_store_purged(struct kv_news *news)
{
    struct purging *p = (struct purging *)news;
    p->space->n_pending--;
    p->cache->n_pending--;
    purge_next(p, p->space->next);
}

/* Goes on with space s, or the first after it that has a store; then with the files. */
static void purge_next(struct purging *p, struct kv_space *s)
{
    struct kv_cache *c = p->cache;
    while (s != NULL && (s->store == NULL || !is_of(s, p->all ? NULL : p->realm))) {
        s = s->next;
    }
    c->n_pending++;
    if (s != NULL) {
        p->space = s;
        s->n_pending++;
        p->news.take = take_store_purged;
        p->call = (struct kv_store_call){.done = note_result, .arg = p};
        kv_store_purge(s->store, &p->call);
        return;
    }
    p->space = NULL;
    int rc = c->folder != NULL ? note_open_stores(p) : 0;
    p->news.take = take_wiped;
    p->files_call = (struct io_call_job){.fn = wipe_files, .done = note_result, .arg = p};
    if (c->folder == NULL || rc < 0 || io_submit_call(c->options.io, &p->files_call) < 0) {
        p->result = p->result < 0 ? p->result : rc;
        c->n_pending--;
        finish(p);
    }
}

int kv_cache_purge(struct kv_cache *c, const char *realm, const struct kv_purge *purge)
{
    if (!kv_cache_is_quiet(c, realm) || is_held(c, realm)) {
        return -EBUSY;
    }
    struct purging *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        return -ENOMEM;
    }
    p->cache = c;
    p->purge = *purge;
    p->all = realm == NULL;
    snprintf(p->realm, sizeof(p->realm), "%s", realm != NULL ? realm : "");
    /* No place may name what the stores are about to lose: all go before anything is wiped. */
    int rc = 0;
    for (struct kv_space *s = c->spaces; s != NULL && rc == 0; s = s->next) {
        rc = is_of(s, realm) ? drop_space(s, true, &p->removed) : 0;
    }
    if (rc < 0) {
        free(p);
        return rc;
    }
    p->next = c->purges;
    c->purges = p;
    kv_arena_trim(c->arena);
    purge_next(p, c->spaces);
    return 0;
}
