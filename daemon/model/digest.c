#include "daemon/model/digest.h"

#include "format/gguf.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define LINE_BYTES  512
#define LINES_MAX   256 /* models remembered; the oldest are forgotten */
#define STAMP_BYTES 160

struct digest {
    XXH3_state_t *state;
};

int digest_create(struct digest **ret)
{
    struct digest *d = calloc(1, sizeof(*d));
    if (d == NULL) {
        return -ENOMEM;
    }
    d->state = XXH3_createState();
    if (d->state == NULL) {
        free(d);
        return -ENOMEM;
    }
    XXH3_128bits_reset(d->state);
    *ret = d;
    return 0;
}

void digest_destroy(struct digest *d)
{
    if (d != NULL) {
        XXH3_freeState(d->state);
        free(d);
    }
}

void digest_update(struct digest *d, const void *data, size_t bytes)
{
    XXH3_128bits_update(d->state, data, bytes);
}

struct digest_value digest_value(const struct digest *d)
{
    struct digest_value value;
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(d->state));
    memcpy(value.bytes, canonical.digest, sizeof(value.bytes));
    return value;
}

/* ---- remembering ------------------------------------------------------------------------- */

/* What changes when a file does: of split models, all their files' stamps hashed into one. */
static bool stamp_of(const struct gguf *g, char stamp[STAMP_BYTES])
{
    struct digest *d;
    if (digest_create(&d) < 0) {
        return false;
    }
    bool ok = true;
    struct stat st = {0};
    for (uint32_t i = 0; ok && i < gguf_n_files(g); i++) {
        ok = fstat(gguf_file_fd(g, i), &st) == 0;
        const int64_t facts[] = {
            (int64_t)st.st_dev,          (int64_t)st.st_ino,          (int64_t)st.st_size,
            (int64_t)st.st_mtim.tv_sec,  (int64_t)st.st_mtim.tv_nsec, (int64_t)st.st_ctim.tv_sec,
            (int64_t)st.st_ctim.tv_nsec,
        };
        digest_update(d, facts, sizeof(facts));
    }
    struct digest_value v = digest_value(d);
    digest_destroy(d);
    int at = snprintf(stamp, STAMP_BYTES, "1 %" PRIu64 " %" PRIu64 " ", (uint64_t)st.st_dev,
                      (uint64_t)st.st_ino);
    for (size_t i = 0; i < sizeof(v.bytes); i++) {
        at += snprintf(stamp + at, STAMP_BYTES - (size_t)at, "%02x", v.bytes[i]);
    }
    return ok;
}

static bool parse_value(const char *text, struct digest_value *ret)
{
    struct digest_value v;
    for (size_t i = 0; i < sizeof(v.bytes); i++) {
        unsigned byte;
        if (sscanf(text + 2 * i, "%2x", &byte) != 1) {
            return false;
        }
        v.bytes[i] = (uint8_t)byte;
    }
    *ret = v;
    return true;
}

bool digest_recall(const char *memory, const struct gguf *g, struct digest_value *ret)
{
    char stamp[STAMP_BYTES], line[LINE_BYTES];
    FILE *f = memory != NULL && stamp_of(g, stamp) ? fopen(memory, "re") : NULL;
    bool found = false;
    size_t bytes = f != NULL ? strlen(stamp) : 0;
    while (f != NULL && fgets(line, sizeof(line), f) != NULL) {
        bool same = strlen(line) >= bytes + 1 + 2 * sizeof(ret->bytes) &&
                    memcmp(line, stamp, bytes) == 0 && line[bytes] == ' ';
        found = (same && parse_value(line + bytes + 1, ret)) || found;
    }
    if (f != NULL) {
        fclose(f);
    }
    return found;
}

/* Copies the lines of other files: of the newest ones, so that the file stays small. */
static void copy_others(const char *memory, const char *stamp, FILE *to)
{
    char line[LINE_BYTES];
    FILE *f = fopen(memory, "re");
    unsigned n = 0, skip;
    if (f == NULL) {
        return;
    }
    while (fgets(line, sizeof(line), f) != NULL) {
        n++;
    }
    skip = n >= LINES_MAX ? n - LINES_MAX + 1 : 0;
    rewind(f);
    while (fgets(line, sizeof(line), f) != NULL) {
        bool whole = line[0] != '\0' && line[strlen(line) - 1] == '\n';
        if (skip > 0) {
            skip--;
        } else if (whole && strncmp(line, stamp, strlen(stamp)) != 0) {
            fputs(line, to);
        }
    }
    fclose(f);
}

void digest_remember(const char *memory, const struct gguf *g, const struct digest_value *value)
{
    char stamp[STAMP_BYTES], path[4096];
    if (memory == NULL || !stamp_of(g, stamp) ||
        snprintf(path, sizeof(path), "%s.new", memory) >= (int)sizeof(path)) {
        return;
    }
    FILE *f = fopen(path, "we");
    if (f == NULL) {
        return;
    }
    copy_others(memory, stamp, f);
    fprintf(f, "%s ", stamp);
    for (size_t i = 0; i < sizeof(value->bytes); i++) {
        fprintf(f, "%02x", value->bytes[i]);
    }
    fputc('\n', f);
    bool ok = fflush(f) == 0 && fdatasync(fileno(f)) == 0;
    ok = fclose(f) == 0 && ok;
    if (!ok || rename(path, memory) < 0) {
        unlink(path);
    }
}
