/* Names of the store's files, and sets of files that cannot be used. */
#include "daemon/kv/store_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SETS 64 /* more are seen by the next look */

void store_file_name(const struct kv_store *s, const char *what, char *ret)
{
    snprintf(ret, STORE_FILE_NAME_BYTES, "%s.%s", s->name, what);
}

struct sets {
    const struct kv_store *s;
    struct set {
        uint64_t number, bytes;
    } sets[MAX_SETS];
    uint32_t n;
    uint64_t highest;
};

/* "NAME.aside-17.c0" is of set 17. */
static bool parse(const struct kv_store *s, const char *name, uint64_t *ret_number)
{
    size_t n = strlen(s->name);
    static const char word[] = ".aside-";
    if (strncmp(name, s->name, n) != 0 || strncmp(name + n, word, sizeof(word) - 1) != 0) {
        return false;
    }
    const char *digits = name + n + sizeof(word) - 1;
    char *end;
    if (*digits < '0' || *digits > '9') {
        return false;
    }
    errno = 0;
    unsigned long long number = strtoull(digits, &end, 10);
    if (errno != 0 || *end != '.' || number == UINT64_MAX) {
        return false;
    }
    *ret_number = number;
    return true;
}

static int on_name(void *arg, const char *name, uint64_t bytes)
{
    struct sets *sets = arg;
    uint64_t number;
    uint32_t i = 0;
    if (!parse(sets->s, name, &number)) {
        return 0;
    }
    sets->highest = number > sets->highest ? number : sets->highest;
    while (i < sets->n && sets->sets[i].number != number) {
        i++;
    }
    if (i < MAX_SETS) {
        sets->n += i == sets->n;
        sets->sets[i].number = number;
        sets->sets[i].bytes += bytes;
    }
    return 0;
}

static int find_sets(struct kv_store *s, struct sets *ret)
{
    *ret = (struct sets){.s = s};
    return s->files.list(s->files.self, s->folder, on_name, ret);
}

static void part_name(const struct kv_store *s, uint64_t number, uint32_t part, char *ret)
{
    char what[40];
    if (part == KV_MAX_CLASSES) {
        snprintf(what, sizeof(what), "aside-%llu.index", (unsigned long long)number);
    } else {
        snprintf(what, sizeof(what), "aside-%llu.c%u", (unsigned long long)number, part);
    }
    store_file_name(s, what, ret);
}

int store_aside_keep(struct kv_store *s, uint32_t n_kept)
{
    struct sets sets;
    int rc = find_sets(s, &sets);
    while (rc == 0 && sets.n > n_kept) {
        uint32_t oldest = 0;
        for (uint32_t i = 1; i < sets.n; i++) {
            oldest = sets.sets[i].number < sets.sets[oldest].number ? i : oldest;
        }
        for (uint32_t part = 0; part <= KV_MAX_CLASSES && rc == 0; part++) {
            char name[STORE_FILE_NAME_BYTES];
            part_name(s, sets.sets[oldest].number, part, name);
            rc = s->files.unlink(s->files.self, s->folder, name);
            rc = rc == -ENOENT ? 0 : rc;
        }
        sets.sets[oldest] = sets.sets[--sets.n];
    }
    s->bytes_aside = 0;
    for (uint32_t i = 0; i < sets.n; i++) {
        s->bytes_aside += sets.sets[i].bytes;
    }
    return rc;
}

/* The index first: a crash in between leaves data that no index names, which is nobody's. */
int store_set_aside(struct kv_store *s)
{
    struct sets sets;
    char from[STORE_FILE_NAME_BYTES], to[STORE_FILE_NAME_BYTES];
    int rc = find_sets(s, &sets);
    if (rc < 0) {
        return rc;
    }
    for (uint32_t i = 0; i <= KV_MAX_CLASSES && rc == 0; i++) {
        uint32_t part = KV_MAX_CLASSES - i;
        char what[8];
        snprintf(what, sizeof(what), "c%u", part);
        store_file_name(s, part == KV_MAX_CLASSES ? "index" : what, from);
        part_name(s, sets.highest + 1, part, to);
        rc = s->files.rename(s->files.self, s->folder, from, to);
        rc = rc == -ENOENT ? 0 : rc;
    }
    rc = rc < 0 ? rc : s->files.sync_folder(s->files.self, s->folder);
    return rc < 0 ? rc : store_aside_keep(s, KV_STORE_ASIDE_MAX);
}
